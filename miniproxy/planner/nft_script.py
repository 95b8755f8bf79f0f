"""From changes to one nft script, all or nothing.

The planner says who serves; here each endpoint gets its seat, the index by which the rules find it. Whoever has
one keeps it: a change then writes what it changes, and session affinity, which remembers seats, stays true.
`Held` is what the kernel holds as far as that matters. Pure: `render` hands back what it will be afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any, NamedTuple

from ..model import Family
from ..transaction import Change, Transaction
from .nft_layout import TABLE, Affinity, Chain, affinity_chain, affinity_map, choosing, ip, layout, sets
from .nftables import Element, Frontend, Stray, Table


class Step(NamedTuple):
    """What a script changes in `Held`."""

    frontends: dict[Any, Frontend | None]  # seated, by key; None: gone
    gone: set[Affinity]  # groups taken away


class Held(NamedTuple):
    """Seated frontends by key, and the affinity groups there are with how many frontends use each."""

    frontends: dict[Any, Frontend]
    groups: Counter[Affinity]

    @staticmethod
    def of(frontends: Iterable[Frontend], groups: Iterable[Affinity] = ()) -> Held:
        held = Held({}, Counter(dict.fromkeys(groups, 0)))
        held.advance(Step({frontend.key: frontend for frontend in frontends}, set()))
        return held

    def advance(self, step: Step) -> None:
        """Take over what a script did, once the kernel has taken it."""
        for key, after in step.frontends.items():
            before = self.frontends.pop(key, None)
            self.groups.subtract(before.groups() if before else ())
            if after is not None:
                self.frontends[key] = after
                self.groups.update(after.groups())
        for group in step.gone:
            del self.groups[group]


class Elements(NamedTuple):
    """Elements by set or map, in nft's text: keys, and (key, data); data is "" in a set."""

    deleted: dict[str, list[str]]
    added: dict[str, list[tuple[str, str]]]

    def total(self) -> int:
        return sum(map(len, self.deleted.values())) + sum(map(len, self.added.values()))

    def lines(self, where: str) -> tuple[list[str], list[str]]:
        """The commands that delete, and those that add."""
        deleted = [_command("delete", where, name, keys) for name, keys in self.deleted.items()]
        added = [_command("add", where, name, starmap(spelt, all_)) for name, all_ in self.added.items()]
        return deleted, added


def spelt(key: str, data: str) -> str:
    """An element as nft writes it."""
    return f"{key} : {data}" if data else key


def _command(verb: str, where: str, name: str, elements: Iterable[str]) -> str:
    return f"{verb} element {where} {name} {{ {', '.join(elements)} }}"


class Script(NamedTuple):
    """A transaction, and the same in two parts: what is no element, as text, and the elements as data."""

    transaction: Transaction
    step: Step
    frame: str
    elements: Elements


def render(family: Family, changes: Iterable[Change], held: Held, *, absent: bool = False) -> Script:
    """One nft script that makes these changes. What a change of a frontend begins with is `held`'s.

    `absent`: there is no table of ours, not even one that cannot be used.
    """
    draft = _Draft(family, held, absent)
    for change in changes:
        draft.add(change)
    return draft.script()


def seated(after: Frontend, before: Frontend | None) -> Frontend:
    """`after`, as planned, with everybody in the seat they have in `before`."""
    if before is None or bool(before.affinity) != bool(after.affinity):
        return after
    moving = not after.affinity
    return after._replace(
        endpoints=seat(after.endpoints, before.endpoints, moving=moving),
        local=seat(after.local, before.local, moving=moving),
    )


def seat(wanted: Sequence[str], before: Sequence[str], *, moving: bool) -> tuple[str, ...]:
    """Give each endpoint an index; whoever has one keeps it, and a free one is taken first.

    With `moving`, indices have no holes: the last ones move into them. Without, "" marks a hole.
    """
    result = [""] * (len(wanted) if moving else max(len(wanted), len(before)))
    left = dict.fromkeys(wanted)
    for index, endpoint in enumerate(before[: len(result)]):
        if endpoint in left:
            result[index] = endpoint
            del left[endpoint]
    new = iter(left)
    for index, endpoint in enumerate(result):
        if not endpoint:
            result[index] = next(new, "")
    while result and not result[-1]:
        result.pop()
    return tuple(result)


