"""Which modes this machine's kernel and tools can do, found by trying, in a namespace that is gone afterwards."""

from __future__ import annotations

import shutil
import subprocess

from .agents import Mode

_TRIES: dict[Mode, list[list[str]]] = {
    "iptables-nft": [["iptables-nft", "-t", "nat", "-L"], ["iptables-nft-restore", "--version"]],
    "iptables-legacy": [["iptables-legacy", "-t", "nat", "-L"]],
    "nftables": [["nft", "add table ip try; add chain ip try c { type nat hook output priority 0; }"]],
    "ipvs": [["ipvsadm", "-Ln"], ["ipset", "list"]],
}


def modes() -> tuple[Mode, ...]:
    """Those that work here."""
    return tuple(mode for mode, commands in _TRIES.items() if all(map(_works, commands)))


def _works(argv: list[str]) -> bool:
    if shutil.which(argv[0]) is None:
        return False
    done = subprocess.run(["unshare", "--net", *argv], capture_output=True, check=False)
    return done.returncode == 0
