"""Network namespaces: makes a plan real, removes it, and lets code run inside one.

The only room that changes the system. It works in namespaces of its own from beginning to end: veth pairs are
created with both ends inside, so the machine's own namespace never sees a link, an address or a rule.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from .plan import Namespace, netns_name

NETNS_FOLDER = Path("/run/netns")  # where `ip netns` keeps them
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class LabError(Exception):
    """A lab cannot do what was asked; the message says what is wrong and what to do."""


def require_system() -> None:
    """Raises LabError unless this process may build a lab here."""
    if os.geteuid() != 0:
        raise LabError("a lab needs root: it creates network namespaces. Run the command with sudo.")
    for tool in ("ip", "bridge"):
        if shutil.which(tool) is None:
            raise LabError(f"the command {tool!r} is missing: install the package iproute2.")


def enter(name: str) -> None:
    """Moves the calling thread, and sockets and processes it makes from now on, into a namespace."""
    try:
        fd = os.open(NETNS_FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LabError(f"there is no network namespace {name!r}: is the lab still up?") from None
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise LabError(f"cannot enter network namespace {name!r}: {os.strerror(error)}")
    finally:
        os.close(fd)


def inside(name: str, work: Callable[[], T]) -> T:
    """Runs `work` in a namespace, on a thread of its own: Linux keeps the namespace per thread."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            enter(name)
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=f"in {name}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def existing(lab: str) -> list[str]:
    """Full names of the namespaces of a lab that exist."""
    prefix = netns_name(lab, "")
    return [name for name in existing_all() if name.startswith(prefix)]


def existing_all() -> list[str]:
    """Full names of all named namespaces of this machine."""
    try:
        return sorted(os.listdir(NETNS_FOLDER))
    except FileNotFoundError:
        return []


def build(lab: str, namespaces: Iterable[Namespace], keep_open: int) -> None:
    """Creates and furnishes the namespaces. Raises LabError; what was made so far then stays.

    Every command started shares the file descriptor `keep_open`, the pipe to the watchdog: killed in the middle,
    we may leave one behind that is still making namespaces, and cleaning up has to wait for its end.
    """
    from concurrent.futures import ThreadPoolExecutor

    spaces = {netns_name(lab, space.name): space for space in namespaces}
    run = partial(_batch, keep_open=keep_open)
    run(["ip"], [f"netns add {name}" for name in spaces])
    for name, space in spaces.items():
        inside(name, partial(_write_sysctls, space.sysctls))
    for name, space in spaces.items():
        run(["ip", "-n", name], space.links)

    def furnish(name: str) -> None:
        run(["ip", "-n", name], spaces[name].setup)
        run(["bridge", "-n", name], spaces[name].fdb)

    # The rest stays within one namespace each; two at a time, since most of it is starting `ip`.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(furnish, spaces))


def remove(names: Iterable[str]) -> None:
    """Deletes namespaces, with the links in them; those that are gone already do not matter."""
    lines = [f"netns del {name}" for name in names]
    if lines:
        subprocess.run(
            ["ip", "-force", "-batch", "-"],
            input="\n".join(lines),
            text=True,
            capture_output=True,
            check=False,
        )


def identity(name: str) -> tuple[int, int] | None:
    """(device, inode) of a namespace: the same for /proc/PID/ns/net of the processes in it."""
    try:
        status = os.stat(NETNS_FOLDER / name)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _batch(tool: list[str], lines: Iterable[str], *, keep_open: int) -> None:
    text = "\n".join(lines)
    if not text:
        return
    done = subprocess.run(
        [*tool, "-batch", "-"],
        input=text,
        text=True,
        capture_output=True,
        check=False,
        pass_fds=(keep_open,),
    )
    if done.returncode == 0:
        return
    # iproute2 names the line it stopped at: "Command failed -:3".
    number = done.stderr.rpartition(":")[2].strip()
    line = text.split("\n")[int(number) - 1] if number.isdigit() else ""
    raise LabError(f"{' '.join(tool)}: {line}: {done.stderr.strip()}")


def _write_sysctls(sysctls: Iterable[tuple[str, str]]) -> None:
    for name, value in sysctls:
        path = Path("/proc/sys", *name.split("."))
        try:
            path.write_text(value)
        except (FileNotFoundError, PermissionError):
            # Some exist in newer kernels only, or belong to the machine and not to a namespace there
            # (icmp_msgs_per_sec before 6.12), or come with a module (br_netfilter).
            continue
