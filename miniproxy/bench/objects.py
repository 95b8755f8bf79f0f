"""The cluster by numbers: service `n` and its endpoints, the same in every run.

Plain Kubernetes JSON, since a real API server must take it: one Service of one port, and its one EndpointSlice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .world import ENDPOINT_PORT, NODE_IP, NODE_NAME, POD_CIDR

NAMESPACE = "bench"
PORT = 80
_FIRST_VIP = (10 << 24) + (96 << 16) + 4096  # leaves room for addresses the API server gives out itself
_FIRST_ENDPOINT = (10 << 24) + (128 << 16) + 1024
_HOSTS_PER_SERVICE = 32

Json = dict[str, Any]


class Target(NamedTuple):
    """One service at one moment: its number and which of its endpoints serve."""

    number: int
    hosts: tuple[int, ...]

    @property
    def service_name(self) -> str:
        return f"svc-{self.number}"

    @property
    def slice_name(self) -> str:
        return f"svc-{self.number}-x"

    @property
    def vip(self) -> str:
        return vip(self.number)

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(endpoint(self.number, host) for host in self.hosts)

    def service(self) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": NAMESPACE, "name": self.service_name},
            "spec": {
                "clusterIP": self.vip,
                "clusterIPs": [self.vip],
                "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack",
                "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": ENDPOINT_PORT}],
            },
        }

    def slice(self) -> Json:
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": NAMESPACE,
                "name": self.slice_name,
                "labels": {"kubernetes.io/service-name": self.service_name},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "protocol": "TCP", "port": ENDPOINT_PORT}],
            "endpoints": [
                {"addresses": [ip], "nodeName": "elsewhere", "conditions": {"ready": True}} for ip in self.endpoints
            ],
        }


def target(number: int, endpoints: int) -> Target:
    """Service `number` with its first so many endpoints."""
    return Target(number, tuple(range(endpoints)))


def vip(number: int) -> str:
    return _dotted(_FIRST_VIP + number)


def endpoint(number: int, host: int) -> str:
    return _dotted(_FIRST_ENDPOINT + number * _HOSTS_PER_SERVICE + host)


def node() -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE_NAME},
        "spec": {"podCIDR": POD_CIDR, "podCIDRs": [POD_CIDR]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]},
    }


def _dotted(number: int) -> str:
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))
