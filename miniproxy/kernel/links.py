"""The node's own addresses, asked of the kernel over netlink."""

from __future__ import annotations

import socket

from ..model import Family

_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


def local_addresses(family: Family) -> list[str]:
    """Every address of every link of this network namespace, without link-local ones (no NodePort is there)."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        found = [dict(message["attrs"]) for message in ip.get_addr(family=_AF[family])]
    addresses = (attrs.get("IFA_LOCAL") or attrs["IFA_ADDRESS"] for attrs in found)
    return sorted({a for a in addresses if not a.lower().startswith("fe80:")})
