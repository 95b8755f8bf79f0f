"""One resource of the API server, listed and watched: what to ask next, and what the answers change. No I/O.

It answers for following the server whatever that does (expired versions, refusals, half lines, silence), and for
handing on only what a proxy would see as a change. The caller does what `next()` says, reports what happens
(`answered`, `receive`, `end`) and takes the `Change`s away. Time and chance are parameters.

The life of a resource: a *streaming* list (a watch that begins with all that exists and says when that is over), or
a *plain* list, in pages, where the server has no streaming ones; then watches, each from where the last one ended.
An expired version begins anew with a list, which is compared with what is known. Of that no second copy is kept,
just a hash for each object.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import msgspec
from msgspec import Raw, Struct, field

from ..model import Kind, Object, Problem, Ref
from .checks import quote, shown
from .wire import ListMetadata, ObjectList, convert, head, identify

SILENCE_SECONDS = 70.0  # a watch brings a bookmark about once a minute; without a byte for longer it is dead
LIST_SECONDS = 120.0  # for a whole list, or a page of it
WATCH_SECONDS = (300, 600)  # when the server should end a watch: not all of a cluster's at the same time
GRACE_SECONDS = 30.0  # a watch that the server does not end is ended here
HEALTHY_SECONDS = 10.0  # a connection that was good for so long says that trouble is over
BACKOFF_FIRST, BACKOFF_MOST = 0.5, 30.0
RETRY_AFTER_MOST = 120.0
UNSERVED_SECONDS = 600.0  # until an optional resource is looked for again
PAGE = 500
LINE_LIMIT = 32 << 20  # the API server takes no object above 3 MiB
BODY_LIMIT = 1 << 16  # of an error


class Resource(NamedTuple):
    """What to follow: the items of a collection that the selectors name."""

    kind: Kind
    path: str  # "/api/v1/services"
    label_selector: str = ""
    field_selector: str = ""
    optional: bool = False  # a server that does not have it is no trouble

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class Change(NamedTuple):
    """News of one object: what it is now, or that it is gone, or why its new version cannot be used."""

    ref: Ref
    object: Object | None = None
    problems: tuple[Problem, ...] = ()
    gone: bool = False


class Request(NamedTuple):
    """Do a GET; give the connection up when not a byte comes for SILENCE_SECONDS."""

    path: str
    query: dict[str, str]


class Wait(NamedTuple):
    """Do nothing for so long."""

    seconds: float


Stage = Literal["stream", "list", "watch"]


# --- what the wire looks like, apart from the objects -----------------------------------------------------


class _Event(Struct):
    type: str
    object: Raw


class _Status(Struct):
    """The API server's way of saying no."""

    code: int = 0
    message: str = ""


class _BookmarkAnnotations(Struct):
    end_of_list: str = field(default="", name="k8s.io/initial-events-end")


class _BookmarkMetadata(Struct, rename="camel"):
    resource_version: str
    annotations: _BookmarkAnnotations | None = None


class _Bookmark(Struct):
    metadata: _BookmarkMetadata


_EVENT = msgspec.json.Decoder(_Event)
_BOOKMARK = msgspec.json.Decoder(_Bookmark)
_LIST = msgspec.json.Decoder(ObjectList)
_STATUS = msgspec.json.Decoder(_Status)


class _Failure(Exception):
    """What was received is not what was asked for."""

    def __init__(self, reason: str, relist: bool = False) -> None:
        super().__init__(reason)
        self.relist = relist  # a watch would only bring the same again, a list says what is true


class _Expired(Exception):
    """The server no longer knows what came after our version."""


# --- the state machine ------------------------------------------------------------------------------------


