"""What the wire says and what the model makes of it: golden objects, tables, and anything at all."""

from __future__ import annotations

import copy
import ipaddress
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniproxy.model import (
    EndpointSlice,
    Family,
    Node,
    Object,
    Problem,
    Ref,
    Service,
    ServiceCIDR,
    ServicePort,
    ServicePortName,
    SliceEndpoint,
    SlicePort,
)
from miniproxy.sources.checks import address, cidr
from miniproxy.sources.wire import LIST_KINDS, NOBODY, Converted, ObjectList, convert, head, identify

from .broken import Broken, broken_objects, endpoint_slice, node, put, service

GOLDEN = Path(__file__).parent.parent / "golden"


def both(thing: Any) -> Converted:
    """Convert it as YAML and as JSON would come; they must agree."""
    converted = convert(thing)
    assert convert(json.dumps(thing).encode()) == converted
    return converted


def good(thing: Any) -> Any:
    converted = both(thing)
    assert converted.problems == ()
    assert converted.object is not None
    return converted.object


def golden(name: str) -> list[Converted]:
    listed = msgspec.json.decode((GOLDEN / name).read_bytes(), type=ObjectList)
    assert listed.items
    assert listed.kind
    return [convert(raw, LIST_KINDS[listed.kind]) for raw in listed.items]


@pytest.mark.parametrize("name", ["services.json", "endpointslices.json"])
def test_golden_objects_convert_without_a_problem(name: str) -> None:
    for converted in golden(name):
        assert converted.problems == ()
        assert converted.object is not None
        assert_valid(converted.object)


def test_golden_services_that_kube_proxy_ignores_have_no_ports() -> None:
    services = [converted.object for converted in golden("services.json")]
    ignored = {thing.name for thing in services if isinstance(thing, Service) and not thing.ports}
    assert ignored == {"extname", "headless", "other"}


def test_golden_node() -> None:
    assert good(json.loads((GOLDEN / "node.json").read_text())) == Node(
        "n1", "z1", ("172.30.0.2", "fd00:30::2"), ("10.128.1.0/24", "fd00:128:1::/64")
    )


def test_a_service_with_everything() -> None:
    thing = service("web", 7)
    put(thing, "spec.clusterIPs", ["fd00:10:96::7", "10.96.1.7"])
    put(thing, "spec.externalIPs", ["198.18.1.7", "FD00:198::0:7", "198.18.1.7"])
    put(thing, "spec.loadBalancerSourceRanges", [" 203.0.113.99/24 ", "fd00:203::1/64"])
    put(thing, "metadata.annotations", {"miniproxy.io/ipvs-scheduler": "wlc", "other": 3})
    ports = good(thing).ports
    assert [(port.name.port, port.family) for port in ports] == [
        ("http", Family.V6),
        ("http", Family.V4),
        ("dns", Family.V6),
        ("dns", Family.V4),
    ]
    assert ports[1] == ServicePort(
        ServicePortName("default", "web", "http", "TCP"),
        Family.V4,
        "10.96.1.7",
        80,
        node_port=30007,
        external_ips=("198.18.1.7",),
        load_balancer_ips=("192.0.2.7",),
        source_ranges=("203.0.113.0/24",),
        affinity_seconds=60,
        external_local=True,
        health_check_node_port=32607,
        scheduler="wlc",
    )
    assert ports[0].cluster_ip == "fd00:10:96::7"
    assert ports[0].external_ips == ("fd00:198::7",)
    assert ports[0].load_balancer_ips == ()
    assert ports[0].source_ranges == ("fd00:203::/64",)


def test_names_may_begin_with_a_digit() -> None:
    assert good(service("3scale", namespace="0ns")).ref == Ref("Service", "0ns", "3scale")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spec.clusterIP", "None"),
        ("spec.type", "ExternalName"),
        ("metadata.labels", {"service.kubernetes.io/service-proxy-name": "other"}),
        ("metadata.labels", {"service.kubernetes.io/service-proxy-name": ""}),
    ],
)
def test_services_left_to_others_have_no_ports(field: str, value: Any) -> None:
    assert good(put(service("web"), field, value)) == Service("default", "web")


