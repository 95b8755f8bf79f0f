"""iptables mode, from manifests to packets: the rules are kube-proxy's, and so is what connections do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from . import behaviour
from .agent import GOLDEN_RULES, Agent, command, golden_manifests, rule_differences, running
from .topology import Network, echo_server, network, settle


class Running(NamedTuple):
    network: Network
    agent: Agent
    variant: str


@pytest.fixture(scope="module", params=["nft", "legacy"])
def on_n1(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The agent on n1 with the golden objects, after its first sync."""
    variant: str = request.param
    folder = tmp_path_factory.mktemp(variant)
    argv = command(golden_manifests(folder / "manifests"), "--iptables-variant", variant)
    with (
        network(behaviour.all_endpoints()) as net,
        echo_server(net.pods, behaviour.endpoint_ports()),
        running(net, argv, folder / "log") as agent,
    ):

        def synced() -> bool:
            agent.check()
            return not rule_differences(net, variant, GOLDEN_RULES)

        # Rules that do not become right are for test_golden_rules to report; connections are tried anyway.
        settle(synced, seconds=20)
        yield Running(net, agent, variant)


def test_golden_rules(on_n1: Running) -> None:
    wrong = rule_differences(on_n1.network, on_n1.variant, GOLDEN_RULES)
    assert not wrong, f"{len(wrong)} chains\n" + "\n".join(wrong) + "\n" + on_n1.agent.tail()


def test_golden_behaviour(on_n1: Running) -> None:
    rows = behaviour.rows()
    wrong = behaviour.wrong_rows(behaviour.probe(on_n1.network, rows))
    assert not wrong, f"{len(wrong)} of {len(rows)} rows\n" + "\n".join(wrong)
    on_n1.agent.check()