class Reflector:
    """Follows one resource. `next` says what to do; `answered`, `receive` and `end` are told how it went."""

    def __init__(
        self,
        resource: Resource,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.resource = resource
        self.listed = False  # all that existed at some time has been handed over
        self.relists = 0
        self._clock = clock
        self._chance = chance
        self._known: dict[Ref, int] = {}  # hash of what was handed over
        self._fresh: set[Ref] = set()  # what the list under way has shown so far
        self._stage: Stage = "stream"
        self._can_stream = True
        self._version = "0"  # "0": whichever the server has at hand; "": the newest, read through from etcd
        self._continue = ""  # where the next page begins
        self._whole = False  # ask for the list in one page
        self._status = 0  # of the response; 0: there is none
        self._retry_after = 0.0
        self._buffer = bytearray()
        self._broken: _Failure | _Expired | None = None
        self._accepted_at = self._deadline = 0.0
        self._failures = 0  # since a connection was healthy
        self._delay = 0.0
        self._trouble: Problem | None = None
        self._fails_later = False  # the trouble came after a good status

    def next(self) -> Request | Wait:
        """What to do now. After a Wait, ask again."""
        if self._delay > 0:
            delay, self._delay = self._delay, 0.0
            return Wait(delay)
        self._status, self._retry_after, self._broken = 0, 0.0, None
        self._buffer = bytearray()
        if not self._continue:
            self._fresh = set()
        return Request(self.resource.path, self._query())

    def answered(self, status: int, retry_after: str = "") -> list[Change]:
        """The response's status and its header Retry-After."""
        self._status = status
        if retry_after.isdigit():
            self._retry_after = min(float(retry_after), RETRY_AFTER_MOST)
        self._accepted_at = self._clock()
        allowed = WATCH_SECONDS[1] + GRACE_SECONDS if self._stage == "watch" else LIST_SECONDS
        self._deadline = self._accepted_at + allowed
        # A server that is back may have no news for a minute; one that says yes and then fails is not well by that.
        return self._well() if status == 200 and self._stage == "watch" and not self._fails_later else []

    def receive(self, chunk: bytes) -> list[Change]:
        """A part of the body, of any length."""
        changes: list[Change] = []
        try:
            self._check_bounds(chunk)
            if self._status != 200 or self._stage == "list":
                self._buffer += chunk
            else:
                for line in self._lines(chunk):
                    changes += self._event(line)
        except (_Failure, _Expired) as error:
            self._broken = error
        return changes

    @property
    def hang_up(self) -> bool:
        """Whether the connection is of no more use: close it and call `end`."""
        return self._broken is not None

    def end(self, error: str = "") -> list[Change]:
        """The connection is over, or never came about. `error`: why, if it is not the regular end of the body."""
        try:
            if self._broken:
                raise self._broken
            if self._status == 200 and self._stage == "watch":
                return self._watch_ended(error)
            if self._status not in (0, 200):
                return self._refused()
            if error:
                raise _Failure(error)
            return self._page()
        except _Expired:
            return self._begin_anew()
        except _Failure as failure:
            return self._failed(str(failure), failure.relist)

    # --- asking ---

    def _query(self) -> dict[str, str]:
        query = {"labelSelector": self.resource.label_selector, "fieldSelector": self.resource.field_selector}
        if self._stage == "list":
            query["limit"] = "" if self._whole else str(PAGE)
            query["continue"] = self._continue
            query["resourceVersion"] = "" if self._continue else self._version
        else:
            shortest, longest = WATCH_SECONDS
            query["timeoutSeconds"] = str(int(shortest + (longest - shortest) * self._chance()))
            query["watch"] = query["allowWatchBookmarks"] = "true"
            query["resourceVersion"] = self._version
        if self._stage == "stream":
            query["resourceVersion"] = "" if self._version == "0" else self._version
            query["resourceVersionMatch"] = "NotOlderThan"
            query["sendInitialEvents"] = "true"
        return {key: value for key, value in query.items() if value}

    # --- receiving ---

    def _check_bounds(self, chunk: bytes) -> None:
        """A server that drips bytes is never silent and never done; nor may it fill the memory."""
        if self._clock() > self._deadline:
            raise _Failure("the server takes too long to answer")
        if self._status == 200 and self._stage == "list":
            return
        if len(self._buffer) + len(chunk) > (LINE_LIMIT if self._status == 200 else BODY_LIMIT):
            raise _Failure("the server sends more than any answer can be", relist=True)

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        """The lines that are complete now."""
        if b"\n" not in chunk:
            self._buffer += chunk
            return
        first, *others = chunk.split(b"\n")
        line = bytes(self._buffer) + first
        self._buffer = bytearray(others.pop())
        yield line
        yield from others

    def _event(self, line: bytes) -> list[Change]:
        if not line.strip():
            return []
        try:
            event = _EVENT.decode(line)
            bookmark = _BOOKMARK.decode(event.object).metadata if event.type == "BOOKMARK" else None
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise _not_an_event(line) from None
        if bookmark:
            return self._bookmark(bookmark)
        if event.type == "ERROR":
            raise _error_event(event.object)
        if event.type in ("ADDED", "MODIFIED"):
            changes = self._put(event.object)
        elif event.type == "DELETED":
            changes = self._remove(event.object)
        else:
            raise _not_an_event(line)
        if self._stage == "watch":
            changes += self._well()
            self._advance(head(event.object).metadata.resource_version)
        return changes

    def _bookmark(self, bookmark: _BookmarkMetadata) -> list[Change]:
        if self._stage == "watch":
            self._advance(bookmark.resource_version)
            return self._well()
        if bookmark.annotations and bookmark.annotations.end_of_list == "true":
            self._deadline = self._accepted_at + WATCH_SECONDS[1] + GRACE_SECONDS
            return self._finish_list(bookmark.resource_version)
        return []

    def _advance(self, version: str) -> None:
        """Go on from there next time; not from an older version, which would repeat what is over."""
        older = version.isdigit() and self._version.isdigit() and int(version) < int(self._version)
        if version and not older:
            self._version = version

    def _put(self, raw: Raw) -> list[Change]:
        thing, problems = convert(raw, self.resource.kind)
        ref = thing.ref if thing is not None else problems[0].ref
        self._fresh.add(ref)
        digest = hash((thing, problems))
        if self._known.get(ref) == digest:
            return []
        self._known[ref] = digest
        return [Change(ref, thing, problems)]

    def _remove(self, raw: Raw) -> list[Change]:
        ref = identify(raw, self.resource.kind)
        self._fresh.discard(ref)
        return [Change(ref, gone=True)] if self._known.pop(ref, None) is not None else []

    # --- ends of connections ---

    def _page(self) -> list[Change]:
        """A plain list, or a page of one, has arrived."""
        if self._stage == "stream":
            raise _Failure("the server ended the list half-way")
        try:
            page = _LIST.decode(self._buffer)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise _Failure(f"the server sent {_beginning(self._buffer)}, which is no list") from None
        self._buffer = bytearray()
        metadata = page.metadata or ListMetadata()
        changes = [change for item in page.items or () for change in self._put(item)]
        self._continue = metadata.continue_ or ""
        return changes if self._continue else changes + self._finish_list(metadata.resource_version or "0")

    def _finish_list(self, version: str) -> list[Change]:
        gone = self._known.keys() - self._fresh
        for ref in gone:
            del self._known[ref]
        self._fresh = set()
        self._whole = False
        self._stage, self._version = "watch", version
        self.relists += self.listed
        self.listed = True
        return [*(Change(ref, gone=True) for ref in gone), *self._well()]

    def _watch_ended(self, error: str) -> list[Change]:
        """As all watches do. If each one does so at once, that must be told, and not become a busy loop."""
        if self._healthy():
            self._failures = 0
            return self._well()
        if self._failures >= 3:
            return self._failed(error or "the server ends each watch as soon as it has begun")
        self._back_off()
        return []

    def _refused(self) -> list[Change]:
        """Any answer but 200."""
        code, status = self._status, _status(bytes(self._buffer))
        if code == 410 or _too_large(status):
            return self._begin_anew()
        if code in (400, 422) and self._stage == "stream":
            self._can_stream = False
            self._relist()
            return []
        if self.resource.optional and (code == 404 or (code == 403 and not self.listed)):
            return self._unserved()
        if code == 401 and self._failures == 0:  # most often there is a newer token already, and it is read now
            self._back_off()
            return []
        if code == 400:  # a version of another server's making
            self._relist("")
        message = f": {shown(status.message)}" if status.message else ""
        return self._failed(f"HTTP {code}{message}{_advice(code, self.resource)}")

    def _unserved(self) -> list[Change]:
        """What need not be there is not there: there may be a newer server, or more rights, one day."""
        changes = self._finish_list("0") if self._known or not self.listed else []
        self._relist("0")
        self._delay = UNSERVED_SECONDS * (1 + self._chance()) / 2
        return changes

    def _begin_anew(self) -> list[Change]:
        """The version expired; a page's token does too, when a list takes too long: the next one has no pages."""
        self._whole = bool(self._continue)
        self._relist("")
        if self._healthy():
            self._failures = 0
        else:
            self._back_off()
        return []

    def _relist(self, version: str | None = None) -> None:
        self._stage = "stream" if self._can_stream and not self._whole else "list"
        self._continue = ""
        if version is not None:
            self._version = version

    def _failed(self, reason: str, relist: bool = False) -> list[Change]:
        if relist and self._stage == "watch":
            self._relist()
        elif self._stage == "stream" and self._status == 200:
            self._stage = "list"  # whatever keeps the server from bringing it to its end
        self._continue = ""
        if self._healthy():
            self._failures = 0
        self._back_off()
        self._fails_later = self._status == 200
        ref = Ref("API", "", self.resource.name)
        trouble = Problem(ref, "", reason)
        if trouble == self._trouble:
            return []
        self._trouble = trouble
        return [Change(ref, problems=(trouble,))]

    def _well(self) -> list[Change]:
        """Something good came: if there was trouble it is over."""
        if self._trouble is None:
            return []
        ref, self._trouble = self._trouble.ref, None
        return [Change(ref, gone=True)]

    # --- pace ---

    def _healthy(self) -> bool:
        return self._status == 200 and self._clock() - self._accepted_at >= HEALTHY_SECONDS

    def _back_off(self) -> None:
        """Wait longer with each failure, and not as long as all the other nodes do."""
        longest = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(self._failures, 10))
        chance = self._chance()
        self._delay = max(longest * (1 + chance) / 2, self._retry_after * (1 + chance / 4))
        self._failures += 1


def _status(body: bytes) -> _Status:
    try:
        return _STATUS.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _Status(message=body[:100].decode("utf-8", "replace"))


def _error_event(raw: Raw) -> _Failure | _Expired:
    status = _status(bytes(raw))
    if status.code == 410 or _too_large(status):
        return _Expired()
    busy = status.code in (429, 500, 503)
    return _Failure(f"the server ended the watch: {shown(status.message)} ({status.code})", relist=not busy)


def _too_large(status: _Status) -> bool:
    """Whether our version is one that the server has not come to: its etcd was restored from a backup."""
    return "Too large resource version" in status.message


def _not_an_event(line: bytes) -> _Failure:
    return _Failure(f"the server sent {_beginning(line)}, which is no event", relist=True)


def _beginning(body: bytes | bytearray) -> str:
    return quote(bytes(body[:80]).decode("utf-8", "replace"))


def _advice(code: int, resource: Resource) -> str:
    if code == 403:
        return f": let the agent's account get, list and watch {resource.name}"
    return ": its token or certificate is not (or no longer) valid" if code == 401 else ""
