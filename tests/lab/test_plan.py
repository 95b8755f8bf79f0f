"""A lab's plan: pure, the same each time, and consistent in itself."""

from __future__ import annotations

import ipaddress
import re

import pytest

from miniproxy.lab.plan import CLUSTER_CIDRS, LabSpec, Overlay, check, plan

SPECS = [
    LabSpec(name="x", nodes=nodes, pods_per_node=pods, overlay=overlay)
    for nodes, pods in ((1, 1), (2, 4), (3, 2), (32, 64))
    for overlay in ("host-gw", "vxlan")
]


def test_the_plan_of_a_small_lab() -> None:
    spaces = {space.name: space for space in plan(LabSpec(name="x", nodes=2, pods_per_node=1)).namespaces}
    assert list(spaces) == [
        "network",
        "outside",
        "stranger",
        "node1",
        "node2",
        "web-1",
        "web-2",
        "client-1",
        "client-2",
    ]
    assert spaces["network"].links == (
        "link add switch type bridge",
        "link add node1 type veth peer name eth0 netns mp-x-node1",
        "link add node2 type veth peer name eth0 netns mp-x-node2",
        "link add outside type veth peer name eth0 netns mp-x-outside",
        "link add stranger type veth peer name eth0 netns mp-x-stranger",
    )
    assert spaces["node1"].links == (
        "link add cni0 type bridge",
        "link add v-web-1 mtu 1500 type veth peer name eth0 mtu 1500 netns mp-x-web-1",
        "link add v-client-1 mtu 1500 type veth peer name eth0 mtu 1500 netns mp-x-client-1",
    )
    assert spaces["node1"].setup == (
        "link set lo up",
        "addr add 172.30.0.1/24 dev eth0",
        "addr add fd00:30::1/64 dev eth0 nodad",
        "link set eth0 up",
        "addr add 10.244.1.1/24 dev cni0",
        "addr add fd00:244:0:1::1/64 dev cni0 nodad",
        "link set cni0 up",
        "link set v-web-1 master cni0 up",
        "link set v-client-1 master cni0 up",
        "link set v-web-1 type bridge_slave hairpin on",
        "link set v-client-1 type bridge_slave hairpin on",
        "route add default via 172.30.0.254",
        "route add default via fd00:30::254",
        "route add 10.244.2.0/24 via 172.30.0.2 dev eth0",
        "route add fd00:244:0:2::/64 via fd00:30::2 dev eth0",
    )
    assert spaces["web-2"].setup == (
        "link set lo up",
        "addr add 10.244.2.11/24 dev eth0",
        "addr add fd00:244:0:2::11/64 dev eth0 nodad",
        "link set eth0 up",
        "route add default via 10.244.2.1",
        "route add default via fd00:244:0:2::1",
    )
    assert ("net.bridge.bridge-nf-call-iptables", "1") in spaces["node1"].sysctls
    assert ("net.bridge.bridge-nf-call-iptables", "0") in spaces["network"].sysctls


def test_a_vxlan_reaches_every_other_node() -> None:
    spaces = {space.name: space for space in plan(LabSpec(name="x", nodes=3, overlay="vxlan")).namespaces}
    assert spaces["node2"].fdb == (
        "fdb append 02:00:0a:f4:01:00 dev vxlan0 dst 172.30.0.1",
        "fdb append 02:00:0a:f4:03:00 dev vxlan0 dst 172.30.0.3",
    )
    for route in ("10.244.1.0/24 via 10.244.1.0", "fd00:244:0:3::/64 via fd00:244:0:3::"):
        assert f"route add {route} dev vxlan0 onlink" in spaces["node2"].setup


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.nodes}x{spec.pods_per_node}-{spec.overlay}")
def test_every_plan_is_consistent(spec: LabSpec) -> None:
    planned = plan(spec)
    assert planned == plan(spec)
    assert len({space.name for space in planned.namespaces}) == len(planned.namespaces)

    # Each address once, canonical, and each pod's inside of its node's and the cluster's network.
    added = [
        line.split()[2].partition("/")[0]
        for space in planned.namespaces
        for line in space.setup
        if line.startswith("addr add")
    ]
    assert len(added) == len(set(added))
    assert all(str(ipaddress.ip_address(address)) == address for address in added)
    nodes = {node.name: node for node in planned.nodes}
    for pod in planned.pods:
        for ip, own, cluster in zip(pod.ips, nodes[pod.node].pod_cidrs, CLUSTER_CIDRS, strict=True):
            assert ip in added
            assert ipaddress.ip_address(ip) in ipaddress.ip_network(own)
            assert ipaddress.ip_address(ip) in ipaddress.ip_network(cluster)

    # Every link is made inside of a namespace of the lab, to another one of it, with a name the kernel takes.
    names = {f"mp-{spec.name}-{space.name}" for space in planned.namespaces}
    for space in planned.namespaces:
        for line in space.links:
            peer = re.search(r"netns (\S+)$", line)
            assert peer is None or peer[1] in names
            assert len(line.split()[2]) <= 15


def test_services_alternate_between_nodes() -> None:
    servers = plan(LabSpec(nodes=2, pods_per_node=2)).servers
    assert [(pod.name, pod.node) for pod in servers] == [
        ("web-1", "node1"),
        ("web-2", "node2"),
        ("web-3", "node1"),
        ("web-4", "node2"),
    ]


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (LabSpec(name="a-b"), "name"),
        (LabSpec(name=""), "name"),
        (LabSpec(name="abcdefghijklm"), "name"),
        (LabSpec(nodes=0), "nodes"),
        (LabSpec(nodes=33), "nodes"),
        (LabSpec(pods_per_node=0), "pods per node"),
        (LabSpec(http_port=0), "ports"),
        (LabSpec(http_port=80, tcp_port=80), "ports"),
    ],
)
def test_a_spec_that_cannot_be_built_says_why(spec: LabSpec, word: str) -> None:
    (problem,) = check(spec)
    assert problem.startswith(word)
    with pytest.raises(ValueError, match=word):
        plan(spec)


def test_an_unknown_overlay_is_refused() -> None:
    overlay: Overlay = "bird"  # type: ignore[assignment]
    assert check(LabSpec(overlay=overlay)) == ["overlay 'bird': use host-gw or vxlan"]
