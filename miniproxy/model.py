"""The words every room shares: what a Service port, an endpoint and a node are to a proxy.

Values only, all immutable, already checked: addresses are canonical text of the right family, ports
are 1-65535, names are DNS labels. Whoever builds one from user input (sources/wire.py) does the checking,
so planners may paste these fields into kernel transactions.
"""

from __future__ import annotations

import ipaddress
from enum import IntEnum
from typing import Literal, NamedTuple

import msgspec

Protocol = Literal["TCP", "UDP", "SCTP"]
PROTOCOL_NUMBERS: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}  # IANA's, as packets and netlink have them
PROTOCOL_NAMES: dict[int, Protocol] = {number: name for name, number in PROTOCOL_NUMBERS.items()}
Kind = Literal["Service", "EndpointSlice", "Node", "ServiceCIDR", "File", "API"]
ProblemKind = Literal["Refused", "Conflict", "SetAside", "FailedToStartServiceHealthcheck"]


class Family(IntEnum):
    """An IP family; its value is the IP version."""

    V4 = 4
    V6 = 6

    def __str__(self) -> str:
        return f"IPv{self.value}"

    @staticmethod
    def of(address: str) -> Family:
        """Family of an address or CIDR that is already known to be valid."""
        return Family.V6 if ":" in address else Family.V4


class ServicePortName(NamedTuple):
    """Identity of one port of one Service; `port` is "" for the only, unnamed port."""

    namespace: str
    name: str
    port: str
    protocol: Protocol

    def __str__(self) -> str:
        """kube-proxy's form, found in its comments and hashed into its chain names."""
        return f"{self.namespace}/{self.name}:{self.port}" if self.port else f"{self.namespace}/{self.name}"


PortKey = tuple[ServicePortName, Family]


class Ref(NamedTuple):
    """Which object of a source: (kind, namespace, name). A "File" has its path as name, an "API" the resource's."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


class Problem(NamedTuple):
    """Why (a part of) an object is not used; reported once for as long as it stands."""

    ref: Ref
    field: str  # path as in the manifest, "spec.ports[1].nodePort"; "" when it is the whole object
    reason: str  # what is wrong and what would be right
    origin: str = ""  # "FILE:LINE" where the source has such a thing
    what: ProblemKind = "Refused"  # for those who count or filter: the reason of a Kubernetes Event

    def __str__(self) -> str:
        return f"{self.ref}: {self.statement}"

    @property
    def statement(self) -> str:
        """All of it but the object's name."""
        where = f" ({self.origin})" if self.origin else ""
        field = f"{self.field}: " if self.field else ""
        return f"{field}{self.reason}{where}"


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """One port of a Service in one IP family: everything about it that reaches the kernel."""

    name: ServicePortName
    family: Family
    cluster_ip: str
    port: int
    node_port: int = 0  # 0: none
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()  # ingress addresses with ipMode VIP
    source_ranges: tuple[str, ...] = ()  # CIDRs but /0; they guard load_balancer_ips only; () lets everybody in
    affinity_seconds: int = 0  # ClientIP affinity time-out; 0: none
    internal_local: bool = False  # internalTrafficPolicy: Local
    external_local: bool = False  # externalTrafficPolicy: Local
    health_check_node_port: int = 0
    scheduler: str = ""  # IPVS only: annotation miniproxy.io/ipvs-scheduler

    @property
    def externally_accessible(self) -> bool:
        return bool(self.node_port or self.external_ips or self.load_balancer_ips)

    @property
    def uses_cluster_endpoints(self) -> bool:
        """Whether any of its traffic goes by Cluster policy."""
        return not self.internal_local or self.externally_accessible

    @property
    def uses_local_endpoints(self) -> bool:
        """Whether any of its traffic goes by Local policy."""
        return self.internal_local or (self.external_local and self.externally_accessible)


class SliceEndpoint(msgspec.Struct, frozen=True, gc=False):
    """An endpoint as an EndpointSlice lists it: without the port, which the slice states once for all."""

    ip: str
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One backend of one service port."""

    ip: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class SlicePort(NamedTuple):
    name: str
    protocol: Protocol
    port: int


class Service(msgspec.Struct, frozen=True):
    """A Service as a proxy sees it. `ports` is empty for those it ignores (headless, ExternalName, …)."""

    namespace: str
    name: str
    ports: tuple[ServicePort, ...] = ()  # one per port and family

    @property
    def ref(self) -> Ref:
        return Ref("Service", self.namespace, self.name)


class EndpointSlice(msgspec.Struct, frozen=True):
    """A slice of the endpoints of `service`; one address family each."""

    namespace: str
    name: str
    service: str  # "" for a slice the proxy ignores
    family: Family
    ports: tuple[SlicePort, ...] = ()
    endpoints: tuple[SliceEndpoint, ...] = ()
    triggered: float = 0.0  # endpoints.kubernetes.io/last-change-trigger-time, Unix seconds; 0: not given

    @property
    def ref(self) -> Ref:
        return Ref("EndpointSlice", self.namespace, self.name)


class Node(msgspec.Struct, frozen=True):
    """The node the agent runs on (other nodes do not matter to a proxy)."""

    name: str
    zone: str = ""
    ips: tuple[str, ...] = ()  # at most one per family, primary first
    pod_cidrs: tuple[str, ...] = ()
    deleting: bool = False  # has a deletionTimestamp
    excluded_by_autoscaler: bool = False  # taint ToBeDeletedByClusterAutoscaler
    local: tuple[str, ...] = ()  # all addresses of its links but kube-ipvs0: what its kernel says, not the API
    service_cidrs: tuple[str, ...] = ()  # where cluster IPs come from: what ServiceCIDRs say, the same on each node
    many_endpoints: bool = False  # of the family at hand, in the cluster: the planner says how many that is

    @property
    def ref(self) -> Ref:
        return Ref("Node", "", self.name)

    def at(self, address: str) -> Node:
        """The same node with this as its address of that family, and its first; 0.0.0.0 and :: change nothing."""
        if ipaddress.ip_address(address).is_unspecified:
            return self
        others = (ip for ip in self.ips if Family.of(ip) is not Family.of(address))
        return msgspec.structs.replace(self, ips=(address, *others))

    def ip(self, family: Family) -> str:
        """The primary address of that family, "" if the node has none."""
        return next((ip for ip in self.ips if Family.of(ip) is family), "")


class ServiceCIDR(msgspec.Struct, frozen=True):
    """Ranges that cluster IPs are allocated from."""

    name: str
    cidrs: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        return Ref("ServiceCIDR", "", self.name)


Object = Service | EndpointSlice | Node | ServiceCIDR


class Batch(msgspec.Struct, frozen=True):
    """What a source hands over at once: objects as they are now, objects that are gone, what was refused.

    An object that cannot be used at all is neither upserted nor deleted: its last good version keeps
    serving, and a Problem says why. A Problem of an earlier batch is over when a later one upserts or deletes
    its object without repeating it.
    """

    upserts: tuple[Object, ...] = ()
    deletes: tuple[Ref, ...] = ()
    problems: tuple[Problem, ...] = ()
    synced: bool = False  # everything that existed when the source began has been handed over
