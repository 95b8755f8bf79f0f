"""What is wrong with which object, said once: each problem is announced when it appears and when it is over."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

from .model import Batch, Problem, Ref


class News(NamedTuple):
    appeared: tuple[Problem, ...] = ()
    over: tuple[Problem, ...] = ()


NO_NEWS = News()


class Problems:
    """The standing problems, by the object they are about and by who found them ("source", a family's port, …)."""

    def __init__(self) -> None:
        self._standing: dict[tuple[Hashable, Ref], tuple[Problem, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._standing)

    def __iter__(self) -> Iterator[Problem]:
        return (problem for problems in self._standing.values() for problem in problems)

    def of_batch(self, batch: Batch) -> News:
        """Take a source's word: objects it hands over or withdraws have the problems it states now, no others."""
        handed_over = (*batch.deletes, *(thing.ref for thing in batch.upserts))
        stated: dict[Ref, list[Problem]] = {ref: [] for ref in handed_over if ("source", ref) in self._standing}
        for problem in batch.problems:
            stated.setdefault(problem.ref, []).append(problem)
        return _join(self.state("source", ref, found) for ref, found in stated.items())

    def state(self, finder: Hashable, ref: Ref, found: Iterable[Problem]) -> News:
        """From now on `finder` finds just these problems with `ref`."""
        before = self._standing.pop((finder, ref), ())
        now = tuple(found)
        if not before and not now:
            return NO_NEWS
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
