"""The IPVS writer against a real kernel: what is written reads back as planned, and what is not ours stays."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as fixed
from hypothesis import strategies as st

from miniproxy.backends import cleanup
from miniproxy.kernel import ipvs as kernel
from miniproxy.kernel import links
from miniproxy.kernel.ipvs import Ipvs
from miniproxy.model import Batch, Family, Object, Service, ServicePort, ServicePortName
from miniproxy.planner import ipvs
from miniproxy.planner.ipvs_text import IpSet, SetEntry
from miniproxy.transaction import Transaction, TransactionError
from tests import cluster, world
from tests.golden_rules import golden
from tests.packets.topology import settle

from . import golden_state, space
from .space import SETTINGS, Node, run
from .test_planner import golden_objects
from .texts import parse_sets

pytestmark = pytest.mark.ipvs

ALL_SETS = [ipvs.set_name(name, family) for name in ipvs.SETS for family in Family]


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with space.network_namespace():
        yield


def sets() -> set[IpSet | SetEntry]:
    return set(parse_sets(run("ipset", "save"), ALL_SETS))


def test_golden_objects_give_the_golden_kernel_state() -> None:
    node = Node(golden_objects())
    node.dataplane.prepare()
    node.sync()
    assert golden_state.server_differences(space.servers()) == []
    assert space.addresses() == golden_state.addresses()
    assert golden_state.sets()[0] <= sets()
    assert golden_state.entry_differences(e for e in sets() if isinstance(e, SetEntry)) == []
    for family in Family:
        assert golden_state.rule_differences(family, space.rules(family)) == []
    assert node.sync() == []
    again = Node(golden_objects())
    assert again.sync() == [], "a restart writes nothing"


def test_golden_sysctls() -> None:
    Node([]).dataplane.prepare()
    for line in golden("ipvs-sysctl.txt").splitlines():
        name, _, value = line.partition(" = ")
        if name.startswith("net.ipv4.vs.") and name.rpartition(".")[2] not in ("sync_qlen_max", "debug_level"):
            assert run("sysctl", "-n", name).split() == value.split(), name


def test_strict_arp_and_timeouts() -> None:
    chosen = msgspec.structs.replace(SETTINGS, ipvs_strict_arp=True, ipvs_tcp_timeout=1000.0, ipvs_udp_timeout=77.0)
    Node([], chosen).dataplane.prepare()
    assert run("ipvsadm", "-L", "--timeout").split() == ["Timeout", "(tcp", "tcpfin", "udp):", "1000", "120", "77"]
    assert run("sysctl", "-n", "net.ipv4.conf.all.arp_ignore", "net.ipv4.conf.all.arp_announce").split() == ["1", "2"]


Worlds = st.tuples(st.tuples(*(world.services(name) for name in world.NAMES)), st.lists(world.slices(), max_size=8))


@given(before=Worlds, after=Worlds)
@settings(max_examples=3, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_what_is_written_reads_back_as_planned(before: Any, after: Any) -> None:
    with space.network_namespace():
        node = Node([*before[0], *before[1]])
        node.sync()
        node.apply(*after[0], *after[1])
        for family, reconciler in node.agent.reconcilers.items():
            assert reconciler.adopt() == 0, family
            assert reconciler.backend.read() == reconciler.desired, family
        for server in space.servers():
            assert all(real.weight == 1 or server.protocol == "TCP" for real in server.servers)


def test_several_namespaces_with_ipvs_are_told_apart() -> None:
    """The nodes of kind are such. Some 30 virtual servers fill a page of /proc/net/ip_vs, and at the next the kernel
    passes over as many as other namespaces had before.
    """
    objects = [thing for n in range(100) for thing in (cluster.service(n), cluster.endpoints(n, 2))]
    Node(objects).sync()
    with space.network_namespace():
        node = Node(objects)
        node.sync()
        assert node.agent.reconcilers[Family.V4].adopt() == 0
        assert sum(len(server.servers) for server in space.servers()) == 200


@cache
def world_of(seed: int) -> list[Object]:
    """A random world that is the same each time."""
    found: list[Object] = []

    @given(st.data())
    @settings(max_examples=1, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    def draw(data: st.DataObject) -> None:
        found[:] = [data.draw(world.services(name)) for name in world.NAMES]
        found.extend(data.draw(st.lists(world.slices(), min_size=4, max_size=8)))

    fixed(seed)(draw)()
    return found


# -- what is not ours

FOREIGN_SERVERS = """-A -t 203.0.113.9:80 -s wlc
-a -t 203.0.113.9:80 -r 10.9.9.9:80 -g -w 5
-A -t 172.30.0.2:8443 -s rr
-A -u 172.30.0.2:30000 -s rr
-A -f 7 -s rr
-A -t [fd00:30::2]:8443 -s rr
"""
FOREIGN_SETS = """create MINE hash:ip family inet hashsize 1024 maxelem 65536 bucketsize 12
add MINE 10.1.1.1
create KUBE-MINE hash:ip,port family inet hashsize 1024 maxelem 65536 bucketsize 12
"""


def foreign() -> tuple[list[str], list[str], str]:
    """What others have made: virtual servers and sets, and addresses of other links."""
    kept = [line for line in FOREIGN_SERVERS.splitlines() if line in run("ipvsadm", "-Sn").splitlines()]
    others = "\n".join(
        line for line in run("ip", "-o", "addr").splitlines() if "kube-ipvs0" not in line and "fe80" not in line
    )
    return kept, [line for line in FOREIGN_SETS.splitlines() if line in run("ipset", "save")], others


def test_what_others_made_survives_start_changes_a_crash_and_cleanup() -> None:
    space.ip("link add other0 type dummy", "addr add 10.96.0.1/32 dev other0", "addr add 10.50.0.9/32 dev other0")
    run("ipvsadm", "-R", stdin=FOREIGN_SERVERS)
    run("ipset", "restore", stdin=FOREIGN_SETS)
    before = foreign()
    assert before[:2] == (FOREIGN_SERVERS.splitlines(), FOREIGN_SETS.splitlines())
    rng = random.Random("foreign")
    node = Node(world_of(1))
    node.sync()
    assert foreign() == before
    for step in range(100):
        node.apply(*world_of(rng.randrange(10)))
        if step % 20 == 7:  # as after kill -9: nothing is remembered
            node = Node(world_of(rng.randrange(10)))
            node.sync()
    assert foreign() == before
    assert space.servers() != []
    cleanup()
    assert foreign() == before
    assert sets() == set()
    assert "KUBE" not in space.rules(Family.V4) + space.rules(Family.V6)
    assert "kube-ipvs0" not in run("ip", "link")
    assert len(run("ipvsadm", "-Sn").splitlines()) == len(FOREIGN_SERVERS.splitlines())


def test_an_agent_that_was_killed_leaves_nothing_for_ever() -> None:
    """Stale virtual servers and addresses are known by the sets and the link."""
    Node(golden_objects()).sync()
    Node([]).sync()
    assert space.servers() == []
    assert space.addresses() == set()
    assert not [e for e in sets() if isinstance(e, SetEntry)]


def test_excluded_ranges_are_left_alone() -> None:
    run("ip", "link", "add", "kube-ipvs0", "type", "dummy")
    run("ip", "addr", "add", "203.0.113.9/32", "dev", "kube-ipvs0")
    run("ipvsadm", "-R", stdin="-A -t 203.0.113.9:80 -s wlc\n")
    chosen = msgspec.structs.replace(SETTINGS, ipvs_exclude_cidrs=("203.0.113.0/24",))
    Node(golden_objects(), chosen).sync()
    assert "-A -t 203.0.113.9:80 -s wlc" in run("ipvsadm", "-Sn")
    Node(golden_objects()).sync()
    assert "203.0.113.9:80" not in run("ipvsadm", "-Sn")


# -- faults and drift


@pytest.mark.parametrize("stop_after", range(4))
def test_a_failure_between_two_parts_converges(stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(golden_objects())
    done = [0]
    whole = kernel.IpvsBackend._apply

    def failing(self: Any, section: Any) -> None:
        if done[0] == stop_after:
            raise TransactionError("injected", transient=True)
        done[0] += 1
        whole(self, section)

    monkeypatch.setattr(kernel.IpvsBackend, "_apply", failing)
    assert next(iter(node.agent.sync())).error == "injected"
    monkeypatch.undo()
    node.sync()
    assert golden_state.server_differences(space.servers()) == []
    assert space.addresses() == golden_state.addresses()
    assert Node(golden_objects()).sync() == []


def test_iptables_modes_rules_serve_until_all_that_takes_their_place_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many services there are: beyond a batch, too."""
    monkeypatch.setattr(kernel, "_BATCH", 5)
    many = [thing for n in range(10) for thing in (cluster.service(n), cluster.endpoints(n, 2))]
    objects = [*golden_objects(), *many]
    Node(objects, msgspec.structs.replace(SETTINGS, mode="iptables")).sync()
    node = Node(objects)
    transactions = node.sync()
    assert len(transactions) == len(Family)
    for transaction in transactions:
        lines = transaction.text.splitlines()
        replaced = lines.index("*nat")
        served = [n for n, line in enumerate(lines) if line.startswith(("-A -", "-A --sctp", "-a ", "addr add "))]
        assert len(served) > 20
        assert max(served) < replaced
    assert node.sync() == []
    assert all(reconciler.adopt() == 0 for reconciler in node.agent.reconcilers.values())
    assert not any("KUBE-SVC-" in line for line in run("iptables-legacy-save").splitlines())


