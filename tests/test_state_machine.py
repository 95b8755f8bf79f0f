"""Any sequence of events, faults, restarts and meddling ends where a plan from scratch would have begun."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Batch, Family, Node, Object, Ref
from miniproxy.planner import iptables
from miniproxy.transaction import TransactionError
from tests import invariants, world
from tests.fake_iptables import FakeIptables

SETTINGS = Settings(node_name="n1", cluster_cidrs=("10.200.0.0/16", "fd00:200::/32"))


class Planner:
    """The iptables planner for which a handful of endpoints are many, so that their number often matters."""

    MANY_ENDPOINTS = 4
    frame = staticmethod(iptables.frame)
    plan = staticmethod(iptables.plan)
    show = staticmethod(iptables.show)


def new_agent(kernels: dict[Family, FakeIptables], objects: dict[Ref, Object], batch: int = 0) -> Agent:
    agent = Agent(SETTINGS, Planner(), kernels)
    agent.handle(Batch(tuple(objects.values()), synced=True))
    return agent


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[Ref, Object] = {}
        self.kernels = {family: FakeIptables() for family in Family}
        self.agent = new_agent(self.kernels, self.objects)
        self.broken = False  # the kernel is not known to follow: a fault or meddling since the last repair

    def deliver(self, *upserts: Object, deletes: tuple[Ref, ...] = ()) -> None:
        self.objects.update({obj.ref: obj for obj in upserts})
        for ref in deletes:
            self.objects.pop(ref, None)
        self.agent.handle(Batch(upserts, deletes))

    @rule(service=st.sampled_from(world.NAMES).flatmap(world.services), quiet=st.booleans())
    def put_service(self, service: Any, quiet: bool) -> None:
        self.deliver(service)
        self.sync(quiet)

    @rule(found=world.slices(), quiet=st.booleans())
    def put_slice(self, found: Any, quiet: bool) -> None:
        self.deliver(found)
        self.sync(quiet)

    @rule(node=world.nodes, quiet=st.booleans())
    def put_node(self, node: Node, quiet: bool) -> None:
        self.deliver(node)
        self.sync(quiet)

    @rule(data=st.data(), quiet=st.booleans())
    def remove(self, data: st.DataObject, quiet: bool) -> None:
        gone = data.draw(st.sampled_from(sorted(self.objects))) if self.objects else Ref("Service", "ns", "a")
        if gone.kind != "Node":
            self.deliver(deletes=(gone,))
        self.sync(quiet)

    @rule()
    def restart(self) -> None:
        self.agent = new_agent(self.kernels, self.objects)
        self.sync(False)

    @rule(after=st.integers(0, 25), transient=st.booleans(), found=world.slices())
    def fault(self, after: int, transient: bool, found: Any) -> None:
        """The kernel fails once, in the middle of writing a change: between any two operations."""
        countdown = [after]

        def fail(line: str) -> None:
            countdown[0] -= 1
            if countdown[0] == -1:
                raise TransactionError("injected", transient=transient)

        for kernel in self.kernels.values():
            kernel.fault = fail
        self.deliver(found)
        self.agent.sync()
        for kernel in self.kernels.values():
            kernel.fault = lambda line: None
        self.agent.check()
        self.sync(False)

    @rule(data=st.data())
    def meddle(self, data: st.DataObject) -> None:
        """Somebody deletes a rule, empties a chain, or adds one of their own to ours."""
        kernel = self.kernels[data.draw(st.sampled_from(list(Family)))]
        table = kernel.tables[data.draw(st.sampled_from(("nat", "filter")))]
        chain = data.draw(st.sampled_from(sorted(table)))
        how = data.draw(st.sampled_from(("drop", "empty", "add")))
        if how == "empty":
            table[chain] = []
        elif how == "add" and chain.startswith("KUBE"):
            table[chain].insert(0, "-j DROP")
        elif table[chain]:
            table[chain].pop(data.draw(st.integers(0, len(table[chain]) - 1)))
        self.agent.check()
        self.sync(False)

    def sync(self, quiet: bool) -> None:
        """Sync, unless this change is to be coalesced with the next; then sync again to see that nothing is left."""
        self.pending = quiet
        if quiet:
            return
        assert all(synced.result for synced in self.agent.sync())
        before = [len(kernel.sent) for kernel in self.kernels.values()]
        self.agent.sync()
        assert [len(kernel.sent) for kernel in self.kernels.values()] == before, "a second sync wrote something"

    @invariant()
    def as_from_scratch(self) -> None:
        if getattr(self, "pending", True):
            return
        scratch = {family: FakeIptables() for family in Family}
        new_agent(scratch, self.objects).sync()
        for family, kernel in self.kernels.items():
            invariants.check(kernel.tables)
            assert kernel.read() == scratch[family].read()


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(
    max_examples=2000, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
