"""The instrument itself: under kube-proxy's own rules, real connections do what they did under kube-proxy.

If this fails, the network of topology.py or the clients of probe.py are wrong, not miniproxy.
"""

from __future__ import annotations

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
