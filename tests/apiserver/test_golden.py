"""Objects from a real API server, read with the rights that deploy/ gives, reach the kernel as from a folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.golden_rules import GOLDEN
from tests.packets.agent import GOLDEN_RULES, OBJECTS, Agent, rule_differences, running
from tests.packets.topology import ROOT, Network, network

from .server import SERVICE_CIDRS, ApiServer, api_server

VARIANT = "nft"
WATCHED = {"services", "endpointslices", "nodes"}
TOKEN = ("create", "token", "miniproxy", "--namespace=kube-system")


class Cluster(NamedTuple):
    network: Network
    api: ApiServer
    agent: Agent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server with the golden objects, and an agent on n1 with a token of the deployed account."""
    folder = tmp_path_factory.mktemp("apiserver")
    with network([]) as net, api_server(net.node, folder / "server") as api:
        create_golden_objects(api)
        api.kubectl("apply", "-f", str(ROOT / "deploy/base/rbac.yaml"))
        token = api.kubectl(*TOKEN).strip()
        argv = [sys.executable, "-m", "miniproxy", "run", "--config", str(GOLDEN / "config.yaml")]
        argv += ["--hostname-override=n1", f"--iptables-variant={VARIANT}"]
        argv += [f"--kubeconfig={api.kubeconfig('agent', token)}"]
        with running(net, argv, folder / "log") as agent:
            yield Cluster(net, api, agent)


def create_golden_objects(api: ApiServer) -> None:
    """As users and controllers do: specs first, then what the status subresource takes."""
    objects = [thing for name in OBJECTS for thing in golden_objects(name)]
    namespaces = sorted({thing["metadata"]["namespace"] for thing in objects if "namespace" in thing["metadata"]})
    spaces = [_object("Namespace", "v1", {"name": name}) for name in namespaces if name != "default"]
    made_by_server = ("default", "kubernetes")
    new = [thing for thing in objects if _name(thing) != made_by_server]
    api.kubectl("create", "-f", "-", stdin=_list([*spaces, *new]))
    with_status = [thing for thing in new if thing.get("status", {}) not in ({}, {"loadBalancer": {}})]
    assert with_status
    api.kubectl("replace", "--subresource=status", "-f", "-", stdin=_list(with_status))


def golden_objects(file: str) -> list[dict[str, Any]]:
    """With kinds, which a list leaves out, and without what the server adds."""
    content = json.loads((GOLDEN / file).read_text())
    kind, version = content["kind"].removesuffix("List"), content["apiVersion"]
    things = []
    for thing in content.get("items", [content]):
        metadata = {k: v for k, v in thing["metadata"].items() if k in ("name", "namespace", "labels", "annotations")}
        things.append({**thing, **_object(kind, version, metadata)})
    return things


def _object(kind: str, version: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "apiVersion": version, "metadata": metadata}


def _name(thing: dict[str, Any]) -> tuple[str, str]:
    return thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def _list(things: list[dict[str, Any]]) -> str:
    return json.dumps({"kind": "List", "apiVersion": "v1", "items": things})


def differences(cluster: Cluster) -> list[str]:
    cluster.agent.check()
    return rule_differences(cluster.network, VARIANT, GOLDEN_RULES)


def settle(cluster: Cluster) -> None:
    cluster.api.eventually(lambda: not differences(cluster), "the golden rules\n" + cluster.agent.tail())


def handles(cluster: Cluster) -> str:
    """The kernel's rules with the number each got when it was written."""
    return cluster.network.node.run("nft", "--stateless", "--handle", "list", "ruleset")


def test_the_golden_objects_reach_the_kernel(cluster: Cluster) -> None:
    settle(cluster)
    assert not differences(cluster)


def test_nothing_is_refused_and_nothing_forbidden(cluster: Cluster) -> None:
    settle(cluster)
    said = cluster.agent.log.read_text()
    assert "forbidden" not in said
    assert "refused: API" not in said


