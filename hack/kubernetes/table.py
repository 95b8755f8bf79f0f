#!/usr/bin/env python3
"""table.py FOLDER: what e2e tests did, one line for each that ran, sorted by name; exits 1 if one failed.
table.py LABEL=FOLDER...: several runs side by side, as the Markdown of docs/conformance.md.

A folder is one that hack/conformance wrote; its JUnit files are read.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    name: str
    result: str  # pass, FAIL, skip
    seconds: float
    message: str = ""


def rows(folder: Path) -> list[Row]:
    cases = (case for file in folder.rglob("junit*.xml") for case in ElementTree.parse(file).iter("testcase"))
    found = sorted(row for case in cases if (row := _row(case)))
    if not found:
        raise SystemExit(f"table.py: no test ran in {folder}")
    return found


def _row(case: ElementTree.Element) -> Row | None:
    """None for what is no test, or was not selected."""
    full, seconds = case.get("name", ""), float(case.get("time", "0"))
    if not full.startswith("[It]"):
        return None
    name = re.sub(r"^\[It\] (\[sig-network\] )?|( \[(sig-network|LinuxOnly|Conformance)[^]]*\])+$", "", full)
    failure = case.find("failure") if case.find("failure") is not None else case.find("error")
    if failure is not None:
        return Row(name, "FAIL", seconds, _one_line(failure.get("message") or failure.text or ""))
    skipped = case.find("skipped")
    if skipped is None:
        return Row(name, "pass", seconds)
    message = _one_line(skipped.get("message") or "")
    return None if message in ("", "skipped") else Row(name, "skip", seconds, message)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def lines(table: Iterable[Row]) -> list[str]:
    return [f"{r.result:4} {r.seconds:6.1f}  {r.name}{f'   -- {r.message}' if r.message else ''}" for r in table]


def total(table: Iterable[Row]) -> str:
    counts = Counter(row.result for row in table)
    return f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped"


def side_by_side(runs: Mapping[str, list[Row]]) -> list[str]:
    results = {label: {row.name: row.result for row in table} for label, table in runs.items()}
    names = sorted({name for by_name in results.values() for name in by_name})
    body = [[name, *(by_name.get(name, "") for by_name in results.values())] for name in names]
    head = [["test", *runs], ["---"] * (len(runs) + 1)]
    totals = [["**all**", *(f"**{total(table)}**" for table in runs.values())]]
    return [f"| {' | '.join(cells)} |" for cells in (*head, *body, *totals)]


def main(arguments: list[str]) -> int:
    if "=" in arguments[0]:
        pairs = (argument.split("=", 1) for argument in arguments)
        print(*side_by_side({label: rows(Path(folder)) for label, folder in pairs}), sep="\n")
        return 0
    table = rows(Path(arguments[0]))
    print(*lines(table), f"total: {total(table)}", sep="\n")
    return any(row.result == "FAIL" for row in table)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
