"""The agent may be killed at any moment: restarted, it programs what is planned; no connection suffers."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from miniproxy.agent import Agent as Core
from miniproxy.config import Settings
from miniproxy.model import Batch, Family, Kind
from miniproxy.planner import iptables as planner
from miniproxy.sources.wire import convert
from tests.fake_iptables import FakeIptables

from . import behaviour
from .agent import Agent, command, golden_manifests, rule_differences, running
from .churn import Churn, Object
from .topology import Network, echo_server, network, settle

KILLS = 25  # per variant
SETTINGS = Settings(node_name="n1", cluster_cidrs=("10.128.0.0/9", "fd00:128::/32"))
GOLDEN_KINDS: dict[str, Kind] = {"services": "Service", "endpointslices": "EndpointSlice"}


def planned(objects: list[Object]) -> tuple[str, str]:
    """(IPv4, IPv6) iptables-save text of the golden and these objects, planned from scratch."""
    found = [convert(item, kind).object for name, kind in GOLDEN_KINDS.items() for item in behaviour.items(name)]
    found += [convert(item).object for item in (behaviour.node(), *objects)]
    upserts = tuple(thing for thing in found if thing)
    fakes = {family: FakeIptables() for family in Family}
    core = Core(SETTINGS, planner, fakes)
    core.handle(Batch(upserts=upserts, synced=True))
    core.sync()
    return fakes[Family.V4].text(), fakes[Family.V6].text()


class Crashes:
    """Churn, kills and restarts of one agent, at moments that a seed decides."""

    def __init__(self, net: Network, folder: Path, variant: str) -> None:
        self.net = net
        self.variant = variant
        self.rng = random.Random(f"crash {variant}")
        self.churn = Churn(self.rng)
        self.manifests = golden_manifests(folder / "manifests")
        self.argv = command(self.manifests, "--iptables-variant", variant)
        self.log = folder / "log"
        self.kills = 0
        self.unfinished = 0  # kills that left work undone
        self.churn.write(self.manifests / "churn.json")

    def converge(self, agent: Agent) -> None:
        """Waits until the kernel is as planned from scratch."""
        want = planned(self.churn.objects)
        wrong = [""]

        def as_planned() -> bool:
            agent.check()
            wrong[:] = rule_differences(self.net, self.variant, want)
            return not wrong

        settle(as_planned, seconds=20)
        assert not wrong, f"after {self.kills} kills\n" + "\n".join(wrong) + "\n" + agent.tail()

    def kill_at_some_moment(self, agent: Agent, seconds: float) -> None:
        """Lets the cluster change for up to `seconds`, and kills the agent in the middle of it."""
        end = time.monotonic() + self.rng.uniform(0, seconds)
        while (left := end - time.monotonic()) > 0:
            self.churn.step()
            self.churn.write(self.manifests / "churn.json")
            time.sleep(min(left, self.rng.uniform(0, 0.1)))
        agent.check()
        agent.kill()
        self.kills += 1
        self.unfinished += bool(rule_differences(self.net, self.variant, planned(self.churn.objects)))

    def run(self, kills: int) -> None:
        while self.kills < kills:
            if self.rng.random() < 0.3:  # while it starts: reading its configuration, the folder or the kernel
                with running(self.net, self.argv, self.log) as agent:
                    self.kill_at_some_moment(agent, seconds=1)
            with running(self.net, self.argv, self.log) as agent:
                self.converge(agent)
                self.kill_at_some_moment(agent, seconds=0.5)
        with running(self.net, self.argv, self.log) as agent:
            self.converge(agent)


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_killed_at_random_moments(variant: str, tmp_path: Path) -> None:
    with (
        network(behaviour.all_endpoints()) as net,
        echo_server(net.pods, behaviour.endpoint_ports()),
    ):
        crashes = Crashes(net, tmp_path, variant)
        with running(net, crashes.argv, crashes.log) as agent:
            crashes.converge(agent)
            with behaviour.steady_clients(net) as failed:
                crashes.kill_at_some_moment(agent, seconds=0.5)
                crashes.run(KILLS)
        assert crashes.kills >= KILLS
        assert crashes.unfinished >= KILLS // 5, "the moments of the kills were not worth much"
        assert not failed, f"{len(failed)} connections through unchanged services\n" + "\n".join(failed[:20])
