"""Which endpoints serve which traffic: one row per rule of kube-proxy's CategorizeEndpoints."""

from __future__ import annotations

import pytest

from miniproxy.model import Endpoint, Family, Node, ServicePort, ServicePortName
from miniproxy.policy import categorize

NODE = Node("n1", zone="z1")


def service(**policies: object) -> ServicePort:
    name = ServicePortName("ns", "svc", "http", "TCP")
    fields: dict[str, object] = {"name": name, "family": Family.V4, "cluster_ip": "10.0.0.1", "port": 80}
    return ServicePort(**{**fields, **policies})  # type: ignore[arg-type]


def endpoint(number: int, state: str = "ready", node: str = "n2", zones: str = "", nodes: str = "") -> Endpoint:
    ready = state == "ready"
    serving = state in ("ready", "draining")
    terminating = state in ("draining", "dead")
    return Endpoint(
        f"10.1.0.{number}", 80, ready, serving, terminating, node, tuple(zones.split()), tuple(nodes.split())
    )


E = endpoint
CLUSTER: dict[str, object] = {}
INTERNAL_LOCAL: dict[str, object] = {"internal_local": True}
EXTERNAL_LOCAL: dict[str, object] = {"external_local": True, "node_port": 30000}


@pytest.mark.parametrize(
    ("why", "policies", "endpoints", "cluster", "local", "anybody"),
    [
        ("nobody", CLUSTER, [], [], [], False),
        ("ready ones serve", CLUSTER, [E(1), E(2, "unready")], [1], [], True),
        ("draining ones only if nobody is ready", CLUSTER, [E(1), E(2, "draining")], [1], [], True),
        ("draining ones rather than nobody", CLUSTER, [E(1, "draining"), E(2, "dead")], [1], [], True),
        ("unready ones never", CLUSTER, [E(1, "unready"), E(2, "dead")], [], [], False),
        ("zone hints", CLUSTER, [E(1, zones="z1"), E(2, zones="z2")], [1], [], True),
        ("zone hints on all or none", CLUSTER, [E(1, zones="z1"), E(2)], [1, 2], [], True),
        ("no hint for this zone", CLUSTER, [E(1, zones="z2"), E(2, zones="z3")], [1, 2], [], True),
        ("unready ones need no hint", CLUSTER, [E(1, zones="z1"), E(2, "unready")], [1], [], True),
        ("hinted but unready", CLUSTER, [E(1, "unready", zones="z1"), E(2, zones="z2")], [2], [], True),
        ("node before zone", CLUSTER, [E(1, zones="z1", nodes="n1"), E(2, zones="z1", nodes="n2")], [1], [], True),
        ("node else zone", CLUSTER, [E(1, zones="z1", nodes="n3"), E(2, zones="z2", nodes="n2")], [1], [], True),
        ("draining ignore hints", CLUSTER, [E(1, "draining", zones="z2")], [1], [], True),
        ("internal local", INTERNAL_LOCAL, [E(1, node="n1"), E(2)], [], [1], True),
        ("internal local, none here", INTERNAL_LOCAL, [E(2)], [], [], True),
        ("internal local, nobody", INTERNAL_LOCAL, [E(2, "unready")], [], [], False),
        ("external local", EXTERNAL_LOCAL, [E(1, node="n1"), E(2)], [1, 2], [1], True),
        ("external local, none here", EXTERNAL_LOCAL, [E(2)], [2], [], True),
        ("external local draining", EXTERNAL_LOCAL, [E(1, "draining", node="n1"), E(2)], [2], [1], True),
        ("local ready before draining", EXTERNAL_LOCAL, [E(1, "draining", node="n1"), E(2, node="n1")], [2], [2], True),
        ("local outside the topology", EXTERNAL_LOCAL, [E(1, node="n1", zones="z2"), E(2, zones="z1")], [2], [1], True),
        ("unused policy counts not", {"external_local": True}, [E(1, node="n1"), E(2)], [1, 2], [], True),
    ],
)  # fmt: skip
def test_categorize(
    why: str,
    policies: dict[str, object],
    endpoints: list[Endpoint],
    cluster: list[int],
    local: list[int],
    anybody: bool,
) -> None:
    serving = categorize(service(**policies), endpoints, NODE)
    numbers = [[int(e.ip.rsplit(".")[-1]) for e in part] for part in serving[:3]]
    assert numbers[0] == cluster
    assert numbers[1] == local
    assert numbers[2] == sorted(set(cluster) | set(local))
    assert serving.any is anybody


def test_order_does_not_matter() -> None:
    endpoints = [E(n, node=f"n{n % 3}") for n in range(1, 12)]
    svc = service(**EXTERNAL_LOCAL)
    assert categorize(svc, endpoints, NODE) == categorize(svc, reversed(endpoints), NODE)


def test_a_node_without_a_name_has_no_local_endpoints() -> None:
    assert categorize(service(**INTERNAL_LOCAL), [E(1, node="")], Node("")).local == ()
