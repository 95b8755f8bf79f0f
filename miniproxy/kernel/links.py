"""The node's own addresses, and those of kube-ipvs0, over netlink.

Address messages are encoded here: pyroute2 takes 0.3 ms for each, and IPVS mode has one address per VIP.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..model import Family
from ..planner.ipvs_text import LINK
from .netlink import CREATE, EXCLUSIVE, ROUTE, Netlink, Request, attribute, attributes, messages

_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_ADDRESS_GROUPS = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NO_DAD = 2  # IFA_F_NODAD
_GET_LINK, _IFLA_NAME = 18, 3
_LINK = struct.Struct("=BBHiII")  # struct ifinfomsg: family, –, type, index, flags, change
_MESSAGE = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index of the link
_LOST = _MESSAGE.pack(0, 0, 0, 0, 0xFFFFFFFF)  # stands for changes that did not fit into the socket: of no link of ours


class Addresses(NamedTuple):
    """Addresses of one family in this network namespace, canonical, without link-local ones."""

    virtual: frozenset[str]  # of kube-ipvs0
    own: frozenset[str]  # of all other links


def addresses(family: Family) -> Addresses:
    """Raises OSError."""
    virtual: set[str] = set()
    own: set[str] = set()
    index = link_index(LINK)
    with Netlink.open(ROUTE) as netlink:
        for payload in netlink.dump(Request(_GET_ADDRESS, _MESSAGE.pack(_AF[family], 0, 0, 0, 0))):
            _, _, _, _, link = _MESSAGE.unpack_from(payload)
            found = attributes(payload[_MESSAGE.size :])
            raw = found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]  # a peer's address is not ours
            address = ipaddress.ip_address(raw)
            if not (address.version == 6 and address.is_link_local):
                (virtual if link == index else own).add(str(address))
    return Addresses(frozenset(virtual), frozenset(own))


def local_addresses(family: Family) -> list[str]:
    """Every address of every link of this network namespace, without link-local ones (no NodePort is there) and
    those of kube-ipvs0 (they are the services').
    """
    return sorted(addresses(family).own)


def watch(changed: Callable[[], None], stop: Callable[[], bool]) -> None:
    """Call `changed` whenever an address of this network namespace comes or goes, but for those of kube-ipvs0.

    Returns soon after `stop` says so. It may call once too often, never too seldom. Raises OSError.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, ROUTE) as sock:
        sock.bind((0, _ADDRESS_GROUPS))
        sock.settimeout(0.5)
        ours = 0  # the number of kube-ipvs0: not asked for with each of thousands of VIPs
        while not stop():
            try:
                found = list(messages(sock.recv(1 << 16)))
            except TimeoutError:
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found = [(_NEW_ADDRESS, 0, _LOST)]
            touched = {
                _MESSAGE.unpack_from(payload)[4]
                for kind, _, payload in found
                if kind in (_NEW_ADDRESS, _DELETE_ADDRESS)
            }
            if touched - {ours}:
                ours = link_index(LINK)
            if touched - {ours}:
                changed()


def link_index(name: str) -> int:
    """The number of a link, 0 if there is none of that name. Raises OSError.

    The C library's if_nametoindex would have the kernel start modprobe for a link that is not there.
    """
    with Netlink.open(ROUTE) as netlink:
        try:
            (found,) = netlink.get(Request(_GET_LINK, bytes(_LINK.size) + attribute(_IFLA_NAME, name.encode() + b"\0")))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return 0
    return int(_LINK.unpack_from(found)[3])


def make_dummy(name: str) -> None:
    """Make a link of type dummy unless it is there. Raises OSError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ip:
            ip.link("add", ifname=name, kind="dummy")
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise OSError(error.code, f"cannot make the link {name}: {error}") from error


def remove_link(name: str) -> bool:
    """Remove a link with all its addresses; False if there is none. Raises OSError."""
    index = link_index(name)
    if not index:
        return False
    from pyroute2 import IPRoute  # not before: it is large, and mostly there is no such link
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ip:
            ip.link("del", index=index)
    except NetlinkError as error:
        raise OSError(error.code, f"cannot remove the link {name}: {error}") from error
    return True


def change_request(address: str, index: int, *, add: bool) -> Request:
    """The message that adds an address to the link of that number, or deletes it."""
    v6 = ":" in address
    raw = socket.inet_pton(socket.AF_INET6 if v6 else socket.AF_INET, address)
    # On a link that is down, detection of duplicates never ends, and the address would stay tentative.
    header = _MESSAGE.pack(_AF[Family.of(address)], len(raw) * 8, _NO_DAD if v6 and add else 0, 0, index)
    payload = header + attribute(_IFA_LOCAL, raw) + attribute(_IFA_ADDRESS, raw)
    return Request(_NEW_ADDRESS if add else _DELETE_ADDRESS, payload, CREATE | EXCLUSIVE if add else 0)


def change_addresses(changes: Sequence[tuple[str, bool]]) -> list[tuple[str, int]]:
    """Add (True) or delete addresses of kube-ipvs0; returns those that failed, with the errno.

    What is so already counts as done. Raises OSError when there is no kube-ipvs0.
    """
    index = link_index(LINK)
    if not index and any(add for _, add in changes):
        raise OSError(errno.ENODEV, f"there is no link {LINK}")
    if not index:
        return []
    with Netlink.open(ROUTE) as netlink:
        results = netlink.execute([change_request(address, index, add=add) for address, add in changes])
    fine = {True: errno.EEXIST, False: errno.EADDRNOTAVAIL}
    return [
        (address, code) for (address, add), code in zip(changes, results, strict=True) if code and code != fine[add]
    ]
