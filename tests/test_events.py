"""Kubernetes Events: what is sent to a real HTTP server that answers like the API, and what is not."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from miniproxy.events import BURST, FOLD_SECONDS, PER_SECOND, Folder, Recorder
from miniproxy.model import Problem, Ref
from miniproxy.problems import News
from miniproxy.sources.apiserver import ApiServer
from tests.clock import Clock

WEB = Ref("Service", "ns", "web")
EVENTS = "/apis/events.k8s.io/v1/namespaces/ns/events"


def problem(ref: Ref = WEB, reason: str = "too bad", **fields: Any) -> Problem:
    return Problem(ref, "spec.x", reason, **fields)


class Request(NamedTuple):
    method: str
    path: str
    content_type: str
    body: Any


class Api:
    """An API server as far as Events go: it keeps them by name, knows objects, and can be made to refuse."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.events: dict[str, dict[str, Any]] = {}
        self.uids = {"web": "uid-1"}
        self.status = 0  # of every answer to a write; 0: what is right
        self._new = threading.Condition()
        handler = type("Handler", (_Handler,), {"api": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: Request) -> tuple[int, Any]:
        with self._new:
            self.requests.append(request)
            self._new.notify_all()
        if request.method == "GET":
            name = re.search(r"metadata.name%3D([\w-]+)", request.path)
            uid = self.uids.get(name.group(1) if name else "")
            return 200, {"items": [{"metadata": {"uid": uid}}] if uid else []}
        if self.status:
            return self.status, {"message": "not today"}
        if request.method == "POST":
            name_ = request.body["metadata"]["name"]
            if name_ in self.events:
                return 409, {"message": "already there"}
            self.events[name_] = request.body
            return 201, request.body
        event = self.events.get(request.path.rpartition("/")[2])
        if event is None:
            return 404, {"message": "not found"}
        event.update(request.body)
        return 200, event

    def writes(self, count: int) -> list[Request]:
        """The requests but for reads, once there are `count`."""

        def found() -> list[Request]:
            return [r for r in self.requests if r.method != "GET"]

        with self._new:
            assert self._new.wait_for(lambda: len(found()) >= count, 30), self.requests
        return found()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: Api

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        request = Request(self.command, self.path, self.headers.get("Content-Type", ""), body)
        status, answer = self.api.answer(request)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = handle_one

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    thread = threading.Thread(target=api.server.serve_forever, args=(0.01,))
    thread.start()
    yield api
    api.server.shutdown()
    api.server.server_close()
    thread.join()


class Bench:
    """A recorder that sends to an Api, and what it counted."""

    def __init__(self, api: Api | None, url: str = "") -> None:
        self.counted: list[str] = []
        self.clock = Clock()
        self._new = threading.Condition()
        server = ApiServer(master=url or (api.url if api else ""))
        self.recorder = Recorder("n1", server, counted=self.count, clock=self.clock, wall=lambda: 1_700_000_000.5)
        self.recorder.start()

    def count(self, outcome: str) -> None:
        with self._new:
            self.counted.append(outcome)
            self._new.notify_all()

    def notice(self, *problems: Problem) -> None:
        """Have them looked at, one way or another."""
        want = len(self.counted) + sum(p.ref.kind != "File" for p in problems)
        self.recorder.noticed(News(problems))
        with self._new:
            assert self._new.wait_for(lambda: len(self.counted) >= want, 30)


@pytest.fixture
def bench(api: Api) -> Iterator[Bench]:
    bench = Bench(api)
    yield bench
    bench.recorder.stop()


def test_the_whole_event(api: Api, bench: Bench) -> None:
    bench.notice(problem(what="SetAside"))
    (post,) = api.writes(1)
    assert (post.method, post.path, post.content_type) == ("POST", EVENTS, "application/json")
    name = post.body["metadata"].pop("name")
    assert re.fullmatch(r"web\.[0-9a-f]+", name)
    assert post.body == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": "ns"},
        "eventTime": "2023-11-14T22:13:20.500000Z",
        "type": "Warning",
        "reason": "SetAside",
        "action": "Program",
        "note": "node n1: spec.x: too bad",
        "reportingController": "miniproxy.io/miniproxy",
        "reportingInstance": "miniproxy-n1",
        "regarding": {"apiVersion": "v1", "kind": "Service", "namespace": "ns", "name": "web", "uid": "uid-1"},
    }
    assert bench.counted == ["sent"]


@pytest.mark.parametrize(
    ("found", "reason", "action", "path"),
    [
        (problem(), "FieldRefused", "Program", EVENTS),
        (problem(what="Conflict"), "TrafficConflict", "Program", EVENTS),
        (problem(what="FailedToStartServiceHealthcheck"), "FailedToStartServiceHealthcheck", "Listen", EVENTS),
        (problem(Ref("EndpointSlice", "ns", "web-x")), "FieldRefused", "Program", EVENTS),
        (problem(Ref("Node", "", "n1")), "FieldRefused", "Program", EVENTS.replace("ns/", "default/")),
    ],
)
def test_reasons_and_places(api: Api, bench: Bench, found: Problem, reason: str, action: str, path: str) -> None:
    bench.notice(found)
    (post,) = api.writes(1)
    assert (post.body["reason"], post.body["action"], post.path) == (reason, action, path)
    kind, namespace, name = found.ref
    assert (post.body["regarding"]["kind"], post.body["regarding"]["namespace"]) == (kind, namespace)
    assert post.body["regarding"]["name"] == name


