"""What an operator may set: the fields of KubeProxyConfiguration, the flags, and how each value is read.

Data only. `config.load` resolves Settings from these tables, the command line and the reference in
docs/config.md are made from them, so a field exists everywhere or nowhere. Field names, zero values and flag
names are kube-proxy v1.36's.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"

ALL_MODES = ("iptables", "ipvs", "nftables")
LOCAL_MODES = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf", "twos")


# Reading values. Every reader takes the value as YAML gives it and returns the resolved one, or raises
# ValueError with a reason that makes sense behind "iptables.masqueradeBit: ".


class Kind(NamedTuple):
    """How one kind of value is read from a file (`check`) and from a flag's text (`parse`)."""

    name: str  # as the reference calls it
    check: Callable[[object], object]
    parse: Callable[[str], object] = str
    metavar: str = "TEXT"


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{show(value)} is not text: put it in quotes")
    return value


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{show(value)} is not true or false")
    return value


def parse_boolean(value: str) -> object:
    # The spellings of Go's strconv.ParseBool, which kube-proxy's flags take.
    if value in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    return False if value in ("0", "f", "F", "false", "FALSE", "False") else value


def parse_number(value: str) -> object:
    return int(value) if re.fullmatch(r"[+-]?[0-9]{1,18}", value) else value


def integer(low: int, high: int, what: str) -> Callable[[object], int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{show(value)} is not {what} from {low} to {high}")
        return value

    return check


def number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{show(value)} is not a number")
    return float(value)


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"[+-]?(?:{_PART.pattern})+")


def duration(value: object) -> float:
    """Seconds of a Go duration ("1m30s", "500ms") or of a plain 0; never negative, at most Go's 292 years."""
    if value == "0" or (value == 0 and isinstance(value, int | float) and not isinstance(value, bool)):
        return 0.0
    if not isinstance(value, str) or not _DURATION.fullmatch(value):
        raise ValueError(f'{show(value)} is not a duration like "30s", "1m30s" or "500ms"')
    seconds = sum(float(count) * _UNITS[unit] for count, unit in _PART.findall(value))
    if seconds >= 2**63 / 1e9:
        raise ValueError(f"{show(value)} is longer than 292 years")
    if value.startswith("-") and seconds:
        raise ValueError(f"{show(value)} is negative")
    return seconds


def go_duration(seconds: float) -> str:
    """Short text that `duration` reads back: 90.0 → "1m30s"."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "m"), (rest, "s")]
    return "".join(f"{count:.9g}{unit}" for count, unit in parts if count) or "0s"


def _plain(address: str) -> str:
    """Without the leading zeros that Go's "sloppy" parsers, and so existing configurations, allow in IPv4."""
    return re.sub(r"(?<![0-9a-fA-F:])0+(?=[0-9])", "", address) if ":" not in address else address


def address(value: object) -> str:
    try:
        if "%" in text(value):
            raise ValueError
        return str(ipaddress.ip_address(_plain(text(value))))
    except ValueError:
        raise ValueError(f"{show(value)} is not an IP address") from None


def cidr(value: object) -> str:
    """The network a CIDR names, canonical: "10.244.7.1/16" → "10.244.0.0/16"."""
    try:
        host, slash, length = text(value).strip().partition("/")
        if not slash or not re.fullmatch("[0-9]{1,3}", length) or "%" in host:
            raise ValueError
        return str(ipaddress.ip_network(f"{_plain(host)}/{int(length)}", strict=False))
    except ValueError:
        raise ValueError(f"{show(value)} is not a CIDR like 10.244.0.0/16 or fd00:10:244::/56") from None


def strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{show(value)} is not a list of texts")
    return value


def parse_list(value: str) -> object:
    return [item.strip() for item in value.split(",")] if value else []


def cidrs(value: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cidr(item) for item in strings(value)))


def cluster_cidrs(value: object) -> tuple[str, ...]:
    """One CIDR, or one of each family, in one comma-separated text."""
    if not text(value):
        return ()
    result = tuple(cidr(item) for item in text(value).split(","))
    if len(result) > 2 or (len(result) == 2 and len({":" in item for item in result}) == 1):
        raise ValueError(f"{show(value)} is not one CIDR or a pair of one IPv4 and one IPv6 CIDR")
    return result


