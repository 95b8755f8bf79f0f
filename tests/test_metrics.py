"""The metrics: kube-proxy's are what its page shows, ours count what happens, and whoever names one names it right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.flows import Stale
from miniproxy.kernel import counters
from miniproxy.kernel.exec import Completed
from miniproxy.metrics import Metrics
from miniproxy.model import Batch, EndpointSlice, Family, Kind, Node, Object, Service
from miniproxy.observer import ObservedBackend, ObservedConntrack
from miniproxy.planner import iptables
from miniproxy.series import SERIES, Series
from miniproxy.sources.wire import convert
from miniproxy.syncloop import SyncLoop
from miniproxy.transaction import TransactionError
from tests import cluster
from tests.fake_iptables import FakeIptables
from tests.golden_rules import golden

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(node_name="n1", cluster_cidrs=("10.128.0.0/9", "fd00:128::/32"))

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Conntrack:
    """A conntrack that has one stale flow of each kind it is asked to forget."""

    def forget(self, stale: Iterable[Stale]) -> int:
        return len(list(stale))


class Bench:
    """An agent on fake kernels with metrics, driven by hand."""

    def __init__(self, *families: Family, **options: Any) -> None:
        self.now = 1_700_000_000.0
        self.families = families or tuple(Family)
        self.metrics = Metrics("iptables", self.families, wall=lambda: self.now, **options)
        self.kernels = {family: FakeIptables() for family in self.families}
        backends = {family: ObservedBackend(self.kernels[family], family, self.metrics) for family in self.families}
        conntrack = ObservedConntrack(Conntrack(), self.metrics)
        self.agent = Agent(SETTINGS, iptables, backends, conntrack=conntrack, observer=self.metrics)
        self.loop = SyncLoop(self.agent, observer=self.metrics)

    def deliver(self, *objects: Object) -> None:
        self.loop.deliver(Batch(objects, synced=True))

    def sync(self, seconds: float = 0.0) -> None:
        """Let time pass, take in what was delivered, write it."""
        self.now += seconds
        self.loop.inbox.put("reload")
        self.loop.run()
        self.loop._sync(0)

    def have(self, *objects: Object) -> None:
        self.deliver(*objects)
        self.sync()

    def value(self, name: str, **labels: str) -> float:
        return samples(self.page())[name, frozenset(labels.items())]

    def page(self) -> str:
        return self.metrics.page().body


def samples(page: str) -> Samples:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }


def kube_proxys(page: str) -> dict[str, tuple[str, set[tuple[str, frozenset[tuple[str, str]]]]]]:
    """By metric of kube-proxy: its type, and its samples' names and labels."""
    return {
        family.name: (family.type, {(s.name, frozenset(s.labels.items())) for s in family.samples})
        for family in text_string_to_metric_families(page)
        if family.name.startswith("kubeproxy_")
    }


def golden_objects() -> list[Object]:
    files: tuple[tuple[Kind, str], ...] = (("Service", "services.json"), ("EndpointSlice", "endpointslices.json"))
    converted = [convert(item, kind) for kind, file in files for item in json.loads(golden(file))["items"]]
    converted.append(convert(json.loads(golden("node.json"))))
    return [c.object for c in converted if c.object]


def filled() -> Bench:
    bench = Bench()
    bench.have(*golden_objects())
    return bench


# -- kube-proxy's


def test_iptables_mode_shows_every_series_that_kube_proxy_shows() -> None:
    theirs, ours = kube_proxys(golden("metrics-iptables.txt")), kube_proxys(filled().page())
    assert len(theirs) == 15
    for name, (kind, expected) in theirs.items():
        assert ours[name][0] == kind, name
        assert expected <= ours[name][1], name


def test_nftables_mode_shows_every_series_that_kube_proxy_shows() -> None:
    metrics = Metrics("nftables", list(Family))
    theirs, ours = kube_proxys(golden("metrics-nftables.txt")), kube_proxys(metrics.page().body)
    assert len(theirs) == 11
    for name, (kind, expected) in theirs.items():
        assert ours[name][0] == kind, name
        # A gauge has no value before there is something to say; counters and histograms begin at 0.
        assert expected <= ours[name][1] or kind == "gauge", name
    assert not [name for name in ours if "iptables" in name]


def test_help_texts_are_kube_proxys() -> None:
    def helps(page: str) -> dict[str, str]:
        return dict(re.findall(r"^# HELP (kubeproxy_\w+) (.*)$", page, re.MULTILINE))

    ours = helps(filled().page())
    for mode in ("iptables", "nftables"):
        ours |= helps(Metrics(mode, list(Family)).page().body)
        assert helps(golden(f"metrics-{mode}.txt")).items() <= ours.items()


