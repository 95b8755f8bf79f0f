"""Why a connection to a Service ends where it does: what is known about it, and the way its first packet goes. Pure.

It walks the rules that iptables mode plans. The other modes hold the same in other words, so what is explained here
holds for them too; whether a kernel holds what is planned is for `miniproxy plan --diff` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from . import trace
from .config import Settings
from .model import Endpoint, Family, Node, PortKey, Problem, Protocol, ServicePort
from .planner import iptables
from .policy import Serving, categorize
from .tracker import Tracker


class Place(NamedTuple):
    """One address a service port answers on."""

    port: ServicePort
    kind: str  # "cluster IP", "external IP", "load balancer IP", "NodePort"
    address: str
    number: int

    @property
    def where(self) -> str:
        return str(trace.Target(self.address, self.number))


class Candidate(NamedTuple):
    """An endpoint, and what becomes of it on this node."""

    endpoint: Endpoint
    cluster: bool  # serves traffic under policy Cluster
    local: bool  # serves traffic under policy Local
    why_not: str  # "" for one that serves


def places(tracker: Tracker, *, service: str = "", address: str = "", number: int = 0) -> list[Place]:
    """Where service ports answer, as far as these agree: `service` is "NAMESPACE/NAME"; "" and 0 agree with all.

    Looks at all services.
    """
    ports = sorted(tracker.ports(), key=lambda port: (port.name, port.family))
    found = [place for port in ports for place in _of_port(port, tracker.node)]
    return [
        p
        for p in found
        if service in ("", f"{p.port.name.namespace}/{p.port.name.name}")
        and address in ("", p.address)
        and number in (0, p.number)
    ]


def _of_port(port: ServicePort, node: Node) -> Iterable[Place]:
    yield Place(port, "cluster IP", port.cluster_ip, port.port)
    for ip in port.external_ips:
        yield Place(port, "external IP", ip, port.port)
    for ip in port.load_balancer_ips:
        yield Place(port, "load balancer IP", ip, port.port)
    if port.node_port:
        yield Place(port, "NodePort", node.ip(port.family), port.node_port)


def candidates(tracker: Tracker, key: PortKey) -> list[Candidate]:
    """All endpoints of a service port: which serve, and why the others do not."""
    port = tracker.port(key)
    if port is None:
        return []
    endpoints = sorted(tracker.endpoints(key), key=str)
    serving = categorize(port, endpoints, tracker.node)
    return [
        Candidate(e, e in serving.cluster, e in serving.local, _why_not(e, serving, tracker.node)) for e in endpoints
    ]


def _why_not(endpoint: Endpoint, serving: Serving, node: Node) -> str:
    if endpoint in serving.reachable:
        return ""
    if endpoint.terminating:
        return "is terminating" + (", and others are ready" if endpoint.serving else " and no longer serves")
    if not endpoint.ready:
        return "is not ready"
    if serving.cluster:
        hints = endpoint.node_hints or endpoint.zone_hints
        return f"topology hints keep its traffic in {' '.join(hints)}, this node is {node.name} in zone {node.zone}"
    return f"is on node {endpoint.node or '?'}, and the traffic policy is Local"


class Walks:
    """Walks packets through the rules that are planned for all service ports, made once for each family.

    `local` tells a family's addresses of the node, besides those of the Node object.
    """

    def __init__(self, tracker: Tracker, settings: Settings, local: Callable[[Family], Sequence[str]]) -> None:
        self._tracker = tracker
        self._settings = settings
        self._local = local
        self._rules: dict[Family, trace.Rules] = {}

    def __call__(self, packet: trace.Packet) -> trace.Outcome:
        """What becomes of a packet that opens a connection. Raises trace.TraceError."""
        family = packet.family
        local = self._addresses(family)
        if family not in self._rules:
            self._rules[family] = self._planned(family, local)
        return trace.trace(self._rules[family], packet, local)

    def _addresses(self, family: Family) -> list[str]:
        mine = {*self._local(family), *self._tracker.node.ips, "127.0.0.1", "::1"}
        return sorted(a for a in mine if Family.of(a) is family)

    def _planned(self, family: Family, local: Sequence[str]) -> trace.Rules:
        tracker, settings, node = self._tracker, self._settings, self._tracker.node
        objects: list[iptables.IptablesObject] = []
        # Of those who claim the same, the last one stays here: as in the kernel the smallest name, or the frame.
        for key in sorted(tracker.keys(family), reverse=True):
            if port := tracker.port(key):
                objects += iptables.plan(port, categorize(port, tracker.endpoints(key), node), settings, node)
        objects += iptables.frame(settings, node, family, local)
        return trace.parse(iptables.show({o.key: o for o in objects}.values()))


def packet(place: Place, source: str, interface: str) -> trace.Packet:
    protocol: Protocol = place.port.name.protocol
    return trace.Packet(source, place.address, protocol, place.number, interface)


def concerns(problem: Problem, namespace: str, service: str) -> bool:
    """Whether a problem is one of this Service, or of its slices as controllers name them."""
    ref = problem.ref
    named = ref.name == service or (ref.kind == "EndpointSlice" and ref.name.startswith(f"{service}-"))
    return ref.namespace == namespace and named


def sentence(outcome: trace.Outcome) -> str:
    """What becomes of a packet, in words."""
    verdicts = {str(v): share for v, share in outcome.verdicts.items()}
    if "endpoint" in verdicts:
        seen = {True: "an address of this node (SNAT)", False: "the client's own address"}
        sees = " or ".join(seen[m] for m in sorted(outcome.masqueraded))
        shares = ", ".join(f"{e} {share:.0%}" for e, share in outcome.endpoints.items())
        return f"reaches {shares}; it sees {sees}"
    if "refused" in verdicts:
        return "refused: nobody serves this port anywhere"
    if "dropped" in verdicts:
        return "dropped in silence"
    return "is no Service's traffic from there: it goes on as it is"