def test_cluster_ip_counts_when_there_are_no_cluster_ips() -> None:
    thing = service("web", 7)
    del thing["spec"]["clusterIPs"]
    assert {port.cluster_ip for port in good(thing).ports} == {"10.96.1.7"}
    put(thing, "spec.clusterIP", None)
    converted = both(thing)
    assert converted.object == Service("default", "web")
    assert [problem.field for problem in converted.problems] == ["spec.clusterIP"]


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("spec.sessionAffinityConfig", None, "affinity_seconds", 10800),
        ("spec.sessionAffinity", None, "affinity_seconds", 0),
        ("spec.internalTrafficPolicy", "Local", "internal_local", True),
        ("spec.internalTrafficPolicy", None, "internal_local", False),
        ("spec.externalTrafficPolicy", "Cluster", "health_check_node_port", 0),
        ("spec.type", "NodePort", "health_check_node_port", 0),
        ("spec.type", "NodePort", "external_local", True),
        ("spec.type", "ClusterIP", "external_local", True),  # it has externalIPs
        ("status.loadBalancer.ingress[0].ipMode", "Proxy", "load_balancer_ips", ()),
        ("status.loadBalancer.ingress[0].ipMode", None, "load_balancer_ips", ("192.0.2.1",)),
        ("status.loadBalancer.ingress[0].ip", None, "load_balancer_ips", ()),
        ("status.loadBalancer.ingress[0]", {"hostname": "lb.example.com"}, "load_balancer_ips", ()),
        ("status", None, "load_balancer_ips", ()),
        ("spec.externalIPs", ["010.001.000.005"], "external_ips", ("10.1.0.5",)),
        ("spec.externalIPs", ["::ffff:10.1.0.5", "fd00::1"], "external_ips", ("10.1.0.5",)),
        ("spec.loadBalancerSourceRanges", ["fd00::/8"], "source_ranges", ()),  # the other family's
        ("spec.loadBalancerSourceRanges", [], "source_ranges", ()),
    ],
)
def test_service_fields(field: str, value: Any, attribute: str, expected: Any) -> None:
    for port in good(put(service("web"), field, value)).ports:
        assert getattr(port, attribute) == expected


def test_external_policy_means_nothing_without_external_addresses() -> None:
    thing = put(put(service("web"), "spec.type", "ClusterIP"), "spec.externalIPs", None)
    assert not any(port.external_local for port in good(thing).ports)


@pytest.mark.parametrize(
    ("ranges", "v4", "v6"),
    [
        (["10.0.0.0/40"], (NOBODY[Family.V4],), (NOBODY[Family.V6],)),
        ([""], (NOBODY[Family.V4],), (NOBODY[Family.V6],)),
        (["10.0.0.0/40", "203.0.113.0/24"], ("203.0.113.0/24",), (NOBODY[Family.V6],)),
        (["fd00::/129", "fd00::/8"], (NOBODY[Family.V4],), ("fd00::/8",)),
        (["203.0.113.0/24"], ("203.0.113.0/24",), ()),
        (["0.0.0.0/0", "203.0.113.0/24", "fd00::/8"], (), ("fd00::/8",)),  # all addresses: no range at all
        (["10.0.0.0/40", "0.0.0.0/0"], (), (NOBODY[Family.V6],)),
    ],
)
def test_source_ranges_that_cannot_be_read_never_open_a_service(
    ranges: list[str], v4: tuple[str, ...], v6: tuple[str, ...]
) -> None:
    thing = put(service("web"), "spec.loadBalancerSourceRanges", ranges)
    put(thing, "spec.clusterIPs", ["10.96.1.1", "fd00:10:96::1"])
    converted = both(thing)
    assert isinstance(converted.object, Service)
    for port in converted.object.ports:
        assert port.source_ranges == (v4 if port.family is Family.V4 else v6)


def test_what_is_wrong_with_one_port_leaves_the_others() -> None:
    converted = both(put(service("web"), "spec.ports[0].port", 0))
    assert isinstance(converted.object, Service)
    assert [port.name.port for port in converted.object.ports] == ["dns"]
    assert both(put(service("web"), "spec.ports[1].nodePort", 70000)).problems == (
        Problem(
            Ref("Service", "default", "web"),
            "spec.ports[1].nodePort",
            "70000 is not a port: write 1-65535; the port is served without it",
        ),
    )


