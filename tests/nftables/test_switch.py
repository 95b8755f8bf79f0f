"""From one mode to the other and back while clients connect all the time: the new rules are there before the old
ones go, and no connection fails.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.packets import behaviour
from tests.packets.agent import GOLDEN_RULES, command, golden_manifests, rule_differences, running
from tests.packets.topology import Network, echo_server, network, settle

MODES = ("iptables", "nftables", "iptables", "nftables")


def in_place(net: Network) -> set[str]:
    """The modes of whose rules something is there."""
    modes = set()
    if " miniproxy\n" in net.node.run("nft", "list", "tables"):
        modes.add("nftables")
    if any("KUBE-SERVICES" in text for text in net.iptables_save("nft")):
        modes.add("iptables")
    return modes


def only(net: Network, mode: str) -> bool:
    return in_place(net) == {mode}


def test_switching_modes(tmp_path: Path) -> None:
    manifests = golden_manifests(tmp_path / "manifests")
    log = tmp_path / "log"
    with network(behaviour.all_endpoints()) as net, echo_server(net.pods, behaviour.endpoint_ports()):
        argv = command(manifests, "--iptables-variant", "nft")
        with running(net, [*argv, "--proxy-mode", MODES[0]], log) as agent:
            synced = settle(lambda: not rule_differences(net, "nft", GOLDEN_RULES), seconds=30)
            assert synced, agent.tail()
        with behaviour.steady_clients(net) as failed:
            for mode in MODES[1:]:
                with running(net, [*argv, "--proxy-mode", mode], log) as agent:
                    assert settle(partial(only, net, mode), seconds=30), agent.tail()
        assert not failed, f"{len(failed)} connections\n" + "\n".join(failed[:20])
        wrong = behaviour.wrong_rows(behaviour.probe(net, behaviour.rows()))
        assert not wrong, "\n".join(wrong)
