"""Downloads that take as long as they are let: `downloads.py serve PORT` and `downloads.py fetch ADDRESS PORT`.

The server says which address was reached, then a dot every second, and "end" when the client says so. The client
obeys lines of its standard input, and answers each with one line of JSON:
    open N          connect N times: the addresses reached, in order
    finish ADDRESS  end the downloads from there: how many there were, and how many were broken
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict

from tests.packets.echo import plain

Download = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"{plain(writer.get_extra_info('sockname')[0])}\n".encode())
    over = asyncio.ensure_future(reader.readline())
    while not (await asyncio.wait({over}, timeout=1))[0]:
        writer.write(b".")
    if over.result() == b"enough\n":
        writer.write(b"end")
    writer.close()


async def serve(port: int) -> None:
    server = await asyncio.start_server(serve_one, "0.0.0.0", port, backlog=4096)
    print("ready", flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)


class Client:
    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.port = port
        self.downloads: dict[str, list[Download]] = defaultdict(list)

    async def open(self) -> str:
        reader, writer = await asyncio.open_connection(self.address, self.port)
        reached = (await reader.readline()).decode().strip()
        self.downloads[reached].append((reader, writer))
        return reached

    async def finish(self, download: Download) -> bool:
        """Whether it arrived whole."""
        reader, writer = download
        try:
            writer.write(b"enough\n")
            async with asyncio.timeout(60):
                whole = (await reader.read()).endswith(b"end")
            writer.close()
        except OSError:  # TimeoutError is one
            return False
        return whole

    async def obey(self, command: str, argument: str) -> object:
        if command == "open":
            return await asyncio.gather(*(self.open() for _ in range(int(argument))))
        found = self.downloads.pop(argument, [])
        whole = await asyncio.gather(*map(self.finish, found))
        return [len(found), whole.count(False)]

    async def run(self) -> None:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await self.obey(*line.split())), flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        asyncio.run(serve(int(arguments[0])))
    else:
        asyncio.run(Client(arguments[0], int(arguments[1])).run())
