"""Lists and deletes conntrack's flows, over netlink.

Own encoding, because of what it costs: a busy DNS service has tens of thousands of flows, all of which have to be
looked at when an endpoint goes, within the sync that waits for it. The kernel picks protocol and port (CTA_FILTER,
since 5.8; older ones send everything), we pick the addresses: its own IPv6 address filter matches what it should not.
Deleting sends a flow's own tuple back, so it can only hit that flow.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from ..flows import CONNECTIONLESS, Flow, Stale
from ..model import PROTOCOL_NAMES, PROTOCOL_NUMBERS, Endpoint, Family, Protocol
from .netlink import NESTED, NETFILTER, Netlink, Request, attribute, attributes

_CTNETLINK = 1 << 8
_GET, _DELETE = _CTNETLINK | 1, _CTNETLINK | 2
_TUPLE_ORIG, _TUPLE_REPLY, _FILTER = 1, 2, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC = {Family.V4: 1, Family.V6: 3}
_IP_DST = {Family.V4: 2, Family.V6: 4}
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_FILTER_ORIG_FLAGS, _FILTER_PROTO_NUM, _FILTER_DST_PORT = 1, 1 << 3, 1 << 5
_MOST_DUMPS = 4
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


def forget(stale: Iterable[Stale]) -> int:
    """Delete these flows; returns how many there were. Raises OSError."""
    wanted: dict[tuple[Family, Protocol], dict[tuple[str, int], Stale]] = defaultdict(dict)
    for s in stale:
        wanted[s.family, s.protocol][s.destination, s.port] = s  # the last one knows best who lives
    count = 0
    with Netlink.open(NETFILTER) as netlink:
        for (family, protocol), by_place in wanted.items():
            ports = {port for _, port in by_place}
            found = []
            for flow, tuple_ in _dump_ports(netlink, family, protocol, ports):
                meant = by_place.get((flow.destination, flow.port))
                if meant and meant.means(flow):
                    found.append(tuple_)
            count += _delete(netlink, family, found)
    return count


def flows(family: Family) -> Iterator[Flow]:
    """All flows of connectionless protocols. Raises OSError."""
    with Netlink.open(NETFILTER) as netlink:
        for protocol in sorted(CONNECTIONLESS):
            for flow, _ in _dump(netlink, family, protocol, 0):
                yield flow


def _dump_ports(
    netlink: Netlink, family: Family, protocol: Protocol, ports: Collection[int]
) -> Iterator[tuple[Flow, bytes]]:
    """Flows to these ports; where there are many of them, to all: for each the kernel goes through its whole table."""
    for port in ports if len(ports) <= _MOST_DUMPS else (0,):
        yield from _dump(netlink, family, protocol, port)


def _dump(netlink: Netlink, family: Family, protocol: Protocol, port: int) -> Iterator[tuple[Flow, bytes]]:
    """Flows of a protocol, to a port unless that is 0, each with its original tuple as the kernel wrote it."""
    flags = _FILTER_PROTO_NUM | (_FILTER_DST_PORT if port else 0)
    number = bytes([PROTOCOL_NUMBERS[protocol]])
    proto = attribute(_PROTO_NUM, number) + attribute(_PROTO_DST_PORT, struct.pack(">H", port))
    asked = attribute(_TUPLE_ORIG | NESTED, attribute(_TUPLE_PROTO | NESTED, proto)) + attribute(
        _FILTER | NESTED, attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", flags)) + attribute(2, bytes(4))
    )
    for answer in netlink.dump(Request(_GET, _header(family) + asked)):
        found = attributes(answer[len(_header(family)) :])
        flow = _flow(family, found)
        if flow and flow.protocol == protocol and port in (0, flow.port):
            yield flow, found[_TUPLE_ORIG]


def _flow(family: Family, found: dict[int, bytes]) -> Flow | None:
    original, reply = attributes(found[_TUPLE_ORIG]), attributes(found[_TUPLE_REPLY])
    proto = attributes(original[_TUPLE_PROTO])
    number = proto[_PROTO_NUM][0]
    protocol = PROTOCOL_NAMES.get(number)
    if protocol is None or _PROTO_DST_PORT not in proto:
        return None
    to = attributes(original[_TUPLE_IP])[_IP_DST[family]]
    by = attributes(reply[_TUPLE_IP])[_IP_SRC[family]]
    (port,) = struct.unpack(">H", proto[_PROTO_DST_PORT])
    (by_port,) = struct.unpack(">H", attributes(reply[_TUPLE_PROTO])[_PROTO_SRC_PORT])
    endpoint = Endpoint(socket.inet_ntop(_AF[family], by), by_port)
    return Flow(family, protocol, socket.inet_ntop(_AF[family], to), port, str(endpoint))


def _delete(netlink: Netlink, family: Family, tuples: list[bytes]) -> int:
    """How many of these flows were still there."""
    head = _header(family)
    codes = netlink.execute([Request(_DELETE, head + attribute(_TUPLE_ORIG | NESTED, tuple_)) for tuple_ in tuples])
    for code in codes:
        if code not in (0, errno.ENOENT):
            raise OSError(code, f"conntrack: {os.strerror(code)}")
    return codes.count(0)


def _header(family: Family) -> bytes:
    """struct nfgenmsg"""
    return struct.pack("=BBH", _AF[family], 0, 0)
