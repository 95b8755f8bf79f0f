"""From what is in the kernel to the planner's objects: the inverse of `Frontend.elements`.

Whatever is in our table and is not one of ours becomes a `Stray` or an unwanted `Chain`, and will be removed.
A table in which something is not right that cannot be changed in place is of no use, and counts as absent.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

from ..model import PROTOCOL_NAMES, Family
from .nft_layout import (
    EXACT,
    LOCAL,
    SIZES,
    UNIT,
    Affinity,
    Chain,
    Hook,
    affinity_chain,
    choosing,
    layout,
    map_of,
    sets,
    size_of,
)
from .nft_script import Held
from .nftables import Element, Entry, Frontend, NftablesObject, Refusal, Stray, Table, interval

SKIP = frozenset({"clients"})  # what we never read: clients come and go by themselves
_SHARED = ("cluster-ips", "node-ips", "hairpin")
_ENDIAN: Literal["little", "big"] = sys.byteorder  # of the codes
PROTOCOLS = {number: protocol.lower() for number, protocol in PROTOCOL_NAMES.items()}  # by their numbers in keys


class RawElement(Protocol):
    """As kernel/nfnetlink.py has it: bytes in the kernel's form."""

    @property
    def key(self) -> bytes: ...
    @property
    def end(self) -> bytes: ...
    @property
    def data(self) -> bytes: ...
    @property
    def chain(self) -> str: ...


class RawTable(Protocol):
    @property
    def comment(self) -> str: ...
    @property
    def chains(self) -> Mapping[str, tuple[str, str, int] | None]: ...
    @property
    def rules(self) -> Mapping[str, list[str]]: ...
    @property
    def sets(self) -> Mapping[str, bool]: ...
    @property
    def elements(self) -> Mapping[str, Iterable[RawElement]]: ...


class Parsed(NamedTuple):
    objects: dict[Any, Any]  # by key; frontends as they would be planned
    held: Held  # and as they are


def parse(family: Family, raw: RawTable | None) -> Parsed:
    """What our table holds, by key; nothing for a table that cannot be used."""
    if raw is None or not _usable(family, raw):
        return Parsed({}, Held.of(()))
    return _Parser(family, raw).parsed()


def _usable(family: Family, raw: RawTable) -> bool:
    if raw.comment != layout(family) or not raw.sets.keys() >= sets(family).keys():
        return False
    fixed = [*choosing(family), *(affinity_chain(family, group) for group in _groups(raw))]
    return all(tuple(raw.rules.get(chain.name, ())) == chain.marks for chain in fixed)


def _groups(raw: RawTable) -> list[Affinity]:
    """The affinity groups: whatever has both a chain and a map of such a name, or one of them, which is not right."""
    return [group for name in sorted({*raw.chains, *raw.sets}) if (group := Affinity.named(name))]


class _Parts:
    """The elements of one frontend, as far as they have been seen."""

    def __init__(self) -> None:
        self.elements: list[tuple[str, RawElement]] = []  # with the name of the set
        self.names: set[str] = set()  # sets that hold the frontend itself
        self.sizes: set[int] = set()
        self.targets: dict[int, str] = {}  # by code
        self.misplaced = False  # an endpoint is not in the map of its size
        self.groups: dict[int, Affinity] = {}  # by LOCAL or 0
        self.sources: list[str] = []