@pytest.mark.parametrize("broken", broken_objects(), ids=lambda broken: broken.what)
def test_each_broken_object_is_named_by_its_field(broken: Broken) -> None:
    converted = both(broken.object)
    assert [(problem.ref, problem.field) for problem in converted.problems] == [(broken.ref, broken.field)]
    assert (converted.object is None) is broken.whole
    if converted.object is not None:
        assert_valid(converted.object)


def test_a_slice_with_everything() -> None:
    thing = endpoint_slice("web-a", 7)
    put(
        thing,
        "metadata.annotations",
        {"endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T01:00:01.5+01:00"},
    )
    thing["ports"] += [{"port": 1234, "name": None, "protocol": None}, {"name": "all", "port": None}]
    assert good(thing) == EndpointSlice(
        "default",
        "web-a",
        "web",
        Family.V4,
        (SlicePort("http", "TCP", 8080), SlicePort("dns", "UDP", 53), SlicePort("", "TCP", 1234)),
        (
            SliceEndpoint("10.128.1.7", node="n1", zone_hints=("z1",), node_hints=("n1",)),
            SliceEndpoint("10.128.2.7", node="n2"),
        ),
        1.5,
    )


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, (True, True, False)),
        ({}, (True, True, False)),
        ({"ready": None, "serving": None, "terminating": None}, (True, True, False)),
        ({"ready": False}, (False, True, False)),
        ({"ready": False, "terminating": True}, (False, True, True)),
        ({"ready": False, "serving": True, "terminating": True}, (False, True, True)),
        ({"ready": True, "serving": False}, (True, False, False)),
    ],
)
def test_endpoint_conditions(conditions: Any, expected: tuple[bool, bool, bool]) -> None:
    endpoint = good(put(endpoint_slice("a"), "endpoints[0].conditions", conditions)).endpoints[0]
    assert (endpoint.ready, endpoint.serving, endpoint.terminating) == expected


def test_only_the_first_address_counts() -> None:
    thing = put(endpoint_slice("a"), "endpoints[0].addresses", ["10.1.0.1", "not an address"])
    assert good(thing).endpoints[0].ip == "10.1.0.1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata.labels", {}),
        ("metadata.labels", None),
        ("metadata.labels", {"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""}),
        ("addressType", "FQDN"),
    ],
)
def test_slices_that_mean_nothing_to_a_proxy_belong_to_no_service(field: str, value: Any) -> None:
    thing = good(put(endpoint_slice("a"), field, value))
    assert (thing.service, thing.endpoints, thing.ports) == ("", (), ())


def test_lists_may_be_null() -> None:
    thing = put(put(endpoint_slice("a"), "endpoints", None), "ports", None)
    assert good(thing) == EndpointSlice("default", "a", "web", Family.V4)


@pytest.mark.parametrize(
    ("addresses", "ips"),
    [
        ([("InternalIP", "fd00::1"), ("InternalIP", "10.0.0.1")], ("fd00::1", "10.0.0.1")),
        ([("ExternalIP", "192.0.2.1"), ("InternalIP", "10.0.0.1")], ("10.0.0.1",)),
        ([("ExternalIP", "192.0.2.1"), ("InternalIP", "fd00::1")], ("fd00::1", "192.0.2.1")),
        ([("InternalIP", "10.0.0.1"), ("InternalIP", "10.0.0.2")], ("10.0.0.1",)),
        ([("Hostname", "n1")], ()),
    ],
)
def test_node_addresses(addresses: list[tuple[str, str]], ips: tuple[str, ...]) -> None:
    wire = [{"type": kind, "address": text} for kind, text in addresses]
    assert good(put(node("n1"), "status.addresses", wire)).ips == ips


