"""A server that tells its clients who they reached: `echo.py TCP:8080 UDP:53 …`.

Answers each TCP connection and each UDP datagram with "ADDRESS PORT CLIENT": the address and port that took
it and the client's address as seen here. Prints "ready" once all ports are open. Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import socket
import sys

# struct in6_pktinfo: the address, then the interface's index (0: let routing decide where the answer goes)
ANY_INTERFACE = b"\0\0\0\0"


def plain(address: str) -> str:
    """Without the prefix that IPv4 addresses have on an IPv6 socket."""
    return address.removeprefix("::ffff:")


async def serve_tcp(port: int) -> asyncio.Server:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        local, peer = writer.get_extra_info("sockname"), writer.get_extra_info("peername")
        writer.write(f"{plain(local[0])} {local[1]} {plain(peer[0])}".encode())
        writer.close()

    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", port))
    return await asyncio.start_server(answer, sock=listener, backlog=4096)


def serve_udp(loop: asyncio.AbstractEventLoop, port: int) -> None:
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setblocking(False)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    server.bind(("::", port))

    def answer() -> None:
        _, ancillary, _, peer = server.recvmsg(64, 256)
        info = next(data for _, kind, data in ancillary if kind == socket.IPV6_PKTINFO)[:16]
        local = plain(socket.inet_ntop(socket.AF_INET6, info))
        # From the address that was asked, or connection tracking would not recognise the answer.
        source = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info + ANY_INTERFACE)]
        server.sendmsg([f"{local} {port} {plain(peer[0])}".encode()], source, 0, peer)

    loop.add_reader(server, answer)


async def main(arguments: list[str]) -> None:
    loop = asyncio.get_running_loop()
    servers = []
    for protocol, port in (argument.split(":") for argument in arguments):
        if protocol == "TCP":
            servers.append(await serve_tcp(int(port)))
        else:
            serve_udp(loop, int(port))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
