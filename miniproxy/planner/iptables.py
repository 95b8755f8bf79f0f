"""Plans iptables mode: a service port and its endpoints become kube-proxy's chains and dispatch rules.

The shape, which any runbook for kube-proxy describes (all in table nat unless said otherwise):

    KUBE-SERVICES ── VIP:port ──► KUBE-SVC-x ──► KUBE-SEP-… ──► DNAT to an endpoint
        │     └─ load balancer IP ─► KUBE-FW-x ─► KUBE-EXT-x ──► KUBE-SVC-x or KUBE-SVL-x
        └─ a local address ──► KUBE-NODEPORTS ──► KUBE-EXT-x
    filter KUBE-SERVICES, KUBE-EXTERNAL-SERVICES: refuse or drop what has nobody to serve it

Rules are written exactly as iptables-save prints them, so reading back is mostly a comparison of strings.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import NamedTuple

import msgspec

from ..config import Settings
from ..model import Endpoint, Family, Node, ServicePort
from ..policy import Serving
from .names import suffix

MARK_MASQ = "KUBE-MARK-MASQ"
NODE_PORTS = "KUBE-NODEPORTS"
SERVICES = "KUBE-SERVICES"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"
SHARED_FIREWALL = "KUBE-FIREWALL"  # the kubelet's too: what is in it may be its own

# With more endpoints than that kube-proxy leaves out the comments on them: nearly half of the table's size, which the
# kernel copies and checks at each change. Who takes over from the other must find the same rules.
MANY_ENDPOINTS = 1000

TABLES = ("filter", "nat")
BUILT_IN = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})


class Layout(NamedTuple):
    """The chains that a mode has whatever services there are, by table; IPVS mode has another one."""

    fixed: Mapping[str, Set[str]]  # with fixed rules
    dispatch: Mapping[str, Set[str]]  # with rules of services


# The fixed chains include those that only IPVS mode has, so that what is left of it is found, and removed.
LAYOUT = Layout(
    fixed={
        "nat": {MARK_MASQ, "KUBE-POSTROUTING", "KUBE-NODE-PORT", "KUBE-LOAD-BALANCER"},
        "filter": {
            "KUBE-FORWARD",
            SHARED_FIREWALL,
            "KUBE-NODE-PORT",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
            "KUBE-SOURCE-RANGES-FIREWALL",
        },
    },
    dispatch={
        "nat": {SERVICES, NODE_PORTS},
        "filter": {SERVICES, NODE_PORTS, EXTERNAL_SERVICES, PROXY_FIREWALL},
    },
)


class Chain(msgspec.Struct, frozen=True, gc=False):
    """A chain with all its rules, in order; `rules` are iptables-save lines without "-A CHAIN "."""

    table: str
    name: str
    rules: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        return ("chain", self.table, self.name)

    def added(self) -> list[str]:
        """What iptables-restore adds it with, the chain itself apart; it takes it away by emptying the chain."""
        start = f"-A {self.name} "
        return [start + rule for rule in self.rules]


class DispatchChain(msgspec.Struct, frozen=True, gc=False):
    """A chain that holds DispatchRules of many services in any order, and then the rules of `tail`."""

    table: str
    name: str
    tail: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        return ("chain", self.table, self.name)

    def added(self) -> list[str]:
        return [f"-A {self.name} {rule}" for rule in self.tail]

    def removed(self) -> list[str]:
        return [f"-D {self.name} {rule}" for rule in self.tail]


class DispatchRule(msgspec.Struct, frozen=True, gc=False):
    """One service's rule in a DispatchChain. `claim` is the traffic it takes, which only one can have."""

    table: str
    chain: str
    claim: str  # "DESTINATION PROTOCOL PORT", "*" for any destination
    rule: str

    @property
    def key(self) -> tuple[str, ...]:
        return ("rule", self.table, self.chain, self.claim)

    def added(self) -> list[str]:
        return [f"-I {self.chain} {self.rule}"]  # at the head, so that a tail stays last

    def removed(self) -> list[str]:
        return [f"-D {self.chain} {self.rule}"]