def test_nodes_that_are_to_go() -> None:
    thing = put(node("n1"), "metadata.deletionTimestamp", "2026-01-01T00:00:00Z")
    put(thing, "spec.taints", [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}])
    assert (good(thing).deleting, good(thing).excluded_by_autoscaler) == (True, True)
    assert (good(node("n1")).deleting, good(node("n1")).excluded_by_autoscaler) == (False, False)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("010.001.000.005", "10.1.0.5"),
        ("0000000010.1.1.1", "10.1.1.1"),
        ("FD00:0:0:0::1", "fd00::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:010.000.000.001", "10.0.0.1"),
        ("::FFFF:a00:1", "10.0.0.1"),
        *[
            (text, "")
            for text in (
                "",
                "10.0.0",
                "10.0.0.0.1",
                "10.0.0.256",
                "0x0a.0.0.1",
                "10.0.0.1 ",
                "10.0.0.1\n",
                "10.0.0.1\0",
                "١0.0.0.1",
                "²0.0.0.1",
                "1" * 5000 + ".0.0.1",
                "fe80::1%eth0",
                "[fd00::1]",
                "fd00::1.2.3",
                "fd00:::1",
                "\ud800",
            )
        ],
    ],
)
def test_address(text: str, canonical: str) -> None:
    assert address(text) == canonical


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("\t010.1.2.3/08\n", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("FD00::1/64", "fd00::/64"),
        ("::/0", "::/0"),
        ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
        *[(text, "") for text in ("", "/", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/ 8")],
        *[(text, "") for text in ("10.0.0.0/8/8", "fd00::/129", "::ffff:10.0.0.0/8", "10.0.0.0/²", "a/8")],
    ],
)
def test_cidr(text: str, canonical: str) -> None:
    assert cidr(text) == canonical


@pytest.mark.parametrize(
    "thing",
    [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "namespace": "y"}},
        {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "x"}, "spec": 3},
        {},
        [],
        None,
        "Service",
        3,
    ],
)
def test_other_kinds_are_none_of_ours(thing: Any) -> None:
    assert both(thing) == Converted(None, ())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"kind": "Service"', b"[" * 100_000, b'"\\ud800"'])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    converted = convert(data, "Service")
    assert converted.object is None
    assert [problem.ref for problem in converted.problems] == [Ref("Service", "", "")]


def test_head_and_identity_of_anything() -> None:
    thing = put(put(service("web"), "metadata.resourceVersion", "17"), "spec", 3)
    assert head(json.dumps(thing).encode()).metadata.resource_version == "17"
    assert identify(thing) == identify(json.dumps(thing).encode()) == Ref("Service", "default", "web")
    assert head({"kind": 3, "metadata": {"name": "x", "namespace": []}}).metadata.name == "x"
    assert identify(b"{}") == Ref("File", "", "")


def test_service_cidrs_without_those_that_are_none() -> None:
    thing = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.1/12", "nonsense", "FD00:10:96::/108"]},
    }
    found, problems = both(thing)
    assert found == ServiceCIDR("kubernetes", ("10.96.0.0/12", "fd00:10:96::/108"))
    assert [problem.field for problem in problems] == ["spec.cidrs[1]"]
    assert both(put(thing, "metadata.name", "")).object is None


# --- anything at any field --------------------------------------------------------------------------------

TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["None", "Local", "ClientIP", "IPv6", "10.0.0.1", "fd00::1", "::ffff:1.2.3.4", "10.0.0.0/8", "127.1"]
    ),
    st.sampled_from(["-A INPUT", "a\nCOMMIT", "a\0b", "a" * 300, "x;y", "é", "http", "\u202e", "2026-01-01"]),
)
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), TEXT
)
ANYTHING = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3))
)