def test_a_change_and_its_undoing_reach_the_kernel(cluster: Cluster) -> None:
    settle(cluster)
    cluster.api.kubectl(
        "--namespace=feat", "patch", "service", "cip", "--patch", '{"spec":{"ports":[{"port":80,"name":"web"}]}}'
    )
    cluster.api.eventually(lambda: bool(differences(cluster)), "the change")
    cip = next(thing for thing in golden_objects("services.json") if _name(thing) == ("feat", "cip"))
    cluster.api.kubectl("replace", "-f", "-", stdin=json.dumps(cip))
    settle(cluster)


def test_a_restart_of_the_server_writes_nothing(cluster: Cluster) -> None:
    """A server is back so soon, sometimes, that nobody misses it: here it stays away until all watches are lost."""
    settle(cluster)
    before = handles(cluster)
    cluster.api.stop()
    cluster.api.eventually(lambda: in_trouble(cluster) == WATCHED, "the agent to miss its server")
    cluster.api.start()
    cluster.api.eventually(lambda: not in_trouble(cluster), "the agent to find its server again")
    assert handles(cluster) == before


def in_trouble(cluster: Cluster) -> set[str]:
    """The resources that the agent cannot follow at this moment, as its log says."""
    told = re.findall(r"(refused|mended): API (\w+): ", cluster.agent.log.read_text())
    return {name for _, name in told if told.count(("refused", name)) > told.count(("mended", name))}


def test_what_changed_while_the_server_was_away_reaches_the_kernel(cluster: Cluster) -> None:
    settle(cluster)
    cluster.api.start(port=7443)  # the state can change: it is just this agent that has lost its server
    cluster.api.stop()
    try:
        slices = golden_objects("endpointslices.json")
        cip = next(thing for thing in slices if _name(thing) == ("feat", "cip-a"))
        cluster.api.kubectl("delete", "service", "np", "--namespace=feat", port=7443)
        cluster.api.kubectl("delete", "endpointslice", "cip-a", "--namespace=feat", port=7443)
    finally:
        cluster.api.stop(port=7443)
    assert not differences(cluster)  # the old state keeps serving
    cluster.api.start()
    cluster.api.eventually(lambda: bool(differences(cluster)), "the change")
    np = next(thing for thing in golden_objects("services.json") if _name(thing) == ("feat", "np"))
    cluster.api.kubectl("create", "-f", "-", stdin=_list([cip, np]))
    settle(cluster)


PLAN = [sys.executable, "-m", "miniproxy", "plan", "--proxy-mode=nftables", "--hostname-override=n1"]


def test_plan_reads_the_server_too(cluster: Cluster) -> None:
    """And where cluster IPs come from, which matters to nftables mode."""
    text = cluster.network.node.run(*PLAN, f"--kubeconfig={cluster.api.folder / 'agent.kubeconfig'}")
    for cidr in SERVICE_CIDRS.split(","):
        assert cidr in text
    assert "10.97.0.1" in text


def test_in_a_pod_the_service_account_is_enough(cluster: Cluster) -> None:
    node, token = cluster.network.node, cluster.api.kubectl(*TOKEN).strip()
    authority = str(cluster.api.folder / "certs/apiserver.crt")
    secrets = "/var/run/secrets/kubernetes.io/serviceaccount"  # /run is the node's own here
    node.run("sh", "-c", f"mkdir -p {secrets} && cp {authority} {secrets}/ca.crt && cat > {secrets}/token", stdin=token)
    text = node.run("env", "KUBERNETES_SERVICE_HOST=127.0.0.1", "KUBERNETES_SERVICE_PORT=6443", *PLAN)
    assert "10.97.0.1" in text


def test_plan_says_why_it_cannot_read_the_server(cluster: Cluster) -> None:
    nobody = cluster.api.kubeconfig("nobody", "no such token")
    argv = cluster.network.node.command([*PLAN, f"--kubeconfig={nobody}"])
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1
    assert "HTTP 401" in done.stderr
    assert "Traceback" not in done.stderr