def test_a_file_is_no_object_of_the_api(api: Api, bench: Bench) -> None:
    bench.notice(problem(Ref("File", "", "a.yaml")), problem())
    assert [r.body["regarding"]["name"] for r in api.writes(1)] == ["web"]


def test_what_a_user_wrote_stays_inside_its_field(api: Api, bench: Bench) -> None:
    nasty = 'x" \u2028\n{"}' + "y" * 5000
    bench.notice(problem(reason=nasty))
    note = api.writes(1)[0].body["note"]
    assert len(note) == 1024
    assert note.startswith('node n1: spec.x: x" \u2028\n{"}yyy')


def test_a_repetition_is_a_count_on_the_first(api: Api, bench: Bench) -> None:
    for _ in range(10):
        bench.notice(problem())
    assert bench.counted == ["sent"] + ["left out"] * 9
    bench.clock.now += FOLD_SECONDS
    bench.notice(problem())
    post, patch = api.writes(2)
    assert patch == Request(
        "PATCH",
        f"{EVENTS}/{post.body['metadata']['name']}",
        "application/merge-patch+json",
        {"series": {"count": 11, "lastObservedTime": "2023-11-14T22:13:20.500000Z"}},
    )


def test_a_repetition_after_the_event_was_forgotten_is_a_new_one(api: Api, bench: Bench) -> None:
    bench.notice(problem())
    api.events.clear()
    bench.clock.now += 2 * FOLD_SECONDS
    bench.notice(problem())
    assert [r.method for r in api.writes(3)] == ["POST", "PATCH", "POST"]
    assert len(api.events) == 1


def test_another_problem_of_the_same_object_is_another_event(api: Api, bench: Bench) -> None:
    bench.notice(problem(reason="one"), problem(reason="two"))
    assert [r.body["note"] for r in api.writes(2)] == ["node n1: spec.x: one", "node n1: spec.x: two"]


def test_an_object_that_is_gone_gets_its_event_without_uid(api: Api, bench: Bench) -> None:
    api.uids.clear()
    bench.notice(problem())
    assert api.writes(1)[0].body["regarding"]["uid"] == ""


def test_too_many_are_left_out(api: Api, bench: Bench) -> None:
    bench.notice(*(problem(reason=str(i)) for i in range(BURST + 20)))
    assert bench.counted == ["sent"] * BURST + ["left out"] * 20
    bench.clock.now += 2 / PER_SECOND
    bench.notice(*(problem(reason=f"later {i}") for i in range(5)))
    assert bench.counted[-5:] == ["sent"] * 2 + ["left out"] * 3


@pytest.mark.parametrize("status", [401, 403, 422, 500])
def test_a_refusal_is_logged_once_and_again_after_it_worked(
    api: Api, bench: Bench, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def warned() -> int:
        return caplog.text.count(f"the API server answers {status}: not today")

    api.status = status
    for i in range(3):
        bench.notice(problem(reason=str(i)))
    assert (bench.counted, warned()) == (["failed"] * 3, 1)
    api.status = 0
    bench.notice(problem(reason="good"))
    api.status = status
    bench.notice(problem(reason="bad again"))
    assert (bench.counted[3:], warned()) == (["sent", "failed"], 2)


def test_no_api_server_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(None, "http://127.0.0.1:1")
    for i in range(3):
        bench.notice(problem(reason=str(i)))
    bench.recorder.stop()
    assert bench.counted == ["failed"] * 3
    assert caplog.text.count(": Connection refused; not said again") == 1


class _Silent:
    """An API server that does not answer until it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def request(self, method: str, path: str, body: object = None, content_type: str = "") -> tuple[int, bytes]:
        self.asked.set()
        assert self.go_on.wait(30)
        return 200, b"{}"


def test_a_silent_api_server_blocks_nobody_and_costs_no_memory() -> None:
    api = _Silent()
    counted: list[str] = []
    recorder = Recorder("n1", api, counted=counted.append)
    recorder.start()
    recorder.noticed(News((problem(),)))
    assert api.asked.wait(30)
    recorder.noticed(News(tuple(problem(reason=str(i)) for i in range(5000))))
    assert counted == ["left out"] * 4000
    api.go_on.set()
    recorder.stop()


def test_the_folder_forgets_in_the_end() -> None:
    clock = Clock()
    folder = Folder(clock)
    for i in range(5000):
        folder.due(problem(reason=str(i)))
    assert len(folder._seen) <= 1000


def test_folding_by_time() -> None:
    clock = Clock()
    folder = Folder(clock)
    steps: list[tuple[float, int]] = [(0, 1), (1, 0), (FOLD_SECONDS - 2, 0), (1, 4), (10, 0), (FOLD_SECONDS, 6)]
    for seconds, expected in steps:
        clock.now += seconds
        assert folder.due(problem()) == expected


def test_problems_of_a_change_go_all_the_way(api: Api, bench: Bench) -> None:
    """From an object that is refused at the door to the Event on it."""
    from miniproxy.agent import Agent
    from miniproxy.config import Settings
    from miniproxy.model import Batch, Family
    from miniproxy.planner import iptables
    from tests import cluster
    from tests.fake_iptables import FakeIptables

    agent = Agent(Settings(node_name="n1"), iptables, {Family.V4: FakeIptables()}, observer=bench.recorder)
    agent.handle(Batch((cluster.service(1),), problems=(problem(Ref("Service", "scale", "svc-1")),), synced=True))
    agent.sync()
    assert api.writes(1)[0].body["regarding"]["name"] == "svc-1"
