"""Settings: every choice an operator has, in one immutable value."""

from __future__ import annotations

from typing import Literal

import msgspec

from .model import Family

Mode = Literal["iptables", "ipvs", "nftables"]
Variant = Literal["auto", "nft", "legacy"]
DetectLocal = Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent runs with: kube-proxy's configuration, resolved. Times are seconds."""

    mode: Mode = "iptables"
    source: str = ""  # folder of manifests
    node_name: str = ""
    cluster_cidrs: tuple[str, ...] = ()  # at most one per family
    detect_local_mode: DetectLocal = "ClusterCIDR"
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    node_port_addresses: tuple[str, ...] = ()  # CIDRs or ("primary",); (): all local addresses
    masquerade_bit: int = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period: float = 30.0
    min_sync_period: float = 1.0
    iptables_variant: Variant = "auto"
    conntrack_tcp_be_liberal: bool = False

    @property
    def masquerade_mark(self) -> int:
        return 1 << self.masquerade_bit

    def cluster_cidr(self, family: Family) -> str:
        """The CIDR of pods in that family, "" if there is none."""
        return next((cidr for cidr in self.cluster_cidrs if Family.of(cidr) is family), "")