def test_values_that_follow_from_the_objects_are_kube_proxys() -> None:
    theirs, ours = samples(golden("metrics-iptables.txt")), samples(filled().page())
    name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    assert {k: v for k, v in ours.items() if k[0] == name} == {k: v for k, v in theirs.items() if k[0] == name}


def test_the_page_is_in_the_form_of_kube_proxys() -> None:
    bench = filled()
    assert "_created" not in bench.page()
    assert bench.metrics.page().headers["Content-Type"].startswith("text/plain; version=0.0.4")


def test_network_programming_buckets() -> None:
    """0.25, 0.5, 1 to 59, 60 to 115 by 5, 120 to 300 by 30, and kube-proxy's 0; written as Go does."""
    bounds = re.findall(
        r'^kubeproxy_network_programming_duration_seconds_bucket\{ip_family="IPv4",le="(.*)"\}', filled().page(), re.M
    )
    expected = ["0", "0.25", "0.5", *range(1, 60), *range(60, 116, 5), *range(120, 301, 30), "+Inf"]
    assert bounds == [str(b) for b in expected]


# -- what counts as what


def test_changes_are_pending_until_a_sync_has_covered_them() -> None:
    bench = Bench()
    bench.deliver(cluster.service(1), cluster.service(2))
    bench.deliver(cluster.endpoints(1, 2))
    pending = "kubeproxy_sync_proxy_rules_{}_changes_pending".format
    assert (bench.value(pending("service")), bench.value(pending("endpoint"))) == (2, 1)
    bench.sync()
    assert (bench.value(pending("service")), bench.value(pending("endpoint"))) == (0, 0)
    total = "kubeproxy_sync_proxy_rules_{}_changes_total".format
    assert (bench.value(total("service")), bench.value(total("endpoint"))) == (2, 1)


def test_a_change_that_a_sync_did_not_see_stays_pending() -> None:
    bench = Bench()
    bench.have(cluster.service(1))
    real = bench.agent.sync

    def sync() -> Any:
        bench.deliver(cluster.service(3))
        return real()

    bench.agent.sync = sync  # type: ignore[method-assign]
    bench.have(cluster.service(2))
    assert bench.value("kubeproxy_sync_proxy_rules_service_changes_pending") == 1
    assert bench.value("miniproxy_event_to_kernel_seconds_count", ip_family="IPv4") == 2


def test_full_and_partial_syncs() -> None:
    bench = Bench(Family.V4)
    bench.have(cluster.service(1))
    bench.have(cluster.service(2))
    bench.agent.check()
    bench.sync()
    counts = {
        kind: bench.value(f"kubeproxy_sync_{kind}proxy_rules_duration_seconds_count", ip_family="IPv4")
        for kind in ("", "full_", "partial_")
    }
    assert counts == {"": 3, "full_": 2, "partial_": 1}


def test_latencies() -> None:
    bench = Bench(Family.V4)
    old = cluster.endpoints(1, 1)
    bench.deliver(cluster.service(1), _triggered(old, bench.now - 3600))
    bench.sync(seconds=2.0)
    bench.deliver(_triggered(cluster.endpoints(1, 2), bench.now - 5))
    bench.sync(seconds=0.5)
    own = "miniproxy_event_to_kernel_seconds"
    assert bench.value(f"{own}_count", ip_family="IPv4") == 2
    assert bench.value(f"{own}_sum", ip_family="IPv4") == pytest.approx(2.5)
    whole = "kubeproxy_network_programming_duration_seconds"
    assert bench.value(f"{whole}_count", ip_family="IPv4") == 0  # both are from before the process
    bench.now += 100
    bench.deliver(_triggered(cluster.endpoints(1, 3), bench.now - 5))
    bench.sync(seconds=0.5)
    assert bench.value(f"{whole}_sum", ip_family="IPv4") == pytest.approx(5.5)


def _triggered(slice_: EndpointSlice, when: float) -> EndpointSlice:
    import msgspec

    return msgspec.structs.replace(slice_, triggered=when)


def test_a_family_that_fails_has_the_latency_of_its_recovery() -> None:
    bench = Bench()
    bench.have(cluster.service(1))
    queued = bench.now

    def broken(line: str) -> None:
        raise TransactionError("no memory", transient=True)

    bench.kernels[Family.V6].fault = broken
    node = Node("n1", ips=("192.0.2.1", "2001:db8::1"))
    bench.deliver(node, _v6_service())
    bench.sync(seconds=1)
    assert bench.value("kubeproxy_sync_proxy_rules_last_timestamp_seconds", ip_family="IPv4") == queued + 1
    assert bench.value("kubeproxy_sync_proxy_rules_last_timestamp_seconds", ip_family="IPv6") == queued
    bench.kernels[Family.V6].fault = lambda line: None
    bench.sync(seconds=9)
    own = "miniproxy_event_to_kernel_seconds_sum"
    assert bench.value(own, ip_family="IPv4") == pytest.approx(1)
    assert bench.value(own, ip_family="IPv6") == pytest.approx(10)
    assert bench.value("miniproxy_transaction_failures_total", backend="iptables", ip_family="IPv6") == 1
    assert bench.value("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", ip_family="IPv6") == 1
    assert bench.value("kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total", ip_family="IPv6") == 1
    assert bench.value("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", ip_family="IPv4") == 0


