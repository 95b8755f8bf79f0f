"""Running programs: the one seam between the writers and the system's tools."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class Completed(NamedTuple):
    code: int  # exit status; negative: ended by that signal
    out: str
    err: str


class Runner(Protocol):
    def __call__(self, argv: Sequence[str], text: str = "", timeout: float = 60.0) -> Completed:
        """Run a program with `text` on standard input. Raises FileNotFoundError, subprocess.TimeoutExpired."""
        ...


def run(
    argv: Sequence[str],
    text: str = "",
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program to its end; what it prints is text in UTF-8."""
    # A file in memory: into a pipe, subprocess writes 4 KiB at a time, and a table can have megabytes.
    with open(os.memfd_create("stdin", os.MFD_CLOEXEC), "wb+") as stdin:
        stdin.write(text.encode())
        stdin.seek(0)
        done = subprocess.run(argv, stdin=stdin, capture_output=True, timeout=timeout, env=env, check=False)
    return Completed(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
