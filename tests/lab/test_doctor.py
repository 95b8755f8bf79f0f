"""`miniproxy doctor` in a lab whose agents program the real kernel: it finds what was broken, and only that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml

from miniproxy.lab import Lab, LabSpec
from miniproxy.lab.plan import CLUSTER_CIDRS

from .conftest import new_name
from .test_life import eventually, miniproxy

SEATS = ", ".join(f"10.96.0.10 . tcp . 80 . {number}" for number in range(40000, 40004))  # of web's four endpoints
TAKE_RULE = """
iptables-save -t nat | sed -n '1i *nat
s/^-A \\(KUBE-SERVICES .*"default.web:http cluster IP"\\)/-D \\1/p
$a COMMIT' | iptables-restore --noflush
"""
POD = "10.244.1.11"  # web-1, which answers on port 8080


class Said(NamedTuple):
    code: int
    findings: list[dict[str, Any]]
    error: str

    def wrong(self) -> list[str]:
        """What is wrong, with the advice."""
        return [f"{f['about']}: {f['seen']} → {f['advice']}" for f in self.findings if f["state"] == "wrong"]

    def about(self, start: str) -> list[tuple[str, str]]:
        return [(f["state"], f["seen"]) for f in self.findings if f["about"].startswith(start)]


class Sick:
    """A lab with agents, and what its first node says."""

    def __init__(self, lab: Lab, mode: str) -> None:
        self.lab = lab
        self.mode = mode

    def doctor(self, *arguments: str, mode: str = "", node: str = "node1") -> Said:
        settings = self.settings(mode or self.mode, node)
        done = self.inside(sys.executable, "-m", "miniproxy", "doctor", *arguments, "--json", *settings)
        found = msgspec.json.decode(done.stdout)["findings"] if done.stdout else []
        return Said(done.returncode, found, done.stderr)

    def settings(self, mode: str, node: str = "node1") -> list[str]:
        return [
            f"--source={self.lab.manifests}",
            f"--hostname-override={node}",
            f"--cluster-cidr={','.join(CLUSTER_CIDRS)}",
            f"--proxy-mode={mode}",
        ]

    def inside(self, *argv: str) -> Any:
        return miniproxy("lab", "exec", "--name", self.lab.spec.name, "node1", "--", *argv)

    def write(self, *things: dict[str, Any]) -> Path:
        path = self.lab.manifests / "sick.yaml"
        path.write_text(yaml.safe_dump_all(things))
        return path


@pytest.fixture(scope="module", params=["iptables", "nftables"])
def sick(request: pytest.FixtureRequest) -> Iterator[Sick]:
    with Lab(LabSpec(name=new_name(), pods_per_node=2)) as lab:
        lab.start_agents(mode=request.param)
        yield Sick(lab, request.param)


def service(name: str, ip: str, port_name: str = "http") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": port_name, "port": 80, "protocol": "TCP"}]},
    }


def endpoints(name: str, ip: str, port: int, *, ready: bool = True, port_name: str = "http") -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"name": port_name, "protocol": "TCP", "port": port}],
        "endpoints": [{"addresses": [ip], "conditions": {"ready": ready}, "nodeName": "node1"}],
    }


# --- the node -----------------------------------------------------------------------------------------------


def test_a_healthy_node(sick: Sick) -> None:
    said = sick.doctor()
    assert said.wrong() == []
    assert said.code == 0
    assert said.about("the agent")[0][1].endswith(f"mode {sick.mode}")
    assert [state for state, seen in said.about("the kernel, IPv") if "holds what is planned" in seen] == ["fine"] * 2
    for about in ("node node1", "forwarding", "other service proxies"):
        assert [state for state, _ in said.about(about)] == ["fine"], about
    (known,) = said.about("services")
    assert "default/empty:http TCP IPv4" in known[1], "nobody serves that one, which may be meant so"


def test_rules_that_somebody_took_away(sick: Sick) -> None:
    """The agent would find it at its next look, which is minutes away."""
    if sick.mode == "nftables":
        taken = sick.inside("nft", "delete", "element", "ip", "miniproxy", "endpoints", f"{{ {SEATS} }}")
    else:
        taken = sick.inside("sh", "-c", TAKE_RULE)
    assert taken.returncode == 0, taken.stderr
    try:
        (kernel,) = sick.doctor().wrong()
        assert kernel.startswith("the kernel, IPv4: ")
        assert "default/web:http" in kernel
        wrong = sick.doctor("default/web").wrong()
        assert any("in the kernel: 1 objects are not as planned" in each for each in wrong), wrong
        # Without a rule, the node has no route there; in nftables mode, a cluster IP refuses what it does not know.
        what = "refused the connection" if sick.mode == "nftables" else "cannot be reached: Network is unreachable"
        unreached = f"cluster IP 10.96.0.10:80: {what}; by the rules, leads to "
        assert any(each.startswith(unreached) for each in wrong), wrong
        assert not any("fd00" in each for each in wrong), wrong
    finally:
        sick.lab.stop_agent("node1")
        sick.lab.start_agent("node1")
    assert eventually(lambda: sick.doctor().code == 0)


def test_no_agent(sick: Sick) -> None:
    sick.lab.stop_agent("node1")
    try:
        (agent,) = sick.doctor().wrong()
        assert "no service proxy answers at 0.0.0.0:10256" in agent
    finally:
        sick.lab.start_agent("node1")
    assert eventually(lambda: sick.doctor().code == 0)


def test_an_agent_in_another_mode(sick: Sick) -> None:
    other = "iptables" if sick.mode == "nftables" else "nftables"
    wrong = sick.doctor(mode=other).wrong()
    assert f"the agent: runs in mode {sick.mode}, and this looks for {other}" in wrong[0]
    assert f"--proxy-mode {sick.mode}" in wrong[0]
    assert any(each.startswith("other service proxies: also here: ") for each in wrong), wrong


def test_another_proxys_table(sick: Sick) -> None:
    assert sick.inside("nft", "add", "table", "ip", "kube-proxy").returncode == 0
    try:
        (other,) = sick.doctor().wrong()
        assert "also here: table ip kube-proxy" in other
    finally:
        sick.inside("nft", "delete", "table", "ip", "kube-proxy")


def test_a_node_that_does_not_forward(sick: Sick) -> None:
    assert sick.inside("sysctl", "-qw", "net.ipv4.ip_forward=0").returncode == 0
    try:
        (forwarding,) = sick.doctor().wrong()
        assert "sysctl -w net.ipv4.ip_forward=1" in forwarding
    finally:
        sick.inside("sysctl", "-qw", "net.ipv4.ip_forward=1")


def test_the_wrong_node(sick: Sick) -> None:
    assert any("has no link with the address" in w for w in sick.doctor(node="node2").wrong())
    assert any("say --hostname-override" in w for w in sick.doctor(node="node9").wrong())


# --- a Service ----------------------------------------------------------------------------------------------


def test_a_service_that_works(sick: Sick) -> None:
    said = sick.doctor("default/web")
    assert said.wrong() == []
    connected = [f["about"] for f in said.findings if f["seen"].startswith("connects; by the rules, leads to ")]
    assert {"cluster IP 10.96.0.10:80", "cluster IP [fd00:96::10]:80"} <= set(connected)
    assert all("asked directly, 4 of 4" in seen for _, seen in said.about("default/web:http TCP IPv4 endpoints")[1:])


def test_a_service_with_nobody_behind_it(sick: Sick) -> None:
    said = sick.doctor("default/empty")
    assert said.code == 1
    wrong = said.wrong()
    assert any("IPv4 endpoints: its slices are empty → see its selector" in each for each in wrong), wrong
    assert any("cluster IP 10.96.0.15:80: from this node refused" in e and "has no endpoints" in e for e in wrong), (
        wrong
    )


@pytest.mark.parametrize(
    ("things", "seen"),
    [
        ([], "no EndpointSlice names this Service"),
        ([endpoints("sick", POD, 9)], f"asked directly, from this node: {POD}:9 refused the connection"),
        ([endpoints("sick", POD, 8080, port_name="web")], "its slices have the ports web/TCP, not http/TCP"),
        ([endpoints("sick", POD, 8080, ready=False)], f"none serves here: {POD}:8080 is not ready"),
        ([endpoints("sick", "10.244.1.250", 80)], "10.244.1.250:80 "),  # a pod that is gone
    ],
)
def test_what_a_service_lacks(sick: Sick, things: list[dict[str, Any]], seen: str) -> None:
    path = sick.write(service("sick", "10.96.0.77"), *things)
    try:
        assert eventually(lambda: not any("in the kernel: " in w for w in sick.doctor("default/sick").wrong()))
        wrong = sick.doctor("default/sick").wrong()
        assert any(seen in each for each in wrong), wrong
        assert sick.doctor("10.96.0.77:80").wrong() == wrong
    finally:
        path.unlink()


def test_a_service_that_claims_an_address_of_another(sick: Sick) -> None:
    path = sick.write(service("zzz", "10.96.0.10"), endpoints("zzz", POD, 8080))
    try:
        said = sick.doctor("default/zzz")
        assert any("belongs to default/web:http" in each for each in said.wrong()), said.wrong()
        assert any("belongs to default/web:http" in each for each in sick.doctor().wrong())
    finally:
        path.unlink()


def test_a_flow_to_an_endpoint_that_is_gone(sick: Sick) -> None:
    """Made after the agent has looked, as one that another program restored."""
    assert not sick.doctor("default/echo-udp").wrong()
    flow = ("-p", "udp", "-s", "10.244.1.200", "-d", "10.96.0.14", "--sport", "4444", "--dport", "5300")
    reply = ("-r", "10.244.1.99", "-q", "10.244.1.200", "--reply-port-src", "5300", "--reply-port-dst", "4444")
    made = sick.inside("conntrack", "-I", *flow, *reply, "-t", "600")
    assert made.returncode == 0, made.stderr
    try:
        (wrong,) = sick.doctor("default/echo-udp").wrong()
        assert "echo UDP IPv4 flows: 1 still go to 10.244.1.99:5300, which do not serve" in wrong
    finally:
        sick.inside("conntrack", "-D", *flow)


def test_nothing_is_connected_to_if_so_told(sick: Sick) -> None:
    said = sick.doctor("default/web", "--no-connect")
    assert said.code == 0
    assert not [f for f in said.findings if "connects" in f["seen"] or "asked directly" in f["seen"]]


def test_what_is_no_service_of_a_proxy(sick: Sick) -> None:
    headless = service("sick", "None")
    path = sick.write(headless)
    try:
        said = sick.doctor("default/sick")
        assert said.code == 1
        assert "is none that a service proxy serves" in said.error
    finally:
        path.unlink()
    assert "no Service default/sick" in sick.doctor("default/sick").error


def test_for_people(sick: Sick) -> None:
    done = sick.inside(sys.executable, "-m", "miniproxy", "doctor", "default/empty", *sick.settings(sick.mode))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "this node"
    assert "Service default/empty" in lines
    assert any(line.startswith("  ✔ the agent: is healthy") for line in lines)
    assert any(line.startswith("  ✘ ") for line in lines)
    assert any(line.startswith("      → see its selector") for line in lines)


def test_without_root_it_says_what_it_cannot_see(sick: Sick) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    argv = [sys.executable, "-m", "miniproxy", "doctor", "--json", *sick.settings(sick.mode)]
    done = sick.inside(*nobody, *argv)
    if "Permission denied" in done.stderr and not done.stdout:
        pytest.skip(f"nobody may not run {sys.executable} here: {done.stderr.splitlines()[-1]}")
    said = Said(done.returncode, msgspec.json.decode(done.stdout)["findings"], done.stderr)
    assert {state for state, _ in said.about("the kernel, IPv4") + said.about("other service proxies")} == {"note"}
    assert said.about("the agent")[0][0] == "fine"
