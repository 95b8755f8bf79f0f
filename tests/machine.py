"""What a state machine of any mode does whose kernel is in memory: events, faults between any two operations, restarts.

After each step that is not to be coalesced with the next, the kernel holds what a plan from scratch would have made of
it, and a second sync writes nothing.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from miniproxy.agent import Agent
from miniproxy.model import Batch, Family, Node, Object, Ref
from miniproxy.transaction import TransactionError
from tests import world


class WorldMachine(RuleBasedStateMachine):
    """A subclass says what its kernel is, and who meddles with it how."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[Ref, Object] = {}
        self.kernels = self.empty_kernels()
        self.agent = self.new_agent(self.kernels)
        self.pending = True  # something has been handed over and not been synced

    def empty_kernels(self) -> dict[Family, Any]:
        """Fakes with `sent`, all transactions there were, and `fault`, called with each operation."""
        raise NotImplementedError

    def make_agent(self, kernels: dict[Family, Any]) -> Agent:
        raise NotImplementedError

    def new_agent(self, kernels: dict[Family, Any]) -> Agent:
        agent = self.make_agent(kernels)
        agent.handle(Batch(tuple(self.objects.values()), synced=True))
        return agent

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
        self.agent = self.new_agent(self.kernels)
        self.sync(False)

    @rule(after=st.integers(0, 40), transient=st.booleans(), found=world.slices(), killed=st.booleans())
    def fault(self, after: int, transient: bool, found: Any, killed: bool) -> None:
        """The kernel fails once, in the middle of writing a change; the agent goes on, or the next one does."""
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
        if killed:
            self.agent = self.new_agent(self.kernels)
        else:
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
        if self.pending:
            return
        scratch = self.empty_kernels()
        self.new_agent(scratch).sync()
        for family, kernel in self.kernels.items():
            assert kernel.read() == scratch[family].read()
