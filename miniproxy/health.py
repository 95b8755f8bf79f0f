"""Whether this node's proxy is well, and which load-balanced Services have an endpoint here: what probes are told.

State and answers only; httpd.py does the listening. Statuses, headers and bodies are kube-proxy's, because
load balancers, kubelets and autoscalers are set up for them. Every method may be called from any thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from threading import Lock
from typing import Any, NamedTuple

from .model import Batch, Family, Node, PortKey, ServicePort
from .observer import Observer, Synced, Trigger
from .policy import Serving
from .tracker import ServiceKey

_JSON = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}
_NEVER = "0001-01-01T00:00:00Z"  # Go's zero time, which clients of kube-proxy know


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: str


class Health(Observer):
    """What has been handed over and what the kernel has taken, by family, and whether the node counts.

    A family is unhealthy when something waits for `timeout` seconds (a sync that fails over and over included);
    before its first success it is starting up, which counts as healthy. `node_required`: without a Node object
    the node gets no traffic; a folder of manifests may do without.
    """

    def __init__(
        self,
        families: Iterable[Family],
        node_name: str,
        timeout: float,
        *,
        node_required: bool,
        answered: Callable[[str, int], None] = lambda probe, status: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._families = tuple(families)
        self._node_name = node_name
        self._timeout = timeout
        self._node: Node | None = None if node_required else Node(node_name)
        self._answered = answered
        self._clock = clock
        self._wall = wall
        self._lock = Lock()
        self._delivered = 0  # batches
        self._complete = False  # the source has handed over all there is: from now on the kernel can be late
        self._waiting: dict[Family, float] = {}  # since when something has been waiting
        self._updated: dict[Family, float] = {}  # Unix seconds

    def delivered(self, batch: Batch) -> None:
        nodes = [o for o in batch.upserts if isinstance(o, Node) and o.name == self._node_name]
        gone = any(ref.kind == "Node" and ref.name == self._node_name for ref in batch.deletes)
        with self._lock:
            self._delivered += 1
            self._complete |= batch.synced
            if self._complete and (batch.synced or batch.upserts or batch.deletes):
                for family in self._families:
                    self._waiting.setdefault(family, self._clock())
            if nodes or gone:
                self._node = nodes[-1] if nodes else None

    def drifted(self, family: Family, objects: int) -> None:
        with self._lock:
            self._waiting.setdefault(family, self._clock())

    def synced(self, results: Sequence[Synced], triggers: Sequence[Trigger], seconds: float, taken: int) -> None:
        with self._lock:
            now = self._clock()
            for result in results:
                since = self._waiting.pop(result.family, now)
                if result.result is None:
                    self._waiting[result.family] = since
                    continue
                self._updated[result.family] = self._wall()
                if taken < self._delivered:
                    # What came in while this sync ran did not come before it began.
                    self._waiting[result.family] = max(since, now - seconds)

    def healthy(self) -> bool:
        """Whether no family is late."""
        with self._lock:
            now = self._clock()
            return not any(self._late(family, now) for family in self._families)

    def eligible(self) -> bool:
        """Whether the node should get new traffic from load balancers."""
        with self._lock:
            node = self._node
        return node is not None and not node.deleting and not node.excluded_by_autoscaler

    def livez(self) -> Answer:
        """The answer to "should this process be restarted?"."""
        answer = self._report(None)
        self._answered("livez", answer.status)
        return answer

    def healthz(self) -> Answer:
        """The answer to "should this node get traffic?"."""
        answer = self._report(self.eligible())
        self._answered("healthz", answer.status)
        return answer

    def _report(self, eligible: bool | None) -> Answer:
        with self._lock:
            now, wall = self._clock(), self._wall()
            status = {
                str(family): {"lastUpdated": timestamp(self._updated.get(family, 0)), "healthy": not late}
                for family, late in [(family, self._late(family, now)) for family in self._families]
                if late or family in self._updated
            }
            last = max(self._updated.values(), default=0.0)
        healthy = all(entry["healthy"] for entry in status.values())
        good = healthy and eligible is not False
        report: dict[str, Any] = {
            # While all is well this is simply now: kube-proxy's way, from when it synced periodically.
            "lastUpdated": timestamp(wall if good else last),
            "currentTime": timestamp(wall),
        }
        if eligible is not None:
            report["nodeEligible"] = eligible
        report["healthy"] = healthy
        if status:
            report["status"] = status
        return Answer(200 if good else 503, _JSON, json.dumps(report, separators=(",", ":")))

    def _late(self, family: Family, now: float) -> bool:
        since = self._waiting.get(family)
        return since is not None and now - since >= self._timeout


class ServiceHealth(Observer):
    """The health check port of each Service that has one, and how many of its endpoints are on this node.

    `want` is told when a Service gets, changes or loses (0) its port. A change shows once the kernel has it, so
    that no load balancer is sent here before the rules are.
    """

    def __init__(self, health: Health, want: Callable[[ServiceKey, int], None]) -> None:
        self._health = health
        self._want = want
        self._ports: dict[ServiceKey, dict[PortKey, _Local]] = {}
        self._staged: dict[Family, dict[PortKey, _Local | None]] = {}
        self._shown: dict[ServiceKey, _Shown] = {}

    def planned(self, key: PortKey, port: ServicePort | None, serving: Serving) -> None:
        local = None
        if port is not None and port.health_check_node_port:
            # Draining endpoints serve while nobody else does, but invite no new traffic.
            addresses = frozenset(e.ip for e in serving.local if e.ready)
            local = _Local(port.health_check_node_port, addresses)
        staged = self._staged.setdefault(key[1], {})
        if local or key in staged or key in self._ports.get(_service(key), ()):
            staged[key] = local

    def synced(self, results: Sequence[Synced], triggers: Sequence[Trigger], seconds: float, taken: int) -> None:
        for result in results:
            if result.result is not None:
                self._show(self._staged.pop(result.family, {}))

    def _show(self, staged: Mapping[PortKey, _Local | None]) -> None:
        for key, local in staged.items():
            ports = self._ports.setdefault(_service(key), {})
            if local:
                ports[key] = local
            else:
                ports.pop(key, None)
        for service in dict.fromkeys(map(_service, staged)):
            before = self._shown.get(service, _Shown(0, 0))
            ports = self._ports[service]
            if ports:
                self._shown[service] = now = _summary(ports)
            else:
                del self._ports[service]
                self._shown.pop(service, None)
                now = _Shown(0, 0)
            if now.number != before.number:
                self._want(service, now.number)

    def answer(self, service: ServiceKey) -> Answer:
        """The answer to "does this node have an endpoint of the Service?"."""
        namespace, name = service
        shown = self._shown.get(service, _Shown(0, 0))
        healthy = self._health.healthy()
        body = {
            "service": {"namespace": namespace, "name": name},
            "localEndpoints": shown.endpoints,
            "serviceProxyHealthy": healthy,
        }
        headers = {**_JSON, "X-Load-Balancing-Endpoint-Weight": str(shown.endpoints)}
        return Answer(200 if shown.endpoints and healthy else 503, headers, json.dumps(body, indent="\t"))


class _Local(NamedTuple):
    """One service port in one family: its Service's health check port, its ready endpoints on this node."""

    number: int
    addresses: frozenset[str]


class _Shown(NamedTuple):
    number: int
    endpoints: int


def _service(key: PortKey) -> ServiceKey:
    return key[0].namespace, key[0].name


def _summary(ports: Mapping[PortKey, _Local]) -> _Shown:
    """Pods are counted, by address: not once per port, and not once per family."""
    by_family: dict[Family, set[str]] = {}
    for (_, family), local in ports.items():
        by_family.setdefault(family, set()).update(local.addresses)
    return _Shown(min(local.number for local in ports.values()), max(map(len, by_family.values())))


def timestamp(seconds: float) -> str:
    """Unix seconds as RFC 3339 in UTC, with microseconds; 0 is never."""
    if not seconds:
        return _NEVER
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
