"""From what the API server or a manifest says to the model: decoding, checking, making canonical.

Only the fields a proxy reads are decoded. Everything in them is hostile until checked here; behind this room
no name, port or address needs a second look. One bad part costs only itself: it is left out and named by its
field, the rest of the object is used. An object whose identity or structure cannot be trusted is refused
whole, and its last good version keeps serving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field

from ..model import (
    EndpointSlice,
    Family,
    Kind,
    Node,
    Object,
    Problem,
    Protocol,
    Ref,
    Service,
    ServiceCIDR,
    ServicePort,
    ServicePortName,
    SliceEndpoint,
    SlicePort,
)
from .checks import (
    LABEL_RULE,
    LABEL_VALUE_RULE,
    SCHEDULER_NAME,
    SPECIAL,
    SUBDOMAIN_RULE,
    UNSPECIFIED_OR_LOOPBACK,
    cidr,
    is_label,
    is_subdomain,
    label,
    label_value,
    proxyable,
    quote,
    shown,
    subdomain,
)

API_VERSIONS: Mapping[str, str] = {
    "Service": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "Node": "v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}
_KNOWN: Mapping[str, Kind] = {
    "Service": "Service",
    "EndpointSlice": "EndpointSlice",
    "Node": "Node",
    "ServiceCIDR": "ServiceCIDR",
}
# kind of a list → kind of its items, which the API server leaves out there; None: each item states its own
LIST_KINDS: Mapping[str, Kind | None] = {
    "List": None,
    "ServiceList": "Service",
    "EndpointSliceList": "EndpointSlice",
    "NodeList": "Node",
    "ServiceCIDRList": "ServiceCIDR",
}
# A range that no packet can come from: limited broadcast, and a multicast address.
NOBODY = {Family.V4: "255.255.255.255/32", Family.V6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"}
DEFAULT_AFFINITY_SECONDS = 10800
SCHEDULER = "miniproxy.io/ipvs-scheduler"
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
SERVICE_NAME = "kubernetes.io/service-name"
ZONE = "topology.kubernetes.io/zone"
AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"


_JSON = (bytes, Raw, bytearray, memoryview)


class Converted(NamedTuple):
    """What became of one thing. No object and no problems: it is of a kind that no proxy reads."""

    object: Object | None
    problems: tuple[Problem, ...] = ()


# --- what the wire looks like -----------------------------------------------------------------------------
# Every field may be null, as Go's decoder has it. Labels and annotations are structs of the keys we read:
# that is faster than a dict, and whatever else stands there cannot hurt.


class _Struct(Struct, rename="camel", gc=False):
    pass


class _Labels(_Struct):
    proxy_name: str | UnsetType | None = field(default=UNSET, name="service.kubernetes.io/service-proxy-name")
    headless: str | UnsetType | None = field(default=UNSET, name="service.kubernetes.io/headless")
    service_name: str | None = field(default=None, name=SERVICE_NAME)
    zone: str | None = field(default=None, name=ZONE)


class _Annotations(_Struct):
    scheduler: str | None = field(default=None, name=SCHEDULER)
    trigger_time: str | None = field(default=None, name=TRIGGER_TIME)


class _Metadata(_Struct):
    namespace: str | None = None
    name: str | None = None
    labels: _Labels | None = None
    annotations: _Annotations | None = None
    deletion_timestamp: str | None = None


class _Port(_Struct):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    node_port: int | None = None


class _ClientIP(_Struct):
    timeout_seconds: int | None = None


class _AffinityConfig(_Struct):
    client_ip: _ClientIP | None = field(default=None, name="clientIP")


class _ServiceSpec(_Struct):
    type: str | None = None
    cluster_ip: str | None = field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = field(default=None, name="clusterIPs")
    external_ips: list[str] | None = field(default=None, name="externalIPs")
    ports: list[_Port] | None = None
    load_balancer_source_ranges: list[str] | None = None
    session_affinity: str | None = None
    session_affinity_config: _AffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    health_check_node_port: int | None = None


class _Ingress(_Struct):
    ip: str | None = None
    ip_mode: str | None = None


class _LoadBalancer(_Struct):
    ingress: list[_Ingress] | None = None


class _ServiceStatus(_Struct):
    load_balancer: _LoadBalancer | None = None


class _Service(_Struct):
    metadata: _Metadata | None = None
    spec: _ServiceSpec | None = None
    status: _ServiceStatus | None = None


class _Conditions(_Struct):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Named(_Struct):
    name: str | None = None


class _Hints(_Struct):
    for_zones: list[_Named] | None = None
    for_nodes: list[_Named] | None = None


class _Endpoint(_Struct):
    addresses: list[str] | None = None
    conditions: _Conditions | None = None
    node_name: str | None = None
    hints: _Hints | None = None


class _EndpointSlice(_Struct):
    metadata: _Metadata | None = None
    address_type: str | None = None
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _Taint(_Struct):
    key: str | None = None


class _NodeSpec(_Struct):
    pod_cidr: str | None = field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = field(default=None, name="podCIDRs")
    taints: list[_Taint] | None = None


class _NodeAddress(_Struct):
    type: str | None = None
    address: str | None = None


class _NodeStatus(_Struct):
    addresses: list[_NodeAddress] | None = None


class _Node(_Struct):
    metadata: _Metadata | None = None
    spec: _NodeSpec | None = None
    status: _NodeStatus | None = None


class _ServiceCIDRSpec(_Struct):
    cidrs: list[str] | None = None


class _ServiceCIDR(_Struct):
    metadata: _Metadata | None = None
    spec: _ServiceCIDRSpec | None = None


class HeadMetadata(_Struct):
    namespace: str = ""
    name: str = ""
    resource_version: str = ""


class Head(_Struct):
    """What says which object this is, in which version. A field that is absent or not text is ""."""

    kind: str = ""
    api_version: str = ""
    metadata: HeadMetadata = field(default_factory=HeadMetadata)


class ListMetadata(_Struct):
    resource_version: str | None = None
    continue_: str | None = field(default=None, name="continue")


class ObjectList(_Struct):
    """A list as JSON, its items still undecoded so that one bad item costs only itself."""

    kind: str | None = None
    api_version: str | None = None
    metadata: ListMetadata | None = None
    items: list[Raw] | None = None


# --- reporting --------------------------------------------------------------------------------------------


class _Report:
    """Collects the problems of one object."""

    def __init__(self, kind: Kind, namespace: str, name: str) -> None:
        self._identity = kind, namespace, name
        self.problems: list[Problem] = []

    def add(self, field: str, reason: str) -> None:
        self.problems.append(Problem(_ref(*self._identity), field, reason))

    def refuse(self) -> Converted:
        return Converted(None, tuple(self.problems))

    def done(self, thing: Object) -> Converted:
        return Converted(thing, tuple(self.problems))


# --- entry points -----------------------------------------------------------------------------------------


def convert(raw: object, kind: Kind | None = None) -> Converted:
    """One object, as JSON (bytes, msgspec.Raw) or as the dicts and lists of a YAML document → the model.

    `kind` says what it is where the wire leaves that out (items of a typed list) and skips looking at it.
    Never raises, whatever the input.
    """
    if kind is None:
        kind, problem = _kind(raw)
        if kind is None:
            return Converted(None, (problem,) if problem else ())
    wire, decoder, build = _KINDS[kind]
    try:
        if isinstance(raw, _JSON):
            return build(decoder.decode(raw))
        return build(msgspec.convert(raw, wire))
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError, RecursionError) as error:
        field_, reason = _explain(error)
        return Converted(None, (Problem(identify(raw, kind), field_, reason),))


def head(raw: object) -> Head:
    """Kind, version and identity of an object that may be anything at all. Never raises."""
    try:
        if isinstance(raw, _JSON):
            try:
                return _HEAD.decode(raw)
            except msgspec.ValidationError:
                raw = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return Head()
    top = raw if isinstance(raw, dict) else {}
    metadata = top.get("metadata")
    return Head(
        **_texts(top, kind="kind", api_version="apiVersion"),
        metadata=HeadMetadata(
            **_texts(metadata, namespace="namespace", name="name", resource_version="resourceVersion")
        ),
    )


def identify(raw: object, kind: Kind | None = None) -> Ref:
    """Which object that is; its name is "" if it has none. Fit to be printed, whatever the user wrote."""
    top = head(raw)
    return _ref(kind or _KNOWN.get(top.kind, "File"), top.metadata.namespace, top.metadata.name)


def _texts(raw: object, **keys: str) -> dict[str, str]:
    found = {ours: raw.get(theirs) for ours, theirs in keys.items()} if isinstance(raw, dict) else {}
    return {ours: text for ours, text in found.items() if isinstance(text, str)}


def _ref(kind: Kind, namespace: str, name: str) -> Ref:
    return Ref(kind, "" if kind in ("Node", "ServiceCIDR") else shown(namespace), shown(name))


def _kind(raw: object) -> tuple[Kind | None, Problem | None]:
    """Which of our kinds that is. Knative, for one, has a Service too: the group tells them apart."""
    top = head(raw)
    kind = _KNOWN.get(top.kind)
    if kind is None:
        return None, None
    right = API_VERSIONS[kind]
    if top.api_version in ("", right):
        return kind, None
    if top.api_version.rpartition("/")[0] != right.rpartition("/")[0]:
        return None, None
    ref = _ref(kind, top.metadata.namespace, top.metadata.name)
    return None, Problem(ref, "apiVersion", f"{quote(top.api_version)} is not read: write {right}")


_TYPES = {
    "int": "a whole number",
    "float": "a fraction",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a map",
    "null": "null",
}
_EXPECTED = re.compile(r"Expected `([^`]*)`(?:, got `([^`]*)`)?(?: - at `(?:key` in `)?\$([^`]*)`)?")


def _explain(error: Exception) -> tuple[str, str]:
    """(field, reason) from msgspec's message: "Expected `int | null`, got `str` - at `$.spec.x`"."""
    match = _EXPECTED.match(str(error))
    if not match:
        return "", f"cannot be decoded: {error}"
    expected, got, path = match.groups(default="")
    path = re.sub(r"(labels|annotations)\.(.+)", r"\1[\2]", path.removeprefix("."))
    expected = expected.removesuffix(" | null")
    reason = f"must be {_TYPES.get(expected, expected)}"
    if got:
        reason += f", not {_TYPES.get(got, got)}"
    if expected == "str" and got in ("int", "float", "bool"):
        reason += ": put it in quotes"
    return path, reason


