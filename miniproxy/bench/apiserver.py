"""A real control plane of two programs, etcd and kube-apiserver, in the benchmark's control namespace."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from ..lab.netns import LabError
from .world import CONTROL, CONTROL_IP, SERVICE_CIDR, World

PORT = 6443
TOKEN = "bench"
_PATIENCE = 90.0
_ETCD = "http://127.0.0.1:2379"


class Programs(NamedTuple):
    """Where the Kubernetes programs are; `kube_proxy` None: not at hand."""

    etcd: Path
    kube_apiserver: Path
    kube_proxy: Path | None


def find(folders: list[Path]) -> Programs | None:
    """The programs, from the first of the folders, or else PATH, that has each; None without an API server."""

    def program(name: str) -> Path | None:
        places = [str(folder) for folder in folders]
        found = shutil.which(name, path=":".join(places)) or shutil.which(name)
        return Path(found) if found else None

    etcd, apiserver = program("etcd"), program("kube-apiserver")
    return Programs(etcd, apiserver, program("kube-proxy")) if etcd and apiserver else None


class ApiServer:
    """Started by `start`; it ends with its World."""

    def __init__(self, world: World, programs: Programs) -> None:
        self._world = world
        self._programs = programs
        self._folder = world.folder / "control"

    @property
    def kubeconfig(self) -> Path:
        return self._folder / "kubeconfig"

    def start(self) -> None:
        """Raises LabError when it does not come up."""
        self._folder.mkdir()
        key, tokens = self._folder / "sa.key", self._folder / "tokens.csv"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        tokens.write_text(f'{TOKEN},bench,1,"system:masters"\n')
        etcd: list[str | Path] = [
            self._programs.etcd,
            f"--data-dir={self._folder / 'etcd'}",
            "--log-level=error",
            "--unsafe-no-fsync",
        ]
        etcd += [f"--listen-client-urls={_ETCD}", f"--advertise-client-urls={_ETCD}"]
        etcd += ["--listen-peer-urls=http://127.0.0.1:2380"]
        self._world.start(CONTROL, etcd, "etcd.log")
        server: list[str | Path] = [
            self._programs.kube_apiserver,
            f"--etcd-servers={_ETCD}",
            f"--cert-dir={self._folder}",
        ]
        server += [f"--bind-address={CONTROL_IP}", f"--advertise-address={CONTROL_IP}", f"--secure-port={PORT}"]
        server += [f"--service-cluster-ip-range={SERVICE_CIDR}", f"--token-auth-file={tokens}"]
        server += ["--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}"]
        server += [f"--service-account-signing-key-file={key}", "--authorization-mode=AlwaysAllow"]
        # No traffic shaping and no profiling: the server is part of the stage, not of what is measured.
        server += ["--enable-priority-and-fairness=false", "--profiling=false"]
        process = self._world.start(CONTROL, server, "kube-apiserver.log")
        end = time.monotonic() + _PATIENCE
        while not self._ready():
            if process.poll() is not None or time.monotonic() > end:
                raise LabError(f"kube-apiserver does not start:\n{self._world.log('kube-apiserver.log')}")
            time.sleep(0.1)
        self._write_kubeconfig()

    def connect(self) -> http.client.HTTPSConnection:
        """A connection that is open."""
        context = ssl.create_default_context(cafile=self._folder / "apiserver.crt")
        plain = self._world.inside(CONTROL, lambda: socket.create_connection((CONTROL_IP, PORT), timeout=60))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = http.client.HTTPSConnection(CONTROL_IP, PORT)
        connection.sock = context.wrap_socket(plain, server_hostname=CONTROL_IP)
        return connection

    def _ready(self) -> bool:
        try:
            connection = self.connect()
        except OSError:
            return False
        try:
            connection.request("GET", "/readyz", headers={"Authorization": f"Bearer {TOKEN}"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _write_kubeconfig(self) -> None:
        self.kubeconfig.write_text(
            f"""apiVersion: v1
kind: Config
clusters:
- name: bench
  cluster: {{server: "https://{CONTROL_IP}:{PORT}", certificate-authority: {self._folder}/apiserver.crt}}
users:
- name: bench
  user: {{token: {TOKEN}}}
contexts:
- name: bench
  context: {{cluster: bench, user: bench}}
current-context: bench
"""
        )
