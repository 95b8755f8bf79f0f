"""Who gets which connection: even distribution, and session affinity that holds. Real connections, in a namespace
where all addresses of 10.200.0.0/16 (endpoints) and 10.201.0.0/16 (clients) are local.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from miniproxy.config import Settings
from miniproxy.model import Endpoint, Family, Node, ServicePort, ServicePortName
from miniproxy.planner import nftables
from miniproxy.policy import Serving
from miniproxy.reconciler import Reconciler

from .inside import Inside, inside

SETTINGS = Settings(mode="nftables", node_name="n1", cluster_cidrs=("10.201.0.0/16", "fd00:201::/64"))
NODE = Node("n1", ips=("10.201.0.1", "fd00:201::1"))
VIP = {Family.V4: "10.96.0.1", Family.V6: "fd00:96::1"}
# 99 % quantiles of the chi-square distribution, by degrees of freedom.
CRITICAL = {1: 6.635, 2: 9.210, 6: 16.812, 32: 53.486, 49: 74.919}
NODE_PORT = 30080


class Bench:
    """One service, its endpoints and its clients."""

    def __init__(self, inside: Inside, family: Family = Family.V4) -> None:
        self.inside = inside
        self.family = family
        self.restart()

    def restart(self) -> None:
        """Another agent takes over, which knows only what it reads."""
        self.reconciler = Reconciler(self.inside.backend(self.family))
        self.reconciler.frame(nftables.frame(SETTINGS, NODE, self.family))
        self.reconciler.adopt()

    def endpoint(self, number: int) -> Endpoint:
        address = f"fd00:200::{number + 1:x}" if self.family is Family.V6 else f"10.200.0.{number + 1}"
        return Endpoint(address, 8000 + number, node="n2")

    def serve(self, numbers: Sequence[int], protocol: Any = "UDP", **features: Any) -> None:
        name = ServicePortName("ns", "s", "", protocol)
        port = ServicePort(name, self.family, VIP[self.family], 80, node_port=NODE_PORT, **features)
        endpoints = tuple(sorted(map(self.endpoint, numbers), key=str))
        local = endpoints if features.get("internal_local") or features.get("external_local") else ()
        self.reconciler.set(name, nftables.plan(port, Serving(endpoints, local, endpoints, True), SETTINGS, NODE))
        self.reconciler.sync(bisect=False)

    def connect(self, sources: Sequence[str], to: tuple[str, int] | None = None, *, tcp: bool = False) -> list[str]:
        """The servers that connections from these addresses reach, each after the other."""
        servers = [(e.ip, e.port) for e in map(self.endpoint, range(64))]
        round_ = {"to": to or (VIP[self.family], 80), "from": sources, "tcp": tcp}
        task = json.dumps({"servers": servers, "rounds": [round_]})
        script = str(__file__).replace("test_traffic.py", "wire.py")
        (reached,) = json.loads(self.inside.namespace.run(sys.executable, script, stdin=task))
        # Else conntrack would send the same source port to the same server.
        self.inside.namespace.run("conntrack", "-F")
        return list(reached)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with inside() as place:
        place.namespace.run("sysctl", "-qw", "net.ipv6.ip_nonlocal_bind=1")
        place.namespace.ip(
            *(f"route add local {cidr} dev lo" for cidr in ("10.200.0.0/16", "10.201.0.0/16")),
            *(f"route add local {cidr} dev lo" for cidr in ("fd00:200::/64", "fd00:201::/64")),
            "route add 10.96.0.0/16 dev lo",
            "route add fd00:96::/64 dev lo",
            "addr add 10.201.0.1/32 dev lo",
            "addr add fd00:201::1/128 dev lo nodad",
        )
        yield Bench(place)


def clients(count: int) -> list[str]:
    return [f"10.201.{number >> 8}.{number & 255}" for number in range(1, count + 1)]


def chi_square(reached: Sequence[str], count: int) -> float:
    assert "" not in reached
    found = Counter(reached)
    assert len(found) == count
    expected = len(reached) / count
    return sum((n - expected) ** 2 / expected for n in found.values())


@pytest.mark.parametrize("count", [2, 3, 7, 33, 50])
def test_connections_are_spread_evenly(bench: Bench, count: int) -> None:
    """Exact sizes, and sizes where draws are repeated (33 of 64: half of them miss).

    One time in a hundred, chance alone fails this; so it may try again, and both failing is one in ten thousand.
    """
    bench.serve(range(count))
    results = []
    for _ in range(2):
        # Not one address alone: a port used again within conntrack's time-out would be the same connection.
        results.append(chi_square(bench.connect(clients(20_000)), count))
        if results[-1] < CRITICAL[count - 1]:
            return
    raise AssertionError(results)


def test_tcp_and_ipv6(bench: Bench) -> None:
    bench.serve(range(3), "TCP")
    assert chi_square(bench.connect([""] * 3000, tcp=True), 3) < 20
    six = Bench(bench.inside, Family.V6)
    six.serve(range(3))
    assert chi_square(six.connect([""] * 3000), 3) < 20


def test_affinity_holds_whatever_comes_and_goes(bench: Bench) -> None:
    sources = clients(1500)
    bench.serve(range(5), affinity_seconds=600)
    first = bench.connect(sources)
    assert chi_square(first, 5) < 30
    assert bench.connect(sources) == first
    bench.serve(range(12), affinity_seconds=600)  # another number of slots
    assert bench.connect(sources) == first
    bench.restart()
    bench.serve([0, 1, *range(3, 12)], affinity_seconds=600)
    gone = "10.200.0.3:8002"
    after = bench.connect(sources)
    assert all(new == old for old, new in zip(first, after, strict=True) if old != gone)
    moved = [new for old, new in zip(first, after, strict=True) if old == gone]
    assert gone not in moved
    assert len(set(moved)) > 5, "the clients of the endpoint that went are spread over all others"
    bench.serve(range(20), affinity_seconds=600)  # it comes back, and nobody has to go back to it
    assert bench.connect(sources) == after


def test_who_replaces_an_endpoint_has_its_clients(bench: Bench) -> None:
    """So a rollout leaves the load as even as it was."""
    sources = clients(300)
    bench.serve([0, 1, 2], affinity_seconds=600)
    first = bench.connect(sources)
    bench.serve([0, 3, 2], affinity_seconds=600)
    after = bench.connect(sources)
    assert after == [server.replace("10.200.0.2:8001", "10.200.0.4:8003") for server in first]


def test_a_slot_that_was_left_is_forgotten(bench: Bench) -> None:
    """A client whose endpoint went has another; who takes the old slot does not take the client."""
    sources = clients(400)
    bench.serve([0, 1], affinity_seconds=600)
    first = bench.connect(sources)
    bench.serve([1], affinity_seconds=600)
    assert set(bench.connect(sources)) == {"10.200.0.2:8001"}
    bench.serve([1, 2], affinity_seconds=600)
    assert set(bench.connect(sources)) == {"10.200.0.2:8001"}
    assert len(set(first)) == 2


def test_affinity_ends(bench: Bench) -> None:
    sources = clients(50)
    bench.serve([0], affinity_seconds=2)
    assert set(bench.connect(sources)) == {"10.200.0.1:8000"}
    bench.serve([0, 1], affinity_seconds=2)
    assert set(bench.connect(sources)) == {"10.200.0.1:8000"}
    time.sleep(3)
    assert len(set(bench.connect(sources))) == 2


def test_affinity_lasts_as_long_as_it_is_used(bench: Bench) -> None:
    sources = clients(50)
    bench.serve([0], affinity_seconds=3)
    bench.connect(sources)
    bench.serve([0, 1], affinity_seconds=3)
    for _ in range(4):
        time.sleep(1)
        assert set(bench.connect(sources)) == {"10.200.0.1:8000"}


def test_every_address_remembers_its_clients(bench: Bench) -> None:
    sources = clients(300)
    bench.serve(range(6), affinity_seconds=600, external_ips=("10.97.0.1",))
    bench.inside.namespace.ip("route add 10.97.0.0/16 dev lo")
    places = ((), (("10.97.0.1", 80),), (("10.201.0.1", NODE_PORT),))
    first = [bench.connect(sources, *place) for place in places]
    assert [bench.connect(sources, *place) for place in places] == first
    assert all("" not in endpoints for endpoints in first)


def test_a_client_whose_time_is_over_gets_an_endpoint_anew(bench: Bench) -> None:
    """As upstream's test of the time-out wants it: not the same for ever."""
    sources = clients(100)
    bench.serve(range(4), affinity_seconds=1)
    first = bench.connect(sources)
    time.sleep(2.5)
    second = bench.connect(sources)
    assert "" not in second
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 30  # 75 are expected


