"""Tells when something in some directories changes: by inotify where the kernel has it, else by the clock.

It answers for waking up in time and for where to look first: what changed is found by looking at the files, and at all
of them now and then, so a lost or superfluous wake-up costs time, never truth.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import struct
import time
from collections.abc import Collection
from threading import Event
from typing import Protocol

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
STALLED_SECONDS = 0.5  # a writer that pauses for so long is taken to be done, as one that never closes is

# linux/inotify.h
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _ONLYDIR = 0x400, 0x800, 0x01000000
_OVERFLOW, _IGNORED, _ISDIR = 0x4000, 0x8000, 0x40000000
_MASK = _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_HEADER = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows


class Watcher(Protocol):
    def watch(self, directory: str) -> None:
        """Also wake up for this directory, from now on. A directory that is gone is no error."""

    def keep(self, directories: Collection[str]) -> None:
        """Forget all other directories."""

    def wait(self, seconds: float) -> bool:
        """Whether something happened, at once when it did, else after that time."""

    def changed(self) -> set[str] | None:
        """In which places something happened since the last call; None: it may be more than places in folders."""
        ...

    def settle(self, quiet: float, limit: float) -> None:
        """Wait until `quiet` seconds pass without an event; `limit` at most."""

    def half_written(self) -> set[str]:
        """The files that were written to a moment ago and not closed since."""
        ...

    def close(self) -> None: ...


def watcher(stop: Event) -> Watcher:
    """inotify, or polling where it is missing or used up (fs.inotify.max_user_instances)."""
    try:
        return Inotify.open()
    except (OSError, AttributeError) as error:
        log.warning("no inotify: looking at the files every half second", extra={"error": str(error)})
        return Polling(stop)


class Polling:
    """Says "something may have happened" every half second."""

    def __init__(self, stop: Event) -> None:
        self._stop = stop
        self._next = time.monotonic() + POLL_SECONDS

    def watch(self, directory: str) -> None:
        pass

    def keep(self, directories: Collection[str]) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        self._stop.wait(max(0.0, min(seconds, self._next - time.monotonic())))
        if seconds <= 0 or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + POLL_SECONDS
        return True

    def changed(self) -> set[str] | None:
        return None

    def settle(self, quiet: float, limit: float) -> None:
        self._stop.wait(quiet)

    def half_written(self) -> set[str]:
        return set()

    def close(self) -> None:
        pass


class Inotify:
    """inotify(7) on directories, by way of libc."""

    def __init__(self, libc: ctypes.CDLL, fd: int) -> None:
        self._libc = libc
        self._fd = fd
        self._watched: dict[str, int] = {}
        self._written: dict[tuple[int, bytes], float] = {}  # (directory, name) not closed → last write
        self._changed: set[tuple[int, bytes]] = set()
        self._lost = False  # something happened that no name says all about
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    @classmethod
    def open(cls) -> Inotify:
        """Raises OSError where there is no inotify."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return cls(libc, fd)

    def watch(self, directory: str) -> None:
        # Asked anew each time: the path may lead to another directory than it did. For the same one the
        # kernel answers with the same number.
        wd = self._libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK | _ONLYDIR)
        if wd < 0:
            self._watched.pop(directory, None)
            error = os.strerror(ctypes.get_errno())
            log.debug("cannot watch a folder", extra={"folder": directory, "error": error})
        else:
            self._watched[directory] = wd

    def keep(self, directories: Collection[str]) -> None:
        kept = {path: wd for path, wd in self._watched.items() if path in directories}
        for wd in set(self._watched.values()) - set(kept.values()):
            self._libc.inotify_rm_watch(self._fd, wd)
        self._watched = kept

    def wait(self, seconds: float) -> bool:
        if not self._poll.poll(max(0.0, seconds) * 1000):
            return False
        with contextlib.suppress(BlockingIOError):
            self._note(os.read(self._fd, 1 << 16))
        return True

    def _note(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            wd, mask, _, length = _HEADER.unpack_from(data, at)
            name = data[at + _HEADER.size : at + _HEADER.size + length].rstrip(b"\0")
            at += _HEADER.size + length
            if name and not mask & (_OVERFLOW | _ISDIR):
                self._changed.add((wd, name))
            elif not mask & _IGNORED:  # that one only says that we have stopped watching
                self._lost = True
            if mask & (_CLOSE_WRITE | _DELETE | _MOVED_FROM):
                self._written.pop((wd, name), None)
            elif mask & _MODIFY:
                self._written[wd, name] = time.monotonic()

    def changed(self) -> set[str] | None:
        changed, lost = self._changed, self._lost
        self._changed, self._lost = set(), False
        paths = {wd: path for path, wd in self._watched.items()}
        # Of a directory with two paths, events tell only one.
        if lost or len(paths) < len(self._watched):
            return None
        return {os.path.join(paths[wd], os.fsdecode(name)) for wd, name in changed if wd in paths}

    def settle(self, quiet: float, limit: float) -> None:
        end = time.monotonic() + limit
        while (left := end - time.monotonic()) > 0 and self.wait(min(left, quiet)):
            pass

    def half_written(self) -> set[str]:
        since = time.monotonic() - STALLED_SECONDS
        self._written = {key: at for key, at in self._written.items() if at > since}
        paths = {wd: path for path, wd in self._watched.items()}
        return {os.path.join(paths[wd], os.fsdecode(name)) for wd, name in self._written if wd in paths and name}

    def close(self) -> None:
        os.close(self._fd)
