#!/usr/bin/env python3
"""table.py [--markdown] JUNIT.xml...: what e2e tests did, one line for each that ran, sorted by name.

Exits 1 if one failed. Tables of two runs can be compared with diff.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import NamedTuple


class Row(NamedTuple):
    name: str
    result: str  # pass, FAIL, skip
    seconds: float
    message: str = ""


def rows(files: list[str]) -> list[Row]:
    cases = (case for file in files for case in ElementTree.parse(file).getroot().iter("testcase"))
    return sorted(row for case in cases if (row := _row(case)))


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


def text(table: list[Row]) -> str:
    lines = [f"{r.result:4} {r.seconds:6.1f}  {r.name}{f'   -- {r.message}' if r.message else ''}" for r in table]
    return "\n".join([*lines, total(table)])


def markdown(table: list[Row]) -> str:
    lines = [f"| {r.name} | {r.result}{f': {r.message}' if r.message else ''} | {r.seconds:.0f} |" for r in table]
    return "\n".join(["| test | result | seconds |", "|---|---|---|", *lines, "", total(table)])


def total(table: list[Row]) -> str:
    counts = Counter(row.result for row in table)
    seconds = sum(row.seconds for row in table)
    told = f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped"
    return f"total: {told}; {seconds:.0f} s of tests"


def main(arguments: list[str]) -> int:
    files = [argument for argument in arguments if argument != "--markdown"]
    table = rows(files)
    print(markdown(table) if "--markdown" in arguments else text(table))
    return any(row.result == "FAIL" for row in table)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
