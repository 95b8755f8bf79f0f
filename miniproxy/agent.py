"""Puts the rooms together: batches from a source go in, the kernel follows.

tracker (what is known) → policy and planner (what should be) → reconciler (what differs) → backend (the kernel),
for each IP family on its own: a family the kernel does not take never holds up the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from .config import Settings
from .flows import Flows, Stale
from .log import fields
from .model import Batch, Endpoint, Family, Node, PortKey, Problem, ProblemKind, Ref, ServicePort, ServicePortName
from .observer import Conntrack, Observer, Synced
from .policy import Serving, categorize
from .problems import NO_NEWS, News, Problems
from .reconciler import STALE, Reconciler, Result
from .tracker import Tracker
from .transaction import Backend, TransactionError

log = logging.getLogger(__name__)

_MEANWHILE = "; what was known before is still served, and it is tried again"  # when a source cannot be read
_STEP = 250  # service ports
_LOOK_HOLDS = 10.0  # seconds for which the first sync believes what `look` has read


class Planner(Protocol):
    """A planner module (planner/iptables.py, …): pure functions from what is known to kernel objects."""

    MANY_ENDPOINTS: int  # with more of them in a family, `plan` is told so by its node; 0: it does not matter

    def frame(
        self, settings: Settings, node: Node, family: Family, local_addresses: Sequence[str] = ()
    ) -> Iterable[Any]: ...

    def plan(self, port: ServicePort, serving: Serving, settings: Settings, node: Node) -> Iterable[Any]: ...

    def show(self, objects: Iterable[Any]) -> str:
        """Objects as the kernel's own tool would list them."""
        ...


# A service port as the kernel can have it, and what it does not get of what it asks for.
Review = tuple[ServicePort, Sequence[str]]


