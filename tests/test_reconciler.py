"""The reconciler on its own: counting, adopting, searching for the bad one, never losing anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from miniproxy.model import ServicePortName
from miniproxy.planner.iptables import Chain, DispatchChain, DispatchRule
from miniproxy.reconciler import Reconciler
from miniproxy.transaction import Transaction, TransactionError
from tests.fake_iptables import FakeIptables


def name(number: int) -> ServicePortName:
    return ServicePortName("ns", f"svc{number:03}", "http", "TCP")


def objects(number: int, target: str = "RETURN") -> list[Chain | DispatchRule]:
    suffix = f"{number:016}".translate(str.maketrans("01", "AB"))
    chain = f"KUBE-SVC-{suffix}"
    rule = f'-d 10.0.0.{number}/32 -p tcp -m comment --comment "svc {number}" -m tcp --dport 80 -j {chain}'
    return [
        Chain("nat", chain, (f"-j {target}",)),
        DispatchRule("nat", "KUBE-SERVICES", f"10.0.0.{number} tcp 80", rule),
    ]


@pytest.fixture
def kernel() -> FakeIptables:
    return FakeIptables()


@pytest.fixture
def reconciler(kernel: FakeIptables) -> Reconciler:
    reconciler = Reconciler(kernel)
    reconciler.frame([DispatchChain("nat", "KUBE-SERVICES")])
    return reconciler


def test_second_sync_sends_nothing(reconciler: Reconciler, kernel: FakeIptables) -> None:
    reconciler.set(name(2), objects(2))
    assert len(reconciler.sync().transactions) == 1
    reconciler.set(name(2), objects(2))
    assert reconciler.sync().transactions == ()
    assert len(kernel.sent) == 1


def test_there_and_back_sends_nothing(reconciler: Reconciler) -> None:
    reconciler.set(name(2), objects(2))
    reconciler.sync()
    reconciler.set(name(2), objects(2, "ACCEPT"))
    reconciler.set(name(2), objects(2))
    assert reconciler.pending() == 0


def test_shared_objects_go_with_their_last_user(reconciler: Reconciler, kernel: FakeIptables) -> None:
    shared = Chain("nat", "KUBE-SEP-AAAAAAAAAAAAAAAA", ("-j RETURN",))
    for n in (2, 3):
        reconciler.set(name(n), [*objects(n), shared])
    reconciler.sync()
    reconciler.set(name(2), ())
    reconciler.sync()
    assert shared.name in kernel.tables["nat"]
    reconciler.set(name(3), ())
    reconciler.sync()
    assert shared.name not in kernel.tables["nat"]


def test_only_those_whose_conflicts_change_are_contested(reconciler: Reconciler) -> None:
    """A hundred Services may share an address; that one of them comes or goes is nothing to the others."""
    shared = Chain("nat", "KUBE-SEP-AAAAAAAAAAAAAAAA", ("-j RETURN",))
    for n in (2, 3, 4):
        reconciler.set(name(n), [*objects(n), shared])
    assert reconciler.take_contested() == ()
    reconciler.set(name(2), objects(2))
    assert reconciler.take_contested() == ()
    reconciler.set(name(1), [Chain("nat", shared.name, ("-j ACCEPT",))])
    assert set(reconciler.take_contested()) == {name(1), name(3), name(4)}
    assert reconciler.conflicts(name(4)) == [(shared.key, name(1))]
    reconciler.set(name(1), ())
    assert set(reconciler.take_contested()) == {name(3), name(4)}
    assert reconciler.conflicts(name(4)) == []


@pytest.mark.parametrize("first", [2, 3])
def test_conflict_goes_to_the_smaller_name_whoever_came_first(
    reconciler: Reconciler, kernel: FakeIptables, first: int
) -> None:
    claims = {n: DispatchRule("nat", "KUBE-SERVICES", "1.2.3.4 tcp 80", f"-d 1.2.3.4/32 -j S{n}") for n in (2, 3)}
    kernel.tables["nat"].update(S2=[], S3=[])
    for n in (first, 5 - first):
        reconciler.set(name(n), [claims[n]])
        reconciler.sync()
    assert kernel.tables["nat"]["KUBE-SERVICES"] == [claims[2].rule]
    assert reconciler.conflicts(name(3)) == [(claims[2].key, name(2))]
    assert reconciler.conflicts(name(2)) == []
    reconciler.set(name(2), ())
    reconciler.sync()
    assert kernel.tables["nat"]["KUBE-SERVICES"] == [claims[3].rule]


def test_adopts_what_is_right_and_removes_what_is_stale(kernel: FakeIptables) -> None:
    first = Reconciler(kernel)
    first.frame([DispatchChain("nat", "KUBE-SERVICES")])
    for n in (2, 3):
        first.set(name(n), objects(n))
    first.sync()
    restarted = Reconciler(kernel)
    restarted.frame([DispatchChain("nat", "KUBE-SERVICES")])
    restarted.set(name(2), objects(2))
    restarted.set(name(4), objects(4))
    restarted.adopt()
    (transaction,) = restarted.sync().transactions
    assert "10.0.0.2" not in transaction.text
    assert {"10.0.0.3", "10.0.0.4"} <= set(transaction.text.replace("/", " ").split())
    assert restarted.adopt() == 0


@pytest.mark.parametrize("batch", [0, 3])
def test_one_bad_object_is_set_aside_and_the_rest_is_written(batch: int) -> None:
    kernel = FakeIptables(batch)
    reconciler = Reconciler(kernel)
    reconciler.frame([DispatchChain("nat", "KUBE-SERVICES")])
    for n in range(2, 30):
        reconciler.set(name(n), objects(n, "BAD" if n in (7, 20) else "RETURN"))
    kernel.refuses = lambda line: line.endswith("-j BAD")
    result = reconciler.sync()
    assert {owner for owner, _ in result.set_aside} == {name(7), name(20)}
    assert all("-j BAD" in reason for _, reason in result.set_aside)
    assert len(kernel.tables["nat"]["KUBE-SERVICES"]) == 26
    assert reconciler.sync().transactions == ()  # the bad ones are not tried again …
    reconciler.set(name(7), objects(7))
    assert len(reconciler.sync().transactions) == 1  # … until they change
    assert len(kernel.tables["nat"]["KUBE-SERVICES"]) == 27


def test_a_bad_change_leaves_the_old_state_serving(reconciler: Reconciler, kernel: FakeIptables) -> None:
    reconciler.set(name(2), objects(2))
    reconciler.sync()
    before = kernel.text()
    kernel.refuses = lambda line: line.endswith("-j BAD")
    reconciler.set(name(2), objects(2, "BAD"))
    assert [owner for owner, _ in reconciler.sync().set_aside] == [name(2)]
    assert kernel.text() == before


def test_transient_failure_blames_nobody(reconciler: Reconciler, kernel: FakeIptables) -> None:
    def locked(line: str) -> None:
        raise TransactionError("another program holds the lock", transient=True)

    reconciler.set(name(2), objects(2))
    kernel.fault = locked
    with pytest.raises(TransactionError):
        reconciler.sync()
    assert reconciler.aside == {}
    kernel.fault = lambda line: None
    assert len(reconciler.sync().transactions) == 1


def test_a_kernel_that_takes_nothing_is_not_blamed_on_the_services(
    reconciler: Reconciler, kernel: FakeIptables
) -> None:
    reconciler.sync()
    for n in range(2, 60):
        reconciler.set(name(n), objects(n))
    kernel.refuses = lambda line: True
    with pytest.raises(TransactionError):
        reconciler.sync()


def test_not_even_a_single_service_is_blamed_when_its_tool_takes_nothing(
    reconciler: Reconciler, kernel: FakeIptables, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(transaction: Transaction) -> None:
        raise TransactionError("iptables-restore: cannot load a library")

    reconciler.sync()
    reconciler.set(name(2), objects(2))
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "apply", broken)
        with pytest.raises(TransactionError):
            reconciler.sync()
    assert reconciler.aside == {}
    assert len(reconciler.sync().transactions) == 1


def test_drift_is_found_and_repaired(reconciler: Reconciler, kernel: FakeIptables) -> None:
    for n in (2, 3):
        reconciler.set(name(n), objects(n))
    reconciler.sync()
    kernel.tables["nat"]["KUBE-SERVICES"].pop()
    kernel.tables["nat"][objects(3)[0].key[2]] = []
    assert reconciler.adopt() == 2
    reconciler.sync()
    assert reconciler.adopt() == 0


# -- the first sync, while it is planned


def test_what_is_stated_is_sent_while_the_rest_is_being_stated(reconciler: Reconciler, kernel: FakeIptables) -> None:
    told: list[str] = []

    def steps() -> Iterator[None]:
        yield
        for n in (2, 3):
            told.append(f"svc {n} stated")
            reconciler.set(name(n), objects(n))
            yield

    def apply(transaction: Transaction) -> None:
        for piece in transaction:
            told.extend(f"svc {n} sent" for n in (2, 3) if f"-d 10.0.0.{n}/32" in piece)
        FakeIptables.apply(kernel, transaction)

    kernel.apply = apply  # type: ignore[method-assign]
    result = reconciler.fill({}, steps())
    assert result
    assert told == ["svc 2 stated", "svc 2 sent", "svc 3 stated", "svc 3 sent"]
    assert len(result.transactions) == 1
    assert_as_planned(reconciler)


def test_who_wins_a_conflict_does_not_depend_on_who_was_sent_first(
    reconciler: Reconciler, kernel: FakeIptables
) -> None:
    winner, loser = objects(3), objects(2)
    claimed, chain = winner[1].added()[0].removeprefix("-I KUBE-SERVICES "), winner[0].key[2]
    other = claimed.replace(chain, loser[0].key[2])
    loser[1] = DispatchRule("nat", "KUBE-SERVICES", winner[1].key[3], other)

    def steps() -> Iterator[None]:
        yield
        reconciler.set(name(9), loser)
        yield
        reconciler.set(name(1), winner)
        yield

    assert reconciler.fill({}, steps())
    assert [rule.rpartition(" ")[2] for rule in kernel.tables["nat"]["KUBE-SERVICES"]] == [chain]
    assert_as_planned(reconciler)


def test_where_there_is_something_already_no_step_is_done(reconciler: Reconciler, kernel: FakeIptables) -> None:
    reconciler.set(name(2), objects(2))
    reconciler.sync()
    restarted = Reconciler(kernel)
    restarted.frame([DispatchChain("nat", "KUBE-SERVICES")])
    steps = iter([None])
    assert restarted.fill(kernel.read(), steps) is None
    assert next(steps, "done already") is None
    assert Reconciler(FakeIptables(batch=500)).fill({}, iter([None])) is None


def test_where_nothing_is_to_be_done_nothing_is_sent(kernel: FakeIptables) -> None:
    for _ in range(2):
        reconciler = Reconciler(kernel)
        reconciler.frame([DispatchChain("nat", "KUBE-SERVICES")])
        assert reconciler.fill(kernel.read(), iter([None, None])) is not None
    assert len(kernel.sent) == 1


def test_after_a_failure_all_of_it_is_written(reconciler: Reconciler, kernel: FakeIptables) -> None:
    def steps() -> Iterator[None]:
        yield
        for n in range(2, 8):
            reconciler.set(name(n), objects(n))
            yield

    planning = steps()
    kernel.refuses = lambda line: "-d 10.0.0.4/32" in line
    with pytest.raises(TransactionError, match=r"10\.0\.0\.4"):
        reconciler.fill({}, planning)
    kernel.refuses = lambda line: False
    assert list(planning) == [], "the tool was told all of it before it said no"
    assert reconciler.adopt() > 0
    reconciler.sync()
    assert len(kernel.tables["nat"]["KUBE-SERVICES"]) == 6
    assert_as_planned(reconciler)


def assert_as_planned(reconciler: Reconciler) -> None:
    assert reconciler.pending() == 0
    assert reconciler.adopt() == 0