def test_drift_is_repaired() -> None:
    node = Node(golden_objects())
    node.sync()
    run("ipvsadm", "-D", "-t", "10.97.0.1:80")
    run("ipvsadm", "-d", "-t", "10.97.0.3:80", "-r", "10.180.1.1:8080")
    run("ipvsadm", "-e", "-t", "10.97.0.4:80", "-r", "10.180.2.1:8080", "-m", "-w", "9")
    run("ipvsadm", "-a", "-t", "10.97.0.5:80", "-r", "10.9.9.9:80", "-m")
    run("ipset", "del", "KUBE-CLUSTER-IP", "10.97.0.1,tcp:80")
    run("ipset", "add", "KUBE-LOAD-BALANCER", "10.9.9.9,tcp:80")
    run("ip", "addr", "del", "10.97.0.7/32", "dev", "kube-ipvs0")
    run("iptables-legacy", "-t", "nat", "-F", "KUBE-SERVICES")
    assert sum(node.agent.check().values()) == 8
    node.sync()
    node.agent.check()
    assert node.sync() == []
    node.dataplane.tick()  # the real server that should not be there has no connection
    assert golden_state.server_differences(space.servers()) == []
    assert space.addresses() == golden_state.addresses()


def test_a_missing_link_is_made_again() -> None:
    node = Node(golden_objects())
    node.sync()
    run("ip", "link", "del", "kube-ipvs0")
    node.agent.check()
    node.sync()
    assert space.addresses() == golden_state.addresses()


