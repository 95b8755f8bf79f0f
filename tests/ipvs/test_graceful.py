"""Graceful termination: when to look, what to delete, and what a look costs; the kernel is a fake, time is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from miniproxy.graceful import Draining, Load, Server, Service

VIP = Service("10.96.0.1", 80)
OTHER = Service("10.96.0.2", 80)
A, B = Server("10.1.0.1", 8080), Server("10.1.0.2", 8080)

Key = tuple[Service, Server]


class Kernel:
    """Real servers of weight 0 and their connections."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cost = 0.0  # seconds that a look takes
        self.servers: dict[Key, Load] = {}
        self.closed: set[Key] = set()  # whose inactive connections are all closed
        self.asked: list[set[Service]] = []
        self.all_connections = 0  # how often they were all looked at

    def clock(self) -> float:
        return self.now

    def loads(self, services: Iterable[Service]) -> Mapping[Key, Load]:
        asked = set(services)
        self.asked.append(asked)
        self.now += self.cost
        return {key: load for key, load in self.servers.items() if key[0] in asked}

    def unfinished(self) -> set[Key]:
        self.all_connections += 1
        return {key for key, load in self.servers.items() if key not in self.closed and (load.active or load.inactive)}

    def remove(self, servers: Iterable[Key]) -> None:
        for key in servers:
            del self.servers[key]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def draining(kernel: Kernel) -> Draining:
    return Draining(kernel, kernel.clock)


def begin(draining: Draining, kernel: Kernel, key: Key, active: int, inactive: int = 0) -> None:
    kernel.servers[key] = Load(active, inactive)
    draining.began(*key)


def test_nothing_to_do_means_never(draining: Draining) -> None:
    assert draining.due == float("inf")


def test_without_connections_it_goes_at_the_first_look(draining: Draining, kernel: Kernel) -> None:
    begin(draining, kernel, (VIP, A), 0)
    assert draining.due <= kernel.now
    assert draining.look() == 1
    assert kernel.servers == {}
    assert draining.due == float("inf")


def test_with_connections_it_stays_until_the_last_one_is_over(draining: Draining, kernel: Kernel) -> None:
    begin(draining, kernel, (VIP, A), 3)
    for _ in range(5):
        assert draining.look() == 0
        assert kernel.now < draining.due <= kernel.now + 4
        kernel.now = draining.due
    kernel.servers[VIP, A] = Load(0, 0)
    assert draining.look() == 1
    assert kernel.all_connections == 0


def test_half_closed_connections_keep_it_closed_ones_do_not(draining: Draining, kernel: Kernel) -> None:
    begin(draining, kernel, (VIP, A), 0, 2)
    begin(draining, kernel, (VIP, B), 0, 2)
    kernel.closed.add((VIP, B))
    assert draining.look() == 1
    assert set(kernel.servers) == {(VIP, A)}


def test_one_that_is_back_or_gone_is_left_alone(draining: Draining, kernel: Kernel) -> None:
    begin(draining, kernel, (VIP, A), 1)
    begin(draining, kernel, (OTHER, A), 1)
    draining.ended(VIP, A)  # weight 1 again
    draining.ended(OTHER)  # the virtual server is deleted
    assert len(draining) == 0
    del kernel.servers[OTHER, A]
    assert draining.look() == 0
    assert draining.due == float("inf")


def test_one_that_somebody_else_deleted_is_forgotten(draining: Draining, kernel: Kernel) -> None:
    begin(draining, kernel, (VIP, A), 1)
    kernel.servers.clear()
    assert draining.look() == 0
    assert draining.due == float("inf")


def test_a_restart_finds_and_finishes(draining: Draining, kernel: Kernel) -> None:
    kernel.servers = {(VIP, A): Load(0, 0), (OTHER, B): Load(1, 0)}
    draining.found(kernel.servers)
    assert draining.look() == 1
    assert len(draining) == 1


def test_only_virtual_servers_with_somebody_on_the_way_out_are_asked(draining: Draining, kernel: Kernel) -> None:
    begin(draining, kernel, (VIP, A), 1)
    draining.look()
    assert kernel.asked == [{VIP}]


def test_a_costly_look_is_followed_by_a_longer_rest(draining: Draining, kernel: Kernel) -> None:
    begin(draining, kernel, (VIP, A), 1)
    kernel.cost = 0.1
    draining.look()
    assert draining.due == pytest.approx(kernel.now + 2)
    kernel.cost = 30
    draining.look()
    assert draining.due == pytest.approx(kernel.now + 4), "still within 5 s of the last connection"


def test_after_a_failure_it_looks_again(draining: Draining, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(draining, kernel, (VIP, A), 0)

    def fail(services: Iterable[Service]) -> Mapping[Key, Load]:
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "loads", fail)
        with pytest.raises(OSError, match="no memory"):
            draining.look()
        assert kernel.now < draining.due < float("inf")
    assert draining.look() == 1
