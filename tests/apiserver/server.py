"""A real API server with its etcd, in a network namespace: RBAC on, no controllers, ended with the test process.

The programs are found in $KUBEBUILDER_ASSETS, in the folder that hack/build-kubernetes fills, or in $PATH. Where there
are none, tests skip; with CI=true they fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from tests.packets.topology import ROOT, Namespace

PATIENCE_SECONDS = 60.0
ADMIN_TOKEN = "admin"
SERVICE_CIDRS = "10.96.0.0/12,fd00:10:96::/108"
PORT = 6443
ETCD = "http://127.0.0.1:2379"


def program(name: str) -> str:
    """The path of one of the Kubernetes programs; skips the test where there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miniproxy"
    version = next(
        line.split()[2]
        for line in (ROOT / "tests/kubernetes/go.mod").read_text().splitlines()
        if line.startswith("require k8s.io/kubernetes ")
    )
    folders = [
        os.environ.get("KUBEBUILDER_ASSETS", ""),
        os.fspath(Path(os.environ.get("MINIPROXY_CACHE") or cache) / f"k8s-{version}" / "bin"),
        os.environ.get("PATH", ""),
    ]
    found = shutil.which(name, path=os.pathsep.join(filter(None, folders)))
    if found is None:
        how = f"no {name} here: run hack/build-kubernetes"
        if os.environ.get("CI") == "true":
            pytest.fail(how)
        pytest.skip(how)
    return found


class ApiServer:
    """A running etcd and, between `start` and `stop`, an API server at 127.0.0.1:6443 of its namespace."""

    def __init__(self, where: Namespace, folder: Path, log: IO[str]) -> None:
        self.folder = folder
        self._where = where
        self._log = log
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self.admin = self.kubeconfig("admin", ADMIN_TOKEN)

    def start(self, port: int = PORT) -> None:
        """Several may run at a time on one etcd."""
        flags = {
            "etcd-servers": ETCD,
            "bind-address": "127.0.0.1",
            "advertise-address": "192.0.2.1",  # must not be a loopback address; nobody uses it
            "secure-port": str(port),
            "cert-dir": os.fspath(self.folder / "certs"),
            "endpoint-reconciler-type": "none",  # the Service `kubernetes` has no endpoints in the golden objects
            "service-cluster-ip-range": SERVICE_CIDRS,
            "authorization-mode": "RBAC",
            "allow-privileged": "true",  # as in every cluster: network plugins and proxies need it
            "token-auth-file": os.fspath(self.folder / "tokens.csv"),
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": os.fspath(self.folder / "sa.key"),
            "service-account-signing-key-file": os.fspath(self.folder / "sa.key"),
        }
        argv = [program("kube-apiserver"), *(f"--{name}={value}" for name, value in flags.items())]
        self._processes[port] = self._spawn(argv)
        ready = ["get", "--raw=/readyz", "--request-timeout=1s"]
        self.eventually(lambda: self._kubectl(port, ready).returncode == 0, "the API server to be ready")
        self.eventually(
            lambda: self._kubectl(port, ["get", "namespace", "kube-system"]).returncode == 0, "its first objects"
        )

    def stop(self, port: int = PORT) -> None:
        """As a crash would."""
        process = self._processes.pop(port)
        process.kill()
        process.communicate()

    def stop_all(self) -> None:
        for port in list(self._processes):
            self.stop(port)

    def kubectl(self, *arguments: str, stdin: str = "", port: int = PORT) -> str:
        """kubectl as an administrator; returns its output, fails the test when it fails."""
        done = self._kubectl(port, list(arguments), stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def kubeconfig(self, name: str, token: str) -> Path:
        """A new file; its certificate authority is the one the API server makes for itself."""
        file = self.folder / f"{name}.kubeconfig"
        cluster = {
            "server": f"https://127.0.0.1:{PORT}",
            "certificate-authority": os.fspath(self.folder / "certs" / "apiserver.crt"),
        }
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        file.write_text(json.dumps(config))
        return file

    def eventually(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited {PATIENCE_SECONDS:.0f} s for {what}\n{self.tail()}"
            time.sleep(0.05)

    def tail(self, lines: int = 20) -> str:
        return "\n".join((self.folder / "log").read_text().splitlines()[-lines:])

    def _kubectl(self, port: int, arguments: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        argv = [program("kubectl"), f"--kubeconfig={self.admin}", f"--server=https://127.0.0.1:{port}", *arguments]
        return subprocess.run(self._where.command(argv), input=stdin, capture_output=True, text=True)

    def _spawn(self, argv: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(self._where.command(argv), stdout=self._log, stderr=self._log, text=True)


@contextmanager
def api_server(where: Namespace, folder: Path) -> Iterator[ApiServer]:
    """An API server with nothing in it but what it makes itself. `folder` must not be there yet."""
    etcd = program("etcd")
    folder.mkdir()
    (folder / "tokens.csv").write_text(f"{ADMIN_TOKEN},admin,admin,system:masters\n")
    subprocess.run(["openssl", "genrsa", "-out", folder / "sa.key", "2048"], check=True, capture_output=True)
    data = ["--data-dir", os.fspath(folder / "etcd"), "--unsafe-no-fsync"]
    urls = [
        "--listen-client-urls",
        ETCD,
        "--advertise-client-urls",
        ETCD,
        "--listen-peer-urls",
        "http://127.0.0.1:2380",
    ]
    with (folder / "log").open("w") as log, where.process(etcd, *data, *urls, log=log):
        server = ApiServer(where, folder, log)
        try:
            server.start()
            yield server
        finally:
            server.stop_all()
