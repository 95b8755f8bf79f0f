"""`miniproxy run` as an operator meets it: signals, reloads, refusals, and rules that outlive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from miniproxy.lab import uml
from tests.packets.topology import ROOT, Namespace, settle

SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"namespace": "ns", "name": "web"},
    "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
}
SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"namespace": "ns", "name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    "endpoints": [{"addresses": ["10.1.0.1"]}],
}


class Node:
    """A namespace with a configuration file and a folder of manifests for an agent."""

    def __init__(self, namespace: Namespace, folder: Path) -> None:
        self.namespace = namespace
        self.manifests = folder / "manifests"
        self.manifests.mkdir()
        self.config = folder / "config.yaml"
        self.log = folder / "log"
        self.write(SERVICE, SLICE)
        self.configure("10.128.0.0/16")

    def write(self, *objects: dict[str, Any]) -> None:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        (self.manifests / "objects.json").write_text(text)

    def configure(self, cidr: str) -> None:
        kind = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        self.config.write_text(f"{kind}clusterCIDR: {cidr}\niptables: {{minSyncPeriod: 1ms}}\n")

    def nat(self) -> str:
        return self.namespace.run("iptables-nft-save", "-t", "nat")

    def argv(self, *flags: str) -> list[str]:
        where = ["--config", str(self.config), "--source", str(self.manifests), "--iptables-variant", "nft"]
        return [sys.executable, "-m", "miniproxy", "run", *where, *flags]

    @contextmanager
    def agent(self, *flags: str) -> Iterator[subprocess.Popen[str]]:
        with self.log.open("a") as log, self.namespace.process(*self.argv(*flags), log=log) as process:
            self.wait(lambda: "KUBE-SVC" in self.nat())
            yield process

    def wait(self, condition: Callable[[], bool]) -> None:
        assert settle(condition, 20), self.log.read_text()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Namespace.create() as namespace:
        yield Node(namespace, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_cleanly_and_the_rules_stay(node: Node, number: signal.Signals) -> None:
    with node.agent() as process:
        rules = node.nat()
        process.send_signal(number)
        assert process.wait(20) == 0
    assert strip(node.nat()) == strip(rules)
    assert "the rules stay" in node.log.read_text()


def strip(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_hup_reads_the_configuration_again(node: Node) -> None:
    with node.agent() as process:
        assert "! -s 10.128.0.0/16 -d 10.96.0.1/32" in node.nat()
        node.configure("10.129.0.0/16")
        process.send_signal(signal.SIGHUP)
        node.wait(lambda: "! -s 10.129.0.0/16 -d 10.96.0.1/32" in node.nat())
        assert "10.128.0.0/16" not in node.nat()


def test_hup_with_a_broken_configuration_keeps_the_old_one(node: Node) -> None:
    with node.agent() as process:
        node.config.write_text(node.config.read_text().replace("minSyncPeriod: 1ms", "masqueradeBit: 40"))
        process.send_signal(signal.SIGHUP)
        node.wait(lambda: "the old one stays" in node.log.read_text())
        node.write(SERVICE)
        node.wait(lambda: "KUBE-SVC" not in node.nat())
        assert "masqueradeBit" in node.log.read_text()


def test_hup_with_a_configuration_that_does_not_work_here_keeps_the_old_one(node: Node) -> None:
    with node.agent() as process:
        text = node.config.read_text()
        node.config.write_text(text + "mode: ipvs\nipvs: {scheduler: nosuch}\n")
        process.send_signal(signal.SIGHUP)
        node.wait(lambda: "the old one stays" in node.log.read_text())
        node.write(SERVICE)
        node.wait(lambda: "KUBE-SVC" not in node.nat())


@pytest.mark.parametrize("pause", [0.002, 0.02, 0.08])
def test_a_signal_during_a_reload_is_not_lost(node: Node, pause: float) -> None:
    with node.agent() as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(pause)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_node_without_ip6tables_is_served_in_the_family_it_has(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that fails for ever would make the agent unhealthy, and keep what another mode left."""
    refuse = tmp_path / "ip6tables-nft"
    refuse.write_text("#!/bin/sh\necho \"can't initialize ip6tables table 'nat': Table does not exist\" >&2\nexit 3\n")
    refuse.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    node.namespace.run("nft", "add table ip miniproxy")
    with node.agent():
        node.wait(lambda: "removed what another mode had left" in node.log.read_text())
        assert "IPv6 is left out: ip6tables-nft: can't initialize" in node.log.read_text()
        assert "sync failed" not in node.log.read_text()
        assert node.namespace.run("ip6tables-nft-save") == ""


