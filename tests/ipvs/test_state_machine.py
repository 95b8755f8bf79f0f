"""IPVS mode: any sequence of events, faults, restarts and meddling ends where a plan from scratch would have begun."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.model import Family
from miniproxy.planner import ipvs
from miniproxy.planner.ipvs_text import VirtualServer
from tests.machine import WorldMachine

from .fake_ipvs import FakeIpvs

SETTINGS = Settings(mode="ipvs", node_name="n1", cluster_cidrs=("10.200.0.0/16", "fd00:200::/32"))
# The second and third are addresses that world.services uses as external ones.
ADDRESSES = ("10.7.0.1", "10.51.0.1", "10.61.0.2", "fd00:7::1", "fd00:51::1")


class Machine(WorldMachine):
    def __init__(self) -> None:
        self.local = set(ADDRESSES[:1])
        super().__init__()

    def empty_kernels(self) -> dict[Family, Any]:
        return {family: FakeIpvs() for family in Family}

    def make_agent(self, kernels: dict[Family, Any]) -> Agent:
        return Agent(SETTINGS, ipvs, kernels, local_addresses=self.local_addresses)

    def local_addresses(self, family: Family) -> list[str]:
        return sorted(a for a in self.local if Family.of(a) is family)

    @rule(local=st.sets(st.sampled_from(ADDRESSES)))
    def readdress(self, local: set[str]) -> None:
        """Addresses of the node come and go, and the kernel says so."""
        self.local = local
        self.agent.plan_frame()
        self.sync(False)

    @rule(data=st.data())
    def meddle(self, data: st.DataObject) -> None:
        """Somebody removes a part of what we made."""
        kernel = self.kernels[data.draw(st.sampled_from(list(Family)))]
        how = data.draw(st.sampled_from(("server", "real", "weight", "address", "entry", "rule", "link")))
        if how == "link":
            kernel.links.clear()
            kernel.addresses.clear()
        elif how == "address" and kernel.addresses:
            kernel.addresses.remove(data.draw(st.sampled_from(sorted(kernel.addresses))))
        elif how == "entry" and kernel.sets:
            entries = kernel.sets[data.draw(st.sampled_from(sorted(kernel.sets)))][1]
            entries.clear()
        elif how == "rule":
            table = kernel.tables.tables["nat"]
            table[data.draw(st.sampled_from(sorted(table)))] = []
        elif kernel.servers:
            key = data.draw(st.sampled_from(sorted(kernel.servers)))
            server = kernel.servers[key]
            if how == "server":
                del kernel.servers[key]
            elif how == "real":
                kernel.servers[key] = server._replace(servers=server.servers[1:])
            else:
                kernel.servers[key] = server._replace(servers=tuple(s._replace(weight=3) for s in server.servers))
        self.agent.check()
        self.sync(False)

    @rule(data=st.data())
    def connections_end(self, data: st.DataObject) -> None:
        """Some real servers on their way out still have connections; the others are gone after a look."""
        for kernel in self.kernels.values():
            leaving = sorted(kernel.leaving())
            kernel.connections = set(data.draw(st.sets(st.sampled_from(leaving)))) if leaving else set()
            if kernel.draining.due < float("inf"):
                kernel.draining.look()
            if not self.pending:
                assert set(kernel.leaving()) == kernel.connections

    @invariant()
    def what_leaves_does_not_serve(self) -> None:
        """A TCP server of weight 0 is always one that nobody wants, and each is remembered."""
        if self.pending:
            return
        for family, kernel in self.kernels.items():
            for obj in self.agent.reconcilers[family].desired.values():
                if isinstance(obj, VirtualServer) and obj.protocol == "TCP":
                    assert {s for s in kernel.servers[obj.key].servers if s.weight} == set(obj.servers)
            assert len(kernel.draining) == len(kernel.leaving())


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(
    max_examples=200, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
