"""What is wrong with which object, said once: each problem is announced when it appears and when it is over."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

from .model import Batch, Problem, Ref


class News(NamedTuple):
    appeared: tuple[Problem, ...] = ()
    over: tuple[Problem, ...] = ()


class Problems:
    """The standing problems, by the object they are about and by who found them ("source", a service port, …)."""

    def __init__(self) -> None:
        self._standing: dict[tuple[Hashable, Ref], tuple[Problem, ...]] = {}

    def __iter__(self) -> Iterator[Problem]:
        return (problem for problems in self._standing.values() for problem in problems)

    def of_batch(self, batch: Batch) -> News:
        """Take a source's word: objects it hands over or withdraws have the problems it states now, no others."""
        stated: dict[Ref, list[Problem]] = {ref: [] for ref in (*batch.deletes, *(o.ref for o in batch.upserts))}
        for problem in batch.problems:
            stated.setdefault(problem.ref, []).append(problem)
        return _join(self.state("source", ref, found) for ref, found in stated.items())

    def stand(self, finder: Hashable, ref: Ref) -> bool:
        """Whether `finder` has found any with `ref`."""
        return (finder, ref) in self._standing

    def state(self, finder: Hashable, ref: Ref, found: Iterable[Problem]) -> News:
        """From now on `finder` finds just these problems with `ref`."""
        before = self._standing.pop((finder, ref), ())
        now = tuple(found)
        if now:
            self._standing[finder, ref] = now
        return News(tuple(p for p in now if p not in before), tuple(p for p in before if p not in now))


def _join(news: Iterable[News]) -> News:
    appeared: list[Problem] = []
    over: list[Problem] = []
    for item in news:
        appeared += item.appeared
        over += item.over
    return News(tuple(appeared), tuple(over))
