"""Plans nftables mode: a service port becomes elements of a fixed number of sets and maps.

No chain, rule, set or map belongs to a service. In table `miniproxy` of family ip or ip6 (nft_layout.py):

    nat-prerouting, nat-output ─► services ─┬─ cluster IP ────────────────► choose-all
                                            ├─ external, policy Cluster: mark ► choose-all
                                            ├─ external, policy Local: pods and the node ► choose-all,
                                            │                          others ► choose-local
                                            └─ an address of the node: the same by port number alone
    choose-*: DNAT to map `endpoints` [address . protocol . port . code], or to a chain for session affinity
    filter-*: refuse or drop what has nobody to serve it (sets `refused`, `dropped`) or may not come in (`guarded`)

The random choice among n endpoints needs n as a constant in a rule, so there is one rule per *size*: exactly n up
to 8, a power of two beyond, where a miss is drawn again. An endpoint's code is 10,000 × size + index, so looking
up the code of another size finds nothing, and the first rule that finds something is the right one.

Which endpoint has which index is not planned: it depends on what was there before (nft_script.py).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ..config import Settings
from ..model import Endpoint, Family, Node, ServicePort
from ..policy import Serving
from .nft_layout import (
    ANY,
    EXACT,
    LARGEST,
    LOCAL,
    MOST_SLOTS,
    TABLE,
    UNIT,
    Affinity,
    Chain,
    Frame,
    choosing,
    ip,
    layout,
    map_of,
    node_port_addresses,
    power_of_two,
    sets,
    size_of,
)

MANY_ENDPOINTS = 0  # their number makes no difference

Entry = Literal["", "external", "external-local"]
Refusal = Literal["", "refused", "dropped"]


class Table(NamedTuple):
    """Our table with its sets and maps, all empty, and the chains that choose endpoints from them.

    All of it is made in one script or not at all: nft 1.0.6 takes no rule that translates to an address and port
    from a map, unless the same script declares the map. `layout` is a digest of it.
    """

    family: Family
    layout: str

    @property
    def key(self) -> tuple[str, ...]:
        return ("table",)


class Element(NamedTuple):
    """An element that several service ports may want, or none does."""

    set: str
    text: str

    @property
    def key(self) -> tuple[str, ...]:
        return ("element", self.set, self.text)


class Stray(NamedTuple):
    """Something found in our table that we did not put there; `kind` is nft's word for it."""

    kind: str  # "element", "set", "map"; "affinity" for a group that nobody uses
    name: str  # of an object, or of the set of an element
    text: str = ""  # of an element

    @property
    def key(self) -> tuple[str, ...]:
        return ("stray", self.kind, self.name, self.text)


class Frontend(NamedTuple):
    """What happens to the traffic to one address, protocol and port: the object of a service port.

    Endpoints are written "ADDRESS . PORT". Planned, they are sorted. *Seated* (nft_script.py), the index of each
    is the one the kernel has; with affinity the index is a slot, and "" is a slot that is free.
    """

    address: str  # ANY[family] for a NodePort
    protocol: str
    port: int
    entry: Entry = ""  # "": a cluster IP
    endpoints: tuple[str, ...] = ()
    local: tuple[str, ...] = ()  # for traffic from elsewhere, with entry external-local
    affinity: int = 0  # seconds
    refusal: Refusal = ""
    guarded: bool = False
    sources: tuple[str, ...] = ()  # who may come in, if guarded
    counted: bool = False

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("frontend", self.address, self.protocol, self.port)

    def planned(self) -> Frontend:
        """What was planned for this to come out."""
        return self._replace(
            endpoints=tuple(sorted(filter(None, self.endpoints))), local=tuple(sorted(filter(None, self.local)))
        )

    def groups(self) -> Iterator[Affinity]:
        """What session affinity needs besides elements."""
        for local, endpoints in ((False, self.endpoints), (True, self.local)):
            if self.affinity and endpoints:
                yield self.group(endpoints, local=local)

    def group(self, endpoints: Sequence[str], *, local: bool) -> Affinity:
        return Affinity(self.address in ANY.values(), local, self.affinity, power_of_two(len(endpoints)))

    def elements(self) -> Iterator[tuple[str, str, str]]:
        """All elements as (set, key, data); data is "" in a set."""
        to = f"{self.address} . {self.protocol} . {self.port}"
        if self.entry:
            yield self.entry, to, ""
        for first, endpoints in ((0, self.endpoints), (LOCAL, self.local)):
            if self.affinity and endpoints:
                group = self.group(endpoints, local=bool(first)).name
                yield "affinity", f"{to} . {first}", f"goto {group}"
                for code, endpoint in enumerate(endpoints, first):
                    if endpoint:
                        yield "occupied", f"{to} . {code}", ""
                        yield group, f"{to} . {code}", endpoint
            elif endpoints:
                size = size_of(len(endpoints))
                code = first + size * UNIT
                if size > EXACT:
                    yield "sizes", f"{to} . {code}", ""
                name = map_of(size)
                for index, endpoint in enumerate(endpoints):
                    yield name, f"{to} . {code + index}", endpoint
        if self.refusal:
            yield self.refusal, to, ""
        if self.guarded:
            yield "guarded", to, ""
            for source in self.sources:
                yield "allowed", f"{to} . {source}", ""
        if self.counted:
            yield "counted", to, ""


NftablesObject = Table | Chain | Element | Frontend | Stray


def plan(port: ServicePort, serving: Serving, settings: Settings, node: Node) -> tuple[NftablesObject, ...]:
    """Everything one service port needs in its family."""
    return tuple(_ServicePlan(port, serving, settings, node).objects())


