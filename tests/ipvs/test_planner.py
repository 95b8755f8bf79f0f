"""The IPVS planner: the golden objects give the golden state, and each exception is needed."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniproxy.config import Settings
from miniproxy.model import (
    Batch,
    Endpoint,
    Family,
    Kind,
    Node,
    Object,
    Service,
    ServicePort,
    ServicePortName,
)
from miniproxy.planner import ipvs
from miniproxy.planner.iptables import Chain
from miniproxy.planner.ipvs_text import (
    DummyLink,
    IpSet,
    RealServer,
    SetEntry,
    VirtualAddress,
    VirtualServer,
    owned,
    parse_command,
    render,
    sections_of,
)
from miniproxy.policy import categorize
from miniproxy.sources.wire import convert
from miniproxy.tracker import Tracker
from miniproxy.transaction import Change
from tests.golden_rules import golden

from . import golden_state

NODE = Node(
    "n1",
    "z1",
    ("172.30.0.2", "fd00:30::2"),
    ("10.128.1.0/24", "fd00:128:1::/64"),
    local=golden_state.NODE_ADDRESSES,
)
SETTINGS = Settings(mode="ipvs", node_name="n1", cluster_cidrs=("10.128.0.0/9", "fd00:128::/32"))
NAME = ServicePortName("ns", "svc", "http", "TCP")


def golden_objects() -> list[Object]:
    files: tuple[tuple[Kind, str], ...] = (("Service", "services.json"), ("EndpointSlice", "endpointslices.json"))
    converted = [convert(item, kind) for kind, file in files for item in json.loads(golden(file))["items"]]
    converted.append(convert(json.loads(golden("node.json"))))
    return [c.object for c in converted if c.object]


@pytest.fixture(scope="module")
def planned() -> dict[Family, list[Any]]:
    """Everything planned for the golden objects, without repetitions."""
    tracker = Tracker("n1")
    tracker.apply(Batch(tuple(golden_objects())))
    found: dict[Family, list[Any]] = {f: list(ipvs.frame(SETTINGS, NODE, f)) for f in Family}
    for port in tracker.ports():
        serving = categorize(port, tracker.endpoints((port.name, port.family)), NODE)
        found[port.family] += ipvs.plan(port, serving, SETTINGS, NODE)
    for objects in found.values():
        assert len({o.key for o in objects}) == len(set(objects)), "two objects with one identity differ"
    return {family: list(dict.fromkeys(objects)) for family, objects in found.items()}


def of(planned: dict[Family, list[Any]], kind: type) -> list[Any]:
    return [o for objects in planned.values() for o in objects if isinstance(o, kind)]


def test_virtual_servers_are_kube_proxys(planned: dict[Family, list[Any]]) -> None:
    assert golden_state.server_differences(of(planned, VirtualServer)) == []


def test_kube_ipvs0_holds_kube_proxys_addresses(planned: dict[Family, list[Any]]) -> None:
    assert {o.address for o in of(planned, VirtualAddress)} == golden_state.addresses()
    assert set(of(planned, DummyLink)) == {DummyLink("kube-ipvs0")}


def test_sets_are_kube_proxys_and_two_more(planned: dict[Family, list[Any]]) -> None:
    extra = set(of(planned, IpSet)) - golden_state.sets()[0]
    assert golden_state.sets()[0] <= set(of(planned, IpSet))
    assert {o.name for o in extra} == {ipvs.set_name(n, f) for n in golden_state.OUR_SETS for f in Family}
    assert all(len(o.name) <= 31 for o in of(planned, IpSet))


def test_set_entries_are_kube_proxys(planned: dict[Family, list[Any]]) -> None:
    assert golden_state.entry_differences(of(planned, SetEntry)) == []


@pytest.mark.parametrize("family", Family)
def test_iptables_frame_is_kube_proxys(planned: dict[Family, list[Any]], family: Family) -> None:
    assert golden_state.rule_differences(family, ipvs.show(planned[family])) == []


def test_every_exception_is_needed(planned: dict[Family, list[Any]]) -> None:
    want = golden_state.servers()
    got = {o.key[1]: o for o in of(planned, VirtualServer)}
    assert {key for key in want if want[key] != got[key]} == golden_state.POLICY_BROKEN
    assert golden_state.sets()[1] - set(of(planned, SetEntry)) == {
        SetEntry(*entry) for entry in golden_state.UNREACHABLE_ENTRIES
    }
    ours = {(o.set, o.entry) for o in of(planned, SetEntry) if o.set in golden_state.OUR_SETS}
    assert ours == {
        ("KUBE-CLUSTER-IP-NO-LOCAL", "10.97.0.15,tcp:80"),
        ("KUBE-CLUSTER-IP-NO-LOCAL", "10.97.0.24,tcp:80"),
        ("KUBE-EXTERNAL-NO-LOCAL", "172.30.0.2,tcp:30005"),
        ("KUBE-EXTERNAL-NO-LOCAL", "172.30.9.2,tcp:30005"),
        ("KUBE-EXTERNAL-NO-LOCAL", "172.30.0.2,tcp:30024"),
        ("KUBE-EXTERNAL-NO-LOCAL", "172.30.9.2,tcp:30024"),
        ("KUBE-EXTERNAL-NO-LOCAL", "192.0.2.24,tcp:80"),
    }


# -- settings and fields


def settings(**fields: Any) -> Settings:
    return msgspec.structs.replace(SETTINGS, **fields)


def plan(chosen: Settings = SETTINGS, node: Node = NODE, **port: Any) -> list[Any]:
    service = ServicePort(NAME, Family.V4, "10.96.0.1", 80, **port)
    serving = categorize(service, [Endpoint("10.1.0.1", 8080, node="n2")], node)
    return list(ipvs.plan(service, serving, chosen, node))


@pytest.mark.parametrize(
    ("accepted", "addresses"),
    [
        ((), ["172.30.0.2", "172.30.9.2"]),
        (("0.0.0.0/0",), ["172.30.0.2", "172.30.9.2"]),
        (("primary",), ["172.30.0.2"]),
        (("172.30.9.0/24",), ["172.30.9.2"]),
        (("127.0.0.0/8",), []),
        (("fd00::/16",), ["172.30.0.2", "172.30.9.2"]),  # says nothing about this family
    ],
)
def test_node_ports_answer_on_these_addresses(accepted: tuple[str, ...], addresses: list[str]) -> None:
    found = plan(settings(node_port_addresses=accepted), node_port=30000)
    assert [o.address for o in found if isinstance(o, VirtualServer) and o.port == 30000] == addresses


@pytest.mark.parametrize(
    ("annotation", "scheduler", "flags"),
    [("", "wrr", ""), ("lc", "lc", ""), ("mh,mh-port,mh-fallback", "mh", "mh-fallback,mh-port")],
)
def test_scheduler(annotation: str, scheduler: str, flags: str) -> None:
    (server,) = (o for o in plan(settings(ipvs_scheduler="wrr"), scheduler=annotation) if isinstance(o, VirtualServer))
    assert (server.scheduler, server.flags) == (scheduler, flags)


@pytest.mark.parametrize(("annotation", "flags"), [("", "mh-port"), ("mh", "")])
def test_mh_hashes_ports_too_where_it_is_configured_for_all(annotation: str, flags: str) -> None:
    (server,) = (o for o in plan(settings(ipvs_scheduler="mh"), scheduler=annotation) if isinstance(o, VirtualServer))
    assert (server.scheduler, server.flags) == ("mh", flags)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "! -s 10.128.0.0/9 {} dst,dst -j KUBE-MARK-MASQ"),
        ({"masquerade_all": True}, "{} dst,dst -j KUBE-MARK-MASQ"),
        ({"cluster_cidrs": ()}, "{} src,dst -j KUBE-MARK-MASQ"),
        (
            {"detect_local_mode": "InterfaceNamePrefix", "interface_name_prefix": "cali"},
            "! -i cali+ {} dst,dst -j KUBE-MARK-MASQ",
        ),
    ],
)
def test_who_is_masqueraded_on_the_way_to_a_cluster_ip(fields: dict[str, Any], rule: str) -> None:
    match = (
        '-m comment --comment "Kubernetes service cluster ip + port for masquerade purpose"'
        " -m set --match-set KUBE-CLUSTER-IP"
    )
    frame = ipvs.frame(settings(**fields), NODE, Family.V4)
    (services,) = (o for o in frame if isinstance(o, Chain) and o.key == ("chain", "nat", "KUBE-SERVICES"))
    assert rule.format(match) in services.rules


def test_without_known_pods_local_policy_drops_everybody_else() -> None:
    frame = ipvs.frame(settings(cluster_cidrs=()), NODE, Family.V4)
    (firewall,) = (o for o in frame if isinstance(o, Chain) and o.name == "KUBE-PROXY-FIREWALL")
    assert firewall.rules[-1].startswith("-m conntrack --ctstate NEW")


def test_a_vip_that_is_the_nodes_own_is_not_bound_again() -> None:
    found = plan(external_ips=("172.30.9.2", "198.18.0.1"))
    assert {o.address for o in found if isinstance(o, VirtualAddress)} == {"10.96.0.1", "198.18.0.1"}


def test_a_cluster_ip_is_bound_whoever_else_has_it() -> None:
    """Node-local DNS has it on a link of its own, and may go."""
    found = plan(node=msgspec.structs.replace(NODE, local=(*NODE.local, "10.96.0.1")))
    assert [o.address for o in found if isinstance(o, VirtualAddress)] == ["10.96.0.1"]


# -- text


def change(before: Any, after: Any) -> Change:
    return Change((after or before).key, before, after)


def lines(*changes: Change) -> dict[str, list[str]]:
    return {section.tool: section.lines for section in sections_of(render(changes))}


def server(*hosts: int, protocol: Any = "TCP", **fields: Any) -> VirtualServer:
    reals = tuple(RealServer(f"10.1.0.{host}", 8080) for host in hosts)
    return VirtualServer(protocol, "10.96.0.1", 80, fields.pop("scheduler", "rr"), servers=reals, **fields)


def test_a_removed_tcp_server_keeps_its_connections_others_go_at_once() -> None:
    assert lines(change(server(1, 2), server(1)))["ipvsadm"] == ["-e -t 10.96.0.1:80 -r 10.1.0.2:8080 -m -w 0"]
    udp = change(server(1, 2, protocol="UDP"), server(1, protocol="UDP"))
    assert lines(udp)["ipvsadm"] == ["-d -u 10.96.0.1:80 -r 10.1.0.2:8080"]


def test_a_virtual_server_is_edited_only_where_it_differs() -> None:
    assert lines(change(server(1), server(1, scheduler="lc", timeout=60)))["ipvsadm"] == [
        "-E -t 10.96.0.1:80 -s lc -p 60"
    ]
    assert lines(change(None, server(1)))["ipvsadm"] == [
        "-A -t 10.96.0.1:80 -s rr",
        "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 1",
    ]
    assert lines(change(server(1), None))["ipvsadm"] == ["-D -t 10.96.0.1:80"]


def test_a_vip_answers_only_while_all_that_serves_it_is_there() -> None:
    objects = (server(1), VirtualAddress("10.96.0.1"), SetEntry("KUBE-CLUSTER-IP", "10.96.0.1,tcp:80"))
    comes = [section.tool for section in sections_of(render([change(None, o) for o in objects]))]
    assert comes == ["ipset", "ipvsadm", "ip"]
    goes = [section.tool for section in sections_of(render([change(o, None) for o in objects]))]
    assert goes == ["ip", "ipvsadm", "ipset"]


names = st.sampled_from(("rr", "wlc", "mh"))
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
ports = st.integers(1, 65535)
virtual_servers = st.builds(
    VirtualServer,
    st.sampled_from(("TCP", "UDP", "SCTP")),
    addresses,
    ports,
    names,
    st.sampled_from(("", "mh-port", "mh-fallback,mh-port")),
    st.integers(0, 86400),
    st.just(()),
)
real_servers = st.builds(RealServer, addresses, ports, st.just(1), st.just("m"))


@given(virtual_servers, st.lists(real_servers, max_size=4, unique_by=lambda s: (s.address, s.port)))
def test_what_is_written_can_be_read(service: VirtualServer, reals: list[RealServer]) -> None:
    full = service._replace(servers=tuple(reals))
    commands = [parse_command(line) for line in lines(change(None, full))["ipvsadm"]]
    assert commands[0].service == service
    assert [c.real for c in commands[1:]] == reals


def test_what_is_ours() -> None:
    entries = {("KUBE-CLUSTER-IP", "10.96.0.1,tcp:80"), ("KUBE-NODE-PORT-TCP", "30000")}
    vips, own = {"10.96.0.9"}, {"172.30.0.2"}
    base = server(1)
    assert owned(base, vips, own, entries)
    assert owned(base._replace(address="10.96.0.9", port=1), vips, own, entries)
    assert owned(base._replace(address="172.30.0.2", port=30000), vips, own, entries)
    for foreign in (
        base._replace(port=81),
        base._replace(protocol="UDP"),
        base._replace(address="172.30.0.2", port=8443),
        base._replace(address="198.18.7.7", port=30000),
    ):
        assert not owned(foreign, vips, own, entries)


def annotated(value: str) -> ServicePort:
    """A golden service with the annotation, as the API would serve it."""
    found = next(o for o in json.loads(golden("services.json"))["items"] if o["metadata"]["name"] == "cip")
    found["metadata"]["annotations"] = {"miniproxy.io/ipvs-scheduler": value}
    service = convert(found, "Service").object
    assert isinstance(service, Service)
    return service.ports[0]


@pytest.mark.parametrize("value", ["rr", "wlc", "my-own", "sh,sh-port", "mh,mh-port,mh-fallback"])
def test_the_annotation_names_a_scheduler_and_its_flags(value: str) -> None:
    assert annotated(value).scheduler == value


@pytest.mark.parametrize("value", ["", "RR", "rr -p 1", "rr,mh-port", "sh,sh-what", "a" * 16, "mh,", "rr\n-D"])
def test_other_annotations_are_not_taken(value: str) -> None:
    assert annotated(value).scheduler == ""
