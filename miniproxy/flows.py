"""Which flows conntrack must forget. Pure; kernel/conntrack.py does it.

TCP notices when its endpoint is gone. UDP and SCTP flows that conntrack knows are sent on to where they went
before, whatever the rules say now: as long as a client keeps sending, they stay black-holed (kubernetes#139628: 13
hours). So when an endpoint stops serving, its flows are forgotten, and when a port gets its first endpoint, the flows
that were never translated are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from .model import Endpoint, Family, PortKey, Protocol, ServicePort

CONNECTIONLESS: frozenset[Protocol] = frozenset({"UDP", "SCTP"})


class Flow(NamedTuple):
    """A flow that conntrack knows: who it was sent to, and who answers."""

    family: Family
    protocol: Protocol
    destination: str
    port: int
    endpoint: str  # "10.244.1.5:53", "[fd00:244::5]:53": a target port that changes makes another endpoint


class Stale(NamedTuple):
    """Flows to forget: those to `destination` and `port` that `endpoint` answers."""

    family: Family
    protocol: Protocol
    destination: str  # "" for any: a NodePort
    port: int
    endpoint: str  # "" for whoever answers


class _Served(NamedTuple):
    port: ServicePort
    endpoints: frozenset[str]


class Flows:
    """Remembers who serves each connectionless port, and says what a change makes stale.

    `node_addresses` names a family's addresses of the node, where NodePorts are.
    """

    def __init__(self, node_addresses: Callable[[Family], Sequence[str]]) -> None:
        self._node_addresses = node_addresses
        self._served: dict[PortKey, _Served] = {}

    def change(self, key: PortKey, port: ServicePort | None, endpoints: Iterable[str]) -> list[Stale]:
        """From now on these endpoints serve the port; port None: it is gone."""
        if key[0].protocol not in CONNECTIONLESS:
            return []
        old = self._served.pop(key, None)
        now = frozenset(endpoints) if port else frozenset()
        stale = [s for gone in sorted(old.endpoints - now) for s in self._answered(old.port, gone)] if old else []
        if port:
            self._served[key] = _Served(port, now)
            if now and not (old and old.endpoints):
                stale += self._untranslated(port)
        return stale

    def left_over(self, flows: Iterable[Flow]) -> list[Stale]:
        """What is stale already when the agent starts. Looks at all ports: not for the change path."""
        ports: dict[tuple[Family, Protocol, str, int], frozenset[str]] = {}
        for port, endpoints in self._served.values():
            for ip in _addresses(port):
                ports[port.family, port.name.protocol, ip, port.port] = endpoints
            if port.node_port:
                for ip in self._node_addresses(port.family):
                    ports[port.family, port.name.protocol, ip, port.node_port] = endpoints
        if not ports:
            return []  # without asking for a single flow: the kernel looks through its whole table for them
        found = []
        for flow in flows:
            serving = ports.get((flow.family, flow.protocol, flow.destination, flow.port))
            if serving and flow.endpoint not in serving:
                found.append(Stale(*flow))
        return found

    @staticmethod
    def _answered(port: ServicePort, endpoint: str) -> Iterator[Stale]:
        for ip in _addresses(port):
            yield Stale(port.family, port.name.protocol, ip, port.port, endpoint)
        if port.node_port:
            yield Stale(port.family, port.name.protocol, "", port.node_port, endpoint)

    def _untranslated(self, port: ServicePort) -> Iterator[Stale]:
        """Flows from before there was anybody to translate them to: they are "answered" by the address itself."""
        for ip in _addresses(port):
            yield Stale(port.family, port.name.protocol, ip, port.port, str(Endpoint(ip, port.port)))
        for ip in self._node_addresses(port.family) if port.node_port else ():
            yield Stale(port.family, port.name.protocol, ip, port.node_port, str(Endpoint(ip, port.node_port)))


def _addresses(port: ServicePort) -> Iterable[str]:
    return dict.fromkeys((port.cluster_ip, *port.external_ips, *port.load_balancer_ips))
