"""On a kernel without IPVS the agent says so, names the module and the way out, and writes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from miniproxy.kernel.ipvs import Ipvs
from miniproxy.lab import uml
from miniproxy.transaction import TransactionError
from tests.packets.topology import Namespace

pytestmark = pytest.mark.skipif(uml.has_ip_vs(), reason="this kernel has IPVS")


def test_opening_says_what_is_missing() -> None:
    with pytest.raises(TransactionError, match=r"no ip_vs.*modprobe ip_vs.*--proxy-mode iptables"):
        Ipvs.open()


def test_the_agent_ends_and_has_written_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    flags = ["--proxy-mode", "ipvs", "--hostname-override", "n1", "--source", str(tmp_path / "manifests")]
    with Namespace.create() as namespace:
        argv = namespace.command([sys.executable, "-m", "miniproxy", "run", *flags])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "modprobe ip_vs" in done.stderr
        assert "Traceback" not in done.stderr
        assert "KUBE" not in namespace.run("iptables-legacy-save") + namespace.run("iptables-nft-save")
        assert "KUBE" not in namespace.run("ipset", "save")
        assert "kube-ipvs0" not in namespace.run("ip", "link")
