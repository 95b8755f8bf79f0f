"""Runs the tests marked `ipvs` where there is a kernel with IPVS: here, or in user-mode Linux.

There, one machine is booted for all of them, a second pytest runs inside, and each of its reports becomes a report of
the test of the same name out here, as it arrives.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from miniproxy.lab import uml

REPORTS = "MINIPROXY_IPVS_REPORTS"  # inside: the file that reports are written to, one JSON object a line
_PATIENCE = 600.0  # seconds without any report


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ipvs: needs a kernel with IPVS; runs in user-mode Linux where there is none")


@cache
def _elsewhere() -> bool:
    return REPORTS not in os.environ and not uml.has_ip_vs()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if item.get_closest_marker("ipvs") is None or not _elsewhere():
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reports(item: pytest.Item) -> list[Any]:
    if os.geteuid() != 0:
        return [_word(item, "failed", "IPVS tests need root: run them with sudo")]
    if not uml.available():
        return [_word(item, "skipped", f"this kernel has no IPVS: {uml.HOW_TO_GET_IT}")]
    session = item.session
    if not hasattr(session, "_ipvs_machine"):
        wanted = [i.nodeid for i in session.items if i.get_closest_marker("ipvs")]
        session._ipvs_machine = Inside(item.config, wanted)  # type: ignore[attr-defined]
    inside: Inside = session._ipvs_machine  # type: ignore[attr-defined]
    return inside.wait_for(item) or [_word(item, "failed", f"not run in user-mode Linux:\n{inside.said()}")]


def _word(item: pytest.Item, outcome: Any, text: str) -> pytest.TestReport:
    path, line, _ = item.location
    longrepr: Any = (path, (line or 0) + 1, text) if outcome == "skipped" else text
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, "call")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session, "_ipvs_machine"):
        session._ipvs_machine.close()


class Inside:
    """The machine with the second pytest, and the reports that came from it."""

    def __init__(self, config: pytest.Config, wanted: list[str]) -> None:
        self._config = config
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="miniproxy-ipvs-")))
        (folder / "wanted").write_text("\n".join(wanted))
        self._path = folder / "reports"
        self._path.touch()
        self._log = folder / "log"
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"@{folder / 'wanted'}"]
        out = self._stack.enter_context(self._log.open("w"))
        environment = {REPORTS: str(self._path), "PYTHONDONTWRITEBYTECODE": "1"}
        self._machine = self._stack.enter_context(uml.machine(argv, environment=environment, log=out))
        self._lines = self._follow()
        self._arrived: dict[str, list[Any]] = {}

    def wait_for(self, item: pytest.Item) -> list[Any]:
        """The reports of one test, once its last one has come; none if the machine ended before."""
        found = self._arrived.setdefault(item.nodeid, [])
        while not any(report.when == "teardown" for report in found):
            line = next(self._lines, None)
            if line is None:
                return []
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            self._arrived.setdefault(report.nodeid, []).append(report)
        return found

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def close(self) -> None:
        self._stack.close()

    def _follow(self) -> Iterator[str]:
        """Lines of the reports as they are written, until the machine is off."""
        with self._path.open() as reports:
            waited_since = time.monotonic()
            part = ""
            while True:
                over = not self._machine.running()
                part += reports.readline()
                if part.endswith("\n"):
                    yield part
                    part, waited_since = "", time.monotonic()
                elif over or time.monotonic() - waited_since > _PATIENCE:
                    return
                else:
                    time.sleep(0.05)


# -- inside


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORTS in os.environ and _inside_config:
        data = _inside_config[0].hook.pytest_report_to_serializable(config=_inside_config[0], report=report)
        with open(os.environ[REPORTS], "a") as reports:
            reports.write(json.dumps(data) + "\n")


_inside_config: list[pytest.Config] = []


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    _inside_config[:] = [session.config]
