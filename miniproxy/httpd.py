"""Listens and talks HTTP, for health, metrics and the health check ports of Services.

One thread and one event loop per Httpd, however many ports are open: a node may have hundreds of health check
ports, and a client that is slow or silent must not keep others from an answer. The requests are parsed by the
standard library's http.server; what to answer is the caller's business, and must be quick.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import NamedTuple

from .health import Answer

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # between two attempts to bind what could not be bound; kube-proxy's interval
REFRESH_SECONDS = 30.0  # between two looks at whether the addresses are still those to bind
IDLE_SECONDS = 30.0  # how long a client may take for a request, or to take its answer
MOST_CONNECTIONS = 512  # beyond, the one that has been open longest has to go
MOST_HEAD_BYTES = 16 << 10

Address = tuple[str, int]  # IP and port; IP "" is all addresses of both families
Handler = Callable[[str], Answer]  # from the path, without a query

_TEXT = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
NOT_FOUND = Answer(404, _TEXT, "404 page not found\n")
_FAILED = Answer(500, _TEXT, "internal error, see the log\n")


def text(body: str) -> Answer:
    """An answer in plain text."""
    return Answer(200, _TEXT, body)


def routes(table: Mapping[str, Callable[[], Answer]]) -> Handler:
    """A handler that knows these paths and no others."""
    return lambda path: table[path]() if path in table else NOT_FOUND


def parse_address(where: str) -> Address:
    """`IP:port` as settings have it. Both 0.0.0.0 and :: mean all addresses of both families, as in kube-proxy."""
    host, _, port = where.rpartition(":")
    host = host.strip("[]")
    return ("" if host in ("0.0.0.0", "::") else host), int(port)


class Site(NamedTuple):
    """Something to serve at the addresses that `where` names, which is asked again from time to time.

    `report` is told why an address cannot be bound, and "" once all can: at first, and each time it changes.
    """

    where: Callable[[], Iterable[Address]]
    handler: Handler
    report: Callable[[str], None]


class Httpd:
    """Serves sites by name, in a thread of its own. Its methods may be called from any thread and return at once;
    what they change happens in the order of the calls.
    """

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name=name, daemon=True)
        self._ready = threading.Event()
        self._sites: dict[Hashable, Site] = {}
        self._bound: dict[Hashable, dict[Address, asyncio.Server]] = {}
        self._reported: dict[Hashable, str] = {}
        self._connections: dict[asyncio.StreamWriter, Hashable] = {}  # in the order they were opened

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Close everything; returns when it is closed."""
        self._call(self._end.set)
        self._thread.join()

    def serve(self, name: Hashable, site: Site) -> None:
        """Serve this under `name` from now on, and nothing else."""
        self._call(self._changes.put_nowait, (name, site))

    def close(self, name: Hashable) -> None:
        """Serve nothing under `name` any more; its connections end."""
        self._call(self._changes.put_nowait, (name, None))

    def _call(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # stopped already
            log.debug("not listening any more")

    # -- all that follows runs in the thread

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._changes: asyncio.Queue[tuple[Hashable, Site | None]] = asyncio.Queue()
        self._ready.set()
        work = (
            self._follow_changes(),
            self._repeat(RETRY_SECONDS, lambda name: bool(self._reported.get(name))),
            self._repeat(REFRESH_SECONDS, lambda name: True),
        )
        tasks = [asyncio.create_task(coroutine) for coroutine in work]
        await self._end.wait()
        for task in tasks:
            task.cancel()
        for name in list(self._bound):
            self._unbind(name, keep=())

    async def _follow_changes(self) -> None:
        while True:
            name, site = await self._changes.get()
            async with self._one_at_a_time:
                self._unbind(name, keep=())
                self._reported.pop(name, None)
                if site:
                    self._sites[name] = site
                    await self._bind_safely(name, site)
                else:
                    self._sites.pop(name, None)

    async def _repeat(self, seconds: float, which: Callable[[Hashable], bool]) -> None:
        while True:
            await asyncio.sleep(seconds)
            for name, site in list(self._sites.items()):
                async with self._one_at_a_time:
                    if which(name) and self._sites.get(name) is site:
                        await self._bind_safely(name, site)

    async def _bind_safely(self, name: Hashable, site: Site) -> None:
        try:
            await self._bind(name, site)
        except Exception:
            # A fault in our own code must cost the one site it shows with, not all that are still to come.
            log.exception("cannot serve %s: please report this", name)

    async def _bind(self, name: Hashable, site: Site) -> None:
        """Listen where the site should be and nowhere else, as far as that can be had."""
        try:
            wanted = list(dict.fromkeys(site.where()))
        except OSError as error:
            self._report(name, site, f"cannot find out the node's addresses: {error}")
            return
        self._unbind(name, keep=wanted)
        bound = self._bound.setdefault(name, {})
        wrong = []
        for address in wanted:
            if address in bound:
                continue
            try:
                sock = _listen(address)
            except OSError as error:
                wrong.append(f"cannot listen on {_show(address)}: {os.strerror(error.errno) if error.errno else error}")
                continue
            bound[address] = await asyncio.start_server(
                lambda reader, writer: self._converse(name, site.handler, reader, writer),
                sock=sock,
                limit=MOST_HEAD_BYTES,
            )
        self._report(name, site, "; ".join(wrong))

    def _unbind(self, name: Hashable, keep: Iterable[Address]) -> None:
        bound = self._bound.get(name, {})
        gone = bound.keys() - set(keep)
        for address in gone:
            bound.pop(address).close()
        if not bound:
            self._bound.pop(name, None)
        if gone:
            for writer in [w for w, of in self._connections.items() if of == name]:
                writer.transport.abort()

    def _report(self, name: Hashable, site: Site, wrong: str) -> None:
        if self._reported.get(name) != wrong:
            self._reported[name] = wrong
            site.report(wrong)

    async def _converse(
        self, name: Hashable, handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._connections[writer] = name
        if len(self._connections) > MOST_CONNECTIONS:
            next(iter(self._connections)).transport.abort()
        try:
            again = True
            while again:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE_SECONDS)
                response, again = _Exchange(head, handler).respond()
                writer.write(response)
                await asyncio.wait_for(writer.drain(), IDLE_SECONDS)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # the client is gone, slow or not speaking HTTP
        finally:
            self._connections.pop(writer, None)
            writer.close()


class _Exchange(BaseHTTPRequestHandler):
    """One request and its response, as bytes. Any method is answered alike, as kube-proxy does."""

    protocol_version = "HTTP/1.1"

    def __init__(self, head: bytes, handler: Handler) -> None:  # not the base's: that one talks to a socket
        self.rfile = BytesIO(head)
        self.wfile = self._response = BytesIO()
        self._handler = handler
        self.close_connection = True

    def respond(self) -> tuple[bytes, bool]:
        """The response, and whether the connection may carry another request."""
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            # A body is of no interest; it is not read, so nothing may follow it.
            if self.headers.get("Content-Length", "0") != "0" or self.headers.get("Transfer-Encoding"):
                self.close_connection = True
            self._send(self._answer())
        return self._response.getvalue(), not self.close_connection

    def _answer(self) -> Answer:
        try:
            return self._handler(self.path.partition("?")[0])
        except Exception:
            log.exception("cannot answer a request")
            return _FAILED

    def _send(self, answer: Answer) -> None:
        body = answer.body.encode()
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Date", self.date_time_string())
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes are frequent and of no interest."""


def _listen(address: Address) -> socket.socket:
    """A listening socket. Raises OSError."""
    host, port = address
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server(address, family=family, backlog=128)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        except OSError as error:
            if not _no_ipv6(error):
                raise
    return socket.create_server(("0.0.0.0", port), backlog=128)


def _no_ipv6(error: OSError) -> bool:
    """Whether the machine has IPv6 switched off, one way or another."""
    return error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)


def _show(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host or '*'}:{port}"
