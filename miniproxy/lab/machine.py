"""A lab in user-mode Linux, for what this machine's kernel does not have: boots it, and passes commands in.

Inside, everything of the lab is as it would be out here, and the same commands look after it. The folder that both
sides see carries them: out here a command of miniproxy and its arguments are put down as a request, and what it prints
is passed on as it comes; inside, `serve` runs it.

    /run/miniproxy-lab/NAME/machine/requests/N/     argv, JSON ──►        ◄── out, err, and in the end its exit code
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from . import netns, state, uml, watchdog
from .netns import LabError
from .plan import LabSpec
from .state import Record
from .subprocesses import python_module

_ROLE = "machine"
_LOOK = 0.02


@contextmanager
def booted(spec: LabSpec) -> Iterator[None]:
    """A machine for a lab of this spec. It stays after the block, until `lab down`; nothing of it does when the block,
    or this process, does not get to its end. Raises LabError.
    """
    netns.require_system()
    state.sweep()
    owner = state.process(os.getpid())
    watch = watchdog.start(spec.name, owner)
    try:
        state.claim(Record(spec=spec, owner=owner, machine=True))
        try:
            _boot(spec.name)
            yield
        except BaseException:
            state.destroy(spec.name)
            raise
        state.write_record(Record(spec=spec, machine=True))
    finally:
        watchdog.release(watch)


def _boot(lab: str) -> None:
    folder = state.machine_folder(lab)
    _requests(folder).mkdir(parents=True)
    with console(lab).open("w") as log:
        process = uml.boot(folder, python_module("miniproxy.lab", _ROLE, uml.SHARED), log=log, stays=True)
    state.write_process(lab, _ROLE, process.pid)


def console(lab: str) -> Path:
    """What the machine itself says."""
    return state.folder(lab) / "log" / f"{_ROLE}.log"


def run(lab: str, argv: Sequence[str], out: IO[bytes] | None = None) -> int:
    """Runs a command of miniproxy in a lab's machine, and passes on what it prints; its exit code.

    It has no standard input. Raises LabError when the machine does not run.
    """
    with ExitStack() as stack:
        request = _request(lab, argv)
        # Whoever serves it ends a command whose request is gone: that of somebody who was interrupted.
        stack.callback(shutil.rmtree, request, ignore_errors=True)
        printed = [stack.enter_context((request / name).open("rb")) for name in ("out", "err")]
        targets = [out or sys.stdout.buffer, sys.stderr.buffer]
        while True:
            over = (request / "code").exists()
            for source, target in zip(printed, targets, strict=True):
                target.write(source.read())
                target.flush()
            if over:
                return int((request / "code").read_text())
            if not state.read_processes(lab)[_ROLE].alive:
                raise LabError(f"the user-mode Linux of lab {lab!r} has ended (see {console(lab)}): remove the lab "
                               f"with `miniproxy lab down --name {lab}`.")  # fmt: skip
            time.sleep(_LOOK)


def status(lab: str) -> dict[str, Any]:
    """What `miniproxy lab status` shows of a lab in a machine; its paths and pids are those inside."""
    answer = BytesIO()
    if run(lab, ["lab", "status", "--name", lab, "--json"], answer):
        raise LabError(f"lab {lab!r} does not answer in its user-mode Linux: see {console(lab)}.")
    (found,) = json.loads(answer.getvalue())
    return {**found, "machine": state.read_processes(lab)[_ROLE].pid}


def _requests(folder: Path) -> Path:
    return folder / "requests"


def _request(lab: str, argv: Sequence[str]) -> Path:
    requests = _requests(state.machine_folder(lab))
    # Never the number of a request before, whose end may not have been noticed yet.
    number = f"{os.getpid()}-{time.monotonic_ns()}"
    draft, request = requests / f".{number}", requests / number
    draft.mkdir()
    (draft / "argv").write_text(json.dumps(argv))
    for name in ("out", "err"):
        (draft / name).touch()
    return draft.rename(request)  # so that it is never seen incomplete


# -- inside


def serve(shared: str) -> None:
    """Runs what is requested, side by side, until the folder is gone, and the lab with it; the machine then ends."""
    requests = _requests(Path(shared))
    running: dict[Path, subprocess.Popen[bytes]] = {}
    # The kernel inside asks anew what a folder lists, but believes that what has been there and is in use still exists.
    while (listed := _listed(requests)) is not None:
        for request in running.keys() - listed:
            _end(running.pop(request))
        for request in listed:
            with suppress(FileNotFoundError):  # gone since a moment ago
                if request not in running:
                    running[request] = _start(request)
                elif (code := running[request].poll()) is not None and "code" not in os.listdir(request):
                    state.replace(request / "code", str(code).encode())
        time.sleep(_LOOK)


def _listed(requests: Path) -> set[Path] | None:
    """Those that are complete; None when the folder is gone."""
    with suppress(FileNotFoundError):
        return {requests / name for name in os.listdir(requests) if not name.startswith(".")}
    return None


def _start(request: Path) -> subprocess.Popen[bytes]:
    argv = json.loads((request / "argv").read_text())
    with (request / "out").open("ab") as out, (request / "err").open("ab") as err:
        return subprocess.Popen(
            python_module("miniproxy", *argv), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
