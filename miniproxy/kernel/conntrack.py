"""Lists and deletes conntrack's flows, over netlink.

Own encoding, because of what it costs: a busy DNS service has tens of thousands of flows, all of which have to be
looked at when an endpoint goes, within the sync that waits for it. The kernel picks protocol and port (CTA_FILTER,
since 5.8; older ones send everything), we pick the addresses: its own IPv6 address filter matches what it should not.
Deleting sends a flow's own tuple back, so it can only hit that flow.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator

from ..flows import CONNECTIONLESS, Flow, Stale
from ..model import Endpoint, Family, Protocol

_NETLINK_NETFILTER = 12
_CTNETLINK = 1 << 8
_GET, _DELETE = _CTNETLINK | 1, _CTNETLINK | 2
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_TUPLE_ORIG, _TUPLE_REPLY, _FILTER = 1, 2, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC = {Family.V4: 1, Family.V6: 3}
_IP_DST = {Family.V4: 2, Family.V6: 4}
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_FILTER_ORIG_FLAGS, _FILTER_PROTO_NUM, _FILTER_DST_PORT = 1, 1 << 3, 1 << 5
_NESTED = 0x8000
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NUMBER: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
_GONE = 2  # ENOENT

Attributes = dict[int, bytes]


def forget(stale: Iterable[Stale]) -> int:
    """Delete these flows; returns how many there were. Raises OSError."""
    wanted: dict[tuple[Family, Protocol, int], set[tuple[str, str]]] = defaultdict(set)
    for s in stale:
        wanted[s.family, s.protocol, s.port].add((s.destination, s.endpoint))
    count = 0
    with _open() as netlink:
        for (family, protocol, port), pairs in wanted.items():
            # The dump has to end before the socket can carry deletes.
            found = [
                tuple_
                for flow, tuple_ in _dump(netlink, family, protocol, port)
                if not pairs.isdisjoint(_descriptions(flow))
            ]
            for tuple_ in found:
                count += _delete(netlink, family, tuple_)
    return count


def flows(family: Family) -> Iterator[Flow]:
    """All flows of connectionless protocols. Raises OSError."""
    with _open() as netlink:
        for protocol in sorted(CONNECTIONLESS):
            for flow, _ in _dump(netlink, family, protocol, 0):
                yield flow


def _descriptions(flow: Flow) -> tuple[tuple[str, str], ...]:
    """(destination, endpoint) of all Stale that mean this flow."""
    to, by = flow.destination, flow.endpoint
    return (to, by), ("", by), (to, ""), ("", "")


def _open() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    netlink.bind((0, 0))
    return netlink


def _dump(netlink: socket.socket, family: Family, protocol: Protocol, port: int) -> Iterator[tuple[Flow, bytes]]:
    """Flows of a protocol, to a port unless that is 0, each with its original tuple as the kernel wrote it."""
    flags = _FILTER_PROTO_NUM | (_FILTER_DST_PORT if port else 0)
    proto = _attribute(_PROTO_NUM, bytes([_NUMBER[protocol]])) + _attribute(_PROTO_DST_PORT, struct.pack(">H", port))
    asked = _attribute(_TUPLE_ORIG | _NESTED, _attribute(_TUPLE_PROTO | _NESTED, proto)) + _attribute(
        _FILTER | _NESTED, _attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", flags)) + _attribute(2, bytes(4))
    )
    for body in _ask(netlink, _GET, _REQUEST | _DUMP, family, asked):
        attributes = _parse(body)
        flow = _flow(family, attributes)
        if flow and flow.protocol == protocol and port in (0, flow.port):
            yield flow, attributes[_TUPLE_ORIG]


def _flow(family: Family, attributes: Attributes) -> Flow | None:
    original, reply = _parse(attributes[_TUPLE_ORIG]), _parse(attributes[_TUPLE_REPLY])
    proto = _parse(original[_TUPLE_PROTO])
    number = proto[_PROTO_NUM][0]
    protocol = next((p for p, n in _NUMBER.items() if n == number), None)
    if protocol is None or _PROTO_DST_PORT not in proto:
        return None
    to = _parse(original[_TUPLE_IP])[_IP_DST[family]]
    by = _parse(reply[_TUPLE_IP])[_IP_SRC[family]]
    (port,) = struct.unpack(">H", proto[_PROTO_DST_PORT])
    (by_port,) = struct.unpack(">H", _parse(reply[_TUPLE_PROTO])[_PROTO_SRC_PORT])
    endpoint = Endpoint(socket.inet_ntop(_AF[family], by), by_port)
    return Flow(family, protocol, socket.inet_ntop(_AF[family], to), port, str(endpoint))


def _delete(netlink: socket.socket, family: Family, tuple_: bytes) -> bool:
    """Whether the flow was still there."""
    try:
        list(_ask(netlink, _DELETE, _REQUEST | _ACK, family, _attribute(_TUPLE_ORIG | _NESTED, tuple_)))
    except OSError as error:
        if error.errno != _GONE:
            raise
        return False
    return True


def _ask(netlink: socket.socket, kind: int, flags: int, family: Family, attributes: bytes) -> Iterator[bytes]:
    """Send one request; the attributes of each answer. Raises OSError as the kernel says."""
    body = struct.pack("=BBH", _AF[family], 0, 0) + attributes
    netlink.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    while True:
        data = netlink.recv(1 << 18)
        while data:
            length, answer = struct.unpack_from("=IH", data)
            if answer in (_ERROR, _DONE):
                (code,) = struct.unpack_from("=i", data, 16)
                if code:
                    raise OSError(-code, f"conntrack: {os.strerror(-code)}")
                return
            yield data[20:length]
            data = data[(length + 3) & ~3 :]


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _parse(data: bytes) -> Attributes:
    found = {}
    while data:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found
