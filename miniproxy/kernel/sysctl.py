"""Kernel settings the agent needs: sets its own, checks those that belong to the operator."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

from ..config import Settings
from ..model import Family

log = logging.getLogger(__name__)

_PROC = Path("/proc/sys")
_FORWARD = {Family.V4: "net/ipv4/ip_forward", Family.V6: "net/ipv6/conf/all/forwarding"}


def read(name: str, root: Path = _PROC) -> str | None:
    """A setting's value; None where the kernel does not have it. `name` with slashes: "net/ipv4/ip_forward"."""
    try:
        return (root / name).read_text().strip()
    except OSError:
        return None


def ensure(name: str, value: str, root: Path = _PROC) -> bool:
    """Set a setting unless it is so already; False, and a warning, when the kernel does not let us."""
    if read(name, root) == value:
        return True
    try:
        (root / name).write_text(value)
    except OSError as error:
        log.warning("cannot set %s to %s: %s", name, value, error)
        return False
    log.info("set %s to %s", name, value)
    return True


def forwarding_problem(family: Family, root: Path = _PROC) -> str:
    """Why this node would not forward packets to pods, "" if it does.

    Only said, never changed: whether a machine is a router is its owner's decision.
    """
    name = _FORWARD[family]
    if read(name, root) != "0":
        return ""
    return f"{name} is 0: {family} packets to pods are not forwarded (sysctl -w {name.replace('/', '.')}=1)"


def prepare_iptables(settings: Settings, root: Path = _PROC) -> None:
    """What iptables mode needs: NodePorts on 127.0.0.1 are routed to pods only with route_localnet."""
    localhost = not settings.node_port_addresses or any(
        c.startswith("127.") or c == "0.0.0.0/0" for c in settings.node_port_addresses
    )
    if settings.localhost_node_ports and localhost:
        ensure("net/ipv4/conf/all/route_localnet", "1", root)


def prepare_ipvs(settings: Settings, root: Path = _PROC) -> None:
    """What IPVS mode needs; route_localnet is left alone, since NodePorts do not answer on 127.0.0.1."""
    wanted = {
        "net/ipv4/vs/conntrack": "1",  # packets of IPVS pass iptables' masquerading
        # A client that uses its port again is scheduled anew (kubernetes#81775; kernels before 5.9 lose a second).
        "net/ipv4/vs/conn_reuse_mode": "1" if _kernel() >= (5, 9) else "0",
        "net/ipv4/vs/expire_nodest_conn": "1",  # a flow to a deleted real server moves on with its next packet
        "net/ipv4/vs/expire_quiescent_template": "1",  # affinity does not hold on to a server of weight 0
    }
    if settings.ipvs_strict_arp:
        wanted |= {"net/ipv4/conf/all/arp_ignore": "1", "net/ipv4/conf/all/arp_announce": "2"}
    for name, value in wanted.items():
        ensure(name, value, root)


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int(minor.partition("-")[0])