def test_oom_score_and_bind_address_are_heeded(node: Node) -> None:
    with node.agent("--oom-score-adj=555", "--bind-address=192.0.2.99", "--nodeport-addresses=primary") as process:
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "555"
        assert "-A KUBE-SERVICES -d 192.0.2.99/32 " in node.nat()


def test_a_change_reaches_the_kernel_and_touches_nothing_else(node: Node) -> None:
    other = json.loads(json.dumps([SERVICE, SLICE]).replace('"web', '"api').replace("10.96.0.1", "10.96.0.2"))
    with node.agent():
        node.write(SERVICE, SLICE, *other)
        node.wait(lambda: "ns/api:http cluster IP" in node.nat())
        before = {line for line in node.nat().splitlines() if "ns/api" in line}
        node.write(SERVICE, *other)
        node.wait(lambda: "ns/web:http ->" not in node.nat())
        assert {line for line in node.nat().splitlines() if "ns/api" in line} == before


def test_drift_is_repaired(node: Node) -> None:
    node.config.write_text(node.config.read_text().replace("minSyncPeriod: 1ms", "minSyncPeriod: 1ms, syncPeriod: 1s"))
    with node.agent():
        node.namespace.run("iptables-nft", "-t", "nat", "-F", "KUBE-SERVICES")
        node.wait(lambda: "ns/web:http cluster IP" in node.nat())
        node.wait(lambda: "repair" in node.log.read_text())


@pytest.mark.skipif(uml.has_ip_vs(), reason="IPVS is cleaned up with pyroute2")
@pytest.mark.parametrize(("source", "says"), [("manifests", "synced"), ("API server", "Connection refused")])
def test_what_it_has_no_use_for_is_not_loaded(node: Node, tmp_path: Path, source: str, says: str) -> None:
    """Each of these takes longer to load than 5,000 Services, or more memory."""
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    python, *rest = (
        node.argv() if source == "manifests" else node.argv("--source=", f"--kubeconfig={tmp_path}/kubeconfig")
    )
    with node.log.open("w") as log, node.namespace.process(python, "-X", "importtime", *rest, log=log):
        node.wait(lambda: says in node.log.read_text())
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in node.log.read_text().splitlines()}
    assert "msgspec" in loaded
    assert loaded.isdisjoint({"kubernetes", "pyroute2", "rich"})


def test_plan_agrees_with_the_kernel(node: Node) -> None:
    plan = [*node.argv()[:3], "plan", *node.argv()[4:]]
    with node.agent():
        node.wait(lambda: node.namespace.run(*plan, "--family", "4", "--diff") == "")
    node.namespace.run("iptables-nft", "-t", "nat", "-F", "KUBE-SERVICES")
    done = subprocess.run(node.namespace.command([*plan, "--diff"]), capture_output=True, text=True)
    assert done.returncode == 1
    assert "+-A KUBE-SERVICES -d 10.96.0.1/32" in done.stdout


def test_plan_can_be_strict(node: Node) -> None:
    argv = ["plan" if word == "run" else word for word in node.argv()]

    def code(*flags: str) -> int:
        return subprocess.run(node.namespace.command([*argv, *flags]), capture_output=True).returncode

    assert code("--strict") == 0
    (node.manifests / "broken.yaml").write_text("a: [")
    assert (code(), code("--strict")) == (0, 1)


def test_plan_needs_no_root(node: Node, tmp_path: Path) -> None:
    ours = [folder for folder in tmp_path.parents if folder.name.startswith(("pytest-", "popen-"))]
    for folder in (tmp_path, *ours):
        folder.chmod(0o755)
    argv = [*node.argv()[:3], "plan", *node.argv()[4:], "--family", "4"]
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run([*as_nobody, *argv], cwd=ROOT, capture_output=True, text=True)
    if "Permission denied" in done.stderr and str(Path(sys.prefix)) in done.stderr:
        pytest.skip(f"user nobody may not read {sys.prefix}")
    assert done.returncode == 0, done.stderr
    assert "-A KUBE-SERVICES -d 10.96.0.1/32" in done.stdout


def test_cleanup_after_the_agent_leaves_nothing(node: Node) -> None:
    with node.agent() as process:
        process.terminate()
        process.wait(20)
    said = json.loads(node.namespace.run(sys.executable, "-m", "miniproxy", "cleanup", "--json"))
    assert said["errors"] == []
    assert said["removed"]["iptables-nft IPv4"] > 10
    assert "KUBE" not in node.nat()
