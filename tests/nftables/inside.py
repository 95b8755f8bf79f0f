"""The nftables backend at work in a network namespace of its own, while the test stays outside."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from miniproxy.kernel.exec import Completed, run
from miniproxy.kernel.netlink import Netlink
from miniproxy.kernel.nfnetlink import open_netlink
from miniproxy.kernel.nftables import Nftables, Program
from miniproxy.model import Family
from miniproxy.transaction import Transaction
from tests.packets.topology import Namespace

_CLONE_NEWNET = 0x40000000


@contextmanager
def entered(namespace: Namespace) -> Iterator[None]:
    """This thread is in the namespace: what it opens belongs there for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/proc/{namespace.pid}/ns/net", os.O_RDONLY)
    try:
        assert libc.setns(there, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home, _CLONE_NEWNET) == 0
    finally:
        os.close(home)
        os.close(there)


class Noting(Nftables):
    """Notes what is written, by whichever means."""

    def __init__(self, place: Inside, family: Family) -> None:
        super().__init__(family, Program(place.runner), place.netlink)
        self._place = place

    def apply(self, transaction: Transaction) -> None:
        self._place.scripts.append(transaction.text)
        super().apply(transaction)


class Inside:
    """Everything of the backend, in a namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.scripts: list[str] = []  # all transactions, whatever came of them

    def runner(self, argv: Sequence[str], text: Iterable[str] = (), timeout: float = 60.0) -> Completed:
        return run(self.namespace.command(argv), text, timeout)

    def netlink(self) -> Netlink:
        with entered(self.namespace):
            return open_netlink()

    def backend(self, family: Family) -> Nftables:
        return Noting(self, family)

    def backends(self) -> dict[Family, Nftables]:
        return {family: self.backend(family) for family in Family}

    def nft(self, *argv: str, stdin: str = "") -> str:
        return self.namespace.run("nft", *argv, stdin=stdin)


@contextmanager
def inside() -> Iterator[Inside]:
    with Namespace.create() as namespace:
        yield Inside(namespace)
