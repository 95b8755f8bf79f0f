"""The iptables planner: the golden objects give the golden rules, and each setting shows where it should."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Batch, Endpoint, Family, Kind, Node, Object, Service, ServicePort, ServicePortName
from miniproxy.planner import iptables, names
from miniproxy.planner.iptables import Chain, DispatchChain, DispatchRule
from miniproxy.policy import categorize
from miniproxy.sources.wire import convert
from tests.fake_iptables import FakeIptables
from tests.golden_rules import differences, golden

NODE = Node("n1", "z1", ("172.30.0.2", "fd00:30::2"), ("10.128.1.0/24", "fd00:128:1::/64"))
SETTINGS = Settings(node_name="n1", cluster_cidrs=("10.128.0.0/9", "fd00:128::/32"))
NAME = ServicePortName("ns", "svc", "http", "TCP")


def golden_objects() -> list[Object]:
    files: tuple[tuple[Kind, str], ...] = (("Service", "services.json"), ("EndpointSlice", "endpointslices.json"))
    converted = [convert(item, kind) for kind, file in files for item in json.loads(golden(file))["items"]]
    converted.append(convert(json.loads(golden("node.json"))))
    assert [c.problems for c in converted if c.problems] == []
    return [c.object for c in converted if c.object]


@pytest.mark.parametrize(("family", "file"), [(Family.V4, "iptables-save.txt"), (Family.V6, "ip6tables-save.txt")])
def test_golden_objects_give_the_golden_rules(family: Family, file: str) -> None:
    agent = Agent(SETTINGS, iptables, {family: FakeIptables()})
    agent.handle(Batch(tuple(golden_objects()), synced=True))
    agent.replan()
    shown = iptables.show(agent.reconcilers[family].desired.values())
    assert differences(golden(file), shown) == []


def test_chain_names_are_kube_proxys() -> None:
    nginx = ServicePortName("default", "nginx-deployment", "http", "TCP")
    assert names.service_suffix(nginx) == "SA755BF2EJWCXKH5"
    assert names.endpoint_chain(nginx, Endpoint("10.244.0.3", 80)) == "KUBE-SEP-SDM4OGM2YG5A4OCW"
    pod08 = ServicePortName("default", "nginx-pod08", "", "TCP")
    assert names.service_suffix(pod08) == "DDZHMK5AO3JF6KIZ"
    assert names.endpoint_chain(pod08, Endpoint("10.100.85.246", 80)) == "KUBE-SEP-ATSP76LQOJHSORE7"
    assert names.endpoint_chain(pod08, Endpoint("10.100.85.253", 80)) == "KUBE-SEP-FXZXKRS4RXLGILD5"


def settings(**fields: Any) -> Settings:
    return msgspec.structs.replace(SETTINGS, **fields)


def rules_of(chain: str, settings: Settings, **port: Any) -> list[str]:
    """The rules of the service's chain of that kind ("SVC", "EXT", …), with one endpoint elsewhere."""
    service = ServicePort(NAME, Family.V4, "10.96.0.1", 80, **port)
    serving = categorize(service, [Endpoint("10.1.0.1", 8080, node="n2")], NODE)
    found = [o for o in iptables.plan(service, serving, settings, NODE) if isinstance(o, Chain)]
    return [rule for o in found if o.name.startswith(f"KUBE-{chain}-") for rule in o.rules]


@pytest.mark.parametrize(
    ("fields", "masqueraded"),
    [
        ({}, "! -s 10.128.0.0/9 -d 10.96.0.1/32 -p tcp"),
        ({"cluster_cidrs": ()}, None),
        ({"masquerade_all": True}, "-d 10.96.0.1/32 -p tcp"),
        ({"detect_local_mode": "NodeCIDR"}, "! -s 10.128.1.0/24 -d 10.96.0.1/32 -p tcp"),
        ({"detect_local_mode": "BridgeInterface", "bridge_interface": "cni0"}, "-d 10.96.0.1/32 ! -i cni0 -p tcp"),
        (
            {"detect_local_mode": "InterfaceNamePrefix", "interface_name_prefix": "cali"},
            "-d 10.96.0.1/32 ! -i cali+ -p tcp",
        ),
    ],
)
def test_who_is_masqueraded_on_the_way_to_a_cluster_ip(fields: dict[str, Any], masqueraded: str | None) -> None:
    found = [r for r in rules_of("SVC", settings(**fields)) if r.endswith("-j KUBE-MARK-MASQ")]
    assert [r.split(" -m comment")[0] for r in found] == ([masqueraded] if masqueraded else [])


