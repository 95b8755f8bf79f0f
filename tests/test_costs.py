"""What a change costs at 5,000 services × 2 endpoints, counted in lines of the transaction that makes it."""

from __future__ import annotations

import pytest

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Batch, Endpoint, Family, Object, Ref
from miniproxy.planner import iptables
from miniproxy.planner.names import endpoint_chain, service_suffix
from tests import cluster
from tests.fake_iptables import FakeIptables

SERVICES = 5000


@pytest.fixture(scope="module")
def big() -> tuple[Agent, FakeIptables]:
    kernel = FakeIptables()
    agent = Agent(Settings(node_name="n1", cluster_cidrs=("10.128.0.0/9",)), iptables, {Family.V4: kernel})
    objects: list[Object] = []
    for number in range(SERVICES):
        objects += [cluster.service(number), cluster.endpoints(number, 2)]
    agent.handle(Batch(tuple(objects), synced=True))
    agent.sync()
    return agent, kernel


def cost(big: tuple[Agent, FakeIptables], *upserts: Object, deletes: tuple[Ref, ...] = ()) -> list[str]:
    """The lines a change takes; it may take only one transaction."""
    agent, kernel = big
    kernel.sent.clear()
    agent.handle(Batch(upserts, deletes))
    agent.sync()
    (transaction,) = kernel.sent
    assert transaction.operations == len(transaction.text.splitlines())
    return transaction.text.splitlines()


def test_one_endpoint_added_and_removed(big: tuple[Agent, FakeIptables]) -> None:
    assert len(cost(big, cluster.endpoints(77, 3))) <= 12
    assert len(cost(big, cluster.endpoints(77, 2))) <= 12


def test_one_endpoint_replaced(big: tuple[Agent, FakeIptables]) -> None:
    assert len(cost(big, cluster.endpoints(78, 2, first=1))) <= 12


def test_a_change_writes_its_own_service_only(big: tuple[Agent, FakeIptables]) -> None:
    lines = cost(big, cluster.endpoints(79, 3))
    name = cluster.service(79).ports[0].name
    its = {f"KUBE-SVC-{service_suffix(name)}"}
    its |= {endpoint_chain(name, Endpoint(e.ip, 8080)) for e in cluster.endpoints(79, 3).endpoints}
    written = {line.split()[1] for line in lines if line.startswith("-A")}
    assert written <= its, "rules of other services"
    assert written
    assert not any(line.startswith(("-I", "-D")) for line in lines), "the dispatch rule is right already"


def test_new_service_and_its_removal(big: tuple[Agent, FakeIptables]) -> None:
    new, found = cluster.service(SERVICES), cluster.endpoints(SERVICES, 2)
    assert len(cost(big, new, found)) <= 16
    assert len(cost(big, deletes=(new.ref, found.ref))) <= 16


def test_new_node_port_service(big: tuple[Agent, FakeIptables]) -> None:
    number = SERVICES + 1
    lines = cost(big, cluster.service(number, node_port=30000), cluster.endpoints(number, 2))
    assert sum(line.startswith("-I") for line in lines) == 2


def test_a_hundred_changes_are_one_transaction(big: tuple[Agent, FakeIptables]) -> None:
    assert len(cost(big, *(cluster.endpoints(n, 3) for n in range(100, 200)))) <= 100 * 12


def test_a_slice_that_says_nothing_new_costs_nothing(big: tuple[Agent, FakeIptables]) -> None:
    agent, kernel = big
    kernel.sent.clear()
    agent.handle(Batch((cluster.endpoints(300, 2), cluster.service(300))))
    agent.sync()
    assert kernel.sent == []
