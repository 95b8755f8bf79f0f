"""An agent on node n1 of the golden network, run as an operator would run it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.golden_rules import GOLDEN, differences, golden, without_nfacct

from .topology import Network

OBJECTS = ("services.json", "endpointslices.json", "node.json")
GOLDEN_RULES = (without_nfacct(golden("iptables-save.txt")), without_nfacct(golden("ip6tables-save.txt")))


def golden_manifests(folder: Path) -> Path:
    """A new folder of manifests with the golden objects."""
    folder.mkdir(parents=True)
    for name in OBJECTS:
        shutil.copy(GOLDEN / name, folder / name)
    return folder


def command(source: Path, *flags: str) -> list[str]:
    """The agent of n1 with kube-proxy's golden configuration and, as its flags say, in any mode."""
    config = ["--config", str(GOLDEN / "config.yaml"), "--hostname-override", "n1"]
    return [sys.executable, "-m", "miniproxy", "run", *config, "--source", str(source), *flags]


class Agent(msgspec.Struct, frozen=True):
    process: subprocess.Popen[str]
    log: Path

    def check(self) -> None:
        """Fails the test when the agent has ended, with the last it said."""
        code = self.process.poll()
        assert code is None, f"the agent ended with exit code {code}:\n{self.tail()}"

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def kill(self) -> None:
        """As a crash, or the kernel when memory is short: no chance to tidy up."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(network: Network, argv: list[str], log: Path) -> Iterator[Agent]:
    """Runs an agent's command on the node; what it says is appended to `log`."""
    with log.open("a") as out, network.node.process(*argv, log=out) as process:
        yield Agent(process, log)


def rule_differences(network: Network, variant: str, want: tuple[str, str]) -> list[str]:
    """Where the node's iptables and ip6tables are not what these texts say; see tests/golden_rules.py."""
    held = network.iptables_save(variant)
    return [difference for pair in zip(want, held, strict=True) for difference in differences(*pair)]
