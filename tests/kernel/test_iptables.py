"""The iptables writer against the real kernel, both variants and families: what is written reads back as planned."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.kernel.exec import Completed, run
from miniproxy.kernel.iptables import Iptables, Variant, cleanup, detect_variant, missing
from miniproxy.model import Batch, Family, Object, ServicePortName
from miniproxy.planner import iptables, ipvs_text
from miniproxy.planner.iptables import Chain
from miniproxy.transaction import Transaction, TransactionError
from tests import cluster, world
from tests.packets.topology import Namespace

SETTINGS = Settings(node_name="n1", cluster_cidrs=("10.200.0.0/16", "fd00:200::/32"))
VARIANTS: tuple[Variant, ...] = ("nft", "legacy")
GOLDEN = Path(__file__).parents[1] / "golden"

Worlds = st.tuples(st.tuples(*(world.services(name) for name in world.NAMES)), st.lists(world.slices(), max_size=8))


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace.create() as namespace:
        yield namespace


class Inside:
    """Runs programs inside a namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def __call__(self, argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        return run(self.namespace.command(argv), text, timeout)


def agent_in(namespace: Namespace, variant: Variant, objects: Sequence[Object]) -> Agent:
    agent = Agent(SETTINGS, iptables, {f: Iptables(f, variant, Inside(namespace)) for f in Family})
    agent.handle(Batch(tuple(objects), synced=True))
    return agent


def sync(agent: Agent) -> list[Transaction]:
    results = agent.sync()
    assert not [r.error for r in results if r.error]
    return [t for r in results if r.result for t in r.result.transactions]


@pytest.mark.parametrize("variant", VARIANTS)
@given(before=Worlds, after=Worlds)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_written_reads_back_as_planned(variant: Variant, before: Any, after: Any) -> None:
    with Namespace.create() as namespace:
        agent = agent_in(namespace, variant, [*before[0], *before[1]])
        sync(agent)
        agent.handle(Batch((*after[0], *after[1])))
        sync(agent)
        for family, reconciler in agent.reconcilers.items():
            actual = reconciler.backend.read()
            assert actual == reconciler.desired, f"{family}: not the planned text"
            assert reconciler.adopt() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_agent_that_restarts_writes_nothing(namespace: Namespace, variant: Variant) -> None:
    objects = world_of(seed=1)
    sync(agent_in(namespace, variant, objects))
    assert sync(agent_in(namespace, variant, objects)) == []


def world_of(seed: int) -> list[Object]:
    """Some objects, the same for the same seed."""
    found: list[Object] = []

    @settings(max_examples=1, database=None, derandomize=True, deadline=None)
    @given(Worlds)
    def draw(objects: Any) -> None:
        found[:] = [*objects[0], *objects[1]]

    random.seed(seed)
    draw()
    return found


KUBELETS = """*mangle
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
COMMIT
"""  # noqa: E501
FOREIGN = """*nat
:CNI-HOSTPORT-SETMARK - [0:0]
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j KUBE-MARK-MASQ
-A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE
-A PREROUTING -s 10.9.1.0/24 -j KUBE-MARK-MASQ
COMMIT
*filter
:CALICO - [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A FORWARD -j CALICO
-A CALICO -m comment --comment "not KUBE-SERVICES" -j ACCEPT
COMMIT
"""


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_others_made_survives_start_changes_and_cleanup(namespace: Namespace, variant: Variant) -> None:
    run = Inside(namespace)
    kernel = Iptables(Family.V4, variant, run)
    marked = ":KUBE-MARK-MASQ - [0:0]\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n"
    kernel.apply(Transaction.of(FOREIGN.replace("*nat\n", "*nat\n" + marked, 1)))
    before = rules_of(kernel)
    agent = agent_in(namespace, variant, world_of(seed=2))
    sync(agent)
    agent.handle(Batch(tuple(world_of(seed=3))))
    sync(agent)
    assert set(before) <= set(rules_of(kernel))
    assert len(rules_of(kernel)) > len(before)
    assert cleanup(Family.V4, variant, run) > 0
    assert rules_of(kernel) == before, "KUBE-MARK-MASQ stays too, somebody else jumps to it"
    assert cleanup(Family.V4, variant, run) == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Completed(0, "-P POSTROUTING ACCEPT", ""), ""),
        (Completed(3, "", "can't initialize ip6tables table `nat'"), "ip6tables-legacy: can't initialize"),
        (Completed(4, "", "Another app is currently holding the xtables lock."), ""),
        (FileNotFoundError(), "ip6tables-legacy is not installed"),
    ],
)
def test_a_family_is_missing_only_if_it_will_stay_so(answer: Completed | Exception, said: str) -> None:
    def runner(argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = missing(Family.V6, "legacy", runner)
    assert found.startswith(said)
    assert bool(found) is bool(said)


def rules_of(kernel: Iptables) -> list[str]:
    return sorted(line for line in kernel.save().splitlines() if line.startswith("-A"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cleanup_leaves_no_chain(namespace: Namespace, variant: Variant) -> None:
    sync(agent_in(namespace, variant, world_of(seed=4)))
    for family in Family:
        cleanup(family, variant, Inside(namespace))
        assert "KUBE" not in Iptables(family, variant, Inside(namespace)).save()


def test_cleanup_leaves_the_kubelets_firewall(namespace: Namespace) -> None:
    kernel = Iptables(Family.V4, "nft", Inside(namespace))
    sync(agent_in(namespace, "nft", world_of(seed=4)))
    kernel.apply(Transaction.of("*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"))
    cleanup(Family.V4, "nft", Inside(namespace))
    assert [r.split(" -j ")[-1] for r in rules_of(kernel)] == ["KUBE-FIREWALL", "DROP", "KUBE-FIREWALL"]


@pytest.mark.parametrize("localhost_node_ports", [True, False])
def test_the_kubelets_firewall_stays(namespace: Namespace, localhost_node_ports: bool) -> None:
    """The kubelet writes it once, at its start; it is there when our frame has none of its rules, too."""
    kernel = Iptables(Family.V4, "nft", Inside(namespace))
    kernel.apply(Transaction.of(KUBELETS))
    before = rules_of(kernel)
    changed = msgspec.structs.replace(SETTINGS, localhost_node_ports=localhost_node_ports)
    agent = Agent(changed, iptables, {Family.V4: kernel})
    agent.handle(Batch(tuple(world_of(seed=4)), synced=True))
    sync(agent)
    assert agent.check() == {Family.V4: 0}
    assert set(before) <= set(rules_of(kernel))
    assert sum(rule.startswith("-A KUBE-FIREWALL") for rule in rules_of(kernel)) == 1


def test_ipvs_mode_has_nothing_to_do_with_the_kubelets_firewall(namespace: Namespace) -> None:
    kernel = Iptables(Family.V4, "nft", Inside(namespace), ipvs_text.LAYOUT)
    kernel.apply(Transaction.of(KUBELETS))
    assert kernel.read() == {}


@pytest.mark.parametrize("restarted", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chain_that_others_jump_to_keeps_no_other_from_going(
    namespace: Namespace, variant: Variant, restarted: bool
) -> None:
    objects = [thing for n in (1, 2) for thing in (cluster.service(n), cluster.endpoints(n, 1))]
    agent = agent_in(namespace, variant, objects)
    sync(agent)
    kernel = Iptables(Family.V4, variant, Inside(namespace))
    chain = next(r.rpartition(" ")[2] for r in rules_of(kernel) if "svc-1" in r and " -j KUBE-SVC-" in r)
    foreign = f"-A OUTPUT -d 10.9.9.9/32 -j {chain}"
    kernel.apply(Transaction.of(f"*nat\n{foreign}\nCOMMIT\n"))
    if restarted:
        agent = agent_in(namespace, variant, [])
    else:
        agent.check()
        agent.handle(Batch(deletes=tuple(cluster.service(n).ref for n in (1, 2))))
    sync(agent)
    assert [r for r in rules_of(kernel) if "svc-" in r or chain in r] == [foreign]
    assert agent.check() == dict.fromkeys(Family, 0)
    kernel.apply(Transaction.of(f"*nat\n{foreign.replace('-A', '-D', 1)}\nCOMMIT\n"))
    agent.check()
    sync(agent)
    assert chain not in kernel.save()


@pytest.mark.parametrize("there", [True, False])
def test_rules_that_cannot_be_read_are_not_taken_for_none(namespace: Namespace, there: bool) -> None:
    """The legacy variant needs a raw socket as soon as there is a table."""
    if there:
        Iptables(Family.V4, "legacy", Inside(namespace)).apply(Transaction.of("*nat\n:KUBE-SERVICES - [0:0]\nCOMMIT\n"))
    argv = ["setpriv", "--bounding-set=-net_raw", sys.executable, "-m", "miniproxy", "cleanup", "--json"]
    done = subprocess.run(namespace.command(argv), capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert done.returncode == int(there)
    assert ["iptables-legacy-save: " in error for error in told["errors"]] == [True] * there
    assert ("iptables-legacy IPv4" in told["removed"]) is not there
    assert "iptables-nft IPv4" in told["removed"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_taking_over_from_kube_proxy_rewrites_nothing_that_is_right(namespace: Namespace, variant: Variant) -> None:
    """Its chains spelled a little differently (as older and newer iptables do) are still right."""
    objects = world_of(seed=5)
    agent = agent_in(namespace, variant, objects)
    agent.replan()
    text = agent.reconcilers[Family.V4].preview().text
    text = text.replace("--set-xmark 0x4000/0x0", "--xor-mark 0x4000")
    agent.reconcilers[Family.V4].backend.apply(Transaction.of(text))
    stale = ":KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n-A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-MARK-MASQ\n"
    agent.reconcilers[Family.V4].backend.apply(Transaction.of(f"*nat\n{stale}COMMIT\n"))
    lines = "".join(t.text for t in sync(agent) if "icmp6" not in t.text).splitlines()
    assert [line for line in lines if "KUBE-SVC-A" in line] == [
        ":KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]",
        "-X KUBE-SVC-AAAAAAAAAAAAAAAA",
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_object_is_set_aside_by_name(namespace: Namespace, variant: Variant) -> None:
    agent = agent_in(namespace, variant, world_of(seed=6))
    sync(agent)
    reconciler = agent.reconcilers[Family.V4]
    bad, good = (ServicePortName("ns", name, "http", "TCP") for name in ("bad", "good"))
    reconciler.set(bad, [Chain("nat", "KUBE-SVC-BBBBBBBBBBBBBBBB", ("-j NO-SUCH-TARGET",))])
    reconciler.set(good, [Chain("nat", "KUBE-SVC-CCCCCCCCCCCCCCCC", ("-j KUBE-MARK-MASQ",))])
    result = reconciler.sync()
    assert [name for name, _ in result.set_aside] == [bad]
    assert "KUBE-SVC-CCCCCCCCCCCCCCCC" in str(reconciler.backend.read())
    assert "KUBE-SVC-BBBBBBBBBBBBBBBB" not in str(reconciler.backend.read())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_refusal_shows_the_line(namespace: Namespace, variant: Variant) -> None:
    kernel = Iptables(Family.V4, variant, Inside(namespace))
    with pytest.raises(TransactionError, match="-A KUBE-X -p tcp --dport nonsense") as caught:
        kernel.apply(Transaction.of("*nat\n:KUBE-X - [0:0]\n-A KUBE-X -p tcp --dport nonsense\nCOMMIT\n"))
    assert not caught.value.transient


def test_a_missing_program_blames_nobody() -> None:
    def missing(argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        raise FileNotFoundError(argv[0])

    with pytest.raises(TransactionError, match="install the package iptables") as caught:
        Iptables(Family.V4, "nft", missing).read()
    assert caught.value.transient


def test_a_held_lock_blames_nobody(namespace: Namespace) -> None:
    """The legacy variant has one lock per machine, and gives up when somebody else keeps it."""
    kernel = Iptables(Family.V4, "legacy", Inside(namespace))
    hold = namespace.command(["flock", "/run/xtables.lock", "sh", "-c", "echo held; exec cat"])
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdin
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TransactionError) as caught:
            kernel.apply(Transaction.of("*nat\n:KUBE-X - [0:0]\nCOMMIT\n"))
        assert caught.value.transient
        holder.stdin.close()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "made",
    [
        "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n",
        "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n",
        "*filter\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\nCOMMIT\n",
    ],
)
def test_follows_the_variant_in_use(namespace: Namespace, variant: Variant, made: str) -> None:
    run = Inside(namespace)
    other: Variant = "legacy" if variant == "nft" else "nft"
    if "mangle" in made:  # a hint counts for more than rules
        rule = "*filter\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\nCOMMIT\n"
        Iptables(Family.V4, other, run).apply(Transaction.of(rule))
    Iptables(Family.V4, variant, run).apply(Transaction.of(made))
    assert detect_variant(Family.V4, run) == variant


def test_without_any_trace_the_systems_default(namespace: Namespace) -> None:
    run = Inside(namespace)
    default = "legacy" if "legacy" in run(["iptables", "--version"]).out else "nft"
    assert detect_variant(Family.V4, run) == default


def test_the_search_leaves_no_rule_and_no_chain(namespace: Namespace) -> None:
    run = Inside(namespace)
    variant = detect_variant(Family.V4, run)
    saved = Iptables(Family.V4, variant, run).save()
    assert "-A" not in saved
    assert "PROBE" not in saved


@pytest.mark.parametrize("broken", VARIANTS)
def test_a_default_that_cannot_be_written_is_no_choice(namespace: Namespace, broken: Variant) -> None:
    """As in a kernel with nf_tables but without its IPv4: everything but a commit succeeds."""

    def run(argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        if argv[0] == "iptables":
            return Completed(0, f"iptables v1.8.9 ({'legacy' if broken == 'legacy' else 'nf_tables'})\n", "")
        if argv[0] == f"iptables-{broken}-restore":
            return Completed(4, "", "line 2: TABLE_ADD failed (Operation not supported): table nat")
        return inside(argv, text, timeout)

    inside = Inside(namespace)
    assert detect_variant(Family.V4, run) == ("nft" if broken == "legacy" else "legacy")


def test_whoever_only_asks_writes_nothing(namespace: Namespace) -> None:
    inside = Inside(namespace)
    written: list[str] = []

    def run(argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        written.extend(argv[:1] if "restore" in argv[0] else ())
        return inside(argv, text, timeout)

    default = "legacy" if "legacy" in inside(["iptables", "--version"]).out else "nft"
    assert detect_variant(Family.V4, run, probing=False) == default
    assert written == []
    assert inside(["nft", "list", "tables"]).out == ""


def test_where_nothing_can_be_written_it_stays_with_the_default(namespace: Namespace) -> None:
    """The first write then says why."""

    def run(argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        if argv[0].endswith("-restore"):
            return Completed(4, "", "Permission denied (you must be root)")
        return inside(argv, text, timeout)

    inside = Inside(namespace)
    default = "legacy" if "legacy" in inside(["iptables", "--version"]).out else "nft"
    assert detect_variant(Family.V4, run) == default
