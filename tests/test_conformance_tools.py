"""The table of conformance results, and the archive of images for a cluster without a registry."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.packets.topology import ROOT

TOOLS = ROOT / "hack/kubernetes"
JUNIT = """<testsuites><testsuite><testcase name="[ReportBeforeSuite]" time="1"/>
<testcase name="[It] [sig-network] Services should serve [sig-network, Conformance]" time="2.5"/>
<testcase name="[It] [sig-network] Services should not be selected" time="0"><skipped message="skipped"/></testcase>
<testcase name="[It] [sig-network] Services need SSH" time="0.1"><skipped message="skipped - no SSH"/></testcase>
%s</testsuite></testsuites>"""
FAILED = '<testcase name="[It] [sig-network] KubeProxy fails" time="9"><failure message="no\n  entry"/></testcase>'


def table(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(TOOLS / "table.py"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def run(folder: Path, more: str = "") -> Path:
    (folder / "parallel").mkdir(parents=True)
    (folder / "parallel/junit_01.xml").write_text(JUNIT % more)
    return folder


def test_table_of_one_run(tmp_path: Path) -> None:
    done = table(str(run(tmp_path / "good")))
    assert done.stdout.splitlines() == [
        "skip    0.1  Services need SSH   -- skipped - no SSH",
        "pass    2.5  Services should serve",
        "total: 1 passed, 0 failed, 1 skipped",
    ]
    assert done.returncode == 0


def test_a_failure_is_shown_and_is_the_exit_code(tmp_path: Path) -> None:
    done = table(str(run(tmp_path / "bad", FAILED)))
    assert "FAIL    9.0  KubeProxy fails   -- no entry" in done.stdout
    assert done.returncode == 1


def test_no_test_at_all_is_a_failure(tmp_path: Path) -> None:
    assert table(str(tmp_path)).returncode == 1


def test_runs_side_by_side(tmp_path: Path) -> None:
    done = table(f"A={run(tmp_path / 'a')}", f"B={run(tmp_path / 'b', FAILED)}")
    assert done.stdout.splitlines() == [
        "| test | A | B |",
        "| --- | --- | --- |",
        "| KubeProxy fails |  | FAIL |",
        "| Services need SSH | skip | skip |",
        "| Services should serve | pass | pass |",
        "| **all** | **1 passed, 0 failed, 1 skipped** | **1 passed, 1 failed, 1 skipped** |",
    ]


def test_images_are_an_oci_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import images  # type: ignore[import-not-found, unused-ignore]

    pairs = [("localhost/a:1", images.Process(("/a",))), ("localhost/b:1", images.Process())]
    with tarfile.open(fileobj=io.BytesIO(images.image_archive(b"layer", iter(pairs)))) as archive:

        def read(name: str) -> bytes:
            file = archive.extractfile(name)
            assert file is not None
            return file.read()

        def blob(descriptor: dict[str, str]) -> bytes:
            return read("blobs/" + descriptor["digest"].replace(":", "/"))

        manifests = json.loads(read("index.json"))["manifests"]
        names = [manifest["annotations"]["io.containerd.image.name"] for manifest in manifests]
        assert names == ["localhost/a:1", "localhost/b:1"]
        for descriptor in manifests:
            manifest = json.loads(blob(descriptor))
            assert [blob(layer) for layer in manifest["layers"]] == [b"layer"]
        assert json.loads(blob(json.loads(blob(manifests[0]))["config"]))["config"]["Entrypoint"] == ["/a"]
        assert len(archive.getnames()) == len(set(archive.getnames()))
