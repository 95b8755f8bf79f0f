"""What /configz shows is a configuration file that gives the same settings again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miniproxy.config import Settings, load
from miniproxy.configz import configuration

FLAGS: list[dict[str, Any]] = [
    {},
    {"proxy_mode": "nftables"},
    {"proxy_mode": "ipvs", "ipvs_scheduler": "lc", "ipvs_strict_arp": "true"},
    {"cluster_cidr": "10.128.0.0/9,fd00:128::/32", "masquerade_all": "true", "iptables_sync_period": "1m30s"},
    {"nodeport_addresses": "10.0.0.0/8,fd00::/8", "conntrack_max_per_core": "0", "bind_address": "192.0.2.1"},
    {"kubeconfig": "/etc/kubeconfig", "healthz_bind_address": "[::1]:1", "conntrack_tcp_timeout_established": "0"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "defaults")
def test_the_settings_come_back(flags: dict[str, Any], tmp_path: Path) -> None:
    settings = load(None, {"hostname_override": "n1", **flags}).settings
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configuration(settings)))
    again = load(file).settings
    assert differences(again, settings) == {}


def differences(again: Settings, settings: Settings) -> dict[str, Any]:
    pairs = {name: (getattr(again, name), getattr(settings, name)) for name in Settings.__struct_fields__}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
