"""The lab's network without any agent: who reaches whom, and which address is seen."""

from __future__ import annotations

import json

import pytest

from miniproxy.lab import Lab, LabError
from miniproxy.lab.probe import Kind

from .test_life import eventually

PORTS: list[tuple[Kind, int]] = [("http", 8080), ("tcp", 7000), ("udp", 5300)]


@pytest.mark.parametrize(("kind", "port"), PORTS)
@pytest.mark.parametrize("client", ["client-1", "client-2", "web-3", "outside", "stranger"])
def test_pods_answer_and_see_who_really_connects(lab: Lab, client: str, kind: Kind, port: int) -> None:
    place = lab.place(client)
    for pod in lab.plan.servers:
        for family, ip in enumerate(pod.ips):
            answers = place.tries(ip, port, kind=kind, count=3)
            assert answers.all("answered"), f"{client} to {pod.name} {ip}: {answers}"
            assert set(answers.pods) == {pod.name}
            assert answers.clients == {place.ips[family]}
            assert {answer.node for answer in answers.each} == {pod.node}
            assert {answer.server for answer in answers.each} == {f"[{ip}]:{port}" if family else f"{ip}:{port}"}


def test_nodes_reach_pods_of_all_nodes(lab: Lab) -> None:
    for node in lab.plan.nodes:
        for pod in lab.plan.servers:
            for ip in pod.ips:
                answers = lab.node(node.name).tries(ip, 8080, count=2)
                assert answers.all("answered"), f"{node.name} to {ip}: {answers}"


def test_the_outside_reaches_nodes(lab: Lab) -> None:
    for node in lab.plan.nodes:
        for place in (lab.outside, lab.pod("client-1")):
            for ip in node.ips:
                answers = place.tries(ip, 9, count=2)
                assert answers.all("refused"), f"no such port, but the node itself should say so: {answers}"


def test_the_overlay_carries_pod_traffic_between_nodes(lab: Lab) -> None:
    links = json.loads(lab.node("node1").run("ip", "-json", "-stats", "link"))
    own = {link["ifname"]: link for link in links}
    if lab.spec.overlay == "host-gw":
        assert "vxlan0" not in own
        return
    before = own["vxlan0"]["stats64"]["tx"]["packets"]
    assert lab.pod("client-1").tries(lab.plan.servers[1].ips[1], 8080, count=5).all("answered")
    (after,) = json.loads(lab.node("node1").run("ip", "-json", "-stats", "link", "show", "vxlan0"))
    assert after["stats64"]["tx"]["packets"] >= before + 5


def test_a_large_answer_fits_through(lab: Lab) -> None:
    """Path MTU: what a pod may send must arrive, in the overlay too."""
    with lab.pod("client-1").dial(lab.plan.servers[1].ips[0], 7000) as talk:
        assert talk.answer.pod == "web-2"
        assert talk.say("x" * 60_000)


def test_hairpin_is_on_for_every_pod(lab: Lab) -> None:
    for node in lab.plan.nodes:
        ports = json.loads(lab.node(node.name).run("ip", "-json", "-details", "link", "show", "master", "cni0"))
        assert len(ports) == lab.spec.pods_per_node + 1
        assert all(port["linkinfo"]["info_slave_data"]["hairpin"] for port in ports)


def test_bridged_replies_pass_iptables(lab: Lab) -> None:
    """A DNAT on the node to another pod of the same bridge works only if the reply is translated back."""
    client, server = lab.pod("client-1"), lab.plan.servers[0]
    node = lab.node("node1")
    rule = ("PREROUTING", "-d", "10.96.9.9", "-p", "tcp", "-j", "DNAT", "--to-destination", f"{server.ips[0]}:8080")
    node.run("iptables-nft", "-t", "nat", "-A", *rule)
    try:
        answers = client.tries("10.96.9.9", 80, count=5)
        assert answers.all("answered"), answers
        assert answers.clients == {client.ips[0]}
    finally:
        node.run("iptables-nft", "-t", "nat", "-D", *rule)


def test_a_slow_answer_streams(lab: Lab) -> None:
    url = f"http://{lab.plan.servers[0].ips[0]}:8080"
    lines = lab.pod("client-1").run("curl", "-sN", f"{url}/slow?seconds=0.3").splitlines()
    assert [json.loads(line)["pod"] for line in lines] == ["web-1"] * 3
    status = lab.pod("client-1").run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{url}/nowhere")
    assert status == "404"


def test_traffic_goes_on_in_the_background(lab: Lab) -> None:
    with lab.pod("client-1").traffic(lab.plan.servers[0].ips[0], 8080, pause=0.001) as answers:
        assert eventually(lambda: len(answers) >= 10)
    count = len(answers)
    assert {answer.outcome for answer in answers} == {"answered"}
    assert len(answers) == count


def test_silence_is_told_from_refusal(lab: Lab) -> None:
    client, node = lab.pod("client-1"), lab.node("node1")
    node.run("iptables-nft", "-I", "FORWARD", "-d", "10.244.1.11", "-p", "tcp", "--dport", "8080", "-j", "DROP")
    try:
        assert client.tries("10.244.1.11", 8080, count=2, timeout=0.3).all("silent")
        assert client.tries("10.244.1.11", 8081, count=2).all("refused")
        assert client.tries("10.244.1.11", 8081, kind="udp", count=2).all("refused")
    finally:
        node.run("iptables-nft", "-F", "FORWARD")


def test_unknown_names_are_answered_with_the_known_ones(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"no place 'nowhere'.*node1, node2, web-1"):
        lab.place("nowhere")
    with pytest.raises(LabError, match=r"no service 'nothing'.*web, web-nodeport"):
        lab.scale("nothing", 1)
    with pytest.raises(LabError, match=r"cannot scale 'web' to 99: the lab has 4 pods"):
        lab.scale("web", 99)
    with pytest.raises(LabError, match=r"no such pods: web-99"):
        lab.set_pods("web", ["web-1", "web-99"])
