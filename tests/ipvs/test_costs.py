"""What a change costs in IPVS mode, counted in lines of its transactions; and what comes first on a cold start."""

from __future__ import annotations

import pytest

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Batch, Family, Object, Ref, Service, ServicePort, ServicePortName
from miniproxy.planner import ipvs
from miniproxy.planner.ipvs_text import sections_of
from tests import cluster

from .fake_ipvs import FakeIpvs

SETTINGS = Settings(mode="ipvs", node_name="n1", cluster_cidrs=("10.128.0.0/9",))


class Site:
    def __init__(self, services: int, batch: int = 0) -> None:
        self.kernel = FakeIpvs()
        self.kernel.batch = batch
        self.agent = Agent(
            SETTINGS, ipvs, {Family.V4: self.kernel}, local_addresses=lambda _: ["172.30.0.2", "172.30.9.2"]
        )
        objects: list[Object] = []
        for number in range(1, services + 1):
            objects += [cluster.service(number), cluster.endpoints(number, 2)]
        name = ServicePortName("default", "kubernetes", "https", "TCP")
        objects.append(Service("default", "kubernetes", (ServicePort(name, Family.V4, "10.96.0.0", 443),)))
        self.agent.handle(Batch(tuple(objects), synced=True))
        self.agent.sync()

    def cost(self, *upserts: Object, deletes: tuple[Ref, ...] = ()) -> list[str]:
        """The lines of a change."""
        self.kernel.sent.clear()
        self.agent.handle(Batch(upserts, deletes))
        self.agent.sync()
        return [line for t in self.kernel.sent for s in sections_of(t) for line in s.lines]


@pytest.fixture(scope="module")
def small() -> Site:
    return Site(20)


@pytest.fixture(scope="module")
def large() -> Site:
    return Site(2000)


def test_an_endpoint_is_one_line_however_many_services(small: Site, large: Site) -> None:
    for site in (small, large):
        assert len(site.cost(cluster.endpoints(7, 3))) == 1
        assert len(site.cost(cluster.endpoints(7, 2))) == 1
        assert len(site.cost(cluster.endpoints(7, 2, first=1))) == 2


def test_a_service_is_a_few_lines(small: Site, large: Site) -> None:
    for site in (small, large):
        new, found = cluster.service(5000), cluster.endpoints(5000, 2)
        # two entries, a virtual server, two real servers, an address
        assert len(site.cost(new, found)) == 6
        assert len(site.cost(deletes=(new.ref, found.ref))) == 4


def test_a_node_port_is_a_virtual_server_on_each_address(small: Site) -> None:
    lines = small.cost(cluster.service(6000, node_port=30000), cluster.endpoints(6000, 2))
    assert [line for line in lines if line.startswith("-A")] == [
        "-A -t 10.96.23.112:80 -s rr",
        "-A -t 172.30.0.2:30000 -s rr",
        "-A -t 172.30.9.2:30000 -s rr",
    ]
    assert len(lines) == 6 + 1 + 2 * 3


def test_the_api_server_is_reached_before_all_others() -> None:
    """kubernetes#133773: nodes that wait for thousands of Services before pods reach the API server."""
    first, *others = Site(30, batch=10).kernel.sent
    assert "10.96.0.0:443" in first.text
    assert "addr add 10.96.0.0/32" in first.text
    assert "10.96.0.1:80" not in first.text
    assert len(others) == 3
