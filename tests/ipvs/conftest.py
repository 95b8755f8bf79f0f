"""Runs the tests marked `ipvs` where there is a kernel with IPVS: here, or in user-mode Linux.

There, one machine is booted for all of them, a second pytest runs inside, and each of its reports becomes a report of
the test of the same name out here, as it arrives.
"""

from __future__ import annotations

import json
import os
import shutil
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
_LOOK = 0.05


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ipvs: needs a kernel with IPVS; runs in user-mode Linux where there is none")


@cache
def _elsewhere() -> bool:
    return REPORTS not in os.environ and not uml.has_ip_vs()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if item.get_closest_marker("ipvs") is None or not _elsewhere():
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # Fixtures of wider scope that a test before has left for its neighbours.
    item.session._setupstate.teardown_exact(nextitem)
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
        session._ipvs_machine.close(interrupted=bool(session.shouldstop or session.shouldfail))


class Inside:
    """The reports from the machine with the second pytest; pytest-xdist's workers share one machine.

    Each of them knows all tests that were collected, so the first that needs the machine boots it for all.
    """

    def __init__(self, config: pytest.Config, wanted: list[str]) -> None:
        self._config = config
        self._stack = ExitStack()
        self._machine: uml.Machine | None = None
        self._arrived: dict[str, list[Any]] = {}
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        self._folder = Path(tempfile.gettempdir()) / f"miniproxy-ipvs-{run}"
        try:
            self._folder.mkdir()
        except FileExistsError:
            pass  # another worker has booted it
        else:
            self._boot(wanted)
        self._lines = self._follow()

    def _boot(self, wanted: list[str]) -> None:
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._stack.callback((self._folder / "over").touch)
        tests = self._folder / "wanted"
        tests.write_text("\n".join(wanted))
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"@{tests}"]
        environment = {REPORTS: str(self._folder / "reports"), "PYTHONDONTWRITEBYTECODE": "1"}
        out = self._stack.enter_context((self._folder / "log").open("w"))
        self._machine = self._stack.enter_context(uml.machine(argv, environment=environment, log=out))

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
        log = self._folder / "log"
        return log.read_text(errors="replace")[-4000:] if log.exists() else "another worker was interrupted"

    def close(self, *, interrupted: bool) -> None:
        """The machine stays while other workers may need it: until it has run all tests."""
        if self._machine and "PYTEST_XDIST_TESTRUNUID" in os.environ and not interrupted:
            self._machine.wait()
            (self._folder / "over").touch()
            time.sleep(5 * _LOOK)  # for the others to read the last lines
        self._stack.close()

    def _follow(self) -> Iterator[str]:
        """Lines of the reports as they are written, until the machine is off."""
        path = self._folder / "reports"
        waited_since = time.monotonic()
        while not path.exists():
            if self._over() or time.monotonic() - waited_since > _PATIENCE:
                return
            time.sleep(_LOOK)
        with path.open() as reports:
            part = ""
            while True:
                over = self._over()
                part += reports.readline()
                if part.endswith("\n"):
                    yield part
                    part, waited_since = "", time.monotonic()
                elif over or time.monotonic() - waited_since > _PATIENCE:
                    return
                else:
                    time.sleep(_LOOK)

    def _over(self) -> bool:
        if self._machine:
            return not self._machine.running()
        return (self._folder / "over").exists() or not self._folder.exists()


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
