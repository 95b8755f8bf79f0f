"""Plans IPVS mode: a service port and its endpoints become virtual servers, addresses and set entries.

    packet to VIP:port ──► the VIP is an address of kube-ipvs0, so the packet is for this node
        nat KUBE-SERVICES: masquerade by set (KUBE-CLUSTER-IP, KUBE-LOAD-BALANCER, …)
        filter INPUT: refuse ports of the VIP that no service has, source ranges, policy Local
        IPVS: virtual server VIP:port ──► one of its real servers, by the scheduler

The iptables chains are a fixed frame around sets; only a load balancer's source ranges add a rule per service.
The state is kube-proxy's, so its users' tools find their way; docs/ipvs.md lists where it differs, and why. What the
objects are, and how changes to them are written, is ipvs_text.py's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from ..config import Settings
from ..model import PROTOCOL_NUMBERS, Endpoint, Family, Node, ServicePort
from ..policy import Serving
from . import iptables
from .iptables import Chain, DispatchChain, DispatchRule, Hooks, contains, hook, host
from .ipvs_text import (
    LINK,
    OUT_FILTER,
    DummyLink,
    IpSet,
    Object,
    RealServer,
    SetEntry,
    VirtualAddress,
    VirtualServer,
    show,
)

__all__ = ["MANY_ENDPOINTS", "frame", "plan", "show"]

MANY_ENDPOINTS = 0  # their number makes no difference

_MASQ = iptables.MARK_MASQ

# -- sets, by kube-proxy's names: (type, what it holds, as iptables comments say)

_IP_PORT, _PORT, _IP_PORT_IP = "hash:ip,port", "bitmap:port", "hash:ip,port,ip"
SETS = {
    "KUBE-LOOP-BACK": (_IP_PORT_IP, "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose"),
    "KUBE-CLUSTER-IP": (_IP_PORT, "Kubernetes service cluster ip + port for masquerade purpose"),
    "KUBE-EXTERNAL-IP": (_IP_PORT, "Kubernetes service external ip + port for masquerade and filter purpose"),
    "KUBE-EXTERNAL-IP-LOCAL": (_IP_PORT, "Kubernetes service external ip + port with externalTrafficPolicy=local"),
    "KUBE-LOAD-BALANCER": (_IP_PORT, "Kubernetes service lb portal"),
    "KUBE-LOAD-BALANCER-LOCAL": (
        _IP_PORT,
        "Kubernetes service load balancer ip + port with externalTrafficPolicy=local",
    ),
    "KUBE-LOAD-BALANCER-FW": (
        _IP_PORT,
        "Kubernetes service load balancer ip + port for load balancer with sourceRange",
    ),
    "KUBE-LOAD-BALANCER-SOURCE-IP": (
        _IP_PORT_IP,
        "Kubernetes service load balancer ip + port + source IP for packet filter purpose",
    ),
    "KUBE-LOAD-BALANCER-SOURCE-CIDR": (
        "hash:ip,port,net",
        "Kubernetes service load balancer ip + port + source cidr for packet filter purpose",
    ),
    "KUBE-NODE-PORT-TCP": (_PORT, "Kubernetes nodeport TCP port for masquerade purpose"),
    "KUBE-NODE-PORT-LOCAL-TCP": (_PORT, "Kubernetes nodeport TCP port with externalTrafficPolicy=local"),
    "KUBE-NODE-PORT-UDP": (_PORT, "Kubernetes nodeport UDP port for masquerade purpose"),
    "KUBE-NODE-PORT-LOCAL-UDP": (_PORT, "Kubernetes nodeport UDP port with externalTrafficPolicy=local"),
    "KUBE-NODE-PORT-SCTP-HASH": (
        _IP_PORT,
        r"Kubernetes nodeport SCTP port for masquerade purpose with type \'hash ip:port\'",
    ),
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH": (
        _IP_PORT,
        r"Kubernetes nodeport SCTP port with externalTrafficPolicy=local with type \'hash ip:port\'",
    ),
    "KUBE-HEALTH-CHECK-NODE-PORT": (_PORT, "Kubernetes health check node port"),
    "KUBE-IPVS-IPS": ("hash:ip", ""),
    # Not kube-proxy's: what policy Local has to drop on this node (docs/ipvs.md).
    "KUBE-CLUSTER-IP-NO-LOCAL": (_IP_PORT, "cluster IPs without local endpoints"),
    "KUBE-EXTERNAL-NO-LOCAL": (_IP_PORT, "external destinations without local endpoints"),
}


def set_name(name: str, family: Family) -> str:
    """The set's name in a family; the kernel takes 31 characters."""
    return name if family is Family.V4 else name.replace("KUBE-", "KUBE-6-", 1)[:31]


