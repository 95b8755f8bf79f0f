"""Compares IPVS mode's state with the golden one (kube-proxy's), up to what docs/ipvs.md lists.

Every exception stands here by name, and is checked to be needed: see test_planner.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from miniproxy.model import Family
from miniproxy.planner import ipvs
from miniproxy.planner.ipvs_text import IpSet, SetEntry, VirtualServer
from tests.golden_rules import golden, normal_form

from .texts import parse_servers, parse_sets

OUR_SETS = ("KUBE-CLUSTER-IP-NO-LOCAL", "KUBE-EXTERNAL-NO-LOCAL")
# The node had this address besides those of the Node object.
NODE_ADDRESSES = ("127.0.0.1", "::1", "172.30.0.2", "172.30.9.2", "fd00:30::2")

# internalTrafficPolicy Local, and nobody on this node: kube-proxy reaches a pod of another node.
POLICY_BROKEN = {"10.97.0.24 tcp 80"}
# Not ready: nothing is ever sent there, so it cannot reach itself.
UNREACHABLE_ENTRIES = {("KUBE-LOOP-BACK", "10.180.17.1,tcp:8080,10.180.17.1")}


def servers() -> dict[str, VirtualServer]:
    """The golden virtual servers by "ADDRESS PROTOCOL PORT"."""
    return {server.key[1]: server for server in parse_servers(golden("ipvsadm.txt"))}


def sets() -> tuple[set[IpSet], set[SetEntry]]:
    """The golden sets and entries of both families."""
    names = [ipvs.set_name(name, family) for name in ipvs.SETS for family in Family]
    found = list(parse_sets(golden("ipset.txt"), names))
    return {f for f in found if isinstance(f, IpSet)}, {f for f in found if isinstance(f, SetEntry)}


def addresses() -> set[str]:
    return {line.partition("/")[0] for line in golden("kube-ipvs0.txt").splitlines()}


def server_differences(got: Iterable[VirtualServer]) -> list[str]:
    """Empty when these are the golden virtual servers but for POLICY_BROKEN, which have no real server."""
    want = servers()
    for key in POLICY_BROKEN:
        want[key] = want[key]._replace(servers=())
    return _differences(want, {server.key[1]: server for server in got})


def entry_differences(got: Iterable[SetEntry]) -> list[str]:
    ours = {ipvs.set_name(name, family) for name in OUR_SETS for family in Family}
    want = {e: e for e in sets()[1] if e not in UNREACHABLE_ENTRIES}
    return _differences(want, {e: e for e in got if e.set not in ours})


def _differences(want: Mapping[Any, object], got: Mapping[Any, object]) -> list[str]:
    return [
        f"{key}\n  want {want.get(key)}\n  got  {got.get(key)}"
        for key in sorted({*want, *got}, key=str)
        if want.get(key) != got.get(key)
    ]


def rule_differences(family: Family, text: str) -> list[str]:
    """Differences of an iptables-save text from the golden one.

    kube-proxy has no rule for a set that is empty just now; ours are there from the beginning, so that a first
    entry takes one line. And two sets are ours, with three rules.
    """
    want = normal_form(golden(f"ipvs-{'ip6' if family is Family.V6 else 'ip'}tables-save.txt"))
    got = normal_form(text)
    found = []
    for key in sorted({*want, *got}):
        wanted, held = want.get(key, ()), got.get(key, ())
        spare = _rules_of_empty_sets(family)
        kept = tuple(rule for rule in held if rule in wanted or not any(f" {name} " in rule for name in spare))
        if key[1] == "KUBE-IPVS-OUT-FILTER":
            wanted, kept = tuple(sorted(wanted)), tuple(sorted(kept))
        if wanted != kept:
            found.append(f"{key}:" + "".join(f"\n  want {r}" for r in wanted) + "".join(f"\n  got  {r}" for r in kept))
    return found


def _rules_of_empty_sets(family: Family) -> set[str]:
    names = {ipvs.set_name(name, family) for name in ipvs.SETS}
    return names - {entry.set for entry in sets()[1]}
