"""Writes and reads our nftables table of one family: the reconciler's backend for nftables mode.

Nearly every change is elements alone; those go to the kernel directly (nft_elements.py, nfnetlink.py), which takes a
tenth of a millisecond. Whatever makes or removes chains, rules or sets is left to the program nft: compiling rules is
what it is for, and there are few, mostly when the table is made.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

from ..model import Family
from ..planner import nft_parse, nft_script
from ..planner.nft_layout import TABLE, Chain, ip
from ..planner.nft_script import Elements, Held, Script, spelt
from ..planner.nftables import NftablesObject
from ..transaction import Change, MissingError, Transaction, TransactionError
from .exec import Completed, Runner, run
from .netlink import NO_SUBSYSTEM, TRANSIENT, Netlink
from .nfnetlink import RawTable, RefusedElement, open_netlink, read_table, write_elements
from .nft_elements import Encoder

OLDEST_NFT = (1, 0, 6)
OLDEST_KERNEL = (5, 15)

Execute = Callable[[str], Completed]  # runs a script; all of it is done, or none


class Program:
    """Scripts through the program nft."""

    def __init__(self, runner: Runner = run) -> None:
        self._run = runner

    def __call__(self, script: str) -> Completed:
        try:
            return self._run(["nft", "-f", "-"], script)
        except FileNotFoundError:
            raise MissingError("nft is not installed: install the package nftables") from None
        except subprocess.TimeoutExpired as error:
            raise TransactionError(f"nft did not end within {error.timeout:.0f} s", transient=True) from None
        except OSError as error:  # no memory, too many processes
            raise TransactionError(f"nft cannot be run: {error.strerror}", transient=True) from None


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
        self._execute = execute or Program()
        self._open = netlink
        # Kept open: closing one waits until the kernel has freed what the last transaction deleted.
        self._writer: Netlink | None = None
        self._encoder = Encoder(family)
        self._absent = False  # there was no table of ours when it was read
        self._held = Held.of(())
        self._rendered: tuple[Transaction, Script] | None = None

    def read(self) -> dict[Any, NftablesObject]:
        raw = self._read()
        self._absent = raw is None
        parsed = nft_parse.parse(self.family, raw)
        self._held = parsed.held
        return parsed.objects

    def same(self, planned: NftablesObject, actual: NftablesObject) -> bool:
        if isinstance(planned, Chain) and isinstance(actual, Chain):
            return (planned.hook, planned.marks) == (actual.hook, actual.marks)
        return planned == actual

    def stream(self, parts: Iterable[Sequence[Change]]) -> Transaction | None:
        return None

    def render(self, changes: Sequence[Change]) -> Transaction:
        script = nft_script.render(self.family, changes, self._held, absent=self._absent)
        self._rendered = script.transaction, script
        return script.transaction

    def apply(self, transaction: Transaction) -> None:
        """Send what `render` made last. Raises TransactionError; then nothing has changed."""
        rendered, self._rendered = self._rendered, None
        if rendered is None or rendered[0] is not transaction:
            raise TransactionError("a transaction other than the last one rendered", transient=True)
        script = rendered[1]
        if script.frame and self._absent:
            # Nobody is served by a table that is not there, so it need not appear with all its elements at once.
            self._run(script.frame)
            self._write(script.elements)
        elif script.frame:
            self._run(transaction.text)
        else:
            self._write(script.elements)
        self._held.advance(script.step)

    def _run(self, text: str) -> None:
        done = self._execute(text)
        if done.code:
            raise _error(done, text)
        self._absent = False

    def _write(self, elements: Elements) -> None:
        try:
            deleted = {name: self._encoded(name, zip(keys, repeat(""))) for name, keys in elements.deleted.items()}
            added = {name: self._encoded(name, all_) for name, all_ in elements.added.items()}
            if self._writer is None:
                self._writer = self._open()
            refused = write_elements(self._writer, self.family, TABLE, deleted, added)
        except OSError as error:
            if self._writer is not None:
                self._writer.close()  # what it has not read yet would be taken for the answer to something else
                self._writer = None
            raise TransactionError(f"nftables: {error}", transient=True) from None
        if refused:
            raise _refusal(refused, elements, f"{ip(self.family)} {TABLE}")

    def _encoded(self, name: str, elements: Iterable[tuple[str, str]]) -> list[bytes]:
        encode = self._encoder.of(name)
        try:
            return [encode(key, data) for key, data in elements]
        except (ValueError, OverflowError) as error:
            raise TransactionError(f"nftables: cannot be an element of {name}: {error}") from None

    def _read(self) -> RawTable | None:
        try:
            with self._open() as netlink:
                return read_table(netlink, self.family, TABLE, nft_parse.SKIP)
        except OSError as error:
            if error.errno in NO_SUBSYSTEM:
                raise MissingError("the kernel has no nf_tables (modprobe nf_tables)") from None
            raise TransactionError(f"nftables: {error}", transient=True) from None


def _refusal(refused: RefusedElement, elements: Elements, where: str) -> TransactionError:
    """What the kernel said, and the element it said it about, as a command of nft."""
    verb, spelled = "delete", elements.deleted.get(refused.set, [])
    if refused.adding:
        verb, spelled = "add", [spelt(*element) for element in elements.added[refused.set]]
    named = spelled[refused.place] if refused.place >= 0 else "…"
    return TransactionError(
        f"nftables: {os.strerror(refused.code)}: {verb} element {where} {refused.set} {{ {named} }}",
        transient=refused.code in TRANSIENT | {errno.EBUSY, errno.ERESTART},
    )


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
