"""The lab with agents: the tour's expectations hold, and failures are told."""

from __future__ import annotations

import signal
import subprocess
import sys

import msgspec
import pytest

from miniproxy.lab import Lab, LabError, LabSpec, netns, tour
from miniproxy.lab.subprocesses import environment

from .test_life import eventually, host_network, miniproxy, traces


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_the_demo_holds_and_leaves_nothing(variant: str) -> None:
    before = host_network()
    done = miniproxy("demo", "--json", "--iptables-variant", variant)
    said = msgspec.json.decode(done.stdout)
    assert done.returncode == 0, said
    assert said["held"]
    assert len(said["steps"]) == len(tour.STEPS)
    assert all(expectation["held"] for step in said["steps"] for expectation in step["expectations"])
    assert any("-j KUBE-SEP-" in rule for step in said["steps"] for rule in step["rules"])
    assert host_network() == before


def test_the_tour_holds_over_a_vxlan_and_three_nodes(name: str) -> None:
    with Lab(LabSpec(name=name, nodes=3, pods_per_node=2, overlay="vxlan")) as lab:
        lab.start_agents()
        for step in tour.tour(lab):
            assert step.held, step


def test_a_step_that_does_not_hold_says_so(name: str) -> None:
    """Without agents no Service works: had a step nothing against that, it would be none."""
    with Lab(LabSpec(name=name, pods_per_node=1)) as lab:
        for step in (tour.hairpin, tour.node_port_local, tour.load_balancer, tour.affinity, tour.rules):
            assert not step(lab).held, step


def test_an_agent_that_does_not_start_is_reported_with_its_log(name: str) -> None:
    with (
        Lab(LabSpec(name=name, pods_per_node=1)) as lab,
        pytest.raises(LabError, match=r"the agent on node[12] ended(.|\n)*--nonsense"),
    ):
        lab.start_agents(extra=["--nonsense"])


def test_services_that_do_not_come_up_are_named(name: str) -> None:
    with Lab(LabSpec(name=name, pods_per_node=1)) as lab:
        lab.set_pods("web", ["web-1"])
        with pytest.raises(LabError, match=r"web \(10\.96\.0\.10\) does not answer on node1"):
            lab.wait_until_serving(timeout=0.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_agent_ends_and_comes_back(name: str, number: signal.Signals) -> None:
    with Lab(LabSpec(name=name, pods_per_node=1)) as lab:
        lab.start_agents()
        assert lab.agents == {"node1": True, "node2": True}
        lab.stop_agent("node1", number)
        assert lab.agents == {"node1": False, "node2": True}
        assert lab.pod("client-1").get("10.96.0.10", 80).outcome == "answered", "the rules stay"
        lab.start_agent("node1")
        lab.scale("empty", 1)
        assert eventually(lambda: lab.pod("client-1").get("10.96.0.15", 80).outcome == "answered")


def test_agents_of_two_labs_do_not_meet(name: str) -> None:
    with Lab(LabSpec(name=f"{name}a", pods_per_node=1)) as one, Lab(LabSpec(name=f"{name}b", pods_per_node=1)) as two:
        one.start_agents(variant="legacy")
        two.start_agents(variant="legacy")
        one.scale("web", 1)
        assert eventually(lambda: set(one.pod("client-1").tries("10.96.0.10", 80).pods) == {"web-1"})
        assert set(two.pod("client-1").tries("10.96.0.10", 80, count=60).pods) == {"web-1", "web-2"}


def test_a_killed_demo_leaves_nothing() -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "miniproxy", "demo"], env=environment(), stdout=subprocess.PIPE, cwd="/"
    )
    name = f"demo{demo.pid}"
    assert demo.stdout is not None
    for line in demo.stdout:
        if b"2. " in line:
            break
    assert netns.existing(name)
    demo.kill()
    demo.wait()
    assert eventually(lambda: traces(name) == []), traces(name)


def test_a_demo_that_stays_can_be_played_with(name: str) -> None:
    try:
        stayed = miniproxy("demo", "--stay", "--name", name)
        assert stayed.returncode == 0, stayed.stdout + stayed.stderr
        assert f"miniproxy lab down --name {name}" in stayed.stdout
        said = miniproxy("lab", "exec", "--name", name, "client-1", "--", "curl", "-s", "http://10.96.0.10/")
        assert msgspec.json.decode(said.stdout)["client"] == "10.244.1.200"
        assert "iptables mode" in miniproxy("lab", "status", "--name", name).stdout
    finally:
        miniproxy("lab", "down", "--name", name)
    assert traces(name) == []
