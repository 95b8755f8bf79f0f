"""Compares rules with the golden ones, up to the order and the rules that carry no meaning.

Takes iptables-save text (what a kernel holds, or what `plan` prints) and hands back the places where two
texts differ, readable enough to be a test's whole failure message. Which order is free: golden/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"

# The dispatch chains: each rule matches other packets than its neighbours, so their order means nothing.
UNORDERED = {"KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES", "KUBE-PROXY-FIREWALL"}
MARKERS = {"KUBE-PROXY-CANARY", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"}
NODEPORTS_JUMP = " -j KUBE-NODEPORTS"

# kube-proxy counts two kinds of packets with nfacct where the kernel has it: one match in an ordinary rule,
# and copies of the NodePort rules for 127.0.0.0/8 that do the same as the rule that follows them.
NFACCT_MATCH = re.compile(r" -m nfacct --nfacct-name +\S+")
NFACCT_COPY = "localhost_nps_accepted_pkts"
# What miniproxy has instead of the copies: one rule that counts and does nothing.
COUNTER = '-m comment --comment "count localhost NodePorts"'

Chain = tuple[str, str]  # table, chain
Rules = Mapping[Chain, tuple[str, ...]]


def golden(name: str) -> str:
    """The text of one golden file."""
    return (GOLDEN / name).read_text()


def without_nfacct(text: str) -> str:
    """The iptables-save text as kube-proxy writes it on a kernel without nfacct."""
    copies = (NFACCT_COPY, COUNTER)
    lines = (NFACCT_MATCH.sub("", line) for line in text.splitlines() if not any(copy in line for copy in copies))
    return "\n".join(lines) + "\n"


def normal_form(text: str) -> Rules:
    """All KUBE chains, also empty ones, and what other chains say about them; free order is sorted away."""
    chains: dict[Chain, list[str]] = {}
    table = ""
    for line in without_nfacct(text).splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":KUBE-"):
            chains.setdefault((table, line[1:].split()[0]), [])
        elif line.startswith("-A ") and "KUBE-" in line:
            chains.setdefault((table, line.split()[1]), []).append(" ".join(line.split()))
    return {
        key: _free_order(key, rules) if key[1] in UNORDERED else tuple(rules)
        for key, rules in chains.items()
        if key[1] not in MARKERS
    }


def _free_order(key: Chain, rules: list[str]) -> tuple[str, ...]:
    """Sorted, but around the jump to the NodePorts: external IPs of the node must meet their rule first."""
    jumps = [i for i, rule in enumerate(rules) if rule.endswith(NODEPORTS_JUMP)]
    if key != ("nat", "KUBE-SERVICES") or not jumps:
        return tuple(sorted(rules))
    jump = jumps[0]
    return (*sorted(rules[:jump]), rules[jump], *sorted(rules[jump + 1 :]))


def differences(want: str, got: str) -> list[str]:
    """An entry for each chain that is missing, extra or has other rules; none if the texts mean the same."""
    wanted, held = normal_form(want), normal_form(got)
    found = []
    for key in sorted(wanted.keys() | held.keys()):
        place = f"{key[0]} {key[1]}"
        if key not in held:
            found.append(f"{place}: chain missing")
        elif key not in wanted:
            found.append(f"{place}: chain should not be there, holds {list(held[key])}")
        elif wanted[key] != held[key]:
            found.append(_chain_difference(place, wanted[key], held[key]))
    return found


def _chain_difference(place: str, want: tuple[str, ...], got: tuple[str, ...]) -> str:
    missing = [f"\n  missing {rule}" for rule in want if rule not in got]
    extra = [f"\n  extra   {rule}" for rule in got if rule not in want]
    if missing or extra:
        return f"{place}:" + "".join(missing + extra)
    return f"{place}: same rules in another order or number" + "".join(f"\n  holds   {rule}" for rule in got)
