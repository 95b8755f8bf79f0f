"""What must hold of any iptables state the agent makes."""

from __future__ import annotations

from tests.fake_iptables import Table, target

_BUILT_IN = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
_VERDICTS = {"", "ACCEPT", "DROP", "RETURN", "MARK", "MASQUERADE", "DNAT", "REJECT"}


def check(tables: dict[str, Table]) -> None:
    """Raise AssertionError naming the chain at fault."""
    for name, table in tables.items():
        jumps = {target(rule) for rules in table.values() for rule in rules} - _VERDICTS
        assert jumps <= table.keys(), f"{name}: jumps to chains that are not there: {jumps - table.keys()}"
        unused = table.keys() - jumps - _BUILT_IN - {"KUBE-MARK-MASQ"}
        assert not unused, f"{name}: chains nobody jumps to: {unused}"
        for chain, rules in table.items():
            assert len(set(rules)) == len(rules), f"{name} {chain}: a rule stands twice"
    tail = tables["nat"]["KUBE-SERVICES"][-1]
    assert target(tail) == "KUBE-NODEPORTS", "the jump to the node ports must be last: it takes all local addresses"
    for chain, rules in tables["nat"].items():
        if chain.startswith(("KUBE-SVC-", "KUBE-SVL-")):
            check_balance(chain, rules)


def check_balance(chain: str, rules: list[str]) -> None:
    """Random choices 1/n, 1/(n-1), …, and a last one that takes the rest: every endpoint gets the same share."""
    chosen = [r for r in rules if "-SEP-" in target(r) and "--rcheck" not in r]
    assert "--probability" not in chosen[-1], f"{chain}: packets can fall through"
    for left, rule in zip(range(len(chosen), 1, -1), chosen, strict=False):
        probability = float(rule.split("--probability ")[1].split()[0])
        assert abs(probability - 1 / left) < 1e-6, f"{chain}: unequal shares"
