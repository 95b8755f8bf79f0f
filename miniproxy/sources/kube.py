"""The API server as a source: Services, EndpointSlices and the own Node, each followed by a thread of its own.

It answers for the threads and for handing over: nothing counts as complete before all resources have been listed,
and a burst of events goes in handfuls. What to ask for and what answers mean is reflector.py's, the way to the
server apiserver.py's.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterable
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING

from ..model import Batch, Object, Problem, Ref
from . import Deliver
from .apiserver import ApiError, ApiServer, read
from .reflector import SILENCE_SECONDS, Change, Reflector, Resource, Wait

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

log = logging.getLogger(__name__)

STOP_SECONDS = 0.25  # how long `stop` may go unnoticed
HANDFUL_SECONDS = 0.02  # what comes in so soon after a batch waits for the next one


def resources(node_name: str, service_cidrs: bool) -> tuple[Resource, ...]:
    """What kube-proxy reads, selected as it does: not what another proxy serves, nothing headless."""
    cidrs = Resource("ServiceCIDR", "/apis/networking.k8s.io/v1/servicecidrs", optional=True)  # since Kubernetes 1.33
    return (
        Resource(
            "Service",
            "/api/v1/services",
            label_selector="!service.kubernetes.io/service-proxy-name",
            field_selector="spec.clusterIP!=None",
        ),
        Resource(
            "EndpointSlice",
            "/apis/discovery.k8s.io/v1/endpointslices",
            label_selector="!service.kubernetes.io/headless",
        ),
        Resource("Node", "/api/v1/nodes", field_selector=f"metadata.name={node_name}"),
        *([cidrs] if service_cidrs else []),
    )


class KubeSource:
    """Source of what an API server holds, for the agent of node `node_name`; ServiceCIDRs where they are needed."""

    def __init__(self, api: ApiServer, node_name: str, service_cidrs: bool = False) -> None:
        self.reflectors = [Reflector(resource) for resource in resources(node_name, service_cidrs)]
        self.api = api

    def __str__(self) -> str:
        return str(self.api)

    @property
    def relists(self) -> dict[str, int]:
        """How often each resource had to be listed again, because the server no longer knew what came between."""
        return {reflector.resource.name: reflector.relists for reflector in self.reflectors}

    def run(self, deliver: Deliver, stop: Event) -> None:
        """Block until `stop` is set."""
        inbox: queue.SimpleQueue[list[Change]] = queue.SimpleQueue()
        followers = [_Follower(reflector, self.api, inbox, stop) for reflector in self.reflectors]
        for follower in followers:
            follower.start()
        synced = False
        try:
            while not stop.is_set():
                complete = all(follower.listed for follower in followers)
                batch = join(_take(inbox), synced=complete and not synced)
                synced = synced or complete
                if batch != Batch():
                    deliver(batch)
                    stop.wait(HANDFUL_SECONDS)
        finally:
            stop.set()
            for follower in followers:
                follower.interrupt()
            for follower in followers:
                follower.join(timeout=1)


class _Follower(Thread):
    """Does what a reflector says."""

    def __init__(
        self, reflector: Reflector, api: ApiServer, inbox: queue.SimpleQueue[list[Change]], stop: Event
    ) -> None:
        super().__init__(name=f"watch {reflector.resource.name}", daemon=True)
        self.listed = False  # all of the first list is in the inbox
        self._reflector = reflector
        self._api = api
        self._inbox = inbox
        self._stop_asked = stop
        self._response: BaseHTTPResponse | None = None

    def run(self) -> None:
        while not self._stop_asked.is_set():
            step = self._reflector.next()
            if isinstance(step, Wait):
                self._stop_asked.wait(step.seconds)
                continue
            error = ""
            try:
                self._follow(step.path, step.query)
            except ApiError as reason:
                error = str(reason)
            except Exception as reason:
                log.exception("following the API server failed")
                error = f"{type(reason).__name__}: {reason}"
            if not self._stop_asked.is_set():
                self._hand_over(self._reflector.end(error))

    def _follow(self, path: str, query: dict[str, str]) -> None:
        """One request, to the end of its response."""
        log.debug("asking", extra={"path": path, **query})
        with self._api.get(path, query, SILENCE_SECONDS) as response:
            self._response = response
            self._hand_over(self._reflector.answered(response.status, response.headers.get("Retry-After", "")))
            while not (self._reflector.hang_up or self._stop_asked.is_set()) and (chunk := read(response)):
                self._hand_over(self._reflector.receive(chunk))

    def _hand_over(self, changes: list[Change]) -> None:
        news = self._reflector.listed and not self.listed
        if changes or news:
            self._inbox.put(changes)
        if news:
            self.listed = True
            self._inbox.put([])  # wakes up whoever waits for this

    def interrupt(self) -> None:
        """From another thread: let a read that may last a minute end now."""
        if self._response is not None:
            with suppress(OSError, ValueError, RuntimeError):  # it has just ended by itself
                self._response.shutdown()


def _take(inbox: queue.SimpleQueue[list[Change]]) -> list[Change]:
    """All that is there, having waited a little for the first."""
    changes: list[Change] = []
    try:
        changes += inbox.get(timeout=STOP_SECONDS)
        while True:
            changes += inbox.get_nowait()
    except queue.Empty:
        return changes


def join(changes: Iterable[Change], synced: bool = False) -> Batch:
    """Many changes as one batch: of each object the last version that can be used, and what is wrong now."""
    last: dict[Ref, Change] = {}
    for change in changes:
        before = last.pop(change.ref, None)
        if before is not None and change.object is None and not change.gone:
            change = change._replace(object=before.object, gone=before.gone)  # refused: what was before counts
        last[change.ref] = change
    upserts: list[Object] = [change.object for change in last.values() if change.object is not None]
    deletes = [change.ref for change in last.values() if change.gone]
    problems: list[Problem] = [problem for change in last.values() for problem in change.problems]
    return Batch(tuple(upserts), tuple(deletes), tuple(problems), synced)