def _v6_service() -> Service:
    import msgspec

    service = cluster.service(9)
    ports = tuple(msgspec.structs.replace(p, family=Family.V6, cluster_ip="fd00::9") for p in service.ports)
    return Service(service.namespace, service.name, ports)


def test_rules_and_objects_are_those_in_the_kernel() -> None:
    bench = filled()

    def check() -> None:
        for family, kernel in bench.kernels.items():
            for table in ("filter", "nat"):
                owned = sum(len(rules) for rules in kernel.tables[table].values())
                name = "kubeproxy_sync_proxy_rules_iptables_total"
                assert bench.value(name, ip_family=str(family), table=table) == owned
            objects = bench.value("miniproxy_objects", backend="iptables", ip_family=str(family))
            assert objects == len(kernel.read())

    check()
    bench.have(cluster.service(1), cluster.endpoints(1, 3))
    check()
    bench.have(cluster.endpoints(1, 1))
    check()
    bench.kernels[Family.V4].tables["nat"]["KUBE-SERVICES"].clear()
    bench.agent.check()
    check()
    bench.sync()
    check()


def test_rules_of_the_last_sync_and_operations() -> None:
    bench = Bench(Family.V4)
    bench.have(*(cluster.service(i) for i in range(100)))
    before = bench.value("miniproxy_transaction_operations_total", backend="iptables", ip_family="IPv4")
    bench.have(cluster.service(100))
    last = "kubeproxy_sync_proxy_rules_iptables_last"
    assert bench.value(last, ip_family="IPv4", table="filter") == 1  # the refusal of a Service without endpoints
    assert bench.value(last, ip_family="IPv4", table="nat") == 0
    operations = bench.value("miniproxy_transaction_operations_total", backend="iptables", ip_family="IPv4") - before
    assert operations == bench.kernels[Family.V4].sent[-1].operations
    bench.sync()
    assert bench.value(last, ip_family="IPv4", table="filter") == 0


def test_drift_is_counted_when_found_and_when_repaired() -> None:
    bench = Bench(Family.V4)
    bench.have(cluster.service(1), cluster.service(2))
    bench.kernels[Family.V4].tables["filter"]["KUBE-SERVICES"].clear()
    bench.loop._check(0)
    assert bench.value("miniproxy_drift_found_total", ip_family="IPv4") == 2
    assert bench.value("miniproxy_drift_repaired_total", ip_family="IPv4") == 0
    bench.sync()
    assert bench.value("miniproxy_drift_repaired_total", ip_family="IPv4") == 2


def test_problems_stand_until_they_are_over() -> None:
    bench = Bench(Family.V4)
    bench.have(cluster.service(1))
    bench.kernels[Family.V4].refuses = lambda line: "svc-2" in line
    bench.have(cluster.service(2))
    bench.sync()  # a refusal is looked into with the next sync
    standing = {"kind": "Service", "what": "SetAside"}
    assert bench.value("miniproxy_problems", **standing) == 1
    bench.kernels[Family.V4].refuses = lambda line: False
    bench.have(cluster.service(2, node_port=30002))
    assert bench.value("miniproxy_problems", **standing) == 0


def test_conntrack() -> None:
    bench = Bench(Family.V4)
    bench.metrics.forgot(Family.V4, 7, 0.003)
    assert bench.value("kubeproxy_conntrack_reconciler_deleted_entries_total", ip_family="IPv4") == 7
    stale = [Stale(Family.V6, "UDP", "fd00:96::10", 53, frozenset())]
    metrics = Metrics("iptables", list(Family))
    assert ObservedConntrack(Conntrack(), metrics).forget(iter(stale)) == 1
    found = samples(metrics.page().body)
    where = frozenset({("ip_family", "IPv6")})
    assert found["kubeproxy_conntrack_reconciler_deleted_entries_total", where] == 1
    assert found["kubeproxy_conntrack_reconciler_sync_duration_seconds_count", where] == 1


def test_what_is_kept_elsewhere_is_asked_for_each_page_and_may_begin_again() -> None:
    relists, packets = {"services": 1}, {"kubeproxy_iptables_ct_state_invalid_dropped_packets_total": 10}
    bench = Bench(Family.V4, relists=lambda: relists, packets=lambda: packets)
    assert bench.value("miniproxy_relists_total", resource="services") == 1
    relists["services"] = 3
    packets["kubeproxy_iptables_ct_state_invalid_dropped_packets_total"] = 4
    page = samples(bench.page())
    assert page["miniproxy_relists_total", frozenset({("resource", "services")})] == 3
    assert page["kubeproxy_iptables_ct_state_invalid_dropped_packets_total", frozenset()] == 14


