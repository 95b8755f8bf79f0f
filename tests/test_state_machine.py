"""Any sequence of events, faults, restarts and meddling ends where a plan from scratch would have begun."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Family
from miniproxy.planner import iptables
from miniproxy.planner.iptables import SHARED_FIREWALL
from tests import invariants
from tests.fake_iptables import FakeIptables
from tests.machine import WorldMachine

SETTINGS = Settings(node_name="n1", cluster_cidrs=("10.200.0.0/16", "fd00:200::/32"))


class Planner:
    """The iptables planner for which a handful of endpoints are many, so that their number often matters."""

    MANY_ENDPOINTS = 4
    frame = staticmethod(iptables.frame)
    plan = staticmethod(iptables.plan)
    show = staticmethod(iptables.show)


class Machine(WorldMachine):
    def empty_kernels(self) -> dict[Family, Any]:
        return {family: FakeIptables() for family in Family}

    def make_agent(self, kernels: dict[Family, Any]) -> Agent:
        return Agent(SETTINGS, Planner(), kernels)

    @rule(data=st.data())
    def meddle(self, data: st.DataObject) -> None:
        """Somebody deletes a rule, empties a chain, or adds one of their own to ours."""
        kernel = self.kernels[data.draw(st.sampled_from(list(Family)))]
        table = kernel.tables[data.draw(st.sampled_from(("nat", "filter")))]
        chain = data.draw(st.sampled_from(sorted(table)))
        how = data.draw(st.sampled_from(("drop", "empty", "add")))
        if how == "empty":
            table[chain] = []
        elif how == "add" and chain.startswith("KUBE") and chain != SHARED_FIREWALL:
            table[chain].insert(0, "-j DROP")
        elif table[chain]:
            table[chain].pop(data.draw(st.integers(0, len(table[chain]) - 1)))
        self.agent.check()
        self.sync(False)

    @invariant()
    def rules_hold_together(self) -> None:
        if not self.pending:
            for kernel in self.kernels.values():
                invariants.check(kernel.tables)


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(
    max_examples=2000, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
