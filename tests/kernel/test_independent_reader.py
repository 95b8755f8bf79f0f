"""What the agent writes, read by somebody else: python-iptables, which asks libiptc and knows nothing of our parser."""

from __future__ import annotations

import json
import sys

import pytest

from miniproxy.agent import Agent
from miniproxy.model import Family
from miniproxy.planner.iptables import Chain, DispatchChain, DispatchRule, Hooks
from tests.kernel.test_iptables import agent_in, sync, world_of
from tests.packets.topology import Namespace

pytest.importorskip(
    "iptc", reason="python-iptables is not installed: pip install '.[iptables]' (needs gcc, libxtables-dev)"
)

READER = """
import iptc, json
found = {}
for table in (iptc.Table.FILTER, iptc.Table.NAT):
    for chain in iptc.Table(table).chains:
        found[f"{table} {chain.name}"] = [rule.target.name for rule in chain.rules]
print(json.dumps(found))
"""


def planned(agent: Agent) -> dict[str, list[str]]:
    """Targets of the rules by chain, from the planned objects alone."""
    chains: dict[str, list[str]] = {}
    objects = agent.reconcilers[Family.V4].desired.values()
    for o in objects:
        match o:
            case Chain(table, name, rules) | Hooks(table, name, rules):
                chains.setdefault(f"{table} {name}", []).extend(map(target, rules))
            case DispatchChain(table, name, tail):
                chains.setdefault(f"{table} {name}", []).extend(map(target, tail))
            case DispatchRule(table, name, _, rule):
                chains.setdefault(f"{table} {name}", []).append(target(rule))
    return {name: sorted(targets) for name, targets in chains.items()}


def target(rule: str) -> str:
    """As libiptc says it; a rule that only counts has none."""
    words = rule.split()
    return words[words.index("-j") + 1] if "-j" in words else ""


def test_every_chain_has_the_planned_targets() -> None:
    with Namespace.create() as namespace:
        agent = agent_in(namespace, "legacy", world_of(seed=7))
        sync(agent)
        held = json.loads(namespace.run(sys.executable, "-c", READER))
    ours = {name: sorted(t or "" for t in targets) for name, targets in held.items() if targets or "KUBE" in name}
    assert ours == planned(agent)
