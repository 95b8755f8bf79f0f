"""The writer: what a change costs, what is said when something goes wrong, and nothing lost by many changes."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.kernel.exec import Completed
from miniproxy.kernel.nftables import Program, check, cleanup
from miniproxy.model import Batch, Family, Node, Object, Ref
from miniproxy.planner import nftables
from miniproxy.planner.nft_layout import Chain
from miniproxy.planner.nftables import Element, Frontend, NftablesObject
from miniproxy.reconciler import Reconciler
from miniproxy.transaction import Change, Transaction, TransactionError
from tests import cluster

from .inside import Inside, inside

SETTINGS = Settings(mode="nftables", node_name="n1", cluster_cidrs=("10.128.0.0/9",), node_port_addresses=("primary",))
GOOD = Frontend("10.96.0.1", "tcp", 80, endpoints=("10.128.0.1 . 8080",))
BAD = Frontend("10.96.0.2", "tcp", 80, endpoints=("10.128.0.999 . 8080",))


@pytest.fixture
def place() -> Iterator[Inside]:
    with inside() as place:
        yield place


def agent_in(place: Inside, services: int, endpoints: int = 2) -> Agent:
    agent = Agent(SETTINGS, nftables, {Family.V4: place.backend(Family.V4)})
    objects: list[Object] = []
    for number in range(services):
        objects += [cluster.service(number), cluster.endpoints(number, endpoints)]
    agent.handle(Batch(tuple(objects), synced=True))
    agent.sync()
    return agent


@pytest.fixture(scope="module", params=[10, 5000])
def sized(request: pytest.FixtureRequest) -> Iterator[tuple[Agent, Inside]]:
    with inside() as place:
        yield agent_in(place, request.param), place


def cost(sized: tuple[Agent, Inside], *upserts: Object, deletes: tuple[Ref, ...] = ()) -> Transaction:
    """The only transaction that a change takes."""
    agent, place = sized
    place.scripts.clear()
    agent.handle(Batch(upserts, deletes))
    (synced,) = agent.sync()
    assert synced.result
    assert not synced.error
    (transaction,) = synced.result.transactions
    assert place.scripts == [transaction.text]
    # Nothing but elements: whatever else there is makes nft or the kernel look at more.
    assert all(re.match(r"(add|delete) element ", line) for line in transaction.text.splitlines())
    return transaction


def test_one_endpoint_replaced(sized: tuple[Agent, Inside]) -> None:
    assert cost(sized, cluster.endpoints(7, 2, first=1)).operations == 2
    assert cost(sized, cluster.endpoints(7, 2)).operations == 2


def test_one_endpoint_added_and_removed(sized: tuple[Agent, Inside]) -> None:
    assert cost(sized, cluster.endpoints(8, 3)).operations == 5  # sizes up to 8 are exact: each has codes of its own
    assert cost(sized, cluster.endpoints(8, 2)).operations == 5
    cost(sized, cluster.endpoints(8, 50))
    assert cost(sized, cluster.endpoints(8, 51)).operations == 1
    assert cost(sized, cluster.endpoints(8, 50, first=1)).operations == 3  # the first goes, and the last takes its seat
    cost(sized, cluster.endpoints(8, 2))


def test_a_service_comes_and_goes(sized: tuple[Agent, Inside]) -> None:
    new, found = cluster.service(6000), cluster.endpoints(6000, 2)
    assert cost(sized, new, found).operations == 3
    assert cost(sized, deletes=(new.ref, found.ref)).operations == 3


def test_the_first_transaction_replaces_whatever_was_there(place: Inside) -> None:
    """Tables of other layouts go in the transaction that makes ours, so no connection finds neither."""
    place.nft("-f", "-", stdin='table ip miniproxy { comment "older"; chain c { type nat hook output priority 0; }; }')
    agent_in(place, 3)
    assert len(place.scripts) == 1
    lines = place.scripts[0].splitlines()
    assert lines[:2] == ["add table ip miniproxy", "delete table ip miniproxy"]
    assert "older" not in place.nft("list", "ruleset")
    assert place.backend(Family.V4).read()


LOCAL = "fib daddr type local goto node-ports"


@pytest.mark.parametrize(
    ("addresses", "v4", "v6"),
    [
        (("primary",), ["ip daddr @node-ips goto node-ports"], ["ip6 daddr @node-ips goto node-ports"]),
        (("0.0.0.0/0", "::/0"), [f"ip daddr != 127.0.0.0/8 {LOCAL}"], [f"ip6 daddr != ::1 {LOCAL}"]),
        # Ranges of the other family only: this one keeps all its addresses.
        (
            ("10.0.0.0/8",),
            [f"ip daddr != 127.0.0.0/8 ip daddr 10.0.0.0/8 {LOCAL}"],
            [f"ip6 daddr != ::1 {LOCAL}"],
        ),
    ],
)
def test_where_node_ports_answer(addresses: tuple[str, ...], v4: list[str], v6: list[str]) -> None:
    settings = msgspec.structs.replace(SETTINGS, node_port_addresses=addresses)
    for family, want in ((Family.V4, v4), (Family.V6, v6)):
        frame = nftables.frame(settings, Node("n1", ips=("172.30.0.2", "fd00:30::2")), family)
        (services,) = (o for o in frame if isinstance(o, Chain) and o.name == "services")
        assert [rule.partition(" comment ")[0] for rule in services.rules if "node-ports" in rule] == want


def test_tables_of_others_are_left_alone(place: Inside) -> None:
    other = "table ip kube-proxy {\n\tchain c {\n\t}\n}\ntable inet miniproxy {\n\tchain c {\n\t}\n}\n"
    place.nft("-f", "-", stdin=other)
    agent_in(place, 3)
    program = Program(place.runner)
    assert cleanup(Family.V4, program, place.netlink) == 1
    assert cleanup(Family.V4, program, place.netlink) == 0
    assert cleanup(Family.V6, program, place.netlink) == 0
    assert place.nft("list", "ruleset") == other


@pytest.mark.parametrize("more", [(), (Chain("more", None, ()),)], ids=["elements", "by nft"])
def test_a_refused_transaction_changes_nothing_and_says_why(place: Inside, more: tuple[Chain, ...]) -> None:
    agent_in(place, 0)
    backend = place.backend(Family.V4)
    before = backend.read()
    objects: list[NftablesObject] = [GOOD, BAD, *more]
    transaction = backend.render([Change(obj.key, None, obj) for obj in objects])
    with pytest.raises(TransactionError, match=r"10\.128\.0\.999") as caught:
        backend.apply(transaction)
    assert not caught.value.transient
    assert backend.read() == before


@pytest.mark.parametrize("more", [(), (Chain("more", None, ()),)], ids=["elements", "by nft"])
def test_what_the_kernel_refuses_is_said_too(place: Inside, more: tuple[Chain, ...]) -> None:
    agent_in(place, 0)
    backend = place.backend(Family.V4)
    before = backend.read()
    gone = Element("cluster-ips", "10.96.0.9")
    made: list[NftablesObject] = [GOOD, *more]
    changes = [Change(gone.key, gone, None), *(Change(obj.key, None, obj) for obj in made)]
    with pytest.raises(TransactionError, match=r"No such file or directory: delete element .* 10\.96\.0\.9"):
        backend.apply(backend.render(changes))
    assert backend.read() == before


def test_the_element_to_blame_is_named_among_thousands(place: Inside) -> None:
    """Also where they take several messages; all of them are one transaction."""
    agent_in(place, 0)
    backend = place.backend(Family.V4)
    before = backend.read()
    there = [Element("cluster-ips", f"10.97.{i // 256}.{i % 256}") for i in range(9000)]
    backend.apply(backend.render([Change(e.key, None, e) for e in there if e.text != "10.97.30.7"]))
    with pytest.raises(TransactionError, match=r"No such file or directory: delete element .* 10\.97\.30\.7 }"):
        backend.apply(backend.render([Change(e.key, e, None) for e in there]))
    assert len(backend.read()) == len(before) + 8999


def test_a_bad_service_is_set_aside(place: Inside) -> None:
    reconciler = Reconciler(place.backend(Family.V4))
    reconciler.frame(nftables.frame(SETTINGS, agent_in(place, 0).tracker.node, Family.V4))
    reconciler.adopt()
    names = [cluster.service(number).ports[0].name for number in range(8)]
    for number, name in enumerate(names):
        reconciler.set(name, [(BAD if number == 5 else GOOD)._replace(address=f"10.96.0.{number}")])
    result = reconciler.sync()
    assert [name for name, _ in result.set_aside] == [names[5]]
    assert place.nft("list", "map", "ip", "miniproxy", "endpoints").count(" . 8080") == 7


def test_when_somebody_deletes_the_table_it_is_made_again(place: Inside) -> None:
    agent = agent_in(place, 5)
    before = agent.reconcilers[Family.V4].backend.read()
    place.nft("delete", "table", "ip", "miniproxy")
    agent.handle(Batch((cluster.endpoints(1, 3),)))
    (failed,) = agent.sync()
    assert "No such file or directory" in failed.error
    (repaired,) = agent.sync()
    assert not repaired.error
    assert agent.reconcilers[Family.V4].backend.read().keys() == before.keys()


def test_many_transactions_leave_nothing_behind(place: Inside) -> None:
    agent_in(place, 0)
    backend = place.backend(Family.V4)
    backend.read()
    good = [Change(GOOD.key, None, GOOD)], [Change(GOOD.key, GOOD, None)]
    nobody = Element("cluster-ips", "10.96.0.9")

    def run(times: int) -> tuple[int, int]:
        for number in range(times):
            backend.apply(backend.render(good[number % 2]))
            with pytest.raises(TransactionError):
                backend.apply(backend.render([Change(nobody.key, nobody, None)]))
        place.scripts.clear()
        gc.collect()
        return len(os.listdir("/proc/self/fd")), int(Path("/proc/self/statm").read_text().split()[1])

    files, pages = run(1000)
    files_after, pages_after = run(4000)
    assert files_after == files
    assert pages_after - pages < 256  # 1 MB


@pytest.mark.parametrize(
    ("version", "release", "says"),
    [
        ("nftables v1.0.5 (Lester Gooch #4)", "6.1.0-18-amd64", r"nft 1\.0\.6 or later, this is nftables v1\.0\.5"),
        ("nftables v0.9.8 (E.D.S.)", "5.15.0", r"nft 1\.0\.6 or later"),
        ("", "5.15.0", r"this is none"),
        ("nftables v1.0.6 (Lester Gooch #5)", "5.14.21-default", r"Linux 5\.15 or later, this is 5\.14\.21-default"),
    ],
)
def test_what_is_too_old_is_named(version: str, release: str, says: str) -> None:
    with pytest.raises(TransactionError, match=says):
        check(lambda argv, text="", timeout=60.0: Completed(0, f"{version}\n", ""), release)


@pytest.mark.parametrize("version", ["nftables v1.0.6 (Lester Gooch #5)", "nftables v1.1.3 (Commodore Bullmoose #4)"])
def test_what_is_new_enough_passes(version: str) -> None:
    check(lambda argv, text="", timeout=60.0: Completed(0, f"{version}\n", ""), "5.15.0-91-generic")
    check(lambda argv, text="", timeout=60.0: Completed(0, f"{version}\n", ""), "6.18.44")


def test_this_machine_can_do_it() -> None:
    check()
