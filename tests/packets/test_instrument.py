"""The instrument itself: under kube-proxy's own rules, real connections do what they did under kube-proxy.

If this fails, the network of topology.py or the clients of probe.py are wrong, not miniproxy.
"""

from __future__ import annotations

import time

import pytest

from . import behaviour
from .agent import GOLDEN_RULES, rule_differences
from .topology import echo_server, network


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_kube_proxys_rules_give_the_golden_behaviour(variant: str) -> None:
    rows = behaviour.rows()
    assert len(rows) == 267
    with network(behaviour.all_endpoints()) as net, echo_server(net.pods, behaviour.endpoint_ports()):
        net.restore(variant, GOLDEN_RULES)
        assert rule_differences(net, variant, GOLDEN_RULES) == []
        wrong = behaviour.wrong_rows(behaviour.probe(net, rows))
    assert not wrong, f"{len(wrong)} of {len(rows)} rows\n" + "\n".join(wrong)


def test_steady_clients_notice_a_moment_without_rules() -> None:
    with (
        network(behaviour.all_endpoints()) as net,
        echo_server(net.pods, behaviour.endpoint_ports()),
    ):
        net.restore("nft", GOLDEN_RULES)
        with behaviour.steady_clients(net) as failed:
            pass
        assert failed == []
        with behaviour.steady_clients(net) as failed:
            net.node.run("iptables-nft", "-t", "nat", "-F", "KUBE-SERVICES")
            time.sleep(0.5)
            net.restore("nft", GOLDEN_RULES)
        assert failed


def outcome(side: str, service_port: str, text: str) -> bool:
    """Whether `text` would be accepted for the cluster IP of this port."""
    [row] = [
        row
        for row in behaviour.rows()
        if (row.side, row.service_port, row.kind) == (side, service_port, "vip") and ":" not in row.address
    ]
    return behaviour.agrees(row, text)


@pytest.mark.parametrize(
    ("service_port", "text", "right"),
    [
        ("feat/np:http", "to 10.180.1.2:8080 10.180.1.1:8080 from 10.128.1.10", True),
        ("feat/np:http", "to 10.180.1.1:8080 from 10.128.1.10", False),
        ("feat/np:http", "to 10.180.1.1:8080 10.180.1.2:8080 10.180.1.3:8080 from 10.128.1.10", False),
        ("feat/np:http", "to 10.180.1.1:8080 10.180.1.2:8080 from 10.128.9.1", False),
        ("feat/np:http", "to 10.180.1.1:8080 10.180.1.2:8080 from 10.128.1.10 10.128.9.1", False),
        ("feat/np:http", "to 10.180.1.1:8080 10.180.1.2:8080 from 10.128.1.10 & silent", False),
        ("feat/np:http", "refused", False),
        ("feat/aff:http", "to 10.180.10.1:8080 from 10.128.1.10", True),
        ("feat/aff:http", "to 10.180.10.2:8080 from 10.128.1.10", True),
        ("feat/aff:http", "to 10.180.10.1:8080 10.180.10.2:8080 from 10.128.1.10", False),
        ("feat/aff:http", "to 10.180.9.1:8080 from 10.128.1.10", False),
        ("feat/noep:http", "refused", True),
        ("feat/noep:http", "silent", False),
        ("feat/noep:http", "refused & silent", False),
        ("feat/itp0:http", "refused", False),
    ],
)
def test_what_counts_as_the_same(service_port: str, text: str, right: bool) -> None:
    assert outcome("pod", service_port, text) is right
