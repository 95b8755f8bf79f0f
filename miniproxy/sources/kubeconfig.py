"""Which API server to talk to, and how to be let in: what a kubeconfig or a pod's service account says.

Most nodes' kubeconfigs hold no more than addresses, files and tokens. Those are read here; whatever else one holds
(exec plugins, auth providers, passwords, something that is new or wrong) is left to the `kubernetes` client, whose
import costs more time and memory than 5,000 Services. Tests compare what the two make of the same file.
"""

from __future__ import annotations

import base64
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct, field

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Access(NamedTuple):
    """An API server, and how to be let in. Certificates and keys are PEM."""

    server: str  # URL
    authorization: Callable[[], str]  # the header, or ""; asked for each request, since tokens are renewed
    authorities: str = ""  # who may vouch for the server; "": whom this machine trusts
    certificate: str = ""
    key: str = ""
    verify: bool = True
    server_name: str = ""  # in the server's certificate, if that is not its host
    proxy: str = ""  # URL


# --- what a kubeconfig looks like ---------------------------------------------------------------------------
# Null, or a field that is not here, is for the client to look at.


class _Cluster(Struct, rename="kebab", forbid_unknown_fields=True):
    server: str
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    disable_compression: bool = False  # none is asked for


class _User(Struct, rename="kebab", forbid_unknown_fields=True):
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    token: str = ""
    token_file: str = field(default="", name="tokenFile")


class _Context(Struct):
    cluster: str
    user: str = ""


class _Entry(Struct):
    name: str
    cluster: dict[str, Any] = {}
    user: dict[str, Any] = {}
    context: _Context | None = None


class _Config(Struct, rename="kebab"):
    current_context: str
    clusters: list[_Entry]
    contexts: list[_Entry]
    users: list[_Entry] = []


# --- entry points -------------------------------------------------------------------------------------------


def read(kubeconfig: str) -> Access:
    """Raises OSError or ValueError when the file cannot be used."""
    file = Path(kubeconfig).expanduser()
    return plain(file) or by_client(file)


def plain(file: Path) -> Access | None:
    """What a kubeconfig says; None if there is more to it than is known here. Raises OSError."""
    import yaml

    text = file.read_text()
    try:
        config = msgspec.convert(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), _Config)
        context = next(entry.context for entry in config.contexts if entry.name == config.current_context)
        cluster = next(entry.cluster for entry in config.clusters if context and entry.name == context.cluster)
        user = next((entry.user for entry in config.users if context and entry.name == context.user), {})
        return _access(msgspec.convert(cluster, _Cluster), msgspec.convert(user, _User), file.parent)
    except (yaml.YAMLError, ValueError, StopIteration, RecursionError):
        return None


def by_client(file: Path) -> Access:
    """The same by the kubernetes client, which runs plugins and renews tokens. Raises OSError or ValueError."""
    import yaml
    from kubernetes import config
    from kubernetes.client.configuration import Configuration
    from kubernetes.client.rest import should_bypass_proxies

    settings = Configuration()
    try:
        config.load_kube_config(os.fspath(file), client_configuration=settings, persist_config=False)
    except (config.ConfigException, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"kubeconfig {file} cannot be read: {error}") from error
    direct = not settings.proxy or should_bypass_proxies(settings.host, settings.no_proxy or "")
    return Access(
        settings.host,
        lambda: str(settings.auth_settings().get("BearerToken", {}).get("value") or ""),
        _content(settings.ssl_ca_cert),
        _content(settings.cert_file),
        _content(settings.key_file),
        settings.verify_ssl,
        settings.tls_server_name or "",
        "" if direct else settings.proxy,
    )


def service_account(folder: Path = SERVICE_ACCOUNT) -> Access:
    """What a pod is given. Raises OSError or ValueError."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise ValueError("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set, so this is no pod")
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    authorities = (folder / "ca.crt").read_text()
    return Access(server, lambda: _bearer((folder / "token").read_text()), authorities, proxy=_proxy(server))


def anonymous(server: str) -> Access:
    """A server that lets everybody in."""
    return Access(server, lambda: "", proxy=_proxy(server))


# --- the parts ----------------------------------------------------------------------------------------------


def _access(cluster: _Cluster, user: _User, folder: Path) -> Access | None:
    """Raises OSError, and ValueError for data that is not base64."""

    def pem(data: str, file: str) -> str:
        return base64.b64decode(data).decode() if data else _content(folder / file if file else None)

    def authorization() -> str:
        # Of both, the file counts: it is the one that somebody renews (k8s.io/client-go, AuthInfo.TokenFile).
        return _bearer((folder / user.token_file).read_text() if user.token_file else user.token)

    server = cluster.server.rstrip("/")
    proxy = cluster.proxy_url or _proxy(server)
    if urlsplit(server).scheme != "https":
        return Access(server, authorization, verify=not cluster.insecure_skip_tls_verify, proxy=proxy)
    return Access(
        server,
        authorization,
        pem(cluster.certificate_authority_data, cluster.certificate_authority),
        pem(user.client_certificate_data, user.client_certificate),
        pem(user.client_key_data, user.client_key),
        not cluster.insecure_skip_tls_verify,
        cluster.tls_server_name,
        proxy,
    )


def _content(file: str | Path | None) -> str:
    return Path(file).read_text() if file else ""


def _bearer(token: str) -> str:
    return f"Bearer {token.strip()}" if token.strip() else ""


def _proxy(server: str) -> str:
    """The proxy that the environment names for a server, "" if none."""
    scheme = urlsplit(server).scheme
    return "" if _direct(server) else _variable(f"{scheme}_proxy") or _variable("all_proxy")


def _variable(name: str) -> str:
    return os.environ.get(name) or os.environ.get(name.upper()) or ""


def _direct(server: str) -> bool:
    """Whether NO_PROXY names a server: by its host, a domain it is in, its address, or a range of addresses."""
    url = urlsplit(server)
    host = url.hostname or ""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        ip = None
    if host == "localhost" or (ip and ip.is_loopback):  # never by a proxy, as in Go: it would ask itself
        return True
    for entry in (entry.strip().lower() for entry in _variable("no_proxy").split(",")):
        name = entry.lstrip(".")
        if entry == "*" or (name and any(f".{at}".endswith(f".{name}") for at in (host, url.netloc.lower()))):
            return True
        if ip and _within(ip, entry):
            return True
    return False


def _within(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, cidr: str) -> bool:
    try:
        return ip in ipaddress.ip_network(cidr, strict=False)
    except ValueError:
        return False
