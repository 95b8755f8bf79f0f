"""The agents under test as processes: started, stopped, and weighed from outside.

Each reads the same KubeProxyConfiguration and finds its tools in the same folder, where `iptables` is the variant
under test, and where a counting run finds wrappers that note each call (see `Tools`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from ..lab.subprocesses import python_module
from .eye import Eye, IptablesLegacy, IptablesNft, Ipvs, Nftables
from .feeds import Folder
from .world import NODE, NODE_NAME, POD_CIDR, World

Mode = Literal["iptables-nft", "iptables-legacy", "nftables", "ipvs"]
MODES: tuple[Mode, ...] = ("iptables-nft", "iptables-legacy", "nftables", "ipvs")
# The last two only write: see python_iptables.py, ipvs_tools.py.
AgentName = Literal["miniproxy", "kube-proxy", "python-iptables", "tools"]
METRICS = "127.0.0.1:10249"
_STOP_PATIENCE = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Setup(NamedTuple):
    """What an agent is to run with."""

    name: AgentName
    mode: Mode
    endpoints: int  # of each service
    kubeconfig: Path | None  # None: the folder
    folder: Folder | None
    program: Path | None = None  # kube-proxy's
    defaults: bool = False  # minSyncPeriod as it comes, and not 1 ms
    counting: bool = False


class Agent:
    """One agent, started and stopped any number of times."""

    def __init__(self, world: World, setup: Setup) -> None:
        self.world = world
        self.setup = setup
        self.tools = Tools(world, setup.mode, counting=setup.counting)
        self._process: subprocess.Popen[bytes] | None = None
        self._config = world.folder / f"{setup.mode}{'-defaults' if setup.defaults else ''}.yaml"

    @property
    def log(self) -> str:
        return f"{self.setup.name}.log"

    def start(self) -> None:
        setup = self.setup
        self._config.write_text(_configuration(setup))
        env = {"PATH": f"{self.tools.folder}:{os.environ['PATH']}", "XTABLES_LOCKFILE": str(self.world.folder / "lock")}
        if setup.name == "kube-proxy":
            argv = [str(setup.program), f"--config={self._config}"]
        else:
            argv = [*python_module("miniproxy", "run"), f"--config={self._config}"]
            if setup.mode.startswith("iptables"):
                argv.append(f"--iptables-variant={setup.mode.removeprefix('iptables-')}")
            if setup.folder:
                argv.append(f"--source={setup.folder.folder}")
        self._process = self.world.start(NODE, argv, self.log, env)

    def stop(self) -> None:
        """By SIGTERM, as a rollout does it; the rules stay."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def cpu(self) -> float:
        """Seconds of CPU used so far, with those of its children that have ended."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS

    def own_cpu(self) -> float:
        """Seconds of CPU used in user space by the agent itself, tools and kernel left out."""
        return int(self._proc("stat").rpartition(")")[2].split()[11]) / _TICKS

    def memory(self) -> tuple[int, int]:
        """(bytes resident, the most there ever were)."""
        status = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+)", self._proc("status"), re.MULTILINE))
        return int(status["VmRSS"]) * 1024, int(status["VmHWM"]) * 1024

    def metrics(self) -> Mapping[str, float]:
        """The Prometheus metrics, by name with labels; empty while the agent does not serve them.

        Not for polling: a page is work for the agent, for miniproxy four runs of iptables.
        """

        def fetch() -> str:
            with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=5) as answer:
                return bytes(answer.read()).decode()

        try:
            text = self.world.inside(NODE, fetch)
        except OSError:
            return {}
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in lines if "_bucket{" not in name}

    def eye(self) -> Eye:
        match self.setup.mode:
            case "iptables-nft":
                return IptablesNft(self.world)
            case "iptables-legacy":
                return IptablesLegacy(self.world, self.setup.endpoints)
            case "ipvs":
                return Ipvs(self.world)
            case _ if self.setup.name == "kube-proxy":
                return Nftables(self.world, "kube-proxy", "service-ips")
            case _:
                return Nftables(self.world, "miniproxy", "cluster-ips")

    def _proc(self, file: str) -> str:
        assert self._process is not None
        return Path(f"/proc/{self._process.pid}/{file}").read_text()


def flush(world: World) -> None:
    """Empty the node's packet filters, whoever filled them."""
    empty = "*{}\n{}COMMIT\n"
    heads = {
        "nat": ":PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n",
        "filter": ":INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n",
        "mangle": ":PREROUTING ACCEPT\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n",
    }
    tables = "".join(empty.format(table, head) for table, head in heads.items())
    commands: list[tuple[list[str], str]] = [
        (["nft", "flush", "ruleset"], ""),
        (["iptables-legacy-restore"], tables),
        (["ip6tables-legacy-restore"], tables),
        (["ipvsadm", "--clear"], ""),
        (["ipset", "destroy"], ""),
        (["ip", "link", "del", "kube-ipvs0"], ""),
        (["conntrack", "-F"], ""),
    ]
    for argv, text in commands:
        # What this kernel does not have needs no flushing.
        with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
            world.run(NODE, argv, text)


