"""A walk through what a Service is, by connections in a running lab: each step says what should be seen, tries it
and says whether it was. Data comes out (`Step`); cli/demo.py shows it to a person, a test asks whether all held.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator

import msgspec

from .lab import Lab
from .plan import OUTSIDE_IPS
from .probe import Answer, Answers
from .subprocesses import python_module

_PATIENCE = 10.0  # seconds for the kernel to follow a change
_AFTERMATH = 0.7  # seconds watched after a change has been seen to take effect


class Expectation(msgspec.Struct, frozen=True):
    text: str
    held: bool
    seen: str = ""


class Step(msgspec.Struct, kw_only=True):
    """One stop of the tour; `counts` is connections per pod."""

    title: str
    about: str
    counts: dict[str, int] = {}
    rules: list[str] = []
    expectations: list[Expectation] = []

    def expect(self, text: str, held: bool, seen: object = "") -> None:
        self.expectations.append(Expectation(text, held, str(seen)))

    @property
    def held(self) -> bool:
        return all(expectation.held for expectation in self.expectations)


def tour(lab: Lab) -> Iterator[Step]:
    """Takes the steps one by one in a lab of at least two nodes with running agents."""
    for step in STEPS:
        yield step(lab)


def cluster_ip(lab: Lab) -> Step:
    web, client = lab.service("web"), lab.pod("client-1")
    step = Step(
        title="A ClusterIP balances over pods",
        about=f"200 connections from client-1 to http://{web.cluster_ips[0]}/",
    )
    answers = client.tries(web.cluster_ips[0], web.port, count=200)
    step.counts = dict(sorted(answers.pods.items(), key=lambda item: _number(item[0])))
    step.expect("every connection is answered", answers.all("answered"), _outcomes(answers))
    behind = lab.pods_behind("web")
    step.expect(f"all {len(behind)} pods get some, on both nodes", set(answers.pods) == set(behind))
    step.expect("pods see the client's own address", answers.clients == {client.ips[0]}, _list(answers.clients))
    return step


def rules(lab: Lab) -> Step:
    step = Step(title="What the kernel holds for it", about="on node1, as the field's own tools print it")
    command, step.rules = _rules(lab)
    step.about = f"`{command}` on node1, the lines about port http of service web"
    step.expect("the service is in the kernel", bool(step.rules))
    return step


def ipv6(lab: Lab) -> Step:
    web, client = lab.service("web"), lab.pod("client-2")
    ip = web.cluster_ips[1]
    step = Step(title="The same service over IPv6", about=f"100 connections from client-2 to http://[{ip}]/")
    answers = client.tries(ip, web.port, count=100)
    step.counts = dict(sorted(answers.pods.items(), key=lambda item: _number(item[0])))
    step.expect("every connection is answered", answers.all("answered"), _outcomes(answers))
    step.expect("pods see the client's own address", answers.clients == {client.ips[1]}, _list(answers.clients))
    return step


def udp(lab: Lab) -> Step:
    echo, client = lab.service("echo-udp"), lab.pod("client-1")
    step = Step(title="UDP", about=f"40 datagrams, each from another port, to {echo.cluster_ips[0]}:{echo.port}")
    answers = client.tries(echo.cluster_ips[0], echo.port, kind="udp", count=40)
    step.expect("every datagram is answered", answers.all("answered"), _outcomes(answers))
    step.expect("by several pods", len(answers.pods) > 1, f"{len(answers.pods)} pods")
    return step


def node_port_cluster(lab: Lab) -> Step:
    service, node = lab.service("web-nodeport"), lab.plan.nodes[0]
    step = Step(
        title="A NodePort, externalTrafficPolicy Cluster",
        about=f"60 connections from outside ({OUTSIDE_IPS[0]}) to {node.ips[0]}:{service.node_port}",
    )
    answers = lab.outside.tries(node.ips[0], service.node_port, count=60)
    step.expect("every connection is answered", answers.all("answered"), _outcomes(answers))
    nodes = {answer.node for answer in answers.each}
    step.expect("by pods of other nodes too", len(nodes) > 1, _list(nodes))
    links = json.loads(lab.node(node.name).run("ip", "-json", "addr"))
    own = {address["local"] for link in links for address in link["addr_info"]}
    step.expect(
        "pods see node1 instead of the client (SNAT), so that replies come back through it",
        bool(answers.clients) and answers.clients <= own,
        _list(answers.clients),
    )
    return step


def node_port_local(lab: Lab) -> Step:
    service = lab.service("web-local")
    first, second = lab.plan.nodes[:2]
    pods = lab.pods_behind("web-local")
    step = Step(
        title="A NodePort, externalTrafficPolicy Local",
        about=f"from outside to port {service.node_port} of both nodes; its only pod is {pods[0]} on node1",
    )
    here = lab.outside.tries(first.ips[0], service.node_port, count=20)
    step.expect("node1 has the pod: answered", here.all("answered"), _outcomes(here))
    step.expect(
        "the pod sees the client's own address (no SNAT)",
        here.clients == {OUTSIDE_IPS[0]},
        _list(here.clients),
    )
    there = lab.outside.tries(second.ips[0], service.node_port, count=4, timeout=0.5)
    step.expect("node2 has none: dropped, not forwarded with SNAT", there.all("silent"), _outcomes(there))
    return step


def load_balancer(lab: Lab) -> Step:
    service = lab.service("lb")
    ip = service.load_balancer_ips[0]
    step = Step(
        title="A load balancer's address with source ranges",
        about=f"from two clients outside to {ip}:{service.port}; its source range holds {OUTSIDE_IPS[0]} alone of them",
    )
    admitted = lab.outside.tries(ip, service.port, count=20)
    step.expect(f"{OUTSIDE_IPS[0]} is answered", admitted.all("answered"), _outcomes(admitted))
    refused = lab.stranger.tries(ip, service.port, count=4, timeout=0.5)
    step.expect(f"{lab.stranger.ips[0]} is not", refused.all("silent"), _outcomes(refused))
    return step


def hairpin(lab: Lab) -> Step:
    service = lab.service("hairpin")
    (name,) = lab.pods_behind("hairpin")
    pod = lab.pod(name)
    step = Step(title="Hairpin", about=f"{name}, the only pod of a service, connects to that service: to itself")
    answers = pod.tries(service.cluster_ips[0], service.port, count=10)
    step.expect("it reaches itself", answers.all("answered") and set(answers.pods) == {name})
    step.expect(
        "and sees the node as client: its own address would make it answer itself directly",
        bool(answers.clients) and pod.ips[0] not in answers.clients,
        _list(answers.clients),
    )
    return step


def affinity(lab: Lab) -> Step:
    service = lab.service("sticky")
    step = Step(
        title="Session affinity ClientIP",
        about=f"20 connections each from client-1 and client-2 to {service.cluster_ips[0]}",
    )
    for name in ("client-1", "client-2"):
        client = lab.pod(name)
        # One first: connections that arrive together before any pod is remembered may go apart.
        first = client.get(service.cluster_ips[0], service.port)
        answers = client.tries(service.cluster_ips[0], service.port, count=20)
        step.expect(f"{name} stays with one pod", set(answers.pods) == {first.pod}, ", ".join(sorted(answers.pods)))
    return step


def no_endpoints(lab: Lab) -> Step:
    service = lab.service("empty")
    step = Step(title="A service without endpoints", about=f"client-1 connects to {service.cluster_ips[0]}, 5 times")
    # A client's kernel misses a refusal that comes while it is still busy with its connect(), and is told again when
    # it asks again, a second later.
    answers = lab.pod("client-1").tries(service.cluster_ips[0], service.port, count=5, timeout=2.5)
    slowest = max(answer.seconds for answer in answers.each)
    step.expect("refused at once: no client hangs", answers.all("refused"), f"the slowest after {slowest * 1e3:.1f} ms")
    return step


def scaling(lab: Lab) -> Step:
    web, client = lab.service("web"), lab.pod("client-1")
    everyone = lab.pods_behind("web")
    few = everyone[:2]
    step = Step(
        title="Scaling, live",
        about=f"connections one after another while web goes from {len(everyone)} pods to {len(few)} and back",
    )
    with client.traffic(web.cluster_ips[0], web.port, pause=0.001) as answers:
        time.sleep(0.2)
        changed = time.monotonic()
        lab.set_pods("web", few)
        gone = _settled(answers, lambda answer: answer.pod not in few, changed)
        step.expect(f"scaled down: after that only {' and '.join(few)} answer", gone is not None, _after(gone))
        changed = time.monotonic()
        lab.set_pods("web", everyone)
        came = _first(answers, lambda answer: answer.pod not in few, changed)
        step.expect("scaled up: the others answer again", came is not None, _after(came))
    failed = [answer for answer in answers if answer.outcome != "answered"]
    step.expect("none of the connections failed", not failed, f"{len(answers)} made, {len(failed)} failed")
    return step


def restart(lab: Lab) -> Step:
    web, client, node = lab.service("web"), lab.pod("client-1"), "node1"
    step = Step(
        title="The agent restarts while connections go on",
        about=f"the agent of {node} is ended and started again; client-1 keeps connecting",
    )
    ip = web.cluster_ips[0]
    with client.dial(ip, web.ports["line"]) as talk, client.traffic(ip, web.port, pause=0.001) as answers:
        time.sleep(0.2)
        lab.stop_agent(node)
        while_away = len(answers)
        time.sleep(0.2)
        while_away = len(answers) - while_away
        lab.start_agent(node)
        changed = time.monotonic()
        lab.set_pods("empty", [lab.plan.servers[0].name])
        served = _answering(lab, "empty", changed)
        time.sleep(0.2)
        alive = talk.say()
    failed = [answer for answer in answers if answer.outcome != "answered"]
    step.expect(
        "new connections never failed",
        not failed and while_away > 0,
        f"{len(answers)} made, {while_away} of them without an agent, {len(failed)} failed",
    )
    step.expect("a connection open since before goes on", alive)
    step.expect("the new agent works: service empty, given a pod, answers", served is not None, _after(served))
    lab.set_pods("empty", [])
    return step


def doctor(lab: Lab) -> Step:
    empty = lab.service("empty")
    step = Step(
        title="Why does my Service not work?",
        about=f"`miniproxy doctor default/{empty.name}` on node1; ✘ is what is wrong",
    )
    argv = python_module("miniproxy", "doctor", f"default/{empty.name}", *lab.agent_settings("node1"), "--json")
    findings = json.loads(lab.node("node1").run(*argv, check=False))["findings"]
    wrong = [finding for finding in findings if finding["state"] == "wrong"]
    step.rules = [f"✘ {finding['about']}: {finding['seen']} → {finding['advice']}" for finding in wrong]
    missing = f"default/{empty.name}:http TCP IPv4 endpoints"
    step.expect("it names the cause", any(f["about"] == missing and "empty" in f["seen"] for f in wrong), missing)
    node = [finding["seen"] for finding in wrong if finding["section"] == "this node"]
    step.expect("it finds nothing wrong with the node", not node, "; ".join(node))
    return step


STEPS: tuple[Callable[[Lab], Step], ...] = (
    cluster_ip,
    rules,
    ipv6,
    udp,
    node_port_cluster,
    node_port_local,
    load_balancer,
    hairpin,
    affinity,
    no_endpoints,
    scaling,
    restart,
    doctor,
)


def _settled(answers: list[Answer], wrong: Callable[[Answer], bool], changed: float) -> float | None:
    """Seconds from a change to the last wrong answer; None if they do not stop."""
    deadline = changed + _PATIENCE
    while time.monotonic() < deadline:
        last = max((answer.began for answer in answers[:] if wrong(answer)), default=changed)
        if time.monotonic() - max(last, changed) > _AFTERMATH:
            return max(0.0, last - changed)
        time.sleep(0.02)
    return None


def _first(answers: list[Answer], right: Callable[[Answer], bool], changed: float) -> float | None:
    """Seconds from a change to the first right answer; None if there is none."""
    deadline = changed + _PATIENCE
    seen = len(answers)
    while time.monotonic() < deadline:
        for answer in answers[seen:]:
            if right(answer) and answer.began > changed:
                return answer.began + answer.seconds - changed
        time.sleep(0.002)
    return None


def _answering(lab: Lab, service: str, changed: float) -> float | None:
    """Seconds from a change to the first answer of a service."""
    described, client = lab.service(service), lab.pod("client-1")
    deadline = changed + _PATIENCE
    while time.monotonic() < deadline:
        if client.get(described.cluster_ips[0], described.port).outcome == "answered":
            return time.monotonic() - changed
        time.sleep(0.01)
    return None


def _rules(lab: Lab) -> tuple[str, list[str]]:
    """The command and those of its lines that concern web:http over IPv4."""
    node = lab.node("node1")
    service = lab.service("web")
    ip = service.cluster_ips[0]
    mode = lab.status()["mode"]
    if mode == "ipvs":
        return "ipvsadm -Ln", _paragraph(node.run("ipvsadm", "-Ln").splitlines(), f"{ip}:{service.port}")
    if mode == "nftables":
        lines = node.run("nft", "list", "ruleset").splitlines()
        return "nft list ruleset", [line.strip() for line in lines if f"{ip} " in line][:8]
    for command in ("iptables-nft-save", "iptables-legacy-save"):
        if shutil.which(command):
            lines = node.run(command, "-t", "nat", check=False).splitlines()
            if found := _service_rules(lines, ip):
                return f"{command} -t nat", found
    return "iptables-save -t nat", []


def _service_rules(lines: list[str], ip: str) -> list[str]:
    """The dispatch rule, the service's chain, and the first endpoint's."""
    dispatch = [line for line in lines if line.startswith("-A KUBE-SERVICES") and ip in line and "http" in line]
    if not dispatch:
        return []
    chain = dispatch[0].split()[-1]
    balance = [line for line in lines if line.startswith(f"-A {chain} ")]
    endpoints = [line.split()[-1] for line in balance if "-j KUBE-SEP-" in line]
    endpoint = [line for line in lines if endpoints and line.startswith(f"-A {endpoints[0]} ")]
    if len(balance) > 5:
        balance = [*balance[:3], f"  … {len(balance) - 4} more …", balance[-1]]
    return [dispatch[0], *balance, *endpoint]


def _paragraph(lines: list[str], beginning: str) -> list[str]:
    """The line that holds `beginning` and the "->" lines that follow."""
    found: list[str] = []
    for line in lines:
        if found and not line.lstrip().startswith("->"):
            break
        if found or beginning in line:
            found.append(line)
    return found


def _number(pod: str) -> int:
    return int(pod.rpartition("-")[2])


def _list(values: set[str]) -> str:
    return ", ".join(sorted(values))


def _outcomes(answers: Answers) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in answers.outcomes.most_common())


def _after(seconds: float | None) -> str:
    return "not seen" if seconds is None else f"after {seconds * 1e3:.0f} ms"
