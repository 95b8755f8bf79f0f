"""A client that tries many addresses at the same time and tells what it met.

Reads groups of targets from standard input, [[[SOURCE, PROTOCOL, ADDRESS, PORT, ENOUGH], …], …], and writes
their outcomes in the same shape: "to ENDPOINT… from SOURCE…", "refused", "silent", or some joined by " & ".
Targets of one group are tried one after the other (session affinity is shared by all ports of a service),
groups at the same time. SOURCE "" lets routing choose. See echo.py for who answers.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Awaitable
from typing import NamedTuple

TRIES = 20  # connections to each target that answers
MORE_TRIES = 200  # until as many endpoints as expected have been met: 3 endpoints are not all met in 20 tries
SILENT_TRIES = 3
# Longer than the second after which TCP sends a lost SYN again, so that silence is not a lost packet.
TIMEOUT = 1.6

REFUSED, SILENT = "refused", "silent"


class Target(NamedTuple):
    source: str
    protocol: str
    address: str
    port: int
    enough: int


class Met(NamedTuple):
    endpoint: str
    source: str


def client_socket(target: Target) -> socket.socket:
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM if target.protocol == "TCP" else socket.SOCK_DGRAM)
    client.setblocking(False)
    if target.source:
        client.bind((target.source, 0))
    return client


async def converse(client: socket.socket, target: Target) -> Met:
    """One connection, or one datagram, and its answer. Raises OSError."""
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (target.address, target.port))
    if target.protocol == "UDP":
        await loop.sock_sendall(client, b"?")
    address, port, source = (await loop.sock_recv(client, 200)).decode().split()
    return Met(f"{address}:{port}", source)


async def connect(target: Target) -> Met | str:
    with client_socket(target) as client:
        try:
            async with asyncio.timeout(TIMEOUT):
                return await converse(client, target)
        except (ConnectionRefusedError, ConnectionResetError):
            return REFUSED
        except OSError:  # TimeoutError is one
            return SILENT


async def probe(target: Target) -> str:
    outcomes = {await connect(target)}
    if SILENT in outcomes:
        outcomes |= set(await asyncio.gather(*(connect(target) for _ in range(SILENT_TRIES - 1))))
    tried = len(outcomes)
    while any(isinstance(one, Met) for one in outcomes) and (
        tried < TRIES or (tried < MORE_TRIES and endpoints(outcomes) < target.enough)
    ):
        outcomes.add(await connect(target))
        tried += 1
    if REFUSED in outcomes:
        outcomes |= {await connect(target) for _ in range(SILENT_TRIES - 1)}
    return describe(outcomes)


def endpoints(outcomes: set[Met | str]) -> int:
    return len({one.endpoint for one in outcomes if isinstance(one, Met)})


def describe(outcomes: set[Met | str]) -> str:
    met = [one for one in outcomes if isinstance(one, Met)]
    parts = []
    if met:
        reached = " ".join(sorted({one.endpoint for one in met}))
        parts.append(f"to {reached} from {' '.join(sorted({one.source for one in met}))}")
    return " & ".join(parts + [word for word in (REFUSED, SILENT) if word in outcomes])


async def probe_all(groups: list[list[Target]]) -> list[list[str]]:
    async def in_order(group: list[Target]) -> list[str]:
        return [await probe(target) for target in group]

    rows: list[Awaitable[list[str]]] = [in_order(group) for group in groups]
    return await asyncio.gather(*rows)


def main() -> None:
    groups = [[Target(*target) for target in group] for group in json.load(sys.stdin)]
    json.dump(asyncio.run(probe_all(groups)), sys.stdout)


if __name__ == "__main__":
    main()
