"""The way to the API server: TLS, proxies and open HTTP responses.

It answers for the transport, and for reading anew who we are and where the server is whenever the server may have got
to know newer credentials (kubeconfig.py reads them). Bodies are the caller's.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

from .. import __version__
from . import kubeconfig
from .kubeconfig import Access

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

CONNECT_SECONDS = 10.0
BODY_LIMIT = 1 << 20  # of an answer that is read whole
_SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # Something on the way may forget a connection that says nothing for a minute. Timings as client-go's.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30),
]


class ApiError(Exception):
    """The API server cannot be reached, or the way to it is not known; the text says why."""


class _Way(NamedTuple):
    access: Access
    pool: PoolManager


class ApiServer:
    """A connection's worth of configuration, shared by threads. Nothing is read before the first request."""

    def __init__(self, kubeconfig: str = "", master: str = "") -> None:
        """`kubeconfig` "" is the pod's service account; `master` is a URL that overrides either's server."""
        self._kubeconfig = kubeconfig
        self._master = master
        self._lock = threading.Lock()
        self._way: _Way | None = None

    def __str__(self) -> str:
        return f"API server by {self._master or self._kubeconfig or 'service account'}"

    @contextmanager
    def get(self, path: str, query: Mapping[str, str], silence: float) -> Iterator[BaseHTTPResponse]:
        """An open response of any status, whose body comes by `read`; `silence` seconds without a byte end it.

        Each request has a connection of its own: an idle one may have been dropped on the way without a word.
        Raises ApiError, also out of the body of the `with`.
        """
        import urllib3

        response = self._send("GET", f"{path}?{urlencode(query)}", silence)
        try:
            yield response
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(_reason(error)) from error
        finally:
            response.close()

    def request(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        """Send a JSON value; status and whole body of the response. Raises ApiError."""
        import urllib3

        response = self._send(method, path, CONNECT_SECONDS, body, content_type)
        try:
            return response.status, response.read(BODY_LIMIT)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(_reason(error)) from error
        finally:
            response.close()

    def _send(
        self, method: str, target: str, silence: float, body: object = None, content_type: str = "application/json"
    ) -> BaseHTTPResponse:
        import urllib3

        way = None
        try:
            way = self._connected()
            response = way.pool.request(
                method,
                f"{way.access.server}{target}",
                headers=_headers(way.access, content_type),
                body=None if body is None else json.dumps(body),
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=silence),
                preload_content=False,
                retries=False,  # urllib3 would try again by itself, and sleep as long as a Retry-After says
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            self._forget(way)
            server = f"{way.access.server}: " if way else ""
            raise ApiError(f"{server}{_reason(error)}") from error
        if response.status == 401:
            self._forget(way)
        return response

    def _connected(self) -> _Way:
        """The way, as the files say now if it is not known."""
        with self._lock:
            if self._way is None:
                access = self._access()
                self._way = _Way(access, _pool(access))
            return self._way

    def _access(self) -> Access:
        """Raises OSError or ValueError."""
        master = self._master.rstrip("/")
        if master and not master.startswith(("https://", "http://")):
            raise ValueError(f"--master {master}: is no URL: write https://ADDRESS:PORT")
        if self._kubeconfig:
            access = kubeconfig.read(self._kubeconfig)
            return access._replace(server=master) if master else access
        return kubeconfig.anonymous(master) if master else kubeconfig.service_account()

    def _forget(self, way: _Way | None) -> None:
        """Read everything anew next time: certificates, tokens and addresses change while an agent runs."""
        with self._lock:
            if self._way is way:
                self._way = None


def read(response: BaseHTTPResponse) -> bytes:
    """What has come in of the body; b"" at its end."""
    return response.read1(1 << 16)


def _headers(access: Access, content_type: str) -> dict[str, str]:
    headers = {
        "Accept": "application/json",
        "Content-Type": content_type,
        "User-Agent": f"miniproxy/{__version__}",
    }
    if authorization := access.authorization():
        headers["Authorization"] = authorization
    return headers


def _pool(access: Access) -> PoolManager:
    """Raises OSError or ValueError."""
    import urllib3

    options: dict[str, Any] = {"maxsize": 8, "socket_options": _SOCKET_OPTIONS}
    if access.server.startswith("https:"):
        options["ssl_context"] = _tls(access)
        options["server_hostname"] = access.server_name or None
    if not access.proxy:
        return urllib3.PoolManager(**options)
    if access.proxy.startswith("socks"):
        from urllib3.contrib.socks import SOCKSProxyManager

        return SOCKSProxyManager(access.proxy, **options)
    return urllib3.ProxyManager(access.proxy, **options)


def _tls(access: Access) -> ssl.SSLContext:
    """Raises OSError (ssl.SSLError is one) or ValueError."""
    # Not ssl.create_default_context: from Python 3.13 on it refuses authorities without an AKI, as old clusters have.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an intermediate authority will do, as in Go
    if not access.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif access.authorities:
        context.load_verify_locations(cadata=access.authorities)
    else:
        context.load_default_certs()
    if access.certificate:
        with _file(access.certificate) as certificate, _file(access.key) as key:
            context.load_cert_chain(certificate, key if access.key else None)  # None: it is with the certificate
    return context


@contextmanager
def _file(content: str) -> Iterator[str]:
    """The name of a file of this content, in memory: ssl takes nothing but files, and keys do not belong on a disk."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The innermost reason, which is what says something: "Connection refused", "certificate has expired"."""
    reason = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(reason.split())[:300]
