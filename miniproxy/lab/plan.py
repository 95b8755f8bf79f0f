"""What a lab consists of, as plain data: `LabSpec` in, `Plan` out, nothing touched.

A plan names every namespace with its sysctls and the `ip` commands that furnish it, so it can be read,
compared and tested without being root; `netns.py` makes it real. The shape, for two nodes:

    outside ───┬─ network ─┬─ node1 ─┬─ web-1           network: a bridge (the nodes' switch) that also
    203.0.113.7│  (router) │ .0.1    ├─ web-3 …                  routes to the outside
               │           │         └─ client-1        nodeN:   eth0 on the switch, bridge cni0 for its pods
    stranger ──┘           └─ node2 ─┬─ web-2 …         pods:    one veth each
    198.51.100.7             .0.2    └─ client-2
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

Overlay = Literal["host-gw", "vxlan"]

CLUSTER_CIDRS = ("10.244.0.0/16", "fd00:244::/48")
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:96::/112")
NODE_CIDRS = ("172.30.0.0/24", "fd00:30::/64")
OUTSIDE_IPS = ("203.0.113.7", "fd00:203::7")
# A second client outside: the service "lb" lets only the first one in.
STRANGER_IPS = ("198.51.100.7", "fd00:198::7")
# The router sends load-balancer addresses to node1, as a BGP or L2 announcer would.
LOAD_BALANCER_CIDRS = ("192.0.2.0/24", "fd00:192::/64")

OUTSIDE = "outside"
STRANGER = "stranger"
NETWORK = "network"
MAX_NODES = 32
MAX_PODS_PER_NODE = 64

_OUTSIDE_GATEWAYS = ("203.0.113.1", "fd00:203::1")
_STRANGER_GATEWAYS = ("198.51.100.1", "fd00:198::1")
_CLIENT_HOST = 200
_ROUTER_IPS = ("172.30.0.254", "fd00:30::254")
_VXLAN_OVERHEAD = 50

# Refusals are ICMP messages; the kernel's rate limits would make some of many tries look silent.
_QUIET_ICMP = (
    ("net.ipv4.icmp_ratelimit", "0"),
    ("net.ipv4.icmp_msgs_per_sec", "1000000"),
    ("net.ipv4.icmp_msgs_burst", "1000000"),
    ("net.ipv6.icmp.ratelimit", "0"),
)
# Addresses usable at once: nothing in a lab can own the same one.
_NO_DAD = (
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_ra", "0"),
)
_ROUTER = (
    ("net.ipv4.ip_forward", "1"),
    ("net.ipv6.conf.all.forwarding", "1"),
    # Replies may come back another way (direct routing, VXLAN one way only): not spoofing here.
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
    ("net.ipv4.conf.all.send_redirects", "0"),
    ("net.ipv4.conf.default.send_redirects", "0"),
)


def _bridge_filter(value: str) -> tuple[tuple[str, str], ...]:
    return (
        ("net.bridge.bridge-nf-call-iptables", value),
        ("net.bridge.bridge-nf-call-ip6tables", value),
    )


class LabSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a lab should be. Everything in it is dual stack; the ports are those every pod serves."""

    name: str = "lab"  # 1-12 of a-z 0-9: it prefixes namespace names, "mp-NAME-node1"
    nodes: int = 2
    pods_per_node: int = 4
    overlay: Overlay = "host-gw"  # how nodes reach each other's pods
    http_port: int = 8080
    tcp_port: int = 7000
    udp_port: int = 5300


class Pod(msgspec.Struct, frozen=True):
    """A pod; `ips` is (IPv4, IPv6)."""

    name: str
    node: str
    ips: tuple[str, str]
    serves: bool  # False for the client pods


class Node(msgspec.Struct, frozen=True):
    """A node; `ips` and `pod_cidrs` are (IPv4, IPv6)."""

    name: str
    number: int
    ips: tuple[str, str]
    pod_cidrs: tuple[str, str]


class Namespace(msgspec.Struct, frozen=True):
    """A network namespace and how to furnish it.

    `links` (may reach into other namespaces) are run everywhere before the first of `setup`.
    """

    name: str  # within the lab: "node1"
    sysctls: tuple[tuple[str, str], ...]
    links: tuple[str, ...] = ()  # `ip -batch` lines
    setup: tuple[str, ...] = ()  # `ip -batch` lines
    fdb: tuple[str, ...] = ()  # `bridge -batch` lines, after setup


class Plan(msgspec.Struct, frozen=True):
    spec: LabSpec
    nodes: tuple[Node, ...]
    pods: tuple[Pod, ...]
    namespaces: tuple[Namespace, ...]

    @property
    def servers(self) -> tuple[Pod, ...]:
        """The pods that serve, in the order services take them: they alternate between nodes."""
        return tuple(pod for pod in self.pods if pod.serves)


