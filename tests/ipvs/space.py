"""A network namespace for this very thread, so that the agent's own sockets live in it; and how its state looks."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from miniproxy.agent import Agent
from miniproxy.backends import Dataplane, choose
from miniproxy.config import Settings
from miniproxy.kernel.links import local_addresses
from miniproxy.model import Batch, Family, Object
from miniproxy.planner.ipvs_text import VirtualServer
from miniproxy.problems import News
from miniproxy.transaction import Transaction

from .texts import parse_servers

SETTINGS = Settings(
    mode="ipvs",
    node_name="n1",
    cluster_cidrs=("10.128.0.0/9", "fd00:128::/32"),
    iptables_variant="legacy",  # the only one that works in user-mode Linux
)
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def network_namespace() -> Iterator[None]:
    """A new one, with the golden node's addresses on a link."""
    with empty_namespace():
        lines = ["link set lo up", "link add eth0 type dummy", "link set eth0 up"]
        lines += [f"addr add {a} dev eth0" for a in ("172.30.0.2/24", "172.30.9.2/24")]
        ip(*lines, "addr add fd00:30::2/64 dev eth0 nodad")
        yield


@contextmanager
def empty_namespace() -> Iterator[None]:
    """A new one; at the end it is gone with all it holds."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _checked(_libc.unshare(_CLONE_NEWNET))
    try:
        yield
    finally:
        _checked(_libc.setns(before, _CLONE_NEWNET))
        os.close(before)


def run(*argv: str, stdin: str = "") -> str:
    """A command to its end; raises AssertionError with what it says when it fails."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: exit code {done.returncode}\n{done.stderr}"
    return done.stdout


def ip(*lines: str) -> None:
    run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")


class Node:
    """An agent in IPVS mode in this namespace, driven by hand."""

    def __init__(self, objects: Sequence[Object], settings: Settings = SETTINGS) -> None:
        self.dataplane: Dataplane = choose(settings)
        self.problems: list[str] = []
        self.agent = Agent(
            settings,
            self.dataplane.planner,
            self.dataplane.backends,
            local_addresses=local_addresses,
            review=self.dataplane.review,
            announce=self._announce,
        )
        self.agent.handle(Batch(tuple(objects), synced=True))

    def sync(self) -> list[Transaction]:
        """Returns what was written."""
        results = self.agent.sync()
        assert [r.error for r in results if r.error] == []
        assert [r.result.set_aside for r in results if r.result and r.result.set_aside] == []
        return [t for r in results if r.result for t in r.result.transactions]

    def apply(self, *upserts: Object) -> list[Transaction]:
        self.agent.handle(Batch(upserts))
        return self.sync()

    def _announce(self, news: News) -> None:
        self.problems += map(str, news.appeared)


def servers() -> list[VirtualServer]:
    """What ipvsadm says there is, but for virtual servers by firewall mark, which nobody here makes."""
    lines = [line for line in run("ipvsadm", "-Sn").splitlines(True) if line.split()[1] != "-f"]
    return [server._replace(servers=tuple(sorted(server.servers))) for server in parse_servers("".join(lines))]


def addresses() -> set[str]:
    """Those of kube-ipvs0, as ip says, without its link-local one."""
    words = [line.split() for line in run("ip", "-o", "addr", "show", "dev", "kube-ipvs0").splitlines()]
    return {w[3].partition("/")[0] for w in words if not w[3].startswith("fe80:")}


def rules(family: Family) -> str:
    return run("ip6tables-legacy-save" if family is Family.V6 else "iptables-legacy-save")
