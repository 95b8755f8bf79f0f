"""Pods are replaced one after the other under long downloads: none breaks, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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
DOWNLOADS = 40  # to each generation of pods
SOON = 5.0  # seconds


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

    def wait_soon(self, weights: dict[str, int], agent: Agent) -> None:
        """The last connection to somebody on the way out ends now, or an agent begins that finds it ended."""
        start = time.monotonic()
        self.wait(weights, agent)
        assert time.monotonic() - start <= SOON


class Client:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, command: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Downloads:
    """Downloads that go on until they are finished; which pod they come from is asserted."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.opened = self.whole = 0

    def open(self, pod: str) -> None:
        reached = self.client(f"open {DOWNLOADS}")
        assert set(reached) == {pod}, "a new connection reached a pod on its way out"
        self.opened += len(reached)

    def finish(self, pod: str) -> None:
        count, broken = self.client(f"finish {pod}")
        assert count == DOWNLOADS
        self.whole += count - broken


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
    with module(site.net.client, "fetch", VIP, str(PORT)) as process:
        downloads = Downloads(Client(process))
        site.write(PODS[:1])
        with site.agent() as agent:
            site.wait({PODS[0]: 1}, agent)
            downloads.open(PODS[0])
            for old, new in pairwise(PODS[:4]):
                site.write([new], [old])
                site.wait({new: 1, **dict.fromkeys(PODS[: PODS.index(new)], 0)}, agent)
                downloads.open(new)
            # One pod's downloads end while the agent runs …
            downloads.finish(PODS[0])
            site.wait_soon({PODS[1]: 0, PODS[2]: 0, PODS[3]: 1}, agent)
            agent.kill()
        # … another's after it has been killed, …
        downloads.finish(PODS[1])
        site.write([PODS[4]])  # and pods change while there is none
        with site.agent() as agent:
            assert settle(lambda: PODS[4] in site.weights(), seconds=60), agent.tail()
            site.wait_soon({PODS[2]: 0, PODS[3]: 0, PODS[4]: 1}, agent)
            downloads.open(PODS[4])
            # … and another's, which its predecessor has left on the way out, under the new one.
            downloads.finish(PODS[2])
            site.wait_soon({PODS[3]: 0, PODS[4]: 1}, agent)
            # A pod that comes back gets its weight back, and keeps its connections.
            site.write([PODS[3]])
            site.wait({PODS[3]: 1, PODS[4]: 0}, agent)
            downloads.finish(PODS[4])
            site.wait_soon({PODS[3]: 1}, agent)
            downloads.finish(PODS[3])
    assert downloads.opened == downloads.whole == 200
