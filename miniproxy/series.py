"""Which metrics there are. Data only: metrics.py counts, docs/metrics.md says what each is good for.

kube-proxy's series keep name, type, labels, buckets and help text ([ALPHA] is their stability there), and exist
in the modes in which kube-proxy has them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

_SYNC = tuple(0.001 * 2**i for i in range(15))
# The 0 is kube-proxy's: it appends its ranges to a slice that has one element already.
_PROGRAMMING = (0.0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
_TRANSACTION = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_ALL = ("iptables", "ipvs", "nftables")


class Series(NamedTuple):
    """One metric: what Prometheus calls a metric family."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    modes: tuple[str, ...] = _ALL


_FAMILY = ("ip_family",)
_BACKEND = ("backend", "ip_family")
_TABLE = ("ip_family", "table")
_IPTABLES = ("iptables",)
_RESTORE = ("iptables", "ipvs")
_NFTABLES = ("nftables",)
RULES = "kubeproxy_sync_proxy_rules"
CONNTRACK = "kubeproxy_conntrack_reconciler"
_LOCAL = ("ip_family", "traffic_policy")

SERIES = (
    Series("histogram", f"{RULES}_duration_seconds", "[ALPHA] SyncProxyRules latency in seconds", _FAMILY, _SYNC),
    Series(
        "histogram",
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "[ALPHA] SyncProxyRules latency in seconds for full resyncs",
        _FAMILY,
        _SYNC,
    ),
    Series(
        "histogram",
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "[ALPHA] SyncProxyRules latency in seconds for partial resyncs",
        _FAMILY,
        _SYNC,
    ),
    Series(
        "gauge",
        f"{RULES}_last_timestamp_seconds",
        "[ALPHA] The last time proxy rules were successfully synced",
        _FAMILY,
    ),
    Series(
        "gauge",
        f"{RULES}_last_queued_timestamp_seconds",
        "[ALPHA] The last time a sync of proxy rules was queued",
        _FAMILY,
    ),
    Series(
        "histogram",
        "kubeproxy_network_programming_duration_seconds",
        "[ALPHA] In Cluster Network Programming Latency in seconds",
        _FAMILY,
        _PROGRAMMING,
    ),
    Series("gauge", f"{RULES}_endpoint_changes_pending", "[ALPHA] Pending proxy rules Endpoint changes"),
    Series("counter", f"{RULES}_endpoint_changes_total", "[ALPHA] Cumulative proxy rules Endpoint changes"),
    Series("gauge", f"{RULES}_service_changes_pending", "[ALPHA] Pending proxy rules Service changes"),
    Series("counter", f"{RULES}_service_changes_total", "[ALPHA] Cumulative proxy rules Service changes"),
    Series(
        "gauge",
        f"{RULES}_no_local_endpoints_total",
        "[ALPHA] Number of services with a Local traffic policy and no endpoints",
        _LOCAL,
    ),
    Series("counter", "kubeproxy_proxy_healthz_total", "[ALPHA] Cumulative proxy healthz HTTP status", ("code",)),
    Series("counter", "kubeproxy_proxy_livez_total", "[ALPHA] Cumulative proxy livez HTTP status", ("code",)),
    Series(
        "counter",
        f"{CONNTRACK}_deleted_entries_total",
        "[ALPHA] Cumulative conntrack flows deleted by conntrack reconciler",
        _FAMILY,
    ),
    Series(
        "histogram",
        f"{CONNTRACK}_sync_duration_seconds",
        "[ALPHA] ReconcileConntrackFlowsLatency latency in seconds",
        _FAMILY,
        _SYNC,
    ),
    Series(
        "gauge",
        f"{RULES}_iptables_total",
        "[ALPHA] Total number of iptables rules owned by kube-proxy",
        _TABLE,
        modes=_IPTABLES,
    ),
    Series(
        "gauge",
        f"{RULES}_iptables_last",
        "[ALPHA] Number of iptables rules written by kube-proxy in last sync",
        _TABLE,
        modes=_IPTABLES,
    ),
    Series(
        "counter",
        f"{RULES}_iptables_restore_failures_total",
        "[ALPHA] Cumulative proxy iptables restore failures",
        _FAMILY,
        modes=_RESTORE,
    ),
    Series(
        "counter",
        f"{RULES}_iptables_partial_restore_failures_total",
        "[ALPHA] Cumulative proxy iptables partial restore failures",
        _FAMILY,
        modes=_IPTABLES,
    ),
    Series(
        "counter",
        f"{RULES}_nftables_sync_failures_total",
        "[ALPHA] Cumulative proxy nftables sync failures",
        _FAMILY,
        modes=_NFTABLES,
    ),
    Series(
        "counter",
        f"{RULES}_nftables_cleanup_failures_total",
        "[ALPHA] Cumulative proxy nftables cleanup failures",
        _FAMILY,
        modes=_NFTABLES,
    ),
    Series(
        "counter",
        "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
        "[ALPHA] packets dropped by iptables to work around conntrack problems",
        modes=_IPTABLES,
    ),
    Series(
        "counter",
        "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
        "[ALPHA] Number of packets accepted on nodeports of loopback interface",
        modes=_IPTABLES,
    ),
    Series("gauge", "miniproxy_build_info", "Always 1; which version runs in which mode.", ("version", "mode")),
    Series(
        "histogram",
        "miniproxy_transaction_duration_seconds",
        "Time the kernel took for one transaction, failed ones included.",
        _BACKEND,
        _TRANSACTION,
    ),
    Series(
        "counter",
        "miniproxy_transaction_operations_total",
        "Lines or messages in the transactions that the kernel took.",
        _BACKEND,
    ),
    Series("counter", "miniproxy_transaction_failures_total", "Transactions that the kernel did not take.", _BACKEND),
    Series(
        "gauge",
        "miniproxy_objects",
        "Objects (chains, rules, map elements, virtual servers, ...) owned in the kernel.",
        _BACKEND,
    ),
    Series(
        "counter",
        "miniproxy_drift_found_total",
        "Objects in the kernel that somebody else changed or removed.",
        _FAMILY,
    ),
    Series("counter", "miniproxy_drift_repaired_total", "Of these, objects put right again.", _FAMILY),
    Series(
        "gauge",
        "miniproxy_problems",
        "Problems standing: what is wrong with objects, by what became of them.",
        ("kind", "what"),
    ),
    Series(
        "histogram",
        "miniproxy_event_to_kernel_seconds",
        "Time from a change's arrival from the source until the kernel had it.",
        _FAMILY,
        _LATENCY,
    ),
    Series(
        "counter",
        "miniproxy_relists_total",
        "Times a resource had to be listed anew, as the API server no longer knew what came between.",
        ("resource",),
    ),
    Series(
        "counter",
        "miniproxy_kubernetes_events_total",
        "Kubernetes Events sent, left out to keep the rate, or failed.",
        ("result",),
    ),
)
