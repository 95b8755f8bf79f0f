"""The tracker: what is known does not depend on how it arrived, and only what changed counts as changed."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from miniproxy.model import (
    Batch,
    EndpointSlice,
    Family,
    Node,
    PortKey,
    Ref,
    ServicePortName,
    SliceEndpoint,
    SlicePort,
)
from miniproxy.tracker import Tracker
from tests import cluster, world


def slice_of(number: int, suffix: str, *endpoints: SliceEndpoint) -> EndpointSlice:
    return EndpointSlice(
        "scale",
        f"svc-{number}-{suffix}",
        f"svc-{number}",
        Family.V4,
        (SlicePort("http", "TCP", 8080),),
        endpoints,
    )


def key(number: int) -> PortKey:
    (port,) = cluster.service(number).ports
    return (port.name, port.family)


def test_only_what_changed_counts_as_changed() -> None:
    tracker = Tracker("n1")
    for number in range(10):
        tracker.apply(Batch((cluster.service(number), cluster.endpoints(number, 2))))
    assert len(tracker.take()) == 10
    tracker.apply(Batch((cluster.service(3), cluster.endpoints(3, 2))))
    assert tracker.take() == set()
    tracker.apply(Batch((cluster.endpoints(3, 3),)))
    assert tracker.take() == {key(3)}
    tracker.apply(Batch(deletes=(cluster.service(4).ref,)))
    assert tracker.take() == {key(4)}
    tracker.apply(Batch((Node("n2", "z9"),)))
    assert tracker.take() == set()
    tracker.apply(Batch((Node("n1", "z1"),)))
    assert len(tracker.take()) == 9


def test_slices_may_come_before_their_service() -> None:
    tracker = Tracker("n1")
    tracker.apply(Batch((cluster.endpoints(1, 2),)))
    tracker.apply(Batch((cluster.service(1),)))
    assert len(tracker.endpoints(key(1))) == 2


def test_a_slice_that_changes_its_service_touches_both() -> None:
    tracker = Tracker("n1")
    tracker.apply(Batch((cluster.service(1), cluster.service(2), slice_of(1, "x", SliceEndpoint("10.1.0.1")))))
    tracker.take()
    moved = EndpointSlice(
        "scale", "svc-1-x", "svc-2", Family.V4, (SlicePort("http", "TCP", 8080),), (SliceEndpoint("10.1.0.1"),)
    )
    tracker.apply(Batch((moved,)))
    assert tracker.take() == {key(1), key(2)}
    assert tracker.endpoints(key(1)) == []
    assert len(tracker.endpoints(key(2))) == 1


def test_the_same_endpoint_in_two_slices_is_one_and_the_better_word_counts() -> None:
    ready, unready = SliceEndpoint("10.1.0.1"), SliceEndpoint("10.1.0.1", ready=False, serving=False)
    for one, other in ((ready, unready), (unready, ready)):
        tracker = Tracker("n1")
        tracker.apply(Batch((cluster.service(1), slice_of(1, "x", one), slice_of(1, "y", other))))
        (endpoint,) = tracker.endpoints(key(1))
        assert endpoint.ready


@given(st.lists(world.slices(), max_size=12, unique_by=lambda s: s.ref), st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter(slices: list[EndpointSlice], rng: random.Random) -> None:
    def endpoints(arriving: list[EndpointSlice]) -> list[tuple[PortKey, list[str]]]:
        tracker = Tracker("n1")
        tracker.apply(Batch(tuple(arriving)))
        found = []
        for name in world.NAMES:
            for port, protocol, _ in world.PORTS:
                for family in Family:
                    k = (ServicePortName("ns", name, port, protocol), family)
                    found.append((k, sorted(map(repr, tracker.endpoints(k)))))
        return found

    shuffled = list(slices)
    rng.shuffle(shuffled)
    assert endpoints(slices) == endpoints(shuffled)


@given(st.lists(world.slices(), max_size=12))
def test_nothing_is_kept_of_what_is_gone(slices: list[EndpointSlice]) -> None:
    tracker = Tracker("n1")
    tracker.apply(Batch(tuple(slices)))
    tracker.apply(Batch(deletes=tuple(s.ref for s in slices)))
    assert vars(tracker)["_slices"] == {}
    assert vars(tracker)["_slices_of"] == {}


def test_a_deleted_node_keeps_serving() -> None:
    tracker = Tracker("n1")
    tracker.apply(Batch((Node("n1", "z1"),)))
    tracker.apply(Batch(deletes=(Ref("Node", "", "n1"),)))
    assert tracker.node.zone == "z1"