class _Parser:
    def __init__(self, family: Family, raw: RawTable) -> None:
        self.family = family
        self.raw = raw
        self.wide = 16 if family is Family.V6 else 4  # bytes of an address
        self.address = _address_v6 if family is Family.V6 else _address_v4
        self.strays: list[Stray] = []
        self.parts: dict[tuple[str, int, int], _Parts] = {}  # by address, protocol, port

    def parsed(self) -> Parsed:
        raw = self.raw
        groups = _groups(raw)
        shared = list(self.shared())
        for name in raw.sets:
            if name not in _SHARED:
                self.collect(name, raw.elements.get(name, ()))
        made = ((self.frontend(*to, parts), parts) for to, parts in self.parts.items())
        frontends = [
            frontend for frontend, parts in made if _certain(frontend, parts) or self.compared(frontend, parts)
        ]
        held = Held.of(frontends, groups)
        names = {group.name for group in groups}
        fixed = {chain.name for chain in choosing(self.family)} | names
        chains = [
            Chain(name, Hook(*hook) if hook else None, tuple(_rule(mark) for mark in raw.rules[name]))
            for name, hook in raw.chains.items()
            if name not in fixed
        ]
        unknown = [name for name in raw.sets if name not in sets(self.family) and name not in names]
        self.strays += [Stray("map" if raw.sets[name] else "set", name) for name in unknown]
        self.strays += [Stray("affinity", group.name) for group, uses in held.groups.items() if not uses]
        table = Table(self.family, raw.comment)
        objects: list[NftablesObject] = [
            table,
            *chains,
            *shared,
            *self.strays,
            *(frontend.planned() for frontend in frontends),
        ]
        return Parsed({obj.key: obj for obj in objects}, held)

    def shared(self) -> Iterator[Element]:
        for name in _SHARED:
            for element in self.raw.elements.get(name, ()):
                words = [element.key[i : i + self.wide] for i in range(0, len(element.key), self.wide)]
                yield Element(name, " . ".join(map(self.address, words)))

    # -- elements that belong to frontends

    def collect(self, name: str, elements: Iterable[RawElement]) -> None:
        """Sort the elements of a set into the parts of frontends."""
        take = self.takers().get(name) or (self.take_target if Affinity.named(name) else None)
        if take is None:
            return
        wide, address, found = self.wide, self.address, self.parts
        for element in elements:
            key = element.key
            to = address(key[:wide]), key[wide], (key[wide + 4] << 8) | key[wide + 5]
            parts = found.get(to)
            if parts is None:
                parts = found[to] = _Parts()
            parts.elements.append((name, element))
            take(name, parts, element)

    def takers(self) -> Mapping[str, Callable[[str, _Parts, RawElement], None]]:
        plain: tuple[str, ...] = ("external", "external-local", "refused", "dropped", "guarded", "counted")
        targets = dict.fromkeys(map(map_of, SIZES), self.take_target)
        coded = {**targets, "sizes": self.take_size, "occupied": self.take_nothing}
        rest = {"affinity": self.take_group, "allowed": self.take_source}
        return dict.fromkeys(plain, self.take_name) | coded | rest

    def take_name(self, name: str, parts: _Parts, element: RawElement) -> None:
        parts.names.add(name)

    def take_nothing(self, name: str, parts: _Parts, element: RawElement) -> None:
        pass

    def take_size(self, name: str, parts: _Parts, element: RawElement) -> None:
        parts.sizes.add(self.code(element))

    def take_target(self, name: str, parts: _Parts, element: RawElement) -> None:
        code = self.code(element)
        parts.targets[code] = self.target(element)
        parts.misplaced |= name != map_of(_size(code))

    def take_group(self, name: str, parts: _Parts, element: RawElement) -> None:
        group = Affinity.named(element.chain)
        if group:
            parts.groups[self.code(element)] = group

    def take_source(self, name: str, parts: _Parts, element: RawElement) -> None:
        parts.sources.append(self.source(element))

    def code(self, element: RawElement) -> int:
        start = self.wide + 8
        return int.from_bytes(element.key[start : start + 4], _ENDIAN)

    def target(self, element: RawElement) -> str:
        data, wide = element.data, self.wide
        return f"{self.address(data[:wide])} . {(data[wide] << 8) | data[wide + 1]}"

    def source(self, element: RawElement) -> str:
        start = element.key[self.wide + 8 :]
        end = element.end[self.wide + 8 :] or start
        first, last = ipaddress.ip_address(start), ipaddress.ip_address(end)
        networks = [interval(n) for n in ipaddress.summarize_address_range(first, last)]
        return networks[0] if len(networks) == 1 else f"{first}-{last}"

    def frontend(self, address: str, protocol: int, port: int, parts: _Parts) -> Frontend:
        """The frontend that these parts most likely belong to; `_certain` and `compared` say whether they do."""
        entry: Entry = (
            "external" if "external" in parts.names else "external-local" if "external-local" in parts.names else ""
        )
        refusal: Refusal = "refused" if "refused" in parts.names else "dropped" if "dropped" in parts.names else ""
        seconds = max((group.seconds for group in parts.groups.values()), default=0)
        return Frontend(
            address,
            PROTOCOLS.get(protocol, str(protocol)),
            port,
            entry,
            _seats(parts, 0, slotted=bool(seconds)),
            _seats(parts, LOCAL, slotted=bool(seconds)),
            affinity=seconds,
            refusal=refusal,
            guarded="guarded" in parts.names,
            sources=tuple(sorted(parts.sources)),
            counted="counted" in parts.names,
        )

    def compared(self, frontend: Frontend, parts: _Parts) -> bool:
        """Whether nothing of the frontend is missing. An element too many is a stray; when one is missing, the
        frontend counts as absent, and all that is there of it is stray.
        """
        to = f"{frontend.address} . {frontend.protocol} . {frontend.port}"
        present = {self.spelt(to, name, element) for name, element in parts.elements}
        expected = set(frontend.elements())
        whole = expected <= present
        self.strays += [Stray("element", name, key) for name, key, _ in present - (expected if whole else set())]
        return whole

    def spelt(self, to: str, name: str, element: RawElement) -> tuple[str, str, str]:
        """An element as Frontend.elements has it."""
        if name == "allowed":
            return name, f"{to} . {self.source(element)}", ""
        if name in ("sizes", "occupied"):
            return name, f"{to} . {self.code(element)}", ""
        if name == "affinity":
            return name, f"{to} . {self.code(element)}", f"goto {element.chain}"
        if element.data:
            return name, f"{to} . {self.code(element)}", self.target(element)
        return name, to, ""