def node_port_addresses(value: object) -> tuple[str, ...]:
    items = strings(value)
    if "primary" in items:
        if items != ["primary"]:
            raise ValueError('"primary" cannot be mixed with CIDRs: give one or the other')
        return ("primary",)
    return cidrs(value)


def host_port(default_port: int) -> Callable[[object], str]:
    """ "IP:PORT" with an IPv6 address in brackets; a bare address gets `default_port`; "" stays ""."""

    def check(value: object) -> str:
        given = text(value)
        if not given:
            return ""
        match = re.fullmatch(r"\[([^][]+)\]:([0-9]{1,5})|([^:]+):([0-9]{1,5})", given)
        host, port = (match[1] or match[3], int(match[2] or match[4])) if match else (given, default_port)
        try:
            host = address(host)
        except ValueError:
            raise ValueError(f"{show(given)} is not IP:PORT, as in 0.0.0.0:{default_port}") from None
        if not 1 <= port <= 65535:
            raise ValueError(f"{port} is not a port from 1 to 65535")
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    return check


def choice(values: tuple[str, ...], blank: str = "") -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in values and value != "":
            meaning = f' (blank means "{blank}")' if blank else ""
            raise ValueError(f"{show(value)} is none of {', '.join(values)}{meaning}")
        return str(value)

    return check


def interface(longest: int) -> Callable[[object], str]:
    """A network interface's name, of the characters that mean nothing special to iptables and nft."""

    def check(value: object) -> str:
        if text(value) and not re.fullmatch(rf"[A-Za-z0-9_.@:-]{{1,{longest}}}", text(value)):
            raise ValueError(
                f"{show(value)} is not 1 to {longest} letters, digits or _ . @ : - as in an interface's name"
            )
        return text(value)

    return check


