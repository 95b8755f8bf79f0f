"""A kernel with IPVS on a machine without it: user-mode Linux, from Debian's package of that name.

It runs a Linux kernel as an ordinary process, with this machine's files as its own, in about two seconds. Inside, a
command is root of a machine with one processor and a network of its own; network namespaces, IPVS, ipset and
iptables-legacy work there, the nft variant and nftables do not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .subprocesses import environment as python_environment

KERNEL = "linux.uml"
HOW_TO_GET_IT = "install Debian's package user-mode-linux, or load ip_vs into this machine's kernel (modprobe ip_vs)"
_MODULES = Path("/usr/lib/uml/modules")
_LOOK = 0.02

# The processes inside are processes out here that the kernel of user-mode Linux keeps from making real system calls.
# Were only that killed, they would go on, as root, in earnest. But all processes of a PID namespace end at once when
# its first one does: this shell, which is killed with its parent, and ends with the kernel.
_CAGE = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", '"$@"; exit $?', "sh"]
SHARED = "/run/miniproxy-uml"  # where a machine finds the folder it was booted from, whatever it mounts elsewhere

# It must never turn off a real machine, hence the looks at /proc/cpuinfo.
_INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
grep -q 'User Mode Linux' /proc/cpuinfo || exit 1
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir {shared}
mount -t hostfs none {shared} -o {folder}
mount --bind {modules} /lib/modules
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
modprobe ip_vs
sysctl -qew net.ipv4.icmp_msgs_per_sec=100000 net.ipv4.icmp_msgs_burst=10000
mount -t tmpfs tmpfs /mnt
export TMPDIR=/mnt
{environment}
cd {directory} && {command}
echo $? >{shared}/code
grep -q 'User Mode Linux' /proc/cpuinfo && echo o >/proc/sysrq-trigger
sleep 10
"""


def has_ip_vs() -> bool:
    """Whether this machine's own kernel has IPVS, or a module that can be loaded."""
    if Path("/proc/net/ip_vs").exists():
        return True
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "ip_vs"], check=False, capture_output=True)
    return Path("/proc/net/ip_vs").exists()


def available() -> bool:
    """Whether user-mode Linux is installed."""
    return shutil.which(KERNEL) is not None and _MODULES.is_dir()


def inside() -> bool:
    """Whether this process runs in user-mode Linux."""
    return "User Mode Linux" in Path("/proc/cpuinfo").read_text()


def boot(
    folder: Path,
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    memory: str = "2G",
    log: IO[str] | int,
    stays: bool = False,
) -> subprocess.Popen[bytes]:
    """Boots a machine that runs one command and is turned off when that ends; what both say goes to `log`.

    The command sees this machine's files, its working directory and `environment`, and `folder`, which has to be
    the machine's own, as SHARED; its exit code is there in the end (`code`). The machine ends with this process,
    unless it `stays`; `turn_off` then ends it. Needs root.
    """
    exported = {"PYTHONPATH": python_environment()["PYTHONPATH"], **(environment or {})}
    init = folder / "init"
    init.write_text(
        _INIT.format(
            shared=SHARED,
            folder=shlex.quote(str(folder)),
            modules=_MODULES,
            environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
            directory=shlex.quote(os.getcwd()),
            command=shlex.join(argv),
        )
    )
    init.chmod(0o755)
    Path("/lib/modules").mkdir(exist_ok=True)  # somewhere to mount its own over
    command = [
        *([] if stays else ["setpriv", "--pdeathsig", "KILL"]),
        *_CAGE,
        *(KERNEL, "rootfstype=hostfs", "rootflags=/", "rw", _mark(folder), f"uml_dir={folder}/"),
        *(f"mem={memory}", "con=null", "con0=fd:0,fd:1", "quiet"),
    ]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def turn_off(folder: Path) -> None:
    """Ends the machine that was booted from this folder, if there is one."""
    while found := dict(processes(folder)):
        for pid, program in found.items():
            if program == _CAGE[0]:  # the others end with it
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK)


def _mark(folder: Path) -> str:
    return f"init={folder / 'init'}"


def processes(folder: Path) -> Iterator[tuple[int, str]]:
    """(pid, program) of a machine's processes out here: the folder is on the command line of all of them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if _mark(folder) in words:
                    yield int(entry.name), words[0]


@contextmanager
def machine(
    argv: Sequence[str], *, environment: Mapping[str, str] | None = None, log: IO[str] | int
) -> Iterator[Machine]:
    """A machine that is off at the end of the context, however it came to that. See `boot`."""
    folder = Path(tempfile.mkdtemp(prefix="miniproxy-uml-"))
    process = boot(folder, argv, environment=environment, log=log)
    try:
        yield Machine(process, folder / "code")
    finally:
        turn_off(folder)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def run(argv: Sequence[str]) -> int:
    """Runs one command in a machine of its own, and passes on what it prints as it comes; its exit code.

    −1 means that the machine itself failed; what it said is printed then.
    """
    with tempfile.TemporaryDirectory(prefix="miniproxy-uml-") as folder:
        out, console = Path(folder, "out"), Path(folder, "console")
        out.touch()
        redirected = ["sh", "-c", f'exec "$@" >{shlex.quote(str(out))} 2>&1', "sh", *argv]
        # What the command keeps for its user has to outlive the machine, unlike its usual temporary folder.
        looks = {"COLUMNS": str(shutil.get_terminal_size().columns), "TMPDIR": tempfile.gettempdir()}
        if sys.stdout.isatty():
            looks |= {"FORCE_COLOR": "1", "TERM": os.environ.get("TERM", "linux")}
        with console.open("w") as log, out.open() as text, machine(redirected, environment=looks, log=log) as booted:
            over = False
            while not over:
                over = not booted.running()
                sys.stdout.write(text.read())
                sys.stdout.flush()
                time.sleep(0.1)
            code = booted.wait()
        if code < 0:
            sys.stderr.write(console.read_text(errors="replace"))
        return code


class Machine:
    """A running machine."""

    def __init__(self, process: subprocess.Popen[bytes], code: Path) -> None:
        self._process = process
        self._code = code

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Until the command has ended; its exit code, or −1 when the machine ended before it."""
        self._process.wait()
        return int(self._code.read_text()) if self._code.exists() else -1
