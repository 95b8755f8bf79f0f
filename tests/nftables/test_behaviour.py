"""nftables mode, from manifests to packets: connections do what they do under kube-proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.packets import behaviour
from tests.packets.agent import Agent, command, golden_manifests, running
from tests.packets.topology import Network, echo_server, network, settle


@pytest.fixture(scope="module")
def on_n1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, Agent]]:
    """The agent on n1 with the golden objects, after its first sync."""
    folder = tmp_path_factory.mktemp("nftables")
    argv = command(golden_manifests(folder / "manifests"), "--proxy-mode", "nftables")
    with (
        network(behaviour.all_endpoints()) as net,
        echo_server(net.pods, behaviour.endpoint_ports()),
        running(net, argv, folder / "log") as agent,
    ):

        def synced() -> bool:
            agent.check()
            tables = net.node.run("nft", "list", "tables")
            # IPv6 is written last, and all of it in one transaction.
            return "table ip6 miniproxy" in tables

        settle(synced, seconds=20)
        yield net, agent


def test_golden_behaviour(on_n1: tuple[Network, Agent]) -> None:
    net, agent = on_n1
    rows = behaviour.rows()
    wrong = behaviour.wrong_rows(behaviour.probe(net, rows))
    assert not wrong, f"{len(wrong)} of {len(rows)} rows\n" + "\n".join(wrong)
    agent.check()