class Calls(NamedTuple):
    """What an agent had its tools do."""

    processes: int
    bytes: int  # on their standard inputs
    operations: int  # lines of those, elements in a list of them counted one by one


class Tools:
    """A folder for the head of PATH with one variant's iptables; with `counting`, wrappers that note every call."""

    _ACTIONS = ("", "-save", "-restore")
    _OTHERS = ("nft", "ipset", "ipvsadm", "conntrack", "ip")

    def __init__(self, world: World, mode: Mode, *, counting: bool) -> None:
        self.folder = world.folder / f"tools-{mode}{'-counting' if counting else ''}"
        self._calls = world.folder / "calls"
        variant = "legacy" if mode in ("iptables-legacy", "ipvs") else "nft"
        self.folder.mkdir(exist_ok=True)
        for family in ("iptables", "ip6tables"):
            for action in self._ACTIONS:
                self._add(family + action, f"{family}-{variant}{action}", counting)
                if counting:
                    self._add(f"{family}-{variant}{action}", f"{family}-{variant}{action}", counting)
        for tool in self._OTHERS if counting else ():
            self._add(tool, tool, counting)

    def _add(self, name: str, tool: str, counting: bool) -> None:
        real, link = shutil.which(tool), self.folder / name
        if real is None or link.is_symlink() or link.exists():
            return
        if not counting:
            link.symlink_to(real)
            return
        # tee hands on what it reads; the tool's exit status is the pipeline's.
        link.write_text(
            f'#!/bin/sh\nlist=$(mktemp {self._calls}/XXXXXXXXXX)\ntee "$list" | exec -a {name} {real} "$@"\n'.replace(
                "#!/bin/sh", "#!/bin/bash"
            )
        )
        link.chmod(0o755)

    def start_counting(self) -> None:
        shutil.rmtree(self._calls, ignore_errors=True)
        self._calls.mkdir()

    def counted(self) -> Calls:
        texts = [path.read_text(errors="replace") for path in self._calls.iterdir()]
        return Calls(
            len(texts), sum(len(t) for t in texts), sum(_operations(line) for t in texts for line in t.splitlines())
        )


def _operations(line: str) -> int:
    if not line or line.startswith("#"):
        return 0
    elements = re.match(r"(?:add|delete|destroy|create) element [^{]*\{(.*)\}", line)
    # Elements whose keys or data hold commas of their own do not occur.
    return elements[1].count(",") + 1 if elements else 1


def _configuration(setup: Setup) -> str:
    kind, _, _ = setup.mode.partition("-")
    # A periodic full sync in the middle of a measurement would be noise for whoever has it.
    periods = {} if setup.defaults else {"syncPeriod": "15m", "minSyncPeriod": "1ms"}
    lines = [
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1",
        "kind: KubeProxyConfiguration",
        f"mode: {kind}",
        f"hostnameOverride: {NODE_NAME}",
        f"clusterCIDR: {POD_CIDR}",
        f"metricsBindAddress: {METRICS}",
        "conntrack: {maxPerCore: 0}",  # belongs to the machine, not to a namespace
        f"{kind}:",
        *(f"  {key}: {value}" for key, value in periods.items()),
    ]
    if not periods:
        lines[-1] += " {}"
    if setup.kubeconfig:
        lines.append(f"clientConnection: {{kubeconfig: {setup.kubeconfig}}}")
    return "\n".join(lines) + "\n"


def wait_quiet(agent: Agent, eye: Eye, seconds: float = 0.4, patience: float = 60.0) -> None:
    """Until the agent has neither written nor used noticeable CPU for so long."""
    end = time.monotonic() + patience
    since, stamp, cpu = time.monotonic(), eye.stamp(), agent.cpu()
    while (began := time.monotonic()) - since < seconds and began < end:
        fresh, used = eye.stamp(), agent.cpu()
        if fresh != stamp or used - cpu > 0.02:
            since, stamp, cpu = time.monotonic(), fresh, used
        time.sleep(max(0.05, rest(time.monotonic() - began)))


def rest(looked: float) -> float:
    """After a look that took so long: in user-mode Linux, whoever looks takes the agent's only processor."""
    return 5 * looked
