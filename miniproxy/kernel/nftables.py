"""Writes and reads our nftables table of one family: the reconciler's backend for nftables mode.

Small scripts go through libnftables in this process: that takes a fifth of a millisecond where running nft takes
five, or twenty when something is deleted, since closing the program's socket waits until that is freed.
Large ones are left to nft, which gives back the memory it needs for them.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from ..model import Family
from ..planner import nft_parse, nft_script
from ..planner.nft_layout import TABLE, Chain, ip
from ..planner.nft_script import Held, Script
from ..planner.nftables import NftablesObject
from ..transaction import Change, Transaction, TransactionError
from .exec import Completed, Runner, run
from .netlink import Netlink
from .nfnetlink import RawTable, open_netlink, read_table

OLDEST_NFT = (1, 0, 6)
OLDEST_KERNEL = (5, 15)
_LARGE = 1 << 18  # characters of a script
_LIBRARY = "libnftables.so.1"

Execute = Callable[[str], Completed]  # runs a script; all of it is done, or none


class Program:
    """Scripts through the program nft."""

    def __init__(self, runner: Runner = run) -> None:
        self._run = runner

    def __call__(self, script: str) -> Completed:
        try:
            return self._run(["nft", "-f", "-"], script)
        except FileNotFoundError:
            raise TransactionError("nft is not installed: install the package nftables", transient=True) from None
        except subprocess.TimeoutExpired as error:
            raise TransactionError(f"nft did not end within {error.timeout:.0f} s", transient=True) from None


class Library:
    """Scripts through libnftables. The network namespace is that in which it was opened."""

    def __init__(self, library: ctypes.CDLL, context: int) -> None:
        self._library = library
        self._context = context

    @classmethod
    def open(cls, name: str = _LIBRARY) -> Library:
        """Raises OSError if there is no such library, or it is not what it should be."""
        library = ctypes.CDLL(name)
        try:
            library.nft_ctx_new.argtypes = [ctypes.c_uint32]
            library.nft_ctx_new.restype = ctypes.c_void_p
            for function in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
                getattr(library, function).argtypes = [ctypes.c_void_p]
            library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
            library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
            library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        except AttributeError as error:
            raise OSError(f"{name}: {error}") from None
        context = library.nft_ctx_new(0)
        if not context:
            raise OSError(f"{name}: no context")
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        return cls(library, context)

    def __call__(self, script: str) -> Completed:
        code = self._library.nft_run_cmd_from_buffer(self._context, script.encode())
        errors = self._library.nft_ctx_get_error_buffer(self._context) or b""
        return Completed(code, "", errors.decode(errors="replace"))

    def close(self) -> None:
        self._library.nft_ctx_free(self._context)


class Nft:
    """Both ways: the library for what is small, where there is one. Opens it when it is first needed."""

    def __init__(self, program: Execute, library: Callable[[], Execute] = Library.open) -> None:
        self._program = program
        self._open = library
        self._library: Execute | None = None

    def __call__(self, script: str) -> Completed:
        if len(script) > _LARGE:
            return self._program(script)
        if self._library is None:
            try:
                self._library = self._open()
            except OSError:
                self._library = self._program
        return self._library(script)


class Nftables:
    """Our table of one family."""

    batch = 0  # one transaction for everything: nft and the kernel are linear in its size

    def __init__(
        self,
        family: Family,
        execute: Execute | None = None,
        netlink: Callable[[], Netlink] = open_netlink,
    ) -> None:
        self.family = family
        self._execute = execute or Nft(Program())
        self._netlink = netlink
        self._held = Held.of(())
        self._rendered: tuple[Transaction, Script] | None = None

    def read(self) -> dict[Any, NftablesObject]:
        parsed = nft_parse.parse(self.family, self._read())
        self._held = parsed.held
        return parsed.objects

    def same(self, planned: NftablesObject, actual: NftablesObject) -> bool:
        if isinstance(planned, Chain) and isinstance(actual, Chain):
            return (planned.hook, planned.marks) == (actual.hook, actual.marks)
        return planned == actual

    def render(self, changes: Sequence[Change]) -> Transaction:
        script = nft_script.render(self.family, changes, self._held)
        self._rendered = script.transaction, script
        return script.transaction

    def apply(self, transaction: Transaction) -> None:
        """Send what `render` made last. Raises TransactionError; then nothing has changed."""
        rendered, self._rendered = self._rendered, None
        if rendered is None or rendered[0] is not transaction:
            raise TransactionError("a transaction other than the last one rendered", transient=True)
        if not transaction.text:
            return
        done = self._execute(transaction.text)
        if done.code:
            raise _error(done, transaction.text)
        self._held.advance(rendered[1].step)

    def _read(self) -> RawTable | None:
        try:
            with self._netlink() as netlink:
                return read_table(netlink, self.family, TABLE, nft_parse.SKIP)
        except OSError as error:
            raise TransactionError(f"nftables: {error}", transient=True) from None


def _error(done: Completed, script: str) -> TransactionError:
    """nft's message, and the line of the script it is about; lines may be thousands of elements long."""
    lines = [line for line in done.err.splitlines() if line.strip()]
    reason = lines[0] if lines else f"exit status {done.code}"
    number = re.match(r"[^:\s]+:(\d+):[\d-]+: ", reason)
    about = script.splitlines()[int(number.group(1)) - 1] if number else lines[1] if len(lines) > 1 else ""
    marked = _marked(lines, about)
    denied = "Operation not permitted" in reason or "must be root" in reason
    busy = "Device or resource busy" in reason or "Cannot allocate memory" in reason
    where = f": {marked}" if marked else ""
    return TransactionError(f"nft: {reason}{where}", transient=denied or busy or done.code < -1)


def _marked(lines: list[str], about: str) -> str:
    """The part of a long line that nft underlines."""
    under = next((line for line in lines if set(line.strip()) <= {"^", "~"}), "")
    if len(about) <= 200 or not under:
        return about[:200]
    start = under.index(under.strip())
    return f"{about[:60]}… {about[max(start - 80, 60) : start + 80]}"


def cleanup(family: Family, execute: Execute | None = None, netlink: Callable[[], Netlink] = open_netlink) -> int:
    """Delete our table of this family and nothing else. Returns how many tables that was. Raises TransactionError."""
    backend = Nftables(family, execute, netlink)
    if backend._read() is None:
        return 0
    where = f"{ip(family)} {TABLE}"
    text = f"delete table {where}\n"
    done = backend._execute(text)
    if done.code:
        raise _error(done, text)
    return 1


def check(runner: Runner = run, release: str | None = None) -> None:
    """Whether this machine's nft and kernel can do nftables mode. Raises TransactionError that says what cannot.

    `release` is the kernel's, as `uname -r` prints it.
    """
    release = os.uname().release if release is None else release
    if _version(release) < OLDEST_KERNEL:
        raise TransactionError(
            f"nftables mode needs Linux {_dotted(OLDEST_KERNEL)} or later, this is {release}: use --proxy-mode iptables"
        )
    try:
        done = runner(["nft", "--version"])
    except FileNotFoundError:
        raise TransactionError("nftables mode needs the program nft: install the package nftables") from None
    version = _version(done.out.removeprefix("nftables v"))
    if version < OLDEST_NFT:
        raise TransactionError(
            f"nftables mode needs nft {_dotted(OLDEST_NFT)} or later, this is {done.out.strip() or 'none'}: "
            "update the package nftables, or use --proxy-mode iptables"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", text.strip()).group())))  # type: ignore[union-attr]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