def _certain(frontend: Frontend, parts: _Parts) -> bool:
    """Whether the parts are exactly the frontend's, which for most can be said without spelling them out."""
    names = {frontend.entry, frontend.refusal, "guarded" * frontend.guarded, "counted" * frontend.counted} - {""}
    if parts.groups or parts.misplaced or names != parts.names or bool(frontend.sources) != frontend.guarded:
        return False
    codes = set()
    for first, endpoints in ((0, frontend.endpoints), (LOCAL, frontend.local)):
        if endpoints:
            size = size_of(len(endpoints))
            start = first + size * UNIT
            codes |= {start} if size > EXACT else set()
            if "" in endpoints or parts.targets.get(start) != endpoints[0]:
                return False
    count = len(frontend.endpoints) + len(frontend.local) + len(frontend.sources) + len(codes) + len(names)
    return codes == parts.sizes and count == len(parts.elements)


def _seats(parts: _Parts, first: int, *, slotted: bool) -> tuple[str, ...]:
    codes = sorted(code for code in parts.targets if (code >= LOCAL) == bool(first))
    if not codes:
        return ()
    if slotted:
        count = codes[-1] - first + 1
        start = first
    else:
        # All codes of one size: the largest tells which, should there be several.
        start = first + _size(codes[-1]) * UNIT
        count = codes[-1] - start + 1
    return tuple(parts.targets.get(code, "") for code in range(start, start + min(count, 1 << 17)))


def _size(code: int) -> int:
    """The size whose codes begin last before this one, or at it."""
    size = code % LOCAL // UNIT
    return size if size <= EXACT else 1 << (size.bit_length() - 1)


def _rule(mark: str) -> str:
    return f'… comment "{mark}"'


@lru_cache(maxsize=1 << 16)
def _address_v4(data: bytes) -> str:
    return ".".join(map(str, data))


@lru_cache(maxsize=1 << 16)
def _address_v6(data: bytes) -> str:
    return str(ipaddress.IPv6Address(data))
