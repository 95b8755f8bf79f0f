#!/usr/bin/env python3
"""images.py PROGRAMS OUT: every image that the e2e tests of Services run, as one OCI archive, without a registry.

All images share one layer: this machine's own busybox, shell and network tools with the libraries they need, and
agnhost, the tests' server. Which names they go by, `e2e.test --list-images` says.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TOOLS = ("bash", "curl", "wget", "nc.openbsd", "ip", "ss", "conntrack", "dig", "nslookup", "host", "socat")
# The tests call netcat as OpenBSD's understands it, and GNU wget; busybox stands in for all that is not named here.
RENAMED = {"nc.openbsd": "nc"}


class Process(NamedTuple):
    """What a container of an image runs."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


PAUSE = "localhost/pause:1"  # holds a pod's namespaces; node.sh tells containerd
IMAGES = {  # the last part of a name → what it runs
    "agnhost": Process(("/agnhost",), ("pause",)),
    "busybox": Process((), ("sh",)),
    "nginx": Process(("/agnhost",), ("test-webserver",)),
    "regression-issue-74839": Process(("/regression-issue-74839",)),
    "distroless-iptables": Process((), ("/bin/bash",)),
}
SMALL_FILES = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "/etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "/etc/wgetrc": "tries = 1\n",  # GNU wget tries 20 times, busybox's once, and tests wait for its answer
}


class Archive:
    """A tar file being filled; what is there already is not added again."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w")
        self._names: set[str] = set()

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        entry = tarfile.TarInfo(path.lstrip("/"))
        entry.size, entry.mode = len(data), mode
        self._add(entry, io.BytesIO(data))

    def link(self, path: str, target: str) -> None:
        entry = tarfile.TarInfo(path.lstrip("/"))
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        self._add(entry)

    def folder(self, path: str, mode: int = 0o755) -> None:
        entry = tarfile.TarInfo(path.strip("/"))
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self._add(entry)

    def close(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()

    def _add(self, entry: tarfile.TarInfo, data: io.BytesIO | None = None) -> None:
        if entry.name in self._names:
            return
        parent = entry.name.rpartition("/")[0]
        if parent:
            self.folder(parent)
        self._names.add(entry.name)
        self._tar.addfile(entry, data)


def layer(programs: Path) -> bytes:
    archive = Archive()
    for path in ("/tmp", "/uploads"):
        archive.folder(path, 0o1777)
    for path in ("/proc", "/sys", "/dev", "/run", "/root"):
        archive.folder(path)
    for tool in ("busybox", *TOOLS):
        found = shutil.which(tool)
        if found is None:
            raise SystemExit(f"images.py: the command {tool} is missing on this machine")
        folder = "/bin" if tool == "busybox" else "/usr/bin"
        program = Path(found).resolve()
        archive.file(f"{folder}/{RENAMED.get(tool, tool)}", program.read_bytes(), 0o755)
        for library in libraries(program):
            archive.file(library, Path(library).read_bytes(), 0o755)
    # The shell is bash: Debian's busybox shell prefers its own nc to the one in /usr/bin.
    for shell in ("/bin/bash", "/bin/sh"):
        archive.link(shell, "/usr/bin/bash")
    installed = {RENAMED.get(tool, tool) for tool in TOOLS}
    for applet in output("busybox", "--list").split():
        if applet not in installed:
            archive.link(f"/bin/{applet}", "/bin/busybox")
    for name in ("agnhost", "regression-issue-74839"):
        archive.file(f"/{name}", (programs / name).read_bytes(), 0o755)
    for path, text in SMALL_FILES.items():
        archive.file(path, text.encode())
    for path in ("/etc/services", "/etc/protocols"):
        if Path(path).exists():
            archive.file(path, Path(path).read_bytes())
    return archive.close()


def libraries(program: Path) -> list[str]:
    """The shared libraries of a program, by the paths its loader looks at."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)  # fails for a static one
    return re.findall(r"(/\S+) \(0x", done.stdout)


def wanted(programs: Path) -> Iterator[tuple[str, Process]]:
    """(name, what it runs) of every image the cluster needs."""
    yield PAUSE, Process(("/bin/busybox", "sleep", "2147483647"))
    for name in output(str(programs / "e2e.test"), "--list-images").split():
        process = IMAGES.get(name.rpartition("/")[2].partition(":")[0])
        if process is not None and "authenticated" not in name:
            yield name, process


def image_archive(content: bytes, images: Iterator[tuple[str, Process]]) -> bytes:
    """An OCI image layout: https://github.com/opencontainers/image-spec/blob/main/image-layout.md"""
    archive = Archive()

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        archive.file(f"blobs/sha256/{digest}", data)
        return {
            "mediaType": f"application/vnd.oci.image.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    only_layer = blob("layer.v1.tar", content)
    manifests = []
    for name, process in images:
        config = {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[output("uname", "-m").strip()],
            "os": "linux",
            "config": {"Env": ["PATH=/usr/bin:/bin"], "Entrypoint": process.entrypoint, "Cmd": process.command},
            "rootfs": {"type": "layers", "diff_ids": [only_layer["digest"]]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("config.v1+json", json.dumps(config).encode()),
            "layers": [only_layer],
        }
        entry = blob("manifest.v1+json", json.dumps(manifest).encode())
        manifests.append(entry | {"annotations": {"io.containerd.image.name": name}})
    archive.file("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    archive.file("index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())
    return archive.close()


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(programs: str, out: str) -> None:
    folder = Path(programs)
    unfinished = Path(f"{out}.new")
    unfinished.write_bytes(image_archive(layer(folder), wanted(folder)))
    unfinished.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