def test_packet_counts_are_read_from_the_rules() -> None:
    listed = {
        "iptables-nft KUBE-FORWARD": "-N KUBE-FORWARD\n"
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -c 12 900 -j DROP\n"
        "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -c 99 9900 -j ACCEPT\n",
        "ip6tables-nft KUBE-FORWARD": "-A KUBE-FORWARD -m conntrack --ctstate INVALID -c 3 9 -j DROP\n",
        "iptables-nft KUBE-POSTROUTING": "-A KUBE-POSTROUTING -m conntrack --ctorigdst 127.0.0.0/8 -c 5 300\n",
    }

    def runner(argv: Any, text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        out = listed.get(f"{argv[0]} {argv[-1]}")
        return Completed(0, out, "") if out else Completed(1, "", "No chain by that name.")

    assert counters.packets(Family, "nft", runner) == {
        "kubeproxy_iptables_ct_state_invalid_dropped_packets_total": 15,
        "kubeproxy_iptables_localhost_nodeports_accepted_packets_total": 5,
    }


def test_a_change_costs_the_metrics_what_it_changes() -> None:
    bench = Bench(Family.V4)
    bench.have(*(cluster.service(i) for i in range(300)))
    seen: list[int] = []
    real = bench.metrics.transacted

    def transacted(family: Family, transaction: Any, changes: Any, seconds: float, error: str) -> None:
        seen.append(len(changes))
        real(family, transaction, changes, seconds, error)

    bench.metrics.transacted = transacted  # type: ignore[method-assign]
    bench.have(cluster.service(300))
    assert seen == [1]


# -- all that names a metric


def documented() -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """(name, type, labels, modes) of each row in docs/metrics.md."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*)\| ([\w, ]+) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    for name, kind, labels, modes in rows:
        every = ("iptables", "ipvs", "nftables")
        yield name, kind, _words(labels), every if modes == "all" else _words(modes)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[, ]+", text) if word)


def test_the_documentation_has_every_metric_and_no_other() -> None:
    assert sorted(documented()) == sorted((s.name, s.kind, s.labels, s.modes) for s in SERIES)


def rule_expressions() -> list[str]:
    groups = yaml.safe_load((ROOT / "deploy/prometheus-rules.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def documented_expressions() -> list[str]:
    questions = (ROOT / "docs/metrics.md").read_text().split("## Questions")[1]
    return [code for code in re.findall(r"`([^`]+)`", questions) if "proxy_" in code]


EXPRESSIONS = [
    *((f"rules-{i}", e) for i, e in enumerate(rule_expressions())),
    *((f"dashboard-{i}", e) for i, e in enumerate(dashboard_expressions())),
    *((f"docs-{i}", e) for i, e in enumerate(documented_expressions())),
]
_PARTS = {"histogram": ("_bucket", "_sum", "_count")}
_SCRAPED = {"instance", "job", "le", "reportingController"}


def names() -> dict[str, Series]:
    """Every name of a sample, and the series it is of."""
    return {s.name + part: s for s in SERIES for part in _PARTS.get(s.kind, ("",))}


def test_there_are_expressions() -> None:
    assert len(rule_expressions()) >= 10
    assert len(dashboard_expressions()) >= 25
    assert len(documented_expressions()) >= 4


@pytest.mark.parametrize("expression", [e for _, e in EXPRESSIONS], ids=[i for i, _ in EXPRESSIONS])
def test_expressions_name_metrics_and_labels_that_exist(expression: str) -> None:
    known = names()
    used = re.findall(r"\b(?:kubeproxy|miniproxy)_\w+", re.sub(r'"[^"]*"', '""', expression))
    assert [name for name in used if name not in known] == []
    assert used or "up{" in expression or "process_" in expression
    labels = {label for name in used for label in known[name].labels}
    by = {word for group in re.findall(r"by \(([^)]*)\)", expression) for word in _words(group)}
    matched = set(re.findall(r"[{,]\s*(\w+)\s*[=!]~?", expression)) - {""}
    assert by | matched <= labels | _SCRAPED
    if "histogram_quantile" in expression:
        assert "le" in by


def test_every_label_and_type_is_good_prometheus() -> None:
    for series in SERIES:
        assert re.fullmatch(r"(kubeproxy|miniproxy)_[a-z_]+", series.name)
        assert (series.kind == "histogram") == bool(series.buckets)
        if series.name.startswith("miniproxy_"):
            assert (series.kind == "counter") == series.name.endswith("_total")
