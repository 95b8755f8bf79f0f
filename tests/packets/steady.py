"""A client that never stops: it connects to its targets in turn until its standard input ends.

Reads one line, [[SOURCE, PROTOCOL, ADDRESS, PORT, 0], …], prints "ready", and at the end one line, [NUMBER OF
CONNECTIONS, [WHAT FAILED, …]]. Each target is tried at least once. A TCP connection that had to send a packet
again counts as failed too, since that would hide a moment without rules; how long one takes does not count.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
import sys
import time
from collections.abc import Iterator

from .probe import Target, client_socket, converse

WORKERS = 8
PAUSE = 0.05  # seconds between two connections of a worker
TIMEOUT = 5.0
TOTAL_RETRANS = struct.Struct("100xI")  # the field of that name in struct tcp_info (linux/tcp.h)


async def attempt(target: Target) -> str:
    """One connection; returns what went wrong, "" if nothing did."""
    with client_socket(target) as client:
        try:
            async with asyncio.timeout(TIMEOUT):
                await converse(client, target)
        except OSError as error:
            return repr(error)
        if target.protocol == "TCP":
            info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANS.size)
            (again,) = TOTAL_RETRANS.unpack(info)
            if again:
                return f"{again} packets sent again"
    return ""


class Steady:
    def __init__(self, targets: list[Target]) -> None:
        self.at_least = len(targets)
        self.targets: Iterator[Target] = itertools.cycle(targets)
        self.tried = 0
        self.failed: list[str] = []
        self.stop = False

    async def work(self) -> None:
        while not self.stop or self.tried < self.at_least:
            target = next(self.targets)
            began = time.strftime("%H:%M:%S")
            wrong = await attempt(target)
            self.tried += 1
            if wrong:
                self.failed.append(f"{began} {target.protocol} {target.address}:{target.port}: {wrong}")
            await asyncio.sleep(PAUSE)

    async def run(self) -> None:
        workers = [asyncio.create_task(self.work()) for _ in range(WORKERS)]
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        self.stop = True
        await asyncio.gather(*workers)


def main() -> None:
    steady = Steady([Target(*target) for target in json.loads(sys.stdin.readline())])
    asyncio.run(steady.run())
    print(json.dumps([steady.tried, steady.failed]), flush=True)


if __name__ == "__main__":
    main()