class _ServicePlan:
    """The decisions that the frontends of one service port share."""

    def __init__(self, port: ServicePort, serving: Serving, settings: Settings, node: Node) -> None:
        self.port = port
        self.serving = serving
        self.settings = settings
        self.node = node
        most = MOST_SLOTS if port.affinity_seconds else LARGEST
        self.cluster = _targets(serving.cluster[:most])
        self.local = _targets(serving.local[:most])

    def objects(self) -> Iterator[NftablesObject]:
        yield Element("cluster-ips", self.port.cluster_ip)
        yield from self.frontends()
        for endpoint in self.serving.reachable:
            # Only a pod of this node can come back to itself through this node's rules.
            if endpoint.node in ("", self.node.name):
                yield Element("hairpin", f"{endpoint.ip} . {endpoint.ip}")

    def frontends(self) -> Iterator[Frontend]:
        port = self.port
        internal = self.local if port.internal_local else self.cluster
        yield self.frontend(port.cluster_ip, port.port, "", internal, local_policy=port.internal_local)
        for address in port.external_ips:
            yield self.external(address, port.port)
        for address in port.load_balancer_ips:
            frontend = self.external(address, port.port)
            yield frontend._replace(guarded=True, sources=self.sources()) if port.source_ranges else frontend
        if port.node_port:
            yield self.external(ANY[port.family], port.node_port)

    def external(self, address: str, number: int) -> Frontend:
        if self.port.external_local:
            return self.frontend(address, number, "external-local", self.cluster, self.local, local_policy=True)
        return self.frontend(address, number, "external", self.cluster, local_policy=False)

    def frontend(
        self,
        address: str,
        number: int,
        entry: Entry,
        endpoints: tuple[str, ...],
        local: tuple[str, ...] = (),
        *,
        local_policy: bool,
    ) -> Frontend:
        refusal: Refusal = ""
        if not self.serving.any:
            refusal = "refused"  # at once, rather than a time-out
        elif local_policy and not self.local:
            refusal = "dropped"  # others serve it, elsewhere; whoever sends it here will learn so (KEP-2086)
        return Frontend(
            address,
            self.port.name.protocol.lower(),
            number,
            entry,
            endpoints,
            local,
            affinity=self.port.affinity_seconds if endpoints or local else 0,
            refusal=refusal,
            counted=self.settings.nftables_counters,
        )

    def sources(self) -> tuple[str, ...]:
        """The allowed sources, none within another: the kernel's interval sets refuse overlaps."""
        port = self.port
        sources = list(port.source_ranges)
        node_ip = self.node.ip(port.family)
        if node_ip and any(_contains(cidr, node_ip) for cidr in sources):
            # Where the load balancer's address is bound to the node, the node's own connections to it come
            # with that address as their source.
            sources += port.load_balancer_ips
        networks = [ipaddress.ip_network(source, strict=False) for source in sources]
        merged = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]
        return tuple(sorted(map(interval, merged)))


def frame(
    settings: Settings, node: Node, family: Family, local_addresses: Sequence[str] = ()
) -> tuple[NftablesObject, ...]:
    """What nftables mode needs whatever services there are. `local_addresses` are not needed."""
    objects: list[NftablesObject] = [Table(family, layout(family))]
    objects += Frame(settings, node, family).chains()
    if "primary" in node_port_addresses(settings) and node.ip(family):
        objects.append(Element("node-ips", node.ip(family)))
    return tuple(objects)


def show(objects: Iterable[NftablesObject]) -> str:
    """Objects as `nft list table` would list them, sets without elements left out; `nft -f` takes it."""
    objects = list(objects)
    table = next((obj for obj in objects if isinstance(obj, Table)), None)
    if table is None:
        return ""
    elements: dict[str, list[str]] = {}
    groups: dict[str, Affinity] = {}
    for obj in objects:
        match obj:
            case Element(name, text):
                elements.setdefault(name, []).append(text)
            case Frontend():
                for name, key, data in obj.elements():
                    elements.setdefault(name, []).append(f"{key} : {data}" if data else key)
                groups |= {group.name: group for group in obj.groups()}
    return "\n".join(_listing(table, elements, groups, [obj for obj in objects if isinstance(obj, Chain)])) + "\n}\n"


def _listing(
    table: Table, elements: Mapping[str, list[str]], groups: Mapping[str, Affinity], chains: list[Chain]
) -> Iterator[str]:
    from .nft_layout import affinity_chain, affinity_map

    family = table.family
    yield f'table {ip(family)} {TABLE} {{\n\tcomment "{table.layout}"'
    declared = sets(family) | {name: affinity_map(family) for name in sorted(groups)}
    for name, declaration in declared.items():
        kind, _, spec = declaration.partition(" { ")
        yield f"\n\t{kind} {name} {{\n\t\t" + spec.removesuffix(" }").removesuffix(";").replace("; ", "\n\t\t")
        if name in elements:
            yield "\t\telements = { " + ",\n\t\t\t     ".join(sorted(elements[name])) + " }"
        yield "\t}"
    for chain in [*chains, *choosing(family), *(affinity_chain(family, groups[name]) for name in sorted(groups))]:
        yield f"\n\tchain {chain.name} {{" + (f"\n\t\t{chain.hook}" if chain.hook else "")
        yield from (f"\t\t{rule}" for rule in chain.rules)
        yield "\t}"


def interval(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    """As nft prints it: a single address without its length."""
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


def _targets(endpoints: Iterable[Endpoint]) -> tuple[str, ...]:
    return tuple(sorted(f"{endpoint.ip} . {endpoint.port}" for endpoint in endpoints))


def _contains(cidr: str, address: str) -> bool:
    return Family.of(cidr) is Family.of(address) and ipaddress.ip_address(address) in ipaddress.ip_network(
        cidr, strict=False
    )