def places(thing: Any, way: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The way to everything in an object, itself left out."""
    keys: list[str | int] = []
    if isinstance(thing, dict):
        keys += thing
    elif isinstance(thing, list):
        keys += range(len(thing))
    found = [(*way, key) for key in keys]
    return found + [place for key in keys for place in places(thing[key], (*way, key))]


@st.composite
def mutants(draw: st.DrawFn) -> Any:
    thing = copy.deepcopy(draw(st.sampled_from([service("web"), endpoint_slice("web-a"), node("n1")])))
    for key in ("miniproxy.io/ipvs-scheduler", "endpoints.kubernetes.io/last-change-trigger-time"):
        thing["metadata"].setdefault("annotations", {})[key] = draw(TEXT)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(thing)))
        below = thing
        for step in way:
            below = below[step]
        if draw(st.booleans()) and isinstance(below, list):
            below.append(draw(ANYTHING))
        else:
            below[last] = draw(ANYTHING)
    return thing


@settings(max_examples=1500, deadline=None)
@given(mutants())
def test_anything_at_any_field_yields_a_valid_object_or_a_problem(thing: Any) -> None:
    converted = both(thing)
    if converted.object is not None:
        assert_valid(converted.object)
    for problem in converted.problems:
        assert str(problem).isprintable(), "fit for a log and a terminal"
        assert problem.reason


@settings(max_examples=300, deadline=None)
@given(ANYTHING, st.sampled_from(["Service", "EndpointSlice", "Node", "ServiceCIDR", None]))
def test_anything_at_all_is_survived(thing: Any, kind: Any) -> None:
    for raw in (thing, json.dumps(thing).encode()):
        converted = convert(raw, kind)
        if converted.object is not None:
            assert_valid(converted.object)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.ip_addresses().map(str), st.text("0123456789abcdef.:/", max_size=45)))
def test_addresses_agree_with_the_standard_library(text: str) -> None:
    try:
        expected: Any = ipaddress.ip_address(text)
        expected = getattr(expected, "ipv4_mapped", None) or expected
    except ValueError:
        return  # leading zeros are ours alone
    assert ipaddress.ip_address(address(text)) == expected


# --- what planners rely on, said again without the code under test -----------------------------------------

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
DOTTED = re.compile(r"[a-z0-9][a-z0-9.-]{0,252}")


def assert_ip(text: str, family: Family) -> None:
    ip = ipaddress.ip_address(text)
    assert ip.version == family
    assert not ip.is_loopback
    assert not ip.is_unspecified
    assert getattr(ip, "ipv4_mapped", None) is None
    assert address(text) == text


def assert_range(text: str, family: Family) -> None:
    assert ipaddress.ip_network(text, strict=True).version == family


def assert_valid(thing: Object) -> None:
    if isinstance(thing, Service):
        assert LABEL.fullmatch(thing.namespace)
        assert LABEL.fullmatch(thing.name)
        for port in thing.ports:
            assert_service_port(port, thing)
        assert len({(port.name, port.family) for port in thing.ports}) == len(thing.ports)
    elif isinstance(thing, EndpointSlice):
        assert LABEL.fullmatch(thing.namespace)
        assert DOTTED.fullmatch(thing.name)
        assert thing.service == "" or LABEL.fullmatch(thing.service)
        assert thing.triggered >= 0
        for name, protocol, number in thing.ports:
            assert name == "" or LABEL.fullmatch(name)
            assert protocol in ("TCP", "UDP", "SCTP")
            assert 1 <= number <= 65535
        for endpoint in thing.endpoints:
            assert_ip(endpoint.ip, thing.family)
            assert {type(endpoint.ready), type(endpoint.serving), type(endpoint.terminating)} == {bool}
            assert endpoint.node == "" or DOTTED.fullmatch(endpoint.node)
            for hint in (*endpoint.zone_hints, *endpoint.node_hints):
                assert re.fullmatch(r"[A-Za-z0-9._-]+", hint)
    elif isinstance(thing, ServiceCIDR):
        assert DOTTED.fullmatch(thing.name)
        for text in thing.cidrs:
            assert_range(text, Family.of(text))
    else:
        assert DOTTED.fullmatch(thing.name)
        assert re.fullmatch(r"[A-Za-z0-9._-]*", thing.zone)
        assert len({Family.of(ip) for ip in thing.ips}) == len(thing.ips)
        for ip in thing.ips:
            assert_ip(ip, Family.of(ip))
        for pods in thing.pod_cidrs:
            assert_range(pods, Family.of(pods))


def assert_service_port(port: ServicePort, of: Service) -> None:
    assert (port.name.namespace, port.name.name) == (of.namespace, of.name)
    assert port.name.port == "" or LABEL.fullmatch(port.name.port)
    assert port.name.protocol in ("TCP", "UDP", "SCTP")
    assert 1 <= port.port <= 65535
    assert 0 <= port.node_port <= 65535
    assert 0 <= port.health_check_node_port <= 65535
    assert 0 <= port.affinity_seconds <= 86400
    assert re.fullmatch(r"[a-z0-9-]*", port.scheduler)
    for ip in (port.cluster_ip, *port.external_ips, *port.load_balancer_ips):
        assert_ip(ip, port.family)
    for source in port.source_ranges:
        assert_range(source, port.family)
