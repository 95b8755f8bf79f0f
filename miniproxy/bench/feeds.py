"""Where the agents get their objects, and where the benchmark changes them: a real API server, or a folder.

A change is made when the call returns; agents may have seen it before.
"""

from __future__ import annotations

import http.client
import json
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from .apiserver import TOKEN, ApiServer
from .objects import NAMESPACE, Json, Target, node

Progress = Callable[[int], None]  # so many more objects are in


class Feed(Protocol):
    name: str

    def load(self, targets: Iterable[Target], progress: Progress = lambda count: None) -> None:
        """Create many services and their endpoints, fast."""
        ...

    def create(self, target: Target) -> None:
        """A new service with its endpoints."""
        ...

    def update(self, target: Target) -> None:
        """The endpoints of a service that exists."""
        ...

    def delete(self, target: Target) -> None: ...


class Folder:
    """A folder of manifests, one file for each service."""

    name = "manifests"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._write("node", node())

    def load(self, targets: Iterable[Target], progress: Progress = lambda count: None) -> None:
        for target in targets:
            self.create(target)
            progress(2)

    def create(self, target: Target) -> None:
        self._write(target.service_name, target.service(), target.slice())

    def update(self, target: Target) -> None:
        self.create(target)

    def delete(self, target: Target) -> None:
        (self.folder / f"{target.service_name}.json").unlink()

    def _write(self, name: str, *objects: Json) -> None:
        draft = self.folder / f".{name}"
        draft.write_text("\n".join(map(json.dumps, objects)))
        draft.rename(self.folder / f"{name}.json")


class Api:
    """An API server; several threads may write at once."""

    name = "kube-apiserver"
    _THREADS = 8

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self._idle: deque[http.client.HTTPSConnection] = deque()
        self._send("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        found = node()
        created = self._send("POST", "/api/v1/nodes", found)
        # The status of a new object is not taken; it has a door of its own.
        path = f"/api/v1/nodes/{found['metadata']['name']}/status"
        self._send("PUT", path, {**created, "status": found["status"]})

    def load(self, targets: Iterable[Target], progress: Progress = lambda count: None) -> None:
        def one(target: Target) -> None:
            self.create(target)
            progress(2)

        with ThreadPoolExecutor(self._THREADS) as pool:
            list(pool.map(one, targets))

    def create(self, target: Target) -> None:
        self._send("POST", _SERVICES, target.service())
        self._send("POST", _SLICES, target.slice())

    def update(self, target: Target) -> None:
        self._send("PUT", f"{_SLICES}/{target.slice_name}", target.slice())

    def delete(self, target: Target) -> None:
        self._send("DELETE", f"{_SERVICES}/{target.service_name}")
        self._send("DELETE", f"{_SLICES}/{target.slice_name}")

    def _send(self, method: str, path: str, body: Json | None = None) -> Json:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        text = json.dumps(body) if body is not None else None
        idle: http.client.HTTPSConnection | None
        while True:
            try:
                idle = self._idle.pop()
            except IndexError:
                idle = None
            connection = idle or self._server.connect()
            try:
                connection.request(method, path, text, headers)
                response = connection.getresponse()
                break
            except (OSError, http.client.RemoteDisconnected):
                connection.close()
                if idle is None:
                    raise
                # The server ends connections that were idle for some minutes; it has not seen this request.
        answer = response.read()
        self._idle.append(connection)
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {answer.decode(errors='replace')[:300]}")
        found: Json = json.loads(answer)
        return found


_SERVICES = f"/api/v1/namespaces/{NAMESPACE}/services"
_SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
