"""The way to the API server over real TLS: whom we believe, who we say we are, and through which proxy."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from miniproxy.sources.apiserver import ApiError, ApiServer


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's certificate for kubernetes.default and 127.0.0.1, and one of a client named node1."""
    folder = tmp_path_factory.mktemp("pki")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(folder, "req", "-x509", *new_key, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt")
    for name, extension in (("server", "DNS:kubernetes.default,IP:127.0.0.1"), ("node1", "DNS:node1")):
        openssl(folder, "req", *new_key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / "extensions").write_text(f"subjectAltName={extension}\n")
        sign = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions"]
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.crt")
    return folder


class _WhoAmI(BaseHTTPRequestHandler):
    """Answers with what the server knows of its client."""

    def do_GET(self) -> None:
        assert isinstance(self.connection, ssl.SSLSocket)
        certificate: Any = self.connection.getpeercert() or {}
        subject = dict(pair for part in certificate.get("subject", ()) for pair in part)
        body = json.dumps([subject.get("commonName"), self.headers.get("Authorization")]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port(pki: Path) -> Iterator[int]:
    """Where a server speaks TLS that asks for a certificate and does without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server.crt", pki / "server.key")
    context.load_verify_locations(pki / "ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    with ThreadingHTTPServer(("127.0.0.1", 0), _WhoAmI) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a handshake that fails is the client's to tell
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def whoami(folder: Path, cluster: Any, user: Any = None) -> Any:
    config = {
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "config").write_text(json.dumps(config))
    status, body = ApiServer(str(folder / "config")).request("GET", "/whoami")
    assert status == 200
    return json.loads(body)


def data(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def test_a_client_certificate(pki: Path, port: int, tmp_path: Path) -> None:
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(pki / "ca.crt")}
    files = {"client-certificate": str(pki / "node1.crt"), "client-key": str(pki / "node1.key")}
    inline = {"client-certificate-data": data(pki / "node1.crt"), "client-key-data": data(pki / "node1.key")}
    (tmp_path / "both.pem").write_text((pki / "node1.crt").read_text() + (pki / "node1.key").read_text())
    assert whoami(tmp_path, cluster) == [None, None]
    assert whoami(tmp_path, cluster, {"client-certificate": "both.pem"}) == ["node1", None]
    assert whoami(tmp_path, cluster, files) == ["node1", None]
    assert whoami(tmp_path, cluster, {**inline, "token": "t"}) == ["node1", "Bearer t"]


def test_a_server_is_believed_only_by_its_certificate(pki: Path, port: int, tmp_path: Path) -> None:
    here, named = f"https://127.0.0.1:{port}", f"https://localhost:{port}"
    authority = {"certificate-authority-data": data(pki / "ca.crt")}
    for cluster, reason in (
        ({"server": here}, "certificate verify failed"),
        ({"server": named, **authority}, "certificate is not valid for 'localhost'"),
        ({"server": here, **authority, "tls-server-name": "other"}, "certificate is not valid for 'other'"),
    ):
        with pytest.raises(ApiError, match=reason):
            whoami(tmp_path, cluster)
    whoami(tmp_path, {"server": named, **authority, "tls-server-name": "kubernetes.default"})
    whoami(tmp_path, {"server": named, "insecure-skip-tls-verify": True})


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    cluster = {"server": "https://127.0.0.1:1", "certificate-authority": "ca.crt"}
    with pytest.raises(ApiError, match=r"ca\.crt: No such file"):
        whoami(tmp_path, cluster)


@pytest.mark.parametrize("by", ["proxy-url", "HTTPS_PROXY"])
def test_through_a_proxy(
    pki: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: tuple[int, list[str]], by: str
) -> None:
    proxy_port, asked = proxy
    url = f"http://127.0.0.1:{proxy_port}"
    # A name that only the proxy would ask for: nothing is resolved here.
    cluster = {"server": f"https://kubernetes.default:{port}", "certificate-authority": str(pki / "ca.crt")}
    if by == "proxy-url":
        cluster["proxy-url"] = url
    else:
        monkeypatch.setenv(by, url)
    assert whoami(tmp_path, cluster, {"token": "t"}) == [None, "Bearer t"]
    assert [line.split()[:2] for line in asked] == [["CONNECT", f"kubernetes.default:{port}"]]


@pytest.fixture
def proxy(port: int) -> Iterator[tuple[int, list[str]]]:
    """An HTTP proxy that connects everybody to `port`, and what it is asked."""
    asked: list[str] = []

    def forward(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                asked.append(client.recv(1 << 16).decode().splitlines()[0])
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                server = socket.create_connection(("127.0.0.1", port))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=forward, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], asked
        listener.shutdown(socket.SHUT_RDWR)