def node_name(value: object) -> str:
    name = text(value).strip().lower()
    if name and not re.fullmatch(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", name):
        raise ValueError(f"{show(value)} is not a node name: lower-case letters, digits, '-' and '.'")
    return name


def scheduler(value: object) -> str:
    # Any name the kernel could have a module for: the list of schedulers grows without us.
    if text(value) and not re.fullmatch("[a-z0-9_-]{1,15}", text(value)):
        raise ValueError(f"{show(value)} is not an IPVS scheduler like {', '.join(SCHEDULERS[:6])}")
    return text(value)


def gates(value: object) -> dict[str, bool]:
    if not isinstance(value, dict) or not all(isinstance(state, bool) for state in value.values()):
        raise ValueError(f"{show(value)} is not a map of feature names to true or false")
    return value


def anything(value: object) -> object:
    return value


def show(value: object) -> str:
    """A value in a message: short, and on one line whatever it holds."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return "a map" if isinstance(value, dict) else "[" + ", ".join(show(item) for item in value[:4]) + "]"
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else str(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    return f'"{shown}"' if isinstance(value, str) else shown


_INT32 = 2**31 - 1

TEXT = Kind("text", text)
BOOL = Kind("true or false", boolean, parse_boolean, "[true|false]")
DURATION = Kind("duration", duration, metavar="DURATION")
BIT = Kind("0 to 31", integer(0, 31, "a bit number"), parse_number, "BIT")
COUNT = Kind("whole number", integer(0, _INT32, "a count"), parse_number, "N")
SCORE = Kind("-1000 to 1000", integer(-_INT32 - 1, _INT32, "a whole number"), parse_number, "N")
NUMBER = Kind("number", number, parse_number, "N")
MODE = Kind("one of " + ", ".join(ALL_MODES), choice(ALL_MODES, "iptables"), metavar="MODE")
LOCAL_MODE = Kind("one of " + ", ".join(LOCAL_MODES), choice(LOCAL_MODES, "ClusterCIDR"), metavar="HOW")
ADDRESS = Kind("IP address", lambda value: address(value) if value != "" else "", metavar="IP")
HEALTHZ = Kind("IP:port", host_port(10256), metavar="IP:PORT")
METRICS = Kind("IP:port", host_port(10249), metavar="IP:PORT")
CIDR_PAIR = Kind("CIDR or pair of CIDRs", cluster_cidrs, metavar="CIDR[,CIDR]")
CIDRS = Kind("list of CIDRs", cidrs, parse_list, "CIDR,…")
NODE_PORTS = Kind('list of CIDRs, or ["primary"]', node_port_addresses, parse_list, "CIDR,…|primary")
BRIDGE = Kind("interface name", interface(15), metavar="NAME")
PREFIX = Kind("start of interface names", interface(14), metavar="PREFIX")  # iptables adds a "+"; the limit is 15
NODE_NAME = Kind("node name", node_name, metavar="NAME")
SCHEDULER = Kind("scheduler name", scheduler, metavar="NAME")
FORMAT = Kind("text or json", choice(("text", "json"), "text"), metavar="[text|json]")
VARIANT = Kind("auto, nft or legacy", choice(("auto", "nft", "legacy"), "auto"), metavar="[auto|nft|legacy]")
GATES = Kind("map of true or false", gates, metavar="NAME=BOOL,…")
ANYTHING = Kind("anything", anything)


# The file.


class Field(NamedTuple):
    """One field of KubeProxyConfiguration: it decides `setting` in `modes`, is `ignored`, or is `refused`."""

    path: str
    kind: Kind
    setting: str = ""
    help: str = ""
    modes: tuple[str, ...] = ALL_MODES
    pointer: bool = False  # only null means "not given"; elsewhere the zero value ("", 0, false, []) does too
    zero_is_none: bool = False  # a given 0 means: leave the kernel's value alone
    ignored: str = ""  # why a value other than zero is warned about and has no effect
    refused: str = ""  # why a value other than zero is an error


_WINDOWS = "it is for Windows"
_OLD = "it is of an older kube-proxy"
_RESYNC = "a list is compared whole and a watch goes on where it ended, so there is nothing to look at again"
_VMODULE = "log levels by file do not exist here: use -v (logging.verbosity)"
_ONE_STREAM = "all log lines go to standard error"
_AT_ONCE = "log lines are written at once"
_CLIENT = "requests to the API server are few, JSON, and need no rate limit"
_IPTABLES_LIKE = ("iptables", "ipvs")

FIELDS = (
    Field("apiVersion", TEXT, help=f"must be {API_VERSION}"),
    Field("kind", TEXT, help=f"must be {KIND}"),
    Field("mode", MODE, "mode", "which part of the kernel does the work"),
    Field(
        "hostnameOverride",
        NODE_NAME,
        "node_name",
        "the Node object this is; unset: the host name in lower case",
    ),
    Field(
        "bindAddress",
        ADDRESS,
        "bind_address",
        "node IP to use when it is not 0.0.0.0 or ::; sockets do not bind to it",
    ),
    Field("bindAddressHardFail", BOOL, "bind_address_hard_fail", "stop when a port cannot be bound"),
    Field(
        "healthzBindAddress",
        HEALTHZ,
        "healthz_bind_address",
        "/healthz and /livez; [::]:10256 if bindAddress is IPv6",
    ),
    Field("metricsBindAddress", METRICS, "metrics_bind_address", "/metrics; [::1]:10249 if bindAddress is IPv6"),
    Field(
        "clusterCIDR",
        CIDR_PAIR,
        "cluster_cidrs",
        "pods' addresses: traffic from elsewhere to a cluster IP is masqueraded",
    ),
    Field("detectLocalMode", LOCAL_MODE, "detect_local_mode", "how traffic of this node's pods is recognised"),
    Field("detectLocal.bridgeInterface", BRIDGE, "bridge_interface", "for detectLocalMode BridgeInterface"),
    Field(
        "detectLocal.interfaceNamePrefix",
        PREFIX,
        "interface_name_prefix",
        "for detectLocalMode InterfaceNamePrefix",
    ),
    Field(
        "nodePortAddresses",
        NODE_PORTS,
        "node_port_addresses",
        "where NodePorts answer; empty: all local addresses",
    ),
    Field(
        "iptables.masqueradeBit",
        BIT,
        "masquerade_bit",
        "bit of the packet mark for SNAT",
        _IPTABLES_LIKE,
        pointer=True,
    ),
    Field("iptables.masqueradeAll", BOOL, "masquerade_all", "SNAT all traffic to cluster IPs", _IPTABLES_LIKE),
    Field(
        "iptables.localhostNodePorts",
        BOOL,
        "localhost_node_ports",
        "NodePorts on 127.0.0.1 (IPv4 only)",
        ("iptables",),
        pointer=True,
    ),
    Field(
        "iptables.snatNodeInternalIP",
        BOOL,
        refused="SNAT to the node's InternalIP is not supported: set it to false",
        pointer=True,
    ),
    Field("iptables.syncPeriod", DURATION, "sync_period", "check the kernel for drift this often", ("iptables",)),
    Field(
        "iptables.minSyncPeriod",
        DURATION,
        "min_sync_period",
        "shortest time between two writes",
        ("iptables",),
    ),
    Field("ipvs.syncPeriod", DURATION, "sync_period", "check the kernel for drift this often", ("ipvs",)),
    Field("ipvs.minSyncPeriod", DURATION, "min_sync_period", "shortest time between two writes", ("ipvs",)),
    Field("ipvs.scheduler", SCHEDULER, "ipvs_scheduler", "how connections are spread", ("ipvs",)),
    Field(
        "ipvs.excludeCIDRs",
        CIDRS,
        "ipvs_exclude_cidrs",
        "virtual servers in these are somebody else's",
        ("ipvs",),
    ),
    Field("ipvs.strictARP", BOOL, "ipvs_strict_arp", "set arp_ignore 1 and arp_announce 2", ("ipvs",)),
    Field("ipvs.tcpTimeout", DURATION, "ipvs_tcp_timeout", "idle TCP connections", ("ipvs",), zero_is_none=True),
    Field(
        "ipvs.tcpFinTimeout",
        DURATION,
        "ipvs_tcp_fin_timeout",
        "TCP after a FIN",
        ("ipvs",),
        zero_is_none=True,
    ),
    Field("ipvs.udpTimeout", DURATION, "ipvs_udp_timeout", "idle UDP flows", ("ipvs",), zero_is_none=True),
    Field(
        "nftables.masqueradeBit",
        BIT,
        "masquerade_bit",
        "bit of the packet mark for SNAT",
        ("nftables",),
        pointer=True,
    ),
    Field("nftables.masqueradeAll", BOOL, "masquerade_all", "SNAT all traffic to cluster IPs", ("nftables",)),
    Field("nftables.syncPeriod", DURATION, "sync_period", "check the kernel for drift this often", ("nftables",)),
    Field(
        "nftables.minSyncPeriod",
        DURATION,
        "min_sync_period",
        "shortest time between two writes",
        ("nftables",),
    ),
    Field(
        "conntrack.maxPerCore",
        COUNT,
        "conntrack_max_per_core",
        "tracked connections per CPU; 0: leave the limit alone",
        pointer=True,
        zero_is_none=True,
    ),
    Field("conntrack.min", COUNT, "conntrack_min", "at least so many tracked connections in all", pointer=True),
    Field(
        "conntrack.tcpEstablishedTimeout",
        DURATION,
        "conntrack_tcp_established_timeout",
        "idle TCP connections; 0: leave alone",
        pointer=True,
        zero_is_none=True,
    ),
    Field(
        "conntrack.tcpCloseWaitTimeout",
        DURATION,
        "conntrack_tcp_close_wait_timeout",
        "half-closed TCP connections; 0: leave alone",
        pointer=True,
        zero_is_none=True,
    ),
    Field("conntrack.tcpBeLiberal", BOOL, "conntrack_tcp_be_liberal", "accept TCP packets outside the window"),
    Field(
        "conntrack.udpTimeout",
        DURATION,
        "conntrack_udp_timeout",
        "UDP flows without a reply",
        zero_is_none=True,
    ),
    Field(
        "conntrack.udpStreamTimeout",
        DURATION,
        "conntrack_udp_stream_timeout",
        "UDP flows with replies",
        zero_is_none=True,
    ),
    Field(
        "oomScoreAdj",
        SCORE,
        "oom_score_adj",
        "how gladly the kernel ends this process when memory is short",
        pointer=True,
    ),
    Field("configSyncPeriod", DURATION, ignored=_RESYNC),
    Field("clientConnection.kubeconfig", TEXT, "kubeconfig", "file that says how to reach the API server"),
    Field("clientConnection.acceptContentTypes", TEXT, ignored=_CLIENT),
    Field("clientConnection.contentType", TEXT, ignored=_CLIENT),
    Field("clientConnection.qps", NUMBER, ignored=_CLIENT),
    Field("clientConnection.burst", COUNT, ignored=_CLIENT),
    Field("logging.format", FORMAT, "log_format", "how log lines look"),
    Field("logging.verbosity", COUNT, "verbosity", "4 and more: details; 8 and more: libraries too"),
    Field("logging.flushFrequency", ANYTHING, help="accepted: lines are written at once"),
    Field("logging.vmodule", ANYTHING, ignored=_VMODULE),
    Field("logging.options.text.splitStream", BOOL, ignored=_ONE_STREAM),
    Field("logging.options.text.infoBufferSize", ANYTHING, ignored=_AT_ONCE),
    Field("logging.options.json.splitStream", BOOL, ignored=_ONE_STREAM),
    Field("logging.options.json.infoBufferSize", ANYTHING, ignored=_AT_ONCE),
    Field("featureGates", GATES, ignored="there are no feature gates here"),
    Field("enableProfiling", BOOL, ignored="there is no /debug/pprof here"),
    Field("showHiddenMetricsForVersion", TEXT, ignored="no metric is hidden here"),
    Field("winkernel.networkName", TEXT, ignored=_WINDOWS),
    Field("winkernel.sourceVip", TEXT, ignored=_WINDOWS),
    Field("winkernel.enableDSR", BOOL, ignored=_WINDOWS),
    Field("winkernel.rootHnsEndpointName", TEXT, ignored=_WINDOWS),
    Field("winkernel.forwardHealthCheckVip", BOOL, ignored=_WINDOWS),
    Field("windowsRunAsService", BOOL, ignored=_WINDOWS),
    Field("portRange", TEXT, ignored=_OLD),
    Field("udpIdleTimeout", ANYTHING, ignored=_OLD),
    Field("resourceContainer", TEXT, ignored=_OLD),
    Field("conntrack.max", ANYTHING, ignored=_OLD),
    Field("metadata", ANYTHING, ignored="a KubeProxyConfiguration has none"),
)

# Values that have no effect and are no news: what kube-proxy itself fills in for these fields.
STOCK = {
    "clientConnection.contentType": ("application/vnd.kubernetes.protobuf",),
    "clientConnection.qps": (5.0,),
    "clientConnection.burst": (10,),
    "logging.options.text.infoBufferSize": ("0",),
    "logging.options.json.infoBufferSize": ("0",),
    "configSyncPeriod": (900.0,),
    "udpIdleTimeout": ("250ms", "0s", "0"),
}

# Where a mode's default is not that of Settings.
MODE_DEFAULTS: dict[str, dict[str, object]] = {
    "iptables": {},
    "ipvs": {"min_sync_period": 0.0, "localhost_node_ports": False},
    "nftables": {"node_port_addresses": ("primary",), "localhost_node_ports": False},
}


# The command line.


class Flag(NamedTuple):
    """One flag, `--name`; it overrides the file. `group` is its heading in --help."""

    name: str
    kind: Kind
    setting: str
    group: str
    help: str
    modes: tuple[str, ...] = ALL_MODES
    zero_is_none: bool = False
    short: str = ""
    ignored: str = ""  # accepted so that a kube-proxy command line works; why it has no effect

    @property
    def key(self) -> str:
        """Its name in the mapping `config.load` takes."""
        return self.name.replace("-", "_")


_SOURCE, _WORK, _LOCAL, _PORTS = "Where from", "What to do", "Which traffic is local", "Health and metrics"
_IPVS, _CONNTRACK, _LOG, _DROP_IN = (
    "IPVS",
    "Connection tracking",
    "Process and logs",
    "Accepted from kube-proxy",
)

FLAGS = (
    Flag(
        "source",
        TEXT,
        "source",
        _SOURCE,
        "Folder of Kubernetes manifests to watch, or one file, instead of an API server.",
    ),
    Flag(
        "kubeconfig",
        TEXT,
        "kubeconfig",
        _SOURCE,
        "How to reach the API server; default: the pod's service account.",
    ),
    Flag("master", TEXT, "master", _SOURCE, "URL of the API server; overrides the kubeconfig's."),
    Flag(
        "hostname-override",
        NODE_NAME,
        "node_name",
        _SOURCE,
        "Name of this node; default: the host name in lower case.",
    ),
    Flag("proxy-mode", MODE, "mode", _WORK, "iptables (default), ipvs or nftables."),
    Flag(
        "iptables-variant",
        VARIANT,
        "iptables_variant",
        _WORK,
        "Which iptables; auto: the one in use on this node.",
    ),
    Flag("masquerade-all", BOOL, "masquerade_all", _WORK, "SNAT all traffic to cluster IPs."),
    Flag(
        "iptables-masquerade-bit",
        BIT,
        "masquerade_bit",
        _WORK,
        "Bit of the packet mark for SNAT (iptables, ipvs).",
        _IPTABLES_LIKE,
    ),
    Flag(
        "nodeport-addresses",
        NODE_PORTS,
        "node_port_addresses",
        _WORK,
        "Where NodePorts answer: CIDRs, or 'primary'.",
    ),
    Flag(
        "iptables-localhost-nodeports",
        BOOL,
        "localhost_node_ports",
        _WORK,
        "NodePorts on 127.0.0.1 (iptables, IPv4 only).",
        ("iptables",),
    ),
    Flag(
        "iptables-sync-period",
        DURATION,
        "sync_period",
        _WORK,
        "Check the kernel for drift this often (iptables, nftables).",
        ("iptables", "nftables"),
    ),
    Flag(
        "iptables-min-sync-period",
        DURATION,
        "min_sync_period",
        _WORK,
        "Shortest time between two writes (iptables, nftables).",
        ("iptables", "nftables"),
    ),
    Flag(
        "nftables-counters",
        BOOL,
        "nftables_counters",
        _WORK,
        "Count packets and bytes by service address (nft list set ip miniproxy counted).",
        ("nftables",),
    ),
    Flag(
        "service-cidrs",
        CIDRS,
        "service_cidrs",
        _WORK,
        "Where cluster IPs come from: what goes to an address there that is none is dropped at once.",
        ("nftables",),
    ),
    Flag(
        "bind-address",
        ADDRESS,
        "bind_address",
        _WORK,
        "This node's primary IP, if not what the Node object says.",
    ),
    Flag("detect-local-mode", LOCAL_MODE, "detect_local_mode", _LOCAL, f"{', '.join(LOCAL_MODES)}."),
    Flag(
        "cluster-cidr",
        CIDR_PAIR,
        "cluster_cidrs",
        _LOCAL,
        "Addresses of the cluster's pods; a pair for dual stack.",
    ),
    Flag("pod-bridge-interface", BRIDGE, "bridge_interface", _LOCAL, "The pods' bridge, for BridgeInterface."),
    Flag(
        "pod-interface-name-prefix",
        PREFIX,
        "interface_name_prefix",
        _LOCAL,
        "Start of their names, for InterfaceNamePrefix.",
    ),
    Flag(
        "healthz-bind-address",
        HEALTHZ,
        "healthz_bind_address",
        _PORTS,
        "Where /healthz and /livez answer; '': nowhere.",
    ),
    Flag(
        "metrics-bind-address",
        METRICS,
        "metrics_bind_address",
        _PORTS,
        "Where /metrics answers; '': nowhere.",
    ),
    Flag("bind-address-hard-fail", BOOL, "bind_address_hard_fail", _PORTS, "Stop when a port cannot be bound."),
    Flag(
        "ipvs-scheduler",
        SCHEDULER,
        "ipvs_scheduler",
        _IPVS,
        "How connections are spread: rr, lc, sh, …",
        ("ipvs",),
    ),
    Flag(
        "ipvs-exclude-cidrs",
        CIDRS,
        "ipvs_exclude_cidrs",
        _IPVS,
        "Virtual servers in these are not ours.",
        ("ipvs",),
    ),
    Flag("ipvs-strict-arp", BOOL, "ipvs_strict_arp", _IPVS, "Set arp_ignore 1 and arp_announce 2.", ("ipvs",)),
    Flag("ipvs-tcp-timeout", DURATION, "ipvs_tcp_timeout", _IPVS, "Idle TCP; 0: leave alone.", ("ipvs",), True),
    Flag(
        "ipvs-tcpfin-timeout",
        DURATION,
        "ipvs_tcp_fin_timeout",
        _IPVS,
        "TCP after a FIN; 0: leave alone.",
        ("ipvs",),
        True,
    ),
    Flag("ipvs-udp-timeout", DURATION, "ipvs_udp_timeout", _IPVS, "Idle UDP; 0: leave alone.", ("ipvs",), True),
    Flag(
        "ipvs-sync-period",
        DURATION,
        "sync_period",
        _IPVS,
        "Check the kernel for drift this often.",
        ("ipvs",),
    ),
    Flag(
        "ipvs-min-sync-period",
        DURATION,
        "min_sync_period",
        _IPVS,
        "Shortest time between two writes.",
        ("ipvs",),
    ),
    Flag(
        "conntrack-max-per-core",
        COUNT,
        "conntrack_max_per_core",
        _CONNTRACK,
        "Tracked connections per CPU; 0: leave alone.",
        zero_is_none=True,
    ),
    Flag("conntrack-min", COUNT, "conntrack_min", _CONNTRACK, "At least so many in all."),
    Flag(
        "conntrack-tcp-timeout-established",
        DURATION,
        "conntrack_tcp_established_timeout",
        _CONNTRACK,
        "Idle TCP; 0: leave alone.",
        zero_is_none=True,
    ),
    Flag(
        "conntrack-tcp-timeout-close-wait",
        DURATION,
        "conntrack_tcp_close_wait_timeout",
        _CONNTRACK,
        "Half-closed TCP; 0: leave alone.",
        zero_is_none=True,
    ),
    Flag(
        "conntrack-tcp-be-liberal",
        BOOL,
        "conntrack_tcp_be_liberal",
        _CONNTRACK,
        "Accept TCP outside the window.",
    ),
    Flag(
        "conntrack-udp-timeout",
        DURATION,
        "conntrack_udp_timeout",
        _CONNTRACK,
        "UDP without a reply; 0: leave alone.",
        zero_is_none=True,
    ),
    Flag(
        "conntrack-udp-timeout-stream",
        DURATION,
        "conntrack_udp_stream_timeout",
        _CONNTRACK,
        "UDP with replies; 0: leave alone.",
        zero_is_none=True,
    ),
    Flag("oom-score-adj", SCORE, "oom_score_adj", _LOG, "The process's oom_score_adj, -1000 to 1000."),
    Flag("logging-format", FORMAT, "log_format", _LOG, "text (default) or json."),
    Flag("v", COUNT, "verbosity", _LOG, "4 and more: details; 8 and more: libraries too.", short="v"),
    Flag("feature-gates", TEXT, "", _DROP_IN, "No effect.", ignored="there are no feature gates here"),
    Flag("config-sync-period", DURATION, "", _DROP_IN, "No effect.", ignored=_RESYNC),
    Flag("vmodule", TEXT, "", _DROP_IN, "No effect.", ignored=_VMODULE),
    Flag("log-flush-frequency", TEXT, "", _DROP_IN, "No effect.", ignored=_AT_ONCE),
    Flag("log-text-split-stream", BOOL, "", _DROP_IN, "No effect.", ignored=_ONE_STREAM),
    Flag("log-text-info-buffer-size", TEXT, "", _DROP_IN, "No effect.", ignored=_AT_ONCE),
    Flag("log-json-split-stream", BOOL, "", _DROP_IN, "No effect.", ignored=_ONE_STREAM),
    Flag("log-json-info-buffer-size", TEXT, "", _DROP_IN, "No effect.", ignored=_AT_ONCE),
    Flag("healthz-port", TEXT, "", _DROP_IN, "No effect.", ignored="say --healthz-bind-address ADDRESS:PORT"),
    Flag("metrics-port", TEXT, "", _DROP_IN, "No effect.", ignored="say --metrics-bind-address ADDRESS:PORT"),
    Flag("profiling", BOOL, "", _DROP_IN, "No effect.", ignored="there is no /debug/pprof here"),
    Flag("kube-api-content-type", TEXT, "", _DROP_IN, "No effect.", ignored=_CLIENT),
    Flag("kube-api-qps", TEXT, "", _DROP_IN, "No effect.", ignored=_CLIENT),
    Flag("kube-api-burst", TEXT, "", _DROP_IN, "No effect.", ignored=_CLIENT),
    Flag(
        "show-hidden-metrics-for-version",
        TEXT,
        "",
        _DROP_IN,
        "No effect.",
        ignored="no metric is hidden here",
    ),
)
