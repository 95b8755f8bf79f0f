"""IPVS mode, from manifests to packets: real connections do what they do in iptables mode.

docs/modes.md lists where IPVS itself makes a difference; each such row is named here, with what it does instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.packets import behaviour
from tests.packets.agent import Agent, command, golden_manifests, running
from tests.packets.behaviour import Outcome, Row
from tests.packets.topology import Network, echo_server, network, settle

pytestmark = pytest.mark.ipvs

# Policy Local: one virtual server has one list of real servers, whoever asks, and it is the local ones; in iptables
# mode pods and the node itself reach all.
LOCAL_FOR_ALL = {"feat/extlocal", "feat/nplocal", "feat/lblocal", "feat/lbsrclocal", "feat/termmix", "dual/lblocal"}
# internalTrafficPolicy Local and nobody here: the node's own connections meet IPVS before any filter.
REFUSED_TO_NODE = {("feat/itp0", "vip"), ("feat/itplbl", "vip")}


def expected(row: Row) -> str:
    """What IPVS mode does where iptables mode does `row.outcome`."""
    if row.side == "node" and (row.service, row.kind) in REFUSED_TO_NODE:
        return "refused"
    if row.service in LOCAL_FOR_ALL and row.kind != "vip" and row.side in ("pod", "node"):
        want = Outcome.parse(row.outcome)
        if want.endpoints:
            # kube-proxy's IPVS mode does so too; the node's own connections keep the address they go to as source.
            return next(r.outcome for r in behaviour.rows("behaviour-ipvs.tsv") if r[:6] == row[:6])
    return row.outcome


@pytest.fixture(scope="module")
def on_n1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """The agent on n1 with the golden objects, after its first sync."""
    folder = tmp_path_factory.mktemp("ipvs")
    argv = command(
        golden_manifests(folder / "manifests"), "--proxy-mode", "ipvs", "--iptables-variant", "legacy", "-v", "1"
    )
    with (
        network(behaviour.all_endpoints()) as net,
        echo_server(net.pods, behaviour.endpoint_ports()),
        running(net, argv, folder / "log") as agent,
    ):
        assert settle(lambda: synced(net, agent), seconds=60), agent.tail()
        yield net


def synced(net: Network, agent: Agent) -> bool:
    agent.check()
    return "fd00:10:96::101" in net.node.run("ip", "-6", "addr")


def probe(net: Network, rows: list[Row]) -> list[str]:
    """What is wrong, tried by one side at a time: many at once are more than one slow processor answers in time.

    Rows that go wrong are tried once more, by themselves.
    """
    wrong: list[Row] = []
    for side in behaviour.SIDES:
        met = behaviour.probe(net, [row for row in rows if row.side == side])
        wrong += [row for row, outcome in met.items() if not behaviour.agrees(row, outcome)]
    return behaviour.wrong_rows(behaviour.probe(net, wrong)) if wrong else []


def test_golden_behaviour(on_n1: Network) -> None:
    rows = [row._replace(outcome=expected(row)) for row in behaviour.rows()]
    wrong = probe(on_n1, rows)
    assert not wrong, f"{len(wrong)} of {len(rows)} rows\n" + "\n".join(wrong)


def test_the_exceptions_are_few() -> None:
    different = [row for row in behaviour.rows() if expected(row) != row.outcome]
    assert 0 < len(different) < 30
    assert {row.side for row in different} == {"pod", "node"}


def test_hosts_own_ports_do_not_answer_on_a_vip(on_n1: Network) -> None:
    """kubernetes#72236: a port of the VIP that no service has is refused, though the node listens on it."""
    with echo_server(on_n1.node, [("TCP", 4567)]):
        row = Row("pod", "feat/cip:http", "vip", "TCP", "10.97.0.1", 4567, "refused")
        own = Row("pod", "feat/cip:http", "vip", "TCP", "10.128.1.1", 4567, "to 10.128.1.1:4567 from 10.128.1.10")
        assert probe(on_n1, [row, own]) == []


PING = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
    sock.settimeout(10)
    sock.connect(("10.97.0.1", 0))
    sock.send(bytes([8, 0, 0xF7, 0xFF, 0, 0, 0, 0]))  # echo request with its checksum
    try:
        sock.recv(100)
    except ConnectionRefusedError:
        print("refused")
"""


def test_ping_of_a_vip_is_refused(on_n1: Network) -> None:
    """As by kube-proxy: KUBE-IPVS-FILTER refuses whatever is no service. In iptables mode nobody answers."""
    assert on_n1.client.run(sys.executable, "-c", PING) == "refused\n"
