"""Reads and writes iptables of one family and variant through iptables-save and iptables-restore."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from ..model import Family
from ..planner import rules
from ..planner.iptables import LAYOUT, SHARED_FIREWALL, Chain, IptablesObject, Layout
from ..transaction import Change, MissingError, Transaction, TransactionError
from .exec import Runner, run

log = logging.getLogger(__name__)

Variant = Literal["nft", "legacy"]
VARIANTS: tuple[Variant, ...] = ("nft", "legacy")
# The kubelet keeps these in table mangle of the variant it uses; kube-proxy and CNI plugins follow it.
_HINTS = (("mangle", "KUBE-IPTABLES-HINT"), ("mangle", "KUBE-KUBELET-CANARY"))
_PROBE = """*nat
:MINIPROXY-PROBE - [0:0]
-A MINIPROXY-PROBE -m comment --comment "does this variant work?" -j RETURN
-F MINIPROXY-PROBE
-X MINIPROXY-PROBE
COMMIT
"""
_NO_NF_TABLES = "Could not fetch rule set generation id: Invalid argument"
_LOCK_WAIT = "5"  # seconds; another program may be in the middle of a large restore


def tool(family: Family) -> str:
    """The family's program, and how the names of all its others begin."""
    return "ip6tables" if family is Family.V6 else "iptables"


class Iptables:
    """The iptables of one family: the reconciler's backend for iptables mode."""

    def __init__(self, family: Family, variant: Variant, runner: Runner = run, layout: Layout = LAYOUT) -> None:
        self.family = family
        self.variant = variant
        self.layout = layout
        # One large transaction costs iptables-nft-restore super-linear time, and legacy a swap of the whole
        # table for each one: measured at 5,000 services × 2 endpoints (docs/performance.md).
        self.batch = 500 if variant == "nft" else 0
        self._run = runner
        self._borrowed: set[tuple[str, str]] = set()  # our chains that rules of others jump to

    def read(self) -> dict[Any, IptablesObject]:
        saved = rules.parse_save(self.save(), self.layout)
        self._borrowed = saved.borrowed
        return {key: obj for key, obj in saved.objects.items() if not self._is_lent(obj)}

    def _is_lent(self, obj: IptablesObject) -> bool:
        """Whether it is what is left of a service's chain that cannot be deleted: empty, it does nothing."""
        return rules.serves(obj) and obj.key[1:] in self._borrowed and not obj.added()

    def save(self, *tables: str) -> str:
        """iptables-save of these tables, or of all. Raises TransactionError."""
        argv = [self._program("save")]
        if len(tables) == 1:
            argv += ["-t", tables[0]]
        return self._checked(argv)

    def chain(self, table: str, name: str) -> str:
        """`iptables -S` of a chain. Raises TransactionError."""
        return self._checked([f"{tool(self.family)}-{self.variant}", "-t", table, "-S", name])

    def same(self, planned: IptablesObject, actual: IptablesObject) -> bool:
        return rules.same(planned, actual)

    def render(self, changes: Sequence[Change]) -> Transaction:
        return rules.render(self.possible(changes))

    def stream(self, parts: Iterable[Sequence[Change]]) -> Transaction | None:
        # The nft variant is given chains in batches; the legacy tool reads for longer than planning takes.
        return None if self.batch else rules.stream(parts)

    def possible(self, changes: Sequence[Change]) -> Sequence[Change]:
        """These changes, but that a chain that rules of others jump to is emptied: deleting it is refused."""
        return [self._possible(c) for c in changes] if self._borrowed else changes

    def _possible(self, change: Change) -> Change:
        if change.after is None and change.key[1:] in self._borrowed and rules.serves(change.before):
            return Change(change.key, change.before, Chain(*change.key[1:]))
        return change

    def apply(self, transaction: Transaction) -> None:
        argv = [self._program("restore"), "--noflush"]
        # The nft variant has no lock, and says nothing if it is asked to wait for one.
        argv += ["-w", _LOCK_WAIT]
        self._checked(argv, transaction)

    def _program(self, action: str) -> str:
        return f"{tool(self.family)}-{self.variant}-{action}"

    def _checked(self, argv: list[str], pieces: Iterable[str] = ()) -> str:
        try:
            done = self._run(argv, pieces)
        except FileNotFoundError:
            raise MissingError(f"{argv[0]} is not installed: install the package iptables") from None
        except subprocess.TimeoutExpired as error:
            raise TransactionError(f"{argv[0]} did not end within {error.timeout:.0f} s", transient=True) from None
        except OSError as error:  # no memory, too many processes
            raise TransactionError(f"{argv[0]} cannot be run: {error.strerror}", transient=True) from None
        if done.code:
            raise _error(argv[0], done.code, done.err.strip(), "".join(pieces))
        return done.out


