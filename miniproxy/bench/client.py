"""Connections from the client's namespace: when a change works, and what a connection costs."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from ..lab import uml
from .eye import Eye
from .objects import PORT
from .world import CLIENT, World

_PATIENCE = 1.0  # seconds for a connection that has to come about
# For one that may: a rule's refusal by ICMP is not always noticed by the client's kernel. In user-mode Linux, with its
# one slow processor, an answer can take longer while an agent works.
_ATTEMPT = 0.2 if uml.inside() else 0.02
_PAUSE = 0.0005
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: end with a reset, so that no port stays in TIME-WAIT


class Seen(NamedTuple):
    """Seconds since a change was made until it showed; None: it does not show there."""

    kernel: float | None  # the write that made it work
    connected: float | None


class TooLate(Exception):
    """What was waited for has not come."""


def ask(address: str, port: int = PORT) -> str:
    """Which endpoint answers at a service's address; "" when nobody does. To be called in the client's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ATTEMPT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        try:
            connection.connect((address, port))
            return connection.recv(64).decode()
        except OSError:
            return ""


def follow(world: World, eye: Eye, act: Callable[[], None], works: Callable[[], bool], patience: float = 60.0) -> Seen:
    """Make a change and watch until it works. Raises TooLate."""

    def watch() -> Seen:
        stamp, kernel = eye.stamp(), None
        start = time.perf_counter()
        act()
        while (now := time.perf_counter()) - start < patience:
            fresh = eye.stamp()
            if fresh != stamp:
                stamp, kernel = fresh, now - start
            looked = time.perf_counter() - now
            if works():
                return Seen(kernel, time.perf_counter() - start)
            # Who looks must not take the agent's time: in user-mode Linux there is one processor for both.
            time.sleep(max(_PAUSE, looked))
        raise TooLate(f"not within {patience:.0f} s")

    return world.inside(CLIENT, watch)


def written(look: Callable[[], Hashable], act: Callable[[], None], patience: float = 60.0) -> Seen:
    """Make a change and look until something else is seen: for what connections cannot show at once."""
    stamp = look()
    start = time.perf_counter()
    act()
    while (now := time.perf_counter()) - start < patience:
        if look() != stamp:
            return Seen(now - start, None)
        time.sleep(_PAUSE)
    raise TooLate(f"not within {patience:.0f} s")


class Dataplane(NamedTuple):
    """What connections cost; seconds."""

    latency: list[float]  # of each first packet and its answer: connect() to a random service
    per_second: float  # connections made one after the other and answered


def dataplane(world: World, addresses: Sequence[tuple[str, int]], count: int, seed: int) -> Dataplane:
    """Connect `count` times to some of these (address, port); raises TooLate when one does not answer."""
    chosen = random.Random(seed).choices(list(addresses), k=count)

    def measure() -> Dataplane:
        latency = []
        begin = time.perf_counter()
        for address in chosen:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
                connection.settimeout(_PATIENCE)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                start = time.perf_counter()
                try:
                    connection.connect(address)
                    latency.append(time.perf_counter() - start)
                    connection.recv(64)
                except OSError as error:
                    raise TooLate(f"{address[0]}:{address[1]} does not answer: {error}") from None
        return Dataplane(latency, count / (time.perf_counter() - begin))

    return world.inside(CLIENT, measure)