class Agent:
    """Everything between a source and the kernel, for one node. Single-threaded; does nothing by itself."""

    def __init__(
        self,
        settings: Settings,
        planner: Planner,
        backends: Mapping[Family, Backend],
        *,
        local_addresses: Callable[[Family], Sequence[str]] = lambda family: (),
        conntrack: Conntrack | None = None,
        review: Callable[[ServicePort], Review] = lambda port: (port, ()),
        announce: Callable[[News], None] | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.planner = planner
        self.tracker = Tracker(settings.node_name, settings.bind_address)
        self.problems = Problems()
        self.reconcilers = {family: Reconciler(backend) for family, backend in backends.items()}
        self._local_addresses = local_addresses
        self._local: dict[Family, tuple[str, ...]] = {}  # what they were when the frame was planned
        self._review = review
        self._conntrack = conntrack
        self._flows = Flows(lambda family: self._local.get(family, ()))
        self._stale: dict[Family, list[Stale]] = {}  # flows to forget once the rules no longer make them
        self._fresh = set(backends)  # families whose flows of before this agent have not been looked at
        self._announce = announce or log_news
        self._observer = observer or Observer()
        self._clock = clock
        self._planned_for: Node | None = None
        self._nodes: dict[Family, Node] = {}  # the same, as each family's service ports are planned for
        self._counts: dict[PortKey, int] = {}  # endpoints of each service port, where their number matters
        self._count = dict.fromkeys(backends, 0)  # and of each family
        self._suspect: set[Family] = set(backends)  # whose kernel state has to be read before it is written
        self._aside: dict[Family, set[ServicePortName]] = {family: set() for family in backends}
        self._compared: set[Family] = set()  # whose kernel state has been read since the last sync
        self._seen: dict[Family, Mapping[Hashable, Any]] = {}  # the kernel state as `look` has read it
        self._seen_at = 0.0

    def look(self) -> None:
        """Read the kernel ahead of the first sync, which then need not if it comes soon: while a source lists all
        there is, the tools that read can run. It may take as long as they do.
        """
        for family, reconciler in self.reconcilers.items():
            with suppress(TransactionError):  # the sync will meet it too, and say so
                self._seen[family] = reconciler.backend.read()
        self._seen_at = self._clock()

    def _take_seen(self, family: Family) -> Mapping[Hashable, Any] | None:
        seen = self._seen.pop(family, None)
        return seen if self._clock() - self._seen_at < _LOOK_HOLDS else None

    def handle(self, batch: Batch) -> None:
        """Fold in what a source hands over; nothing reaches the kernel before sync."""
        self.tracker.apply(batch)
        self._tell(self.problems.of_batch(batch))

    def replan(self) -> None:
        """Bring what should be up to date with what is known: work in proportion to what changed."""
        for steps in self._steps().values():
            _exhaust(steps)

    def _steps(self) -> dict[Family, Iterator[None]]:
        """What `replan` does for each family, to be done step by step and to its end. The frame is planned now."""
        if self._planned_for != self.tracker.node:
            self.plan_frame()
        touched = self.tracker.take()
        return {f: self._plan_all(f, [key for key in touched if key[1] is f]) for f in self.reconcilers}

    def _plan_all(self, family: Family, touched: list[PortKey]) -> Iterator[None]:
        yield
        for number, (key, endpoints) in enumerate(self._with_endpoints(family, touched), 1):
            self._plan_safely(key, endpoints)
            if number % _STEP == 0:
                yield
        yield

    def _with_endpoints(self, family: Family, touched: list[PortKey]) -> list[tuple[PortKey, list[Endpoint]]]:
        """The service ports to plan: those touched, or all when their endpoints have become many, or few again."""
        found = [(key, self.tracker.endpoints(key)) for key in touched]
        limit = self.planner.MANY_ENDPOINTS
        if not limit:
            return found
        for key, endpoints in found:
            count = len(endpoints) if self.tracker.port(key) else 0
            self._count[family] += count - self._counts.pop(key, 0)
            if count:
                self._counts[key] = count
        node, many = self._nodes[family], self._count[family] > limit
        if node.many_endpoints is many:
            return found
        self._nodes[family] = msgspec.structs.replace(node, many_endpoints=many)
        there = set(touched)
        return found + [(key, self.tracker.endpoints(key)) for key in self.tracker.keys(family) if key not in there]

    def _plan_safely(self, key: PortKey, endpoints: list[Endpoint]) -> None:
        try:
            self._plan(key, endpoints)
        except Exception:
            # A fault in our own code must cost the one port it shows with, whose old rules keep serving.
            log.exception("cannot plan %s: please report this", key[0], extra=fields(family=key[1]))

    def plan_frame(self) -> None:
        """Plan what does not belong to a service; it depends on the node and its addresses."""
        self._planned_for = node = self.tracker.node
        local = {family: self._addresses(family) for family in self.reconcilers}
        if local != self._local:
            self._local = local
            self.tracker.touch_external()
        limit = self.planner.MANY_ENDPOINTS
        self._nodes = {
            family: msgspec.structs.replace(node, local=ips, many_endpoints=0 < limit < self._count[family])
            for family, ips in local.items()
        }
        for family, reconciler in self.reconcilers.items():
            reconciler.frame(self.planner.frame(self.settings, node, family, local[family]))

    def _addresses(self, family: Family) -> tuple[str, ...]:
        """The node's own; what they were where the kernel does not say."""
        try:
            return tuple(self._local_addresses(family))
        except OSError as error:
            log.warning("cannot find out the node's addresses: %s", error, extra=fields(family=family))
            return self._local.get(family, ())

    def sync(self) -> list[Synced]:
        """Make the kernel follow. A family that fails is read again, and searched for the bad object, next time."""
        return [self._sync(family, steps) for family, steps in self._steps().items()]

    def check(self) -> dict[Family, int]:
        """Read the kernel back and count what is not as it should be (drift); sync then repairs it."""
        self.plan_frame()
        drift = {}
        for family, reconciler in self.reconcilers.items():
            try:
                before = reconciler.pending()
                drift[family] = reconciler.adopt() - before
                self._compared.add(family)
            except TransactionError as error:
                self._suspect.add(family)
                log.warning("cannot read the kernel: %s", error, extra=fields(family=family))
        return drift

    def _plan(self, key: PortKey, endpoints: list[Endpoint]) -> None:
        name, family = key
        reconciler = self.reconcilers[family]
        port = self.tracker.port(key)
        if port is None:
            reconciler.set(name, ())
            self._state(family, name, ())
            self._note_flows(key, None, ())
            self._observer.planned(key, None, Serving())
        else:
            port, reservations = self._review(port)
            serving = categorize(port, endpoints, self.tracker.node)
            self._note_flows(key, port, endpoints)
            self._observer.planned(key, port, serving)
            reconciler.set(name, self.planner.plan(port, serving, self.settings, self._nodes[family]))
            self._judge(family, name, reservations)
        for other in reconciler.take_contested():
            rival = self.tracker.port((other, family))
            if rival and other != name and other not in reconciler.aside:
                self._judge(family, other, self._review(rival)[1])

    def _judge(self, family: Family, name: ServicePortName, reservations: Sequence[str]) -> None:
        """State what a service port does not get of what it asks for."""
        # The ports of one Service share its health check port; that is no conflict.
        conflicts = [(k, w) for k, w in self.reconcilers[family].conflicts(name) if w is None or w[:2] != name[:2]]
        reasons = [f"{_traffic(k)} belongs to {winner}" for k, winner in conflicts]
        self._state(family, name, [*reasons, *reservations], "Conflict" if reasons else "Refused")

    def _sync(self, family: Family, steps: Iterator[None]) -> Synced:
        start = self._clock()
        reconciler = self.reconcilers[family]
        full = family in self._suspect | self._compared
        self._compared.discard(family)
        try:
            result = self._write(family, reconciler, steps)
        except TransactionError as error:
            self._suspect.add(family)
            return Synced(family, None, str(error), self._clock() - start, full)
        finally:
            _exhaust(steps)
        self._suspect.discard(family)
        self._tell_set_aside(family, reconciler, result)
        self._forget_flows(family)
        return Synced(family, result, "", self._clock() - start, full)

    def _write(self, family: Family, reconciler: Reconciler, steps: Iterator[None]) -> Result:
        """Plan and write. A kernel that has nothing yet is written while it is planned, where its tool is slow."""
        if family not in self._suspect:
            _exhaust(steps)
            return reconciler.sync(bisect=False)
        seen = self._take_seen(family)
        found = reconciler.backend.read() if seen is None else seen
        try:
            filled = reconciler.fill(found, steps)
        except TransactionError as error:
            if error.transient:
                raise
            filled, found = None, reconciler.backend.read()  # what spans tables is not atomic: look
        if filled is not None:
            return filled
        _exhaust(steps)
        reconciler.adopt(found)
        return reconciler.sync()

    def _tell_set_aside(self, family: Family, reconciler: Reconciler, result: Result) -> None:
        """Which service ports the kernel has refused just now, and of which it has thought better."""
        for name in self._aside[family] - reconciler.aside.keys():
            port = self.tracker.port((name, family))
            self._judge(family, name, self._review(port)[1] if port else ())
        self._aside[family] = set(reconciler.aside)
        for name, reason in result.set_aside:
            if name == STALE:
                log.warning("cannot remove what nobody needs any more: %s", reason, extra=fields(family=family))
            else:
                self._state(family, name, [f"set aside, its old state keeps serving: {reason}"], "SetAside")

    def _note_flows(self, key: PortKey, port: ServicePort | None, endpoints: Iterable[Endpoint]) -> None:
        stale = self._flows.change(key, port, endpoints)
        if stale and key[1] not in self._fresh:
            self._stale.setdefault(key[1], []).extend(stale)

    def _forget_flows(self, family: Family) -> None:
        """After the rules are written: earlier, the next packet would only make the same flow again."""
        if self._conntrack is None:
            return
        stale = self._stale.pop(family, [])
        try:
            if family in self._fresh:
                stale = self._flows.all(family)
                self._fresh.discard(family)
            if stale:
                count = self._conntrack.forget(stale)
                log.info("forgot stale flows", extra=fields(family=family, flows=count))
        except OSError as error:
            self._stale.setdefault(family, []).extend(stale)
            log.warning("cannot look after conntrack: %s", error, extra=fields(family=family))

    def _state(
        self, family: Family, name: ServicePortName, reasons: Sequence[str], what: ProblemKind = "Refused"
    ) -> None:
        if not reasons and not self.problems:
            return  # as nearly always, so nothing is made up for it
        ref = Ref("Service", name.namespace, name.name)
        finder = family, name.port, name.protocol
        found = [Problem(ref, f"port {name.port or name.protocol} ({family})", r, what=what) for r in reasons]
        self._tell(self.problems.state(finder, ref, found))

    def _tell(self, news: News) -> None:
        if news == NO_NEWS:
            return
        self._announce(news)
        self._observer.noticed(news)


def _exhaust(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


def _traffic(key: Any) -> str:
    return f"traffic to {key[-1]}" if isinstance(key, tuple) else str(key)


def log_news(news: News) -> None:
    """Announce problems in the log."""
    for problem in news.appeared:
        log.warning("refused: %s%s", problem, _MEANWHILE if problem.ref.kind in ("API", "File") else "")
    for problem in news.over:
        log.info("mended: %s", problem)
