"""The API source over real HTTP, against a server that misbehaves: threads, connections, credentials."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniproxy.config import Settings
from miniproxy.model import Batch, Problem, Ref
from miniproxy.problems import Problems
from miniproxy.sources import choose, kube, reflector
from miniproxy.sources.apiserver import ApiServer
from miniproxy.sources.kube import KubeSource
from miniproxy.sources.manifests import ManifestSource
from miniproxy.sources.wire import convert
from miniproxy.tracker import Tracker

from .broken import endpoint_slice, node, put, service
from .fake_api import PATHS, FakeApi, Store, troubled
from .running import PATIENCE_SECONDS, Running


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same behaviour in less time."""
    monkeypatch.setattr(reflector, "BACKOFF_FIRST", 0.01)
    monkeypatch.setattr(reflector, "BACKOFF_MOST", 0.1)
    monkeypatch.setattr(kube, "SILENCE_SECONDS", 0.5)


@pytest.fixture
def store() -> Store:
    store = Store()
    store.put(service("web"))
    store.put(endpoint_slice("web-1"))
    store.put(node("n1"))
    return store


class Watching(Running):
    """A running source, and an agent's tracker fed by it."""

    def __init__(self, api: ApiServer, service_cidrs: bool = False) -> None:
        self.source = KubeSource(api, "n1", service_cidrs)
        self.tracker = Tracker("n1")
        self.problems = Problems()
        super().__init__(self.source)

    def __str__(self) -> str:
        return f"problems {list(self.problems)}"

    def take(self, batch: Batch) -> None:
        self.tracker.apply(batch)
        self.problems.of_batch(batch)

    def until_asked(self, server: FakeApi, times: int) -> None:
        asked = len(server.requests) + times
        self.until(lambda: len(server.requests) >= asked)

    def until_asked_or_equal(self, server: FakeApi, store: Store) -> None:
        asked = len(server.requests)
        self.until(lambda: len(server.requests) > asked or self.equals(store))

    def until_relisted(self, times: int) -> None:
        """Until each resource has been listed again so many times since the source began."""
        self.until(lambda: min(self.source.relists.values()) >= times)

    def troubles(self) -> set[Problem]:
        return {problem for problem in self.problems if problem.ref.kind == "API"}

    def handed_over(self) -> int:
        """Objects, and refs of those that are gone, so far."""
        gone = (ref for batch in self.batches for ref in batch.deletes if ref.kind != "API")
        return sum(len(batch.upserts) for batch in self.batches) + sum(1 for _ in gone)

    def equals(self, store: Store) -> bool:
        """Whether the tracker knows just what the store holds."""
        tracker = Tracker("n1")
        objects = [convert(thing).object for things in store.objects.values() for thing in things.values()]
        tracker.apply(Batch(tuple(thing for thing in objects if thing is not None)))
        return self.tracker.synced and _knowledge(self.tracker) == _knowledge(tracker)


def _knowledge(tracker: Tracker) -> Any:
    ports = {(port.name, port.family): port for port in tracker.ports()}
    endpoints = {key: sorted(map(str, tracker.endpoints(key))) for key in ports}
    return ports, endpoints, tracker.node


def kubeconfig(path: Path, url: str, user: Any) -> str:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return os.fspath(path)


@pytest.fixture
def api(store: Store) -> Iterator[FakeApi]:
    with FakeApi(store) as server:
        yield server


SERVICE_CIDRS = "/apis/networking.k8s.io/v1/servicecidrs"


def service_cidr(name: str, *cidrs: str) -> Any:
    metadata = {"name": name}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": metadata, "spec": {"cidrs": cidrs}}


def change_something(store: Store, chance: random.Random) -> None:
    name = chance.choice("abcdef")
    number = 1 + ord(name) - ord("a")
    match chance.randrange(6):
        case 0:
            store.delete("Service", "default", name)
        case 1:
            store.delete("EndpointSlice", "default", f"{name}-1")
        case 2:
            store.forget()
        case 3:
            store.put(put(node("n1"), "metadata.labels", {"topology.kubernetes.io/zone": chance.choice(("z1", "z2"))}))
        case 4:
            store.put(put(service(name, number), "spec.ports[0].port", chance.choice((80, 8080))))
        case _:
            store.put(endpoint_slice(f"{name}-1", chance.randrange(1, 9), service=name))


# --- the whole of it --------------------------------------------------------------------------------------


