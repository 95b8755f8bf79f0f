"""Running a program that reads while its text is being made, and whatever can become of it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miniproxy.kernel.exec import run

MEGABYTES = "0123456789abcde\n" * (1 << 18)  # 4 MiB: more than any pipe holds


def test_what_goes_in_comes_out() -> None:
    pieces = [MEGABYTES, "", "é\n", MEGABYTES]
    done = run(["sh", "-c", "cat; echo wrong >&2; exit 3"], pieces)
    assert (done.code, done.err) == (3, "wrong\n")
    assert done.out == "".join(pieces)


def test_text_in_one_piece() -> None:
    assert run(["cat"], "a\nb\n").out == "a\nb\n"
    assert run(["cat"]).out == ""


def test_a_program_works_on_the_first_piece_before_the_next_is_made(tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def pieces() -> Iterator[str]:
        yield "first\n"
        end = time.monotonic() + 20
        while not seen.exists():
            assert time.monotonic() < end, "it waits for the end of its input"
            time.sleep(0.01)
        yield "second\n"

    done = run(["sh", "-c", f"read line; touch {seen}; cat"], pieces())
    assert (done.code, done.out) == (0, "second\n")


def test_a_program_that_stops_reading_says_why() -> None:
    done = run(["sh", "-c", "read line; echo line 1 failed >&2; exit 2"], [MEGABYTES, MEGABYTES])
    assert (done.code, done.err) == (2, "line 1 failed\n")


@pytest.mark.parametrize("text", ["", MEGABYTES])
def test_a_program_that_hangs_is_ended(text: str, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run(["sh", "-c", f"echo $$ > {pid}; exec sleep 1000"], text, timeout=0.5)
    assert caught.value.timeout == 0.5
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_a_program_whose_text_cannot_be_made_gets_no_end_of_it(tmp_path: Path) -> None:
    """iptables-restore would take the end of its input for the end of a table, and others act on what they have."""
    acted = tmp_path / "acted"

    def pieces() -> Iterator[str]:
        yield "first\n"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(["sh", "-c", f"cat > {tmp_path}/text; touch {acted}"], pieces())
    time.sleep(0.2)
    assert not acted.exists()


def test_without_what_newer_kernels_and_more_rights_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert run(["cat"], [MEGABYTES, MEGABYTES]).out == 2 * MEGABYTES
    with pytest.raises(subprocess.TimeoutExpired):
        run(["sleep", "1000"], timeout=0.2)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        run(["no-such-program"], ["text"])


def test_the_signal_that_ended_it_is_its_code() -> None:
    assert run(["sh", "-c", "kill -9 $$"], MEGABYTES).code == -9
