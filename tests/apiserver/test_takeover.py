"""What the real kube-proxy has written is what miniproxy would write, also where it leaves out comments."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from miniproxy.bench.agents import Agent, Setup
from miniproxy.bench.apiserver import ApiServer, Programs
from miniproxy.bench.feeds import Api
from miniproxy.bench.objects import target
from miniproxy.bench.world import NODE, NODE_NAME, POD_CIDR, World
from miniproxy.kernel.exec import run
from miniproxy.planner.iptables import MANY_ENDPOINTS

from .server import program

PATIENCE_SECONDS = 60.0
# kube-proxy counts by nfacct, where the kernel has it, and we by a rule of our own (planner/iptables.py).
DIFFERENT = {
    "--A KUBE-FORWARD -m conntrack --ctstate INVALID -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts -j DROP",
    "+-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    '+-A KUBE-POSTROUTING -m conntrack --ctorigdst 127.0.0.0/8 -m comment --comment "count localhost NodePorts"',
}


# With the API server's own endpoint, 999 and 1,001.
@pytest.mark.parametrize("services", [MANY_ENDPOINTS // 2 - 1, MANY_ENDPOINTS // 2], ids=["few", "many"])
def test_kube_proxys_rules_are_ours(services: int) -> None:
    kube_proxy = Path(program("kube-proxy"))
    programs = Programs(Path(program("etcd")), Path(program("kube-apiserver")), kube_proxy)
    with World() as world:
        server = ApiServer(world, programs)
        server.start()
        Api(server).load(target(number, 2) for number in range(services))
        agent = Agent(world, Setup("kube-proxy", "iptables-nft", 2, server.kubeconfig, None, kube_proxy))
        agent.start()
        eye = agent.eye()
        end = time.monotonic() + PATIENCE_SECONDS
        while eye.services() < services and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(1)  # an iptables-restore commits one table after the other
        saved = world.run(NODE, ["iptables-nft-save", "-t", "nat"])
        agent.stop()
        eye.close()
        assert ("-> 10." in saved) == (services * 2 + 1 <= MANY_ENDPOINTS)

        argv = [sys.executable, "-m", "miniproxy", "plan", "--diff", "--family", "4", "--iptables-variant", "nft"]
        argv += ["--kubeconfig", str(server.kubeconfig), "--hostname-override", NODE_NAME, "--cluster-cidr", POD_CIDR]
        done = world.inside(NODE, lambda: run(argv))
    lines = [line for line in done.out.splitlines() if line.startswith(("+", "-")) and line[1:4] not in ("++ ", "-- ")]
    assert set(lines) <= DIFFERENT, done.out + done.err
