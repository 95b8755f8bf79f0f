"""A small part of a cluster that never comes to rest: Services and EndpointSlices that change at random.

It hands on Kubernetes objects as the API would serve them. Their addresses are not the golden ones, so
nothing that happens here concerns the golden services.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

SERVICES = 10
Object = dict[str, Any]


class Churn:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._objects: dict[int, list[Object]] = {}
        for number in range(SERVICES):
            self._change(number)

    @property
    def objects(self) -> list[Object]:
        return [item for items in self._objects.values() for item in items]

    def step(self) -> None:
        """Change, delete or create up to three services."""
        for number in self._rng.sample(range(SERVICES), self._rng.randint(1, 3)):
            self._change(number)

    def write(self, path: Path) -> None:
        """Replace the manifest file at once, as careful tools do."""
        temporary = path.parent.parent / f"{path.name}.new"
        temporary.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": self.objects}))
        os.replace(temporary, path)

    def _change(self, number: int) -> None:
        if self._rng.random() < 0.2:
            self._objects.pop(number, None)
        else:
            self._objects[number] = [self._service(number), self._slice(number)]

    def _service(self, number: int) -> Object:
        rng = self._rng
        kind = rng.choice(["ClusterIP", "NodePort", "LoadBalancer"])
        port: Object = {"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}
        spec: Object = {
            "type": kind,
            "clusterIP": f"10.99.0.{number + 1}",
            "clusterIPs": [f"10.99.0.{number + 1}"],
            "ipFamilies": ["IPv4"],
            "ports": [port],
            "internalTrafficPolicy": rng.choice(["Cluster", "Local"]),
            "sessionAffinity": rng.choice(["None", "ClientIP"]),
        }
        if kind != "ClusterIP":
            port["nodePort"] = 32500 + number
            spec["externalTrafficPolicy"] = rng.choice(["Cluster", "Local"])
        status: Object = {}
        if kind == "LoadBalancer":
            status = {"loadBalancer": {"ingress": [{"ip": f"192.0.2.{200 + number}"}]}}
            spec["loadBalancerSourceRanges"] = rng.choice([[], ["203.0.113.0/24"]])
        metadata = {"namespace": "churn", "name": f"s{number}"}
        return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status}

    def _slice(self, number: int) -> Object:
        rng = self._rng
        hosts = rng.sample(range(1, 9), rng.randint(0, 5))
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": "churn",
                "name": f"s{number}-x",
                "labels": {"kubernetes.io/service-name": f"s{number}"},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
            "endpoints": [
                {
                    "addresses": [f"10.190.{number}.{host}"],
                    "nodeName": rng.choice(["n1", "n2"]),
                    "conditions": rng.choice([{"ready": True}, {"ready": True}, {"ready": False}]),
                }
                for host in hosts
            ],
        }
