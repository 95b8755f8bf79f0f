"""What the benchmark compares miniproxy with: the system's tools write just what the agent would write."""

from __future__ import annotations

import json
import sys

import pytest

from miniproxy.backends import choose
from miniproxy.bench import ipvs_tools
from miniproxy.model import Family
from miniproxy.planner.ipvs_text import DummyLink, IpSet, SetEntry, VirtualAddress, VirtualServer, sections_of
from miniproxy.transaction import Change

from .space import SETTINGS, network_namespace, run

pytestmark = pytest.mark.ipvs


def test_the_tools_write_the_same_state() -> None:
    with network_namespace():
        told = json.loads(run(sys.executable, "-m", "miniproxy.bench.ipvs_tools", "20", "2"))
        assert told["full"] == pytest.approx(told["ipset"] + told["ip"] + told["ipvsadm"])
        backend = choose(SETTINGS).backends[Family.V4]
        kinds = (DummyLink, IpSet, SetEntry, VirtualAddress, VirtualServer)
        found = [obj for obj in backend.read().values() if isinstance(obj, kinds)]
        written = backend.render([Change(obj.key, None, obj) for obj in found])
        lines = {(s.tool, line) for s in sections_of(written) for line in s.lines}
        wanted = {(tool, line) for tool, text in ipvs_tools.state(20, 2).items() for line in text.splitlines()}
        assert lines == {(tool, line) for tool, line in wanted if tool != "iptables"}