# --- Service ----------------------------------------------------------------------------------------------

_SERVICE_TYPES = (None, "", "ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_PROTOCOLS: Mapping[str, Protocol] = {"": "TCP", "TCP": "TCP", "UDP": "UDP", "SCTP": "SCTP"}


def _service(wire: _Service) -> Converted:
    metadata = wire.metadata or _Metadata()
    spec = wire.spec or _ServiceSpec()
    namespace, name = metadata.namespace or "", metadata.name or ""
    report = _Report("Service", namespace, name)
    if not _identity(report, metadata, is_label, LABEL_RULE):
        return report.refuse()
    namespace = label(namespace)
    if _not_proxied(metadata, spec):
        return report.done(Service(namespace, name))
    cluster_ips = _cluster_ips(spec, report)
    common = _common(spec, metadata.annotations or _Annotations(), report)
    external_ips = _addresses(spec.external_ips, "spec.externalIPs", report)
    ingress = _ingress(wire.status, report)
    ranges = _source_ranges(spec.load_balancer_source_ranges, report)
    external_local = _policy(spec.external_traffic_policy, "spec.externalTrafficPolicy", report)
    external_local = external_local and _externally_accessible(spec)
    health_port = _health_check_port(spec, external_local, report)
    ports = tuple(
        ServicePort(
            name=ServicePortName(namespace, name, port.name, port.protocol),
            family=family,
            cluster_ip=cluster_ip,
            port=port.port,
            node_port=port.node_port,
            external_ips=external_ips.get(family, ()),
            load_balancer_ips=ingress.get(family, ()),
            source_ranges=ranges.get(family, ()),
            external_local=external_local,
            health_check_node_port=health_port,
            affinity_seconds=common.affinity_seconds,
            internal_local=common.internal_local,
            scheduler=common.scheduler,
        )
        for port in _service_ports(spec.ports or [], report)
        for family, cluster_ip in cluster_ips.items()
    )
    return report.done(Service(namespace, name, ports))


def _identity(
    report: _Report, metadata: _Metadata, check: Callable[[str], bool], rule: str, namespaced: bool = True
) -> bool:
    if check(metadata.name or "") and (not namespaced or label(metadata.namespace or "")):
        return True
    fields = [("metadata.name", metadata.name, check, rule)]
    if namespaced:
        fields.insert(0, ("metadata.namespace", metadata.namespace, is_label, LABEL_RULE))
    for path, text, fits, how in fields:
        if not text:
            report.add(path, f"is missing: {how}")
        elif not fits(text):
            report.add(path, f"{quote(text)} is not a valid name: {how}")
    return not report.problems


def _not_proxied(metadata: _Metadata, spec: _ServiceSpec) -> bool:
    """Headless, ExternalName, or left to another proxy."""
    labels = metadata.labels
    return (
        (labels is not None and labels.proxy_name is not UNSET)
        or spec.type == "ExternalName"
        or spec.cluster_ip == "None"
        or (not spec.cluster_ip and (spec.cluster_ips or [""])[0] == "None")
    )


def _cluster_ips(spec: _ServiceSpec, report: _Report) -> dict[Family, str]:
    if not spec.cluster_ips and not spec.cluster_ip:
        report.add("spec.clusterIP", 'is missing: write an address, or "None" for a headless Service')
        return {}
    texts = spec.cluster_ips or [spec.cluster_ip or ""]
    chosen: dict[Family, str] = {}
    for i, text in enumerate(texts):
        path = f"spec.clusterIPs[{i}]" if spec.cluster_ips else "spec.clusterIP"
        ip, wrong = proxyable(text, None, UNSPECIFIED_OR_LOOPBACK)
        if wrong:
            report.add(path, wrong)
        elif Family.of(ip) in chosen:
            report.add(path, f"{quote(text)} is a second {Family.of(ip)} address: write one per family")
        else:
            chosen[Family.of(ip)] = ip
    return chosen


class _Common(NamedTuple):
    affinity_seconds: int
    internal_local: bool
    scheduler: str


def _common(spec: _ServiceSpec, annotations: _Annotations, report: _Report) -> _Common:
    scheduler = annotations.scheduler or ""
    if scheduler and not SCHEDULER_NAME.fullmatch(scheduler):
        reason = "is not an IPVS scheduler: write a name such as rr or wlc; the default is used"
        report.add(f"metadata.annotations[{SCHEDULER}]", f"{quote(scheduler)} {reason}")
        scheduler = ""
    if spec.type not in _SERVICE_TYPES:
        types = "ClusterIP, NodePort, LoadBalancer or ExternalName"
        report.add("spec.type", f"{quote(spec.type or '')} is unknown: write {types}; ClusterIP is assumed")
    internal_local = _policy(spec.internal_traffic_policy, "spec.internalTrafficPolicy", report)
    return _Common(_affinity(spec, report), internal_local, scheduler)


def _affinity(spec: _ServiceSpec, report: _Report) -> int:
    kind = spec.session_affinity or "None"
    if kind != "ClientIP":
        if kind != "None":
            report.add("spec.sessionAffinity", f"{quote(kind)} is unknown: write None or ClientIP; None is used")
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if not 1 <= seconds <= 86400:
        path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        report.add(path, f"{_number(seconds)} is out of range: write 1-86400; {DEFAULT_AFFINITY_SECONDS} is used")
        return DEFAULT_AFFINITY_SECONDS
    return seconds


def _policy(text: str | None, path: str, report: _Report) -> bool:
    """Whether a traffic policy is Local."""
    if text not in (None, "", "Cluster", "Local"):
        report.add(path, f"{quote(text)} is unknown: write Cluster or Local; Cluster is used")
    return text == "Local"


def _externally_accessible(spec: _ServiceSpec) -> bool:
    """Whether an external traffic policy means anything for this type of Service."""
    return spec.type in ("NodePort", "LoadBalancer") or bool(spec.external_ips)


def _health_check_port(spec: _ServiceSpec, external_local: bool, report: _Report) -> int:
    port = spec.health_check_node_port or 0
    if not 0 <= port <= 65535:
        report.add("spec.healthCheckNodePort", f"{_number(port)} is not a port: write 1-65535; none is opened")
        return 0
    return port if external_local and spec.type == "LoadBalancer" else 0


def _addresses(texts: Iterable[str] | None, path: str, report: _Report) -> dict[Family, tuple[str, ...]]:
    good: list[str] = []
    for i, text in enumerate(texts or ()):
        ip, wrong = proxyable(text, None, SPECIAL)
        if wrong:
            report.add(f"{path}[{i}]", wrong)
        else:
            good.append(ip)
    return _by_family(good)


def _by_family(texts: Collection[str]) -> dict[Family, tuple[str, ...]]:
    """Each once, in the order given. The other family's are no fault: each family takes its own."""
    if not texts:  # most Services
        return {}
    unique = dict.fromkeys(texts)
    return {family: tuple(text for text in unique if Family.of(text) is family) for family in Family}


def _ingress(status: _ServiceStatus | None, report: _Report) -> dict[Family, tuple[str, ...]]:
    balancer = status.load_balancer if status else None
    good: list[str] = []
    for i, entry in enumerate((balancer.ingress if balancer else None) or ()):
        path = f"status.loadBalancer.ingress[{i}]"
        if entry.ip_mode not in (None, "VIP"):
            if entry.ip_mode != "Proxy":
                mode = quote(entry.ip_mode)
                report.add(f"{path}.ipMode", f"{mode} is unknown: write VIP or Proxy; the entry is not used")
            continue
        if entry.ip:
            ip, wrong = proxyable(entry.ip, None, UNSPECIFIED_OR_LOOPBACK)
            if wrong:
                report.add(f"{path}.ip", wrong)
            else:
                good.append(ip)
    return _by_family(good)


def _source_ranges(texts: list[str] | None, report: _Report) -> dict[Family, tuple[str, ...]]:
    """The ranges of each family; none means everybody, as does a range of all addresses.

    kube-proxy skips a range it cannot read, which would open the Service to everybody if it was the only one;
    it leans on the API server to refuse such. Here that family is closed instead: better silent than open.
    The annotation service.beta.kubernetes.io/load-balancer-source-ranges is for cloud load balancers;
    kube-proxy has never read it, so neither does this: taking over must not start to drop traffic.
    """
    canonical = [cidr(text) for text in texts or ()]
    by_family = _by_family([text for text in canonical if text])
    closed = [family for family in Family if not by_family.get(family)] if "" in canonical else []
    for i, (text, good) in enumerate(zip(texts or (), canonical, strict=True)):
        if not good:
            note = f"; until then no {' or '.join(map(str, closed))} client is let in" if closed else ""
            reason = f"is not an address range: write one such as 10.0.0.0/8 or fd00::/64{note}"
            report.add(f"spec.loadBalancerSourceRanges[{i}]", f"{quote(text)} {reason}")
    bounded = {family: found for family, found in by_family.items() if not any(c.endswith("/0") for c in found)}
    return {**bounded, **{family: (NOBODY[family],) for family in closed}}


class _GoodPort(NamedTuple):
    name: str
    protocol: Protocol
    port: int
    node_port: int


def _service_ports(ports: list[_Port], report: _Report) -> list[_GoodPort]:
    good: list[_GoodPort] = []
    names: set[str] = set()
    fronts: set[tuple[str, int]] = set()
    node_ports: set[tuple[str, int]] = set()
    for i, wire in enumerate(ports):
        path = f"spec.ports[{i}]"
        port = _port(wire, path, report, must_have_name=len(ports) > 1)
        if port is None:
            continue
        if port.name in names:
            report.add(f"{path}.name", f"{quote(port.name)} names an earlier port too: give each its own")
        elif (port.protocol, port.port) in fronts:
            report.add(f"{path}.port", f"{port.protocol} {port.port} is an earlier port too: remove one")
        else:
            node_port = _node_port(wire, port.protocol, node_ports, path, report)
            good.append(_GoodPort(port.name, port.protocol, port.port, node_port))
            names.add(port.name)
            fronts.add((port.protocol, port.port))
    return good


def _port(wire: _Port, path: str, report: _Report, must_have_name: bool = False) -> SlicePort | None:
    """A port of a Service or a slice, or None and a problem."""
    name, protocol, port = wire.name or "", _PROTOCOLS.get(wire.protocol or ""), wire.port or 0
    if name and not label(name):
        report.add(f"{path}.name", f"{quote(name)} is not a valid port name: {LABEL_RULE}")
    elif must_have_name and not name:
        report.add(f"{path}.name", "is missing: where there are several ports, each needs a name")
    elif protocol is None:
        report.add(f"{path}.protocol", f"{quote(wire.protocol or '')} is unknown: write TCP, UDP or SCTP")
    elif wire.port is None:
        report.add(f"{path}.port", "is missing: write 1-65535")
    elif not 1 <= port <= 65535:
        report.add(f"{path}.port", f"{_number(port)} is not a port: write 1-65535")
    else:
        return SlicePort(label(name) if name else "", protocol, port)
    return None


def _node_port(wire: _Port, protocol: Protocol, taken: set[tuple[str, int]], path: str, report: _Report) -> int:
    node_port = wire.node_port or 0
    if not 0 <= node_port <= 65535:
        reason = "is not a port: write 1-65535; the port is served without it"
        report.add(f"{path}.nodePort", f"{_number(node_port)} {reason}")
        return 0
    if node_port and (protocol, node_port) in taken:
        reason = "is an earlier port's too: choose another; the port is served without it"
        report.add(f"{path}.nodePort", f"{protocol} {node_port} {reason}")
        return 0
    taken.add((protocol, node_port))
    return node_port


def _number(number: int) -> str:
    """A number a user wrote, which may have thousands of digits."""
    return str(number) if abs(number) < 10**12 else "the number"


# --- EndpointSlice ----------------------------------------------------------------------------------------

_ADDRESS_TYPES: Mapping[str | None, Family] = {"IPv4": Family.V4, "IPv6": Family.V6, "FQDN": Family.V4}


def _endpoint_slice(wire: _EndpointSlice) -> Converted:
    metadata = wire.metadata or _Metadata()
    labels = metadata.labels or _Labels()
    namespace, name = metadata.namespace or "", metadata.name or ""
    report = _Report("EndpointSlice", namespace, name)
    if not _identity(report, metadata, is_subdomain, SUBDOMAIN_RULE):
        return report.refuse()
    family = _ADDRESS_TYPES.get(wire.address_type)
    service = labels.service_name or ""
    if family is None:
        wrong = f"{quote(wire.address_type)} is unknown" if wire.address_type else "is missing"
        report.add("addressType", f"{wrong}: write IPv4 or IPv6")
    if service and not is_label(service):
        report.add(f"metadata.labels[{SERVICE_NAME}]", f"{quote(service)} names no Service: {LABEL_RULE}")
    if family is None or report.problems:
        return report.refuse()
    if not service or labels.headless is not UNSET or wire.address_type == "FQDN":
        return report.done(EndpointSlice(namespace, name, "", family))
    return report.done(
        EndpointSlice(
            label(namespace),
            name,
            service,
            family,
            _slice_ports(wire.ports or [], report),
            _endpoints(wire.endpoints or [], family, report),
            _triggered(metadata.annotations, report),
        )
    )


def _slice_ports(ports: list[_Port], report: _Report) -> tuple[SlicePort, ...]:
    good: dict[str, SlicePort] = {}
    for i, wire in enumerate(ports):
        if wire.port is None:  # "all ports": means nothing to a proxy, kube-proxy skips it too
            continue
        port = _port(wire, f"ports[{i}]", report)
        if port is not None and port.name in good:
            report.add(f"ports[{i}].name", f"{quote(port.name)} names an earlier port too: give each its own")
        elif port is not None:
            good[port.name] = port
    return tuple(good.values())


_NO_CONDITIONS = _Conditions()
_ZONED = Annotated[datetime, msgspec.Meta(tz=True)]


def _endpoints(endpoints: list[_Endpoint], family: Family, report: _Report) -> tuple[SliceEndpoint, ...]:
    """The hot path: a cluster has a hundred thousand of these."""
    good: list[SliceEndpoint] = []
    for i, wire in enumerate(endpoints):
        if not wire.addresses:
            report.add(f"endpoints[{i}].addresses", "is empty: write one address")
            continue
        # The API allows several and says nobody may use but the first.
        ip, wrong = proxyable(wire.addresses[0], family, SPECIAL)
        if wrong:
            report.add(f"endpoints[{i}].addresses[0]", wrong)
            continue
        node = subdomain(wire.node_name) if wire.node_name else ""
        if wire.node_name and not node:
            reason = f"{quote(wire.node_name)} is not a node's name: {SUBDOMAIN_RULE}; no node is assumed"
            report.add(f"endpoints[{i}].nodeName", reason)
        conditions = wire.conditions or _NO_CONDITIONS
        ready = conditions.ready is not False
        zones = nodes = ()  # type: tuple[str, ...]
        if wire.hints is not None:
            path = f"endpoints[{i}].hints"
            zones = _hints(wire.hints.for_zones, f"{path}.forZones", label_value, LABEL_VALUE_RULE, report)
            nodes = _hints(wire.hints.for_nodes, f"{path}.forNodes", subdomain, SUBDOMAIN_RULE, report)
        serving = conditions.serving is not False
        good.append(SliceEndpoint(ip, ready, serving, conditions.terminating is True, node, zones, nodes))
    return tuple(good)


def _hints(
    hints: list[_Named] | None, path: str, check: Callable[[str], str], rule: str, report: _Report
) -> tuple[str, ...]:
    good = []
    for i, hint in enumerate(hints or ()):
        name = check(hint.name or "")
        if name:
            good.append(name)
        else:
            reason = f"{quote(hint.name or '')} is not a valid name: {rule}; the hint is not used"
            report.add(f"{path}[{i}].name", reason)
    return _one_copy(tuple(good))


@lru_cache(maxsize=1024)
def _one_copy(names: tuple[str, ...]) -> tuple[str, ...]:
    return names


def _triggered(annotations: _Annotations | None, report: _Report) -> float:
    text = annotations.trigger_time if annotations else None
    if not text:
        return 0.0
    try:
        return max(0.0, msgspec.convert(text, _ZONED).timestamp())
    except (msgspec.ValidationError, OverflowError, ValueError):
        reason = "is not a time: write one such as 2026-01-31T12:00:00Z; it is not used"
        report.add(f"metadata.annotations[{TRIGGER_TIME}]", f"{quote(text)} {reason}")
        return 0.0


# --- Node -------------------------------------------------------------------------------------------------


def _node(wire: _Node) -> Converted:
    metadata = wire.metadata or _Metadata()
    spec = wire.spec or _NodeSpec()
    name = metadata.name or ""
    report = _Report("Node", "", name)
    if not _identity(report, metadata, is_subdomain, SUBDOMAIN_RULE, namespaced=False):
        return report.refuse()
    zone = (metadata.labels.zone if metadata.labels else None) or ""
    if zone and not label_value(zone):
        path = f"metadata.labels[{ZONE}]"
        report.add(path, f"{quote(zone)} is not a zone: {LABEL_VALUE_RULE}; no zone is assumed")
        zone = ""
    return report.done(
        Node(
            name,
            zone,
            _node_ips(wire.status, report),
            _pod_cidrs(spec, report),
            deleting=metadata.deletion_timestamp is not None,
            excluded_by_autoscaler=any(taint.key == AUTOSCALER_TAINT for taint in spec.taints or ()),
        )
    )


def _node_ips(status: _NodeStatus | None, report: _Report) -> tuple[str, ...]:
    """The first InternalIP of each family, else the first ExternalIP; the very first is the primary."""
    found: dict[str, list[str]] = {"InternalIP": [], "ExternalIP": []}
    for i, wire in enumerate((status.addresses if status else None) or ()):
        if wire.type not in found:
            continue
        ip, wrong = proxyable(wire.address or "", None, UNSPECIFIED_OR_LOOPBACK)
        if wrong:
            report.add(f"status.addresses[{i}].address", wrong)
        else:
            found[wire.type].append(ip)
    chosen: dict[Family, str] = {}
    for ip in (*found["InternalIP"], *found["ExternalIP"]):
        chosen.setdefault(Family.of(ip), ip)
    return tuple(chosen.values())


def _pod_cidrs(spec: _NodeSpec, report: _Report) -> tuple[str, ...]:
    if spec.pod_cidrs:
        return _cidrs(spec.pod_cidrs, "spec.podCIDRs[{}]", report)
    return _cidrs([spec.pod_cidr] if spec.pod_cidr else [], "spec.podCIDR", report)


def _cidrs(texts: list[str], path: str, report: _Report) -> tuple[str, ...]:
    """Those that are ranges. `path` has a {} where the index goes."""
    good: dict[str, None] = {}
    for i, text in enumerate(texts):
        canonical = cidr(text)
        if canonical:
            good[canonical] = None
        else:
            report.add(path.format(i), f"{quote(text)} is not an address range: write one such as 10.128.1.0/24")
    return tuple(good)


# --- ServiceCIDR ------------------------------------------------------------------------------------------


def _service_cidr(wire: _ServiceCIDR) -> Converted:
    metadata = wire.metadata or _Metadata()
    name = metadata.name or ""
    report = _Report("ServiceCIDR", "", name)
    if not _identity(report, metadata, is_subdomain, SUBDOMAIN_RULE, namespaced=False):
        return report.refuse()
    texts = (wire.spec.cidrs if wire.spec else None) or []
    return report.done(ServiceCIDR(name, _cidrs(texts, "spec.cidrs[{}]", report)))


_HEAD = msgspec.json.Decoder(Head)
_KINDS: Mapping[Kind, tuple[type, msgspec.json.Decoder[Any], Callable[[Any], Converted]]] = {
    "Service": (_Service, msgspec.json.Decoder(_Service), _service),
    "EndpointSlice": (_EndpointSlice, msgspec.json.Decoder(_EndpointSlice), _endpoint_slice),
    "Node": (_Node, msgspec.json.Decoder(_Node), _node),
    "ServiceCIDR": (_ServiceCIDR, msgspec.json.Decoder(_ServiceCIDR), _service_cidr),
}