def test_what_there_is_and_what_happens_then(api: FakeApi, store: Store) -> None:
    with Watching(ApiServer(master=api.url)) as watching:
        watching.until(lambda: watching.equals(store))
        store.put(service("more", 2))
        store.put(endpoint_slice("more-1", 2, service="more"))
        store.delete("Service", "default", "web")
        watching.until(lambda: watching.equals(store))
        assert [batch.synced for batch in watching.batches].count(True) == 1
        assert not watching.troubles()


@pytest.mark.parametrize("missing", ["Service", "EndpointSlice", "Node"])
def test_synced_only_when_all_lists_have_arrived(api: FakeApi, store: Store, missing: str) -> None:
    broken = threading.Event()
    api.trouble = lambda path: "" if broken.is_set() or path != PATHS[missing] else "500"
    with Watching(ApiServer(master=api.url)) as watching:
        watching.until(lambda: watching.troubles() and watching.handed_over() == 2)
        assert not watching.tracker.synced
        broken.set()
        watching.until(lambda: watching.equals(store))
        (at,) = (i for i, batch in enumerate(watching.batches) if batch.synced)
        assert sum(len(batch.upserts) for batch in watching.batches[: at + 1]) == 3  # not one of them later


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("streaming", [True, False])
def test_abuse(store: Store, seed: int, streaming: bool) -> None:
    """Half of all requests go wrong while the state changes; then no more."""
    chance = random.Random(seed)
    store.streaming = streaming
    store.page_limit = 2
    with (
        FakeApi(store, troubled(random.Random(seed), 0.5)) as server,
        Watching(ApiServer(master=server.url)) as watching,
    ):
        for _ in range(60):
            change_something(store, chance)
            if chance.random() < 0.3:
                watching.until_asked_or_equal(server, store)
            if chance.random() < 0.05:
                server.stop()
                change_something(store, chance)
                server.start()
        server.trouble = lambda path: ""
        server.stop()  # whatever is under way ends
        server.start()
        watching.until(lambda: watching.equals(store) and not watching.troubles())


def test_relists_of_what_is_known_hand_over_nothing(api: FakeApi, store: Store) -> None:
    with Watching(ApiServer(master=api.url)) as watching:
        watching.until(lambda: watching.equals(store))
        before = watching.handed_over()
        store.put(put(node("n1"), "status.conditions", [{"type": "Ready", "lastHeartbeatTime": "now"}]))
        for times in (1, 2, 3):
            api.stop()
            store.forget()
            api.trouble = lambda path: "410"
            api.start()
            watching.until_asked(api, 6)
            api.trouble = lambda path: ""
            watching.until_relisted(times)
        watching.until(lambda: not watching.troubles())
        assert watching.handed_over() == before


def test_the_server_is_away_and_comes_back_with_another_state(api: FakeApi, store: Store) -> None:
    with Watching(ApiServer(master=api.url)) as watching:
        watching.until(lambda: watching.equals(store))
        api.stop()
        watching.until(
            lambda: ["Connection refused" in problem.reason for problem in watching.troubles()] == [True] * 3
        )
        store.delete("Service", "default", "web")
        store.put(service("other", 3))
        store.put(endpoint_slice("web-1", 7))
        store.forget()
        assert [port.name.name for port in watching.tracker.ports()] == ["web", "web"]  # keeps serving
        api.start()
        watching.until(lambda: watching.equals(store) and not watching.troubles())


def test_a_silent_connection_is_dead(api: FakeApi, store: Store) -> None:
    silent = {PATHS[kind] for kind in ("Service", "EndpointSlice", "Node")}

    def once_each(path: str) -> str:
        watching = not silent.isdisjoint({path}) and len(api.requests) > 3
        silent.discard(path) if watching else None
        return "silence" if watching else ""

    api.trouble = once_each
    with Watching(ApiServer(master=api.url)) as watching:
        watching.until(lambda: watching.equals(store))
        api.stop()
        api.start()
        watching.until(lambda: not silent)
        store.put(service("more", 2))
        watching.until(lambda: watching.equals(store))


def test_a_burst_goes_in_handfuls(api: FakeApi, store: Store) -> None:
    with Watching(ApiServer(master=api.url)) as watching:
        watching.until(lambda: watching.equals(store))
        before = len(watching.batches)
        with store.changed:
            for number in range(2000):
                store.put(put(service(f"burst-{number}"), "spec.clusterIPs", [f"10.97.{number >> 8}.{number & 255}"]))
        watching.until(lambda: watching.tracker.service_count() == 2001)
        assert len(watching.batches) - before < 200


