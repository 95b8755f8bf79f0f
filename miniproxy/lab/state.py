"""What is known about a lab outside of any process, and how everything of a lab is removed.

/run/miniproxy-lab/NAME/ is written before the first namespace exists, so `destroy` finds everything whatever
moment the creator died at:

    lab.json        the spec, and the process that owns the lab (none once `lab up` has finished)
    pids/ROLE       pid and start time of the pods' server and of each agent
    manifests/      the folder the agents watch         log/ROLE.log   what they say
    machine/        of a lab in user-mode Linux (machine.py), which has all the others inside

Three layers keep a crash from leaving anything behind:
1. Every lab being built or used by a process has a watchdog (watchdog.py): a process of its own that holds the
   read end of a pipe from the owner. Even a kill -9 of the owner closes the pipe, and the watchdog destroys.
2. Whoever creates or removes labs first sweeps those whose owner is dead (both killed, say).
3. `destroy` does not need the records to be complete: all namespaces carry the lab's prefix, and processes are
   also found by the namespace they live in. A recorded pid is signalled only if its start time is the recorded
   one, a found one only while it is in the lab's namespace; both through a pidfd, so that no number that was
   given to another process in the meantime is ever hit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from . import netns, uml
from .netns import LabError
from .plan import LabSpec

STATE_ROOT = Path("/run/miniproxy-lab")
READY = "ready"  # what the pods' server prints once all pods listen
_KILL_ROUNDS = 200
_KILL_PAUSE = 0.01


class Process(msgspec.Struct, frozen=True):
    """A process beyond doubt: a pid alone is given out again."""

    pid: int
    started: int  # clock ticks since boot, /proc/PID/stat field 22

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.started


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """lab.json."""

    spec: LabSpec
    owner: Process | None = None  # None: stays until `lab down`
    mode: str = ""  # of the agents; "" while there are none
    variant: str = ""
    machine: bool = False  # it is in user-mode Linux
    benchmark: bool = False  # a benchmark's namespaces: swept up like a lab's, and nothing else


def process(pid: int) -> Process:
    """Raises ProcessLookupError when there is none of that pid."""
    started = _start_time(pid)
    if started is None:
        raise ProcessLookupError(pid)
    return Process(pid, started)


def folder(lab: str) -> Path:
    return STATE_ROOT / lab


def machine_folder(lab: str) -> Path:
    """Which the user-mode Linux of a lab is booted from."""
    return folder(lab) / "machine"


def read_record(lab: str) -> Record:
    """Raises LabError when there is no such lab."""
    try:
        return msgspec.json.decode((folder(lab) / "lab.json").read_bytes(), type=Record)
    except FileNotFoundError:
        raise LabError(f"there is no lab named {lab!r}. `miniproxy lab status` lists the labs.") from None
    except msgspec.DecodeError as error:
        raise LabError(f"{folder(lab) / 'lab.json'} is damaged ({error}): remove the lab with "
                       f"`miniproxy lab down --name {lab}`.") from None  # fmt: skip


def write_record(record: Record) -> None:
    replace(folder(record.spec.name) / "lab.json", msgspec.json.encode(record))


def claim(record: Record) -> None:
    """Makes the state folder of a new lab: whoever manages that owns the name. Raises LabError if in use."""
    lab = record.spec.name
    down = f"`miniproxy lab down --name {lab}`"
    with _locked():
        if folder(lab).exists():
            raise LabError(f"a lab named {lab!r} exists already: remove it with {down}, or use another --name.")
        if netns.existing(lab):
            raise LabError(f"network namespaces {netns.existing(lab)[0]} … exist without a lab: remove them "
                           f"with {down}, or use another --name.")  # fmt: skip
        # Complete under a name of its own first: no moment has a lab without its record.
        draft = STATE_ROOT / f".{lab}"
        shutil.rmtree(draft, ignore_errors=True)
        for part in ("manifests", "log", "pids"):
            (draft / part).mkdir(parents=True)
        (draft / "lab.json").write_bytes(msgspec.json.encode(record))
        draft.rename(folder(lab))


def write_process(lab: str, role: str, pid: int) -> Process:
    """Records a process of a lab."""
    known = process(pid)
    replace(folder(lab) / "pids" / role, msgspec.json.encode(known))
    return known


def read_processes(lab: str) -> dict[str, Process]:
    """The recorded processes by role, alive or not."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in sorted((folder(lab) / "pids").iterdir()):
            with contextlib.suppress(msgspec.DecodeError, FileNotFoundError):
                if not path.name.startswith("."):
                    found[path.name] = msgspec.json.decode(path.read_bytes(), type=Process)
    return found


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that nobody ever reads half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.rename(path)


