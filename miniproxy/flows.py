"""Which flows conntrack must forget. Pure; kernel/conntrack.py does it.

TCP notices when its endpoint is gone. UDP and SCTP flows that conntrack knows are sent on to where they went
before, whatever the rules say now: as long as a client keeps sending, they stay black-holed (kubernetes#139628: 13
hours). So flows to a service port that none of its living endpoints answers are forgotten: those of an endpoint that
is gone, and those from before there was anybody to translate them to, which the address itself "answers".

As with TCP, a flow to an endpoint that lives is left alone, whether new connections go there (policies, topology
hints, termination) or not; and so are the flows of a Service that is deleted.
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
    """Flows to forget: those to `destination` and `port` that none of `living` answers."""

    family: Family
    protocol: Protocol
    destination: str
    port: int
    living: frozenset[str]

    def means(self, flow: Flow) -> bool:
        return flow[:4] == self[:4] and flow.endpoint not in self.living


class _Served(NamedTuple):
    places: frozenset[tuple[str, int]]  # (address, port) it is served at
    living: frozenset[str]


class Flows:
    """Remembers who serves each connectionless port, and says what a change makes stale.

    `node_addresses` names a family's addresses of the node, where NodePorts are.
    """

    def __init__(self, node_addresses: Callable[[Family], Sequence[str]]) -> None:
        self._node_addresses = node_addresses
        self._served: dict[PortKey, _Served] = {}

    def change(self, key: PortKey, port: ServicePort | None, endpoints: Iterable[Endpoint]) -> list[Stale]:
        """From now on these are all endpoints of the port; port None: it is gone."""
        if key[0].protocol not in CONNECTIONLESS:
            return []
        old = self._served.pop(key, _Served(frozenset(), frozenset()))
        if port is None:
            return []
        now = self._served[key] = _Served(frozenset(self._places(port)), living(endpoints))
        grown = old.living and old.living <= now.living  # somebody more takes no flow from the others
        nobody = not old.living and not now.living  # then a refusal is all there is to it
        if nobody or (grown and now.places <= old.places):
            return []
        return list(_stale(key, now))

    def all(self, family: Family) -> list[Stale]:
        """What may be stale when an agent starts, of all ports: also of those that lost their last endpoint before."""
        return [s for key, served in self._served.items() if key[1] is family for s in _stale(key, served)]

    def _places(self, port: ServicePort) -> Iterator[tuple[str, int]]:
        for ip in (port.cluster_ip, *port.external_ips, *port.load_balancer_ips):
            yield ip, port.port
        for ip in self._node_addresses(port.family) if port.node_port else ():
            yield ip, port.node_port


def living(endpoints: Iterable[Endpoint]) -> frozenset[str]:
    """Endpoints whose flows go on: those that serve, and where none does all that there are."""
    there = list(endpoints)
    return frozenset(str(e) for e in [e for e in there if e.serving] or there)


def _stale(key: PortKey, served: _Served) -> Iterator[Stale]:
    for ip, number in sorted(served.places):
        yield Stale(key[1], key[0].protocol, ip, number, served.living)
