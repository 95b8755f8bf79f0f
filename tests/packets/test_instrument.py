"""The instrument itself: under kube-proxy's own rules, real connections do what they did under kube-proxy.

If this fails, the network of topology.py or the clients of probe.py are wrong, not miniproxy.
"""

from __future__ import annotations

import pytest

from tests.golden_rules import differences, golden, without_nfacct

from . import behaviour
from .topology import echo_server, network

GOLDEN = (without_nfacct(golden("iptables-save.txt")), without_nfacct(golden("ip6tables-save.txt")))


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_kube_proxys_rules_give_the_golden_behaviour(variant: str) -> None:
    rows = behaviour.rows()
    assert len(rows) == 267
    endpoints = set().union(*behaviour.endpoint_addresses().values())
    with network(endpoints) as net, echo_server(net.pods, behaviour.endpoint_ports()):
        net.restore(variant, GOLDEN)
        for want, got in zip(GOLDEN, net.iptables_save(variant), strict=True):
            assert differences(want, got) == []
        wrong = behaviour.wrong_rows(behaviour.probe(net, rows))
    assert not wrong, f"{len(wrong)} of {len(rows)} rows\n" + "\n".join(wrong)