# -- planning


def plan(port: ServicePort, serving: Serving, settings: Settings, node: Node) -> tuple[Object, ...]:
    """Everything one service port needs in its family; `node.local` are the addresses NodePorts answer on."""
    return tuple(_ServicePlan(port, serving, settings, node).objects())


class _ServicePlan:
    """The names and decisions that the objects of one service port share."""

    def __init__(self, port: ServicePort, serving: Serving, settings: Settings, node: Node) -> None:
        self.port = port
        self.serving = serving
        self.node = node
        self.protocol = port.name.protocol
        self.proto = port.name.protocol.lower()
        # What is configured has no flags, and kube-proxy hashes the port too then.
        configured = "mh,mh-port" if settings.ipvs_scheduler == "mh" else settings.ipvs_scheduler
        self.scheduler, *flags = (port.scheduler or configured).split(",")
        self.flags = ",".join(sorted(set(flags)))  # in the kernel's order
        self.local = _own_addresses(node, port.family)
        self.node_ports = node_port_addresses(settings, node, port.family) if port.node_port else ()
        # Local policy without a local endpoint: outside traffic is dropped (KUBE-EXTERNAL-NO-LOCAL), while pods
        # and this node may still reach everybody, as they would through any other node.
        self.internal = serving.local if port.internal_local else serving.cluster
        self.external = serving.local if port.external_local and serving.local else serving.cluster
        self.no_local = serving.any and not serving.local

    def objects(self) -> Iterator[Object]:
        port = self.port
        yield from self.cluster_ip()
        for ip in port.external_ips:
            kind = "KUBE-EXTERNAL-IP-LOCAL" if port.external_local else "KUBE-EXTERNAL-IP"
            yield self.entry(kind, ip)
            yield from self.external_address(ip)
        for ip in port.load_balancer_ips:
            yield from self.load_balancer(ip)
        if port.node_port:
            yield from self.node_port()
        if port.health_check_node_port:
            yield self.port_entry("KUBE-HEALTH-CHECK-NODE-PORT", port.health_check_node_port)
        for endpoint in self.serving.reachable:
            if endpoint.node and endpoint.node == self.node.name:
                # A pod that reaches itself through its service must see another source than itself.
                entry = f"{endpoint.ip},{self.proto}:{endpoint.port},{endpoint.ip}"
                yield SetEntry(set_name("KUBE-LOOP-BACK", port.family), entry)

    def cluster_ip(self) -> Iterator[Object]:
        port = self.port
        yield self.entry("KUBE-CLUSTER-IP", port.cluster_ip)
        if port.internal_local and self.no_local:
            yield self.entry("KUBE-CLUSTER-IP-NO-LOCAL", port.cluster_ip)
        yield self.virtual_server(port.cluster_ip, port.port, self.internal)
        yield from self.bind(port.cluster_ip)

    def external_address(self, ip: str) -> Iterator[Object]:
        if self.port.external_local and self.no_local:
            yield self.entry("KUBE-EXTERNAL-NO-LOCAL", ip)
        yield self.virtual_server(ip, self.port.port, self.external)
        if ip not in self.local:  # the node's own address is bound anyway, and goes with its own link
            yield from self.bind(ip)

    def load_balancer(self, ip: str) -> Iterator[Object]:
        port = self.port
        yield self.entry("KUBE-LOAD-BALANCER", ip)
        if port.external_local:
            yield self.entry("KUBE-LOAD-BALANCER-LOCAL", ip)
        if port.source_ranges:
            yield from self.source_ranges(ip)
        yield from self.external_address(ip)

    def source_ranges(self, ip: str) -> Iterator[Object]:
        port = self.port
        where = f"{ip},{self.proto}:{port.port}"
        yield self.entry("KUBE-LOAD-BALANCER-FW", ip)
        for cidr in port.source_ranges:
            # A set prints a network of one address as the address.
            source = cidr.removesuffix("/128" if port.family is Family.V6 else "/32")
            yield SetEntry(set_name("KUBE-LOAD-BALANCER-SOURCE-CIDR", port.family), f"{where},{source}")
        node_ip = self.node.ip(port.family)
        if node_ip and any(contains(cidr, node_ip) for cidr in port.source_ranges):
            # The node's own connections to the VIP have the VIP as their source, since the node has that address.
            yield SetEntry(set_name("KUBE-LOAD-BALANCER-SOURCE-IP", port.family), f"{where},{ip}")
        else:
            # They do not come by INPUT, where the ranges are looked at, so they are dropped behind IPVS.
            number = PROTOCOL_NUMBERS[self.protocol]
            rule = f"-s {host(ip)} -m ipvs --vproto {number} --vaddr {ip} --vport {port.port} -j DROP"
            yield DispatchRule("filter", OUT_FILTER, f"{ip} {self.proto} {port.port}", rule)

    def node_port(self) -> Iterator[Object]:
        number = self.port.node_port
        kinds = ["KUBE-NODE-PORT-", "KUBE-NODE-PORT-LOCAL-"] if self.port.external_local else ["KUBE-NODE-PORT-"]
        for kind in kinds:
            if self.protocol == "SCTP":
                for ip in self.node_ports:
                    yield self.entry(f"{kind}SCTP-HASH", ip, number)
            else:
                yield self.port_entry(f"{kind}{self.protocol}", number)
        for ip in self.node_ports:
            if self.port.external_local and self.no_local:
                yield self.entry("KUBE-EXTERNAL-NO-LOCAL", ip, number)
            yield self.virtual_server(ip, number, self.external)

    def bind(self, ip: str) -> Iterator[Object]:
        """A VIP becomes an address of this node."""
        yield SetEntry(set_name("KUBE-IPVS-IPS", self.port.family), ip)
        yield VirtualAddress(ip)

    def virtual_server(self, ip: str, number: int, endpoints: Sequence[Endpoint]) -> VirtualServer:
        servers = tuple(sorted(RealServer(e.ip, e.port) for e in endpoints))
        return VirtualServer(self.protocol, ip, number, self.scheduler, self.flags, self.port.affinity_seconds, servers)

    def entry(self, kind: str, ip: str, number: int = 0) -> SetEntry:
        return SetEntry(set_name(kind, self.port.family), f"{ip},{self.proto}:{number or self.port.port}")

    def port_entry(self, kind: str, number: int) -> SetEntry:
        return SetEntry(set_name(kind, self.port.family), str(number))


