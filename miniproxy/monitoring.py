"""Lets others see how the agent is: health, health check ports, metrics and Events, put together from the settings.

`run` hands what `observer`, `backends` and `conntrack` give to the agent and its loop; these know nothing of it.
What cannot be served (a port is taken, a library is missing) is said and tried again; services go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from .agent import log_news
from .config import Settings
from .configz import configuration
from .events import Recorder
from .health import Answer, Health, ServiceHealth
from .httpd import Httpd, Site, parse_address, routes, text
from .kernel import counters
from .kernel.iptables import Iptables, Variant
from .model import Batch, Family, Node, Problem, Ref
from .observer import Conntrack, ObservedBackend, ObservedConntrack, Observer, Observers
from .planner.iptables import contains
from .problems import Problems
from .report import SyncLog
from .sources import Source
from .sources.kube import KubeSource
from .tracker import ServiceKey
from .transaction import Backend

if TYPE_CHECKING:
    from .metrics import Metrics

log = logging.getLogger(__name__)

_JSON = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}


class Monitoring:
    """Everything of one run. `fatal` says what cannot be served, where the settings make that a reason to stop."""

    def __init__(
        self,
        settings: Settings,
        families: Sequence[Family],
        source: Source,
        local_addresses: Callable[[Family], Sequence[str]],
    ) -> None:
        self.settings = settings
        self.fatal = ""
        self._families = families
        self._local_addresses = local_addresses
        self._problems = Problems()  # of health check ports: found in another thread than the agent's
        self._lock = Lock()
        self._ports = Httpd("health")
        self._node = _OwnNode(settings)
        self._variant: Variant | None = None
        self._metrics = _metrics(settings, families, source, self._packets)
        self._recorder = _recorder(settings, source, self._metrics)
        self.health = Health(
            families,
            settings.node_name,
            2 * settings.sync_period,
            node_required=not settings.source,
            answered=self._metrics.answered if self._metrics else lambda probe, status: None,
        )
        self._services = ServiceHealth(self.health, self._want_port)
        optional = filter(None, (self._metrics, self._recorder))
        self.observer = Observers(SyncLog(), self._node, self.health, self._services, *optional)
        # A page of metrics takes its time, a probe has none: metrics are served by a thread of their own.
        self._servers = [self._ports, Httpd("metrics")]

    def start(self, stop_agent: Callable[[], None]) -> None:
        """Listen, and send Events. `stop_agent` is called when `fatal` has been set."""
        self._stop_agent = stop_agent
        for server in self._servers:
            server.start()
        if self._recorder:
            self._recorder.start()
        ports, pages = self._servers
        probes = routes({"/healthz": self.health.healthz, "/livez": self.health.livez})
        self._serve(ports, "health", self.settings.healthz_bind_address, probes)
        if self._metrics:
            self._serve(pages, "metrics", self.settings.metrics_bind_address, self._pages(self._metrics))

    def stop(self) -> None:
        """Close everything."""
        for server in self._servers:
            server.stop()
        if self._recorder:
            self._recorder.stop()

    def backends(self, backends: Mapping[Family, Backend]) -> dict[Family, Backend]:
        """The same, observed."""
        self._variant = next((b.variant for b in backends.values() if isinstance(b, Iptables)), None)
        return {family: ObservedBackend(backend, family, self.observer) for family, backend in backends.items()}

    def conntrack(self, conntrack: Conntrack) -> Conntrack:
        """The same, observed."""
        return ObservedConntrack(conntrack, self.observer)

    # -- what is served

    def _pages(self, metrics: Metrics) -> Callable[[str], Answer]:
        config = json.dumps({"kubeproxy.config.k8s.io": configuration(self.settings)})
        return routes(
            {
                "/metrics": metrics.page,
                "/healthz": lambda: text("ok"),
                "/proxyMode": lambda: text(self.settings.mode),
                "/configz": lambda: Answer(200, _JSON, config),
            }
        )

    def _serve(self, server: Httpd, what: str, where: str, handler: Callable[[str], Answer]) -> None:
        if not where:
            return
        address = parse_address(where)
        server.serve(what, Site(lambda: [address], handler, partial(self._bound, what, where)))

    def _bound(self, what: str, where: str, wrong: str) -> None:
        if not wrong:
            log.info("serving %s on %s", what, where)
            return
        log.error("%s is not served: %s; trying again", what, wrong)
        if self.settings.bind_address_hard_fail:
            self.fatal = f"{what} is not served: {wrong}, and bindAddressHardFail is set"
            self._stop_agent()

    def _packets(self) -> Mapping[str, int]:
        return counters.packets(self._families, self._variant) if self._variant else {}

    # -- health check ports

    def _want_port(self, service: ServiceKey, number: int) -> None:
        if not number:
            self._ports.close(service)
            self._port_problem(service, "")
            return
        handler = partial(self._services.answer, service)
        site = Site(
            lambda: [(ip, number) for ip in self._node_port_addresses()],
            lambda path: handler(),
            partial(self._port_problem, service),
        )
        self._ports.serve(service, site)

    def _port_problem(self, service: ServiceKey, wrong: str) -> None:
        ref = Ref("Service", *service)
        reason = f"{wrong}: load balancers will not find this node's endpoints; what else uses that port here?"
        found = Problem(ref, "spec.healthCheckNodePort", reason, what="FailedToStartServiceHealthcheck")
        with self._lock:
            news = self._problems.state("health check port", ref, [found] if wrong else [])
        log_news(news)
        self.observer.noticed(news)

    def _node_port_addresses(self) -> list[str]:
        """Where NodePorts are; "" is everywhere. Raises OSError."""
        everywhere = {Family.V4: "0.0.0.0", Family.V6: "::"}
        found = {f: list(self._addresses_of(f)) for f in self._families}
        if all(ips == [everywhere[f]] for f, ips in found.items()) and len(found) == len(everywhere):
            return [""]
        return [ip for ips in found.values() for ip in ips]

    def _addresses_of(self, family: Family) -> Iterator[str]:
        given = self.settings.node_port_addresses
        ranges = [c for c in given if c == "primary" or Family.of(c) is family]
        if not ranges or any(c.endswith("/0") for c in ranges):
            yield "0.0.0.0" if family is Family.V4 else "::"
            return
        own = self._local_addresses(family)
        chosen = {ip for ip in own for c in ranges if c != "primary" and contains(c, ip)}
        if "primary" in ranges:
            chosen |= self._node.ips(family)
        yield from sorted(chosen)


class _OwnNode(Observer):
    """This machine's Node object as last seen."""

    def __init__(self, settings: Settings) -> None:
        self._bind_address = settings.bind_address
        self._latest = Node(settings.node_name).at(settings.bind_address)

    def delivered(self, batch: Batch) -> None:
        for obj in batch.upserts:
            if isinstance(obj, Node) and obj.name == self._latest.name:
                self._latest = obj.at(self._bind_address)

    def ips(self, family: Family) -> set[str]:
        return {ip for ip in (self._latest.ip(family),) if ip}


def _metrics(
    settings: Settings, families: Sequence[Family], source: Source, packets: Callable[[], Mapping[str, int]]
) -> Metrics | None:
    if not settings.metrics_bind_address:
        return None
    from .metrics import Metrics

    relists = (lambda: source.relists) if isinstance(source, KubeSource) else dict
    return Metrics(settings.mode, families, relists=relists, packets=packets)


def _recorder(settings: Settings, source: Source, metrics: Metrics | None) -> Recorder | None:
    """Events have nowhere to go without an API server."""
    if not isinstance(source, KubeSource):
        return None

    def counted(outcome: str) -> None:
        if metrics:
            metrics.add("miniproxy_kubernetes_events_total", 1, outcome)

    return Recorder(settings.node_name, source.api, counted=counted)
