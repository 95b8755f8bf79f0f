"""deploy/: manifests that agree with each other and with the code, and that an API server accepts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import miniproxy
from miniproxy.config import load
from miniproxy.sources.kube import resources
from tests.apiserver.server import api_server, program
from tests.packets.topology import ROOT, Namespace

DEPLOY = ROOT / "deploy"
OVERLAYS = ["iptables", "ipvs", "nftables", "kubeadm"]
Manifest = dict[str, Any]


def built(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    argv = [program("kubectl"), "kustomize", str(DEPLOY / "overlays" / overlay)]
    return list(yaml.safe_load_all(subprocess.run(argv, capture_output=True, text=True, check=True).stdout))


def pod(manifests: list[Manifest]) -> Manifest:
    spec = one(manifests, "DaemonSet")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def base() -> list[Manifest]:
    return [m for name in ("rbac", "daemonset") for m in yaml.safe_load_all((DEPLOY / f"base/{name}.yaml").read_text())]


def test_the_account_may_read_all_that_the_source_asks_for() -> None:
    rules = one(base(), "ClusterRole")["rules"]
    allowed = {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    for resource in resources("n1", service_cidrs=True):
        group, plural = re.fullmatch(r"/(?:api|apis/([^/]+))/v1/(\w+)", resource.path).groups("")  # type: ignore[union-attr]
        assert {(group, plural, verb) for verb in ("list", "watch")} <= allowed, resource.path
    assert ("events.k8s.io", "events", "create") in allowed
    assert ("events.k8s.io", "events", "patch") in allowed
    writes = {entry for entry in allowed if entry[2] not in ("get", "list", "watch")}
    assert {entry[1] for entry in writes} == {"events"}


def test_names_agree() -> None:
    account, binding, daemons = (one(base(), kind) for kind in ("ServiceAccount", "ClusterRoleBinding", "DaemonSet"))
    assert binding["roleRef"]["name"] == one(base(), "ClusterRole")["metadata"]["name"]
    where = {key: account["metadata"][key] for key in ("name", "namespace")}
    assert binding["subjects"] == [{"kind": "ServiceAccount", **where}]
    assert pod(base())["serviceAccountName"] == account["metadata"]["name"]
    assert daemons["metadata"]["namespace"] == account["metadata"]["namespace"]
    labels = daemons["spec"]["template"]["metadata"]["labels"]
    assert daemons["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels["k8s-app"] == "kube-proxy"


def test_the_image_is_this_version_under_one_name() -> None:
    (image,) = yaml.safe_load((DEPLOY / "base/kustomization.yaml").read_text())["images"]
    containers = pod(base())["initContainers"] + pod(base())["containers"]
    assert {container["image"] for container in containers} == {image["name"]}
    assert image["newTag"] == miniproxy.__version__


def test_the_agent_has_no_right_it_does_not_need() -> None:
    (container,) = pod(base())["containers"]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
    }
    assert pod(base())["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("config.conf")), ids=lambda file: file.parent.name)
def test_configurations_load_without_a_warning(file: Path) -> None:
    loaded = load(file, {"hostname_override": "n1"})
    assert not loaded.warnings
    assert loaded.settings.mode == {"base": "iptables"}.get(file.parent.name, file.parent.name)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_mounts_and_volumes_agree(overlay: str) -> None:
    manifests = built(overlay)
    volumes = {volume["name"]: volume for volume in pod(manifests)["volumes"]}
    for container in pod(manifests)["initContainers"] + pod(manifests)["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
        (config,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config"]
        assert f"--config={config}/config.conf" in container["args"]
    named = volumes["config"]["configMap"]["name"]
    generated = one(manifests, "ConfigMap")
    if overlay == "kubeadm":
        assert named == "kube-proxy"  # the cluster has it
    else:
        assert named == generated["metadata"]["name"]
        mode = yaml.safe_load(generated["data"]["config.conf"])["mode"]
        assert mode == overlay


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_starts_without_an_address_of_the_api_server_that_needs_no_service(overlay: str) -> None:
    (container,) = pod(built(overlay))["containers"]
    required = [{"configMapRef": {"name": "miniproxy-api-server"}}]
    assert container.get("envFrom", []) == ([] if overlay == "kubeadm" else required)


@pytest.fixture(scope="module")
def node() -> Iterator[Namespace]:
    with Namespace.create() as namespace:
        yield namespace


def test_an_api_server_accepts_them_strictly(node: Namespace, tmp_path: Path) -> None:
    with api_server(node, tmp_path / "server") as api:
        for overlay in OVERLAYS:
            folder = str(DEPLOY / "overlays" / overlay)
            said = api.kubectl("apply", "--validate=strict", "--dry-run=server", "-k", folder)
            assert "daemonset.apps/miniproxy created (server dry run)" in said
        bad = yaml.safe_dump(one(base(), "DaemonSet") | {"spek": {}})
        with pytest.raises(AssertionError, match="spek"):
            api.kubectl("apply", "--validate=strict", "--dry-run=server", "-f", "-", stdin=bad)
