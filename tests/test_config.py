"""KubeProxyConfiguration and flags to Settings: kube-proxy's defaults, its stock files, and errors that say where."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniproxy.cli.reference import markdown
from miniproxy.config import ConfigError, Loaded, Settings, load
from miniproxy.config_file import parse
from miniproxy.config_schema import (
    ALL_MODES,
    FIELDS,
    FLAGS,
    MODE_DEFAULTS,
    address,
    cidr,
    duration,
    go_duration,
    host_port,
)

HERE = Path(__file__).parent
HOST = socket.gethostname().strip().lower()
HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.conf"


def from_text(file: Path, text: str, **flags: object) -> Loaded:
    file.write_text(HEAD + text)
    return load(file, flags)


def problems(file: Path, text: str, **flags: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_text(file, text, **flags)
    return [problem.replace(f"{file}:", "") for problem in caught.value.problems]


# Defaults and stock files


@pytest.mark.parametrize("mode", ALL_MODES)
def test_without_anything_the_defaults_are_those_of_kube_proxy(mode: str) -> None:
    loaded = load(None, {"proxy_mode": mode})
    assert loaded.warnings == ()
    assert {name: origin.kind for name, origin in loaded.origins.items() if origin.kind != "default"} == {
        "mode": "flag"
    }
    settings = loaded.settings
    assert settings.node_name == HOST
    assert settings.min_sync_period == (0 if mode == "ipvs" else 1)
    assert settings.node_port_addresses == (("primary",) if mode == "nftables" else ())
    assert settings.localhost_node_ports is (mode == "iptables")
    assert (settings.masquerade_bit, settings.sync_period, settings.drift_period) == (14, 30, 30)
    assert (settings.conntrack_max_per_core, settings.conntrack_min) == (32768, 131072)
    assert (settings.conntrack_tcp_established_timeout, settings.conntrack_tcp_close_wait_timeout) == (86400, 3600)
    assert (settings.conntrack_udp_timeout, settings.ipvs_tcp_timeout) == (None, None)
    assert (settings.healthz_bind_address, settings.metrics_bind_address) == ("0.0.0.0:10256", "127.0.0.1:10249")
    assert (settings.oom_score_adj, settings.ipvs_scheduler) == (-999, "rr")


def test_kubeadms_stock_file_means_the_defaults() -> None:
    loaded = load(HERE / "configs" / "kubeadm.yaml")
    expected = Settings(
        node_name=HOST, cluster_cidrs=("10.244.0.0/16",), kubeconfig="/var/lib/kube-proxy/kubeconfig.conf"
    )
    assert loaded.warnings == ()
    assert loaded.settings == expected
    given = {name: origin.kind for name, origin in loaded.origins.items() if origin.kind != "default"}
    assert given == {"cluster_cidrs": "file", "kubeconfig": "file", "bind_address": "file"}


def test_kinds_stock_file_in_nftables_mode() -> None:
    loaded = load(HERE / "configs" / "kind-dual-nftables.yaml", {"hostname_override": "Kind-Worker"})
    assert loaded.warnings == ()
    settings = loaded.settings
    assert (settings.mode, settings.node_name) == ("nftables", "kind-worker")
    assert settings.cluster_cidrs == ("10.244.0.0/16", "fd00:10:244::/56")
    assert settings.conntrack_max_per_core is None, "0 leaves the kernel's limit alone"
    assert settings.conntrack_tcp_be_liberal
    assert (settings.sync_period, settings.min_sync_period) == (30, 1), "from nftables, not iptables"


def test_what_kube_proxy_writes_as_its_defaults_is_json_with_tabs_and_means_the_defaults() -> None:
    loaded = load(HERE / "configs" / "defaulted.json")
    assert (loaded.warnings, loaded.settings) == ((), Settings(node_name=HOST))


# Modes


def test_each_mode_reads_its_own_section(config: Path) -> None:
    text = (
        "iptables: {masqueradeBit: 1, masqueradeAll: true, syncPeriod: 11s, minSyncPeriod: 1ms,"
        " localhostNodePorts: false}\n"
        "ipvs: {syncPeriod: 12s, minSyncPeriod: 2ms}\n"
        "nftables: {masqueradeBit: 3, syncPeriod: 13s, minSyncPeriod: 3ms}\n"
    )
    for mode, wanted in {
        "iptables": (1, True, 11, 0.001, False),
        "ipvs": (1, True, 12, 0.002, False),
        "nftables": (3, False, 13, 0.003, False),
    }.items():
        s = from_text(config, text + f"mode: {mode}\n").settings
        got = (s.masquerade_bit, s.masquerade_all, s.sync_period, s.min_sync_period, s.localhost_node_ports)
        assert got == wanted, mode


def test_a_flag_changes_the_mode_and_with_it_which_section_counts(config: Path) -> None:
    loaded = from_text(config, "mode: ipvs\nipvs: {scheduler: lc, syncPeriod: 1m}\n", proxy_mode="nftables")
    assert (loaded.settings.mode, loaded.settings.ipvs_scheduler, loaded.settings.sync_period) == ("nftables", "rr", 30)


# Flags and origins


def test_flags_override_the_file_and_origins_say_so(config: Path) -> None:
    loaded = from_text(
        config,
        "clusterCIDR: 10.0.0.0/8\niptables:\n  masqueradeBit: 7\n  masqueradeAll: true\n",
        cluster_cidr="10.1.2.3/16,fd00::/48",
        masquerade_all="false",
    )
    settings = loaded.settings
    assert settings.cluster_cidrs == ("10.1.0.0/16", "fd00::/48")
    assert (settings.masquerade_bit, settings.masquerade_mark, settings.masquerade_all) == (7, 0x80, False)
    assert str(loaded.origins["cluster_cidrs"]) == "--cluster-cidr"
    assert str(loaded.origins["masquerade_bit"]) == f"{config}:5 iptables.masqueradeBit"
    assert str(loaded.origins["sync_period"]) == "default"
    assert load(loaded.config_file, loaded.flags) == loaded


def test_flags_take_text_or_typed_values_and_none_is_not_given() -> None:
    as_text = load(None, {"masquerade_all": "true", "iptables_masquerade_bit": "9", "nodeport_addresses": "10.0.0.0/8"})
    typed = load(
        None,
        {"masquerade_all": True, "iptables_masquerade_bit": 9, "nodeport_addresses": ["10.0.0.0/8"], "v": None},
    )
    assert as_text.settings == typed.settings
    assert typed.origins["verbosity"].kind == "default"


def test_zero_is_a_value_of_a_flag_but_not_of_most_fields(config: Path) -> None:
    assert from_text(config, "iptables: {minSyncPeriod: 0s}").settings.min_sync_period == 1
    assert load(None, {"iptables_min_sync_period": "0"}).settings.min_sync_period == 0
    assert from_text(config, "iptables: {masqueradeBit: 0}").settings.masquerade_bit == 0
    assert (
        from_text(config, "conntrack: {tcpEstablishedTimeout: 0s}").settings.conntrack_tcp_established_timeout is None
    )
    assert load(None, {"conntrack_max_per_core": "0"}).settings.conntrack_max_per_core is None


def test_a_blank_flag_is_not_given_but_for_addresses_where_it_means_nowhere(config: Path) -> None:
    loaded = from_text(config, "mode: ipvs\n", proxy_mode="", hostname_override="", metrics_bind_address="")
    assert (loaded.settings.mode, loaded.settings.node_name) == ("ipvs", HOST)
    assert loaded.settings.metrics_bind_address == ""


def test_a_flag_of_another_mode_is_warned_about() -> None:
    loaded = load(None, {"proxy_mode": "nftables", "iptables_masquerade_bit": "3", "feature_gates": "A=true"})
    assert loaded.settings.masquerade_bit == 14
    assert loaded.warnings == (
        "--iptables-masquerade-bit: has no effect in nftables mode",
        "--feature-gates: has no effect: there are no feature gates here",
    )


def test_an_ipv6_bind_address_moves_the_servers_to_ipv6(config: Path) -> None:
    settings = from_text(config, 'bindAddress: "::"\n').settings
    assert (settings.healthz_bind_address, settings.metrics_bind_address) == ("[::]:10256", "[::1]:10249")


# Errors


def test_everything_wrong_is_said_at_once_with_line_and_field(config: Path) -> None:
    text = """\