@pytest.mark.parametrize(
    ("fields", "inside"),
    [
        ({}, "-s 10.128.0.0/9"),
        ({"cluster_cidrs": ()}, None),
        ({"detect_local_mode": "BridgeInterface", "bridge_interface": "cni0"}, "-i cni0"),
        ({"detect_local_mode": "InterfaceNamePrefix", "interface_name_prefix": "cali"}, "-i cali+"),
    ],
)
def test_pods_take_the_short_way_to_local_external_addresses(fields: dict[str, Any], inside: str | None) -> None:
    rules = rules_of("EXT", settings(**fields), node_port=30000, external_local=True)
    found = [r for r in rules if "pod traffic for" in r]
    assert [r.split(" -m comment")[0] for r in found] == ([inside] if inside else [])


TAIL = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
LOCAL = ("127.0.0.1", "172.30.0.2", "192.168.5.6", "::1", "fd00:30::2")


@pytest.mark.parametrize(
    ("fields", "family", "want"),
    [
        ({}, Family.V4, [f"{TAIL} -m addrtype --dst-type LOCAL"]),
        ({"localhost_node_ports": False}, Family.V4, [f"! -d 127.0.0.0/8 {TAIL} -m addrtype --dst-type LOCAL"]),
        ({}, Family.V6, [f"! -d ::1/128 {TAIL} -m addrtype --dst-type LOCAL"]),
        ({"node_port_addresses": ("0.0.0.0/0",)}, Family.V4, [f"{TAIL} -m addrtype --dst-type LOCAL"]),
        ({"node_port_addresses": ("primary",)}, Family.V4, [f"-d 172.30.0.2/32 {TAIL}"]),
        ({"node_port_addresses": ("primary",)}, Family.V6, [f"-d fd00:30::2/128 {TAIL}"]),
        (
            {"node_port_addresses": ("127.0.0.0/8", "192.168.0.0/16")},
            Family.V4,
            [f"-d 127.0.0.1/32 {TAIL}", f"-d 192.168.5.6/32 {TAIL}"],
        ),
        (
            {"node_port_addresses": ("127.0.0.0/8", "192.168.0.0/16"), "localhost_node_ports": False},
            Family.V4,
            [f"-d 192.168.5.6/32 {TAIL}"],
        ),
        # CIDRs of the other family only: this one keeps the default.
        (
            {"node_port_addresses": ("192.168.0.0/16",)},
            Family.V6,
            [f"! -d ::1/128 {TAIL} -m addrtype --dst-type LOCAL"],
        ),
    ],
)
def test_where_node_ports_answer(fields: dict[str, Any], family: Family, want: list[str]) -> None:
    frame = iptables.frame(settings(**fields), NODE, family, LOCAL)
    (services,) = (o for o in frame if isinstance(o, DispatchChain) and o.key[1:] == ("nat", "KUBE-SERVICES"))
    assert list(services.tail) == [f"{rule} -j KUBE-NODEPORTS" for rule in want]


def test_the_mark_is_configurable() -> None:
    frame = iptables.frame(settings(masquerade_bit=3), NODE, Family.V4)
    assert Chain("nat", "KUBE-MARK-MASQ", ("-j MARK --set-xmark 0x8/0x8",)) in frame


def test_liberal_conntrack_lets_invalid_packets_pass() -> None:
    for liberal in (True, False):
        frame = iptables.frame(settings(conntrack_tcp_be_liberal=liberal), NODE, Family.V4)
        (forward,) = (o for o in frame if isinstance(o, Chain) and o.name == "KUBE-FORWARD")
        assert ("-m conntrack --ctstate INVALID -j DROP" in forward.rules) is not liberal


def test_udp_tcp_and_sctp_may_share_a_node_port() -> None:
    keys = set()
    for protocol in ("TCP", "UDP", "SCTP"):
        name = ServicePortName("ns", "svc", protocol.lower(), protocol)
        service = ServicePort(name, Family.V4, "10.96.0.1", 53, node_port=30053)
        serving = categorize(service, [Endpoint("10.1.0.1", 53)], NODE)
        keys |= {o.key for o in iptables.plan(service, serving, SETTINGS, NODE) if isinstance(o, DispatchRule)}
    assert len(keys) == 6


def test_an_object_known_twice_is_known_once() -> None:
    """A second hand-over of everything leaves nothing to write."""
    kernel = FakeIptables()
    agent = Agent(SETTINGS, iptables, {Family.V4: kernel})
    for _ in range(2):
        agent.handle(Batch(tuple(golden_objects()), synced=True))
        agent.sync()
    assert len(kernel.sent) == 1
    gone = tuple(o.ref for o in golden_objects() if isinstance(o, Service))
    agent.handle(Batch(deletes=gone))
    agent.sync()
    assert not [c for t in kernel.tables.values() for c in t if c.startswith(("KUBE-SVC-", "KUBE-SEP-", "KUBE-EXT-"))]
