"""The lab's manifests: Nodes, Services and EndpointSlices as a cluster would hold them, for pods that exist.

Services come from manifests/services.yaml as they are; the slices behind them are made from the lab's pods. Every
file is replaced in one rename, because an agent watches the folder.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import state
from .plan import LabSpec, Node, Plan, Pod

SERVICES = Path(__file__).parent / "manifests" / "services.yaml"
PODS_ANNOTATION = "lab.miniproxy.io/pods"
_FAMILIES = ("IPv4", "IPv6")


class LabService(msgspec.Struct, frozen=True, kw_only=True):
    """A Service of the lab, as far as somebody who connects to it wants to know. IP pairs: (IPv4, IPv6)."""

    name: str
    type: str
    cluster_ips: tuple[str, str]
    protocol: str
    port: int  # of the first port, as are protocol and node_port
    node_port: int  # 0: none
    load_balancer_ips: tuple[str, ...]
    ports: dict[str, int]  # all ports by name


def read_services(path: Path = SERVICES) -> list[dict[str, Any]]:
    """The Service objects of a YAML file."""
    import yaml

    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def describe(service: dict[str, Any]) -> LabService:
    spec = service["spec"]
    first = spec["ports"][0]
    ingress = service.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    return LabService(
        name=service["metadata"]["name"],
        type=spec["type"],
        cluster_ips=tuple(spec["clusterIPs"]),
        protocol=first["protocol"],
        port=first["port"],
        node_port=first.get("nodePort", 0),
        load_balancer_ips=tuple(item["ip"] for item in ingress),
        ports={port["name"]: port["port"] for port in spec["ports"]},
    )


def initial_pods(service: dict[str, Any], plan: Plan) -> tuple[Pod, ...]:
    """The pods behind a service when the lab comes up."""
    count = service["metadata"].get("annotations", {}).get(PODS_ANNOTATION)
    return plan.servers if count is None else plan.servers[: int(count)]


def node(node: Node) -> dict[str, Any]:
    """A v1 Node."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "topology.kubernetes.io/zone": f"zone-{node.number}",
            },
        },
        "spec": {"podCIDR": node.pod_cidrs[0], "podCIDRs": list(node.pod_cidrs)},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": ip} for ip in node.ips),
                {"type": "Hostname", "address": node.name},
            ]
        },
    }


def slices(service: dict[str, Any], pods: Sequence[Pod], spec: LabSpec, when: float) -> list[dict[str, Any]]:
    """One discovery.k8s.io/v1 EndpointSlice per family; `when` (Unix seconds) is the change's time."""
    target = {"http": spec.http_port, "line": spec.tcp_port, "echo": spec.udp_port}
    name = service["metadata"]["name"]
    namespace = service["metadata"]["namespace"]
    moment = datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat().replace("+00:00", "Z")
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-{family.lower()}",
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": name},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": moment},
            },
            "addressType": family,
            "ports": [
                {"name": port["name"], "protocol": port["protocol"], "port": target[port["targetPort"]]}
                for port in service["spec"]["ports"]
            ],
            "endpoints": [
                {
                    "addresses": [pod.ips[index]],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "nodeName": pod.node,
                    "targetRef": {"kind": "Pod", "namespace": namespace, "name": pod.name},
                }
                for pod in pods
            ],
        }
        for index, family in enumerate(_FAMILIES)
    ]


def write_all(folder: Path, plan: Plan, when: float) -> None:
    """Writes everything of a new lab."""
    _write(folder / "nodes.yaml", (node(each) for each in plan.nodes))
    services = read_services()
    _write(folder / "services.yaml", services)
    for service in services:
        write_slices(folder, service, initial_pods(service, plan), plan.spec, when)


def write_slices(folder: Path, service: dict[str, Any], pods: Sequence[Pod], spec: LabSpec, when: float) -> None:
    """Puts these pods, and only these, behind a service."""
    _write(slices_file(folder, service["metadata"]["name"]), slices(service, pods, spec, when))


def slices_file(folder: Path, service: str) -> Path:
    return folder / f"endpoints-{service}.yaml"


def pods_behind(folder: Path, service: str) -> list[str]:
    """Names of the pods that a service's slices list now."""
    documents = read_services(slices_file(folder, service))
    return [endpoint["targetRef"]["name"] for endpoint in documents[0]["endpoints"]]


def _write(path: Path, documents: Iterable[dict[str, Any]]) -> None:
    import yaml

    state.replace(path, yaml.safe_dump_all(documents, sort_keys=False).encode())