def test_affinity_with_policy_local(bench: Bench) -> None:
    sources = clients(300)
    bench.serve(range(4), affinity_seconds=600, external_local=True, internal_local=True)
    first = bench.connect(sources)
    assert bench.connect(sources) == first
    assert chi_square(first, 4) < 30


def test_clients_beyond_what_can_be_remembered_are_served(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from miniproxy.planner import nft_layout

    monkeypatch.setattr(nft_layout, "CLIENTS", 10)
    bench.restart()
    sources = clients(200)
    bench.serve(range(5), affinity_seconds=600)
    first = bench.connect(sources)
    assert "" not in first
    assert "" not in bench.connect(sources)


def test_counters(bench: Bench) -> None:
    import msgspec

    counting = msgspec.structs.replace(SETTINGS, nftables_counters=True)
    bench.reconciler.frame(nftables.frame(counting, NODE, Family.V4))
    name = ServicePortName("ns", "s", "", "UDP")
    port = ServicePort(name, Family.V4, VIP[Family.V4], 80, node_port=NODE_PORT)
    endpoints = (bench.endpoint(0), bench.endpoint(1))
    bench.reconciler.set(name, nftables.plan(port, Serving(endpoints, (), endpoints, True), counting, NODE))
    bench.reconciler.sync(bisect=False)
    bench.connect([""] * 20)
    bench.connect([""] * 7, ("10.201.0.1", NODE_PORT))
    listed = bench.inside.nft("list", "set", "ip", "miniproxy", "counted")
    assert "10.96.0.1 . udp . 80 counter packets 40 " in listed, listed  # a question and an answer each
    assert f"0.0.0.0 . udp . {NODE_PORT} counter packets 14 " in listed, listed
