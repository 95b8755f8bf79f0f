"""What passes between the reconciler and a backend: changes, and the one transaction they become.

A transaction is data: it prints as the text that would be sent, so `plan` and a dry run are the same code as
`run`, and a test can ask what a change costs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

Key = Hashable


class KernelObject(Protocol):
    """Something the kernel should hold: an immutable value with an identity and comparable content."""

    @property
    def key(self) -> Any: ...


class Change(msgspec.Struct, frozen=True, gc=False):
    """One object's step: `before` is what the kernel holds (None: nothing), `after` what it should."""

    key: Any
    before: Any
    after: Any


class Transaction:
    """All of it happens, or none of it.

    Iterating over it prints it, a piece of some lines at a time, whenever somebody does: the tool works on the first
    piece while the next is made, and the megabytes of a first load are nowhere as a whole.
    """

    def __init__(self, pieces: Callable[[], Iterable[str]], operations: int | None = None) -> None:
        """`pieces` prints it, the same each time; `operations` is the number of its lines unless it is stated."""
        self._pieces = pieces
        self._operations = operations

    @staticmethod
    def of(text: str) -> Transaction:
        return Transaction(lambda: (text,))

    def __iter__(self) -> Iterator[str]:
        lines = 0
        for piece in self._pieces():
            lines += piece.count("\n")
            yield piece
        if self._operations is None:
            self._operations = lines

    @property
    def text(self) -> str:
        return "".join(self)

    @property
    def operations(self) -> int:
        """Lines or messages the kernel's tool has to work on; counted where it is printed."""
        if self._operations is None:
            self._operations = sum(piece.count("\n") for piece in self._pieces())
        return self._operations


class TransactionError(Exception):
    """The kernel did not take a transaction; it still holds what it held before.

    `transient`: nothing is wrong with its content (a lock was held, memory was short, the tool was missing),
    so looking for a bad object in it would be wrong.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class MissingError(TransactionError):
    """This machine has nothing of the kind: the tool is not installed, or the kernel does not know it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=True)


class Backend(Protocol):
    """One kind of kernel state in one family, as the reconciler sees it."""

    # How many service ports to write in one transaction at most; 0: any number.
    @property
    def batch(self) -> int: ...

    def read(self) -> dict[Any, Any]:
        """What the kernel holds that is ours, by key. Raises TransactionError."""
        ...

    def same(self, planned: Any, actual: Any) -> bool:
        """Whether an object read is the object planned."""
        ...

    def stream(self, parts: Iterable[Sequence[Change]]) -> Transaction | None:
        """One transaction of changes that are found while it is sent, each of another key; what one refers to comes
        with it or before it. None where that would not save time.
        """
        ...

    def render(self, changes: Sequence[Change]) -> Transaction:
        """Pure: the transaction that makes these changes."""
        ...

    def apply(self, transaction: Transaction) -> None:
        """Send it. Raises TransactionError."""
        ...
