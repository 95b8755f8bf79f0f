"""What a kubeconfig says: read here as the kubernetes client reads it, and by the client where it is intricate."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miniproxy.sources import kubeconfig
from miniproxy.sources.kubeconfig import by_client, plain, read, service_account

SERVER = "https://api.example.com:6443"
PEM = {name: f"-----BEGIN {name}-----\nAAAA\n-----END {name}-----\n" for name in ("CA", "CERTIFICATE", "KEY")}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in PEM.items():
        (tmp_path / f"{name}.pem").write_text(text)
    (tmp_path / "token").write_text("from-a-file")
    return tmp_path


def write(folder: Path, cluster: Any = None, user: Any = None, **more: Any) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "other", "cluster": {}}, {"name": "c", "cluster": cluster or {"server": SERVER}}],
        "users": [{"name": "other", "user": {"exec": {}}}, {"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "default"}}],
        "current-context": "x",
        **more,
    }
    file = folder / "config"
    file.write_text(json.dumps(config))
    return file


def data(name: str) -> str:
    return base64.b64encode(PEM[name].encode()).decode()


def said(access: Any) -> Any:
    return access._replace(authorization=access.authorization())


# --- the plain kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user",
    [
        {},
        {"token": "in-the-file"},
        {"tokenFile": "token"},
        {"client-certificate": "CERTIFICATE.pem", "client-key": "KEY.pem"},
        {"client-certificate-data": data("CERTIFICATE"), "client-key-data": data("KEY")},
        {"client-certificate": "missing", "client-certificate-data": data("CERTIFICATE"), "client-key": "KEY.pem"},
    ],
    ids=["nobody", "token", "token file", "certificate", "certificate data", "data before file"],
)
@pytest.mark.parametrize(
    "cluster",
    [
        {},
        {"server": f"{SERVER}/prefix/"},
        {"server": "http://127.0.0.1:8080"},
        {"certificate-authority": "CA.pem"},
        {"certificate-authority-data": data("CA")},
        {"insecure-skip-tls-verify": True},
        {"tls-server-name": "kubernetes.default"},
        {"proxy-url": "http://proxy:3128"},
        {"disable-compression": True},
    ],
    ids=lambda cluster: next(iter(cluster), "bare"),
)
def test_the_same_as_the_client(folder: Path, cluster: Any, user: Any) -> None:
    file = write(folder, {"server": SERVER, **cluster}, user)
    found = plain(file)
    assert found is not None
    assert said(found) == said(by_client(file))


@pytest.mark.parametrize(
    "server", [SERVER, "http://api.example.com", "https://10.1.2.3:6443", "https://[fd00::5]:6443"]
)
@pytest.mark.parametrize(
    "environment",
    [
        {"HTTPS_PROXY": "http://upper"},
        {"https_proxy": "http://lower", "HTTPS_PROXY": "http://upper"},
        {"all_proxy": "http://all"},
        {"http_proxy": "http://plain"},
        *(
            {"https_proxy": "http://proxy", "NO_PROXY": no_proxy}
            for no_proxy in (
                "*",
                "example.com",
                ".example.com, other",
                "API.example.com",
                "ample.com",
                "api.example.com:6443",
                "10.0.0.0/8",
                "10.1.2.3",
                "10.1.2.0/25,fd00::/8",
                "fd00::5",
                "not/a/range",
            )
        ),
    ],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items()),
)
def test_proxies_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], server: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = write(folder, {"server": server})
    found = plain(file)
    assert found is not None
    assert said(found) == said(by_client(file))


def test_no_proxy_would_reach_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy")
    for host in ("127.0.0.1", "[::1]", "localhost"):
        assert read(str(write(folder, {"server": f"https://{host}:6443"}))).proxy == ""


def test_a_token_file_is_read_for_each_request_and_counts_before_a_token(folder: Path) -> None:
    access = read(str(write(folder, user={"token": "old", "tokenFile": "token"})))
    assert access.authorization() == "Bearer from-a-file"
    (folder / "token").write_text("renewed\n")
    assert access.authorization() == "Bearer renewed"


def test_what_is_plain_does_without_the_client(folder: Path) -> None:
    file = write(folder, {"server": SERVER, "certificate-authority": "CA.pem"}, {"tokenFile": "token"})
    code = f"from miniproxy.sources import kubeconfig as k, apiserver, kube; k.read({str(file)!r})"
    listed = (
        f"import sys; {code}; print([m for m in sys.modules if m.startswith(('kubernetes', 'requests', 'aiohttp'))])"
    )
    assert subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True).stdout == "[]\n"


# --- the other kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user",
    [
        {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "x"}},
        {"auth-provider": {"name": "oidc"}},
        {"username": "u", "password": "p"},
        {"token": None},
        {"as": "somebody"},
    ],
    ids=lambda user: next(iter(user)),
)
def test_left_to_the_client(folder: Path, user: Any) -> None:
    assert plain(write(folder, user=user)) is None


def test_a_password_by_the_client(folder: Path) -> None:
    basic = base64.b64encode(b"u:p").decode()
    assert read(str(write(folder, user={"username": "u", "password": "p"}))).authorization() == f"Basic {basic}"


@pytest.mark.parametrize(
    "more",
    [
        {"current-context": "y"},
        {"clusters": []},
        {"clusters": [{"name": "c", "cluster": {"server": 3}}]},
        {"contexts": None},
    ],
    ids=str,
)
def test_what_is_wrong_is_said_by_the_client(folder: Path, more: Any) -> None:
    file = write(folder, **more)
    assert plain(file) is None
    with pytest.raises(ValueError, match="cannot be read"):
        read(str(file))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        read(str(tmp_path / "nowhere"))


# --- a pod --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "server"), [("10.96.0.1", "https://10.96.0.1:443"), ("fd00::1", "https://[fd00::1]:443")]
)
def test_a_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, server: str) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    (tmp_path / "token").write_text("first")
    (tmp_path / "ca.crt").write_text(PEM["CA"])
    access = service_account(tmp_path)
    assert (access.server, access.authorities, access.verify) == (server, PEM["CA"], True)
    assert access.authorization() == "Bearer first"
    (tmp_path / "token").write_text("second")
    assert access.authorization() == "Bearer second"


def test_no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ValueError, match="no pod"):
        service_account(kubeconfig.SERVICE_ACCOUNT)
