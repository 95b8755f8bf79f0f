"""Reads how many packets certain rules have matched, for metrics. Writes nothing, so any thread may ask."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping

from ..model import Family
from .exec import Runner, run
from .iptables import Variant, tool

# By metric: table, chain, and what its rule is known by.
RULES = {
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total": ("filter", "KUBE-FORWARD", "--ctstate INVALID"),
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total": (
        "nat",
        "KUBE-POSTROUTING",
        "--ctorigdst 127.0.0.0/8",
    ),
}
_COUNT = re.compile(r" -c (\d+) \d+")


def packets(families: Iterable[Family], variant: Variant, runner: Runner = run) -> Mapping[str, int]:
    """By metric, the packets of its rules in these families; a rule that is not there has had none."""
    families = tuple(families)
    return {
        metric: sum(_packets(family, variant, *rule, runner) for family in families) for metric, rule in RULES.items()
    }


def _packets(family: Family, variant: Variant, table: str, chain: str, known_by: str, runner: Runner) -> int:
    program = f"{tool(family)}-{variant}"
    try:
        # One chain, not iptables-save: that would read the rules of all Services.
        done = runner([program, "-w", "1", "-t", table, "-v", "-S", chain], timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    lines = (line for line in done.out.splitlines() if known_by in line)
    return sum(int(found.group(1)) for line in lines if (found := _COUNT.search(line)))
