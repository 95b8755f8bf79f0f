"""Logs: one line for one record whatever is in it, and never an error of their own."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from miniproxy import log


@pytest.fixture(autouse=True)
def quiet_afterwards() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("miniproxy")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before
    logging.captureWarnings(False)


def test_a_text_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    log.get("reconciler").info("synced", extra=log.fields(name="web", services=3, why="two words", seconds=0.25))
    line = capsys.readouterr().err
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.\d{3} I reconciler: synced name=web services=3 why="two words" seconds=0\.25\n', line
    )


def test_plain_extra_is_shown_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    logging.getLogger("miniproxy.run").warning("odd", extra={"mode": "ipvs"})
    assert capsys.readouterr().err.endswith(" W run: odd mode=ipvs\n")


def test_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("json")
    try:
        raise ValueError("because")
    except ValueError:
        log.get("x").exception("it broke", extra=log.fields(count=1, ref=object))
    entry = json.loads(capsys.readouterr().err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["ts"])
    assert (entry["level"], entry["logger"], entry["msg"]) == ("error", "x", "it broke")
    assert (entry["fields"]["count"], entry["fields"]["ref"]) == (1, "<class 'object'>")
    assert "ValueError: because" in entry["error"]


@pytest.mark.parametrize("style", ["text", "json"])
def test_nothing_in_a_record_forges_a_second_line(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("json" if style == "json" else "text")
    evil = "a\n12:00:00.000 E reconciler: forged\x1b[2J\u2028"
    log.get("x").info("%s", evil, extra=log.fields(name=evil))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_verbosity(capsys: pytest.CaptureFixture[str]) -> None:
    for verbosity, ours, theirs in ((0, False, False), (3, False, False), (4, True, False), (8, True, True)):
        log.setup(verbosity=verbosity)
        log.get("x").debug("ours")
        logging.getLogger("library").debug("theirs")
        err = capsys.readouterr().err
        assert ("ours" in err, "theirs" in err) == (ours, theirs), verbosity


def test_setting_up_twice_does_not_write_twice(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    log.setup()
    log.get("x").info("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize(
    "breakage", ["sys.stderr.close()", "sys.stderr = None", "os.close(2)", "sys.stderr = open('/dev/full', 'w')"]
)
def test_a_lost_standard_error_is_no_error(breakage: str) -> None:
    code = (
        "import os, sys\nfrom miniproxy import log\nlog.setup()\n"
        f"{breakage}\nlog.get('x').info('lost')\nlog.get('x').error('%d', 'not a number')\nprint('alive', flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