class _Draft:
    """The parts of a script, in the order in which the kernel takes them."""

    def __init__(self, family: Family, held: Held, absent: bool) -> None:
        self.family = family
        self.held = held
        self.absent = absent
        self.step = Step({}, set())
        self.groups: Counter[Affinity] = Counter()  # how many more use them
        self.where = f"{ip(family)} {TABLE}"
        self.declared: list[str] = []
        self.unhooked: list[str] = []
        self.chains: list[str] = []
        self.rules: list[str] = []
        self.emptied: list[str] = []
        self.removed: list[str] = []
        self.elements = Elements({}, {})

    def add(self, change: Change) -> None:
        match change.after or change.before:
            case Table():
                self.table(rebuilding=change.after is not None)
            case Chain(name=name):
                self.chain(name, change.before, change.after)
            case Frontend():
                self.frontend(change)
            case Element(name, text):
                self.replace(_one(name, text) if change.before else {}, _one(name, text) if change.after else {})
            case Stray() as stray:
                self.stray(stray)

    def table(self, *, rebuilding: bool) -> None:
        """Whatever the table held is replaced in the same transaction; `add` makes sure there is one to delete."""
        if not self.absent:
            self.declared += [f"add table {self.where}", f"delete table {self.where}"]
        if not rebuilding:
            return
        self.declared.append(f'add table {self.where} {{ comment "{layout(self.family)}"; }}')
        for name, declaration in sets(self.family).items():
            self.declare(name, declaration)
        for chain in choosing(self.family):
            self.chain(chain.name, None, chain)

    def declare(self, name: str, declaration: str) -> None:
        kind, _, spec = declaration.partition(" ")
        self.declared.append(f"add {kind} {self.where} {name} {spec}")

    def chain(self, name: str, before: Chain | None, after: Chain | None) -> None:
        chain = f"chain {self.where} {name}"
        if before and after and before.hook != after.hook:
            self.unhooked += [f"flush {chain}", f"delete {chain}"]  # a hook cannot be changed in place
            before = None
        if after is None:
            self.emptied.append(f"flush {chain}")
            self.removed.append(f"delete {chain}")
            return
        if before:
            self.rules.append(f"flush {chain}")
        else:
            self.chains.append(f"add {chain}" + (f" {{ {after.hook} }}" if after.hook else ""))
        self.rules += [f"add rule {self.where} {name} {rule}" for rule in after.rules]

    def frontend(self, change: Change) -> None:
        before = self.held.frontends.get(change.key)
        after = None if change.after is None else seated(change.after, before)
        self.step.frontends[change.key] = after
        self.groups.subtract(before.groups() if before else ())
        self.groups.update(after.groups() if after else ())
        if before is None and after is not None:
            for name, key, data in after.elements():
                self.elements.added.setdefault(name, []).append((key, data))
        else:
            self.replace(_elements(before), _elements(after))

    def replace(self, before: Mapping[tuple[str, str], str], after: Mapping[tuple[str, str], str]) -> None:
        for (name, key), data in before.items():
            if after.get((name, key)) != data:
                self.elements.deleted.setdefault(name, []).append(key)
        for (name, key), data in after.items():
            if before.get((name, key)) != data:
                self.elements.added.setdefault(name, []).append((key, data))

    def stray(self, stray: Stray) -> None:
        group = Affinity.named(stray.name) if stray.kind == "affinity" else None
        if stray.kind == "element":
            self.elements.deleted.setdefault(stray.name, []).append(stray.text)
        elif group:
            self.groups[group] += 0  # looked at when it is known whether somebody uses it now
        else:
            self.removed.append(f"delete {stray.kind} {self.where} {stray.name}")

    def group(self, group: Affinity, *, adding: bool) -> None:
        chain = affinity_chain(self.family, group)
        if adding:
            self.declare(group.name, affinity_map(self.family))
            self.chain(group.name, None, chain)
        else:
            self.step.gone.add(group)
            self.chain(group.name, chain, None)
            self.removed.append(f"delete map {self.where} {group.name}")

    def script(self) -> Script:
        for group, more in self.groups.items():
            there = group in self.held.groups
            needed = self.held.groups[group] + more > 0
            if there != needed:
                self.group(group, adding=needed)
        # Every chain before any rule, since rules refer to chains; rules before elements, since the kernel looks
        # through what the sets hold for each rule it adds.
        made = [*self.unhooked, *self.chains, *self.rules]
        gone = [*self.emptied, *self.removed]
        frame = [*self.declared, *made, *gone]

        def pieces() -> Iterator[str]:
            deleted, added = self.elements.lines(self.where)
            yield _text([*self.declared, *deleted, *made, *added, *gone])

        operations = len(frame) + self.elements.total()
        return Script(Transaction(pieces, operations), self.step, _text(frame), self.elements)


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _elements(frontend: Frontend | None) -> dict[tuple[str, str], str]:
    return {(name, key): data for name, key, data in frontend.elements()} if frontend else {}


def _one(name: str, key: str) -> dict[tuple[str, str], str]:
    return {(name, key): ""}
