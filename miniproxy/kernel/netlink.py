"""Netlink in bulk: many requests in one system call, each with its own result.

pyroute2 builds and answers one request at a time; for thousands of objects that is most of the time. Here a window of
requests goes out in one send, and only the last asks for an acknowledgement: the kernel works on them in order
before the send returns, and answers every one that fails by its sequence number, so silence means success.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

ROUTE, NETFILTER, GENERIC = 0, 12, 16  # netlink protocols
CREATE, EXCLUSIVE = 0x400, 0x200  # flags of requests that make something
NESTED, NET_ORDER = 0x8000, 0x4000  # flags of an attribute's type: it holds attributes; its number is big-endian
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_SNDBUFFORCE = 32
_OFFSET = 2  # attribute of an error
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_WINDOW = 100  # what fails answers with less than 1 kB each, and the socket's buffer holds 200 kB
_BUFFER = 1 << 16
NO_SUBSYSTEM = {errno.EINVAL, errno.EPROTONOSUPPORT}  # a part of netfilter that the kernel does not have
TRANSIENT = {errno.EPERM, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT}


class Request(NamedTuple):
    """One message; `payload` is what follows the netlink header."""

    kind: int
    payload: bytes
    flags: int = 0


class Refused(NamedTuple):
    """Why a transaction was refused."""

    request: int  # index of the one to blame
    code: int  # errno
    offset: int  # of what is wrong, in the message; 0: not said
    length: int  # of the message


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute, padded to 4 bytes."""
    length = 4 + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes that fill `data`, by type."""
    return dict(walk(data))


def walk(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes that fill `data`: (type, value) in order."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


class Netlink:
    """A netlink socket; use it in `with`. It belongs to the network namespace in which it was opened."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sequence = 0

    @classmethod
    def open(cls, protocol: int) -> Self:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)  # errors without the request they are about,
        sock.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)  # and with where in it they are
        sock.settimeout(30)
        return cls(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(self, requests: Sequence[Request]) -> list[int]:
        """Make all requests, whatever becomes of each; their errno in order, 0 for success. Raises OSError."""
        results: list[int] = []
        for start in range(0, len(requests), _WINDOW):
            results += self._window(requests[start : start + _WINDOW])
        return results

    def get(self, request: Request) -> list[bytes]:
        """The payloads that answer a request for one thing. Raises OSError."""
        return self._answers(request, _REQUEST | _ACK)

    def dump(self, request: Request) -> list[bytes]:
        """The payloads that answer a request for a list. Raises OSError."""
        return self._answers(request, _REQUEST | _DUMP)

    def _answers(self, request: Request, flags: int) -> list[bytes]:
        self._sequence += 1
        self._socket.send(self._pack(request, flags))
        found: list[bytes] = []
        while True:
            for kind, sequence, payload in messages(self._socket.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue
                if kind in (_ERROR, _DONE):
                    (code,) = struct.unpack_from("=i", payload) if len(payload) >= 4 else (0,)
                    if code:
                        raise OSError(-code, explain(-code))
                    return found
                found.append(payload)

    def transact(self, begin: Request, requests: Sequence[Request], end: Request) -> Refused | None:
        """Make all requests, or none: the first that is refused. Raises OSError.

        The kernel answers when it is through with all of them, errors first; the last asks for an acknowledgement.
        """
        first = self._sequence + 1
        parts = []
        for request in (begin, *requests, end):
            self._sequence += 1
            parts.append(self._pack(request, _REQUEST | request.flags | (_ACK if request is requests[-1] else 0)))
        self._send_large(b"".join(parts))
        refused = None
        while True:
            for kind, sequence, payload in messages(self._socket.recv(_BUFFER)):
                if kind != _ERROR or sequence < first:
                    continue
                code, offset = -struct.unpack_from("=i", payload)[0], _offset(payload)
                if code and refused is None:
                    blamed = max(0, sequence - first - 1)  # the commit's own error is the beginning's
                    refused = Refused(blamed, code, offset, len(parts[blamed + 1]))
                if sequence in (first, self._sequence - 1):
                    return refused

    def _send_large(self, data: bytes) -> None:
        """One send is one message to the kernel, however large, and has to fit the socket's buffer."""
        if len(data) * 2 > self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, _SNDBUFFORCE, len(data) * 2)
        self._socket.send(data)

    def _window(self, requests: Sequence[Request]) -> list[int]:
        first = self._sequence + 1
        parts = []
        for left, request in zip(range(len(requests), 0, -1), requests, strict=True):
            self._sequence += 1
            parts.append(self._pack(request, _REQUEST | request.flags | (_ACK if left == 1 else 0)))
        self._socket.send(b"".join(parts))
        results = [0] * len(requests)
        while True:
            for kind, sequence, payload in messages(self._socket.recv(_BUFFER)):
                if kind == _ERROR and sequence >= first:
                    results[sequence - first] = -struct.unpack_from("=i", payload)[0]
                    if sequence == self._sequence:
                        return results

    def _pack(self, request: Request, flags: int) -> bytes:
        payload = request.payload
        padding = b"\0" * (-len(payload) % 4)
        return _HEADER.pack(16 + len(payload), request.kind, flags, self._sequence, 0) + payload + padding


def _offset(error: bytes) -> int:
    """Where in the request the error is, from 0 at its header; behind the errno comes the request's own header."""
    return int.from_bytes(attributes(error[20:]).get(_OFFSET, b""), sys.byteorder)


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, sequence number, payload) of each message in what a socket received."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < 16:
            return
        yield kind, sequence, data[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def explain(number: int) -> str:
    """An errno in words."""
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
