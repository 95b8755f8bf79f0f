"""What probes are told: states × expected answers, and then the same over real connections on loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.health import Answer, Health, ServiceHealth
from miniproxy.httpd import Httpd, Site, parse_address, routes
from miniproxy.model import (
    Batch,
    EndpointSlice,
    Family,
    Node,
    Ref,
    Service,
    ServicePort,
    ServicePortName,
    SliceEndpoint,
    SlicePort,
)
from miniproxy.monitoring import Monitoring
from miniproxy.observer import Observers, Synced
from miniproxy.planner import iptables
from miniproxy.reconciler import Result
from miniproxy.sources.manifests import ManifestSource
from miniproxy.syncloop import SyncLoop
from miniproxy.transaction import TransactionError
from tests import cluster
from tests.fake_iptables import FakeIptables

TIMEOUT = 60.0
CHANGE = Batch((cluster.service(1),), synced=True)


class Bench:
    """A Health that is told things, at times of our choosing."""

    def __init__(self, *, node_required: bool = True) -> None:
        self.now = 1000.0
        self.health = Health(
            list(Family),
            "n1",
            TIMEOUT,
            node_required=node_required,
            clock=lambda: self.now,
            wall=lambda: 1_700_000_000.25 + self.now,
        )
        self.taken = 0

    def node(self, **fields: Any) -> None:
        self.deliver(Batch((Node("n1", **fields),), synced=True))
        self.sync()

    def deliver(self, batch: Batch = CHANGE) -> None:
        self.health.delivered(batch)
        self.taken += 1

    def sync(self, *failing: Family, late: int = 0, seconds: float = 0.0) -> None:
        """A sync in which some families fail, and which did not see the last `late` batches."""
        results = [Synced(f, None, "refused") if f in failing else Synced(f, Result()) for f in Family]
        self.health.synced(results, (), seconds, self.taken - late)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def started(bench: Bench) -> None:
    bench.node()


def nothing(bench: Bench) -> None:
    pass


def not_yet_told_everything(bench: Bench) -> None:
    bench.deliver(Batch((Node("n1"),)))
    bench.wait(10 * TIMEOUT)


def never_synced(bench: Bench) -> None:
    """A node without rules must not get traffic, and a restart may help."""
    bench.deliver(Batch((Node("n1"),), synced=True))
    bench.wait(TIMEOUT)


def queued(bench: Bench) -> None:
    bench.node()
    bench.deliver()
    bench.wait(TIMEOUT - 1)


def stuck(bench: Bench) -> None:
    bench.node()
    bench.deliver()
    bench.wait(TIMEOUT)


def stuck_though_changes_go_on_coming(bench: Bench) -> None:
    bench.node()
    for _ in range(4):
        bench.deliver()
        bench.wait(TIMEOUT / 4)


def recovered(bench: Bench) -> None:
    stuck(bench)
    bench.sync()


def quiet(bench: Bench) -> None:
    bench.node()
    bench.wait(100 * TIMEOUT)


def one_family_stuck(bench: Bench) -> None:
    bench.node()
    bench.deliver()
    for _ in range(6):
        bench.sync(Family.V6)
        bench.wait(TIMEOUT / 6)


def one_family_never_worked(bench: Bench) -> None:
    bench.deliver(Batch((Node("n1"),), synced=True))
    for _ in range(6):
        bench.sync(Family.V6)
        bench.wait(TIMEOUT)


def drift_that_cannot_be_repaired(bench: Bench) -> None:
    bench.node()
    bench.health.drifted(Family.V4, 3)
    for _ in range(6):
        bench.sync(Family.V4)
        bench.wait(TIMEOUT / 6)


def came_in_while_a_sync_ran(bench: Bench) -> None:
    """Applied is what the sync saw; the rest has waited since it came, at the earliest since the sync began."""
    bench.node()
    bench.deliver()
    bench.deliver()
    bench.wait(TIMEOUT - 1)
    bench.sync(late=1, seconds=5)
    bench.wait(TIMEOUT - 6)


def came_in_while_a_sync_ran_and_stuck(bench: Bench) -> None:
    came_in_while_a_sync_ran(bench)
    bench.wait(1)


def deleting(bench: Bench) -> None:
    bench.node(deleting=True)


def to_be_deleted_by_autoscaler(bench: Bench) -> None:
    bench.node(excluded_by_autoscaler=True)


def no_longer_to_be_deleted(bench: Bench) -> None:
    to_be_deleted_by_autoscaler(bench)
    bench.node()


def node_gone(bench: Bench) -> None:
    bench.node()
    bench.deliver(Batch(deletes=(Ref("Node", "", "n1"),)))
    bench.sync()


def another_node_gone(bench: Bench) -> None:
    bench.node()
    bench.deliver(Batch((Node("n2", deleting=True),), (Ref("Node", "", "n3"),)))
    bench.sync()


def deleting_and_stuck(bench: Bench) -> None:
    bench.node(deleting=True)
    bench.deliver()
    bench.wait(TIMEOUT)


V4, V6 = "IPv4", "IPv6"
# state, /healthz, /livez, nodeEligible, healthy by family
STATES: list[tuple[Callable[[Bench], None], int, int, bool, dict[str, bool]]] = [
    (nothing, 503, 200, False, {}),
    (started, 200, 200, True, {V4: True, V6: True}),
    (not_yet_told_everything, 200, 200, True, {}),
    (never_synced, 503, 503, True, {V4: False, V6: False}),
    (queued, 200, 200, True, {V4: True, V6: True}),
    (stuck, 503, 503, True, {V4: False, V6: False}),
    (stuck_though_changes_go_on_coming, 503, 503, True, {V4: False, V6: False}),
    (recovered, 200, 200, True, {V4: True, V6: True}),
    (quiet, 200, 200, True, {V4: True, V6: True}),
    (one_family_stuck, 503, 503, True, {V4: True, V6: False}),
    (one_family_never_worked, 503, 503, True, {V4: True, V6: False}),
    (drift_that_cannot_be_repaired, 503, 503, True, {V4: False, V6: True}),
    (came_in_while_a_sync_ran, 200, 200, True, {V4: True, V6: True}),
    (came_in_while_a_sync_ran_and_stuck, 503, 503, True, {V4: False, V6: False}),
    (deleting, 503, 200, False, {V4: True, V6: True}),
    (to_be_deleted_by_autoscaler, 503, 200, False, {V4: True, V6: True}),
    (no_longer_to_be_deleted, 200, 200, True, {V4: True, V6: True}),
    (node_gone, 503, 200, False, {V4: True, V6: True}),
    (another_node_gone, 200, 200, True, {V4: True, V6: True}),
    (deleting_and_stuck, 503, 503, False, {V4: False, V6: False}),
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state[0].__name__)
def test_answers_by_state(state: tuple[Callable[[Bench], None], int, int, bool, dict[str, bool]]) -> None:
    reach, healthz, livez, eligible, families = state
    bench = Bench()
    reach(bench)
    for answer, status in ((bench.health.healthz(), healthz), (bench.health.livez(), livez)):
        said = json.loads(answer.body)
        assert answer.status == status
        assert said["healthy"] is all(families.values())
        assert {f: entry["healthy"] for f, entry in said.get("status", {}).items()} == families
    assert json.loads(bench.health.healthz().body)["nodeEligible"] is eligible
    assert "nodeEligible" not in json.loads(bench.health.livez().body)
    assert bench.health.healthy() is all(families.values())


def test_the_whole_text_when_well_and_when_not() -> None:
    bench = Bench()
    bench.node()
    bench.deliver()
    bench.wait(10)
    assert bench.health.healthz().body == (
        '{"lastUpdated":"2023-11-14T22:30:10.250000Z","currentTime":"2023-11-14T22:30:10.250000Z","nodeEligible":true,'
        '"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:30:00.250000Z","healthy":true},'
        '"IPv6":{"lastUpdated":"2023-11-14T22:30:00.250000Z","healthy":true}}}'
    )
    bench.wait(50)
    assert bench.health.livez().body == (
        '{"lastUpdated":"2023-11-14T22:30:00.250000Z","currentTime":"2023-11-14T22:31:00.250000Z",'
        '"healthy":false,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:30:00.250000Z","healthy":false},'
        '"IPv6":{"lastUpdated":"2023-11-14T22:30:00.250000Z","healthy":false}}}'
    )


def test_before_anything_happened() -> None:
    assert json.loads(Bench().health.healthz().body)["lastUpdated"] == "0001-01-01T00:00:00Z"


def test_a_folder_may_do_without_a_node_but_not_with_a_bad_one() -> None:
    bench = Bench(node_required=False)
    assert bench.health.healthz().status == 200
    bench.node(deleting=True)
    assert bench.health.healthz().status == 503


# -- health check ports


def balanced(
    name: str, number: int, *families: Family, ports: tuple[str, ...] = ("http",), local: bool = True
) -> Service:
    """A load-balanced Service with policy Local and health check port `number`."""
    return Service(
        "ns",
        name,
        tuple(
            ServicePort(
                ServicePortName("ns", name, port, "TCP"),
                family,
                "10.96.0.1" if family is Family.V4 else "fd00:96::1",
                80 + i,
                node_port=30000 + number % 1000 + 1000 * i,
                external_local=local,
                health_check_node_port=number if local else 0,
            )
            for i, port in enumerate(ports)
            for family in families or (Family.V4,)
        ),
    )


def endpoints(
    name: str, *found: tuple[str, str, str], ports: tuple[str, ...] = ("http",), family: Family = Family.V4
) -> EndpointSlice:
    """(address, node, state) of each endpoint."""
    return EndpointSlice(
        "ns",
        f"{name}-{family.value}",
        name,
        family,
        tuple(SlicePort(port, "TCP", 8080 + i) for i, port in enumerate(ports)),
        tuple(
            SliceEndpoint(ip, ready=state == "ready", serving=state != "dead", terminating=state != "ready", node=node)
            for ip, node, state in found
        ),
    )


class Cluster:
    """An agent on fake kernels with the state behind health check ports."""

    def __init__(self) -> None:
        self.bench = Bench(node_required=False)
        self.wanted: list[tuple[str, int]] = []
        self.services = ServiceHealth(self.bench.health, lambda s, number: self.wanted.append((s[1], number)))
        self.kernels = {family: FakeIptables() for family in Family}
        observer = Observers(self.bench.health, self.services)
        self.agent = Agent(Settings(node_name="n1"), iptables, self.kernels, observer=observer)
        self.loop = SyncLoop(self.agent, observer=observer)

    def have(self, *objects: Service | EndpointSlice, deletes: tuple[Ref, ...] = ()) -> None:
        self.loop.deliver(Batch(objects, deletes, synced=True))
        self.loop.inbox.put("reload")
        self.loop.run()
        self.loop._sync(0)

    def answer(self, name: str = "web") -> tuple[int, str, int]:
        answer = self.services.answer(("ns", name))
        said = json.loads(answer.body)
        assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == str(said["localEndpoints"])
        assert said["service"] == {"namespace": "ns", "name": name}
        return answer.status, str(said["serviceProxyHealthy"]), said["localEndpoints"]


HERE, THERE = "n1", "n2"
A, B, C = "10.1.0.1", "10.1.0.2", "10.1.0.3"


@pytest.mark.parametrize(
    ("found", "status", "count"),
    [
        ([], 503, 0),
        ([(A, THERE, "ready")], 503, 0),
        ([(A, HERE, "ready")], 200, 1),
        ([(A, HERE, "ready"), (B, HERE, "ready"), (C, THERE, "ready")], 200, 2),
        ([(A, HERE, "draining")], 503, 0),  # it serves what comes, and asks for no more
        ([(A, HERE, "draining"), (B, HERE, "ready")], 200, 1),
        ([(A, HERE, "dead")], 503, 0),
    ],
)
def test_local_endpoints_are_counted(found: list[tuple[str, str, str]], status: int, count: int) -> None:
    c = Cluster()
    c.have(balanced("web", 32000), endpoints("web", *found))
    assert c.wanted == [("web", 32000)]
    assert c.answer() == (status, "True", count)


def test_a_pod_counts_once_whatever_its_ports_and_families() -> None:
    c = Cluster()
    ports = ("http", "https")
    c.have(
        balanced("web", 32000, *Family, ports=ports),
        endpoints("web", (A, HERE, "ready"), (B, HERE, "ready"), ports=ports),
        endpoints("web", ("fd00::1", HERE, "ready"), ports=ports, family=Family.V6),
    )
    assert c.answer() == (200, "True", 2)


def test_no_endpoint_is_offered_while_the_proxy_is_stuck() -> None:
    c = Cluster()
    c.have(balanced("web", 32000), endpoints("web", (A, HERE, "ready")))
    c.bench.health.delivered(CHANGE)
    c.bench.wait(TIMEOUT)
    assert c.answer() == (503, "False", 1)


def test_ports_come_go_and_change_with_their_services() -> None:
    c = Cluster()
    c.have(balanced("web", 32000), balanced("api", 32001), endpoints("web", (A, HERE, "ready")))
    assert sorted(c.wanted) == [("api", 32001), ("web", 32000)]
    c.wanted.clear()
    c.have(balanced("web", 32005))
    c.have(endpoints("web", (A, HERE, "ready"), (B, HERE, "ready")))
    assert c.answer() == (200, "True", 2)
    c.have(balanced("web", 0, local=False))
    assert c.wanted == [("web", 32005), ("web", 0)]
    c.have(deletes=(Ref("Service", "ns", "api"), Ref("Service", "ns", "web")))
    assert c.wanted == [("web", 32005), ("web", 0), ("api", 0)]
    assert c.services._ports == {}


def test_an_endpoint_is_offered_when_the_kernel_has_it_and_not_before() -> None:
    c = Cluster()
    c.have(balanced("web", 32000), endpoints("web"))
    kernel = c.kernels[Family.V4]

    def locked(line: str) -> None:
        raise TransactionError("another program holds the lock", transient=True)

    kernel.fault = locked
    c.have(endpoints("web", (A, HERE, "ready")))
    assert c.answer() == (503, "True", 0)
    kernel.fault = lambda line: None
    c.have()
    assert c.answer() == (200, "True", 1)


def test_a_change_looks_at_its_own_service_only(monkeypatch: pytest.MonkeyPatch) -> None:
    c = Cluster()
    c.have(*(balanced(f"s{i}", 31000 + i) for i in range(200)))
    looked = []
    real = ServiceHealth._show

    def show(self: ServiceHealth, staged: Any) -> None:
        looked.extend(staged)
        real(self, staged)

    monkeypatch.setattr(ServiceHealth, "_show", show)
    c.have(endpoints("s7", (A, HERE, "ready")))
    assert [key[0].name for key in looked] == ["s7"]
    assert c.answer("s7") == (200, "True", 1)


# -- over real connections


@pytest.fixture
def httpd() -> Iterator[Httpd]:
    httpd = Httpd("test")
    httpd.start()
    yield httpd
    httpd.stop()


class Reports:
    """What a site reports, waited for."""

    def __init__(self) -> None:
        self._new = threading.Condition()
        self.said: list[str] = []

    def __call__(self, wrong: str) -> None:
        with self._new:
            self.said.append(wrong)
            self._new.notify_all()

    def until(self, condition: Callable[[list[str]], bool]) -> None:
        with self._new:
            assert self._new.wait_for(lambda: condition(self.said), 30), self.said


def free_port() -> int:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port: int = server.getsockname()[1]
        return port


def serve(httpd: Httpd, name: str, answer: Answer, host: str = "") -> int:
    port, reports = free_port(), Reports()
    httpd.serve(name, Site(lambda: [(host, port)], lambda path: answer, reports))
    reports.until(lambda said: said == [""])
    return port


def get(port: int, path: str = "/", host: str = "127.0.0.1", method: str = "GET") -> tuple[HTTPResponse, str]:
    connection = HTTPConnection(host, port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response, body


def test_a_machine_without_ipv6_is_served_all_the_same(httpd: Httpd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)  # as with ipv6.disable=1
    port, reports = free_port_v4(), Reports()
    httpd.serve("site", Site(lambda: [("", port)], lambda path: HELLO, reports))
    reports.until(lambda said: said == [""])
    assert get(port)[1] == "hello"


def free_port_v4() -> int:
    with occupied() as port:
        return port


def test_a_fault_with_one_site_costs_no_other(httpd: Httpd, caplog: pytest.LogCaptureFixture) -> None:
    def fault() -> list[tuple[str, int]]:
        raise ValueError("a fault")

    httpd.serve("bad", Site(fault, lambda path: HELLO, Reports()))
    assert get(serve(httpd, "good", HELLO))[1] == "hello"
    assert "cannot serve bad: please report this" in caplog.text


@contextmanager
def occupied(host: str = "") -> Iterator[int]:
    """A port that somebody else listens on; free again afterwards."""
    with socket.create_server((host or "127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


HELLO = Answer(200, {"Content-Type": "text/plain", "X-Test": "1"}, "hello")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_all_addresses_means_both_families(httpd: Httpd, host: str) -> None:
    response, body = get(serve(httpd, "x", HELLO), host=host)
    assert (response.status, body, response.headers["X-Test"]) == (200, "hello", "1")


@pytest.mark.parametrize(("bound", "refused"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1"), ("0.0.0.0", "::1")])
def test_one_address_means_no_other(httpd: Httpd, bound: str, refused: str) -> None:
    port = serve(httpd, "x", HELLO, bound)
    assert get(port, host="127.0.0.1" if bound == "0.0.0.0" else bound)[1] == "hello"
    with pytest.raises(ConnectionRefusedError):
        get(port, host=refused)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:10256", ("", 10256)),
        ("[::]:10256", ("", 10256)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:2", ("::1", 2)),
    ],
)
def test_addresses_of_settings(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


def test_paths_queries_and_methods(httpd: Httpd) -> None:
    port, reports = free_port(), Reports()
    httpd.serve("x", Site(lambda: [("", port)], routes({"/healthz": lambda: HELLO}), reports))
    reports.until(lambda said: said == [""])
    assert get(port, "/healthz?verbose")[1] == "hello"
    assert get(port, "/healthz", method="HEAD")[1] == ""
    assert get(port, "/healthz", method="POST")[1] == "hello"
    response, body = get(port, "/other")
    assert (response.status, body) == (404, "404 page not found\n")


def test_a_connection_carries_many_requests(httpd: Httpd) -> None:
    connection = HTTPConnection("127.0.0.1", serve(httpd, "x", HELLO), timeout=10)
    for _ in range(3):
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"hello"
        assert connection.sock is not None
    connection.close()


@pytest.mark.parametrize("rubbish", [b"\0\1\2\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"x" * 100_000])
def test_rubbish_harms_nobody(httpd: Httpd, rubbish: bytes) -> None:
    port = serve(httpd, "x", HELLO)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(rubbish)
        try:
            answer = client.recv(1 << 16)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or b" 400 " in answer or b" 505 " in answer
    assert get(port)[1] == "hello"


def test_silent_clients_keep_nobody_from_an_answer(httpd: Httpd) -> None:
    port = serve(httpd, "x", HELLO)
    silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(600)]
    try:
        silent[-1].sendall(b"GET / HT")
        assert get(port)[1] == "hello"
    finally:
        for client in silent:
            client.close()


def test_a_handler_that_fails_answers_500(httpd: Httpd) -> None:
    port, reports = free_port(), Reports()

    def broken(path: str) -> Answer:
        raise ValueError("oops")

    httpd.serve("x", Site(lambda: [("", port)], broken, reports))
    reports.until(lambda said: said == [""])
    assert get(port)[0].status == 500


def test_a_port_that_is_taken_is_reported_once_and_had_when_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniproxy.httpd.RETRY_SECONDS", 0.02)
    httpd = Httpd("quick")
    httpd.start()
    try:
        reports = Reports()
        with occupied() as port:
            asked = threading.Semaphore(0)

            def where() -> list[tuple[str, int]]:
                asked.release()
                return [("127.0.0.1", port)]

            httpd.serve("x", Site(where, lambda path: HELLO, reports))
            for _ in range(5):
                assert asked.acquire(timeout=30)
            assert reports.said == [f"cannot listen on 127.0.0.1:{port}: Address already in use"]
        reports.until(lambda said: said[1:] == [""])
        assert get(port)[1] == "hello"
    finally:
        httpd.stop()


def test_addresses_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniproxy.httpd.REFRESH_SECONDS", 0.02)
    httpd = Httpd("quick")
    httpd.start()
    try:
        port = free_port()
        addresses = ["127.0.0.1", "127.0.0.2"]
        asked = threading.Semaphore(0)

        def where() -> list[tuple[str, int]]:
            asked.release()
            return [(a, port) for a in addresses]

        reports = Reports()
        httpd.serve("x", Site(where, lambda path: HELLO, reports))
        reports.until(lambda said: said == [""])
        assert get(port, host="127.0.0.2")[1] == "hello"
        addresses[:] = ["127.0.0.1", "127.0.0.3"]
        while asked.acquire(blocking=False):
            pass
        for _ in range(3):
            assert asked.acquire(timeout=30)
        assert get(port, host="127.0.0.1")[1] == get(port, host="127.0.0.3")[1] == "hello"
        with pytest.raises(ConnectionRefusedError):
            get(port, host="127.0.0.2")
    finally:
        httpd.stop()


def test_what_is_closed_is_closed_with_its_connections(httpd: Httpd) -> None:
    port = serve(httpd, "x", HELLO)
    other = serve(httpd, "y", HELLO)
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/")
    connection.getresponse().read()
    httpd.close("x")
    serve(httpd, "z", HELLO)  # what is asked for happens in order
    sock = connection.sock
    assert sock is not None
    try:
        rest = sock.recv(1)
    except ConnectionResetError:
        rest = b""
    assert rest == b""
    with pytest.raises(ConnectionRefusedError):
        get(port)
    assert get(other)[1] == "hello"


# -- all of it together


class Whole:
    """Monitoring on free ports with an agent on fake kernels, driven by hand."""

    def __init__(self, **fields: Any) -> None:
        self.healthz, self.metrics = free_port(), free_port()
        settings: dict[str, Any] = {
            "node_name": "n1",
            "source": "manifests",
            "healthz_bind_address": f"0.0.0.0:{self.healthz}",
            "metrics_bind_address": f"127.0.0.1:{self.metrics}",
        }
        self.settings = Settings(**(settings | fields))
        self.kernels = {family: FakeIptables() for family in Family}
        source = ManifestSource("manifests")
        self.monitoring = Monitoring(self.settings, list(Family), source, lambda family: ["127.0.0.1", "127.0.0.9"])
        self.stopped = threading.Event()
        observer = self.monitoring.observer
        agent = Agent(self.settings, iptables, self.monitoring.backends(self.kernels), observer=observer)
        self.loop = SyncLoop(agent, observer=observer)

    def __enter__(self) -> Whole:
        self.monitoring.start(self.stopped.set)
        return self

    def __exit__(self, *_: object) -> None:
        self.monitoring.stop()

    def have(self, *objects: Service | EndpointSlice | Node, deletes: tuple[Ref, ...] = ()) -> None:
        self.loop.deliver(Batch(objects, deletes, synced=True))
        self.loop.inbox.put("reload")
        self.loop.run()
        self.loop._sync(0)

    def get(self, port: int, path: str = "/", host: str = "127.0.0.1") -> tuple[HTTPResponse, str]:
        """An answer; a site that has just been asked for is waited for."""
        for _ in range(3000):
            try:
                return get(port, path, host)
            except ConnectionRefusedError:
                threading.Event().wait(0.01)
        return get(port, path, host)


def test_a_service_s_health_check_port_opens_tells_and_closes() -> None:
    number = free_port()
    with Whole() as whole:
        whole.have(balanced("web", number), endpoints("web", (A, HERE, "ready")))
        for host in ("127.0.0.1", "::1"):
            response, body = whole.get(number, "/anything", host)
            assert (response.status, response.headers["X-Load-Balancing-Endpoint-Weight"]) == (200, "1")
            assert body == (
                '{\n\t"service": {\n\t\t"namespace": "ns",\n\t\t"name": "web"\n\t},\n'
                '\t"localEndpoints": 1,\n\t"serviceProxyHealthy": true\n}'
            )
            assert response.headers["Content-Type"] == "application/json"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        whole.have(endpoints("web"))
        assert whole.get(number)[0].status == 503
        assert whole.get(whole.healthz, "/livez")[0].status == 200
        whole.have(deletes=(Ref("Service", "ns", "web"),))
        other = free_port()
        whole.have(balanced("api", other))
        whole.get(other)  # asked for after the other was closed
        with pytest.raises(ConnectionRefusedError):
            get(number)


def test_node_port_addresses_decide_where_health_check_ports_are() -> None:
    number = free_port()
    with Whole(node_port_addresses=("127.0.0.8/31", "::1/128")) as whole:
        whole.have(balanced("web", number))
        assert whole.get(number, host="127.0.0.9")[0].status == 503
        for host in ("127.0.0.1", "::1"):
            with pytest.raises(ConnectionRefusedError):
                get(number, host=host)


def test_primary_means_the_node_s_own_address() -> None:
    number = free_port()
    with Whole(node_port_addresses=("primary",)) as whole:
        whole.have(Node("n1", ips=("127.0.0.7", "::1")), balanced("web", number))
        assert whole.get(number, host="127.0.0.7")[0].status == 503
        assert whole.get(number, host="::1")[0].status == 503
        with pytest.raises(ConnectionRefusedError):
            get(number, host="127.0.0.1")


def test_a_health_check_port_that_is_taken_is_a_problem_until_it_is_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("miniproxy.httpd.RETRY_SECONDS", 0.02)
    caplog.set_level("INFO", "miniproxy")
    with Whole() as whole:
        with occupied() as number:
            whole.have(balanced("web", number), endpoints("web", (A, HERE, "ready")))
            problem = 'miniproxy_problems{kind="Service",what="FailedToStartServiceHealthcheck"} '
            wait_for(lambda: f"{problem}1.0" in whole.get(whole.metrics, "/metrics")[1])
            assert f"Service ns/web: spec.healthCheckNodePort: cannot listen on *:{number}" in caplog.text
        assert whole.get(number)[0].status == 200
        wait_for(lambda: f"{problem}0.0" in whole.get(whole.metrics, "/metrics")[1])
        assert "mended: Service ns/web" in caplog.text


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("did not come to pass")


def test_the_metrics_server_s_pages() -> None:
    with Whole() as whole:
        page, body = whole.get(whole.metrics, "/metrics")
        assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram" in body
        assert whole.get(whole.metrics, "/healthz")[1] == "ok"
        mode, body = whole.get(whole.metrics, "/proxyMode")
        assert (body, mode.headers["Content-Type"]) == ("iptables", "text/plain; charset=utf-8")
        config = json.loads(whole.get(whole.metrics, "/configz")[1])["kubeproxy.config.k8s.io"]
        assert (config["kind"], config["iptables"]["syncPeriod"]) == ("KubeProxyConfiguration", "30s")
        with pytest.raises(OSError):  # noqa: PT011  # refused, or no such address: not served there in any case
            get(whole.metrics, "/metrics", "::1")


def test_what_is_not_asked_for_is_not_served() -> None:
    with Whole(healthz_bind_address="", metrics_bind_address="") as whole:
        number = free_port()
        whole.have(balanced("web", number))
        assert whole.get(number)[0].status == 503
        for port in (whole.healthz, whole.metrics):
            with pytest.raises(ConnectionRefusedError):
                get(port)


@pytest.mark.parametrize("hard", [False, True])
def test_an_address_that_is_taken_stops_the_agent_only_if_that_was_asked_for(
    hard: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with occupied() as port:
        where = f"127.0.0.1:{port}"
        with Whole(healthz_bind_address=where, bind_address_hard_fail=hard) as whole:
            wait_for(lambda: f"health is not served: cannot listen on {where}" in caplog.text)
            wait_for(lambda: whole.stopped.is_set() is hard)
            assert bool(whole.monitoring.fatal) is hard