def labs() -> list[str]:
    """Names of all labs."""
    try:
        return sorted(path.name for path in STATE_ROOT.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def owner_of(lab: str) -> Process | None:
    """The living process that owns a lab, if there is one."""
    try:
        owner = read_record(lab).owner
    except LabError:
        return None
    return owner if owner is not None and owner.alive else None


def sweep() -> list[str]:
    """Destroys the labs whose owner died without doing so; returns their names."""
    swept = []
    for lab in labs():
        try:
            owner = read_record(lab).owner
        except LabError:
            continue  # no record: not known to be dead; `down` takes those by name
        if owner is not None and not owner.alive and destroy(lab, of=owner):
            swept.append(lab)
    return swept


def destroy(lab: str, of: Process | None = None) -> bool:
    """Ends the processes, deletes the namespaces, removes the folder; True if there was anything.

    With `of`, only if the lab is still the one that process owns: the name may be another lab's by now.
    """
    with _locked():
        if of is not None:
            try:
                if read_record(lab).owner != of:
                    return False
            except LabError:
                return False
        names = netns.existing(lab)
        known = bool(names) or folder(lab).exists()
        uml.turn_off(machine_folder(lab))
        for recorded in read_processes(lab).values():
            _kill(recorded)
        _kill_members(names)
        netns.remove(names)
        shutil.rmtree(folder(lab), ignore_errors=True)
        return known


def signal_process(target: Process, number: signal.Signals) -> bool:
    """Sends a signal to exactly that process; False if it is gone."""
    try:
        fd = os.pidfd_open(target.pid)
    except ProcessLookupError:
        return False
    try:
        if not target.alive:
            return False
        signal.pidfd_send_signal(fd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def _kill(target: Process) -> None:
    if signal_process(target, signal.SIGKILL):
        for _ in range(_KILL_ROUNDS):
            if not target.alive:
                return
            time.sleep(_KILL_PAUSE)


def _kill_members(names: list[str]) -> None:
    """Kills whatever lives in the namespaces, until nothing does: a process may be starting another."""
    spaces = {identity for name in names if (identity := netns.identity(name))}
    if not spaces:
        return
    for _ in range(_KILL_ROUNDS):
        members = list(_members(spaces))
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                try:
                    if _network(pid) in spaces:
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                finally:
                    os.close(fd)
        time.sleep(_KILL_PAUSE)


def _members(spaces: set[tuple[int, int]]) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _network(int(entry)) in spaces:
            yield int(entry)


def _network(pid: int) -> tuple[int, int] | None:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _start_time(pid: int) -> int | None:
    """None when there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command, in parentheses, may hold anything; fields are counted from behind it.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One at a time makes or removes labs, so that a slow removal cannot hit the next lab of that name."""
    while True:
        STATE_ROOT.mkdir(mode=0o755, exist_ok=True)
        fd = os.open(STATE_ROOT, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        # The folder goes with the last lab: the one locked may have gone while we waited for it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == os.stat(STATE_ROOT).st_ino:
                break
        os.close(fd)
    try:
        yield
    finally:
        for draft in STATE_ROOT.glob(".*"):  # of a creator that died in `claim`
            shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            STATE_ROOT.rmdir()  # only when it is empty
        os.close(fd)