class Hooks(msgspec.Struct, frozen=True, gc=False):
    """Our jumps from a built-in chain, in this order, at its head when they have to be put there."""

    table: str
    chain: str
    rules: tuple[str, ...]

    @property
    def key(self) -> tuple[str, ...]:
        return ("hooks", self.table, self.chain)

    def added(self) -> list[str]:
        return [f"-I {self.chain} {rule}" for rule in reversed(self.rules)]

    def removed(self) -> list[str]:
        return [f"-D {self.chain} {rule}" for rule in self.rules]


IptablesObject = Chain | DispatchChain | DispatchRule | Hooks


def plan(port: ServicePort, serving: Serving, settings: Settings, node: Node) -> tuple[IptablesObject, ...]:
    """Everything one service port needs in its family."""
    return _ServicePlan(port, serving, settings, node).objects()


class _ServicePlan:
    """The names and decisions that the rules of one service port share."""

    def __init__(self, port: ServicePort, serving: Serving, settings: Settings, node: Node) -> None:
        self.port = port
        self.serving = serving
        self.settings = settings
        self.node = node
        self.proto = port.name.protocol.lower()
        self.text = str(port.name)
        seed = self.text + self.proto
        end = suffix(seed)
        self.cluster_chain = "KUBE-SVC-" + end
        self.local_chain = "KUBE-SVL-" + end
        self.external_chain = "KUBE-EXT-" + end
        self.firewall_chain = "KUBE-FW-" + end
        # Of each endpoint, in the order of serving.reachable, by its text.
        self.chains = {text: "KUBE-SEP-" + suffix(seed + text) for text in map(str, serving.reachable)}
        self.internal_chain = self.local_chain if port.internal_local else self.cluster_chain
        self.has_internal = bool(serving.local) if port.internal_local else serving.any
        self.has_external = bool(serving.local) if port.external_local else serving.any
        self.guarded = serving.any and bool(port.load_balancer_ips and port.source_ranges)

    def objects(self) -> tuple[IptablesObject, ...]:
        serving = self.serving
        if not serving.any:
            return tuple(self.dispatch())
        chains = []
        if self.port.externally_accessible:
            chains.append(Chain("nat", self.external_chain, tuple(self.external_rules())))
        if self.guarded:
            chains.append(Chain("nat", self.firewall_chain, tuple(self.firewall_rules())))
        if serving.cluster:
            chains.append(self.balancing(self.cluster_chain, serving.cluster))
        if serving.local:
            chains.append(self.balancing(self.local_chain, serving.local))
        return (*self.dispatch(), *chains, *self.endpoint_chains())

    # -- dispatch: which chain takes which traffic

    def dispatch(self) -> Iterator[DispatchRule]:
        port = self.port
        if self.has_internal:
            yield self.to(port.cluster_ip, "cluster IP", self.internal_chain)
        else:
            yield self.refuse(SERVICES, port.cluster_ip, port.port, dropping=self.serving.any)
        for ip in port.external_ips:
            yield from self.external(ip, "external IP", self.external_chain)
        for ip in port.load_balancer_ips:
            chain = self.firewall_chain if self.guarded else self.external_chain
            yield from self.external(ip, "loadbalancer IP", chain)
            if self.guarded:
                comment = f"{self.text} traffic not accepted by {self.firewall_chain}"
                yield self.rule("filter", PROXY_FIREWALL, ip, port.port, comment, "DROP")
        if port.node_port:
            if self.serving.any:
                yield self.rule("nat", NODE_PORTS, "", port.node_port, self.text, self.external_chain)
            if not self.has_external:
                yield self.refuse(EXTERNAL_SERVICES, "", port.node_port, dropping=self.serving.any)
        if port.health_check_node_port:
            yield self.health_check()

    def external(self, ip: str, what: str, chain: str) -> Iterator[DispatchRule]:
        """The chain stays in place without usable endpoints: pods and the node itself may still pass."""
        if self.serving.any:
            yield self.to(ip, what, chain)
        if not self.has_external:
            yield self.refuse(EXTERNAL_SERVICES, ip, self.port.port, dropping=self.serving.any)

    def to(self, ip: str, what: str, chain: str) -> DispatchRule:
        return self.rule("nat", SERVICES, ip, self.port.port, f"{self.text} {what}", chain)

    def refuse(self, chain: str, ip: str, number: int, *, dropping: bool) -> DispatchRule:
        """Refuse at once when nobody serves at all; drop when others could, elsewhere (KEP-2086)."""
        comment = f"{self.text} has no {'local ' if dropping else ''}endpoints"
        icmp = "icmp6" if self.port.family is Family.V6 else "icmp"
        target = "DROP" if dropping else f"REJECT --reject-with {icmp}-port-unreachable"
        return self.rule("filter", chain, ip, number, comment, target, node_only=not ip)

    def health_check(self) -> DispatchRule:
        number = self.port.health_check_node_port
        comment = f"{self.text} health check node port"
        rule = f'-p tcp -m comment --comment "{comment}" -m tcp --dport {number} -j ACCEPT'
        return DispatchRule("filter", NODE_PORTS, f"* tcp {number}", rule)

    def rule(
        self,
        table: str,
        chain: str,
        ip: str,
        number: int,
        comment: str,
        target: str,
        *,
        node_only: bool = False,
    ) -> DispatchRule:
        destination = f"-d {host(ip)} " if ip else ""
        addrtype = "-m addrtype --dst-type LOCAL " if node_only else ""
        rule = (
            f'{destination}-p {self.proto} -m comment --comment "{comment}" '
            f"{addrtype}-m {self.proto} --dport {number} -j {target}"
        )
        return DispatchRule(table, chain, f"{ip or '*'} {self.proto} {number}", rule)

    # -- the service's own chains

    def internal_masquerade(self) -> list[str]:
        """Traffic to the cluster IP from outside the pod network has to come back through this node."""
        if not self.has_internal:
            return []
        port, settings = self.port, self.settings
        match = (
            f'-p {self.proto} -m comment --comment "{self.text} cluster IP" '
            f"-m {self.proto} --dport {port.port} -j {MARK_MASQ}"
        )
        destination = f"-d {host(port.cluster_ip)}"
        outside = pod_sources(settings, port.family, self.node, inside=False)
        if settings.masquerade_all:
            return [f"{destination} {match}"]
        if outside.startswith("! -i"):  # iptables-save prints interfaces behind addresses
            return [f"{destination} {outside} {match}"]
        return [f"{outside} {destination} {match}"] if outside else []

    def external_rules(self) -> Iterator[str]:
        what = f"{self.text} external destinations"
        if not self.port.external_local:
            yield f'-m comment --comment "masquerade traffic for {what}" -j {MARK_MASQ}'
        else:
            # Policy Local is about traffic from outside; pods and this node reach all endpoints, as they
            # would if the load balancer sent them to any node.
            inside = pod_sources(self.settings, self.port.family, self.node, inside=True)
            if inside:
                yield f'{inside} -m comment --comment "pod traffic for {what}" -j {self.cluster_chain}'
            local = "-m addrtype --src-type LOCAL"
            yield f'-m comment --comment "masquerade LOCAL traffic for {what}" {local} -j {MARK_MASQ}'
            yield f'-m comment --comment "route LOCAL traffic for {what}" {local} -j {self.cluster_chain}'
        if self.has_external:
            yield f"-j {self.local_chain if self.port.external_local else self.cluster_chain}"

    def firewall_rules(self) -> Iterator[str]:
        port = self.port
        sources = list(port.source_ranges)
        node_ip = self.node.ip(port.family)
        if node_ip and any(contains(cidr, node_ip) for cidr in port.source_ranges):
            # Where the load balancer's address is bound to the node, the node's own connections to it come
            # with that address as their source.
            sources += [host(ip) for ip in port.load_balancer_ips]
        for source in sources:
            yield f'-s {source} -m comment --comment "{self.text} loadbalancer IP" -j {self.external_chain}'
        yield (f'-m comment --comment "other traffic to {self.text} will be dropped by {PROXY_FIREWALL}"')

    def balancing(self, name: str, endpoints: Sequence[Endpoint]) -> Chain:
        rules = self.internal_masquerade() if name == self.internal_chain else []
        texts = self.chains if endpoints is self.serving.reachable else map(str, endpoints)
        chains = [(self.chains[text], self.comment(" -> ", text)) for text in texts]
        if self.port.affinity_seconds:
            for chain, comment in chains:
                recent = f"--rcheck --seconds {self.port.affinity_seconds} --reap {self.recent(chain)}"
                rules.append(f"{comment}-m recent {recent} -j {chain}")
        left = len(chains)
        for chain, comment in chains:
            random = f"-m statistic --mode random --probability {_probability(left)} " if left > 1 else ""
            rules.append(f"{comment}{random}-j {chain}")
            left -= 1
        return Chain("nat", name, tuple(rules))

    def endpoint_chains(self) -> Iterator[Chain]:
        proto, comment, affine = self.proto, self.comment(), self.port.affinity_seconds
        for endpoint, (text, chain) in zip(self.serving.reachable, self.chains.items(), strict=True):
            hairpin = f"-s {host(endpoint.ip)} {comment}-j {MARK_MASQ}"  # a pod that reaches itself
            remember = f"-m recent --set {self.recent(chain)} " if affine else ""
            translate = f"-p {proto} {comment}{remember}-m {proto} -j DNAT --to-destination {text}"
            yield Chain("nat", chain, (hairpin, translate))

    def comment(self, arrow: str = "", endpoint: str = "") -> str:
        return "" if self.node.many_endpoints else f'-m comment --comment "{self.text}{arrow}{endpoint}" '

    def recent(self, chain: str) -> str:
        mask = ":".join(["ffff"] * 8) if self.port.family is Family.V6 else "255.255.255.255"
        return f"--name {chain} --mask {mask} --rsource"


