"""Any sequence of events, restarts and meddling, against the real kernel: it holds what a plan from scratch says,
and nobody changes seats who need not.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Batch, Family, Object, Ref
from miniproxy.planner import nftables
from miniproxy.planner.nftables import Frontend
from miniproxy.transaction import Transaction
from tests import world

from .inside import Inside, inside

SETTINGS = Settings(
    mode="nftables",
    node_name="n1",
    cluster_cidrs=("10.200.0.0/16", "fd00:200::/32"),
    node_port_addresses=("primary",),
    service_cidrs=("10.96.0.0/16", "fd00:96::/112"),
    nftables_counters=True,
)
MEDDLING = (
    "delete element {where} {set} {{ {element} }}",
    "flush chain {where} cluster",
    "flush chain {where} choose-all",
    "add rule {where} services drop",
    "insert rule {where} services accept",
    "add rule {where} choose-all-32 accept",
    "add chain {where} foreign {{ type filter hook input priority 3; }}\nadd rule {where} foreign accept",
    "add set {where} foreign {{ type mark; }}\nadd element {where} foreign {{ 7 }}",
    "add element {where} endpoints {{ {any} . tcp . 4 . 77777 : {any} . 9 }}",
    "add element {where} endpoints-32 {{ {any} . tcp . 4 . 20000 : {any} . 9 }}",
    "add element {where} sizes {{ {any} . udp . 4 . 160000 }}",
    "add element {where} external {{ {any} . tcp . 4 }}",
    "add element {where} affinity {{ {any} . tcp . 4 . 3 : goto choose-all }}",
    "add element {where} cluster-ips {{ {any} }}",
    "delete table {where}",
    'delete table {where}\nadd table {where} {{ comment "of old"; }}\nadd chain {where} old',
)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.context = inside()
        self.inside: Inside = self.context.__enter__()
        self.objects: dict[Ref, Object] = {}
        self.start()

    def teardown(self) -> None:
        self.context.__exit__(None, None, None)

    def start(self) -> None:
        self.backends = self.inside.backends()
        self.agent = Agent(SETTINGS, nftables, self.backends)
        self.agent.handle(Batch(tuple(self.objects.values()), synced=True))

    def sync(self) -> list[Transaction]:
        results = self.agent.sync()
        assert not [r.error for r in results if r.error]
        assert not [r.result.set_aside for r in results if r.result and r.result.set_aside]
        return [t for r in results if r.result for t in r.result.transactions]

    def deliver(self, *upserts: Object, deletes: tuple[Ref, ...] = ()) -> None:
        seats = {family: dict(backend._held.frontends) for family, backend in self.backends.items()}
        self.objects.update({obj.ref: obj for obj in upserts})
        for ref in deletes:
            self.objects.pop(ref, None)
        self.agent.handle(Batch(upserts, deletes))
        self.sync()
        for family, backend in self.backends.items():
            for key, after in backend._held.frontends.items():
                if key in seats[family]:
                    assert_seated(seats[family][key], after)

    @rule(service=st.sampled_from(world.NAMES).flatmap(world.services))
    def put_service(self, service: Any) -> None:
        self.deliver(service)

    @rule(found=world.slices())
    def put_slice(self, found: Any) -> None:
        self.deliver(found)

    @rule(service=st.sampled_from(world.NAMES).flatmap(world.services), slices=st.lists(world.slices(), max_size=4))
    def put_many(self, service: Any, slices: list[Any]) -> None:
        self.deliver(service, *slices)

    @rule(node=world.nodes)
    def put_node(self, node: Any) -> None:
        self.deliver(node)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.objects))) if self.objects else Ref("Service", "ns", "a")
        if gone.kind != "Node":
            self.deliver(deletes=(gone,))

    @rule()
    def restart(self) -> None:
        """Whoever comes next finds everything right, down to the seats."""
        before = {family: dict(backend._held.frontends) for family, backend in self.backends.items()}
        self.start()
        assert self.sync() == []
        assert {family: dict(backend._held.frontends) for family, backend in self.backends.items()} == before

    @rule(what=st.lists(st.sampled_from(MEDDLING), min_size=1, max_size=3), seed=st.integers(0, 99))
    def meddle(self, what: list[str], seed: int) -> None:
        for family in Family:
            for script in what:
                self.inside.runner(["nft", "-f", "-"], self.meddling(family, script, random.Random(seed)))
        self.agent.check()
        self.sync()

    def meddling(self, family: Family, script: str, dice: random.Random) -> str:
        where = "ip6 miniproxy" if family is Family.V6 else "ip miniproxy"
        frontends = list(self.backends[family]._held.frontends.values())
        elements = sorted(element for frontend in frontends for element in frontend.elements())
        name, element, _ = dice.choice(elements) if elements else ("cluster-ips", "10.0.0.0", "")
        address = "fd00:7::7" if family is Family.V6 else "10.7.7.7"
        return script.format(where=where, set=name, element=element, any=address)

    @invariant()
    def kernel_holds_the_plan(self) -> None:
        self.sync()
        scratch = Agent(SETTINGS, nftables, self.inside.backends())
        scratch.handle(Batch(tuple(self.objects.values()), synced=True))
        scratch.replan()
        for family in Family:
            wanted = scratch.reconcilers[family].desired
            held = self.inside.backend(family).read()
            assert held.keys() == wanted.keys()
            wrong = [key for key in wanted if not self.backends[family].same(wanted[key], held[key])]
            assert not wrong

    @invariant()
    def what_is_shown_can_be_loaded(self) -> None:
        """`plan` prints a ruleset that nft takes."""
        for reconciler in self.agent.reconcilers.values():
            shown = nftables.show(reconciler.desired.values())
            self.inside.nft("-c", "-f", "-", stdin=f"flush ruleset\n{shown}")

    @invariant()
    def listing_can_be_restored(self) -> None:
        """Whoever saves the ruleset to load it at boot finds that ours does not stand in the way."""
        listing = self.inside.nft("list", "ruleset")
        self.inside.nft("-c", "-f", "-", stdin=f"flush ruleset\n{listing}")


def assert_seated(before: Frontend, after: Frontend) -> None:
    """With affinity, nobody moves. Without, only the last move, into holes."""
    if bool(before.affinity) != bool(after.affinity):
        return
    for old, new in ((before.endpoints, after.endpoints), (before.local, after.local)):
        for index, endpoint in enumerate(old):
            if endpoint and endpoint in new and (after.affinity or index < len(new)):
                assert new[index] == endpoint


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=12,
    stateful_step_count=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # each step runs nft: to shrink would take an hour
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
