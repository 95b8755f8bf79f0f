"""A UDP flow that never pauses follows its service: conntrack is made to forget where it went before."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .agent import Agent, command, running
from .topology import Namespace, Network, echo_server, network

VIP, NODE_PORT, PORT = "10.97.200.1", 32053, 5353
A, B = "10.180.200.1", "10.180.200.2"


def manifest(*endpoints: str) -> dict[str, Any]:
    metadata = {"namespace": "udp", "name": "dns"}
    port = {"name": "dns", "protocol": "UDP", "port": 53, "nodePort": NODE_PORT}
    spec = {"type": "NodePort", "clusterIP": VIP, "clusterIPs": [VIP], "ipFamilies": ["IPv4"], "ports": [port]}
    labels = {"kubernetes.io/service-name": "dns"}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec},
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**metadata, "labels": labels},
                "addressType": "IPv4",
                "ports": [{"name": "dns", "protocol": "UDP", "port": PORT}],
                "endpoints": [{"addresses": [e], "nodeName": "n2"} for e in endpoints],
            },
        ],
    }


class Scene:
    """The golden network with one UDP service, whose endpoints can be set, and a flow to one of its addresses."""

    def __init__(self, net: Network, folder: Path) -> None:
        self.net = net
        self.folder = folder / "manifests"
        self.folder.mkdir()
        self.log = folder / "log"

    def serve(self, *endpoints: str) -> None:
        fresh = self.folder / ".new"
        fresh.write_text(json.dumps(manifest(*endpoints)))
        os.replace(fresh, self.folder / "dns.json")

    def agent(self) -> Any:
        return running(self.net, command(self.folder), self.log)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with network([A, B]) as net, echo_server(net.pods, [("UDP", PORT)]):
        yield Scene(net, tmp_path)


def hears(client: subprocess.Popen[str], agent: Agent, want: str) -> None:
    """Wait until the client reports that; a report is sure to come when it does not, too."""
    assert client.stdout
    for _ in range(20):
        agent.check()
        if client.stdout.readline().strip() == want:
            return
    raise AssertionError(f"{want} never answered: {agent.tail()}")


def flow(where: Namespace, address: str, port: int) -> Any:
    return where.module("stream", address, str(port))


@pytest.mark.parametrize(("side", "address", "port"), [("client", VIP, 53), ("outside", "172.30.0.2", NODE_PORT)])
def test_follows_its_service_through_every_change(scene: Scene, side: str, address: str, port: int) -> None:
    scene.serve()
    where = getattr(scene.net, side)
    with scene.agent() as agent, flow(where, address, port) as client:
        hears(client, agent, "ready")
        hears(client, agent, "nobody")
        scene.serve(A)  # its packets so far were not translated, and conntrack remembers that
        hears(client, agent, f"{A}:{PORT}")
        scene.serve(B)
        hears(client, agent, f"{B}:{PORT}")
        scene.serve()
        hears(client, agent, "nobody")
        scene.serve(A)
        hears(client, agent, f"{A}:{PORT}")


def test_follows_a_change_that_no_agent_saw(scene: Scene) -> None:
    scene.serve(A)
    with flow(scene.net.client, VIP, 53) as client:
        with scene.agent() as agent:
            hears(client, agent, f"{A}:{PORT}")
            agent.kill()
        scene.serve(B)
        with scene.agent() as agent:
            hears(client, agent, f"{B}:{PORT}")
            agent.kill()
        scene.serve()
        with scene.agent() as agent:
            hears(client, agent, "nobody")