def frame(
    settings: Settings, node: Node, family: Family, local_addresses: Sequence[str] = ()
) -> tuple[IptablesObject, ...]:
    """What iptables mode needs whatever services there are.

    `local_addresses` are the node's own, needed only where nodePortAddresses is a list of CIDRs.
    """
    mark = f"{settings.masquerade_mark:#x}"
    forward = [
        f'-m comment --comment "kubernetes forwarding rules" -m mark --mark {mark}/{mark} -j ACCEPT',
        '-m comment --comment "kubernetes forwarding conntrack rule"'
        " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]
    if not settings.conntrack_tcp_be_liberal:
        # A packet conntrack cannot place is not un-NATed, and would reset the connection at the client
        # (kubernetes#74839).
        forward.insert(0, "-m conntrack --ctstate INVALID -j DROP")
    localnet = (
        '! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"'
        " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
    )
    guard_localhost = family is Family.V4 and settings.localhost_node_ports
    # kube-proxy counts connections to NodePorts on 127.0.0.1 by a second rule for each NodePort, with nfacct. All of
    # them come by here, marked, so one rule that does nothing counts them as well.
    count = '-m conntrack --ctorigdst 127.0.0.0/8 -m comment --comment "count localhost NodePorts"'
    return (
        Chain("nat", MARK_MASQ, (f"-j MARK --set-xmark {mark}/{mark}",)),
        Chain(
            "nat",
            "KUBE-POSTROUTING",
            (
                f"-m mark ! --mark {mark}/{mark} -j RETURN",
                *([count] if guard_localhost else ()),
                # Cleared, so that a packet that is encapsulated and comes by again is not masqueraded twice.
                f"-j MARK --set-xmark {mark}/0x0",
                '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
            ),
        ),
        Chain("filter", "KUBE-FORWARD", tuple(forward)),
        Chain("filter", SHARED_FIREWALL, (localnet,) if guard_localhost else ()),
        DispatchChain("nat", NODE_PORTS),
        DispatchChain("nat", SERVICES, tuple(_node_port_tail(settings, node, family, local_addresses))),
        DispatchChain("filter", NODE_PORTS),
        DispatchChain("filter", SERVICES),
        DispatchChain("filter", EXTERNAL_SERVICES),
        DispatchChain("filter", PROXY_FIREWALL),
        *_HOOKS,
    )


def show(objects: Iterable[IptablesObject], layout: Layout = LAYOUT) -> str:
    """Objects as iptables-save prints them: all chains of a table, then their rules."""
    chains: dict[tuple[str, str], list[str]] = {}
    tails: dict[tuple[str, str], tuple[str, ...]] = {}
    for obj in objects:
        match obj:
            case Chain(table, name, fixed) | Hooks(table, name, fixed):
                chains.setdefault((table, name), []).extend(fixed)
            case DispatchChain(table, name, tail):
                chains.setdefault((table, name), [])
                tails[table, name] = tail
            case DispatchRule(table, name, _, rule):
                chains.setdefault((table, name), []).append(rule)
    lines = []
    for table in TABLES:
        mine = {name: rules for (t, name), rules in sorted(chains.items()) if t == table}
        if mine:
            lines.append(f"*{table}")
            lines += [f":{name} {'ACCEPT' if name in BUILT_IN else '-'} [0:0]" for name in mine]
            for name, rules in mine.items():
                if name in layout.dispatch[table]:
                    rules.sort()
                lines += [f"-A {name} {rule}" for rule in (*rules, *tails.get((table, name), ()))]
            lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def hook(chain: str, comment: str, *, new: bool = True) -> str:
    state = "-m conntrack --ctstate NEW " if new else ""
    return f'{state}-m comment --comment "{comment}" -j {chain}'


_FIREWALL_HOOK = hook(PROXY_FIREWALL, "kubernetes load balancer firewall")
_EXTERNAL_HOOK = hook(EXTERNAL_SERVICES, "kubernetes externally-visible service portals")
_PORTALS_HOOK = hook(SERVICES, "kubernetes service portals")
_NAT_HOOK = hook(SERVICES, "kubernetes service portals", new=False)
_HOOKS = (
    Hooks("nat", "PREROUTING", (_NAT_HOOK,)),
    Hooks("nat", "OUTPUT", (_NAT_HOOK,)),
    Hooks("nat", "POSTROUTING", (hook("KUBE-POSTROUTING", "kubernetes postrouting rules", new=False),)),
    Hooks(
        "filter",
        "INPUT",
        (
            f"-j {SHARED_FIREWALL}",
            _FIREWALL_HOOK,
            hook(NODE_PORTS, "kubernetes health check service ports", new=False),
            _EXTERNAL_HOOK,
        ),
    ),
    Hooks(
        "filter",
        "FORWARD",
        (
            _FIREWALL_HOOK,
            hook("KUBE-FORWARD", "kubernetes forwarding rules", new=False),
            _PORTALS_HOOK,
            _EXTERNAL_HOOK,
        ),
    ),
    Hooks("filter", "OUTPUT", (f"-j {SHARED_FIREWALL}", _FIREWALL_HOOK, _PORTALS_HOOK)),
)


def _node_port_tail(settings: Settings, node: Node, family: Family, local_addresses: Sequence[str]) -> Iterator[str]:
    comment = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
    v6 = family is Family.V6
    accepted = [c for c in settings.node_port_addresses if c == "primary" or Family.of(c) is family]
    if not accepted or any(c.endswith("/0") for c in accepted):
        # NodePorts on loopback need route_localnet, which IPv6 does not have.
        skip = "! -d ::1/128 " if v6 else "" if settings.localhost_node_ports else "! -d 127.0.0.0/8 "
        yield f"{skip}{comment} -m addrtype --dst-type LOCAL -j {NODE_PORTS}"
        return
    primary = (node.ip(family),) if "primary" in accepted and node.ip(family) else ()
    ranges = [c for c in accepted if c != "primary"]
    mine = [a for a in local_addresses if Family.of(a) is family and any(contains(c, a) for c in ranges)]
    for address in sorted({*primary, *mine}):
        loopback = ipaddress.ip_address(address).is_loopback
        if not loopback or (settings.localhost_node_ports and not v6):
            yield f"-d {host(address)} {comment} -j {NODE_PORTS}"


def pod_sources(settings: Settings, family: Family, node: Node, *, inside: bool) -> str:
    """The match for traffic from pods of this cluster (or from anybody else); "" when that is unknown."""
    negate = "" if inside else "! "
    match settings.detect_local_mode:
        case "BridgeInterface":
            return f"{negate}-i {settings.bridge_interface}"
        case "InterfaceNamePrefix":
            return f"{negate}-i {settings.interface_name_prefix}+"
        case "NodeCIDR":
            cidr = next((c for c in node.pod_cidrs if Family.of(c) is family), "")
        case _:
            cidr = settings.cluster_cidr(family)
    return f"{negate}-s {cidr}" if cidr else ""


def host(ip: str) -> str:
    return f"{ip}/128" if ":" in ip else f"{ip}/32"


def contains(cidr: str, ip: str) -> bool:
    return Family.of(cidr) is Family.of(ip) and ipaddress.ip_address(ip) in ipaddress.ip_network(cidr, strict=False)


@lru_cache(maxsize=1024)
def _probability(left: int) -> str:
    """1/left as the kernel keeps it (a fraction of 2³¹) and iptables-save prints it."""
    return f"{round(0x80000000 / left) / 0x80000000:.11f}"
