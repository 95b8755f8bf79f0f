"""What runs in the lab's pods: `python -m miniproxy.lab server LAB` serves all of them from one process.

A socket belongs to the namespace it was made in, wherever the process lives; so one small event loop can listen
in every pod, and a lab of a hundred pods weighs no more than one. Each answer is one line of JSON that says
which pod answered and which client it saw:

    {"pod": "web-1", "node": "node1", "server": "10.244.1.11:8080", "client": "10.244.2.200", "client_port": 40110}

HTTP: GET / answers that; GET /slow?seconds=N sends a line every 0.1 s for N seconds (a long-lived connection).
TCP: that line on connect, then every line is sent back. UDP: that line for every datagram.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import cast
from urllib.parse import parse_qs, urlsplit

from .netns import inside
from .plan import LabSpec, Pod, netns_name, plan
from .state import READY, read_record

_SLOW_INTERVAL = 0.1
_SLOW_LONGEST = 3600.0


def answer(pod: Pod, port: int, client: tuple[str, int]) -> bytes:
    """The line of JSON; `client` as the socket gives it, perhaps as an IPv4-mapped address."""
    address = client[0].removeprefix("::ffff:")
    server = f"[{pod.ips[1]}]:{port}" if ":" in address else f"{pod.ips[0]}:{port}"
    who = {
        "pod": pod.name,
        "node": pod.node,
        "server": server,
        "client": address,
        "client_port": client[1],
    }
    return json.dumps(who).encode() + b"\n"


class PodServer:
    """The three listeners of one pod."""

    def __init__(self, pod: Pod, spec: LabSpec) -> None:
        self.pod = pod
        self.spec = spec

    async def start(self) -> None:
        """Listens; the sockets are dual stack."""
        space = netns_name(self.spec.name, self.pod.name)
        http, line, udp = inside(space, self._sockets)
        await asyncio.start_server(self._http, sock=http)
        await asyncio.start_server(self._line, sock=line)
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: _Echo(self.pod, self.spec.udp_port), sock=udp)

    def _sockets(self) -> tuple[socket.socket, socket.socket, socket.socket]:
        def listen(port: int) -> socket.socket:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)

        udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        udp.bind(("::", self.spec.udp_port))
        return listen(self.spec.http_port), listen(self.spec.tcp_port), udp

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            url = urlsplit(target)
            body = answer(self.pod, self.spec.http_port, writer.get_extra_info("peername"))
            if method != "GET" or url.path not in ("/", "/slow"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            elif url.path == "/":
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                )
            else:
                seconds = min(float(parse_qs(url.query).get("seconds", ["10"])[0]), _SLOW_LONGEST)
                await self._slow(writer, body, seconds)
            await writer.drain()
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client's fault or its leaving; it sees the connection end
        finally:
            writer.close()

    async def _slow(self, writer: asyncio.StreamWriter, line: bytes, seconds: float) -> None:
        # No length: the end of the connection is the end of the body.
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
        for _ in range(max(1, round(seconds / _SLOW_INTERVAL))):
            writer.write(line)
            await writer.drain()
            await asyncio.sleep(_SLOW_INTERVAL)

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(answer(self.pod, self.spec.tcp_port, writer.get_extra_info("peername")))
            while line := await reader.readline():
                writer.write(line)
                await writer.drain()
        except (OSError, ValueError):
            pass
        finally:
            writer.close()


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, pod: Pod, port: int) -> None:
        self.pod = pod
        self.port = port
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not an isinstance check: asyncio's own datagram transport is none by inheritance before 3.12.
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self.transport is not None:
            self.transport.sendto(answer(self.pod, self.port, addr), addr)


async def serve(lab: str) -> None:
    """Serves every pod of a lab until the process is ended; prints READY when all of them listen."""
    spec = read_record(lab).spec
    for pod in plan(spec).servers:
        await PodServer(pod, spec).start()
    print(READY, flush=True)
    await asyncio.Event().wait()


def main(lab: str) -> None:
    asyncio.run(serve(lab))
