"""What the kernel holds, asked in microseconds: cheap enough to ask a thousand times a second, and the same for
every agent, since none of the agents' tools is used.

An Eye has a `stamp`, which becomes another one whenever somebody has written, and counts `services`. Its sockets
live in the node's namespace; it may be used from anywhere.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Hashable, Iterator
from typing import Protocol

from ..model import ServicePortName
from ..planner.names import service_suffix
from .objects import NAMESPACE
from .world import NODE, World

_NETLINK_NETFILTER = 12
_NLM_REQUEST, _NLM_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NFTABLES = 10 << 8
_GET_CHAIN, _GET_ELEMENTS, _GET_GENERATION = _NFTABLES | 4, _NFTABLES | 13, _NFTABLES | 16
_FAMILY_IP = 2
_IPT_SO_GET_INFO = 64
_INFO_BYTES = 84  # struct ipt_getinfo: name[32], 11 words, num_entries, size


class Eye(Protocol):
    def stamp(self) -> Hashable:
        """Another value after every write."""
        ...

    def services(self) -> int:
        """So many services can be reached, all of them completely; 0 before there is any."""
        ...

    def endpoints(self, service: str) -> Hashable:
        """Another value when this service has another number of endpoints."""
        ...

    def close(self) -> None: ...


class _Netfilter:
    """The nf_tables side of a netlink socket: three questions."""

    def __init__(self, world: World) -> None:
        def open_() -> socket.socket:
            found = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
            found.bind((0, 0))
            return found

        self._socket = world.inside(NODE, open_)

    def close(self) -> None:
        self._socket.close()

    def generation(self) -> int:
        """Counts the transactions that were committed in this network namespace."""
        (payload,) = self._ask(_GET_GENERATION, 0, b"")
        return int.from_bytes(dict(_attributes(payload[4:]))[1], "big")

    def uses(self, table: str, chain: str) -> int:
        """Rules in a chain, and jumps to it; 0 when there is none."""
        replies = self._ask(_GET_CHAIN, _FAMILY_IP, _text(1, table) + _text(3, chain))
        return int.from_bytes(dict(_attributes(replies[0][4:]))[6], "big") if replies else 0

    def elements(self, table: str, name: str) -> int:
        """Elements of a set or map; 0 when there is none."""
        replies = self._ask(_GET_ELEMENTS, _FAMILY_IP, _text(1, table) + _text(2, name), dump=True)
        lists = [dict(_attributes(reply[4:])).get(3, b"") for reply in replies]
        return sum(1 for each in lists for _ in _attributes(each))

    def _ask(self, kind: int, family: int, attributes: bytes, *, dump: bool = False) -> list[bytes]:
        flags = _NLM_REQUEST | (_NLM_DUMP if dump else 0)
        body = struct.pack("BBH", family, 0, 0) + attributes
        self._socket.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        replies: list[bytes] = []
        while True:
            data = self._socket.recv(1 << 18)
            while data:
                length, kind, _, _, _ = struct.unpack_from("=IHHII", data)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    return replies
                replies.append(data[16:length])
                data = data[length + 3 & ~3 :]
            if not dump:
                return replies


def _text(kind: int, text: str) -> bytes:
    value = text.encode() + b"\0"
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += length + 3 & ~3


class IptablesNft:
    """KUBE-SERVICES of table nat, in the nft variant."""

    def __init__(self, world: World) -> None:
        self._netfilter = _Netfilter(world)

    def stamp(self) -> Hashable:
        return self._netfilter.generation()

    def services(self) -> int:
        # Two built-in chains jump to it, and its last rule is the one for NodePorts.
        return max(0, self._netfilter.uses("nat", "KUBE-SERVICES") - 3)

    def endpoints(self, service: str) -> Hashable:
        # The stamp would not do: a restore commits table filter before it comes to nat.
        name = ServicePortName(NAMESPACE, service, "http", "TCP")
        return self._netfilter.uses("nat", f"KUBE-SVC-{service_suffix(name)}")

    def close(self) -> None:
        self._netfilter.close()


class Nftables:
    """A set or map of an nftables table that has one element for each service address."""

    def __init__(self, world: World, table: str, name: str) -> None:
        self._netfilter = _Netfilter(world)
        self._table = table
        self._name = name

    def stamp(self) -> Hashable:
        return self._netfilter.generation()

    def services(self) -> int:
        return self._netfilter.elements(self._table, self._name)

    def endpoints(self, service: str) -> Hashable:
        return self.stamp()

    def close(self) -> None:
        self._netfilter.close()


class IptablesLegacy:
    """Table nat of the legacy variant, which says how many entries it has without showing them."""

    def __init__(self, world: World, endpoints: int) -> None:
        # A service takes a dispatch rule, and a chain with its head, its end and 1 + n rules; an endpoint a chain of 2.
        self._entries_per_service = 1 + (3 + endpoints) + 4 * endpoints
        self._socket = world.inside(NODE, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
        self._getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt

    def stamp(self) -> Hashable:
        return self._info()

    def services(self) -> int:
        return self._info()[0] // self._entries_per_service

    def endpoints(self, service: str) -> Hashable:
        return self._info()

    def close(self) -> None:
        self._socket.close()

    def _info(self) -> tuple[int, int]:
        """(entries, bytes)."""
        buffer = ctypes.create_string_buffer(b"nat", _INFO_BYTES)
        size = ctypes.c_uint(_INFO_BYTES)
        if self._getsockopt(self._socket.fileno(), socket.SOL_IP, _IPT_SO_GET_INFO, buffer, ctypes.byref(size)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        entries, length = struct.unpack_from("=II", buffer.raw, _INFO_BYTES - 8)
        return entries, length


class Ipvs:
    """The virtual servers in /proc/net/ip_vs."""

    def __init__(self, world: World) -> None:
        self._file = world.inside(NODE, lambda: open("/proc/thread-self/net/ip_vs", "rb", buffering=0))  # noqa: SIM115

    def stamp(self) -> Hashable:
        return self._read()

    def services(self) -> int:
        content = self._read()
        # A virtual server without real ones is not complete.
        return sum(1 for part in content.split(b"\nTCP ")[1:] if b"\n-> " in part)

    def endpoints(self, service: str) -> Hashable:
        return self._read()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> bytes:
        self._file.seek(0)
        parts = []
        while part := self._file.read(1 << 20):
            parts.append(part)
        # Connection counts change without anybody writing: only addresses and weights count.
        lines = b"".join(parts).splitlines()
        return b"\n".join(b" ".join(line.split()[:4]) for line in lines)
