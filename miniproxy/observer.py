"""What the agent tells while it works: to health, metrics and the log, none of which it knows.

The agent calls an Observer at each turn of its work; backends and conntrack stay unaware and are wrapped here.
Whoever observes must be quick and must not raise: it runs in the thread that owns the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from .flows import Stale
from .model import Batch, Family, PortKey, ServicePort
from .policy import Serving
from .problems import News
from .reconciler import Result
from .transaction import Backend, Change, Transaction, TransactionError

Trigger = tuple[Family, float]  # when a change of that family came about, Unix seconds


class Synced(NamedTuple):
    """One family's part of a sync."""

    family: Family
    result: Result | None  # None: failed, and `error` says why
    error: str = ""
    seconds: float = 0.0  # planning and writing
    full: bool = False  # the kernel was read back and all of it compared, not just what changed


class Observer:
    """Every call, and nothing done about it: override what is of interest."""

    def delivered(self, batch: Batch) -> None:
        """A source hands over a batch; it will wait to be taken in. Called from the source's thread."""

    def planned(self, key: PortKey, port: ServicePort | None, serving: Serving) -> None:
        """A service port has been planned anew; None: it is gone. It is not in the kernel yet."""

    def noticed(self, news: News) -> None:
        """Problems have appeared or are over. May be called from any thread."""

    def drifted(self, family: Family, objects: int) -> None:
        """So many objects in the kernel are not what was written."""

    def read(self, family: Family, objects: dict[Any, Any]) -> None:
        """The kernel has been read: what it holds that is ours."""

    def transacted(
        self, family: Family, transaction: Transaction, changes: Sequence[Change], seconds: float, error: str
    ) -> None:
        """A transaction has been sent; `error` is "" when the kernel took it."""

    def forgot(self, family: Family, flows: int, seconds: float) -> None:
        """Conntrack has been cleared of stale flows, so many of them."""

    def synced(self, results: Sequence[Synced], triggers: Sequence[Trigger], seconds: float, taken: int) -> None:
        """A sync is over that covered the first `taken` of all batches delivered.

        `triggers`: when the changes came about that it covered, as far as slices say. A family that failed has
        not got them.
        """


class Observers(Observer):
    """Several as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        # Called for each port there is: those who do not listen need not be asked.
        self._planned = [o.planned for o in observers if type(o).planned is not Observer.planned]

    def delivered(self, batch: Batch) -> None:
        for o in self._observers:
            o.delivered(batch)

    def planned(self, key: PortKey, port: ServicePort | None, serving: Serving) -> None:
        for planned in self._planned:
            planned(key, port, serving)

    def noticed(self, news: News) -> None:
        for o in self._observers:
            o.noticed(news)

    def drifted(self, family: Family, objects: int) -> None:
        for o in self._observers:
            o.drifted(family, objects)

    def read(self, family: Family, objects: dict[Any, Any]) -> None:
        for o in self._observers:
            o.read(family, objects)

    def transacted(
        self, family: Family, transaction: Transaction, changes: Sequence[Change], seconds: float, error: str
    ) -> None:
        for o in self._observers:
            o.transacted(family, transaction, changes, seconds, error)

    def forgot(self, family: Family, flows: int, seconds: float) -> None:
        for o in self._observers:
            o.forgot(family, flows, seconds)

    def synced(self, results: Sequence[Synced], triggers: Sequence[Trigger], seconds: float, taken: int) -> None:
        for o in self._observers:
            o.synced(results, triggers, seconds, taken)


class ObservedBackend:
    """A backend that tells what passes through it."""

    def __init__(
        self,
        backend: Backend,
        family: Family,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.family = family
        self._observer = observer
        self._clock = clock
        self._rendered: tuple[Transaction | None, Sequence[Change]] = (None, ())

    @property
    def batch(self) -> int:
        return self.backend.batch

    def read(self) -> dict[Any, Any]:
        objects = self.backend.read()
        self._observer.read(self.family, objects)
        return objects

    def same(self, planned: Any, actual: Any) -> bool:
        return self.backend.same(planned, actual)

    def stream(self, parts: Iterable[Sequence[Change]]) -> Transaction | None:
        changes: list[Change] = []

        def noted() -> Iterator[Sequence[Change]]:
            for part in parts:
                changes.extend(part)
                yield part

        transaction = self.backend.stream(noted())
        self._rendered = (transaction, changes)
        return transaction

    def render(self, changes: Sequence[Change]) -> Transaction:
        transaction = self.backend.render(changes)
        self._rendered = (transaction, changes)
        return transaction

    def apply(self, transaction: Transaction) -> None:
        rendered, changes = self._rendered
        self._rendered = (None, ())
        if rendered is not transaction:
            changes = ()  # not one of ours: its operations are counted, its objects are not known
        start = self._clock()
        error = ""
        try:
            self.backend.apply(transaction)
        except TransactionError as failure:
            error = str(failure)
            raise
        finally:
            self._observer.transacted(self.family, transaction, changes, self._clock() - start, error)


class Conntrack(Protocol):
    """What the agent needs of kernel/conntrack.py."""

    def forget(self, stale: Iterable[Stale]) -> int: ...


class ObservedConntrack:
    """A conntrack that tells how much it was made to forget."""

    def __init__(self, conntrack: Conntrack, observer: Observer, clock: Callable[[], float] = time.monotonic) -> None:
        self._conntrack = conntrack
        self._observer = observer
        self._clock = clock

    def forget(self, stale: Iterable[Stale]) -> int:
        stale = tuple(stale)
        start = self._clock()
        count = self._conntrack.forget(stale)
        for family in {s.family for s in stale}:  # the agent asks for one family at a time
            self._observer.forgot(family, count, self._clock() - start)
        return count
