"""Settings: every choice an operator has, in one immutable value; and `load`, which resolves it.

Three sources, the later the stronger: defaults (kube-proxy v1.36's, some of which depend on the mode), a
KubeProxyConfiguration file, flags. The tables of fields and flags are in config_schema.py; reading the file's
form is config_file.py's. Everything wrong is reported at once; what has no meaning here is a warning.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from .config_schema import (
    ALL_MODES,
    FIELDS,
    FLAGS,
    GATES,
    MODE_DEFAULTS,
    SCHEDULERS,
    STOCK,
    Field,
    Flag,
    node_name,
    show,
)
from .model import Family

Mode = Literal["iptables", "ipvs", "nftables"]
Variant = Literal["auto", "nft", "legacy"]
DetectLocal = Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent runs with: kube-proxy's configuration, resolved.

    Times are seconds, CIDRs canonical. None means: leave the kernel's own value alone.
    """

    mode: Mode = "iptables"
    source: str = ""  # folder of manifests; "": the API server
    kubeconfig: str = ""  # "": the pod's service account
    master: str = ""  # URL of the API server, instead of kubeconfig's
    node_name: str = ""
    bind_address: str = "0.0.0.0"  # the node's primary IP, if specified (neither 0.0.0.0 nor ::)
    bind_address_hard_fail: bool = False

    cluster_cidrs: tuple[str, ...] = ()  # at most one per family
    detect_local_mode: DetectLocal = "ClusterCIDR"
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    node_port_addresses: tuple[str, ...] = ()  # CIDRs or ("primary",); (): all local addresses

    masquerade_bit: int = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True  # never in ipvs and nftables mode
    sync_period: float = 30.0
    min_sync_period: float = 1.0
    iptables_variant: Variant = "auto"
    nftables_counters: bool = False  # count packets and bytes of each service address
    service_cidrs: tuple[str, ...] = ()  # where cluster IPs come from; () where that is not known

    ipvs_scheduler: str = "rr"
    ipvs_exclude_cidrs: tuple[str, ...] = ()
    ipvs_strict_arp: bool = False
    ipvs_tcp_timeout: float | None = None
    ipvs_tcp_fin_timeout: float | None = None
    ipvs_udp_timeout: float | None = None

    conntrack_max_per_core: int | None = 32768  # None: conntrack_min does not matter either
    conntrack_min: int = 131072
    conntrack_tcp_established_timeout: float | None = 86400.0
    conntrack_tcp_close_wait_timeout: float | None = 3600.0
    conntrack_tcp_be_liberal: bool = False
    conntrack_udp_timeout: float | None = None
    conntrack_udp_stream_timeout: float | None = None

    healthz_bind_address: str = "0.0.0.0:10256"  # "": do not serve
    metrics_bind_address: str = "127.0.0.1:10249"  # "": do not serve
    oom_score_adj: int = -999
    log_format: Literal["text", "json"] = "text"
    verbosity: int = 0

    @property
    def masquerade_mark(self) -> int:
        return 1 << self.masquerade_bit

    @property
    def drift_period(self) -> float:
        """Seconds between two looks at whether the kernel still holds what was written."""
        return self.sync_period

    def cluster_cidr(self, family: Family) -> str:
        """The CIDR of pods in that family, "" if there is none."""
        for cidr in self.cluster_cidrs:
            if Family.of(cidr) is family:
                return cidr
        return ""


class Origin(NamedTuple):
    """Where a setting's value came from; `where` is FILE:LINE of a file, the name of a flag."""

    kind: Literal["default", "file", "flag"]
    where: str = ""
    field: str = ""  # the file's field

    def __str__(self) -> str:
        return " ".join(part for part in (self.where, self.field) if part) or self.kind


class Loaded(NamedTuple):
    """Settings with their history: `load(loaded.config_file, loaded.flags)` reads them anew."""

    settings: Settings
    warnings: tuple[str, ...]
    origins: Mapping[str, Origin]  # one for every setting
    config_file: Path | None
    flags: Mapping[str, object]  # those given