def _own_addresses(node: Node, family: Family) -> tuple[str, ...]:
    """The node's addresses that others can reach; `node.local` does not hold those of kube-ipvs0."""
    return tuple(a for a in node.local if Family.of(a) is family and not ipaddress.ip_address(a).is_loopback)


def node_port_addresses(settings: Settings, node: Node, family: Family) -> tuple[str, ...]:
    """The addresses of this node on which NodePorts answer."""
    own = _own_addresses(node, family)
    accepted = [c for c in settings.node_port_addresses if c == "primary" or Family.of(c) is family]
    if not accepted or any(c.endswith("/0") for c in accepted):
        return own
    primary = {node.ip(family)} - {""} if "primary" in accepted else set()
    ranges = [c for c in accepted if c != "primary"]
    return tuple(sorted(primary | {a for a in own if any(contains(c, a) for c in ranges)}))


# -- the frame


def frame(settings: Settings, node: Node, family: Family, local_addresses: Sequence[str] = ()) -> tuple[Object, ...]:
    """What IPVS mode needs whatever services there are: the link, the sets, and the chains that ask them."""
    return tuple(_Frame(settings, node, family).objects())


class _Frame:
    def __init__(self, settings: Settings, node: Node, family: Family) -> None:
        self.settings = settings
        self.node = node
        self.family = family

    def objects(self) -> Iterator[Object]:
        yield DummyLink(LINK)
        for name, (kind, _) in SETS.items():
            yield IpSet(set_name(name, self.family), kind, "" if kind == _PORT else _INET[self.family])
        yield from self.nat()
        yield from self.filter()
        yield from _HOOKS

    def match(self, kind: str, direction: str = "dst,dst", *, comment: bool = True) -> str:
        said = f'-m comment --comment "{SETS[kind][1]}" ' if comment else ""
        return f"{said}-m set --match-set {set_name(kind, self.family)} {direction}"

    def nat(self) -> Iterator[Chain]:
        mark = f"{self.settings.masquerade_mark:#x}"
        yield Chain("nat", _MASQ, (f"-j MARK --set-xmark {mark}/{mark}",))
        yield Chain(
            "nat",
            "KUBE-POSTROUTING",
            (
                f"{self.match('KUBE-LOOP-BACK', 'dst,dst,src')} -j MASQUERADE",
                f"-m mark ! --mark {mark}/{mark} -j RETURN",
                f"-j MARK --set-xmark {mark}/0x0",
                '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
            ),
        )
        yield Chain(
            "nat",
            "KUBE-LOAD-BALANCER",
            (f"{self.match('KUBE-LOAD-BALANCER-LOCAL')} -j RETURN", f"-j {_MASQ}"),
        )
        yield Chain("nat", "KUBE-NODE-PORT", tuple(self.node_ports()))
        yield Chain("nat", "KUBE-SERVICES", tuple(self.services()))

    def node_ports(self) -> Iterator[str]:
        for proto, suffix, direction in (
            ("tcp", "TCP", "dst"),
            ("udp", "UDP", "dst"),
            ("sctp", "SCTP-HASH", "dst,dst"),
        ):
            yield f"-p {proto} {self.match(f'KUBE-NODE-PORT-LOCAL-{suffix}', direction)} -j RETURN"
            yield f"-p {proto} {self.match(f'KUBE-NODE-PORT-{suffix}', direction)} -j {_MASQ}"

    def services(self) -> Iterator[str]:
        yield f"-s {'::1/128' if self.family is Family.V6 else '127.0.0.0/8'} -j RETURN"
        # Its replies would go to the VIP on the endpoint's node.
        local = "-m addrtype --src-type LOCAL"
        yield f"{self.match('KUBE-EXTERNAL-NO-LOCAL')} {local} -j {_MASQ}"
        yield f"{self.match('KUBE-LOAD-BALANCER')} -j KUBE-LOAD-BALANCER"
        yield self.masquerade_cluster_ip()
        yield f"{self.match('KUBE-EXTERNAL-IP')} -j {_MASQ}"
        for kind in ("KUBE-EXTERNAL-IP", "KUBE-EXTERNAL-IP-LOCAL"):
            external = self.match(kind)
            yield f"{external} -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j ACCEPT"
            yield f"{external} -m addrtype --dst-type LOCAL -j ACCEPT"
        yield "-m addrtype --dst-type LOCAL -j KUBE-NODE-PORT"
        yield f"{self.match('KUBE-CLUSTER-IP', comment=False)} -j ACCEPT"
        yield f"{self.match('KUBE-LOAD-BALANCER', comment=False)} -j ACCEPT"

    def masquerade_cluster_ip(self) -> str:
        outside = iptables.pod_sources(self.settings, self.family, self.node, inside=False)
        if self.settings.masquerade_all:
            return f"{self.match('KUBE-CLUSTER-IP')} -j {_MASQ}"
        if outside:
            return f"{outside} {self.match('KUBE-CLUSTER-IP')} -j {_MASQ}"
        # Who is a pod is not known; but a VIP as source is the node itself.
        return f"{self.match('KUBE-CLUSTER-IP', 'src,dst')} -j {_MASQ}"

    def filter(self) -> Iterator[Chain | DispatchChain]:
        mark = f"{self.settings.masquerade_mark:#x}"
        yield Chain(
            "filter",
            "KUBE-FORWARD",
            (
                f'-m comment --comment "kubernetes forwarding rules" -m mark --mark {mark}/{mark} -j ACCEPT',
                '-m comment --comment "kubernetes forwarding conntrack rule"'
                " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ),
        )
        health = "KUBE-HEALTH-CHECK-NODE-PORT"
        yield Chain("filter", "KUBE-NODE-PORT", (f"{self.match(health, 'dst')} -j ACCEPT",))
        yield Chain("filter", "KUBE-IPVS-FILTER", tuple(self.only_services()))
        yield Chain("filter", iptables.PROXY_FIREWALL, tuple(self.firewall()))
        yield Chain(
            "filter",
            "KUBE-SOURCE-RANGES-FIREWALL",
            (
                f"{self.match('KUBE-LOAD-BALANCER-SOURCE-CIDR', 'dst,dst,src')} -j RETURN",
                f"{self.match('KUBE-LOAD-BALANCER-SOURCE-IP', 'dst,dst,src')} -j RETURN",
                "-j DROP",
            ),
        )
        yield DispatchChain("filter", OUT_FILTER)

    def only_services(self) -> Iterator[str]:
        """The node's own services do not answer on VIPs (kubernetes#72236)."""
        for kind in ("KUBE-LOAD-BALANCER", "KUBE-CLUSTER-IP", "KUBE-EXTERNAL-IP", "KUBE-EXTERNAL-IP-LOCAL"):
            yield f"{self.match(kind, comment=False)} -j RETURN"
        yield f"{self.match('KUBE-HEALTH-CHECK-NODE-PORT', 'dst', comment=False)} -j RETURN"
        icmp = "icmp6" if self.family is Family.V6 else "icmp"
        vips = self.match("KUBE-IPVS-IPS", "dst", comment=False)
        yield f"-m conntrack --ctstate NEW {vips} -j REJECT --reject-with {icmp}-port-unreachable"

    def firewall(self) -> Iterator[str]:
        yield f"{self.match('KUBE-LOAD-BALANCER-FW')} -j KUBE-SOURCE-RANGES-FIREWALL"
        new = "-m conntrack --ctstate NEW"
        yield f"{new} {self.match('KUBE-CLUSTER-IP-NO-LOCAL')} -j DROP"
        outside = iptables.pod_sources(self.settings, self.family, self.node, inside=False)
        yield f"{outside} {new} {self.match('KUBE-EXTERNAL-NO-LOCAL')} -j DROP".lstrip()


_INET = {Family.V4: "inet", Family.V6: "inet6"}
_PORTALS_HOOK = hook("KUBE-SERVICES", "kubernetes service portals", new=False)
_FIREWALL_HOOK = hook(iptables.PROXY_FIREWALL, "kube-proxy firewall rules", new=False)
_HOOKS = (
    Hooks("nat", "PREROUTING", (_PORTALS_HOOK,)),
    Hooks("nat", "OUTPUT", (_PORTALS_HOOK,)),
    Hooks("nat", "POSTROUTING", (hook("KUBE-POSTROUTING", "kubernetes postrouting rules", new=False),)),
    Hooks(
        "filter",
        "INPUT",
        (
            hook("KUBE-IPVS-FILTER", "kubernetes ipvs access filter", new=False),
            _FIREWALL_HOOK,
            hook("KUBE-NODE-PORT", "kubernetes health check rules", new=False),
        ),
    ),
    Hooks(
        "filter",
        "FORWARD",
        (_FIREWALL_HOOK, hook("KUBE-FORWARD", "kubernetes forwarding rules", new=False)),
    ),
    Hooks("filter", "OUTPUT", (hook(OUT_FILTER, "kubernetes ipvs access filter", new=False),)),
)
