"""The golden comparison itself: it forgives exactly what golden/README.md says it forgives."""

from __future__ import annotations

import pytest

from tests.golden_rules import differences, golden, normal_form, without_nfacct

TEXTS = ["iptables-save.txt", "ip6tables-save.txt"]


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_differs_from_itself_without_nfacct(name: str) -> None:
    text = golden(name)
    assert "nfacct" in text
    assert differences(text, without_nfacct(text)) == []


def test_dispatch_rules_may_come_in_any_order_but_the_nodeports_jump_is_last() -> None:
    lines = golden("iptables-save.txt").splitlines()
    dispatch = [i for i, line in enumerate(lines) if line.startswith("-A KUBE-SERVICES -d 10.97")]
    first, last = dispatch[-2], dispatch[-1]
    swapped = lines.copy()
    swapped[first], swapped[last] = lines[last], lines[first]
    assert differences("\n".join(lines), "\n".join(swapped)) == []

    jump = next(i for i, line in enumerate(lines) if line.endswith("-j KUBE-NODEPORTS") and "KUBE-SERVICES" in line)
    moved = lines.copy()
    moved.insert(first, moved.pop(jump))
    assert [line.split(":")[0] for line in differences("\n".join(lines), "\n".join(moved))] == ["nat KUBE-SERVICES"]


@pytest.mark.parametrize("prefix", ["-A KUBE-SVC-6ZVTNT3QB37HUYTA", "-A KUBE-POSTROUTING", "-A INPUT", "-A FORWARD"])
def test_order_counts_elsewhere(prefix: str) -> None:
    lines = golden("iptables-save.txt").splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith(prefix)]
    swapped = lines.copy()
    swapped[rules[0]], swapped[rules[1]] = lines[rules[1]], lines[rules[0]]
    assert len(differences("\n".join(lines), "\n".join(swapped))) == 1


@pytest.mark.parametrize("name", TEXTS)
def test_every_rule_counts(name: str) -> None:
    """Leaving out any one rule or declaration of a chain without rules is seen."""
    text = without_nfacct(golden(name))
    lines = text.splitlines()
    empty = {chain for (_, chain), rules in normal_form(text).items() if not rules}
    for i, line in enumerate(lines):
        is_rule = line.startswith("-A")
        if is_rule or line[1:].split(" ")[0] in empty:
            assert differences(text, "\n".join(lines[:i] + lines[i + 1 :])), line
