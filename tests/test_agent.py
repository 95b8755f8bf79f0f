"""The agent as a whole, on a kernel in memory: what goes wrong in one place stays there."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Batch, Family, Service, ServicePort
from miniproxy.planner import iptables
from miniproxy.policy import Serving
from miniproxy.problems import News
from miniproxy.transaction import TransactionError
from tests import cluster
from tests.fake_iptables import FakeIptables


class Faulty:
    """The iptables planner with a fault that shows with one service."""

    MANY_ENDPOINTS = iptables.MANY_ENDPOINTS
    frame = staticmethod(iptables.frame)
    show = staticmethod(iptables.show)

    @staticmethod
    def plan(port: ServicePort, serving: Serving, settings: Settings, node: Any) -> Any:
        if port.name.name == "svc-2" and len(serving.cluster) > 1:
            raise ZeroDivisionError
        return iptables.plan(port, serving, settings, node)


def test_a_fault_of_ours_costs_one_service_port(caplog: pytest.LogCaptureFixture) -> None:
    kernel = FakeIptables()
    agent = Agent(Settings(node_name="n1"), Faulty(), {Family.V4: kernel})
    agent.handle(Batch(tuple(o for n in (1, 2, 3) for o in (cluster.service(n), cluster.endpoints(n, 1))), synced=True))
    agent.sync()
    with caplog.at_level(logging.ERROR):
        agent.handle(Batch(tuple(cluster.endpoints(n, 2) for n in (1, 2, 3))))
        agent.sync()
    assert "cannot plan scale/svc-2:http" in caplog.text
    served = [r for rules in kernel.tables["nat"].values() for r in rules if "DNAT" in r]
    assert sorted(r.split('"')[1] for r in served) == [
        "scale/svc-1:http",
        "scale/svc-1:http",
        "scale/svc-2:http",
        "scale/svc-3:http",
        "scale/svc-3:http",
    ]


def test_a_family_that_fails_does_not_hold_up_the_other() -> None:
    good, bad = FakeIptables(), FakeIptables()

    def locked(line: str) -> None:
        raise TransactionError("no such table", transient=True)

    bad.fault = locked
    agent = Agent(Settings(node_name="n1"), iptables, {Family.V6: bad, Family.V4: good})
    agent.handle(Batch((cluster.service(1),), synced=True))
    results = {r.family: r.result for r in agent.sync()}
    assert results[Family.V6] is None
    assert results[Family.V4] is not None
    assert "KUBE-SERVICES" in good.tables["nat"]


def test_a_service_port_that_is_taken_at_last_is_no_problem_any_more(caplog: pytest.LogCaptureFixture) -> None:
    kernel = FakeIptables()
    agent = Agent(Settings(node_name="n1"), iptables, {Family.V4: kernel})
    kernel.refuses = lambda line: "svc-2" in line
    agent.handle(Batch((cluster.service(1), cluster.service(2)), synced=True))
    agent.sync()
    assert ["set aside" in problem.reason for problem in agent.problems] == [True]
    kernel.refuses = lambda line: False
    agent.check()
    agent.sync()
    assert not agent.problems
    assert any("svc-2" in rule for rule in kernel.tables["filter"]["KUBE-SERVICES"])


def test_what_nobody_needs_and_cannot_be_removed_is_no_services_problem(caplog: pytest.LogCaptureFixture) -> None:
    kernel = FakeIptables()
    before = Agent(Settings(node_name="n1"), iptables, {Family.V4: kernel})
    before.handle(Batch((cluster.service(1),), synced=True))
    before.sync()
    kernel.refuses = lambda line: line.startswith("-D KUBE-SERVICES")
    agent = Agent(Settings(node_name="n1"), iptables, {Family.V4: kernel})
    agent.handle(Batch((cluster.service(2),), synced=True))
    agent.sync()
    assert not agent.problems
    assert "cannot remove what nobody needs any more" in caplog.text
    assert any("svc-2" in rule for rule in kernel.tables["filter"]["KUBE-SERVICES"])


@pytest.mark.parametrize(("seconds", "reads"), [(1, 1), (60, 2)])
def test_what_was_read_ahead_is_believed_for_a_while(seconds: float, reads: int) -> None:
    kernel, now, read = FakeIptables(), [1000.0], []
    original = kernel.read
    kernel.read = lambda: read.append(1) or original()  # type: ignore[func-returns-value, method-assign]
    agent = Agent(Settings(node_name="n1"), iptables, {Family.V4: kernel}, clock=lambda: now[0])
    agent.look()
    agent.handle(Batch((cluster.service(1),), synced=True))
    now[0] += seconds
    agent.sync()
    assert len(read) == reads
    assert "KUBE-SERVICES" in kernel.tables["nat"]


def test_what_cannot_be_read_ahead_is_read_later() -> None:
    kernel = FakeIptables()
    original, errors = kernel.read, [TransactionError("busy", transient=True)]

    def read() -> Any:
        if errors:
            raise errors.pop()
        return original()

    kernel.read = read  # type: ignore[method-assign]
    agent = Agent(Settings(node_name="n1"), iptables, {Family.V4: kernel})
    agent.look()
    agent.handle(Batch((cluster.service(1),), synced=True))
    assert [r.error for r in agent.sync()] == [""]
    assert "KUBE-SERVICES" in kernel.tables["nat"]


class Terse:
    """The iptables planner for which four endpoints are many."""

    MANY_ENDPOINTS = 3
    frame = staticmethod(iptables.frame)
    plan = staticmethod(iptables.plan)
    show = staticmethod(iptables.show)


def commented(kernel: FakeIptables) -> list[int]:
    """Of the rules of endpoints' chains: how many have a comment, and how many have none."""
    rules = [rule for name, chain in kernel.tables["nat"].items() if "-SEP-" in name for rule in chain]
    with_one = sum("--comment" in rule for rule in rules)
    return [with_one, len(rules) - with_one]


