"""Reads and writes ipsets over netlink, in the words of `ipset save` and `ipset restore`.

The program ipset looks up the protocol of each entry in /etc/protocols, and makes a system call for nearly each: that
would be most of what a first load costs. Only the types of sets that IPVS mode makes are known here.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache

from ..model import PROTOCOL_NUMBERS
from ..planner.ipvs_text import IpSet, SetEntry
from ..transaction import TransactionError
from .netlink import NESTED, NET_ORDER, NETFILTER, TRANSIENT, Netlink, Request, attribute, attributes, explain, walk

# linux/netfilter/ipset/ip_set.h
_SUBSYSTEM = 6 << 8  # of nfnetlink
_CREATE, _DESTROY, _LIST, _ADD, _DEL = 2, 3, 7, 9, 10
_PROTOCOL, _NAME, _TYPE, _REVISION, _FAMILY, _DATA, _ADT = 1, 2, 3, 4, 5, 7, 8
_IP, _PORT, _PORT_TO, _PROTO, _MOST, _IP2, _CIDR2 = 1, 4, 5, 7, 19, 20, 21  # within _DATA
_HEADER = struct.pack("=BBH", socket.AF_INET, 0, 0)  # struct nfgenmsg; the family of sets is an attribute
_VERSION = attribute(_PROTOCOL, b"\x06")  # understood by every kernel since 2.6.39
_be16, _be32 = struct.Struct(">H"), struct.Struct(">I")
# Revisions of Linux 3.18: a newer one might be unknown to the program ipset, with which people look at sets.
_REVISIONS = {"hash:ip": 4, "hash:ip,port": 5, "hash:ip,port,ip": 5, "hash:ip,port,net": 7, "bitmap:port": 3}
_FAMILIES: dict[str, int] = {"inet": socket.AF_INET, "inet6": socket.AF_INET6, "": socket.AF_UNSPEC}
_FAMILY_NAMES = {number: name for name, number in _FAMILIES.items()}
_PROTOCOLS = {protocol.lower(): number for protocol, number in PROTOCOL_NUMBERS.items()}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOLS.items()}
_WORDS = {
    errno.EEXIST: "a set of that name and of another type exists",
    4097: "the kernel speaks another protocol version",
    4098: "the kernel does not have this type of set",
    4099: "there are too many sets",
    4100: "the set is in use",
    4102: "the set is of another type",
    4352: "the set is full",
}


def read(names: Iterable[str]) -> Iterator[IpSet | SetEntry]:
    """The sets of these names that there are, with their entries. Raises OSError."""
    with Netlink.open(NETFILTER) as netlink:
        for name in names:
            try:
                yield from _decode(netlink.dump(Request(_SUBSYSTEM | _LIST, _HEADER + _VERSION + _named(name))))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise OSError(error.errno, f"cannot read ipset {name}: {_explain(error.errno)}") from error


def restore(lines: Iterable[str]) -> None:
    """Execute lines of `ipset restore`; what is so already is fine. Raises TransactionError, OSError."""
    asked = list(lines)
    with Netlink.open(NETFILTER) as netlink:
        codes = netlink.execute([encode(line) for line in asked])
    for line, code in zip(asked, codes, strict=True):
        if code and not (code == errno.ENOENT and line.startswith("destroy")):
            raise TransactionError(f"ipset: {_explain(code)}: {line}", transient=code in TRANSIENT)


def _explain(code: int | None) -> str:
    if code == errno.EINVAL:
        return "the kernel has no ipset (modprobe ip_set), or does not take this"
    return _WORDS.get(code or 0) or explain(code or 0)


# -- messages


def encode(line: str) -> Request:
    """ "create NAME TYPE range 0-65535", "create NAME TYPE family inet maxelem 1024", "destroy NAME", "add NAME ENTRY",
    "del NAME ENTRY". Raises ValueError, KeyError.
    """
    what, name, *words = line.split()
    start = _start(name)
    match what:
        case "add" | "del":
            kind, data = _ADD if what == "add" else _DEL, start + attribute(_DATA | NESTED, _entry(words[0]))
        case "create":
            kind, data = _CREATE, start + _create(words[0], dict(zip(words[1::2], words[2::2], strict=True)))
        case _:
            kind, data = {"destroy": _DESTROY}[what], start
    return Request(_SUBSYSTEM | kind, data)


@lru_cache(maxsize=256)
def _start(name: str) -> bytes:
    return _HEADER + _VERSION + _named(name)


def _named(name: str) -> bytes:
    return attribute(_NAME, name.encode() + b"\0")


def _create(kind: str, options: dict[str, str]) -> bytes:
    if kind == "bitmap:port":
        first, last = options["range"].split("-")
        data = _number(_PORT, int(first)) + _number(_PORT_TO, int(last))
    else:
        data = attribute(_MOST | NET_ORDER, _be32.pack(int(options["maxelem"])))
    return (
        attribute(_TYPE, kind.encode() + b"\0")
        + attribute(_FAMILY, bytes((_FAMILIES[options.get("family", "")],)))
        + attribute(_REVISION, bytes((_REVISIONS[kind],)))
        + attribute(_DATA | NESTED, data)
    )


def _entry(text: str) -> bytes:
    """ "PORT", "IP", "IP,PROTOCOL:PORT", "IP,PROTOCOL:PORT,IP", "IP,PROTOCOL:PORT,NETWORK" """
    first, *rest = text.split(",")
    if first.isdigit():
        return _number(_PORT, int(first))
    data = _address(_IP, first)
    if rest:
        protocol, _, port = rest[0].partition(":")
        number = _PROTOCOLS.get(protocol) or int(protocol)
        data += _number(_PORT, int(port)) + attribute(_PROTO | NET_ORDER, bytes((number,)))
    if len(rest) > 1:
        address, _, length = rest[1].partition("/")
        data += _address(_IP2, address)
        if length:
            data += attribute(_CIDR2 | NET_ORDER, bytes((int(length),)))
    return data


def _number(kind: int, value: int) -> bytes:
    return attribute(kind | NET_ORDER, _be16.pack(value))


@lru_cache(maxsize=4096)
def _address(kind: int, text: str) -> bytes:
    v6 = ":" in text
    raw = socket.inet_pton(socket.AF_INET6 if v6 else socket.AF_INET, text)
    return attribute(kind | NESTED, attribute((2 if v6 else 1) | NET_ORDER, raw))


def _decode(payloads: Iterable[bytes]) -> Iterator[IpSet | SetEntry]:
    for payload in payloads:
        found = attributes(payload[len(_HEADER) :])
        name = found[_NAME].rstrip(b"\0").decode(errors="replace")
        if _TYPE in found:  # of what a set has in several messages, only the first says it
            kind = found[_TYPE].rstrip(b"\0").decode(errors="replace")
            yield IpSet(name, kind, _FAMILY_NAMES.get(found[_FAMILY][0], "?"))
        for _, data in walk(found.get(_ADT, b"")):
            yield SetEntry(name, decode_entry(data))


def decode_entry(data: bytes) -> str:
    """An entry's attributes as `ipset save` prints them."""
    found = attributes(data)
    parts = []
    if _IP in found:
        parts.append(_text(found[_IP]))
    if _PORT in found:
        (port,) = _be16.unpack(found[_PORT])
        number = found[_PROTO][0] if _PROTO in found else 0
        parts.append(f"{_PROTOCOL_NAMES.get(number, number)}:{port}" if number else f"{port}")
    if _IP2 in found:
        address = _text(found[_IP2])
        length = found[_CIDR2][0] if _CIDR2 in found else 0
        whole = length in (0, 128 if ":" in address else 32)
        parts.append(address if whole else f"{address}/{length}")
    return ",".join(parts)


def _text(nested: bytes) -> str:
    raw = nested[4:]
    return socket.inet_ntop(socket.AF_INET6 if len(raw) == 16 else socket.AF_INET, raw)