def _error(program: str, code: int, err: str, text: str) -> TransactionError:
    locked = "lock" in err and ("holding" in err or "xtables.lock" in err or "obtain" in err)
    denied = "Permission denied" in err or "must be root" in err
    reason = err.splitlines()[0] if err else f"exit status {code}"
    lines = text.splitlines()
    number = _failed_line(err)
    if number and number <= len(lines) and lines[number - 1] != "COMMIT":
        reason = f"{reason}: {lines[number - 1]}"
    if _NO_NF_TABLES in reason:
        return MissingError(f"{program}: {reason}")
    return TransactionError(f"{program}: {reason}", transient=locked or denied or code < 0)


def _failed_line(err: str) -> int:
    """The line of the input that iptables-restore blames, from 1; 0 when it does not say."""
    words = err.replace(":", " ").split()
    return next((int(b) for a, b in pairwise(words) if a == "line" and b.isdigit()), 0)


def cleanup(family: Family, variant: Variant, runner: Runner = run) -> int:
    """Remove exactly what is ours from this family and variant. Returns how many objects that was.

    What others use stays: KUBE-FIREWALL where the kubelet has it too, and chains that somebody else's rules
    jump to (CNI plugins borrow KUBE-MARK-MASQ). Raises TransactionError.
    """
    kernel = Iptables(family, variant, runner)
    saved = rules.parse_save(kernel.save())
    keep = set(saved.borrowed)
    if any(hint in saved.chains for hint in _HINTS):
        keep.add(("filter", SHARED_FIREWALL))
    changes = [c for obj in saved.objects.values() for c in rules.removal(obj, keep)]
    transaction = rules.render(changes)
    canaries = [table for table, chain in sorted(saved.chains) if chain == "KUBE-PROXY-CANARY"]
    markers = "".join(f"*{table}\n-X KUBE-PROXY-CANARY\nCOMMIT\n" for table in canaries)
    if changes or canaries:
        kernel.apply(Transaction.of(transaction.text + markers))
    return len(changes) + len(canaries)


def missing(family: Family, variant: Variant, runner: Runner = run) -> str:
    """Why this family has no NAT in this variant: its tool or the kernel lacks it; "" if it has."""
    kernel = Iptables(family, variant, runner)
    try:
        kernel.chain("nat", "POSTROUTING")
    except MissingError as error:
        return str(error)
    except TransactionError as error:
        return "" if error.transient else str(error)
    return ""


def detect_variant(family: Family, runner: Runner = run, *, probing: bool = True) -> Variant:
    """Which variant this node uses: the kubelet's, else the one that has rules, else the system's default, or the
    other where the default does not work, as far as that can be known without `probing`, which writes.
    """
    saved: dict[Variant, str] = {}
    hint, canary = (f"\n:{chain} " for _, chain in _HINTS)
    for variant in VARIANTS:
        try:
            saved[variant] = Iptables(family, variant, runner).save()
        except TransactionError:
            continue  # not installed, or the kernel does not have it
        if hint in saved[variant]:
            return variant
    for variant, text in saved.items():
        if canary in text:
            return variant
    counts = {variant: text.count("\n-A ") for variant, text in saved.items()}
    if any(counts.values()):
        return max(counts, key=lambda variant: counts[variant])
    default = _default_variant(family, runner)
    candidates = sorted(saved, key=lambda variant: variant != default)
    return next((v for v in candidates if not probing or _works(family, v, runner)), default)


def _default_variant(family: Family, runner: Runner) -> Variant:
    try:
        version = runner([tool(family), "--version"]).out
    except FileNotFoundError:
        version = ""
    return "legacy" if "legacy" in version else "nft"


def _works(family: Family, variant: Variant, runner: Runner) -> bool:
    """Whether the kernel takes rules of this variant.

    Only writing one tells: in a kernel with nf_tables but without its IPv4 (user-mode Linux) iptables-nft-save,
    `-L` and `restore --test` all succeed. The chain is gone with the transaction that made it.
    """
    try:
        Iptables(family, variant, runner).apply(Transaction.of(_PROBE))
    except TransactionError as error:
        log.info("iptables-%s does not work here: %s", variant, error)
        return False
    return True