def netns_name(lab: str, place: str) -> str:
    """The namespace's name for `ip netns`."""
    return f"mp-{lab}-{place}"


def check(spec: LabSpec) -> list[str]:
    """What is wrong with a spec, one sentence each; empty when it can be built."""
    problems = []
    # No dash: "mp-a-" must not be the beginning of another lab's namespaces.
    if not re.fullmatch(r"[a-z0-9]{1,12}", spec.name):
        problems.append(f"name {spec.name!r}: use 1 to 12 of the characters a-z and 0-9")
    if not 1 <= spec.nodes <= MAX_NODES:
        problems.append(f"nodes {spec.nodes}: use 1 to {MAX_NODES}")
    if not 1 <= spec.pods_per_node <= MAX_PODS_PER_NODE:
        problems.append(f"pods per node {spec.pods_per_node}: use 1 to {MAX_PODS_PER_NODE}")
    if spec.overlay not in ("host-gw", "vxlan"):
        problems.append(f"overlay {spec.overlay!r}: use host-gw or vxlan")
    ports = (spec.http_port, spec.tcp_port, spec.udp_port)
    if any(not 1 <= port <= 65535 for port in ports) or spec.http_port == spec.tcp_port:
        problems.append(f"ports {ports}: use 1 to 65535, and another one for TCP than for HTTP")
    return problems


def plan(spec: LabSpec) -> Plan:
    """The whole lab as data. The same spec gives the same plan. Raises ValueError, see `check`."""
    if problems := check(spec):
        raise ValueError("; ".join(problems))
    nodes = tuple(_node(number) for number in range(1, spec.nodes + 1))
    pods = (*_server_pods(spec, nodes), *(_client_pod(node) for node in nodes))
    namespaces = (
        _network(spec, nodes),
        _outside(OUTSIDE, OUTSIDE_IPS, _OUTSIDE_GATEWAYS),
        _outside(STRANGER, STRANGER_IPS, _STRANGER_GATEWAYS),
        *(_node_namespace(spec, node, nodes, pods) for node in nodes),
        *(_pod_namespace(pod, nodes) for pod in pods),
    )
    return Plan(spec, nodes, pods, namespaces)


def _node(number: int) -> Node:
    return Node(
        name=f"node{number}",
        number=number,
        ips=(f"172.30.0.{number}", f"fd00:30::{number}"),
        pod_cidrs=(f"10.244.{number}.0/24", f"fd00:244:0:{number}::/64"),
    )


def _pod_ips(node: Node, host: int) -> tuple[str, str]:
    # The digits of the IPv4 address again, so that a reader sees which belong together.
    return (f"10.244.{node.number}.{host}", f"fd00:244:0:{node.number}::{host}")


def _server_pods(spec: LabSpec, nodes: tuple[Node, ...]) -> tuple[Pod, ...]:
    return tuple(
        Pod(f"web-{1 + row * len(nodes) + column}", node.name, _pod_ips(node, 11 + row), serves=True)
        for row in range(spec.pods_per_node)
        for column, node in enumerate(nodes)
    )


def _client_pod(node: Node) -> Pod:
    return Pod(f"client-{node.number}", node.name, _pod_ips(node, _CLIENT_HOST), serves=False)


def _gateways(node: Node) -> tuple[str, str]:
    """The node's own addresses on its pod bridge: what pods see of traffic that was masqueraded there."""
    return _pod_ips(node, 1)


def _network(spec: LabSpec, nodes: tuple[Node, ...]) -> Namespace:
    routes = [
        f"route add {cidr} via {gateway}"
        for node in nodes
        for cidr, gateway in zip(node.pod_cidrs, node.ips, strict=True)
    ]
    routes += [
        f"route add {cidr} via {gateway}" for cidr, gateway in zip(LOAD_BALANCER_CIDRS, nodes[0].ips, strict=True)
    ]
    return Namespace(
        NETWORK,
        # The switch is not part of any node: its bridge must not take frames through iptables.
        sysctls=(*_NO_DAD, *_ROUTER, *_QUIET_ICMP, *_bridge_filter("0")),
        links=(
            "link add switch type bridge",
            *(
                f"link add {node.name} type veth peer name eth0 netns {netns_name(spec.name, node.name)}"
                for node in nodes
            ),
            *(
                f"link add {client} type veth peer name eth0 netns {netns_name(spec.name, client)}"
                for client in (OUTSIDE, STRANGER)
            ),
        ),
        setup=(
            "link set lo up",
            *(f"link set {node.name} master switch up" for node in nodes),
            *_addresses("switch", _ROUTER_IPS),
            *_addresses(OUTSIDE, _OUTSIDE_GATEWAYS),
            *_addresses(STRANGER, _STRANGER_GATEWAYS),
            *routes,
        ),
    )


