"""Which flows are stale: only those that the change black-holes."""

from __future__ import annotations

import msgspec
import pytest

from miniproxy.flows import Flow, Flows, Stale
from miniproxy.model import Family, ServicePort, ServicePortName

DNS = ServicePort(
    ServicePortName("kube-system", "dns", "dns", "UDP"),
    Family.V4,
    "10.96.0.10",
    53,
    node_port=30053,
    load_balancer_ips=("192.0.2.1",),
)
KEY = (DNS.name, Family.V4)
A, B, C = "10.1.0.1:5353", "10.1.0.2:5353", "10.1.0.3:5353"
NODE = ("172.30.0.2", "127.0.0.1")


@pytest.fixture
def flows() -> Flows:
    return Flows(lambda family: NODE)


def answered_by(endpoint: str) -> set[Stale]:
    places = (("10.96.0.10", 53), ("192.0.2.1", 53), ("", 30053))
    return {Stale(Family.V4, "UDP", ip, port, endpoint) for ip, port in places}


def test_flows_of_an_endpoint_that_goes(flows: Flows) -> None:
    flows.change(KEY, DNS, [A, B])
    assert set(flows.change(KEY, DNS, [B])) == answered_by(A)
    assert flows.change(KEY, DNS, [B]) == []
    assert flows.change(KEY, DNS, [B, C]) == [], "new endpoints take nothing from the others"


def test_flows_of_all_endpoints_when_scaled_to_zero_or_deleted(flows: Flows) -> None:
    for port in (DNS, None):
        flows.change(KEY, DNS, [A, B])
        assert set(flows.change(KEY, port, [])) == answered_by(A) | answered_by(B)


def test_flows_never_translated_when_somebody_serves_at_last(flows: Flows) -> None:
    flows.change(KEY, DNS, [])
    places = [("10.96.0.10", 53), ("192.0.2.1", 53), *((ip, 30053) for ip in NODE)]
    untranslated = {Stale(Family.V4, "UDP", ip, port, f"{ip}:{port}") for ip, port in places}
    assert set(flows.change(KEY, DNS, [A])) == untranslated
    flows.change(KEY, DNS, [])
    assert untranslated <= set(flows.change(KEY, DNS, [B]))


def test_flows_to_an_address_that_goes_with_its_endpoint(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])
    moved = msgspec.structs.replace(DNS, cluster_ip="10.96.0.11")
    assert Stale(Family.V4, "UDP", "10.96.0.10", 53, A) in flows.change(KEY, moved, [B])


def test_flows_to_the_port_before_when_the_target_port_changes(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])
    assert set(flows.change(KEY, DNS, ["10.1.0.1:5354"])) == answered_by(A)


def test_tcp_is_left_alone(flows: Flows) -> None:
    tcp = msgspec.structs.replace(DNS, name=DNS.name._replace(protocol="TCP"))
    assert flows.change((tcp.name, Family.V4), tcp, [A]) == []
    assert flows.change((tcp.name, Family.V4), None, []) == []


def test_what_went_stale_while_no_agent_ran(flows: Flows) -> None:
    flows.change(KEY, DNS, [A])

    def flow(to: str, port: int, by: str) -> Flow:
        return Flow(Family.V4, "UDP", to, port, by)

    stale = [flow("10.96.0.10", 53, B), flow("172.30.0.2", 30053, B), flow("192.0.2.1", 53, "192.0.2.1:53")]
    right = [flow("10.96.0.10", 53, A), flow("127.0.0.1", 30053, A)]
    others = [flow("8.8.8.8", 53, "8.8.8.8:53"), flow("8.8.8.8", 30053, "8.8.8.8:30053"), flow("10.96.0.10", 54, B)]
    assert flows.left_over(stale + right + others) == [Stale(*f) for f in stale]


def test_an_address_nobody_serves_is_left_to_its_refusal(flows: Flows) -> None:
    flows.change(KEY, DNS, [])
    assert flows.left_over([Flow(Family.V4, "UDP", "10.96.0.10", 53, "10.96.0.10:53")]) == []
