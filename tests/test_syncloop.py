"""When the loop syncs: a clock that only moves when told, so nothing here depends on how fast the machine is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Batch, Family
from miniproxy.planner import iptables
from miniproxy.syncloop import Pacer, SyncLoop
from miniproxy.transaction import TransactionError
from tests import cluster
from tests.clock import Clock
from tests.fake_iptables import FakeIptables


class Bench:
    """A loop on a fake kernel, driven by hand: deliver, pass time, look at what was sent."""

    def __init__(self, **fields: float) -> None:
        self.clock = Clock()
        self.kernel = FakeIptables()
        settings = msgspec.structs.replace(Settings(node_name="n1"), **fields)
        self.agent = Agent(settings, iptables, {Family.V4: self.kernel})
        self.loop = SyncLoop(self.agent, clock=self.clock)

    def deliver(self, number: int, synced: bool = True) -> None:
        self.loop.deliver(Batch((cluster.service(number),), synced=synced))
        self.turn()

    def turn(self) -> None:
        """What the loop does when its wait is over."""
        self.loop.inbox.put("reload")
        assert self.loop.run() == "reload"
        self.loop.step()

    def wait(self, seconds: float) -> int:
        """Let time pass; how many transactions that brought."""
        before = len(self.kernel.sent)
        self.clock.now += seconds
        self.turn()
        return len(self.kernel.sent) - before


@pytest.fixture
def bench() -> Bench:
    bench = Bench(min_sync_period=1.0, sync_period=30.0)
    bench.deliver(0)
    bench.clock.now += 10
    bench.kernel.sent.clear()
    return bench


def test_nothing_is_written_before_the_source_has_said_everything() -> None:
    bench = Bench()
    bench.deliver(1, synced=False)
    assert bench.wait(100) == 0
    bench.deliver(2, synced=True)
    assert len(bench.kernel.sent) == 1


def test_first_changes_after_quiet_go_out_at_once(bench: Bench) -> None:
    bench.deliver(1)
    bench.deliver(2)
    assert len(bench.kernel.sent) == 2


def test_a_burst_is_coalesced(bench: Bench) -> None:
    for number in range(1, 50):
        bench.deliver(number)
    assert len(bench.kernel.sent) == 2
    assert bench.wait(0.5) == 0
    assert bench.wait(0.6) == 1
    assert len(bench.kernel.tables["filter"]["KUBE-SERVICES"]) == 50


def test_without_a_minimum_every_change_goes_out() -> None:
    bench = Bench(min_sync_period=0.0)
    for number in range(20):
        bench.deliver(number)
    assert len(bench.kernel.sent) == 20


def test_quiet_means_quiet(bench: Bench) -> None:
    assert [bench.wait(1) for _ in range(15)] == [0] * 15


def test_drift_is_repaired_at_the_next_check(bench: Bench) -> None:
    bench.kernel.tables["filter"]["KUBE-SERVICES"].clear()
    assert bench.wait(5) == 0
    assert bench.wait(30) == 1
    assert len(bench.kernel.tables["filter"]["KUBE-SERVICES"]) == 1


def test_looking_for_drift_takes_a_hundredth_of_the_time_at_most(bench: Bench) -> None:
    reads = []

    def slow() -> Any:
        reads.append(bench.clock.now)
        bench.clock.now += 2.0
        return dict(original())

    original, bench.kernel.read = bench.kernel.read, slow  # type: ignore[method-assign]
    for _ in range(80):
        bench.wait(10)
    assert [round(b - a) for a, b in pairwise(reads)] == [pytest.approx(200, abs=12)] * (len(reads) - 1)
    assert len(reads) == 4


def test_waits_without_a_limit_for_a_source_that_says_nothing() -> None:
    """An API server that is away for an hour must not cost a turn of the loop per moment."""
    bench = Bench(sync_period=30.0)
    bench.deliver(1, synced=False)
    bench.clock.now += 3600
    waits: list[float | None] = []

    class Inbox:
        def get(self, timeout: float | None) -> str:
            waits.append(timeout)
            return "stop"

    bench.loop.inbox = Inbox()  # type: ignore[assignment]
    assert bench.loop.run() == "stop"
    assert waits == [None]


def test_a_failure_is_tried_again_ever_more_slowly_and_loses_nothing(bench: Bench) -> None:
    attempts = []

    def locked(line: str) -> None:
        attempts.append(bench.clock.now)
        raise TransactionError("another program holds the lock", transient=True)

    bench.kernel.fault = locked
    bench.deliver(1)
    for _ in range(100):
        bench.wait(0.1)
    gaps = [b - a for a, b in pairwise(attempts)]
    assert len(attempts) >= 5
    assert all(later >= 1.5 * sooner for sooner, later in pairwise(gaps) if later < 15)
    bench.kernel.fault = lambda line: None
    bench.wait(30)
    assert len(bench.kernel.tables["filter"]["KUBE-SERVICES"]) == 2


def test_a_family_that_fails_does_not_make_the_others_changes_wait() -> None:
    kernels = {family: FakeIptables() for family in Family}

    def broken() -> Any:
        raise TransactionError("no such table", transient=True)

    kernels[Family.V6].read = broken  # type: ignore[method-assign]
    bench = Bench(min_sync_period=1.0, sync_period=30.0)
    agent = Agent(bench.agent.settings, iptables, kernels)
    bench.loop = SyncLoop(agent, clock=bench.clock)
    for number in range(8):
        bench.deliver(number)
        bench.wait(40)  # by now it is tried again every 30 s
    bench.deliver(9)
    assert any("svc-9" in line for line in kernels[Family.V4].sent[-1].text.splitlines())


def test_what_is_to_be_done_once_all_is_written_is_tried_again_with_each_look_for_drift(bench: Bench) -> None:
    """Not with each change: it runs programs, and a reason to fail lasts."""
    attempts = []

    def settled() -> bool:
        attempts.append(bench.clock.now)
        return len(attempts) == 3

    loop = SyncLoop(bench.agent, settled=settled, clock=bench.clock)
    bench.loop = loop
    for number in range(20):
        bench.clock.now += 5
        bench.deliver(number)
    assert [round(b - a) for a, b in pairwise(attempts)] == [pytest.approx(30, abs=5)] * 2


def test_commands_come_out_after_what_was_handed_over_before() -> None:
    bench = Bench()
    bench.loop.deliver(Batch((cluster.service(1),), synced=True))
    bench.loop.inbox.put("stop")
    assert bench.loop.run() == "stop"
    assert bench.agent.tracker.service_count() == 1


def test_pacer_refills_slowly() -> None:
    pacer = Pacer(2.0, now=0.0)
    for _ in range(2):
        assert pacer.wait(0.0) == 0.0
        pacer.started(0.0)
    assert pacer.wait(0.0) == pytest.approx(2.0)
    assert pacer.wait(1.5) == pytest.approx(0.5)
    assert pacer.wait(2.0) == 0.0
    assert pacer.wait(1000.0) == 0.0
