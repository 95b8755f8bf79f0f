"""Running programs: the one seam between the writers and the system's tools."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, NamedTuple, Protocol

_PIPE = 1 << 20  # bytes, pipe(7)'s limit for the unprivileged: lets us go on with printing while a tool works


class Completed(NamedTuple):
    code: int  # exit status; negative: ended by that signal
    out: str
    err: str


class Runner(Protocol):
    def __call__(self, argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        """Run a program with the pieces of `text` on standard input. Raises FileNotFoundError,
        subprocess.TimeoutExpired.
        """
        ...


def run(
    argv: Sequence[str],
    text: Iterable[str] = (),
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program to its end; what it prints is text in UTF-8. It runs while the pieces of `text` are made; should
    making one fail, it is killed.
    """
    end = time.monotonic() + timeout
    # What it prints goes to files in memory: nobody has to read along, so neither waits for the other.
    with _memory("stdout") as out, _memory("stderr") as err:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=out, stderr=err, env=env)
        assert process.stdin
        try:
            _feed(process.stdin.fileno(), (text,) if isinstance(text, str) else text, end)
            process.stdin.close()
            _wait(process, end)
        except BaseException as error:
            process.kill()  # before its input ends: it might take what it has for all there is
            process.wait()
            if isinstance(error, TimeoutError):
                raise subprocess.TimeoutExpired(argv, timeout) from None
            raise
        finally:
            process.stdin.close()
        return Completed(process.wait(), _text(out), _text(err))


def _feed(pipe: int, pieces: Iterable[str], end: float) -> None:
    with contextlib.suppress(OSError):  # root's pipes may have used up what those without CAP_SYS_RESOURCE may have
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
    os.set_blocking(pipe, False)
    for piece in pieces:
        rest = memoryview(piece.encode())
        while rest:
            try:
                rest = rest[os.write(pipe, rest) :]
            except BlockingIOError:
                _until(pipe, select.POLLOUT, end)
            except BrokenPipeError:
                return  # it has ended, and its exit status says why


def _wait(process: subprocess.Popen[bytes], end: float) -> None:
    """Like process.wait(timeout), which sleeps up to 50 ms at a time and looks."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:  # a kernel before 5.3, or a seccomp profile of that time
        process.wait(max(0.0, end - time.monotonic()))
        return
    try:
        _until(pidfd, select.POLLIN, end)
    finally:
        os.close(pidfd)


def _until(fd: int, event: int, end: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError


def _memory(name: str) -> BinaryIO:
    return open(os.memfd_create(name, os.MFD_CLOEXEC), "w+b")


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
