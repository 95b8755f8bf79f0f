"""An API server of a few objects that can be made to misbehave: the store, and the store behind real HTTP.

`Store` answers as the API server does (lists, pages, streaming lists, watches, expired versions) and knows nothing of
HTTP. `FakeApi` serves it on the loopback interface; each request first asks `trouble` what shall go wrong with it.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, urlsplit

Json = Any
Key = tuple[str, str]

PATHS = {
    "Service": "/api/v1/services",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices",
    "Node": "/api/v1/nodes",
    "ServiceCIDR": "/apis/networking.k8s.io/v1/servicecidrs",
}
KINDS = {path: kind for kind, path in PATHS.items()}


class Happened(NamedTuple):
    version: int
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Json

    def line(self) -> bytes:
        return line(self.type, self.object)


class Answer(NamedTuple):
    """Status and body; for a watch, `follow` is the version from which on events come after it."""

    status: int
    body: bytes
    follow: int | None = None


def line(type: str, thing: Json) -> bytes:
    return json.dumps({"type": type, "object": thing}).encode() + b"\n"


def status(code: int, message: str) -> Json:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}


def failure(code: int, message: str) -> Answer:
    return Answer(code, json.dumps(status(code, message)).encode())


class Store:
    """Objects by kind, and all that happened to them since `oldest`."""

    def __init__(self) -> None:
        self.version = 100
        self.oldest = 0
        self.streaming = True  # whether it knows streaming lists
        self.page_limit = 0  # of a list that does not ask for pages; 0: none
        self.objects: dict[str, dict[Key, Json]] = {kind: {} for kind in PATHS}
        self.history: dict[str, list[Happened]] = {kind: [] for kind in PATHS}
        self.changed = threading.Condition()
        self._snapshots: dict[tuple[str, str], list[Json]] = {}

    def put(self, thing: Json) -> None:
        with self.changed:
            objects = self.objects[thing["kind"]]
            key = _key(thing)
            self._happened("MODIFIED" if key in objects else "ADDED", thing, lambda new: objects.update({key: new}))

    def delete(self, kind: str, namespace: str, name: str) -> None:
        with self.changed:
            thing = self.objects[kind].get((namespace, name))
            if thing is not None:
                self._happened("DELETED", thing, lambda _: self.objects[kind].pop((namespace, name)))

    def forget(self) -> None:
        """Compact: nobody can go on from an older version than the present one."""
        with self.changed:
            self.oldest = self.version
            for history in self.history.values():
                history.clear()

    def answer(self, path: str, query: dict[str, str]) -> Answer:
        """What the API server says to a GET."""
        kind = KINDS.get(path)
        if kind is None:
            return failure(404, "the server could not find the requested resource")
        with self.changed:
            if "watch" not in query:
                return self._list(kind, query)
            if "sendInitialEvents" in query:
                return self._streaming_list(kind, query)
            since = int(query["resourceVersion"])
            if since < self.oldest:
                return Answer(200, line("ERROR", status(410, "too old resource version")), self.version)
            return Answer(200, b"".join(happened.line() for happened in self.since(kind, since)), self.version)

    def since(self, kind: str, version: int) -> list[Happened]:
        return [happened for happened in self.history[kind] if happened.version > version]

    def bookmark(self, kind: str, version: int, end_of_list: bool = False) -> bytes:
        metadata: Json = {"resourceVersion": str(version), "creationTimestamp": None}
        if end_of_list:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        return line("BOOKMARK", {"kind": kind, "apiVersion": "v1", "metadata": metadata})

    def _happened(self, type: Any, thing: Json, then: Callable[[Json], object]) -> None:
        self.version += 1
        thing = {**thing, "metadata": {**thing["metadata"], "resourceVersion": str(self.version)}}
        then(thing)
        self.history[thing["kind"]].append(Happened(self.version, type, thing))
        self.changed.notify_all()

    def _list(self, kind: str, query: dict[str, str]) -> Answer:
        token = query.get("continue", "")
        if token:
            assert "resourceVersion" not in query, "the API server refuses this"
            version, _, start = token.partition("/")
            if int(version) < self.oldest:
                return failure(410, "The provided continue parameter is too old")
            items = self._snapshots[kind, version]
        else:
            version, start = str(self.version), "0"
            items = self._snapshots[kind, version] = [*self.objects[kind].values()]
        limit = self.page_limit if "limit" in query and self.page_limit else len(items) + 1
        page = items[int(start) :][:limit]
        rest = int(start) + limit < len(items)
        metadata = {"resourceVersion": version, "continue": f"{version}/{int(start) + limit}" if rest else ""}
        bare = [{k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in page]
        return Answer(200, json.dumps({"kind": f"{kind}List", "metadata": metadata, "items": bare}).encode())

    def _streaming_list(self, kind: str, query: dict[str, str]) -> Answer:
        if not self.streaming:
            return failure(422, "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")
        assert query["resourceVersionMatch"] == "NotOlderThan", "the API server refuses anything else"
        added = b"".join(line("ADDED", thing) for thing in self.objects[kind].values())
        return Answer(200, added + self.bookmark(kind, self.version, end_of_list=True), self.version)


def _key(thing: Json) -> Key:
    return thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


# --- over HTTP --------------------------------------------------------------------------------------------

TROUBLES = (
    "429",
    "500",
    "503",
    "410",
    "401",
    "silence",
    "disconnect",
    "half a line",
    "half a body",
    "drip",
    "garbage",
    "error event",
    "expired event",
    "odd bookmarks",
    "at once over",
)
Trouble = Callable[[str], str]  # path → one of TROUBLES, or ""


class FakeApi:
    """A server on a free port of 127.0.0.1; `stop` cuts all connections, `start` listens on the same port again."""

    def __init__(self, store: Store, trouble: Trouble = lambda path: "") -> None:
        self.store = store
        self.trouble = trouble
        self.token = ""  # "": everybody is let in
        self.requests: list[str] = []  # paths with queries
        self.hold_seconds = 0.02  # between two looks for what a watch should send
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        api = self

        class Handler(_Handler):
            fake = api

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            stopping = threading.Event()

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients hang up, as they may

        Server.stopping = threading.Event()
        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stopping.set()  # type: ignore[attr-defined]
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> FakeApi:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeApi

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.fake.requests.append(self.path)
        self.close_connection = True
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        trouble = self.fake.trouble(parts.path)
        if self.fake.token and self.headers.get("authorization") != f"Bearer {self.fake.token}":
            trouble = "401"
        if trouble.isdigit():
            self._whole(failure(int(trouble), f"trouble {trouble}"))
        elif trouble == "silence":
            self._until_stopped()
        else:
            self._answer(self.fake.store.answer(parts.path, query), KINDS.get(parts.path, ""), trouble)

    def _answer(self, answer: Answer, kind: str, trouble: str) -> None:
        if answer.follow is None:
            if trouble == "half a body":
                self._head(answer.status, length=len(answer.body))
                self.wfile.write(answer.body[: len(answer.body) // 2])
            elif trouble == "garbage":
                self._whole(answer._replace(body=answer.body[::-1]))
            elif trouble != "disconnect":
                self._whole(answer)
            return
        self._head(answer.status)
        if trouble == "at once over":
            self._chunk(b"")
        elif trouble in ("half a line", "half a body", "disconnect"):
            whole = answer.body or self.fake.store.bookmark(kind, answer.follow)
            self._chunk(whole[: random.randrange(1, len(whole))])
        elif trouble == "garbage":
            self._chunk(answer.body + b'{"type": "ADDED", "object": [}\n')
        elif trouble == "error event":
            self._chunk(answer.body + line("ERROR", status(500, "etcdserver: leader changed")))
            self._chunk(b"")
        elif trouble == "expired event":
            self._chunk(answer.body + line("ERROR", status(410, "too old resource version")))
            self._chunk(b"")
        else:
            self._drip(answer.body) if trouble == "drip" else self._chunk(answer.body or b"\n")
            self._follow(kind, answer.follow, trouble)

    def _follow(self, kind: str, version: int, trouble: str) -> None:
        """A watch: what happens from now on, and a bookmark now and then."""
        store = self.fake.store
        stopping = self.server.stopping  # type: ignore[attr-defined]
        while not stopping.is_set():
            with store.changed:
                store.changed.wait(self.fake.hold_seconds)
                if version < store.oldest:  # what came between is no longer known
                    self._chunk(line("ERROR", status(410, "too old resource version")))
                    self._chunk(b"")
                    return
                new, older, version = store.since(kind, version), version, store.version
            bookmarks = store.bookmark(kind, version)
            if trouble == "odd bookmarks":  # twice, and then one that should have come long ago
                bookmarks += store.bookmark(kind, version) + store.bookmark(kind, older - 1)
            body = b"".join(happened.line() for happened in new) + bookmarks
            self._drip(body) if trouble == "drip" else self._chunk(body)

    def _head(self, code: int, length: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if code in (429, 503):
            self.send_header("Retry-After", "0")
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _whole(self, answer: Answer) -> None:
        self._head(answer.status, len(answer.body))
        self.wfile.write(answer.body)

    def _chunk(self, data: bytes) -> None:
        """One chunk of the body; b"" ends it."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _drip(self, data: bytes) -> None:
        for start in range(0, len(data), 7):
            self._chunk(data[start : start + 7])
            time.sleep(0.0002)

    def _until_stopped(self) -> None:
        self.server.stopping.wait(5)  # type: ignore[attr-defined]


def troubled(chance: random.Random, share: float) -> Trouble:
    """A share of all requests goes wrong, each in one of the ways there are."""
    return lambda path: chance.choice(TROUBLES) if chance.random() < share else ""


def pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """The same bytes, as a network may bring them."""
    while data:
        size = chance.choice((1, 2, 10, 100, 1000, 100_000))
        yield data[:size]
        data = data[size:]
