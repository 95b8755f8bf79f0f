"""Destroys a lab when its owner dies: `python -m miniproxy.lab watchdog LAB PID STARTED`.

Its standard input is a pipe from the owner. "release" on it ends the watch (the lab is removed already, or is to
stay); the end of the pipe without it means that the owner is gone, by whatever cause, kill -9 included.
"""

from __future__ import annotations

import subprocess
import sys

from . import state
from .state import Process
from .subprocesses import environment, python_module

_RELEASE = b"release\n"


def start(lab: str, owner: Process) -> subprocess.Popen[bytes]:
    """Starts the watch over `lab` on behalf of `owner`, the calling process."""
    return subprocess.Popen(
        python_module("miniproxy.lab", "watchdog", lab, str(owner.pid), str(owner.started)),
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C, or a kill of the owner's process group, must not end it
        cwd="/",
        env=environment(),
    )


def pipe(watch: subprocess.Popen[bytes]) -> int:
    """The owner's end. A process that shares it defers the watchdog until it has ended too."""
    assert watch.stdin is not None
    return watch.stdin.fileno()


def release(watch: subprocess.Popen[bytes]) -> None:
    """Ends a watch without destroying anything."""
    watch.communicate(_RELEASE)


def main(lab: str, pid: str, started: str) -> None:
    """Waits for the end of the owner or of the watch."""
    if sys.stdin.buffer.readline() == _RELEASE:
        return
    state.destroy(lab, of=Process(int(pid), int(started)))
