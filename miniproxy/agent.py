"""Puts the rooms together: batches from a source go in, the kernel follows.

tracker (what is known) → policy and planner (what should be) → reconciler (what differs) → backend (the kernel),
for each IP family on its own: a family the kernel does not take never holds up the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from .config import Settings
from .log import fields
from .model import Batch, Family, Node, Problem, Ref, ServicePort, ServicePortName
from .policy import Serving, categorize
from .problems import News, Problems
from .reconciler import Reconciler, Result
from .tracker import PortKey, Tracker
from .transaction import Backend, TransactionError

log = logging.getLogger(__name__)


class Planner(Protocol):
    """A planner module (planner/iptables.py, …): pure functions from what is known to kernel objects."""

    def frame(
        self, settings: Settings, node: Node, family: Family, local_addresses: Sequence[str] = ()
    ) -> Iterable[Any]: ...

    def plan(self, port: ServicePort, serving: Serving, settings: Settings, node: Node) -> Iterable[Any]: ...

    def show(self, objects: Iterable[Any]) -> str:
        """Objects as the kernel's own tool would list them."""
        ...


class Synced(NamedTuple):
    """One family's part of a sync."""

    family: Family
    result: Result | None  # None: failed, and `error` says why
    error: str = ""


class Agent:
    """Everything between a source and the kernel, for one node. Single-threaded; does nothing by itself."""

    def __init__(
        self,
        settings: Settings,
        planner: Planner,
        backends: Mapping[Family, Backend],
        *,
        local_addresses: Callable[[Family], Sequence[str]] = lambda family: (),
        announce: Callable[[News], None] | None = None,
    ) -> None:
        self.settings = settings
        self.planner = planner
        self.tracker = Tracker(settings.node_name)
        self.problems = Problems()
        self.reconcilers = {family: Reconciler(backend) for family, backend in backends.items()}
        self._local_addresses = local_addresses
        self._announce = announce or log_news
        self._planned_for: Node | None = None
        self._suspect: set[Family] = set(backends)  # whose kernel state has to be read before it is written

    def handle(self, batch: Batch) -> None:
        """Fold in what a source hands over; nothing reaches the kernel before sync."""
        self.tracker.apply(batch)
        self._announce(self.problems.of_batch(batch))

    def replan(self) -> None:
        """Bring what should be up to date with what is known: work in proportion to what changed."""
        if self._planned_for != self.tracker.node:
            self.plan_frame()
        for key in self.tracker.take():
            self._plan(key)

    def plan_frame(self) -> None:
        """Plan what does not belong to a service; it depends on the node and its addresses."""
        self._planned_for = node = self.tracker.node
        for family, reconciler in self.reconcilers.items():
            addresses = self._local_addresses(family)
            reconciler.frame(self.planner.frame(self.settings, node, family, addresses))

    def sync(self) -> list[Synced]:
        """Make the kernel follow. A family that fails is read again, and searched for the bad object, next time."""
        self.replan()
        return [self._sync(family, reconciler) for family, reconciler in self.reconcilers.items()]

    def check(self) -> dict[Family, int]:
        """Read the kernel back and count what is not as it should be (drift); sync then repairs it."""
        self.plan_frame()
        drift = {}
        for family, reconciler in self.reconcilers.items():
            try:
                before = reconciler.pending()
                drift[family] = reconciler.adopt() - before
            except TransactionError as error:
                self._suspect.add(family)
                log.warning("cannot read the kernel: %s", error, extra=fields(family=family))
        return drift

    def _plan(self, key: PortKey) -> None:
        name, family = key
        reconciler = self.reconcilers.get(family)
        if reconciler is None:
            return
        port = self.tracker.port(key)
        if port is None:
            reconciler.set(name, ())
            self._state(family, name, ())
            return
        serving = categorize(port, self.tracker.endpoints(key), self.tracker.node)
        reconciler.set(name, self.planner.plan(port, serving, self.settings, self.tracker.node))
        # The ports of one Service share its health check port; that is no conflict.
        conflicts = [(k, w) for k, w in reconciler.conflicts(name) if w is None or w[:2] != name[:2]]
        self._state(family, name, [f"{_traffic(k)} belongs to {winner}" for k, winner in conflicts])

    def _sync(self, family: Family, reconciler: Reconciler) -> Synced:
        try:
            if family in self._suspect:
                reconciler.adopt()
            result = reconciler.sync(bisect=family in self._suspect)
        except TransactionError as error:
            self._suspect.add(family)
            return Synced(family, None, str(error))
        self._suspect.discard(family)
        for name, reason in result.set_aside:
            self._state(family, name, [f"set aside, its old state keeps serving: {reason}"])
        return Synced(family, result)

    def _state(self, family: Family, name: ServicePortName, reasons: Iterable[str]) -> None:
        ref = Ref("Service", name.namespace, name.name)
        finder = f"{family} {name.port}/{name.protocol}"
        field = f"port {name.port or name.protocol} ({family})"
        self._announce(self.problems.state(finder, ref, [Problem(ref, field, reason) for reason in reasons]))


def _traffic(key: Any) -> str:
    return f"traffic to {key[-1]}" if isinstance(key, tuple) else str(key)


def log_news(news: News) -> None:
    """Announce problems in the log."""
    for problem in news.appeared:
        log.warning("refused: %s", problem)
    for problem in news.over:
        log.info("mended: %s", problem)
