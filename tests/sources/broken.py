"""Objects that a careless or hostile user could write: each kind of mistake once, with the field it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from miniproxy.model import Ref

Json = Any


class Broken(NamedTuple):
    """One wrong object. `whole`: it is refused; else only the field is, and the rest of it is served."""

    what: str
    object: Json
    ref: Ref
    field: str
    whole: bool


def service(name: str, number: int = 1, namespace: str = "default") -> Json:
    """A good LoadBalancer Service with everything in it that can go wrong."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "labels": {}, "annotations": {}},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": f"10.96.1.{number}",
            "clusterIPs": [f"10.96.1.{number}"],
            "ports": [
                {"name": "http", "protocol": "TCP", "port": 80, "nodePort": 30000 + number},
                {"name": "dns", "protocol": "UDP", "port": 53, "nodePort": 31000 + number},
            ],
            "externalIPs": [f"198.18.1.{number}"],
            "loadBalancerSourceRanges": ["203.0.113.0/24"],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "internalTrafficPolicy": "Cluster",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32600 + number,
        },
        "status": {"loadBalancer": {"ingress": [{"ip": f"192.0.2.{number}", "ipMode": "VIP"}]}},
    }


def endpoint_slice(name: str, number: int = 1, namespace: str = "default", service: str = "web") -> Json:
    """A good slice of two endpoints."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service},
            "annotations": {},
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [f"10.128.1.{number}"],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": "n1",
                "hints": {"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]},
            },
            {"addresses": [f"10.128.2.{number}"], "nodeName": "n2"},
        ],
        "ports": [
            {"name": "http", "protocol": "TCP", "port": 8080},
            {"name": "dns", "protocol": "UDP", "port": 53},
        ],
    }


def node(name: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "z1"}},
        "spec": {"podCIDRs": ["10.128.1.0/24"], "taints": [{"key": "node.kubernetes.io/not-ready"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.30.0.2"}]},
    }


def steps(field: str) -> list[str | int]:
    """ "spec.ports[1].port" → ["spec", "ports", 1, "port"]; what is in brackets may be a key with dots."""
    found: list[str | int] = []
    for part in field.replace("]", "").split("[") if "/" in field else [field]:
        if "/" in part:
            found.append(part)
        else:
            words = part.replace("]", "").replace("[", ".").strip(".").split(".")
            found += [int(word) if word.isdigit() else word for word in words]
    return found


def put(thing: Json, field: str, value: Json) -> Json:
    """The object with another value at that field, in place."""
    *way, last = steps(field)
    below = thing
    for step in way:
        below = below[step]
    below[last] = value
    return thing


_PART = False
_WHOLE = True
# (what, field that is wrong, value, whether the object is refused whole)
SERVICES: tuple[tuple[str, str, Json, bool], ...] = (
    ("port zero", "spec.ports[1].port", 0, _PART),
    ("port too large", "spec.ports[0].port", 65536, _PART),
    ("port negative", "spec.ports[0].port", -1, _PART),
    ("port null", "spec.ports[0].port", None, _PART),
    ("port beyond any integer", "spec.ports[0].port", 10**400, _PART),
    ("port a string", "spec.ports[1].port", "80", _WHOLE),
    ("port a fraction", "spec.ports[1].port", 80.5, _WHOLE),
    ("port true", "spec.ports[1].port", True, _WHOLE),
    ("port a map", "spec.ports[1]", [], _WHOLE),
    ("ports a map", "spec.ports", {"http": 80}, _WHOLE),
    ("nodePort too large", "spec.ports[1].nodePort", 70000, _PART),
    ("protocol unknown", "spec.ports[1].protocol", "ICMP", _PART),
    ("protocol in small letters", "spec.ports[0].protocol", "tcp", _PART),
    ("port name with a comment's end", "spec.ports[0].name", '" -j ACCEPT', _PART),
    ("port name with a new line", "spec.ports[0].name", "http\nCOMMIT", _PART),
    ("port name twice", "spec.ports[1].name", "http", _PART),
    ("port name left out", "spec.ports[1].name", "", _PART),
    ("clusterIP no address", "spec.clusterIPs[0]", "10.96.1.256", _PART),
    ("clusterIP loopback", "spec.clusterIPs[0]", "127.0.0.1", _PART),
    ("externalIP a range", "spec.externalIPs[0]", "198.18.0.0/16", _PART),
    ("externalIP unspecified", "spec.externalIPs[0]", "0.0.0.0", _PART),
    ("externalIP an option", "spec.externalIPs[0]", "--flush", _PART),
    ("externalIPs a string", "spec.externalIPs", "198.18.0.1", _WHOLE),
    ("source range too long", "spec.loadBalancerSourceRanges[0]", "10.0.0.0/33", _PART),
    ("source range an address", "spec.loadBalancerSourceRanges[0]", "10.0.0.1", _PART),
    ("ingress no address", "status.loadBalancer.ingress[0].ip", "lb.example.com", _PART),
    ("ipMode unknown", "status.loadBalancer.ingress[0].ipMode", "DSR", _PART),
    ("affinity unknown", "spec.sessionAffinity", "Cookie", _PART),
    ("affinity too long", "spec.sessionAffinityConfig.clientIP.timeoutSeconds", 86401, _PART),
    ("internal policy unknown", "spec.internalTrafficPolicy", "local", _PART),
    ("external policy unknown", "spec.externalTrafficPolicy", "Node", _PART),
    ("health check port too large", "spec.healthCheckNodePort", 99999, _PART),
    ("type unknown", "spec.type", "HeadLess", _PART),
    ("scheduler hostile", "metadata.annotations[miniproxy.io/ipvs-scheduler]", "rr; reboot", _PART),
    ("spec a list", "spec", [], _WHOLE),
    ("version of another age", "apiVersion", "v2", _WHOLE),
)
SLICES: tuple[tuple[str, str, Json, bool], ...] = (
    ("endpoint no address", "endpoints[0].addresses[0]", "pod-1", _PART),
    ("endpoint of the other family", "endpoints[1].addresses[0]", "fd00::1", _PART),
    ("endpoint loopback", "endpoints[0].addresses[0]", "127.0.0.1", _PART),
    ("endpoint link-local", "endpoints[0].addresses[0]", "169.254.169.254", _PART),
    ("endpoint without address", "endpoints[1].addresses", [], _PART),
    ("endpoint's address a number", "endpoints[0].addresses[0]", 10, _WHOLE),
    ("node's name hostile", "endpoints[0].nodeName", "n1 -j ACCEPT", _PART),
    ("zone hint hostile", "endpoints[0].hints.forZones[0].name", "z1\n", _PART),
    ("node hint hostile", "endpoints[0].hints.forNodes[0].name", "N1", _PART),
    ("ready a string", "endpoints[0].conditions.ready", "true", _WHOLE),
    ("slice port too large", "ports[1].port", 65537, _PART),
    ("slice port's protocol unknown", "ports[1].protocol", "QUIC", _PART),
    ("slice port's name twice", "ports[1].name", "http", _PART),
    ("address type unknown", "addressType", "IPv5", _WHOLE),
    ("service's name hostile", "metadata.labels[kubernetes.io/service-name]", "../web", _WHOLE),
    (
        "trigger time no time",
        "metadata.annotations[endpoints.kubernetes.io/last-change-trigger-time]",
        "yesterday",
        _PART,
    ),
    ("endpoints a map", "endpoints", {}, _WHOLE),
)
NODES: tuple[tuple[str, str, Json, bool], ...] = (
    ("node's address no address", "status.addresses[0].address", "n1.example.com", _PART),
    ("pod CIDR no range", "spec.podCIDRs[0]", "10.128.1.0", _PART),
    ("zone hostile", "metadata.labels[topology.kubernetes.io/zone]", "z1 z2", _PART),
)
# Names are wrong in objects that have no other name to be called by.
NAMES: tuple[tuple[str, str, Json, bool], ...] = (
    ("name in capitals", "metadata.name", "Web", _WHOLE),
    ("name too long", "metadata.name", "w" * 64, _WHOLE),
    ("name with a control character", "metadata.name", "web\x1b[2J", _WHOLE),
    ("namespace with a slash", "metadata.namespace", "kube/system", _WHOLE),
    ("namespace left out", "metadata.namespace", "", _WHOLE),
)


def broken_objects() -> list[Broken]:
    """Every mistake once; names begin with "broken-" where the name is not the mistake."""
    found: list[Broken] = []
    _add(found, SERVICES, lambda i: service(f"broken-{i}", 100 + i), "Service")
    _add(found, SLICES, lambda i: endpoint_slice(f"broken-slice-{i}", 100 + i), "EndpointSlice")
    _add(found, NODES, lambda i: node(f"broken-node-{i}"), "Node")
    _add(found, NAMES, lambda i: service(f"broken-name-{i}", 200 + i), "Service")
    return found


def _add(
    found: list[Broken],
    table: tuple[tuple[str, str, Json, bool], ...],
    make: Callable[[int], Json],
    kind: str,
) -> None:
    for i, (what, field, value, whole) in enumerate(table):
        thing = put(make(i), field, value)
        metadata = thing["metadata"]
        name, namespace = metadata["name"], metadata.get("namespace", "")
        shown = name if name.isprintable() else ascii(name)
        ref = Ref(kind, namespace, shown)  # type: ignore[arg-type]
        found.append(Broken(what, thing, ref, field, whole))