def test_stopping_does_not_wait_for_a_silent_server(
    api: FakeApi, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "SILENCE_SECONDS", 3600.0)
    api.hold_seconds = 3600.0
    before = set(threading.enumerate())
    with Watching(ApiServer(master=api.url)) as watching:
        watching.until(lambda: watching.equals(store))
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("watch ")]
    for thread in left:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def test_service_cidrs_are_told_by_the_node(api: FakeApi, store: Store) -> None:
    store.put(service_cidr("kubernetes", "10.96.0.0/12", "fd00:10:96::/108"))
    with Watching(ApiServer(master=api.url), service_cidrs=True) as watching:
        watching.until(lambda: watching.equals(store))
        assert watching.tracker.node.service_cidrs == ("10.96.0.0/12", "fd00:10:96::/108")
        store.put(node("n1"))
        store.put(service_cidr("more", "10.200.0.0/16"))
        store.delete("ServiceCIDR", "", "kubernetes")
        watching.until(lambda: watching.tracker.node.service_cidrs == ("10.200.0.0/16",))
        watching.until(lambda: watching.equals(store))


@pytest.mark.parametrize("refusal", ["404", "403"])
def test_service_cidrs_need_not_be_there(api: FakeApi, store: Store, refusal: str) -> None:
    api.trouble = lambda path: refusal if path == SERVICE_CIDRS else ""
    with Watching(ApiServer(master=api.url), service_cidrs=True) as watching:
        watching.until(lambda: watching.equals(store))
        assert SERVICE_CIDRS in {asked.partition("?")[0] for asked in api.requests}
        assert not watching.troubles()


# --- the way to the server --------------------------------------------------------------------------------


def test_a_token_that_is_rotated(api: FakeApi, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "SILENCE_SECONDS", 3600.0)  # no other reason to read everything again
    token = tmp_path / "token"
    token.write_text("first")
    api.token = "first"
    config = kubeconfig(tmp_path / "config", api.url, {"tokenFile": "token"})  # relative to the kubeconfig
    with Watching(ApiServer(config)) as watching:
        watching.until(lambda: watching.equals(store))
        api.token = "second"
        api.stop()
        api.start()
        watching.until(lambda: any("HTTP 401" in problem.reason for problem in watching.troubles()))
        store.put(service("more", 2))
        token.write_text("second")
        watching.until(lambda: watching.equals(store) and not watching.troubles())


def test_a_token_from_a_plugin(api: FakeApi, store: Store, tmp_path: Path) -> None:
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "from a plugin"},
    }
    api.token = "from a plugin"
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": ["-c", f"print({json.dumps(json.dumps(credential))})"],
        "interactiveMode": "Never",
    }
    with Watching(ApiServer(kubeconfig(tmp_path / "config", api.url, {"exec": plugin}))) as watching:
        watching.until(lambda: watching.equals(store))


@pytest.mark.parametrize("content", [None, "", "{not yaml", "[]", "clusters: 3", "kind: Config"])
def test_a_kubeconfig_that_cannot_be_used_yet(api: FakeApi, store: Store, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config"
    if content is not None:
        path.write_text(content)
    with Watching(ApiServer(os.fspath(path))) as watching:
        watching.until(lambda: len(watching.troubles()) == 3)
        assert all(problem.ref.kind == "API" for problem in watching.problems)
        kubeconfig(path, api.url, {})
        watching.until(lambda: watching.equals(store) and not watching.troubles())


def test_a_service_account_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with Watching(ApiServer()) as watching:
        watching.until(lambda: len(watching.troubles()) == 3)
        assert Ref("API", "", "services") in {problem.ref for problem in watching.troubles()}


# --- which source -----------------------------------------------------------------------------------------


def test_the_settings_choose_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert isinstance(choose(Settings(source="/m", kubeconfig="/k")), ManifestSource)
    assert str(choose(Settings(source="/m"))) == "/m"
    assert isinstance(choose(Settings(kubeconfig="/k", node_name="n1")), KubeSource)
    assert isinstance(choose(Settings(master="http://127.0.0.1:1", node_name="n1")), KubeSource)
    with pytest.raises(ValueError, match="--kubeconfig FILE, or --source FOLDER"):
        choose(Settings())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert str(choose(Settings(node_name="n1"))) == "API server by service account"


@pytest.mark.parametrize(
    ("settings", "followed"),
    [
        (Settings(kubeconfig="/k"), False),
        (Settings(kubeconfig="/k", mode="nftables"), True),
        (Settings(kubeconfig="/k", mode="nftables", service_cidrs=("10.96.0.0/12",)), False),
    ],
)
def test_service_cidrs_are_followed_where_they_are_of_use(settings: Settings, followed: bool) -> None:
    source = choose(settings)
    assert isinstance(source, KubeSource)
    assert ("servicecidrs" in source.relists) is followed
