"""Probes, metrics and Events in a cluster: the same answers as the real kube-proxy gives in the same states."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from miniproxy.health import timestamp
from tests.packets.agent import Agent, running
from tests.packets.topology import ROOT, Network, network

from .server import ApiServer, api_server, program

HEALTH_PORT = 32113
PAGES = {
    "healthz": "http://127.0.0.1:10256/healthz",
    "livez": "http://[::1]:10256/livez",
    "other": "http://127.0.0.1:10256/other",
    "service": f"http://172.30.0.2:{HEALTH_PORT}/",
    "mode": "http://127.0.0.1:10249/proxyMode",
    "ok": "http://127.0.0.1:10249/healthz",
}
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "namespace": "default"},
    "spec": {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": HEALTH_PORT,
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "https", "port": 443, "nodePort": 30443}],
    },
}
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1"},
    "status": {"addresses": [{"type": "InternalIP", "address": "172.30.0.2"}]},
}
TAINT = "ToBeDeletedByClusterAutoscaler=1:NoSchedule"


class Answer(NamedTuple):
    status: int
    headers: tuple[tuple[str, str], ...]
    body: str


class Bench(NamedTuple):
    network: Network
    api: ApiServer
    folder: Path
    broken: Path  # while this file exists, no iptables-restore works

    def get(self, page: str) -> Answer | None:
        """An answer without what differs from one moment to the next; None while nobody listens."""
        argv = self.network.node.command(["curl", "-sgi", "--max-time", "5", PAGES[page]])
        said = subprocess.run(argv, capture_output=True, text=True).stdout
        if not said:
            return None
        head, _, body = said.replace("\r\n", "\n").partition("\n\n")
        status, *lines = head.split("\n")
        headers = sorted((line.split(": ", 1)[0], line.split(": ", 1)[1]) for line in lines)
        kept = tuple(h for h in headers if h[0] not in ("Date", "Content-Length"))
        return Answer(int(status.split()[1]), kept, re.sub(r'"\d{4}-[^"]*(Z|[+-]\d\d:\d\d)"', '"TIME"', body))

    def endpoints(self, *found: tuple[str, str, str]) -> None:
        """(address, node, state) of each endpoint of the Service."""
        conditions = {
            "ready": {"ready": True, "serving": True, "terminating": False},
            "draining": {"ready": False, "serving": True, "terminating": True},
            "dead": {"ready": False, "serving": False, "terminating": False},
        }
        slice_ = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "web",
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": "web"},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": timestamp(time.time())},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}, {"name": "https", "port": 8443}],
            "endpoints": [{"addresses": [a], "nodeName": n, "conditions": conditions[s]} for a, n, s in found],
        }
        self.api.kubectl("apply", "-f", "-", stdin=json.dumps(slice_))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("monitoring")
    with network([]) as net, api_server(net.node, folder / "server") as api:
        api.kubectl("create", "-f", "-", stdin=json.dumps(NODE))
        api.kubectl("replace", "--subresource=status", "-f", "-", stdin=json.dumps(NODE))
        api.kubectl("apply", "-f", str(ROOT / "deploy/base/rbac.yaml"))
        api.kubectl("create", "-f", "-", stdin=json.dumps(SERVICE))
        yield Bench(net, api, folder, folder / "broken")


def configuration(bench: Bench, kubeconfig: Path) -> Path:
    """One file for both proxies; what waits for 2 s is late."""
    file = bench.folder / "config.yaml"
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": "n1",
        "clusterCIDR": "10.128.0.0/9,fd00:128::/32",
        "clientConnection": {"kubeconfig": os.fspath(kubeconfig)},
        "conntrack": {"maxPerCore": 0},
        "iptables": {"minSyncPeriod": "1ms", "syncPeriod": "1s"},
    }
    file.write_text(yaml.safe_dump(config))
    return file


def breakable(bench: Bench) -> str:
    """A PATH in which iptables-restore works unless it is to be broken."""
    folder = bench.folder / "bin"
    folder.mkdir(exist_ok=True)
    for family in ("iptables", "ip6tables"):
        for variant in ("", "-nft"):
            file = folder / f"{family}{variant}-restore"
            # kube-proxy takes the system's default variant, which is the one this agent is told to use.
            file.write_text(
                f'#!/bin/sh\n[ -e "{bench.broken}" ] && echo broken >&2 && exit 1\n'
                f'exec /usr/sbin/{family}-nft-restore "$@"\n'
            )
            file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@contextmanager
def proxy(bench: Bench, name: str) -> Iterator[Agent]:
    bench.endpoints()
    config = str(configuration(bench, bench.api.admin))
    own = [sys.executable, "-m", "miniproxy", "run", "--config", config, "--iptables-variant=nft"]
    argv = own if name == "miniproxy" else [program("kube-proxy"), "--config", config]
    log = bench.folder / f"{name}.log"
    with running(bench.network, ["env", f"PATH={breakable(bench)}", *argv], log) as agent:
        try:
            bench.api.eventually(lambda: bench.get("service") is not None, f"{name} to serve\n{agent.tail()}")
            yield agent
        finally:
            bench.broken.unlink(missing_ok=True)


def tour(bench: Bench, name: str) -> dict[str, dict[str, Answer]]:
    """All answers in each state, once the statuses are those expected."""
    seen: dict[str, dict[str, Answer]] = {}

    def reach(state: str, healthz: int, livez: int, service: int) -> None:
        want = {"healthz": healthz, "livez": livez, "service": service}

        def there() -> bool:
            answers = {page: bench.get(page) for page in want}
            return {page: a and a.status for page, a in answers.items()} == want

        bench.api.eventually(there, f"{name}: {state}: {want}, it is { {p: bench.get(p) for p in want} }")
        seen[state] = {page: answer for page in PAGES if (answer := bench.get(page))}

    with proxy(bench, name):
        reach("no endpoints", 200, 200, 503)
        bench.endpoints(("10.128.1.1", "n1", "ready"), ("10.128.2.1", "n2", "ready"))
        reach("one here", 200, 200, 200)
        bench.endpoints(("10.128.1.1", "n1", "ready"), ("10.128.1.2", "n1", "ready"), ("10.128.1.3", "n1", "draining"))
        bench.api.eventually(lambda: '"localEndpoints": 2' in str(bench.get("service")), "two endpoints")
        reach("two here and one draining", 200, 200, 200)
        bench.endpoints(("10.128.1.3", "n1", "draining"), ("10.128.1.4", "n1", "dead"))
        reach("only draining", 200, 200, 503)
        bench.endpoints(("10.128.1.1", "n1", "ready"))
        reach("ready again", 200, 200, 200)
        bench.api.kubectl("taint", "node", "n1", TAINT)
        reach("to be deleted", 503, 200, 200)
        bench.api.kubectl("taint", "node", "n1", f"{TAINT}-")
        reach("not to be deleted", 200, 200, 200)
        bench.broken.touch()
        bench.endpoints(("10.128.1.1", "n1", "ready"), ("10.128.1.5", "n1", "ready"))
        reach("stuck", 503, 503, 503)
        bench.broken.unlink()
        reach("recovered", 200, 200, 200)
        seen["metrics"] = {"page": Answer(0, (), metrics(bench))}
    return seen


def metrics(bench: Bench) -> str:
    return bench.network.node.run("curl", "-sg", "http://127.0.0.1:10249/metrics")


@pytest.fixture(scope="module")
def tours(bench: Bench) -> dict[str, dict[str, dict[str, Answer]]]:
    return {name: tour(bench, name) for name in ("kube-proxy", "miniproxy")}


def differing(theirs: dict[str, Answer], ours: dict[str, Answer]) -> dict[str, Any]:
    return {page: (theirs.get(page), ours.get(page)) for page in PAGES if theirs.get(page) != ours.get(page)}


STATES = (
    "no endpoints",
    "one here",
    "two here and one draining",
    "only draining",
    "ready again",
    "to be deleted",
    "not to be deleted",
    "stuck",
    "recovered",
)


@pytest.mark.parametrize("state", STATES)
def test_answers_are_kube_proxys(tours: dict[str, dict[str, dict[str, Answer]]], state: str) -> None:
    theirs, ours = tours["kube-proxy"][state], tours["miniproxy"][state]
    assert set(theirs) == set(PAGES)
    assert differing(theirs, ours) == {}


def test_every_metric_is_there_with_its_labels(tours: dict[str, dict[str, dict[str, Answer]]]) -> None:
    """Also the ones that the golden pages lack: what kube-proxy shows after it has worked, and failed, a little."""

    def series(name: str) -> set[str]:
        page = tours[name]["metrics"]["page"].body
        return {line.rpartition(" ")[0] for line in page.splitlines() if line.startswith("kubeproxy_")}

    assert 'kubeproxy_network_programming_duration_seconds_bucket{ip_family="IPv4",le="300"}' in series("kube-proxy")
    assert sorted(series("kube-proxy") - series("miniproxy")) == []


def test_an_event_on_the_service_says_why_its_health_check_port_is_not_served(bench: Bench) -> None:
    token = bench.api.kubectl("create", "token", "miniproxy", "--namespace=kube-system").strip()
    config = str(configuration(bench, bench.api.kubeconfig("agent", token)))
    argv = [sys.executable, "-m", "miniproxy", "run", "--config", config, "--iptables-variant=nft"]
    occupy = [sys.executable, "-m", "http.server", str(HEALTH_PORT)]
    with (
        (bench.folder / "occupied.log").open("w") as log,
        bench.network.node.process(*occupy, log=log),
        running(bench.network, argv, bench.folder / "events.log") as agent,
    ):

        def described() -> str:
            agent.check()
            return bench.api.kubectl("describe", "service", "web")

        bench.api.eventually(lambda: "FailedToStartServiceHealthcheck" in described(), f"the Event\n{agent.tail()}")
        assert f"node n1: spec.healthCheckNodePort: cannot listen on *:{HEALTH_PORT}" in described()
        events = json.loads(bench.api.kubectl("get", "events.events.k8s.io", "-o", "json"))["items"]
        (event,) = [e for e in events if e["reportingController"] == "miniproxy.io/miniproxy"]
        assert (event["type"], event["action"], event["regarding"]["name"]) == ("Warning", "Listen", "web")
        assert 'miniproxy_kubernetes_events_total{result="sent"} 1.0' in metrics(bench)
        assert "cannot send Kubernetes Events" not in agent.tail(1000)
