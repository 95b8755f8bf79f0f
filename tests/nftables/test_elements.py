"""Elements as we encode them are what nft makes of the same text, down to the byte."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miniproxy.kernel.nfnetlink import RawElement, read_table
from miniproxy.kernel.nftables import Nftables
from miniproxy.model import Family
from miniproxy.planner.nft_layout import ANY, LOCAL, Affinity, layout
from miniproxy.planner.nft_script import Elements, spelt
from miniproxy.planner.nftables import Frontend, Table, interval
from miniproxy.transaction import Change

from .inside import Inside, inside

GROUP = Affinity(node_port=True, local=False, seconds=10800, slots=1).name


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, Inside]]:
    """One in which nft writes, and one in which we do."""
    with inside() as by_nft, inside() as by_us:
        for place in (by_nft, by_us):
            for family in Family:
                backend = place.backend(family)
                assert not backend.read()
                table = Table(family, layout(family))
                # Somebody with session affinity, so that its group's map is there.
                seed = Frontend(ANY[family], "tcp", 1, endpoints=(f"{ANY[family]} . 1",), affinity=10800)
                assert [group.name for group in seed.groups()] == [GROUP]
                backend.apply(backend.render([Change(table.key, None, table), Change(seed.key, None, seed)]))
        yield {"nft": by_nft, "us": by_us}


def numbers(family: Family) -> st.SearchStrategy[Any]:
    return st.integers(1, (1 << (128 if family is Family.V6 else 32)) - 1)


def addresses(family: Family) -> st.SearchStrategy[str]:
    make = ipaddress.IPv6Address if family is Family.V6 else ipaddress.IPv4Address
    return numbers(family).map(lambda number: str(make(number)))


@st.composite
def networks(draw: st.DrawFn, family: Family) -> str:
    kind = ipaddress.IPv6Network if family is Family.V6 else ipaddress.IPv4Network
    bits = 128 if family is Family.V6 else 32
    length = draw(st.integers(1, bits))
    return interval(kind((draw(numbers(family)) >> (bits - length) << (bits - length), length)))


@st.composite
def elements(draw: st.DrawFn, family: Family) -> list[tuple[str, str, str]]:
    """One of each kind, as Frontend.elements has them."""
    port = st.integers(1, 65535)
    to = f"{draw(addresses(family))} . {draw(st.sampled_from(('tcp', 'udp', 'sctp')))} . {draw(port)}"
    code = draw(st.sampled_from((0, LOCAL))) + draw(st.integers(0, 655_365_535))
    ip, target = draw(addresses(family)), f"{draw(addresses(family))} . {draw(port)}"
    plain = ("external", "external-local", "refused", "dropped", "guarded", "counted")
    return [
        ("cluster-ips", ip, ""),
        ("node-ips", ip, ""),
        ("hairpin", f"{ip} . {ip}", ""),
        *((name, to, "") for name in plain),
        *((name, f"{to} . {code}", "") for name in ("sizes", "occupied")),
        ("endpoints", f"{to} . {code}", target),
        ("endpoints-16", f"{to} . {code}", target),
        (GROUP, f"{to} . {code}", target),
        ("affinity", f"{to} . {code}", f"goto {GROUP}"),
        ("allowed", f"{to} . {draw(networks(family))}", ""),
    ]


def contents(place: Inside, family: Family) -> dict[str, set[RawElement]]:
    with place.netlink() as netlink:
        table = read_table(netlink, family, "miniproxy")
    assert table
    return {name: set(found) for name, found in table.elements.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), family=st.sampled_from(Family))
def test_the_kernel_gets_what_nft_would_give_it(places: dict[str, Inside], data: st.DataObject, family: Family) -> None:
    """Adds one element of each kind by both ways, compares all that the kernel then holds, and deletes them by ours."""
    one_of_each = data.draw(elements(family))
    where = "ip6 miniproxy" if family is Family.V6 else "ip miniproxy"
    script = "".join(f"add element {where} {name} {{ {spelt(key, value)} }}\n" for name, key, value in one_of_each)
    places["nft"].nft("-f", "-", stdin=script)
    write(places["us"].backend(family), one_of_each, adding=True)
    assert contents(places["us"], family) == contents(places["nft"], family)
    listing = [place.nft("list", "table", *where.split()) for place in places.values()]
    assert listing[0] == listing[1]  # counters are made with the elements, too
    for place in places.values():
        write(place.backend(family), one_of_each, adding=False)


def write(backend: Nftables, elements: list[tuple[str, str, str]], *, adding: bool) -> None:
    deleted = {} if adding else {name: [key] for name, key, _ in elements}
    added = {name: [(key, value)] for name, key, value in elements} if adding else {}
    backend._write(Elements(deleted, added))
