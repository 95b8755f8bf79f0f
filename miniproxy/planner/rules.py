"""The text of iptables: changes as iptables-restore input, iptables-save output as kernel objects.

Also the normal form of a rule: versions and variants of iptables print the same rule a little differently
(order of matches, `-m tcp` spelled out or not, "--set-xmark 0x4000/0x0" or "--xor-mark 0x4000"), and a difference in
spelling must never make the agent rewrite a rule that is right.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..model import PROTOCOL_NAMES
from ..transaction import Change, Transaction
from .iptables import (
    BUILT_IN,
    LAYOUT,
    MARK_MASQ,
    SHARED_FIREWALL,
    TABLES,
    Chain,
    DispatchChain,
    DispatchRule,
    Hooks,
    IptablesObject,
    Layout,
)

_PROTOCOLS = {str(number): protocol.lower() for number, protocol in PROTOCOL_NAMES.items()}  # as `-m ipvs` does
_PER_SERVICE = re.compile(r"KUBE-(SVC|SVL|EXT|FW|SEP|XLB)-[A-Z2-7]{16}$")

# The rule of a cluster IP, nearly all that dispatch chains hold; what _claim makes of it, in one step.
_USUAL = re.compile(r'-d ([0-9a-f.:]+)/(?:32|128) -p (\w+) -m comment --comment "[^"]*" -m \2 --dport (\d+) -j ')


def serves(obj: object) -> bool:
    """Whether it is a chain of one service, or of an endpoint."""
    return isinstance(obj, Chain) and obj.table == "nat" and bool(_PER_SERVICE.match(obj.name))


# -- writing


def render(changes: Sequence[Change]) -> Transaction:
    """One iptables-restore --noflush input for one family; it must be given all or nothing.

    Inside a table everything is atomic, between the tables it is not: filter comes first when it gains
    refusals (they do not match what nat still translates), and last when it only loses them.
    """
    by_table: dict[str, list[Change]] = {table: [] for table in TABLES}
    for change in changes:
        by_table[(change.after or change.before).table].append(change)
    order = list(TABLES)
    if all(c.after is None for c in by_table["filter"]):
        order.reverse()

    def pieces() -> Iterator[str]:
        for table in order:
            if by_table[table]:
                yield from _table(table, by_table[table])

    return Transaction(pieces)


def stream(parts: Iterable[Sequence[Change]]) -> Transaction:
    """As `render`, of changes that come in parts while it is printed for the first time.

    The table nat goes first, since nearly all is in it, and filter when it is known: what nat does not translate yet
    nobody is served by.
    """
    told: list[Sequence[Change]] = []
    coming = iter(parts)

    def every() -> Iterator[Sequence[Change]]:
        yield from told
        for part in coming:
            told.append(part)
            yield part

    def pieces() -> Iterator[str]:
        others: list[Change] = []
        yield "*nat\n"
        for part in every():
            yield from _body([c for c in part if c.key[1] == "nat"])
            others += [c for c in part if c.key[1] != "nat"]
        yield "COMMIT\n"
        if others:
            yield from _table("filter", others)

    return Transaction(pieces)


def _table(table: str, changes: Sequence[Change]) -> Iterator[str]:
    yield f"*{table}\n"
    yield from _body(changes)
    yield "COMMIT\n"


def _body(changes: Sequence[Change]) -> Iterator[str]:
    # Naming a chain makes it, or empties it: with its rules go its references to chains that are to be dropped.
    emptied = {c.key[2] for c in changes if c.key[0] == "chain" and _empties(c)}
    dropped = sorted(c.key[2] for c in changes if c.after is None and c.key[0] == "chain")
    # Downwards: both variants keep chains in a sorted list and look for a new one's place from its front, so this
    # saves a fifth of the tool's time.
    yield _piece(f":{name} - [0:0]" for name in sorted(emptied, reverse=True))
    # The key's third part is the chain, whatever the object.
    yield from _lines(c.before.removed() for c in changes if c.before is not None and c.key[2] not in emptied)
    yield from _lines(c.after.added() for c in changes if c.after is not None)
    yield _piece(f"-X {name}" for name in dropped)


def _lines(groups: Iterable[list[str]]) -> Iterator[str]:
    """A piece of text for some thousand lines at a time."""
    lines: list[str] = []
    for group in groups:
        lines += group
        if len(lines) >= 2000:
            yield _piece(lines)
            lines = []
    yield _piece(lines)


def _piece(lines: Iterable[str]) -> str:
    return "\n".join([*lines, ""])


def removal(obj: IptablesObject, keep: set[tuple[str, str]]) -> Iterator[Change]:
    """The change that takes an object away, but for the chains (table, name) to keep and the jumps to them."""
    if isinstance(obj, Hooks):
        before = Hooks(obj.table, obj.chain, tuple(r for r in obj.rules if (obj.table, _target(r)) not in keep))
        if before.rules:
            yield Change(obj.key, before, None)
    elif isinstance(obj, DispatchRule) or (obj.table, obj.name) not in keep:
        yield Change(obj.key, obj, None)


def _empties(change: Change) -> bool:
    """Whether a chain's change empties it. A dispatch chain is emptied only when it comes or goes: its other services'
    rules must stay.
    """
    return not (isinstance(change.before, DispatchChain) and isinstance(change.after, DispatchChain))


# -- reading


class Saved(NamedTuple):
    """What an iptables-save text holds."""

    objects: dict[tuple[str, ...], IptablesObject]  # ours, by key
    chains: set[tuple[str, str]]  # (table, name) of all there are
    borrowed: set[tuple[str, str]]  # (table, name) of our chains that rules of others jump to


def parse_save(text: str, layout: Layout = LAYOUT) -> Saved:
    """Pick our objects out of the output of iptables-save (all tables, or some)."""
    chains = _chains(text)
    objects: dict[tuple[str, ...], IptablesObject] = {}
    borrowed = set()
    for (table, name), rules in chains.items():
        if table == "nat" and _PER_SERVICE.match(name):  # nearly all there are
            objects["chain", table, name] = Chain(table, name, tuple(rules))
            continue
        objects.update((obj.key, obj) for obj in _ours(table, name, rules, layout))
        if not _is_ours(table, name, layout):
            others = rules if name not in BUILT_IN else [r for r in rules if not _hooks(table, r, layout)]
            borrowed |= {(table, _target(r)) for r in others if _is_ours(table, _target(r), layout)}
    return Saved(objects, set(chains), borrowed)


def _chains(text: str) -> dict[tuple[str, str], list[str]]:
    """The rules of each (table, chain), in order."""
    chains: dict[tuple[str, str], list[str]] = {}
    table = chain = ""
    rules: list[str] = []
    for line in text.splitlines():
        if line.startswith("-A "):
            name, _, rule = line[3:].partition(" ")
            if name != chain:
                chain = name
                rules = chains.setdefault((table, name), [])
            rules.append(rule)
        elif line.startswith(":"):
            chains.setdefault((table, line[1:].split(" ", 1)[0]), [])
        elif line.startswith("*"):
            table, chain = line[1:].strip(), ""
    return chains


def _ours(table: str, name: str, rules: list[str], layout: Layout) -> Iterator[IptablesObject]:
    if name in layout.dispatch.get(table, ()):
        claims = [(_claim(rule), rule) for rule in rules]
        yield DispatchChain(table, name, tuple(rule for claim, rule in claims if not claim))
        seen: dict[str, int] = defaultdict(int)
        for claim, rule in claims:
            if claim:
                seen[claim] += 1
                # A second rule for the same traffic is never planned, so it counts as stale under a key of its own.
                unique = claim if seen[claim] == 1 else f"{claim} #{seen[claim]}"
                yield DispatchRule(table, name, unique, rule)
    elif _is_ours(table, name, layout):
        yield Chain(table, name, tuple(rules))
    elif name in BUILT_IN and table in TABLES:
        jumps = tuple(r for r in rules if _hooks(table, r, layout))
        if jumps:
            yield Hooks(table, name, jumps)


def _hooks(table: str, rule: str, layout: Layout) -> bool:
    """Whether a rule of a built-in chain is one that only a service proxy makes there."""
    target = _target(rule)
    return target != MARK_MASQ and _is_named(table, target, layout)


def _is_ours(table: str, name: str, layout: Layout) -> bool:
    return _is_named(table, name, layout) or (table == "nat" and bool(_PER_SERVICE.match(name)))


def _is_named(table: str, name: str, layout: Layout) -> bool:
    return name in layout.fixed.get(table, ()) or name in layout.dispatch.get(table, ())


def _target(rule: str) -> str:
    return f" {rule}".rpartition(" -j ")[2].split(" ", 1)[0]


def _claim(rule: str) -> str:
    """Which traffic a rule of a dispatch chain takes, as DispatchRule.claim; "" when it is not one service's."""
    if usual := _USUAL.match(rule):
        return f"{usual[1]} {usual[2]} {usual[3]}"
    ipvs = re.search(r" -m ipvs --vproto (\d+) --vaddr (\S+) --vport (\d+) ", rule)
    if ipvs:
        return f"{ipvs[2]} {_PROTOCOLS.get(ipvs[1], ipvs[1])} {ipvs[3]}"
    port = re.search(r" --dport (\d+)", rule)
    proto = re.search(r"(?:^| )-p (\w+)", rule)
    if not port or not proto:
        return ""
    destination = re.search(r"(?:^| )-d ([0-9a-f.:]+)(?:/32|/128)? ", rule)
    local_net = " -d 127.0.0.0/8 " in f" {rule}"
    where = "127.0.0.0/8" if local_net else destination.group(1) if destination else "*"
    return f"{where} {proto.group(1)} {port.group(1)}"