def _outside(name: str, ips: tuple[str, str], gateways: tuple[str, str]) -> Namespace:
    return Namespace(name, sysctls=_NO_DAD, setup=_leaf(ips, gateways))


def _addresses(link: str, ips: tuple[str, str]) -> tuple[str, ...]:
    """Gives a link its addresses, IPv4 /24 and IPv6 /64, and sets it up."""
    return (
        f"addr add {ips[0]}/24 dev {link}",
        f"addr add {ips[1]}/64 dev {link} nodad",
        f"link set {link} up",
    )


def _leaf(ips: tuple[str, str], gateways: tuple[str, str]) -> tuple[str, ...]:
    """Somebody with one link, who sends everything to its gateway."""
    return (
        "link set lo up",
        *_addresses("eth0", ips),
        *(f"route add default via {gateway}" for gateway in gateways),
    )


def _node_namespace(spec: LabSpec, node: Node, nodes: tuple[Node, ...], pods: tuple[Pod, ...]) -> Namespace:
    own = [pod for pod in pods if pod.node == node.name]
    others = [other for other in nodes if other is not node]
    between = _vxlan_routes(node, others) if spec.overlay == "vxlan" else _host_gw_routes(others)
    vxlan_link = (f"link add vxlan0 address {_vtep_mac(node)} mtu {_pod_mtu(spec)} type vxlan id 244 "
                  f"local {node.ips[0]} dstport 4789 nolearning dev eth0",)  # fmt: skip
    return Namespace(
        node.name,
        # Two pods of one node talk over its bridge: their replies must pass iptables to be un-NATed.
        sysctls=(*_NO_DAD, *_ROUTER, *_QUIET_ICMP, *_bridge_filter("1")),
        links=(
            "link add cni0 type bridge",
            *(
                f"link add {_veth(pod)} mtu {_pod_mtu(spec)} type veth "
                f"peer name eth0 mtu {_pod_mtu(spec)} netns {netns_name(spec.name, pod.name)}"
                for pod in own
            ),
        ),
        setup=(
            "link set lo up",
            *_addresses("eth0", node.ips),
            *_addresses("cni0", _gateways(node)),
            # hairpin: a pod that reaches itself through its service comes back by the port it left by.
            *(f"link set {_veth(pod)} master cni0 up" for pod in own),
            *(f"link set {_veth(pod)} type bridge_slave hairpin on" for pod in own),
            *(f"route add default via {router}" for router in _ROUTER_IPS),
            *(vxlan_link if spec.overlay == "vxlan" else ()),
            *between,
        ),
        fdb=tuple(
            f"fdb append {_vtep_mac(other)} dev vxlan0 dst {other.ips[0]}"
            for other in others
            if spec.overlay == "vxlan"
        ),
    )


def _host_gw_routes(others: list[Node]) -> list[str]:
    return [
        f"route add {cidr} via {gateway} dev eth0"
        for other in others
        for cidr, gateway in zip(other.pod_cidrs, other.ips, strict=True)
    ]


def _vxlan_routes(node: Node, others: list[Node]) -> list[str]:
    """Flannel's way: each node is one MAC behind vxlan0, its pod network's first address the gateway."""
    commands = [
        f"addr add 10.244.{node.number}.0/32 dev vxlan0",
        f"addr add fd00:244:0:{node.number}::/128 dev vxlan0 nodad",
        "link set vxlan0 up",
    ]
    for other in others:
        for cidr in other.pod_cidrs:
            gateway = cidr.partition("/")[0]
            commands.append(f"neigh add {gateway} lladdr {_vtep_mac(other)} dev vxlan0 nud permanent")
            commands.append(f"route add {cidr} via {gateway} dev vxlan0 onlink")
    return commands


def _pod_namespace(pod: Pod, nodes: tuple[Node, ...]) -> Namespace:
    node = next(node for node in nodes if node.name == pod.node)
    return Namespace(pod.name, sysctls=_NO_DAD, setup=_leaf(pod.ips, _gateways(node)))


def _veth(pod: Pod) -> str:
    return f"v-{pod.name}"


def _vtep_mac(node: Node) -> str:
    return f"02:00:0a:f4:{node.number:02x}:00"


def _pod_mtu(spec: LabSpec) -> int:
    return 1500 - _VXLAN_OVERHEAD if spec.overlay == "vxlan" else 1500
