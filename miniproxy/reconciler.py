"""Keeps one family's kernel state what it should be: desired − applied = one small transaction.

It knows what every service port wants (`set`) and what the kernel holds (`adopt`, and every transaction that
succeeded), and keeps the keys on which the two differ. So a change costs what it changes, whatever
the number of services, and nothing that is right is ever written again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

from .model import ServicePortName
from .transaction import Backend, Change, Transaction, TransactionError

Owner = ServicePortName | None  # None: the frame, which belongs to no service
STALE: Owner = ServicePortName("", "", "stale", "TCP")  # sorts before any service; owns what nobody wants
_GIVE_UP = 8  # this many service ports refused in a row and none taken: it is not they who are bad


class Result(NamedTuple):
    """What one sync did."""

    transactions: tuple[Transaction, ...] = ()
    set_aside: tuple[tuple[ServicePortName, str], ...] = ()  # refused by the kernel just now, and why

    @property
    def operations(self) -> int:
        return sum(t.operations for t in self.transactions)


class Reconciler:
    """One backend in one family. Not thread-safe: one thread owns the kernel."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.aside: dict[ServicePortName, str] = {}  # service ports the kernel refused, and why
        self._wanted: dict[Owner, tuple[Any, ...]] = {}
        self._owner: dict[Hashable, Owner] = {}  # who has a key
        self._rivals: dict[Hashable, list[Owner]] = {}  # all who want it, its owner first, where there are several
        self._contested: dict[Owner, None] = {}  # who wants a key that its owner has with other content than before
        self._desired: dict[Hashable, Any] = {}  # what owners want
        self._applied: dict[Hashable, Any] = {}
        self._dirty: dict[Hashable, Owner] = {}  # where the two differ, in the order found, and whose it is

    # -- what should be

    def frame(self, objects: Iterable[Any]) -> None:
        """State the objects that are needed whatever services there are."""
        self._want(None, objects)

    def set(self, name: ServicePortName, objects: Iterable[Any]) -> None:
        """State all objects of a service port; none when it is gone. It costs what differs from before."""
        self.aside.pop(name, None)
        self._want(name, objects)

    def wanted(self, name: ServicePortName) -> tuple[Any, ...]:
        return self._wanted.get(name, ())

    @property
    def desired(self) -> Mapping[Hashable, Any]:
        """Everything that should be, by key."""
        return self._desired

    def conflicts(self, name: ServicePortName) -> list[tuple[Hashable, Owner]]:
        """Keys this service port wants and does not get because another has them with other content."""
        wanted = self._wanted.get(name, ())
        found = []
        for obj in wanted if self._rivals else ():
            key = obj.key
            if key in self._rivals and self._owner[key] != name and self._desired[key] != obj:
                found.append((key, self._owner[key]))
        return sorted(found, key=str)

    def take_contested(self) -> Sequence[ServicePortName]:
        """The service ports whose conflicts may be others than at the last call."""
        if not self._contested:
            return ()
        contested, self._contested = self._contested, {}
        return [owner for owner in contested if owner is not None]

    def _want(self, owner: Owner, objects: Iterable[Any]) -> None:
        before = {obj.key: obj for obj in self._wanted.pop(owner, ())}
        after = {obj.key: obj for obj in objects}
        if after:
            self._wanted[owner] = tuple(after.values())
        for key in before.keys() - after.keys():
            self._disclaim(key, owner)
            self._compare(key, owner)
        for key, obj in after.items():
            if key not in before:
                self._claim(key, obj, owner)
            elif before[key] != obj and self._owner[key] == owner:
                self._replace(key, obj)
                self._compare(key, owner)

    def _claim(self, key: Hashable, obj: Any, owner: Owner) -> None:
        if key not in self._owner:
            self._owner[key] = owner
            self._desired[key] = obj
            self._note(key, obj == self._applied.get(key), owner)
            return
        rivals = self._rivals.setdefault(key, [self._owner[key]])
        rivals.append(owner)
        # The frame first, then the smallest name: who wins a conflict must not depend on who came first.
        rivals.sort(key=lambda o: (o is not None, o or ()))
        self._give(key, rivals[0])
        self._compare(key, owner)

    def _disclaim(self, key: Hashable, owner: Owner) -> None:
        rivals = self._rivals.get(key)
        if rivals is None:
            del self._owner[key], self._desired[key]
            return
        rivals.remove(owner)
        self._give(key, rivals[0])
        if len(rivals) == 1:
            del self._rivals[key]

    def _give(self, key: Hashable, owner: Owner) -> None:
        self._owner[key] = owner
        self._replace(key, next(obj for obj in self._wanted[owner] if obj.key == key))

    def _replace(self, key: Hashable, obj: Any) -> None:
        if obj != self._desired[key]:  # else rivals share it, and nobody loses or wins
            self._desired[key] = obj
            self._contested.update(dict.fromkeys(self._rivals.get(key, ())))

    def _compare(self, key: Hashable, owner: Owner) -> None:
        """Note whether a key is as it should be; `owner` answers for it where nobody wants it any more."""
        right = self._desired.get(key) == self._applied.get(key)
        self._note(key, right, self._owner.get(key, owner))

    def _note(self, key: Hashable, right: bool, owner: Owner) -> None:
        if right:
            self._dirty.pop(key, None)
        else:
            self._dirty[key] = owner

    # -- what is

    def adopt(self, found: Mapping[Hashable, Any] | None = None) -> int:
        """Read the kernel, unless `found` is what it holds; whatever is right there stays untouched. Returns how many
        objects differ.

        Raises TransactionError when it cannot be read; then nothing is changed.
        """
        self._read(found)
        self.aside.clear()
        return len(self._dirty)

    def _read(self, found: Mapping[Hashable, Any] | None = None) -> None:
        applied: dict[Hashable, Any] = {}
        dirty: dict[Hashable, Owner] = {}
        for key, obj in (self.backend.read() if found is None else found).items():
            wanted = self._desired.get(key)
            if wanted is not None and self.backend.same(wanted, obj):
                applied[key] = wanted  # in the planned spelling, so that from here on equality is plain equality
            else:
                applied[key] = obj
                dirty[key] = self._owner.get(key, STALE)
        dirty.update((key, owner) for key, owner in self._owner.items() if key not in applied)
        self._applied = applied
        self._dirty = dirty

    @property
    def applied(self) -> Mapping[Hashable, Any]:
        return self._applied

    def pending(self) -> int:
        """How many objects are not as they should be."""
        return len(self._dirty)

    def differing(self) -> dict[str, int]:
        """How many objects are not as they should be, by whose they are: a service port, the frame, or nobody."""
        names = {None: "the frame", STALE: "nobody"}
        return {names.get(owner, str(owner)): len(keys) for owner, keys in self._by_owner().items()}

    # -- from what is to what should be

    def sync(self, *, bisect: bool = True) -> Result:
        """Write every difference. With `bisect`, a refusal sets aside the service port to blame, and the rest is
        written; without, it is raised.

        Raises TransactionError when the kernel cannot be written at all; what was written stays counted.
        """
        run = _Run(bisect)
        for batch in self._batches():
            self._write(batch, run)
        if run.refused:
            # Reading back during the search may have found more that nobody wants.
            self._write(self._by_owner(), run)
        return Result(tuple(run.transactions), tuple(run.refused))

    def fill(self, found: Mapping[Hashable, Any], steps: Iterable[object]) -> Result | None:
        """The first sync, into a kernel that holds no more than `found`, of the frame: while `steps` go on stating what
        service ports want, what they have stated is sent, so that a tool that reads slowly has begun.

        None, and no step is done, where there is more in the kernel or the backend has no use for it. Raises
        TransactionError; then `adopt` has to find out what is.
        """
        if len(self._wanted) > 1 or any(key not in self._desired for key in found):
            return None
        sent: dict[Hashable, Change] = {}
        again: dict[Hashable, Owner] = {}

        def parts() -> Iterator[list[Change]]:
            for _ in steps:
                dirty, self._dirty = self._dirty, {}
                again.update((key, owner) for key, owner in dirty.items() if key in sent)
                keys = [key for key in dirty if key not in sent and key in self._desired]
                part = self._changes([keys])
                sent.update(zip(keys, part, strict=True))
                if part:
                    yield part

        coming = parts()
        first: list[list[Change]] = []
        transaction = self.backend.stream(chain(first, coming))
        if transaction is None:
            return None
        self._read(found)
        first.extend(islice(coming, 1))  # only now is it known whether there is anything to send
        if not first:
            return Result()
        self.backend.apply(transaction)
        self._applied.update((key, change.after) for key, change in sent.items())
        for key, owner in again.items():
            self._compare(key, owner)
        more = self.sync(bisect=False)
        return Result((transaction, *more.transactions))

    def preview(self) -> Transaction:
        """The transaction that sync would send if one were enough."""
        return self.backend.render(self._changes(self._by_owner().values()))

    def _batches(self) -> list[dict[Owner, list[Hashable]]]:
        """Dirty keys by owner, cut into transactions of whole owners.

        The frame and default/kubernetes, through which pods reach the API server, come first, and where one
        transaction is not enough they do not wait for others (kubernetes#133773); what nobody wants comes last, since
        others may refer to it until they are rewritten.
        """
        by_owner = self._by_owner()
        owners = sorted(by_owner, key=_urgency)
        size = self.backend.batch or len(owners) or 1
        urgent = sum(_urgency(owner) < 2 for owner in owners) if len(owners) > size else 0
        cuts = [0, *range(urgent or size, len(owners), size), len(owners)]
        return [{o: by_owner[o] for o in owners[start:end]} for start, end in pairwise(cuts) if start < end]

    def _by_owner(self) -> dict[Owner, list[Hashable]]:
        by_owner: dict[Owner, list[Hashable]] = {}
        for key, owner in self._dirty.items():
            if not self.aside or owner not in self.aside:
                by_owner.setdefault(owner, []).append(key)
        return by_owner

    def _changes(self, groups: Iterable[Iterable[Hashable]]) -> list[Change]:
        applied, desired = self._applied, self._desired
        return [Change(key, applied.get(key), desired.get(key)) for keys in groups for key in keys]

    def _write(self, groups: dict[Owner, list[Hashable]], run: _Run) -> None:
        if not groups:
            return
        changes = self._changes(groups.values())
        transaction = self.backend.render(changes)
        try:
            self.backend.apply(transaction)
        except TransactionError as error:
            if error.transient or not run.bisect:
                raise
            self._bisect(list(groups), error, run)
            return
        run.transactions.append(transaction)
        for change in changes:
            if change.after is None:
                self._applied.pop(change.key, None)
            else:
                self._applied[change.key] = change.after
            del self._dirty[change.key]

    def _bisect(self, owners: list[Owner], error: TransactionError, run: _Run) -> None:
        # What spans tables is not atomic: the first may be in the kernel already, so look.
        self._read()
        if len(owners) == 1:
            self._set_aside(owners[0], error, run)
            return
        middle = len(owners) // 2
        for half in (owners[:middle], owners[middle:]):
            by_owner = self._by_owner()
            self._write({o: by_owner[o] for o in half if o in by_owner}, run)

    def _set_aside(self, owner: Owner, error: TransactionError, run: _Run) -> None:
        if owner is None:
            raise error  # without the frame nothing works
        if not run.transactions and not run.refused:
            # Is it the service port, or does nothing work at all (its tool is broken, the disk is full)?
            self.backend.apply(self.backend.render(()))
        self.aside[owner] = str(error)
        run.refused.append((owner, str(error)))
        if len(run.refused) >= _GIVE_UP and not run.transactions:
            raise error


def _urgency(owner: Owner) -> int:
    if owner is None:
        return 0
    if owner.name == "kubernetes" and owner.namespace == "default":
        return 1
    return 3 if owner == STALE else 2


class _Run:
    """What one sync has done so far."""

    def __init__(self, bisect: bool) -> None:
        self.bisect = bisect
        self.transactions: list[Transaction] = []
        self.refused: list[tuple[ServicePortName, str]] = []
