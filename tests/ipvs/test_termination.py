"""Pods are replaced one after the other under long downloads: none breaks, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.packets.agent import Agent, running
from tests.packets.topology import Namespace, Network, await_ready, network, settle

pytestmark = pytest.mark.ipvs

VIP, PORT, POD_PORT = "10.99.0.1", 80, 7070
PODS = [f"10.180.0.{host}" for host in range(1, 6)]
DOWNLOADS = 50  # to each generation of pods


def manifests(ready: Iterable[str], terminating: Iterable[str]) -> list[dict[str, Any]]:
    """A Service, and pods that are ready or on their way out."""
    spec = {"clusterIP": VIP, "clusterIPs": [VIP], "ipFamilies": ["IPv4"], "ports": [{"port": PORT}]}
    conditions = [(ip, {"ready": True}) for ip in ready]
    conditions += [(ip, {"ready": False, "serving": True, "terminating": True}) for ip in terminating]
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "ns", "name": "web"}, "spec": spec},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": "ns", "name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"port": POD_PORT}],
            "endpoints": [{"addresses": [ip], "nodeName": "n1", "conditions": state} for ip, state in conditions],
        },
    ]


class Site:
    """The network, its manifests, and the state of its virtual server."""

    def __init__(self, net: Network, folder: Path) -> None:
        self.net = net
        self.folder = folder
        (folder / "manifests").mkdir()

    def write(self, ready: Iterable[str], terminating: Iterable[str] = ()) -> None:
        items = manifests(ready, terminating)
        temporary = self.folder / "new"
        temporary.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        os.replace(temporary, self.folder / "manifests" / "web.json")

    def weights(self) -> dict[str, int]:
        """Real servers and their weights."""
        words = [line.split() for line in self.net.node.run("ipvsadm", "-Sn").splitlines()]
        return {w[4].partition(":")[0]: int(w[7]) for w in words if w[0] == "-a" and w[2] == f"{VIP}:{PORT}"}

    @contextmanager
    def agent(self) -> Iterator[Agent]:
        flags = ["--proxy-mode", "ipvs", "--iptables-variant", "legacy", "--cluster-cidr", "10.128.0.0/9"]
        health = ["--healthz-bind-address", "", "--metrics-bind-address", ""]
        where = ["--source", str(self.folder / "manifests"), "--hostname-override", "n1"]
        argv = [sys.executable, "-m", "miniproxy", "run", *where, *flags, *health]
        with running(self.net, argv, self.folder / "log") as agent:
            yield agent

    def wait(self, weights: dict[str, int], agent: Agent) -> None:
        def reached() -> bool:
            agent.check()
            return self.weights() == weights

        assert settle(reached, seconds=60), f"{self.weights()}, not {weights}\n{agent.tail()}"


class Client:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, command: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def module(place: Namespace, *argv: str) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-m", "tests.ipvs.downloads", *argv)
    with place.process(*command, log=subprocess.PIPE) as process:
        await_ready(process, "downloads")
        yield process


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with network(PODS) as net, module(net.pods, "serve", str(POD_PORT)):
        yield Site(net, tmp_path_factory.mktemp("site"))


def test_downloads_outlive_the_replacement_of_their_pods_and_a_restart(site: Site) -> None:
    opened = broken = 0
    with module(site.net.client, "fetch", VIP, str(PORT)) as process:
        client = Client(process)
        site.write(PODS[:1])
        with site.agent() as agent:
            site.wait({PODS[0]: 1}, agent)
            for old, new in pairwise(PODS[:3]):
                reached = client(f"open {DOWNLOADS}")
                assert set(reached) == {old}, "a new connection reached a pod on its way out"
                opened += len(reached)
                site.write([new], [old])
                site.wait({new: 1, **dict.fromkeys(PODS[: PODS.index(new)], 0)}, agent)
            # One pod's downloads end while the agent runs …
            count, wrong = client(f"finish {PODS[0]}")
            assert count == DOWNLOADS
            broken += wrong
            site.wait({PODS[1]: 0, PODS[2]: 1}, agent)
            agent.kill()
        # … another's after it has been killed, …
        count, wrong = client(f"finish {PODS[1]}")
        broken += wrong
        opened += len(client(f"open {DOWNLOADS}"))
        site.write([PODS[3]])  # and pods change while there is none
        with site.agent() as agent:
            site.wait({PODS[2]: 0, PODS[3]: 1}, agent)
            assert set(client(f"open {DOWNLOADS}")) == {PODS[3]}
            opened += DOWNLOADS
            # A pod that comes back gets its weight back, and keeps its connections.
            site.write([PODS[2]])
            site.wait({PODS[2]: 1, PODS[3]: 0}, agent)
            assert set(client("open 5")) == {PODS[2]}
            for pod in PODS[2:4]:
                count, wrong = client(f"finish {pod}")
                assert count >= DOWNLOADS
                broken += wrong
            site.wait({PODS[2]: 1}, agent)
    assert opened == 4 * DOWNLOADS
    assert broken == 0