mode: userspace
iptables:
  masqueradeBit: 40
  syncPeriod: 5 minutes
  masqueradAll: true
masqueradeAll: true
ipvs: [1]
clusterCIDR: 10.0.0.0/8,10.1.0.0/16
clusterCIDR: 10.0.0.0/8
hostnameOverride: 12
nodePortAddresses: [primary, 10.0.0.0/8]
healthzBindAddress: 0.0.0.0:99999
metricsBindAddress: localhost:10249
conntrack: {maxPerCore: -1, udpTimeout: -1s}
detectLocal: {bridgeInterface: "br0; reboot"}
"""
    got = problems(config, text, iptables_masquerade_bit="32")
    assert sorted(got) == sorted(
        [
            '3: mode: "userspace" is none of iptables, ipvs, nftables (blank means "iptables")',
            "5: iptables.masqueradeBit: 40 is not a bit number from 0 to 31",
            '6: iptables.syncPeriod: "5 minutes" is not a duration like "30s", "1m30s" or "500ms"',
            "7: iptables.masqueradAll: is not a field of KubeProxyConfiguration; did you mean iptables.masqueradeAll?",
            "8: masqueradeAll: is not a field of KubeProxyConfiguration;"
            " did you mean iptables.masqueradeAll or nftables.masqueradeAll?",
            "9: ipvs: [1] is not a map of fields",
            '10: clusterCIDR: "10.0.0.0/8,10.1.0.0/16" is not one CIDR or a pair of one IPv4 and one IPv6 CIDR',
            "11: clusterCIDR: is given twice, first in line 10",
            "12: hostnameOverride: 12 is not text: put it in quotes",
            '13: nodePortAddresses: "primary" cannot be mixed with CIDRs: give one or the other',
            "14: healthzBindAddress: 99999 is not a port from 1 to 65535",
            '15: metricsBindAddress: "localhost:10249" is not IP:PORT, as in 0.0.0.0:10249',
            "16: conntrack.maxPerCore: -1 is not a count from 0 to 2147483647",
            '16: conntrack.udpTimeout: "-1s" is negative',
            '17: detectLocal.bridgeInterface: "br0; reboot" is not 1 to 15 letters, digits or _ . @ : -'
            " as in an interface's name",
            "--iptables-masquerade-bit: 32 is not a bit number from 0 to 31",
        ]
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("detectLocalMode: BridgeInterface", "needs detectLocal.bridgeInterface (--pod-bridge-interface)"),
        ("detectLocalMode: InterfaceNamePrefix", "needs detectLocal.interfaceNamePrefix"),
        ("iptables: {syncPeriod: 500ms}", "3: iptables.syncPeriod: 1 s is longer than the sync period, 0.5 s"),
        ("iptables: {minSyncPeriod: 1m}", "3: iptables.minSyncPeriod: 60 s is longer than the sync period, 30 s"),
        ("iptables: {snatNodeInternalIP: true}", "is not supported"),
        ("featureGates: 'A=true'", "is not a map of feature names to true or false"),
    ],
)
def test_what_does_not_fit_together(config: Path, text: str, problem: str) -> None:
    (only,) = problems(config, text)
    assert problem in only


def test_a_sync_period_of_zero_as_a_flag() -> None:
    with pytest.raises(ConfigError, match=r"--iptables-sync-period: must be longer than 0"):
        load(None, {"iptables_sync_period": "0s"})


def test_an_unknown_flag_is_an_error_of_the_caller() -> None:
    with pytest.raises(ConfigError, match="--cluster-cidrs: is not a flag"):
        load(None, {"cluster_cidrs": "10.0.0.0/8"})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no KubeProxyConfiguration"),
        (b"[1]", "holds no KubeProxyConfiguration"),
        (b"a: b: c", ":1: is not YAML or JSON: mapping values are not allowed here"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"a: \x00", "is not YAML or JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"a" * (1 << 20 | 1), "is larger than 1 MiB"),
        (b"apiVersion: v1\nkind: ConfigMap\n", ":2: kind: is the ConfigMap around the configuration"),
        (b"kind: KubeProxyConfiguration", "apiVersion: is missing; it must be kubeproxy.config.k8s.io/v1alpha1"),
        (HEAD.replace("v1alpha1", "v1beta1").encode(), ':1: apiVersion: "kubeproxy.config.k8s.io/v1beta1" is not'),
        (HEAD.encode() + b"---\nmode: ipvs\n", ":3: is not YAML or JSON"),
    ],
)
def test_a_file_that_is_no_configuration(config: Path, content: bytes, problem: str) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(config)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(str(config))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: cannot be read: No such file"):
        load(tmp_path / "nowhere")


# Warnings


def test_what_has_no_meaning_here_is_a_warning(config: Path) -> None:
    loaded = from_text(
        config,
        """\
