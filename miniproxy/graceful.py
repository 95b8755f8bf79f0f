"""Graceful termination: real servers with weight 0 keep their connections, and go when none is left.

It remembers which they are and says when to look next; the kernel does the rest, and keeps the state when the agent
restarts: whatever has weight 0 then is found, and finished. UDP and SCTP know no end of a connection, so their real
servers are never here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

_INTERVAL = 1.0  # seconds between two looks
_SHARE = 20  # a look that took t is followed by at least so many t of rest
_LONGEST = 4.0


class Service(NamedTuple):
    """A TCP virtual server."""

    address: str
    port: int


class Server(NamedTuple):
    """A real server."""

    address: str
    port: int


class Load(NamedTuple):
    """Connections that IPVS has to a real server, as `ipvsadm -L` counts them."""

    active: int
    inactive: int  # half closed, or closed and waiting for stray packets


class Kernel(Protocol):
    """What is asked of kernel/ipvs.py. All raise OSError or TransactionError."""

    def loads(self, services: Iterable[Service]) -> Mapping[tuple[Service, Server], Load]:
        """The real servers with weight 0 of these virtual servers."""
        ...

    def unfinished(self) -> set[tuple[Service, Server]]:
        """Real servers that have a connection which is not closed by both sides. Looks at all connections."""
        ...

    def remove(self, servers: Iterable[tuple[Service, Server]]) -> None: ...


class Draining:
    """The real servers of one family on their way out. Does nothing by itself: call `look` when it is due."""

    def __init__(self, kernel: Kernel, clock: Callable[[], float]) -> None:
        self._kernel = kernel
        self._clock = clock
        self._servers: dict[Service, set[Server]] = defaultdict(set)
        self._due = float("inf")

    def __len__(self) -> int:
        return sum(map(len, self._servers.values()))

    @property
    def due(self) -> float:
        """When to look next, by the clock; infinite when nothing is on its way out."""
        return self._due

    def began(self, service: Service, server: Server) -> None:
        """This real server has weight 0 now."""
        self._servers[service].add(server)
        self._due = min(self._due, self._clock())

    def ended(self, service: Service, server: Server | None = None) -> None:
        """This real server is back or gone; None: the virtual server is."""
        left = set() if server is None else self._servers.get(service, set()) - {server}
        self._servers.pop(service, None)
        if left:
            self._servers[service] = left

    def found(self, servers: Iterable[tuple[Service, Server]]) -> None:
        """All that have weight 0 in the kernel, and no others."""
        self._servers.clear()
        for service, server in servers:
            self.began(service, server)

    def look(self) -> int:
        """Delete those that have no connection left; how many that were. Raises what the kernel does.

        The cost is in proportion to what is on its way out; only closed connections that still linger make it
        look at all connections.
        """
        began = self._clock()
        self._due = began + _LONGEST  # if this fails
        loads = self._kernel.loads(self._servers)
        gone = [key for key in self._pairs() if key not in loads]
        done = {key for key, load in loads.items() if not load.active and not load.inactive}
        closing = {key for key, load in loads.items() if not load.active and load.inactive}
        if closing:
            done |= closing - self._kernel.unfinished()
        if done:
            self._kernel.remove(done)
        for key in [*gone, *done]:
            self.ended(*key)
        now = self._clock()
        rest = min(_LONGEST, max(_INTERVAL, _SHARE * (now - began)))
        self._due = now + rest if self._servers else float("inf")
        return len(done)

    def _pairs(self) -> list[tuple[Service, Server]]:
        return [(service, server) for service, servers in self._servers.items() for server in servers]
