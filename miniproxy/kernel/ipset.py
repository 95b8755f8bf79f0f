"""Reads and writes ipsets through the program ipset."""

from __future__ import annotations

import subprocess

from ..transaction import TransactionError
from .exec import Runner, run


def save(runner: Runner = run) -> str:
    """All sets with all entries, as `ipset save` prints them. Raises TransactionError."""
    return _checked(["ipset", "save"], "", runner)


def restore(text: str, runner: Runner = run) -> None:
    """Execute lines of `ipset restore`; what is so already is fine. Raises TransactionError."""
    _checked(["ipset", "restore", "-exist"], text, runner)


def _checked(argv: list[str], text: str, runner: Runner) -> str:
    try:
        done = runner(argv, text)
    except FileNotFoundError:
        raise TransactionError("ipset is not installed: install the package ipset", transient=True) from None
    except subprocess.TimeoutExpired as error:
        raise TransactionError(f"ipset did not end within {error.timeout:.0f} s", transient=True) from None
    if done.code:
        raise _error(done.code, done.err.strip(), text)
    return done.out


def _error(code: int, err: str, text: str) -> TransactionError:
    """With the line that ipset blames ("… Error in line 7: …"), which has the set's name."""
    _, _, blamed = err.partition("Error in line ")
    number, _, reason = blamed.partition(": ")
    lines = text.splitlines()
    if number.isdigit() and int(number) <= len(lines):
        return TransactionError(f"ipset: {reason.splitlines()[0]}: {lines[int(number) - 1]}")
    transient = code < 0 or "Kernel error received: Operation not permitted" in err
    return TransactionError(f"ipset: {err.splitlines()[0] if err else f'exit status {code}'}", transient=transient)
