"""Kubernetes Events on the objects that something is wrong with, for those who look there and not in a node's log.

It answers for never being a burden: Events go out in a thread of their own, at a limited rate, a repeated one as
a count on the first; what is too much is left out, and a failure to send is logged once. The problems themselves
stand in the log and in the metrics anyway.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlencode

from .health import timestamp
from .model import Problem, Ref
from .observer import Observer
from .problems import News

log = logging.getLogger(__name__)

BURST = 25  # as many at once, as client-go allows each source of Events
PER_SECOND = 0.2  # and these in the long run, from one node of maybe thousands
FOLD_SECONDS = 300.0  # the same again within this time is only counted
_REMEMBERED = 1000  # Events that a repetition can still be added to
_WAITING = 1000  # problems not looked at yet
_NOTE = 1024  # what the API accepts

_REASON = {"Refused": "FieldRefused", "Conflict": "TrafficConflict", "SetAside": "SetAside"}
_ACTION = {"FailedToStartServiceHealthcheck": "Listen"}
_PATHS = {  # by kind: group and version, list of all in the namespace
    "Service": ("v1", "/api/v1/namespaces/{}/services"),
    "EndpointSlice": ("discovery.k8s.io/v1", "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"),
    "Node": ("v1", "/api/v1/nodes"),
}

Outcome = Literal["sent", "left out", "failed"]


class Api(Protocol):
    """A way to the API server."""

    def request(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        """Send a JSON value; status and body of the response. Raises an Exception when there is none."""
        ...


class Recorder(Observer):
    """Sends an Event for every problem that appears, from a thread of its own."""

    def __init__(
        self,
        node_name: str,
        api: Api,
        *,
        counted: Callable[[Outcome], None] = lambda outcome: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._node_name = node_name
        self._api = api
        self._counted = counted
        self._wall = wall
        self._inbox: queue.SimpleQueue[Problem | None] = queue.SimpleQueue()
        self._folder = Folder(clock)
        self._thread = threading.Thread(target=self.run, name="events", daemon=True)
        self._names: dict[Problem, str] = {}  # of the Events sent, the latest last
        self._number = 0
        self._failing = False

    def noticed(self, news: News) -> None:
        for problem in news.appeared:
            if problem.ref.kind not in _PATHS:
                continue  # a file is no object of the API
            if self._inbox.qsize() < _WAITING:
                self._inbox.put(problem)
            else:
                self._counted("left out")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leave it to what can be sent at once."""
        self._inbox.put(None)
        self._thread.join(timeout=2)

    def run(self) -> None:
        """The thread: send until told to stop."""
        while (problem := self._inbox.get()) is not None:
            count = self._folder.due(problem)
            if count:
                self._try(problem, count)
            else:
                self._counted("left out")

    def _try(self, problem: Problem, count: int) -> None:
        try:
            self._send(problem, count)
        except Exception as error:  # whatever it is, Events are not worth an agent
            if not self._failing:
                log.warning("cannot send Kubernetes Events: %s; not said again until it works", error)
            self._failing = True
            self._counted("failed")
        else:
            self._failing = False
            self._counted("sent")

    def _send(self, problem: Problem, count: int) -> None:
        namespace = problem.ref.namespace or "default"  # where Events on Nodes are
        events = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        name = self._names.pop(problem, "")
        if name and count > 1:
            series = {"series": {"count": count, "lastObservedTime": timestamp(self._wall())}}
            status, body = self._api.request("PATCH", f"{events}/{name}", series, "application/merge-patch+json")
            if status != 404:  # Events are forgotten after an hour
                _check(status, body)
                self._names[problem] = name
                return
        event = self._event(problem, namespace)
        _check(*self._api.request("POST", events, event))
        self._names[problem] = event["metadata"]["name"]
        if len(self._names) > _REMEMBERED:
            del self._names[next(iter(self._names))]

    def _event(self, problem: Problem, namespace: str) -> dict[str, Any]:
        version, _ = _PATHS[problem.ref.kind]
        now = self._wall()
        self._number += 1
        note = f"{problem.field}: {problem.reason}" if problem.field else problem.reason
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            # Unlike any other of this node, also of an agent before this one.
            "metadata": {
                "namespace": namespace,
                "name": f"{problem.ref.name[:200]}.{time.time_ns():x}{self._number:x}",
            },
            "eventTime": timestamp(now),
            "type": "Warning",
            "reason": _REASON.get(problem.what, problem.what),
            "action": _ACTION.get(problem.what, "Program"),
            "note": f"node {self._node_name}: {note}"[:_NOTE],
            "reportingController": "miniproxy.io/miniproxy",
            "reportingInstance": f"miniproxy-{self._node_name}"[:128],
            "regarding": {
                "apiVersion": version,
                "kind": problem.ref.kind,
                "namespace": problem.ref.namespace,
                "name": problem.ref.name,
                "uid": self._uid(problem.ref),
            },
        }

    def _uid(self, ref: Ref) -> str:
        """What `kubectl describe` finds an object's Events by; "" if it cannot be had.

        By a list of one: a proxy may list Services, but not get one.
        """
        query = urlencode({"fieldSelector": f"metadata.name={ref.name}", "limit": "1"})
        status, body = self._api.request("GET", f"{_PATHS[ref.kind][1].format(ref.namespace)}?{query}")
        items = json.loads(body).get("items") if status == 200 else None
        return str(items[0]["metadata"]["uid"]) if items else ""


class Folder:
    """Says which Events are worth sending: not the same over and over, and not too many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[Problem, _Seen] = {}
        self._tokens = float(BURST)
        self._at = clock()

    def due(self, problem: Problem) -> int:
        """How often this problem has appeared until now, 0 when it is not to be sent."""
        now = self._clock()
        seen = self._seen.pop(problem, None)
        count = seen.times + 1 if seen else 1
        sent = seen.sent if seen else None
        due = (sent is None or now - sent >= FOLD_SECONDS) and self._take_token(now)
        self._seen[problem] = _Seen(count, now if due else sent)
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return count if due else 0

    def _take_token(self, now: float) -> bool:
        self._tokens = min(BURST, self._tokens + (now - self._at) * PER_SECOND)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class _Seen(NamedTuple):
    times: int
    sent: float | None  # when last; None: never


def _check(status: int, body: bytes) -> None:
    """Raises OSError for an answer that is a refusal."""
    if status >= 300:
        try:
            reason = json.loads(body)["message"]
        except (ValueError, KeyError, TypeError):
            reason = body[:200].decode(errors="replace")
        raise OSError(f"the API server answers {status}: {reason}")
