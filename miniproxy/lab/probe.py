"""Connecting from a place in the lab and seeing what happens: who answered, and whom it saw.

A place is a namespace; connections are made by threads of this process that entered it, so a try costs a
connection and not a process. Ports that a Pod serves answer as server.py says.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import msgspec

from .netns import enter, inside
from .subprocesses import environment

Kind = Literal["http", "tcp", "udp"]
Outcome = Literal["answered", "refused", "silent", "failed"]

_PARALLEL = 8


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one connection. Addresses are "" unless the outcome is "answered"."""

    outcome: Outcome
    pod: str = ""
    node: str = ""
    server: str = ""  # the pod's own address and port, after translation
    client: str = ""  # the source address the pod saw
    client_port: int = 0
    began: float = 0.0  # time.monotonic()
    seconds: float = 0.0
    error: str = ""  # why it "failed": neither refused nor silent, a reset in the middle say

    def __str__(self) -> str:
        if self.outcome == "answered":
            return f"{self.pod} on {self.node} answered, and saw {self.client}"
        return f"{self.outcome}{': ' if self.error else ''}{self.error}"


class Answers(msgspec.Struct, frozen=True):
    """What came of many connections."""

    each: tuple[Answer, ...]

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(answer.outcome for answer in self.each)

    @property
    def pods(self) -> Counter[str]:
        """How many connections each pod answered."""
        return Counter(answer.pod for answer in self.each if answer.pod)

    @property
    def clients(self) -> set[str]:
        """The source addresses the pods saw."""
        return {answer.client for answer in self.each if answer.client}

    def all(self, outcome: Outcome) -> bool:
        return bool(self.each) and all(answer.outcome == outcome for answer in self.each)

    def __str__(self) -> str:
        """For an assertion's message."""
        errors = sorted({answer.error for answer in self.each if answer.error})
        return f"{dict(self.outcomes)} pods {dict(self.pods)} saw {sorted(self.clients)} {errors or ''}".strip()


class Place(msgspec.Struct, frozen=True):
    """A node, a pod or the outside: somewhere to connect from."""

    name: str
    netns: str
    ips: tuple[str, str]  # IPv4, IPv6
    lock_file: str  # of iptables

    def get(self, address: str, port: int, *, timeout: float = 1.0) -> Answer:
        """One HTTP request."""
        return self.tries(address, port, kind="http", count=1, timeout=timeout).each[0]

    def tries(self, address: str, port: int, *, kind: Kind = "http", count: int = 20, timeout: float = 1.0) -> Answers:
        """`count` connections, some at the same time, each given `timeout` seconds before it is "silent"."""
        from concurrent.futures import ThreadPoolExecutor

        def one(_: int) -> Answer:
            return _connect(kind, address, port, timeout)

        with ThreadPoolExecutor(min(count, _PARALLEL), initializer=enter, initargs=(self.netns,)) as pool:
            return Answers(tuple(pool.map(one, range(count))))

    def dial(self, address: str, port: int, *, timeout: float = 1.0) -> Conversation:
        """Opens a TCP connection to a pods' line port, to be kept open. Raises OSError."""

        def connect() -> socket.socket:
            return socket.create_connection((address, port), timeout)

        return Conversation(inside(self.netns, connect))

    @contextmanager
    def traffic(self, address: str, port: int, *, pause: float = 0.005) -> Iterator[list[Answer]]:
        """HTTP requests one after another for as long as the block lasts, into the list it gives."""
        answers: list[Answer] = []
        over = threading.Event()

        def run() -> None:
            enter(self.netns)
            while not over.wait(pause):
                answers.append(_connect("http", address, port, 1.0))

        thread = threading.Thread(target=run, name=f"traffic from {self.name}")
        thread.start()
        try:
            yield answers
        finally:
            over.set()
            thread.join()

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs another one in this place."""
        return ["ip", "netns", "exec", self.netns, *argv]

    def run(self, *argv: str, check: bool = True) -> str:
        """Runs a command in this place; returns what it printed. Raises subprocess.CalledProcessError."""
        done = subprocess.run(self.command(argv), env=self.environment(), capture_output=True, text=True, check=check)
        return done.stdout

    def environment(self) -> dict[str, str]:
        """For processes in this place.

        iptables-legacy takes one lock for the machine, /run/xtables.lock, though each namespace has tables of
        its own; nodes of a lab shall neither wait for each other nor for the machine, as real ones don't.
        """
        return environment(XTABLES_LOCKFILE=self.lock_file)


class Conversation:
    """An open connection to a pod's line port, which sends every line back."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        began = time.monotonic()
        self.answer = _answered(self._lines.readline(), began)

    def say(self, text: str = "hello") -> bool:
        """Whether a line comes back: the connection is alive end to end."""
        line = text.encode() + b"\n"
        try:
            self._connection.sendall(line)
            return self._lines.readline() == line
        except OSError:
            return False

    def close(self) -> None:
        self._lines.close()
        self._connection.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(kind: Kind, address: str, port: int, timeout: float) -> Answer:
    """One connection from the namespace of the calling thread."""
    ask = {"http": _http, "tcp": _tcp, "udp": _udp}[kind]
    began = time.monotonic()
    try:
        line = ask(address, port, timeout)
    except ConnectionRefusedError:
        return Answer(outcome="refused", began=began, seconds=time.monotonic() - began)
    except (TimeoutError, PermissionError):
        # EPERM: a packet of this very machine was dropped, which UDP says and TCP waits for.
        return Answer(outcome="silent", began=began, seconds=time.monotonic() - began)
    except OSError as error:
        return _failed(f"{type(error).__name__}: {error}", began)
    return _answered(line, began)


def _failed(error: str, began: float) -> Answer:
    return Answer(outcome="failed", began=began, seconds=time.monotonic() - began, error=error)


def _answered(line: bytes, began: float) -> Answer:
    try:
        said = msgspec.json.decode(line, type=_Said)
    except msgspec.DecodeError as error:
        return _failed(f"not a pod's answer: {line!r} ({error})", began)
    return Answer(
        outcome="answered",
        pod=said.pod,
        node=said.node,
        server=said.server,
        client=said.client,
        client_port=said.client_port,
        began=began,
        seconds=time.monotonic() - began,
    )


class _Said(msgspec.Struct):
    pod: str
    node: str
    server: str
    client: str
    client_port: int


def _http(address: str, port: int, timeout: float) -> bytes:
    import http.client

    connection = http.client.HTTPConnection(address, port, timeout)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _tcp(address: str, port: int, timeout: float) -> bytes:
    with (
        socket.create_connection((address, port), timeout) as connection,
        connection.makefile("rb") as lines,
    ):
        return lines.readline()


def _udp(address: str, port: int, timeout: float) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as connection:
        connection.settimeout(timeout)
        connection.connect((address, port))  # so that a refusal (ICMP) is reported
        connection.send(b"who are you?\n")
        return connection.recv(65535)
