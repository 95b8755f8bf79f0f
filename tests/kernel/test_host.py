"""Preparing the machine: which modules, which of conntrack's settings, and what may be refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from miniproxy.config import Settings
from miniproxy.kernel import host
from miniproxy.kernel.exec import Completed
from tests.packets.topology import Namespace


@pytest.mark.parametrize(
    ("per_core", "least", "cores", "limit"),
    [
        (32768, 131072, 2, 131072),
        (32768, 131072, 8, 262144),
        (32768, 131072, 128, 1048576),
        (1000, 0, 4, 4000),
        (None, 131072, 8, None),
    ],
)
def test_limit_is_by_kube_proxys_formula(per_core: int | None, least: int, cores: int, limit: int | None) -> None:
    settings = Settings(conntrack_max_per_core=per_core, conntrack_min=least)
    assert host.connections_limit(settings, cores) == limit


@pytest.fixture
def netfilter(tmp_path: Path) -> Path:
    """A kernel's conntrack settings, as files."""
    for name in ("tcp_timeout_established", "tcp_timeout_close_wait", "udp_timeout", "udp_timeout_stream"):
        (tmp_path / f"nf_conntrack_{name}").write_text("1\n")
    (tmp_path / "nf_conntrack_tcp_be_liberal").write_text("0\n")
    (tmp_path / "nf_conntrack_max").write_text("65536\n")
    (tmp_path / "hashsize").write_text("16384\n")
    return tmp_path


def values(folder: Path) -> dict[str, str]:
    return {file.name.removeprefix("nf_conntrack_"): file.read_text().strip() for file in folder.iterdir()}


def test_sets_what_the_configuration_says_and_leaves_the_rest_alone(netfilter: Path) -> None:
    settings = Settings(conntrack_udp_timeout=30.0, conntrack_tcp_be_liberal=True, conntrack_min=1 << 19)
    host.prepare_conntrack(settings, netfilter, netfilter / "hashsize")
    limit = host.connections_limit(settings, os.cpu_count() or 1)
    assert limit is not None
    assert values(netfilter) == {
        "tcp_timeout_established": "86400",
        "tcp_timeout_close_wait": "3600",
        "tcp_be_liberal": "1",
        "udp_timeout": "30",
        "udp_timeout_stream": "1",
        "max": str(limit),
        "hashsize": str(limit // 4),
    }


def test_table_is_never_made_smaller(netfilter: Path) -> None:
    (netfilter / "hashsize").write_text("4194304")
    host.prepare_conntrack(Settings(), netfilter, netfilter / "hashsize")
    assert values(netfilter)["hashsize"] == "4194304"


def test_null_leaves_the_kernel_alone(netfilter: Path) -> None:
    before = values(netfilter)
    settings = Settings(
        conntrack_max_per_core=None,
        conntrack_tcp_established_timeout=None,
        conntrack_tcp_close_wait_timeout=None,
    )
    host.prepare_conntrack(settings, netfilter, netfilter / "hashsize")
    assert values(netfilter) == before


def test_asks_for_each_module_and_goes_on_where_one_is_missing() -> None:
    asked = []

    def modprobe(argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        asked.append(argv[1])
        return Completed(argv[1] == "ip_tables", "", "not found")

    host.load_modules(host.modules(Settings(mode="ipvs", ipvs_scheduler="sh")), modprobe)
    assert asked == ["nf_conntrack", "ip_tables", "ip6_tables", "ip_set", "ip_vs", "ip_vs_sh", "dummy"]


def test_no_modprobe_is_no_failure() -> None:
    def missing(argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        raise FileNotFoundError(argv[0])

    host.load_modules(("nf_conntrack",), missing)


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_init_only_prepares_a_node_and_ends(tmp_path: Path) -> None:
    config = tmp_path / "config.conf"
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "conntrack: {tcpCloseWaitTimeout: 1234s}\n"
    )
    with Namespace.create() as node:
        before = node.run("iptables-nft", "-t", "nat", "-S")
        node.run(sys.executable, "-m", "miniproxy", "run", "--init-only", "--config", str(config))
        assert node.run("sysctl", "-n", "net.netfilter.nf_conntrack_tcp_timeout_close_wait").strip() == "1234"
        assert node.run("sysctl", "-n", "net.ipv4.conf.all.route_localnet").strip() == "1"
        assert node.run("iptables-nft", "-t", "nat", "-S") == before
