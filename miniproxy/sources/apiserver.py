"""The way to the API server: the `kubernetes` client's configuration and transport, and nothing else of it.

It answers for kubeconfig, service account, exec plugins, TLS and proxies, and for reading all of these again when the
server may have got to know newer credentials; it hands on open HTTP responses. Bodies are the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from .. import __version__

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

CONNECT_SECONDS = 10.0
BODY_LIMIT = 1 << 20  # of an answer that is read whole


class ApiError(Exception):
    """The API server cannot be reached, or the way to it is not known; the text says why."""


class ApiServer:
    """A connection's worth of configuration, shared by threads. Nothing is read before the first request."""

    def __init__(self, kubeconfig: str = "", master: str = "") -> None:
        """`kubeconfig` "" is the pod's service account; `master` is a URL that overrides either's server."""
        self._kubeconfig = kubeconfig
        self._master = master
        self._lock = threading.Lock()
        self._client: Any = None

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
        from kubernetes.client.exceptions import ApiException
        from kubernetes.config import ConfigException

        client = None
        try:
            client = self._connected()
            headers = {**_headers(client.configuration), "Content-Type": content_type}
            response: BaseHTTPResponse = client.request(
                method,
                f"{client.configuration.host}{target}",
                headers=headers,
                body=body,
                _request_timeout=(CONNECT_SECONDS, silence),
            ).response
        except (urllib3.exceptions.HTTPError, ApiException, ConfigException, OSError, ValueError) as error:
            self._forget(client)
            raise ApiError(_reason(error)) from error
        if response.status == 401:
            self._forget(client)
        return response

    def _connected(self) -> Any:
        """The transport, made of what the files say now if there is none."""
        with self._lock:
            if self._client is None:
                self._client = _transport(self._kubeconfig, self._master)
            return self._client

    def _forget(self, client: Any) -> None:
        """Read everything anew next time: certificates, tokens and addresses change while an agent runs."""
        with self._lock:
            if self._client is client:
                self._client = None


def read(response: BaseHTTPResponse) -> bytes:
    """What has come in of the body; b"" at its end."""
    return response.read1(1 << 16)


def _transport(kubeconfig: str, master: str) -> Any:
    """Raises ConfigException, OSError or ValueError (YAML) when the configuration cannot be used."""
    import yaml
    from kubernetes import config
    from kubernetes.client.configuration import Configuration
    from kubernetes.client.rest import RESTClientObject

    settings = Configuration()
    try:
        if kubeconfig:
            config.load_kube_config(kubeconfig, client_configuration=settings, persist_config=False)
        elif not master:
            config.load_incluster_config(client_configuration=settings)
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(f"kubeconfig {kubeconfig} cannot be read: {error}") from error
    if master:
        settings.host = master.rstrip("/")
    settings.retries = False  # or urllib3 tries again by itself, and sleeps as long as a Retry-After says
    settings.keep_alive = True
    return RESTClientObject(settings)


def _headers(settings: Any) -> dict[str, str]:
    headers = {"Accept": "application/json", "User-Agent": f"miniproxy/{__version__}"}
    for auth in settings.auth_settings().values():  # also renews a token that has expired
        headers[auth["key"]] = auth["value"]
    return headers


def _reason(error: BaseException) -> str:
    """The innermost reason, which is what says something: "Connection refused", "certificate has expired"."""
    reason = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(reason.split())[:300]
