"""Reads a whole nftables table from the kernel, in its own binary form, and writes elements of its sets.

`nft list` would do as well, but it takes seconds for a hundred thousand elements, lists what clients have been
remembered with them, and spells rules in a way that changes with its version. `nft -f` would do as well, but it takes
longer to read an element than the kernel to add it, and starting it longer than a change.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..model import Family
from .netlink import CREATE, NESTED, NETFILTER, Netlink, Refused, Request, attribute, attributes

_NFTABLES = 10 << 8
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = (_NFTABLES | n for n in (1, 4, 7, 10, 13))
_NEWSETELEM, _DELSETELEM = _NFTABLES | 12, _NFTABLES | 14
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_LIST_LIMIT = 60_000  # bytes of elements in a message: an attribute's length has 16 bits
_AF = {Family.V4: 2, Family.V6: 10}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_ANONYMOUS, _MAP = 1, 8  # flags of sets
_TRIES = 5


class RawElement(NamedTuple):
    key: bytes  # each field padded to 4 bytes
    end: bytes  # last key of an interval; b"" for a single one
    data: bytes  # b"" in a set
    chain: str  # where a verdict goes; "" if it is none


class RawTable(NamedTuple):
    comment: str
    chains: dict[str, tuple[str, str, int] | None]  # (type, hook, priority) of base chains
    rules: dict[str, list[str]]  # the comments of a chain's rules
    sets: dict[str, bool]  # named sets and maps; True is a map
    elements: dict[str, list[RawElement]]


def read_table(netlink: Netlink, family: Family, name: str, skip: Container[str] = ()) -> RawTable | None:
    """A table with all that is in it but the elements of the sets in `skip`; None if there is none.

    It is read in many steps; when somebody writes meanwhile, it is read again. Raises OSError.
    """
    for _ in range(_TRIES):
        reader = _Reader(netlink, family, name)
        table = reader.table(skip)
        if len(reader.generations) <= 1:
            break
    return table


def open_netlink() -> Netlink:
    """A socket for read_table and write_elements. Raises OSError."""
    return Netlink.open(NETFILTER)


class RefusedElement(NamedTuple):
    """The first element that the kernel did not take; `place` is −1 where it does not say which of the set's."""

    code: int  # errno
    adding: bool
    set: str
    place: int


Encoded = Mapping[str, Sequence[bytes]]  # attributes NFTA_LIST_ELEM by the set or map they belong to


def write_elements(
    netlink: Netlink, family: Family, table: str, deleted: Encoded, added: Encoded
) -> RefusedElement | None:
    """Delete and add elements, in this order, in one transaction: all of it, or none. Raises OSError."""
    head = struct.pack("=BBH", _AF[family], 0, 0) + attribute(1, table.encode() + b"\0")
    messages = [_Message(False, *part) for part in _portions(deleted)]
    messages += [_Message(True, *part) for part in _portions(added)]
    if not messages:
        return None
    requests = [message.request(head) for message in messages]
    batch = struct.pack("=BBH", 0, 0, socket.htons(_NFTABLES >> 8))
    refused = netlink.transact(Request(_BATCH_BEGIN, batch), requests, Request(_BATCH_END, batch))
    return messages[refused.request].blame(refused) if refused else None


class _Message(NamedTuple):
    """Elements of one set that go in one message; `first` is the index of the first of them."""

    adding: bool
    set: str
    first: int
    elements: Sequence[bytes]

    def request(self, head: bytes) -> Request:
        payload = head + attribute(2, self.set.encode() + b"\0") + attribute(3 | NESTED, b"".join(self.elements))
        return Request(_NEWSETELEM if self.adding else _DELSETELEM, payload, CREATE if self.adding else 0)

    def blame(self, refused: Refused) -> RefusedElement:
        """The kernel says at which byte of the message the element begins."""
        start = refused.length - sum(map(len, self.elements))
        place = -1
        for number, element in enumerate(self.elements, self.first):
            if start == refused.offset:
                place = number
            start += len(element)
        return RefusedElement(refused.code, self.adding, self.set, place)


def _portions(encoded: Encoded) -> Iterator[tuple[str, int, Sequence[bytes]]]:
    for name, elements in encoded.items():
        first, size = 0, 0
        for index, element in enumerate(elements):
            if size + len(element) > _LIST_LIMIT:
                yield name, first, elements[first:index]
                first, size = index, 0
            size += len(element)
        yield name, first, elements[first:]


class _Reader:
    def __init__(self, netlink: Netlink, family: Family, name: str) -> None:
        self.netlink = netlink
        self.header = struct.pack("=BBH", _AF[family], 0, 0)
        self.name = name
        self.table_attribute = attribute(1, name.encode() + b"\0")  # of every request and answer
        self.generations: set[bytes] = set()  # the kernel counts the changes of its ruleset, and tells with each answer

    def table(self, skip: Container[str]) -> RawTable | None:
        found = [a for a in self.list(_GETTABLE) if _text(a[1]) == self.name]
        if not found:
            return None
        comment = _comment(found[0].get(6, b""))
        chains = {_text(a[3]): _hook(a) for a in self.list(_GETCHAIN) if _text(a[1]) == self.name}
        rules: dict[str, list[str]] = {chain: [] for chain in chains}
        for a in self.list(_GETRULE):
            if _text(a[1]) == self.name:
                rules.setdefault(_text(a[2]), []).append(_comment(a.get(7, b"")))
        flags = {_text(a[2]): _number(a.get(3, b"")) for a in self.list(_GETSET)}
        sets = {name: bool(flag & _MAP) for name, flag in flags.items() if not flag & _ANONYMOUS}
        elements = {name: list(self.elements(name)) for name in sets if name not in skip}
        return RawTable(comment, chains, rules, sets, elements)

    def list(self, kind: int, more: bytes = b"") -> Iterator[dict[int, bytes]]:
        request = Request(kind, self.header + self.table_attribute + more)
        for payload in self.netlink.dump(request):
            self.generations.add(payload[2:4])
            yield attributes(payload[4:])

    def elements(self, name: str) -> Iterator[RawElement]:
        for answer in self.list(_GETSETELEM, attribute(2, name.encode() + b"\0")):
            yield from _elements(answer.get(3, b""))


def _elements(data: bytes) -> Iterator[RawElement]:
    offset = 0
    while offset + 4 <= len(data):
        (length,) = struct.unpack_from("=H", data, offset)
        if length < 4:
            return
        found = attributes(data[offset + 4 : offset + length])
        offset += (length + 3) & ~3
        value = attributes(found[2]) if 2 in found else {}
        chain = _text(attributes(value[2]).get(2, b"")) if 2 in value else ""
        # A key or a datum is wrapped in an attribute of its own, of 4 bytes.
        yield RawElement(found.get(1, b"")[4:], found.get(10, b"")[4:], value.get(1, b""), chain)


def _hook(chain: dict[int, bytes]) -> tuple[str, str, int] | None:
    if 4 not in chain:
        return None
    hook = attributes(chain[4])
    (priority,) = struct.unpack(">i", hook[2])
    return _text(chain.get(7, b"")), _HOOKS[_number(hook[1])], priority


def _comment(userdata: bytes) -> str:
    """nft's comment, which the kernel keeps without looking at it: (type 0, length, text) among such triples."""
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset : offset + 2]
        if kind == 0:
            return _text(userdata[offset + 2 : offset + 2 + length])
        offset += 2 + length
    return ""


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
