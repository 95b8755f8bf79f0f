"""Random but valid objects for a small world: few names, few addresses, so that everything collides often."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from miniproxy.model import (
    EndpointSlice,
    Family,
    Node,
    Protocol,
    Service,
    ServicePort,
    ServicePortName,
    SliceEndpoint,
    SlicePort,
)

NAMES = ("a", "b", "c")
NODES = ("n1", "n2")
ZONES = ("z1", "z2")
PORTS: tuple[tuple[str, Protocol, int], ...] = (("http", "TCP", 80), ("dns", "UDP", 53), ("sig", "SCTP", 99))
FAMILIES = (Family.V4, Family.V6)


def address(family: Family, net: int, host: int) -> str:
    return f"10.{net}.0.{host}" if family is Family.V4 else f"fd00:{net}::{host:x}".removesuffix("0")


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
    """A Service with 0-3 ports in one or both families, every feature on or off."""
    number = NAMES.index(name) + 1
    policies: dict[str, Any] = {
        "internal_local": draw(st.booleans()),
        "external_local": draw(st.booleans()),
        "affinity_seconds": draw(st.sampled_from((0, 0, 10, 10800))),
    }
    external = draw(st.integers(0, 2))
    load_balanced = draw(st.integers(0, 2))
    guarded = draw(st.booleans())
    node_ports = draw(st.booleans())
    checked = draw(st.booleans())
    families = draw(st.sets(st.sampled_from(FAMILIES), min_size=1))
    ports = []
    for port, protocol, port_number in draw(st.lists(st.sampled_from(PORTS), unique=True)):
        for family in sorted(families):
            ranges = (f"{address(family, 7, 0)}/{24 if family is Family.V4 else 64}",)
            ports.append(
                ServicePort(
                    ServicePortName("ns", name, port, protocol),
                    family,
                    address(family, 96, number),
                    port_number,
                    node_port=30000 + 10 * number + PORTS.index((port, protocol, port_number)) if node_ports else 0,
                    external_ips=tuple(address(family, 50 + number, h + 1) for h in range(external)),
                    load_balancer_ips=tuple(address(family, 60 + number, h + 1) for h in range(load_balanced)),
                    source_ranges=ranges if guarded else (),
                    health_check_node_port=32000 + number if checked and policies["external_local"] else 0,
                    **policies,
                )
            )
    return Service("ns", name, tuple(ports))


slice_endpoints = st.builds(
    lambda host, state, node, zones, nodes: (
        host,
        SliceEndpoint(
            "",
            ready=state == "ready",
            serving=state != "unready",
            terminating=state == "draining",
            node=node,
            zone_hints=zones,
            node_hints=nodes,
        ),
    ),
    st.integers(1, 6),
    st.sampled_from(("ready", "ready", "draining", "unready")),
    st.sampled_from(NODES),
    st.sampled_from(((), ("z1",), ("z2",))),
    st.sampled_from(((), (), ("n1",), ("n2",))),
)


@st.composite
def slices(draw: st.DrawFn) -> EndpointSlice:
    """One of a few slices of a Service, with some of its ports and up to four endpoints."""
    service = draw(st.sampled_from(NAMES))
    family = draw(st.sampled_from(FAMILIES))
    listed = draw(st.lists(slice_endpoints, max_size=4))
    ports = draw(st.lists(st.sampled_from(PORTS), unique=True, min_size=1))
    return EndpointSlice(
        "ns",
        f"{service}-{draw(st.sampled_from(('x', 'y')))}-{family.value}",
        service,
        family,
        tuple(SlicePort(name, protocol, 8000 + number) for name, protocol, number in ports),
        tuple(
            SliceEndpoint(
                address(family, 200, host),
                e.ready,
                e.serving,
                e.terminating,
                e.node,
                e.zone_hints,
                e.node_hints,
            )
            for host, e in listed
        ),
    )


nodes = st.builds(
    lambda zone, host: Node("n1", zone, (address(Family.V4, 7, host), address(Family.V6, 7, host))),
    st.sampled_from(ZONES),
    st.integers(1, 2),
)
