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

from ..model import Family
from .nft_layout import EXACT, LOCAL, UNIT, Affinity, Chain, Hook, affinity_chain, choosing, layout, sets
from .nft_script import Held
from .nftables import Element, Entry, Frontend, NftablesObject, Refusal, Stray, Table, interval

SKIP = frozenset({"clients"})  # what we never read: clients come and go by themselves
_SHARED = ("cluster-ips", "node-ips", "hairpin")
_ENDIAN: Literal["little", "big"] = sys.byteorder  # of the codes
_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}


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
        self.names: set[str] = set()
        self.sizes: set[int] = set()
        self.targets: dict[int, str] = {}  # by code
        self.groups: dict[int, Affinity] = {}  # by LOCAL or 0
        self.sources: list[str] = []


class _Parser:
    def __init__(self, family: Family, raw: RawTable) -> None:
        self.family = family
        self.raw = raw
        self.wide = 16 if family is Family.V6 else 4  # bytes of an address
        self.address = _address_v6 if family is Family.V6 else _address_v4
        self.strays: list[Stray] = []
        self.parts: dict[tuple[str, str, int], _Parts] = {}

    def parsed(self) -> Parsed:
        raw = self.raw
        groups = _groups(raw)
        shared = list(self.shared())
        seen = {name: list(self.collect(name, raw.elements.get(name, ()))) for name in raw.sets if name not in _SHARED}
        frontends = [self.frontend(*to, parts) for to, parts in self.parts.items()]
        self.look_for_strays(seen, frontends)
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

    def collect(self, name: str, elements: Iterable[RawElement]) -> Iterator[tuple[str, str, str]]:
        """Sort the elements of a set into the parts of frontends; each as Frontend.elements would have it."""
        take = self.takers().get(name) or (self.take_slot if Affinity.named(name) else None)
        if take is None:
            return
        wide, address = self.wide, self.address
        for element in elements:
            key = element.key
            protocol = _PROTOCOLS.get(key[wide], str(key[wide]))
            port = (key[wide + 4] << 8) | key[wide + 5]
            to = (address(key[:wide]), protocol, port)
            parts = self.parts.get(to)
            if parts is None:
                parts = self.parts[to] = _Parts()
            tail, data = take(name, parts, element)
            yield name, f"{to[0]} . {protocol} . {port}{tail}", data

    def takers(self) -> Mapping[str, Callable[[str, _Parts, RawElement], tuple[str, str]]]:
        plain: tuple[str, ...] = ("external", "external-local", "refused", "dropped", "guarded", "counted")
        coded = {"endpoints": self.take_slot, "sizes": self.take_size, "occupied": self.take_code}
        rest = {"affinity": self.take_group, "allowed": self.take_source}
        return dict.fromkeys(plain, self.take_name) | coded | rest

    def take_name(self, name: str, parts: _Parts, element: RawElement) -> tuple[str, str]:
        parts.names.add(name)
        return "", ""

    def take_code(self, name: str, parts: _Parts, element: RawElement) -> tuple[str, str]:
        return f" . {self.code(element)}", ""

    def take_size(self, name: str, parts: _Parts, element: RawElement) -> tuple[str, str]:
        parts.sizes.add(self.code(element))
        return self.take_code(name, parts, element)

    def take_slot(self, name: str, parts: _Parts, element: RawElement) -> tuple[str, str]:
        code = self.code(element)
        data, wide = element.data, self.wide
        target = f"{self.address(data[:wide])} . {(data[wide] << 8) | data[wide + 1]}"
        parts.targets[code] = target
        return f" . {code}", target

    def take_group(self, name: str, parts: _Parts, element: RawElement) -> tuple[str, str]:
        code, group = self.code(element), Affinity.named(element.chain)
        if group and code in (0, LOCAL):
            parts.groups[code] = group
        return f" . {code}", f"goto {element.chain}"

    def take_source(self, name: str, parts: _Parts, element: RawElement) -> tuple[str, str]:
        start = element.key[self.wide + 8 :]
        end = element.end[self.wide + 8 :] or start
        first, last = ipaddress.ip_address(start), ipaddress.ip_address(end)
        networks = [interval(n) for n in ipaddress.summarize_address_range(first, last)]
        source = networks[0] if len(networks) == 1 else f"{first}-{last}"
        parts.sources.append(source)
        return f" . {source}", ""

    def code(self, element: RawElement) -> int:
        start = self.wide + 8
        return int.from_bytes(element.key[start : start + 4], _ENDIAN)

    def frontend(self, address: str, protocol: str, port: int, parts: _Parts) -> Frontend:
        """The frontend that these parts most likely belong to; `look_for_strays` says whether they do."""
        entry: Entry = (
            "external" if "external" in parts.names else "external-local" if "external-local" in parts.names else ""
        )
        refusal: Refusal = "refused" if "refused" in parts.names else "dropped" if "dropped" in parts.names else ""
        seconds = max((group.seconds for group in parts.groups.values()), default=0)
        return Frontend(
            address,
            protocol,
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

    def look_for_strays(self, seen: Mapping[str, list[tuple[str, str, str]]], frontends: list[Frontend]) -> None:
        """An element that does not belong to the frontend made from it is nobody's; one that is missing makes the
        frontend wrong, so it is counted as absent, and all that is there of it is a stray.
        """
        expected = {element: index for index, f in enumerate(frontends) for element in f.elements()}
        present = {element for elements in seen.values() for element in elements}
        broken = {index for element, index in expected.items() if element not in present}
        for name, key, data in present:
            index = expected.get((name, key, data))
            if index is None or index in broken:
                self.strays.append(Stray("element", name, key))
        for index in sorted(broken, reverse=True):
            del frontends[index]


def _seats(parts: _Parts, first: int, *, slotted: bool) -> tuple[str, ...]:
    codes = sorted(code for code in parts.targets if (code >= LOCAL) == bool(first))
    if not codes:
        return ()
    if slotted:
        count = codes[-1] - first + 1
        start = first
    else:
        # All codes of one size: the largest tells which, should there be several.
        size = (codes[-1] - first) // UNIT
        start = first + (size if size <= EXACT else _largest_size(codes[-1] - first)) * UNIT
        count = codes[-1] - start + 1
    return tuple(parts.targets.get(code, "") for code in range(start, start + min(count, 1 << 17)))


def _largest_size(code: int) -> int:
    """The size beyond EXACT whose codes begin last before this one."""
    return 1 << ((code // UNIT).bit_length() - 1)


def _rule(mark: str) -> str:
    return f'… comment "{mark}"'


@lru_cache(maxsize=1 << 16)
def _address_v4(data: bytes) -> str:
    return ".".join(map(str, data))


@lru_cache(maxsize=1 << 16)
def _address_v6(data: bytes) -> str:
    return str(ipaddress.IPv6Address(data))