winkernel: {enableDSR: true, networkName: ""}
oomScoreAdj: 2000
featureGates: {Zeta: true, Alpha: false}
showHiddenMetricsForVersion: "1.35"
enableProfiling: true
metadata: {name: config}
clientConnection: {qps: 50, burst: 10}
mode: ipvs
ipvs: {scheduler: magic}
""",
    )
    assert sorted(warning.replace(f"{config}:", "") for warning in loaded.warnings) == [
        '11: ipvs.scheduler: "magic" is no scheduler known to be in Linux',
        "3: winkernel.enableDSR: has no effect: it is for Windows",
        "4: oomScoreAdj: 2000 is not from -1000 to 1000; -999 is used",
        "5: featureGates (Alpha, Zeta): has no effect: there are no feature gates here",
        "6: showHiddenMetricsForVersion: has no effect: no metric is hidden here",
        "7: enableProfiling: has no effect: there is no /debug/pprof here",
        "8: metadata: has no effect: a KubeProxyConfiguration has none",
        "9: clientConnection.qps: has no effect: requests to the API server are few, JSON, and need no rate limit",
    ]
    assert loaded.settings.oom_score_adj == -999
    assert loaded.origins["oom_score_adj"].kind == "default"


# Values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0), (0, 0), (0.0, 0), ("0s", 0), ("1m30s", 90), ("1h0m0s", 3600), ("500ms", 0.5), (".5s", 0.5),
        ("1.s", 1),
        ("1us", 1e-6), ("1µs", 1e-6), ("100ns", 1e-7), ("+2h", 7200), ("-0s", 0), ("24h0m0s", 86400),
    ],
)  # fmt: skip
def test_go_durations(text: object, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "30", "1", 30, "s", "1 s", "1d", "-1s", "1e3s", ".s", True, None, "9" * 30 + "h", []]
)
def test_not_durations(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a duration|is negative|is longer"):
        duration(text)


@given(st.integers(min_value=0, max_value=10**9))
def test_a_shown_duration_reads_back(milliseconds: int) -> None:
    assert duration(go_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.244.7.1/16", "10.244.0.0/16"), ("010.001.0.0/016", "10.1.0.0/16"), ("FD00:0:0::/048", "fd00::/48"),
        ("0.0.0.0/0", "0.0.0.0/0"), ("000.0.0.0/0", "0.0.0.0/0"), ("::/0", "::/0"),
    ],
)  # fmt: skip
def test_cidrs_are_canonical(text: str, canonical: str) -> None:
    assert cidr(text) == canonical


@pytest.mark.parametrize(
    "text", ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "fe80::%eth0/64", "10.0.0.0/-1", "a/8", 7, None]
)
def test_not_cidrs(text: object) -> None:
    with pytest.raises(ValueError, match="is not a CIDR like"):
        cidr(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""), ("127.0.0.1", "127.0.0.1:10256"), ("0.0.0.0:1", "0.0.0.0:1"), ("::", "[::]:10256"),
        ("[::1]:80", "[::1]:80"), ("010.0.0.1:80", "10.0.0.1:80"),
    ],
)  # fmt: skip
def test_host_and_port(text: str, wanted: str) -> None:
    assert host_port(10256)(text) == wanted


@given(st.text(max_size=60))
def test_no_text_makes_a_reader_fail_otherwise_than_by_saying_so(text: str) -> None:
    for kind in {field.kind for field in FIELDS} | {flag.kind for flag in FLAGS}:
        for value in (text, kind.parse(text)):
            with suppress(ValueError):
                kind.check(value)


@given(st.text(alphabet="{}[]:,-&*!|>'\"# \n\tab01", max_size=80) | st.text(max_size=80))
def test_no_text_makes_the_file_reader_fail_otherwise_than_by_saying_so(text: str) -> None:
    for content in (text, HEAD + text, HEAD + f"iptables:\n  {text}"):
        for problem in parse(content, "x")[1]:
            assert problem.startswith("x:")


# The tables agree with each other, with Settings and with the documentation


def test_every_field_and_flag_leads_to_a_setting_and_every_setting_can_be_set() -> None:
    names = set(Settings.__struct_fields__)
    assert {flag.setting for flag in FLAGS} | {""} == names | {""}
    assert {field.setting for field in FIELDS} <= names | {""}
    assert set().union(*MODE_DEFAULTS.values()) <= names
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    assert len({field.path for field in FIELDS}) == len(FIELDS)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_settings_have_the_types_they_promise(mode: str, config: Path) -> None:
    for loaded in (load(None, {"proxy_mode": mode}), load(HERE / "configs" / "kubeadm.yaml", {"proxy_mode": mode})):
        assert msgspec.convert(msgspec.to_builtins(loaded.settings), Settings, strict=True) == loaded.settings


def test_the_reference_is_up_to_date() -> None:
    document = (HERE.parent / "docs" / "config.md").read_text()
    assert document.endswith(markdown()), "write it anew: see the end of docs/config.md's introduction"


def test_an_address_is_canonical() -> None:
    assert [address(text) for text in ("010.0.0.01", "FD00::0001")] == ["10.0.0.1", "fd00::1"]