def test_node_ports_follow_the_nodes_addresses() -> None:
    node = Node(golden_objects())
    node.sync()
    run("ip", "addr", "add", "172.30.7.7/24", "dev", "eth0")
    run("ip", "addr", "del", "172.30.9.2/24", "dev", "eth0")
    node.agent.plan_frame()
    node.sync()
    at = {s.address for s in space.servers() if s.port == 30001}
    assert at == {"172.30.0.2", "172.30.7.7"}
    # and an external IP that becomes an address of the node is no longer one of kube-ipvs0
    run("ip", "addr", "add", "198.18.0.11/32", "dev", "eth0")
    node.agent.plan_frame()
    node.sync()
    assert "198.18.0.11" not in space.addresses()


def test_a_set_of_another_type_in_the_way_is_named() -> None:
    run("ipset", "create", "KUBE-CLUSTER-IP", "hash:net")
    node = Node(golden_objects())
    errors = [r.error for r in node.agent.sync()]
    assert "KUBE-CLUSTER-IP" in errors[0]
    assert errors[1] == "", "the other family goes on"


# -- schedulers


def service(scheduler: str) -> Service:
    name = ServicePortName("ns", "svc", "http", "TCP")
    return Service("ns", "svc", (ServicePort(name, Family.V4, "10.96.0.1", 80, scheduler=scheduler),))


