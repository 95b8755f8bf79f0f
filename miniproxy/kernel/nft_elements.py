"""Elements of our sets and maps in the kernel's binary form, from nft's text: what planner/nft_parse.py undoes.

A field of a key or a datum is padded to 4 bytes; addresses, ports and protocols are in network order, an endpoint's
code in the machine's, since the rules' `numgen` makes it so. nfnetlink.py sends it.
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_pton

from ..model import Family
from ..planner.nft_parse import PROTOCOLS
from .netlink import NESTED, attribute

# linux/netfilter/nf_tables.h: NFTA_LIST_ELEM; NFTA_SET_ELEM_*; NFTA_DATA_*; NFTA_VERDICT_*; NFT_GOTO.
_LIST_ELEM = 1
_KEY, _DATA, _KEY_END = 1, 2, 10
_VALUE, _VERDICT = 1, 2
_CODE, _CHAIN = 1, 2
_GOTO = -4
_NUMBERS = {name: number for number, name in PROTOCOLS.items()}
_SEPARATOR = " . "

Encode = Callable[[str, str], bytes]


class Encoder:
    """Turns one family's elements into attributes NFTA_LIST_ELEM."""

    def __init__(self, family: Family) -> None:
        words = _Words(family)

        def flag(key: str, data: str) -> bytes:
            return _element(words.destination(key))

        def code(key: str, data: str) -> bytes:
            return _element(words.coded(key))

        def address(key: str, data: str) -> bytes:
            return _element(words.addresses(key))

        def target(key: str, data: str) -> bytes:
            return words.endpoint(key, data) if data else _element(words.coded(key))

        def verdict(key: str, data: str) -> bytes:
            return _element(words.coded(key), _goto(data) if data else b"")

        def interval(key: str, data: str) -> bytes:
            return words.interval(key)

        self._targets = target
        self._others: dict[str, Encode] = {
            **dict.fromkeys(("cluster-ips", "node-ips", "hairpin"), address),
            **dict.fromkeys(("external", "external-local", "refused", "dropped", "guarded", "counted"), flag),
            **dict.fromkeys(("sizes", "occupied"), code),
            "affinity": verdict,
            "allowed": interval,
        }

    def of(self, name: str) -> Encode:
        """For set or map `name`: what turns (key, data), as nft writes them, into an attribute.

        `data` is "" in a set, and where an element is to be deleted. Raises ValueError on what is no such element.
        """
        return self._others.get(name, self._targets)  # an affinity group's map has its own name


class _Words:
    """The fields of one family's elements."""

    def __init__(self, family: Family) -> None:
        kind = AF_INET6 if family is Family.V6 else AF_INET

        def address(text: str) -> bytes:
            try:
                return inet_pton(kind, text)
            except OSError:
                raise ValueError(f"{text!r} is no {family} address") from None

        @lru_cache(maxsize=1 << 10)  # each is there once for each of its endpoints
        def destination(text: str) -> bytes:
            where, protocol, port = text.split(_SEPARATOR)
            return address(where) + bytes((_protocol(protocol), 0, 0, 0)) + int(port).to_bytes(2, "big") + b"\0\0"

        self.address = address
        self.destination = destination
        wide = 16 if family is Family.V6 else 4
        self.before, between = _headers(wide + 12, wide + 8)
        self.between = between + struct.pack("=2H", wide + 8, _VALUE)

    def addresses(self, text: str) -> bytes:
        return b"".join(map(self.address, text.split(_SEPARATOR)))

    def coded(self, text: str) -> bytes:
        destination, _, code = text.rpartition(_SEPARATOR)
        return self.destination(destination) + int(code).to_bytes(4, sys.byteorder)

    def endpoint(self, key: str, data: str) -> bytes:
        """The whole element; nearly all are of this kind, so its headers are made once."""
        address, _, port = data.partition(_SEPARATOR)
        value = self.address(address) + int(port).to_bytes(2, "big") + b"\0\0"
        return self.before + self.coded(key) + self.between + value

    def interval(self, text: str) -> bytes:
        """Both ends of the last field: every other one is a single value."""
        destination, _, source = text.rpartition(_SEPARATOR)
        first, dash, last = source.partition("-")
        if not dash:
            network = ipaddress.ip_network(source)
            first, last = str(network[0]), str(network[-1])
        start, end = (self.destination(destination) + self.address(each) for each in (first, last))
        ends = _nest(_KEY, attribute(_VALUE, start)) + _nest(_KEY_END, attribute(_VALUE, end))
        return _nest(_LIST_ELEM, ends)


def _protocol(name: str) -> int:
    return _NUMBERS[name] if name in _NUMBERS else int(name)


def _goto(verdict: str) -> bytes:
    """The content of a verdict's NFTA_SET_ELEM_DATA, whatever is in it after the header."""
    chain = verdict.removeprefix("goto ")
    return _nest(_VERDICT, attribute(_CODE, struct.pack(">i", _GOTO)) + attribute(_CHAIN, chain.encode() + b"\0"))


def _nest(kind: int, value: bytes) -> bytes:
    return attribute(kind | NESTED, value)


def _element(key: bytes, data: bytes = b"") -> bytes:
    """Keys and data are multiples of 4 bytes, so nothing is padded, and the headers depend on lengths only."""
    before, between = _headers(len(key), len(data))
    return before + key + between + data


@lru_cache(maxsize=1024)
def _headers(key: int, data: int) -> tuple[bytes, bytes]:
    between = struct.pack("=2H", 4 + data, _DATA | NESTED) if data else b""
    whole = 12 + key + len(between) + data
    return struct.pack("=6H", whole, _LIST_ELEM | NESTED, 8 + key, _KEY | NESTED, 4 + key, _VALUE), between