# -- comparing


def same(planned: IptablesObject, actual: IptablesObject) -> bool:
    """Whether the kernel's object is what is planned, whatever the spelling."""
    if planned == actual:
        return True
    if isinstance(planned, Chain) and planned.name == SHARED_FIREWALL and not planned.rules:
        return True  # it has to be there, and what is in it is the kubelet's
    return _parts(planned) == _parts(actual)


def _parts(obj: IptablesObject) -> tuple[object, ...]:
    match obj:
        case Chain(rules=rules) | Hooks(rules=rules) | DispatchChain(tail=rules):
            return (obj.key, tuple(map(normal, rules)))
        case DispatchRule(rule=rule):
            return (obj.key, normal(rule))


@lru_cache(maxsize=4096)
def normal(rule: str) -> frozenset[tuple[str, ...]]:
    """The options of a rule as a set: (negated?, option, arguments…). Raises ValueError on broken quoting."""
    options: list[list[str]] = []
    negated = False
    for token in shlex.split(rule):
        if token == "!":
            negated = True
        elif token.startswith("-") and not token.lstrip("-")[:1].isdigit():
            options.append(["!" if negated else "", token])
            negated = False
        else:
            options[-1].append(token)
    return frozenset(tuple(_spelling(option)) for option in options if option[1] != "-m")


def _spelling(option: list[str]) -> list[str]:
    negated, name, *values = option
    if name in ("-s", "-d") and values and "/" not in values[0]:
        values = [f"{values[0]}/{128 if ':' in values[0] else 32}"]
    elif name == "--xor-mark" and values:
        name, values = "--set-xmark", [f"{values[0]}/0x0"]
    elif name == "--or-mark" and values:
        name, values = "--set-xmark", [f"{values[0]}/{values[0]}"]
    return [negated, name, *values]
