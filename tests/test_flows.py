"""Which flows are stale: only those that the change black-holes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from miniproxy.flows import Flow, Flows, Stale
from miniproxy.model import Endpoint, Family, ServicePort, ServicePortName

DNS = ServicePort(
    ServicePortName("kube-system", "dns", "dns", "UDP"),
    Family.V4,
    "10.96.0.10",
    53,
    node_port=30053,
    load_balancer_ips=("192.0.2.1",),
)
KEY = (DNS.name, Family.V4)
A, B, C = (Endpoint(f"10.1.0.{n}", 5353) for n in (1, 2, 3))
NODE = ("172.30.0.2", "127.0.0.1")


@pytest.fixture
def flows() -> Flows:
    return Flows(lambda family: NODE)


def unless(*living: Endpoint, ip: str = "10.96.0.10") -> set[Stale]:
    """Flows to the port's places that none of these answers."""
    places = ((ip, 53), ("192.0.2.1", 53), *((node, 30053) for node in NODE))
    return {Stale(Family.V4, "UDP", where, port, frozenset(map(str, living))) for where, port in places}


def test_flows_of_an_endpoint_that_goes(flows: Flows) -> None:
    flows.change(KEY, DNS, [A, B])
    assert set(flows.change(KEY, DNS, [B])) == unless(B)
    assert flows.change(KEY, DNS, [B]) == []
    assert flows.change(KEY, DNS, [B, C]) == [], "new endpoints take nothing from the others"


def test_all_flows_when_scaled_to_zero(flows: Flows) -> None:
    flows.change(KEY, DNS, [A, B])
    assert set(flows.change(KEY, DNS, [])) == unless()
    assert flows.change(KEY, DNS, []) == []


def test_flows_never_translated_and_those_of_before_when_somebody_serves_at_last(flows: Flows) -> None:
    assert flows.change(KEY, DNS, []) == []
    assert set(flows.change(KEY, DNS, [A])) == unless(A)
    flows.change(KEY, DNS, [])
    assert set(flows.change(KEY, DNS, [B])) == unless(B)


def test_flows_to_an_address_that_is_new(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])
    moved = replace(DNS, cluster_ip="10.96.0.11")
    assert set(flows.change(KEY, moved, [A])) == unless(A, ip="10.96.0.11")
    assert flows.change(KEY, replace(moved, load_balancer_ips=()), [A]) == []


def test_flows_to_the_port_before_when_the_target_port_changes(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])
    assert set(flows.change(KEY, DNS, [replace(A, port=5354)])) == unless(replace(A, port=5354))


def test_an_endpoint_that_drains_or_is_out_of_reach_by_policy_keeps_its_flows(flows: Flows) -> None:
    flows.change(KEY, DNS, [A, B])
    draining = replace(A, ready=False, serving=True, terminating=True)
    assert flows.change(KEY, DNS, [draining, B]) == []
    assert flows.change(KEY, DNS, [replace(A, zone_hints=("elsewhere",)), B]) == []
    assert set(flows.change(KEY, DNS, [replace(draining, serving=False), B])) == unless(B)


def test_where_none_serves_all_that_are_there_keep_their_flows(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])
    assert flows.change(KEY, DNS, [replace(A, ready=False, serving=False)]) == []


def test_a_deleted_service_and_a_renamed_port_keep_their_flows(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])
    assert flows.change(KEY, None, []) == []
    renamed = replace(DNS, name=DNS.name._replace(port="other"))
    assert set(flows.change((renamed.name, Family.V4), renamed, [A])) == unless(A)


def test_tcp_is_left_alone(flows: Flows) -> None:
    tcp = replace(DNS, name=DNS.name._replace(protocol="TCP"))
    assert flows.change((tcp.name, Family.V4), tcp, [A]) == []
    assert flows.change((tcp.name, Family.V4), tcp, []) == []
    assert flows.all(Family.V4) == []


def test_what_went_stale_while_no_agent_ran(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])
    assert set(flows.all(Family.V4)) == unless(A)
    assert flows.all(Family.V6) == []
    flows.change(KEY, DNS, [])
    assert set(flows.all(Family.V4)) == unless(), "its last endpoint may have gone meanwhile"


@pytest.mark.parametrize(
    ("to", "port", "by", "meant"),
    [
        ("10.96.0.10", 53, "10.1.0.2:5353", True),
        ("172.30.0.2", 30053, "10.1.0.2:5353", True),
        ("192.0.2.1", 53, "192.0.2.1:53", True),
        ("10.96.0.10", 53, "10.1.0.1:5353", False),
        ("127.0.0.1", 30053, "10.1.0.1:5353", False),
        ("8.8.8.8", 53, "8.8.8.8:53", False),
        ("8.8.8.8", 30053, "8.8.8.8:30053", False),
        ("10.96.0.10", 54, "10.1.0.2:5353", False),
    ],
)
def test_which_flows_are_meant(flows: Flows, to: str, port: int, by: str, meant: bool) -> None:
    flows.change(KEY, DNS, [A])
    assert any(s.means(Flow(Family.V4, "UDP", to, port, by)) for s in flows.all(Family.V4)) is meant