def test_comments_on_endpoints_go_when_there_are_many_and_come_back() -> None:
    kernel = FakeIptables()
    agent = Agent(Settings(node_name="n1"), Terse(), {Family.V4: kernel})
    found = tuple(o for n in (1, 2) for o in (cluster.service(n), cluster.endpoints(n, 1)))
    agent.handle(Batch(found, synced=True))
    agent.sync()
    assert commented(kernel) == [4, 0]
    agent.handle(Batch((cluster.endpoints(2, 2),)))
    agent.sync()
    assert commented(kernel) == [6, 0]
    agent.handle(Batch((cluster.endpoints(1, 2),)))  # service 2 is not touched by this
    agent.sync()
    assert commented(kernel) == [0, 8]
    again = Agent(Settings(node_name="n1"), Terse(), {Family.V4: kernel})
    again.handle(Batch((*found, cluster.endpoints(1, 2), cluster.endpoints(2, 2)), synced=True))
    (synced,) = again.sync()
    assert synced.result
    assert synced.result.transactions == ()
    agent.handle(Batch(deletes=(cluster.service(1).ref,)))
    agent.sync()
    assert commented(kernel) == [4, 0]


def test_endpoints_are_counted_once_however_many_slices_repeat_them() -> None:
    kernel = FakeIptables()
    agent = Agent(Settings(node_name="n1"), Terse(), {Family.V4: kernel})
    one = cluster.endpoints(1, 3)
    agent.handle(Batch((cluster.service(1), one, msgspec.structs.replace(one, name="another")), synced=True))
    agent.sync()
    assert commented(kernel) == [6, 0]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_who_loses_a_conflict_is_told_whoever_came_first(order: tuple[int, int]) -> None:
    said: list[str] = []

    def announce(news: News) -> None:
        said.extend(f"+{problem}" for problem in news.appeared)
        said.extend(f"-{problem}" for problem in news.over)

    agent = Agent(Settings(node_name="n1"), iptables, {Family.V4: FakeIptables()}, announce=announce)
    address = cluster.service(1).ports[0].cluster_ip
    rivals = {n: sharing(n, address) for n in (1, 2)}
    for number in order:
        agent.handle(Batch((rivals[number], cluster.endpoints(number, 1)), synced=True))
        agent.sync()
    lost = f"Service scale/svc-2: port http (IPv4): traffic to {address} tcp 80 belongs to scale/svc-1:http"
    assert said == [f"+{lost}"]
    agent.handle(Batch((cluster.endpoints(1, 0),)))  # now svc-1 refuses, which takes no rule in table nat
    agent.sync()
    agent.handle(Batch((cluster.endpoints(1, 1),)))
    agent.sync()
    assert said[-1] == f"+{lost}"
    agent.handle(Batch(deletes=(rivals[1].ref,)))
    agent.sync()
    assert said[-1] == f"-{lost}"
    assert not agent.problems


def sharing(number: int, address: str) -> Service:
    """A Service that asks for this address, whoever has it."""
    made = cluster.service(number)
    ports = tuple(msgspec.structs.replace(port, cluster_ip=address) for port in made.ports)
    return msgspec.structs.replace(made, ports=ports)