def test_schedulers_by_annotation() -> None:
    node = Node([])
    for name in ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "fo", "ovf", "mh"):
        node.apply(service(name))
        assert [s.scheduler for s in space.servers()] == [name]
    node.apply(service("mh,mh-port,mh-fallback"))
    assert "-A -t 10.96.0.1:80 -s mh -b mh-fallback,mh-port" in run("ipvsadm", "-Sn")
    assert node.agent.check() == dict.fromkeys(Family, 0)
    assert node.problems == []


def test_a_scheduler_the_kernel_does_not_have_is_reported_and_the_global_one_used() -> None:
    node = Node([service("nosuch")], msgspec.structs.replace(SETTINGS, ipvs_scheduler="wrr"))
    node.sync()
    assert [s.scheduler for s in space.servers()] == ["wrr"]
    assert len(node.problems) == 1
    assert "Service ns/svc" in node.problems[0]
    assert "modprobe ip_vs_nosuch" in node.problems[0]
    node.agent.check()
    assert node.sync() == []


def test_a_global_scheduler_the_kernel_does_not_have_is_an_error() -> None:
    with pytest.raises(TransactionError, match=r"no IPVS scheduler 'nosuch'.*modprobe ip_vs_nosuch"):
        Node([], msgspec.structs.replace(SETTINGS, ipvs_scheduler="nosuch")).dataplane.prepare()


def test_probing_a_scheduler_leaves_nothing() -> None:
    with Ipvs.open() as opened:
        assert opened.has_scheduler("sed")
        assert not opened.has_scheduler("nosuch")
    assert space.servers() == []


# -- results of single operations


def test_repeating_a_transaction_is_no_failure() -> None:
    node = Node(golden_objects())
    for transaction in node.sync():
        if "icmp6" not in transaction.text and "KUBE-6" not in transaction.text:
            without = transaction.text.split("# iptables-restore")[0]
            node.dataplane.backends[Family.V4].apply(Transaction.of(without))
    tail = "# ipvsadm --restore\n-A -t 10.97.0.1:80 -s rr\n-a -t 10.97.0.1:80 -r 10.180.0.1:8080 -m -w 1\n"
    gone = "-D -t 10.99.9.9:80\n-d -t 10.97.0.1:80 -r 10.9.9.9:1\n-e -t 10.97.0.1:80 -r 10.9.9.9:1 -m -w 0\n"
    node.dataplane.backends[Family.V4].apply(Transaction.of(tail + gone))
    assert golden_state.server_differences(space.servers()) == []


def test_a_refusal_names_the_virtual_server() -> None:
    backend = Node([]).dataplane.backends[Family.V4]
    text = "# ipvsadm --restore\n-A -t 10.1.1.1:80 -s nosuch\n-A -t 10.1.1.2:80 -s rr\n"
    with pytest.raises(TransactionError, match=r"10\.1\.1\.1 port 80.*no scheduler 'nosuch'") as caught:
        backend.apply(Transaction.of(text))
    assert not caught.value.transient
    assert [s.address for s in space.servers()] == ["10.1.1.2"], "the others are made all the same"


def test_one_endpoint_costs_the_same_however_many_services() -> None:
    from tests import cluster

    few, many = [[o for n in range(count) for o in (cluster.service(n), cluster.endpoints(n, 2))] for count in (3, 300)]
    costs = []
    for objects in (few, many):
        node = Node(objects)
        node.sync()
        (transaction,) = node.apply(cluster.endpoints(1, 3))
        costs.append(transaction.text.splitlines())
    assert costs[0] == costs[1] == ["# ipvsadm --restore", "-a -t 10.96.0.1:80 -r 10.128.0.18:8080 -m -w 1"]
    node.agent.handle(Batch())
    assert node.sync() == []


def test_only_the_nodes_own_addresses_are_news() -> None:
    """VIPs come and go by the thousand, and are the agent's own doing."""
    news: list[int] = []
    over = threading.Event()
    # A new thread is in the namespace of the one that starts it.
    watching = threading.Thread(target=links.watch, args=(lambda: news.append(1), over.is_set))
    watching.start()
    try:
        Node(golden_objects()).sync()
        time.sleep(1)
        assert news == []
        run("ip", "addr", "add", "172.30.7.7/24", "dev", "eth0")
        assert settle(lambda: news != [], seconds=10)
    finally:
        over.set()
        watching.join()
