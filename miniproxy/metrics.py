"""Prometheus metrics: kube-proxy's series, which dashboards and alerts are made for, and our own beside them.

An Observer that counts, in a registry of its own. Which series there are is in series.py.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from threading import Lock
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from . import __version__
from .health import Answer
from .model import Batch, EndpointSlice, Family, PortKey, Service, ServicePort
from .observer import Observer, Synced, Trigger
from .planner.iptables import Chain, DispatchChain, DispatchRule, Hooks
from .policy import Serving
from .problems import News
from .series import CONNTRACK, RULES, SERIES, Series
from .transaction import Change, Transaction

_TIMES_KEPT = 100_000  # of a family that the kernel does not take

_Metric = Counter | Gauge | Histogram
_KINDS: dict[str, Callable[..., _Metric]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
_WHOLE = re.compile(r'^([a-z_]+_bucket\{.*le="[0-9]+)\.0(".*)$', re.MULTILINE)


class Metrics(Observer):
    """All series of one agent. Its methods may be called from any thread."""

    def __init__(
        self,
        mode: str,
        families: Sequence[Family],
        *,
        relists: Callable[[], Mapping[str, int]] = dict,
        packets: Callable[[], Mapping[str, int]] = dict,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Asked for each page: `relists`, how often each resource of the API server has had to be listed anew, and
        `packets`, what the kernel has counted, by series.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]  # kube-proxy has no *_created series
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._series: dict[str, _Metric] = {s.name: self._make(s) for s in SERIES if mode in s.modes}
        self._mode = mode
        self._families = families
        self._relists = relists
        self._packets = packets
        self._asked: dict[tuple[str, ...], int] = defaultdict(int)  # what the last answers were
        self._wall = wall
        self._began = wall()
        self._lock = Lock()
        self._taken = 0
        self._waiting: deque[_Waiting] = deque()  # batches that no sync has covered, the first is number _taken
        self._arrived: dict[Family, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES_KEPT))
        self._triggers: dict[Family, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES_KEPT))
        self._without_local: dict[tuple[Family, str], set[PortKey]] = {
            (family, policy): set() for family in families for policy in ("internal", "external")
        }
        self._written: dict[tuple[Family, str], int] = defaultdict(int)  # rules by table, since the last sync
        self._failed: dict[Family, int] = defaultdict(int)  # transactions, since the last sync
        self._drift: dict[Family, int] = defaultdict(int)
        self._begin_at_zero()
        self.add("miniproxy_build_info", 1, __version__, mode)

    def _begin_at_zero(self) -> None:
        """Let what is counted be there before it happens: a rate over a series' first value is nothing."""
        values = {"ip_family": list(map(str, self._families)), "backend": [self._mode], "code": ["200", "503"]}
        for series in SERIES:
            if series.kind != "gauge" and series.name in self._series and values.keys() >= set(series.labels):
                for labels in product(*(values[label] for label in series.labels)):
                    self._child(series.name, labels)

    def _make(self, series: Series) -> _Metric:
        buckets = {"buckets": series.buckets} if series.buckets else {}
        return _KINDS[series.kind](series.name, series.help, series.labels, registry=self.registry, **buckets)

    def page(self) -> Answer:
        """/metrics, in the text format."""
        for resource, count in self._relists().items():
            self._follow(count, "miniproxy_relists_total", resource)
        for name, count in self._packets().items():
            self._follow(count, name)
        page = generate_latest(self.registry).decode()
        # Bounds of buckets as Go writes them: labels are compared as text, and dashboards may name one.
        return Answer(200, {"Content-Type": CONTENT_TYPE_PLAIN_0_0_4}, _WHOLE.sub(r"\1\2", page))

    def _follow(self, count: int, name: str, *labels: str) -> None:
        """Bring a counter up to one kept elsewhere, which begins at 0 now and then: rules are written anew."""
        before = self._asked[name, *labels]
        self._asked[name, *labels] = count
        self.add(name, count - before if count >= before else count, *labels)

    # -- for anybody who counts something

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Increase a counter or gauge; a series that this mode does not have is left alone."""
        metric = self._child(name, labels)
        if metric is not None:
            metric.inc(amount)

    def set(self, name: str, value: float, *labels: str) -> None:
        metric = self._child(name, labels)
        if metric is not None:
            metric.set(value)

    def observe(self, name: str, value: float, *labels: str) -> None:
        metric = self._child(name, labels)
        if metric is not None:
            metric.observe(value)

    def _child(self, name: str, labels: tuple[str, ...]) -> Any:
        metric = self._series.get(name)
        return metric.labels(*labels) if metric is not None and labels else metric

    def answered(self, probe: str, status: int) -> None:
        """A probe ("healthz" or "livez") has been answered."""
        self.add(f"kubeproxy_proxy_{probe}_total", 1, str(status))

    # -- what the agent tells

    def delivered(self, batch: Batch) -> None:
        services = sum(isinstance(o, Service) for o in batch.upserts) + sum(r.kind == "Service" for r in batch.deletes)
        slices = sum(isinstance(o, EndpointSlice) for o in batch.upserts)
        slices += sum(r.kind == "EndpointSlice" for r in batch.deletes)
        now = self._wall()
        with self._lock:
            self._waiting.append(_Waiting(now, services, slices))
        self.add(f"{RULES}_service_changes_total", services)
        self.add(f"{RULES}_endpoint_changes_total", slices)
        self.add(f"{RULES}_service_changes_pending", services)
        self.add(f"{RULES}_endpoint_changes_pending", slices)
        if services or slices:
            for family in self._families:
                self.set(f"{RULES}_last_queued_timestamp_seconds", now, str(family))

    def planned(self, key: PortKey, port: ServicePort | None, serving: Serving) -> None:
        alone = port if port is not None and serving.any and not serving.local else None
        for policy, local in (
            ("internal", alone is not None and alone.internal_local),
            ("external", alone is not None and alone.external_local),
        ):
            found = self._without_local[key[1], policy]
            if local:
                found.add(key)
            elif found:
                found.discard(key)

    def noticed(self, news: News) -> None:
        for problem in news.appeared:
            self.add("miniproxy_problems", 1, problem.ref.kind, problem.what)
        for problem in news.over:
            self.add("miniproxy_problems", -1, problem.ref.kind, problem.what)

    def drifted(self, family: Family, objects: int) -> None:
        self.add("miniproxy_drift_found_total", objects, str(family))
        self._drift[family] += objects

    def read(self, family: Family, objects: dict[Any, Any]) -> None:
        self.set("miniproxy_objects", len(objects), self._mode, str(family))
        rules = _rules(objects.values()) if self._mode == "iptables" else {}
        for table, count in rules.items():
            self.set(f"{RULES}_iptables_total", count, str(family), table)

    def transacted(
        self, family: Family, transaction: Transaction, changes: Sequence[Change], seconds: float, error: str
    ) -> None:
        where = (self._mode, str(family))
        self.observe("miniproxy_transaction_duration_seconds", seconds, *where)
        if error:
            self._failed[family] += 1
            self.add("miniproxy_transaction_failures_total", 1, *where)
            return
        self.add("miniproxy_transaction_operations_total", transaction.operations, *where)
        self.add("miniproxy_objects", sum((c.after is not None) - (c.before is not None) for c in changes), *where)
        if self._mode == "iptables":
            before = _rules(c.before for c in changes if c.before is not None)
            for table, count in _rules(c.after for c in changes if c.after is not None).items():
                self._written[family, table] += count
                self.add(f"{RULES}_iptables_total", count - before[table], str(family), table)

    def forgot(self, family: Family, flows: int, seconds: float) -> None:
        self.add(f"{CONNTRACK}_deleted_entries_total", flows, str(family))
        self.observe(f"{CONNTRACK}_sync_duration_seconds", seconds, str(family))

    def synced(self, results: Sequence[Synced], triggers: Sequence[Trigger], seconds: float, taken: int) -> None:
        for batch in self._covered(taken):
            self.add(f"{RULES}_service_changes_pending", -batch.services)
            self.add(f"{RULES}_endpoint_changes_pending", -batch.slices)
            for result in results:
                self._arrived[result.family].append(batch.arrived)
        for family, time_ in triggers:
            if time_ >= self._began:  # what happened before says nothing about how long the agent took
                self._triggers[family].append(time_)
        for result in results:
            self._timed(result)
            self._count_failures(result)
            if result.result is not None:
                self._applied(result.family)

    def _covered(self, taken: int) -> list[_Waiting]:
        with self._lock:
            count, self._taken = min(taken - self._taken, len(self._waiting)), taken
            return [self._waiting.popleft() for _ in range(count)]

    def _timed(self, result: Synced) -> None:
        family = str(result.family)
        self.observe(f"{RULES}_duration_seconds", result.seconds, family)
        kind = "full" if result.full else "partial"
        self.observe(f"kubeproxy_sync_{kind}_proxy_rules_duration_seconds", result.seconds, family)

    def _count_failures(self, result: Synced) -> None:
        """A set-aside port's refusals count too: the kernel refused a restore."""
        failed = self._failed.pop(result.family, 0)
        if failed:
            self.add(f"{RULES}_iptables_restore_failures_total", failed, str(result.family))
            self.add(f"{RULES}_nftables_sync_failures_total", failed, str(result.family))
        if failed and not result.full:
            self.add(f"{RULES}_iptables_partial_restore_failures_total", failed, str(result.family))

    def _applied(self, family: Family) -> None:
        now = self._wall()
        self.set(f"{RULES}_last_timestamp_seconds", now, str(family))
        for time_ in _taken_from(self._triggers, family):
            self.observe("kubeproxy_network_programming_duration_seconds", max(0.0, now - time_), str(family))
        for time_ in _taken_from(self._arrived, family):
            self.observe("miniproxy_event_to_kernel_seconds", max(0.0, now - time_), str(family))
        for policy in ("internal", "external"):
            count = len(self._without_local[family, policy])
            self.set(f"{RULES}_no_local_endpoints_total", count, str(family), policy)
        for table in ("filter", "nat"):
            self.set(f"{RULES}_iptables_last", self._written.pop((family, table), 0), str(family), table)
        self.add("miniproxy_drift_repaired_total", self._drift.pop(family, 0), str(family))


class _Waiting(NamedTuple):
    """A batch that no sync has covered yet."""

    arrived: float  # Unix seconds
    services: int
    slices: int


def _taken_from(times: dict[Family, deque[float]], family: Family) -> deque[float]:
    return times.pop(family, deque())


def _rules(objects: Any) -> dict[str, int]:
    """How many iptables rules objects are, by table."""
    count: dict[str, int] = {"filter": 0, "nat": 0}
    for obj in objects:
        match obj:
            case Chain() | Hooks():
                count[obj.table] += len(obj.rules)
            case DispatchRule():
                count[obj.table] += 1
            case DispatchChain():
                count[obj.table] += len(obj.tail)
    return count
