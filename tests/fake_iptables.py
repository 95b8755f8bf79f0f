"""An iptables of one family in memory: keeps state like the kernel and refuses what the kernel refuses.

It executes the very text that iptables-restore would be given, table by table, each all or nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from miniproxy.planner import rules
from miniproxy.planner.iptables import IptablesObject
from miniproxy.transaction import Change, Transaction, TransactionError

_BUILT_IN = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
}
_TARGETS = {"ACCEPT", "DROP", "RETURN", "MARK", "MASQUERADE", "DNAT", "REJECT"}

Table = dict[str, list[str]]


class FakeIptables:
    def __init__(self, batch: int = 0) -> None:
        self.batch = batch
        self.tables: dict[str, Table] = {t: {c: [] for c in chains} for t, chains in _BUILT_IN.items()}
        self.sent: list[Transaction] = []
        self.fault: Callable[[str], None] = lambda line: None  # may raise TransactionError at any line
        self.refuses: Callable[[str], bool] = lambda line: False  # lines the kernel does not like

    def read(self) -> dict[Any, IptablesObject]:
        return rules.parse_save(self.text()).objects

    def same(self, planned: IptablesObject, actual: IptablesObject) -> bool:
        return rules.same(planned, actual)

    def stream(self, parts: Iterable[Sequence[Change]]) -> Transaction | None:
        return None if self.batch else rules.stream(parts)

    def render(self, changes: Sequence[Change]) -> Transaction:
        return rules.render(changes)

    def text(self) -> str:
        lines: list[str] = []
        for name, table in self.tables.items():
            lines.append(f"*{name}")
            lines += [f":{c} {'ACCEPT' if c in _BUILT_IN[name] else '-'} [0:0]" for c in table]
            lines += [f"-A {c} {rule}" for c, found in table.items() for rule in found]
            lines.append("COMMIT")
        return "\n".join(lines)

    def apply(self, transaction: Transaction) -> None:
        self.sent.append(transaction)
        name, table = "", {}
        for line in transaction.text.splitlines():
            self.fault(line)
            if self.refuses(line):
                raise TransactionError(f"refused: {line}")
            if line.startswith("*"):
                name, table = line[1:], copy.deepcopy(self.tables[line[1:]])
            elif line == "COMMIT":
                _check_jumps(table)
                self.tables[name] = table
            else:
                _execute(table, line)


def _execute(table: Table, line: str) -> None:
    if line.startswith(":"):
        table[line[1:].split()[0]] = []
        return
    command, chain, *rest = line.split(" ", 2)
    rule = rest[0] if rest else ""
    if chain not in table:
        raise TransactionError(f"no chain {chain}: {line}")
    if command == "-A":
        table[chain].append(rule)
    elif command == "-I":
        table[chain].insert(0, rule)
    elif command == "-D":
        if rule not in table[chain]:
            raise TransactionError(f"no such rule: {line}")
        table[chain].remove(rule)
    elif command == "-X":
        if table[chain] or any(target(r) == chain for rules_ in table.values() for r in rules_):
            raise TransactionError(f"chain is in use: {line}")
        del table[chain]
    else:
        raise TransactionError(f"unknown command: {line}")


def target(rule: str) -> str:
    """Where a rule jumps to; "" for a rule that only counts."""
    words = rule.split()
    return words[words.index("-j") + 1] if "-j" in words else ""


def _check_jumps(table: Table) -> None:
    for chain, found in table.items():
        for rule in found:
            jump = target(rule)
            if jump and jump not in _TARGETS and jump not in table:
                raise TransactionError(f"{chain} jumps to {jump}, which is not there")
