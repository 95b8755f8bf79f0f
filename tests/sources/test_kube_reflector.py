"""The state machine of one resource: no server, no threads, no clock but the test's."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniproxy.model import Batch, Object, Problem, Ref, Service
from miniproxy.problems import Problems
from miniproxy.sources.kube import join
from miniproxy.sources.reflector import (
    BACKOFF_MOST,
    HEALTHY_SECONDS,
    LIST_SECONDS,
    Change,
    Reflector,
    Request,
    Resource,
    Wait,
)
from miniproxy.sources.wire import convert

from .broken import put, service
from .fake_api import PATHS, Store, failure, line, pieces, status

SERVICES = Resource("Service", PATHS["Service"], label_selector="!x", field_selector="spec.clusterIP!=None")
API = Ref("API", "", "services")


def web(name: str, port: int = 80) -> Any:
    return put(service(name), "spec.ports[0].port", port)


def ref(name: str) -> Ref:
    return Ref("Service", "default", name)


class Consumer:
    """What an agent knows from the batches; it objects to those that bring nothing new."""

    def __init__(self) -> None:
        self.objects: dict[Ref, Object] = {}
        self.problems = Problems()
        self.batches: list[Batch] = []

    def take(self, changes: list[Change]) -> None:
        if not changes:
            return
        batch = join(changes)
        news = self.problems.of_batch(batch)
        before = dict(self.objects)
        self.objects.update((thing.ref, thing) for thing in batch.upserts)
        for gone in batch.deletes:
            self.objects.pop(gone, None)
        undone = len({change.ref for change in changes}) < len(changes)  # a change and its undoing in one burst
        assert before != self.objects or news.appeared or news.over or undone, f"nothing new: {batch}"
        self.batches.append(batch)

    def standing(self) -> set[Problem]:
        return set(self.problems)


class Conversation:
    """A reflector that asks, a store that answers, and what goes wrong in between."""

    def __init__(self, resource: Resource = SERVICES, seed: int = 1) -> None:
        self.now = 1000.0
        self.chance = random.Random(seed)
        self.store = Store()
        self.consumer = Consumer()
        self.reflector = Reflector(resource, clock=lambda: self.now, chance=self.chance.random)
        self.requests: list[Request] = []
        self.waited: list[float] = []

    def ask(self) -> Request:
        """The next request; waits are waited."""
        while isinstance(step := self.reflector.next(), Wait):
            assert step.seconds > 0
            self.waited.append(step.seconds)
            self.now += step.seconds
        self.requests.append(step)
        return step

    def receive(self, data: bytes) -> None:
        for piece in pieces(data, self.chance):
            if not self.reflector.hang_up:
                self.consumer.take(self.reflector.receive(piece))

    def end(self, error: str = "") -> None:
        self.consumer.take(self.reflector.end(error))

    def answered(self, code: int, retry_after: str = "") -> None:
        self.consumer.take(self.reflector.answered(code, retry_after))

    def exchange(self, lived: float = 0.0, error: str = "") -> Request:
        """One request, answered as the API server does, its connection ending some time after."""
        request = self.ask()
        answer = self.store.answer(request.path, request.query)
        self.answered(answer.status)
        self.receive(answer.body)
        self.now += lived
        self.end(error)
        return request

    def refused(self, code: int, message: str = "no", retry_after: str = "") -> Request:
        request = self.ask()
        self.answered(code, retry_after)
        self.receive(failure(code, message).body)
        self.end()
        return request

    def unreachable(self, reason: str = "Connection refused") -> None:
        self.ask()
        self.end(reason)

    def follow(self) -> None:
        """Be listed, and up to date by a good watch."""
        while not self.reflector.listed or "watch" not in self.requests[-1].query:
            self.exchange(lived=HEALTHY_SECONDS)
        self.exchange(lived=HEALTHY_SECONDS)


@pytest.fixture
def talk() -> Conversation:
    return Conversation()


def expected(store: Store) -> tuple[set[Ref], dict[Ref, Object]]:
    """(refs of all objects, those that can be used) of a store."""
    refs, good = set(), {}
    for thing in store.objects["Service"].values():
        name = Ref("Service", *(thing["metadata"][part] for part in ("namespace", "name")))
        refs.add(name)
        found = convert(thing).object
        if found is not None:
            good[name] = found
    return refs, good


def assert_equal(talk: Conversation) -> None:
    """The consumer knows what the server holds; what cannot be used is the last version that could."""
    refs, good = expected(talk.store)
    assert {name: talk.consumer.objects.get(name) for name in good} == good
    assert talk.consumer.objects.keys() <= refs


# --- lists and watches ------------------------------------------------------------------------------------


def test_a_streaming_list_then_watches_from_where_the_last_one_ended(talk: Conversation) -> None:
    talk.store.put(web("a"))
    first = talk.exchange(lived=HEALTHY_SECONDS)
    assert first.query["sendInitialEvents"] == first.query["allowWatchBookmarks"] == "true"
    assert "resourceVersion" not in first.query  # the newest
    assert first.query["labelSelector"] == "!x"
    assert first.query["fieldSelector"] == "spec.clusterIP!=None"
    assert 300 <= int(first.query["timeoutSeconds"]) <= 600
    assert talk.reflector.listed
    version = talk.store.version
    talk.store.put(web("b"))
    second = talk.exchange(lived=HEALTHY_SECONDS)
    assert second.query["resourceVersion"] == str(version)
    assert "sendInitialEvents" not in second.query
    third = talk.exchange()
    assert third.query["resourceVersion"] == str(version + 1)
    assert talk.consumer.objects.keys() == {ref("a"), ref("b")}
    assert not talk.waited


def test_events_after_the_list_on_the_same_connection(talk: Conversation) -> None:
    talk.store.put(web("a"))
    request = talk.ask()
    talk.answered(200)
    talk.receive(talk.store.answer(request.path, request.query).body)
    assert talk.reflector.listed
    talk.store.put(web("b"))
    talk.store.delete("Service", "default", "a")
    talk.receive(b"".join(happened.line() for happened in talk.store.history["Service"][-2:]))
    assert_equal(talk)
    talk.now += HEALTHY_SECONDS
    talk.end()
    assert talk.ask().query["resourceVersion"] == str(talk.store.version)


def test_a_server_without_streaming_lists_is_asked_for_pages(talk: Conversation) -> None:
    talk.store.streaming = False
    talk.store.page_limit = 2
    for name in "abcde":
        talk.store.put(web(name))
    talk.exchange()
    pages = [talk.exchange() for _ in range(3)]
    assert talk.reflector.listed
    assert_equal(talk)
    assert pages[0].query["resourceVersion"] == "0"
    assert all(page.query["limit"] == "500" for page in pages)
    assert ["continue" in page.query for page in pages] == [False, True, True]
    assert talk.exchange().query["resourceVersion"] == str(talk.store.version)
    assert not talk.waited
    assert not talk.consumer.standing()


def test_pages_that_expire_are_followed_by_a_list_without_pages(talk: Conversation) -> None:
    talk.store.streaming = False
    talk.store.page_limit = 2
    for name in "abcde":
        talk.store.put(web(name))
    talk.exchange()
    talk.exchange()
    talk.store.delete("Service", "default", "a")  # which the first page has shown
    talk.store.forget()
    talk.exchange()
    whole = talk.exchange()
    assert "limit" not in whole.query
    assert "continue" not in whole.query
    assert talk.reflector.listed
    assert_equal(talk)


def test_half_a_list_is_not_all(talk: Conversation) -> None:
    talk.store.put(web("a"))
    talk.store.put(web("b"))
    request = talk.ask()
    talk.answered(200)
    body = talk.store.answer(request.path, request.query).body
    talk.receive(body[: body.index(b"\n") + 1])
    talk.end()
    assert not talk.reflector.listed
    talk.store.delete("Service", "default", "a")
    while not talk.reflector.listed:
        talk.exchange()
    assert_equal(talk)
    assert not talk.consumer.standing()


def test_an_optional_resource_that_is_not_served_counts_as_listed() -> None:
    talk = Conversation(SERVICES._replace(path="/apis/example.org/v1/services", optional=True))
    talk.exchange()
    assert talk.reflector.listed
    talk.ask()
    assert 300 <= talk.waited[0] <= 600
    assert not talk.consumer.batches


# --- versions ---------------------------------------------------------------------------------------------


def test_after_an_expired_version_only_what_differs_is_handed_over(talk: Conversation) -> None:
    for name in "abc":
        talk.store.put(web(name))
    talk.follow()
    talk.store.put(web("b", 81))
    talk.store.delete("Service", "default", "c")
    talk.store.put(web("d"))
    talk.store.forget()
    before = len(talk.consumer.batches)
    talk.exchange(lived=HEALTHY_SECONDS)  # finds its version expired
    talk.exchange()
    batch = join(change for change in _flatten(talk.consumer.batches[before:]))
    assert {thing.ref for thing in batch.upserts} == {ref("b"), ref("d")}
    assert batch.deletes == (ref("c"),)
    assert talk.reflector.relists == 1
    assert_equal(talk)


def _flatten(batches: list[Batch]) -> list[Change]:
    upserts = [Change(thing.ref, thing) for batch in batches for thing in batch.upserts]
    return upserts + [Change(gone, gone=True) for batch in batches for gone in batch.deletes]


@pytest.mark.parametrize("by", ["status", "event"])
def test_a_relist_of_what_is_known_hands_over_nothing(talk: Conversation, by: str) -> None:
    talk.store.put(web("a"))
    talk.store.put(put(web("bad"), "spec.ports[0].port", 99999))
    talk.follow()
    before = len(talk.consumer.batches)
    for _ in range(3):
        talk.ask()
        if by == "status":
            talk.answered(410)
            talk.receive(failure(410, "too old resource version").body)
        else:
            talk.answered(200)
            talk.receive(line("ERROR", status(410, "too old resource version")))
        talk.end()
        talk.exchange(lived=HEALTHY_SECONDS)
    assert talk.reflector.relists == 3
    assert len(talk.consumer.batches) == before


def test_what_a_proxy_does_not_read_is_no_change(talk: Conversation) -> None:
    talk.store.put(web("a"))
    talk.follow()
    before = len(talk.consumer.batches)
    talk.store.put(put(web("a"), "metadata.annotations", {"some.controller/heartbeat": "12:00"}))
    talk.exchange(lived=HEALTHY_SECONDS)
    assert len(talk.consumer.batches) == before
    assert talk.ask().query["resourceVersion"] == str(talk.store.version)


def test_bookmarks_move_on_and_never_back(talk: Conversation) -> None:
    talk.follow()
    talk.ask()
    talk.answered(200)
    for version in (500, 500, 400, 90):
        talk.receive(talk.store.bookmark("Service", version))
    talk.now += HEALTHY_SECONDS
    talk.end()
    assert talk.ask().query["resourceVersion"] == "500"


def test_a_version_the_server_has_not_come_to_is_given_up(talk: Conversation) -> None:
    """An etcd that was restored from a backup: its versions begin anew, further down."""
    talk.store.put(web("a"))
    talk.store.put(web("b"))
    talk.follow()
    restored = Store()
    restored.put(web("a", 81))
    talk.store = restored
    talk.ask()
    talk.answered(200)
    talk.receive(line("ERROR", status(504, "Too large resource version: 102, current: 101")))
    talk.end()
    request = talk.exchange(lived=HEALTHY_SECONDS)
    assert "resourceVersion" not in request.query
    assert talk.exchange().query["resourceVersion"] == "101"
    assert_equal(talk)


# --- trouble ----------------------------------------------------------------------------------------------


def test_while_the_server_is_away_it_is_asked_ever_more_rarely(talk: Conversation) -> None:
    talk.store.put(web("a"))
    talk.follow()
    asked = len(talk.requests)
    end = talk.now + 300
    while talk.now < end:
        talk.unreachable()
    assert len(talk.requests) - asked <= 25  # of all requests in five minutes
    assert all(seconds <= BACKOFF_MOST for seconds in talk.waited)
    assert talk.waited[0] <= 0.5
    (trouble,) = talk.consumer.standing()
    assert trouble.ref == API
    assert "Connection refused" in trouble.reason
    assert talk.consumer.objects.keys() == {ref("a")}
    talk.exchange(lived=HEALTHY_SECONDS)
    assert not talk.consumer.standing()
    waits = len(talk.waited)
    talk.exchange(lived=HEALTHY_SECONDS)
    assert len(talk.waited) == waits  # good again: no more waiting


def test_nodes_do_not_come_back_all_at_once() -> None:
    waits = set()
    for seed in range(20):
        talk = Conversation(seed=seed)
        for _ in range(3):
            talk.unreachable()
        waits.add(tuple(talk.waited))
    assert len(waits) == 20


def test_a_server_that_is_busy_says_when_to_come_again(talk: Conversation) -> None:
    talk.refused(429, "too many requests", retry_after="17")
    talk.ask()
    assert 17 <= talk.waited[0] <= 17 * 1.25


def test_a_retry_after_cannot_put_the_agent_to_sleep_for_good(talk: Conversation) -> None:
    talk.refused(503, retry_after="99999999")
    talk.ask()
    assert talk.waited[0] <= 150


def test_watches_that_end_at_once_are_no_busy_loop(talk: Conversation) -> None:
    talk.follow()
    asked = len(talk.requests)
    end = talk.now + 300
    while talk.now < end:
        talk.exchange()
    assert len(talk.requests) - asked <= 25
    (trouble,) = talk.consumer.standing()
    assert "as soon as it has begun" in trouble.reason
    assert sum(bool(batch.problems) for batch in talk.consumer.batches) == 1  # said once


def test_versions_that_expire_at_once_are_no_busy_loop(talk: Conversation) -> None:
    talk.follow()
    asked = len(talk.requests)
    end = talk.now + 300
    while talk.now < end:
        talk.refused(410)
    assert len(talk.requests) - asked <= 25


def test_a_watch_that_was_cut_goes_on_where_it_was(talk: Conversation) -> None:
    talk.store.put(web("a"))
    talk.follow()
    talk.store.put(web("b"))
    version = talk.store.version
    talk.store.put(web("c"))
    request = talk.ask()
    talk.answered(200)
    body = talk.store.answer(request.path, request.query).body
    talk.receive(body[: body.index(b"\n") + 20])  # b, and the beginning of c
    talk.now += HEALTHY_SECONDS
    talk.end("Connection broken")
    assert talk.consumer.objects.keys() == {ref("a"), ref("b")}
    assert talk.exchange().query["resourceVersion"] == str(version)
    assert_equal(talk)
    assert not talk.consumer.standing()  # servers come and go: no news


@pytest.mark.parametrize(
    "garbage",
    [
        b'{"type": "ADDED", "object": [}\n',
        b'{"type": "INVENTED", "object": {}}\n',
        b"<html>a captive portal</html>\n",
        b'{"type": "BOOKMARK", "object": {"metadata": 3}}\n',
        b"\xff\xfe\n",
        b'{"type": "ERROR", "object": {"kind": "Status", "code": 422, "message": "no"}}\n',
    ],
)
def test_after_an_event_that_cannot_be_read_a_list_says_what_is_true(talk: Conversation, garbage: bytes) -> None:
    talk.store.put(web("a"))
    talk.follow()
    talk.ask()
    talk.answered(200)
    talk.receive(garbage)
    assert talk.reflector.hang_up
    talk.store.delete("Service", "default", "a")
    talk.end()
    assert {problem.ref for problem in talk.consumer.standing()} == {API}
    while talk.reflector.relists == 0:
        talk.exchange(lived=HEALTHY_SECONDS)
    assert_equal(talk)
    assert not talk.consumer.standing()


def test_a_list_that_drips_is_given_up(talk: Conversation) -> None:
    talk.ask()
    talk.answered(200)
    for _ in range(int(LIST_SECONDS) + 1):
        assert not talk.reflector.hang_up
        talk.now += 1.0
        talk.consumer.take(talk.reflector.receive(b" "))
    assert talk.reflector.hang_up


def test_a_line_without_end_does_not_fill_the_memory(talk: Conversation) -> None:
    talk.follow()
    talk.ask()
    talk.answered(200)
    megabyte = b"x" * (1 << 20)
    for _ in range(64):
        if not talk.reflector.hang_up:
            talk.consumer.take(talk.reflector.receive(megabyte))
    assert talk.reflector.hang_up


def test_a_refusal_names_what_is_missing(talk: Conversation) -> None:
    talk.refused(403, 'services is forbidden: User "x" cannot list resource "services"')
    (trouble,) = talk.consumer.standing()
    assert "HTTP 403" in trouble.reason
    assert 'User "x" cannot list' in trouble.reason
    assert "let the agent's account get, list and watch services" in trouble.reason


def test_the_first_401_is_a_reason_to_read_the_token_again_and_no_news(talk: Conversation) -> None:
    talk.follow()
    talk.refused(401)
    assert not talk.consumer.standing()
    talk.refused(401)
    (trouble,) = talk.consumer.standing()
    assert "its token or certificate is not (or no longer) valid" in trouble.reason


def test_an_object_that_cannot_be_used_keeps_its_last_good_version(talk: Conversation) -> None:
    talk.store.put(web("a"))
    talk.follow()
    talk.store.put(put(web("a", 81), "spec.ports", "none"))
    talk.exchange(lived=HEALTHY_SECONDS)
    (wrong,) = talk.consumer.standing()
    assert wrong.ref == ref("a")
    served = talk.consumer.objects[ref("a")]
    assert isinstance(served, Service)
    assert served.ports[0].port == 80
    talk.store.put(web("a"))
    talk.exchange(lived=HEALTHY_SECONDS)
    assert not talk.consumer.standing()


# --- any sequence -----------------------------------------------------------------------------------------


def change_something(talk: Conversation) -> None:
    name = talk.chance.choice("abcd")
    what = talk.chance.choice(("put", "put", "put", "bad", "worse", "delete", "delete", "forget"))
    if what == "put":
        talk.store.put(web(name, talk.chance.choice((80, 81))))
    elif what == "bad":
        talk.store.put(web(name, 99999))
    elif what == "worse":
        talk.store.put(put(web(name), "spec.ports", "none"))
    elif what == "delete":
        talk.store.delete("Service", "default", name)
    else:
        talk.store.forget()


def something_happens(talk: Conversation) -> None:
    """One request, which goes well or wrong in some way."""
    chance = talk.chance
    match chance.randrange(8):
        case 0:
            talk.unreachable()
        case 1:
            talk.refused(chance.choice((400, 401, 403, 404, 410, 422, 429, 500, 503)))
        case 2:
            talk.refused(504, "Timeout: Too large resource version: 900, current: 100")
        case 3 | 4:
            talk.exchange(lived=chance.choice((0.0, 700.0)))
        case 5:
            talk.exchange(lived=chance.choice((0.0, 70.0)), error="timed out")
        case _:
            request = talk.ask()
            answer = talk.store.answer(request.path, request.query)
            talk.answered(answer.status)
            body = answer.body[: chance.randrange(len(answer.body) + 1)]
            if chance.random() < 0.3 and answer.follow is not None:
                body += talk.store.bookmark("Service", chance.randrange(90, answer.follow)) * 2
            talk.receive(body + chance.choice((b"", b"", b"\n", b"}{\n", line("ERROR", status(500, "no")))))
            talk.now += chance.choice((0.0, 20.0))
            talk.end(chance.choice(("", "Connection broken")))


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=0), st.booleans(), st.sampled_from((0, 1, 2)))
def test_whatever_happens_the_end_is_what_the_server_holds(seed: int, streaming: bool, page_limit: int) -> None:
    talk = Conversation(seed=seed)
    talk.store.streaming = streaming
    talk.store.page_limit = page_limit
    for _ in range(30):
        change_something(talk)
        something_happens(talk)
    calm = len(talk.requests) + 12
    while len(talk.requests) < calm:
        talk.exchange(lived=HEALTHY_SECONDS)
    assert_equal(talk)
    assert API not in {problem.ref for problem in talk.consumer.standing()}
    before = len(talk.consumer.batches)
    talk.exchange(lived=HEALTHY_SECONDS)
    assert len(talk.consumer.batches) == before


def test_the_refused_object_of_a_burst_leaves_the_good_one_before_it() -> None:
    good = convert(web("a")).object
    wrong = (Problem(ref("a"), "spec.ports", "must be a list"),)
    assert join([Change(ref("a"), good), Change(ref("a"), None, wrong)]) == Batch((good,) if good else (), (), wrong)
    assert join([Change(ref("a"), good), Change(ref("a"), gone=True)]) == Batch((), (ref("a"),))
    assert join([Change(ref("a"), None, wrong), Change(ref("a"), good)]) == Batch((good,) if good else ())


def test_a_plain_list_is_read_as_the_server_writes_it(talk: Conversation) -> None:
    talk.store.streaming = False
    talk.exchange()
    request = talk.ask()
    talk.answered(200)
    talk.receive(json.dumps({"kind": "ServiceList", "metadata": None, "items": None}).encode())
    talk.end()
    assert request.query["resourceVersion"] == "0"
    assert talk.reflector.listed