class ConfigError(Exception):
    """A configuration that cannot be used; `problems` are whole sentences for the operator, all there are."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load(config_file: Path | None = None, flags: Mapping[str, object] | None = None) -> Loaded:
    """Resolve the settings from a file and flags.

    `flags` maps a flag's name with underscores ("cluster_cidr") to its text, or to a value of the type a file
    would have; None is "not given". Raises ConfigError, also for a name no flag has.
    """
    resolution = _Resolution()
    given: dict[str, object] = {key: value for key, value in (flags or {}).items() if value is not None}
    known = {flag.key: flag for flag in FLAGS}
    if unknown := sorted(given.keys() - known.keys()):
        raise ConfigError([f"--{key.replace('_', '-')}: is not a flag" for key in unknown])
    fields: list[tuple[Field, object, str]] = []
    if config_file is not None:
        fields = resolution.read(config_file)
    from_flags = [(known[key], value) for key, value in given.items()]
    mode = resolution.choose_mode(fields, from_flags)
    for field, value, where in fields:
        resolution.take_field(field, value, where, mode)
    for flag, value in from_flags:
        resolution.take_flag(flag, value, mode)
    settings = resolution.finish(mode)
    origins = {name: resolution.origins.get(name, Origin("default")) for name in Settings.__struct_fields__}
    return Loaded(settings, tuple(resolution.warnings), origins, config_file, given)


# A flag given as "" means: as if not given. (An address to serve on is different: "" is "do not serve".)
_BLANK_IS_UNSET = {
    "mode",
    "node_name",
    "detect_local_mode",
    "ipvs_scheduler",
    "log_format",
    "iptables_variant",
    "bind_address",
}


class _Resolution:
    """The values given so far, with their origins, and what is wrong with them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, Origin] = {}
        self.warnings: list[str] = []
        self.problems: list[str] = []

    def read(self, file: Path) -> list[tuple[Field, object, str]]:
        """The file's fields with a value that is not zero, as (field, resolved value, FILE:LINE)."""
        from .config_file import read

        entries, problems = read(file)
        self.problems += problems
        by_path = {field.path: field for field in FIELDS}
        result = []
        for entry in entries:
            field, where = by_path[entry.path], f"{file}:{entry.line}"
            if entry.value is None:
                continue
            try:
                value = field.kind.check(entry.value)
            except ValueError as error:
                self.problems.append(f"{where}: {field.path}: {error}")
                continue
            if field.pointer or not _is_zero(value):
                result.append((field, value, where))
        return result

    def choose_mode(self, fields: list[tuple[Field, object, str]], flags: list[tuple[Flag, object]]) -> str:
        """The mode decides which fields count; an invalid one is reported when its turn comes."""
        chosen: object = ""
        for field, value, _ in fields:
            chosen = value if field.setting == "mode" else chosen
        for flag, given in flags:
            chosen = given if flag.setting == "mode" and given != "" else chosen
        return str(chosen) if chosen in ALL_MODES else "iptables"

    def take_field(self, field: Field, value: object, where: str, mode: str) -> None:
        if field.refused and value:
            self.problems.append(f"{where}: {field.path}: {field.refused}")
        elif field.ignored and not _is_zero(value) and value not in STOCK.get(field.path, ()):
            listed = f" ({', '.join(sorted(value))})" if field.kind is GATES and isinstance(value, dict) else ""
            self.warnings.append(f"{where}: {field.path}{listed}: has no effect: {field.ignored}")
        elif field.setting and mode in field.modes:
            self._set(field.setting, value, field.zero_is_none, Origin("file", where, field.path))

    def take_flag(self, flag: Flag, given: object, mode: str) -> None:
        try:
            value = flag.kind.check(flag.kind.parse(given) if isinstance(given, str) else given)
        except ValueError as error:
            self.problems.append(f"--{flag.name}: {error}")
            return
        if flag.ignored:
            self.warnings.append(f"--{flag.name}: has no effect: {flag.ignored}")
        elif mode not in flag.modes:
            self.warnings.append(f"--{flag.name}: has no effect in {mode} mode")
        elif value != "" or flag.setting not in _BLANK_IS_UNSET:
            self._set(flag.setting, value, flag.zero_is_none, Origin("flag", f"--{flag.name}"))

    def _set(self, setting: str, value: object, zero_is_none: bool, origin: Origin) -> None:
        self.values[setting] = None if zero_is_none and not value else value
        self.origins[setting] = origin

    def finish(self, mode: str) -> Settings:
        """Fill in defaults, check what belongs together, build; ConfigError if anything was wrong."""
        defaults: dict[str, Any] = {"node_name": socket.gethostname().strip().lower()} | MODE_DEFAULTS[mode]
        if ":" in self.values.get("bind_address", ""):
            defaults |= {"healthz_bind_address": "[::]:10256", "metrics_bind_address": "[::1]:10249"}
        score = self.values.get("oom_score_adj", 0)
        if not -1000 <= score <= 1000:
            self.warnings.append(f"{self._where('oom_score_adj')}: {score} is not from -1000 to 1000; -999 is used")
            del self.values["oom_score_adj"], self.origins["oom_score_adj"]
        merged = defaults | self.values
        settings = Settings(**merged)
        self._check_together(settings)
        if self.problems:
            raise ConfigError(self.problems)
        return settings

    def _check_together(self, s: Settings) -> None:
        """What no single field can be checked for."""
        if s.sync_period <= 0:
            self.problems.append(f"{self._where('sync_period')}: must be longer than 0")
        elif s.min_sync_period > s.sync_period:
            longer = f"{s.min_sync_period:g} s is longer than the sync period, {s.sync_period:g} s"
            self.problems.append(f"{self._where('min_sync_period', 'sync_period')}: {longer}")
        needs = {
            "BridgeInterface": (s.bridge_interface, "detectLocal.bridgeInterface (--pod-bridge-interface)"),
            "InterfaceNamePrefix": (
                s.interface_name_prefix,
                "detectLocal.interfaceNamePrefix (--pod-interface-name-prefix)",
            ),
        }
        given, name = needs.get(s.detect_local_mode, ("not needed", ""))
        if not given:
            self.problems.append(f"{self._where('detect_local_mode')}: {s.detect_local_mode} needs {name}")
        if s.mode == "ipvs" and s.ipvs_scheduler not in SCHEDULERS:
            unknown = f"{show(s.ipvs_scheduler)} is no scheduler known to be in Linux"
            self.warnings.append(f"{self._where('ipvs_scheduler')}: {unknown}")
        try:
            node_name(s.node_name)
        except ValueError as error:
            self.problems.append(f"the host name {error}; give one with --hostname-override")

    def _where(self, *settings: str) -> str:
        """What to name in a message: the file's field or the flag that gave the first of these settings."""
        origin = next((self.origins[name] for name in settings if name in self.origins), Origin("default"))
        return f"{origin.where}: {origin.field}" if origin.field else origin.where or settings[0]


def _is_zero(value: object) -> bool:
    """Go's zero value, which a file's field has when it is not given."""
    return value in ("", 0, (), [], {})
