"""A watched folder on a real file system: every way files change, and every way they can be wrong."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from miniproxy.model import Batch, Object, Problem, Ref, Service
from miniproxy.sources import inotify, manifests
from miniproxy.sources.documents import DocumentError, documents
from miniproxy.sources.manifests import MAX_FILE_BYTES, ManifestSource
from miniproxy.sources.wire import convert

from .broken import broken_objects, endpoint_slice, node, put, service
from .running import Running


def web(name: str, port: int = 80) -> Any:
    return put(service(name), "spec.ports[0].port", port)


def text(*things: Any) -> str:
    return "".join("---\n" + yaml.safe_dump(thing) for thing in things)


def ref(name: str) -> Ref:
    return Ref("Service", "default", name)


class Watched(Running):
    """A running source, and what a consumer knows from its batches by the rules of `Batch`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[Ref, Object] = {}
        self.problems: dict[Ref, list[Problem]] = {}
        self.synced = False
        super().__init__(ManifestSource(folder))

    def __str__(self) -> str:
        return f"objects {self.objects}; problems {self.problems}"

    def take(self, batch: Batch) -> None:
        for over in (*batch.deletes, *(thing.ref for thing in batch.upserts)):
            self.problems.pop(over, None)
        for problem in batch.problems:
            self.problems.setdefault(problem.ref, []).append(problem)
        for gone in batch.deletes:
            self.objects.pop(gone, None)
        self.objects.update((thing.ref, thing) for thing in batch.upserts)
        self.synced = self.synced or batch.synced

    def until_synced(self) -> None:
        self.until(lambda: self.synced)

    def port(self, name: str) -> int:
        """The first port of a Service, 0 if there is none."""
        thing = self.objects.get(ref(name))
        return thing.ports[0].port if isinstance(thing, Service) and thing.ports else 0

    def fence(self) -> None:
        """Until everything done to the files so far has been handed over."""
        name = f"fence-{len(self.batches)}"
        path = self.folder / f"zz-{name}.yaml"
        path.write_text(text(web(name)))
        self.until(lambda: ref(name) in self.objects)
        path.unlink()
        self.until(lambda: ref(name) not in self.objects)

    def about(self, path: Path) -> list[Problem]:
        return self.problems.get(Ref("File", "", str(path)), [])

    def everything_said(self) -> list[Problem]:
        return [problem for batch in self.batches for problem in batch.problems]


@pytest.fixture(params=["inotify", "polling"])
def watched(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A source over an empty folder, which may be filled before the `with`-like start()."""
    if request.param == "polling":
        monkeypatch.setattr(manifests, "watcher", inotify.Polling)
    folder = tmp_path / "manifests"
    folder.mkdir()
    with Watched(folder) as running:
        running.until_synced()
        yield running


def write(watched: Watched, name: str, *things: Any) -> Path:
    path = watched.folder / name
    path.write_text(text(*things))
    return path


def replace(path: Path, content: str) -> None:
    """As editors do it: write aside, then rename."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(content)
    aside.rename(path)


# --- what is read -----------------------------------------------------------------------------------------


def test_every_form_of_manifest_is_read_before_the_first_sync(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text(text(web("a"), endpoint_slice("a-1"), node("n1")) + "---\n---\n")
    (tmp_path / "list.yml").write_text(text({"apiVersion": "v1", "kind": "List", "items": [web("b"), node("n2")]}))
    bare = {key: value for key, value in web("c").items() if key not in ("kind", "apiVersion")}
    (tmp_path / "list.json").write_text(json.dumps({"apiVersion": "v1", "kind": "ServiceList", "items": [bare]}))
    (tmp_path / "stream.json").write_text(json.dumps(web("d"), indent=1) + "\n" + json.dumps(web("e")))
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "sub" / "deeper" / "f.yaml").write_text(text(web("f")))
    (tmp_path / "sub" / "again").symlink_to(tmp_path)  # leads back up
    (tmp_path / "other.yaml").write_text(text({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"}}))
    (tmp_path / ".hidden.yaml").write_text(text(web("hidden")))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.yaml").write_text(text(web("hidden-too")))
    (tmp_path / "README.md").write_text("[[[")
    with Watched(tmp_path) as running:
        running.until_synced()
    assert [str(found) for found in sorted(running.objects)] == [
        "EndpointSlice default/a-1",
        "Node n1",
        "Node n2",
        *[f"Service default/{name}" for name in "abcdef"],
    ]
    assert running.problems == {}


def test_addresses_and_times_in_yaml_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        """
        apiVersion: v1
        kind: Service
        metadata: {name: a, namespace: default, creationTimestamp: 2026-01-01T00:00:00Z}
        spec: {clusterIP: 2001:10:20:30:40:50:51:52, ports: [{port: 80}]}
        """
    )
    with Watched(tmp_path) as running:
        running.until_synced()
    thing = running.objects[ref("a")]
    assert isinstance(thing, Service)
    assert [port.cluster_ip for port in thing.ports] == ["2001:10:20:30:40:50:51:52"]


def test_twenty_kinds_of_broken_objects_cost_the_good_ones_nothing(tmp_path: Path) -> None:
    broken = broken_objects()
    assert len({one.what for one in broken}) >= 20
    fine = [service(f"good-{i}", i) for i in range(25)] + [endpoint_slice(f"good-{i}-a", i + 1) for i in range(25)]
    for i, thing in enumerate(fine):
        one = broken[i % len(broken)].object
        (tmp_path / f"{i:02}.yaml").write_text(text(one, thing))
    for i, one in enumerate(broken[len(fine) :]):
        (tmp_path / f"rest-{i}.json").write_text(json.dumps(one.object))
    with Watched(tmp_path) as running:
        running.until_synced()
    for thing in fine:
        expected = convert(thing).object
        assert expected is not None
        assert running.objects[expected.ref] == expected
    said = sorted((problem.ref, problem.field) for problem in running.everything_said())
    assert said == sorted((one.ref, one.field) for one in broken)
    assert all(str(tmp_path) in problem.origin for problem in running.everything_said())
    assert {one.ref for one in broken if one.whole}.isdisjoint(running.objects)


# --- changes ----------------------------------------------------------------------------------------------


def test_edits_new_files_and_deletions(watched: Watched) -> None:
    a = write(watched, "a.yaml", web("a", 80), web("still"))
    watched.until(lambda: watched.port("a") == 80)
    seen = len(watched.batches)
    write(watched, "a.yaml", web("a", 81), web("still"))  # in place
    watched.until(lambda: watched.port("a") == 81)
    replace(a, text(web("a", 82), web("still")))
    watched.until(lambda: watched.port("a") == 82)
    write(watched, "b.yaml", web("b"))
    watched.until(lambda: watched.port("b"))
    handed = [thing.ref.name for batch in watched.batches[seen:] for thing in batch.upserts]
    assert handed == ["a", "a", "b"], "only what changed"
    write(watched, "a.yaml", web("still"))
    watched.until(lambda: ref("a") not in watched.objects)
    a.unlink()
    watched.until(lambda: set(watched.objects) == {ref("b")})
    assert watched.everything_said() == []


def test_a_touched_file_and_a_moved_one_change_nothing(watched: Watched) -> None:
    a = write(watched, "a.yaml", web("a"))
    watched.until(lambda: watched.port("a"))
    seen = len(watched.batches)
    os.utime(a)
    watched.fence()
    a.rename(watched.folder / "b.yaml")
    watched.fence()
    later = watched.batches[seen:]
    assert ref("a") not in [thing.ref for batch in later for thing in batch.upserts]
    assert ref("a") not in [gone for batch in later for gone in batch.deletes]


def test_sub_folders_come_and_go(watched: Watched) -> None:
    sub = watched.folder / "team" / "shop"
    sub.mkdir(parents=True)
    (sub / "a.yaml").write_text(text(web("a", 80)))
    watched.until(lambda: watched.port("a") == 80)
    (sub / "a.yaml").write_text(text(web("a", 81)))
    watched.until(lambda: watched.port("a") == 81)
    (watched.folder / "team").rename(watched.folder.parent / "team")
    watched.until(lambda: not watched.objects)


def test_a_file_behind_a_link_is_watched_where_it_is(watched: Watched) -> None:
    elsewhere = watched.folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "real.yaml").write_text(text(web("a", 80)))
    (watched.folder / "a.yaml").symlink_to(elsewhere / "real.yaml")
    watched.until(lambda: watched.port("a") == 80)
    (elsewhere / "real.yaml").write_text(text(web("a", 81)))
    watched.until(lambda: watched.port("a") == 81)


def swap(folder: Path, stamp: str, **files: str) -> None:
    """What the kubelet does to update a mounted ConfigMap."""
    (folder / stamp).mkdir()
    for name, content in files.items():
        (folder / stamp / f"{name}.yaml").write_text(content)
    old = folder / os.readlink(folder / "..data") if (folder / "..data").is_symlink() else None
    (folder / "..data_tmp").symlink_to(stamp)
    (folder / "..data_tmp").rename(folder / "..data")
    for name in files:
        if not (folder / f"{name}.yaml").is_symlink():
            (folder / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")
    for link in folder.glob("*.yaml"):
        if link.stem not in files:
            link.unlink()
    if old:
        for path in old.iterdir():
            path.unlink()
        old.rmdir()


def test_config_map_swaps(watched: Watched) -> None:
    swap(watched.folder, "..2026_1", a=text(web("a", 80)), b=text(web("moves")))
    watched.until(lambda: watched.port("a") == 80 and watched.port("moves"))
    seen = len(watched.batches)
    swap(watched.folder, "..2026_2", a=text(web("a", 81), web("moves")), c=text(web("c")))
    watched.until(lambda: watched.port("a") == 81 and watched.port("c"))
    swap(watched.folder, "..2026_3", a=text(web("a", 82), web("moves")))
    watched.until(lambda: watched.port("a") == 82 and ref("c") not in watched.objects)
    gone = [gone for batch in watched.batches[seen:] for gone in batch.deletes if gone.kind == "Service"]
    assert gone == [ref("c")]
    assert set(watched.objects) == {ref("a"), ref("moves")}


def test_the_folder_vanishes_and_comes_back(watched: Watched) -> None:
    write(watched, "a.yaml", web("a", 80))
    write(watched, "b.yaml", web("b"))
    watched.until(lambda: watched.port("a") and watched.port("b"))
    aside = watched.folder.rename(watched.folder.parent / "aside")
    watched.until(lambda: watched.about(watched.folder))
    assert set(watched.objects) == {ref("a"), ref("b")}, "an unmounted volume is not an empty one"
    (aside / "b.yaml").unlink()
    (aside / "a.yaml").write_text(text(web("a", 81)))
    aside.rename(watched.folder)
    watched.until(lambda: watched.port("a") == 81 and not watched.about(watched.folder))
    assert set(watched.objects) == {ref("a")}
    write(watched, "a.yaml", web("a", 82))
    watched.until(lambda: watched.port("a") == 82)


def test_a_folder_that_is_not_there_yet_is_not_synced(tmp_path: Path) -> None:
    with Watched(tmp_path / "later") as running:
        running.until(lambda: running.about(tmp_path / "later"))
        assert not running.synced
        (tmp_path / "aside").mkdir()
        (tmp_path / "aside" / "a.yaml").write_text(text(web("a")))
        (tmp_path / "aside").rename(tmp_path / "later")
        running.until_synced()
        assert running.port("a") == 80
        assert running.problems == {}


def test_a_folder_behind_a_link_may_be_swapped(tmp_path: Path) -> None:
    for stamp, port in (("v1", 80), ("v2", 81)):
        (tmp_path / stamp).mkdir()
        (tmp_path / stamp / "a.yaml").write_text(text(web("a", port)))
    (tmp_path / "current").symlink_to("v1")
    with Watched(tmp_path / "current") as running:
        running.until(lambda: running.port("a") == 80)
        (tmp_path / "next").symlink_to("v2")
        (tmp_path / "next").rename(tmp_path / "current")
        running.until(lambda: running.port("a") == 81)


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"kind: Service\n  x: y\n", 2, "mapping values are not allowed"),
        (b"kind: [Service\n", 2, "expected ',' or ']'"),
        (b"a: b\nkind: \xff\n", 2, "UTF-8"),
        (b"kind: !!python/object:os.system x\n", 1, "could not determine a constructor"),
        (b"kind: !!int x\n", 1, "has a value that cannot be read"),
        (b"- 1\n- " + b"[" * 10_000 + b"]" * 10_000, 2, "nested"),
        (b"- " * 100_000, 1, "nested"),
        (b"x: &a [&b [*b]]\n<<: [*a\n", 3, "expected"),
        (
            b"a: &a [" + b"x," * 50 + b"]\n"
            + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 50)) for c in range(98, 104)),
            4,
            "aliases make more than",
        ),
    ],
)  # fmt: skip
def test_a_file_that_does_not_parse_keeps_its_objects(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    a = tmp_path / "a.yaml"
    a.write_text(text(web("a", 80)))
    (tmp_path / "b.yaml").write_text(text(web("b", 80)))
    with Watched(tmp_path) as running:
        running.until_synced()
        a.write_bytes(content)
        running.until(lambda: running.about(a))
        (problem,) = running.about(a)
        assert problem.origin == f"{a}:{line}"
        assert reason in problem.reason
        (tmp_path / "b.yaml").write_text(text(web("b", 81)))
        running.until(lambda: running.port("b") == 81)
        assert running.port("a") == 80, "old state keeps serving"
        a.write_text(text(web("a", 82)))
        running.until(lambda: running.port("a") == 82)
        assert running.problems == {}
        assert running.everything_said() == [problem], "said once"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"kind": "Service",\n\n "metadata": }', 3),
        (b'{"kind": "Service"', 1),
        (b'{"kind": "Service"}\n{"a": NaN}', 2),
        (b'{"kind": "\\ud800"}', 1),
        (b'{"kind":\n"\xff"}', 2),
        (b"[" * 100_000, 1),
    ],
)
def test_json_that_does_not_parse(content: bytes, line: int) -> None:
    with pytest.raises(DocumentError) as caught:
        list(documents(content, is_json=True))
    assert caught.value.line == line


def test_broken_then_mended_to_what_it_was(watched: Watched) -> None:
    a = write(watched, "a.yaml", web("a"))
    watched.until(lambda: watched.port("a"))
    a.write_text("[")
    watched.until(lambda: watched.about(a))
    write(watched, "a.yaml", web("a"))
    watched.until(lambda: not watched.about(a))
    a.write_text("[")
    watched.until(lambda: watched.about(a))
    a.unlink()
    watched.until(lambda: not watched.objects and not watched.problems)


def test_a_refused_object_keeps_its_last_good_version(watched: Watched) -> None:
    bad = put(web("a", 81), "spec.ports[1].port", "53")
    write(watched, "a.yaml", web("a", 80), web("b", 80))
    watched.until(lambda: watched.port("b") == 80)
    a = write(watched, "a.yaml", bad, web("b", 81))
    watched.until(lambda: watched.port("b") == 81)
    (problem,) = watched.problems[ref("a")]
    assert problem.field == "spec.ports[1].port"
    lines = a.read_text().splitlines()
    assert "'53'" in lines[int(problem.origin.rpartition(":")[2]) - 1], "the line of the field itself"
    assert watched.port("a") == 80
    a.write_text("# a line more\n" + text(bad, web("b", 82)))
    watched.until(lambda: watched.port("b") == 82)
    assert len(watched.everything_said()) == 1, "only its line changed"
    write(watched, "a.yaml", web("a", 80), web("b", 82))
    watched.until(lambda: not watched.problems)
    assert watched.port("a") == 80
    write(watched, "a.yaml", bad)
    watched.until(lambda: ref("a") in watched.problems and ref("b") not in watched.objects)
    write(watched, "a.yaml", web("b"))
    watched.until(lambda: set(watched.objects) == {ref("b")} and not watched.problems)


def test_a_problem_of_an_object_that_never_was_good_ends_with_it(watched: Watched) -> None:
    a = write(watched, "a.yaml", put(web("a"), "spec", []))
    watched.until(lambda: watched.problems)
    assert watched.objects == {}
    a.unlink()
    watched.until(lambda: not watched.problems)


def test_documents_that_are_no_objects_are_named_by_file_and_line(watched: Watched) -> None:
    path = watched.folder / "a.yaml"
    nameless = put(web("x"), "metadata.name", "")
    path.write_text("metadata:\n  name: x\n---\n- 1\n" + text(web("a"), nameless) + "---\nkind: 3\n")
    watched.until(lambda: watched.port("a"))
    found = [(problem.field, problem.origin.rpartition(":")[2]) for problem in watched.about(path)]
    lines = path.read_text().splitlines()
    name = lines.index("  name: ''") + 1
    assert found == [("kind", "1"), ("", "4"), ("metadata.name", str(name)), ("kind", str(len(lines)))]
    write(watched, "a.yaml", web("a"))
    watched.until(lambda: not watched.problems)


def test_an_object_moves_to_another_file(watched: Watched) -> None:
    write(watched, "a.yaml", web("moves"), web("a"))
    watched.until(lambda: watched.port("moves"))
    seen = len(watched.batches)
    write(watched, "z.yaml", web("moves"))
    write(watched, "a.yaml", web("a", 81))
    watched.until(lambda: watched.port("a") == 81)
    watched.fence()
    assert ref("moves") not in [gone for batch in watched.batches[seen:] for gone in batch.deletes]
    assert watched.port("moves") == 80
    assert watched.problems == {}


def test_the_same_object_in_two_files(watched: Watched) -> None:
    b = write(watched, "b.yaml", web("x", 82))
    watched.until(lambda: watched.port("x") == 82)
    a = write(watched, "a.yaml", web("x", 81))
    watched.until(lambda: watched.port("x") == 81)
    (problem,) = watched.problems[ref("x")]
    assert str(a) in problem.reason
    assert problem.origin.startswith(f"{b}:")
    c = write(watched, "c.yaml", web("x", 83))
    watched.until(lambda: len(watched.problems[ref("x")]) == 2)
    a.unlink()
    watched.until(lambda: watched.port("x") == 82)
    (problem,) = watched.problems[ref("x")]
    assert str(b) in problem.reason
    c.unlink()
    watched.until(lambda: not watched.problems)
    assert watched.port("x") == 82
    b.unlink()
    watched.until(lambda: not watched.objects)
    assert [gone for batch in watched.batches for gone in batch.deletes if gone.kind != "File"] == [ref("x")]


def test_the_same_object_twice_in_a_file(watched: Watched) -> None:
    path = write(watched, "a.yaml", web("x", 81), web("x", 82))
    watched.until(lambda: watched.port("x") == 81)
    (problem,) = watched.problems[ref("x")]
    assert f"{path}:2" in problem.reason
    write(watched, "a.yaml", web("x", 82))
    watched.until(lambda: watched.port("x") == 82 and not watched.problems)


def test_what_cannot_be_read_keeps_its_objects(watched: Watched) -> None:
    a = write(watched, "a.yaml", web("a", 80))
    watched.until(lambda: watched.port("a"))
    for make in (links_to_itself, links_to_nothing, os.mkfifo, big):
        a.unlink()
        make(a)
        watched.until(lambda: watched.about(a))
        assert watched.port("a") == 80
        a.unlink()
        write(watched, "a.yaml", web("a", 80))
        watched.until(lambda: not watched.about(a))
    write(watched, "a.yaml", web("a", 81))
    watched.until(lambda: watched.port("a") == 81)


def links_to_itself(path: Path) -> None:
    path.symlink_to(path)


def links_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def big(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


def test_a_file_that_is_written_slowly_is_read_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify, "STALLED_SECONDS", 60.0)  # on a busy machine this test may pause for long
    path = tmp_path / "a.yaml"
    path.write_text(text(web("a", 80), web("b", 80)))
    with Watched(tmp_path) as running:
        running.until_synced()
        for port in range(81, 91):
            with path.open("w") as file:
                file.write(text(web("a", port)))
                file.flush()
                time.sleep(0.06)  # longer than the settle time
                file.write(text(web("b", port)))
        running.until(lambda: running.port("b") == 90 and running.port("a") == 90)
    assert ref("b") not in [gone for batch in running.batches for gone in batch.deletes]
    assert running.everything_said() == []


# --- what a change costs ----------------------------------------------------------------------------------


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every walk through the whole folder; none is due for as long as the test takes."""
    walked: list[str] = []
    walk = manifests._Tree.of

    def noted(folder: str, watch: inotify.Watcher) -> manifests._Tree | None:
        walked.append(folder)
        return walk(folder, watch)

    monkeypatch.setattr(manifests._Tree, "of", noted)
    monkeypatch.setattr(manifests, "RESCAN_SECONDS", 600.0)
    return walked


def test_a_change_looks_at_no_other_file(tmp_path: Path, scans: list[str]) -> None:
    for number in range(20):
        (tmp_path / f"{number}.yaml").write_text(text(web(f"w{number}")))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.yaml").write_text(text(web("a")))
    with Watched(tmp_path) as running:
        running.until_synced()
        running.fence()  # whatever the files' making still had to say
        before = len(scans)
        (tmp_path / "3.yaml").write_text(text(web("w3", 81)))
        running.until(lambda: running.port("w3") == 81)
        replace(tmp_path / "more" / "a.yaml", text(web("a", 82)))
        running.until(lambda: running.port("a") == 82)
        (tmp_path / "20.yaml").write_text(text(web("w20")))
        running.until(lambda: running.port("w20") == 80)
        (tmp_path / "7.yaml").unlink()
        running.until(lambda: running.port("w7") == 0)
        (tmp_path / "8.yaml").rename(tmp_path / "more" / "8.yaml")
        (tmp_path / "9.yaml").write_text("a: b: c\n")
        running.until(lambda: running.about(tmp_path / "9.yaml"))
        (tmp_path / "9.yaml").write_text(text(web("w9", 83)))
        running.until(lambda: running.port("w9") == 83)
        assert not running.about(tmp_path / "9.yaml")
        assert running.port("w8") == 80
        assert scans[before:] == []
        assert ref("w8") not in [gone for batch in running.batches for gone in batch.deletes]


@pytest.mark.parametrize("what", ["folder", "link to a file", "link to a folder"])
def test_what_is_more_than_a_file_has_everything_looked_at(tmp_path: Path, scans: list[str], what: str) -> None:
    folder, aside = tmp_path / "manifests", tmp_path / "aside"
    for path in (folder, aside):
        path.mkdir()
    (aside / "a.yaml").write_text(text(web("a")))
    with Watched(folder) as running:
        running.until_synced()
        match what:
            case "folder":
                aside.rename(folder / "new")
            case "link to a file":
                (folder / "new.yaml").symlink_to(aside / "a.yaml")
            case _:
                (folder / "new").symlink_to(aside)
        running.until(lambda: running.port("a") == 80)
        place = folder / "new" if what == "folder" else aside
        (place / "a.yaml").write_text(text(web("a", 81)))
        running.until(lambda: running.port("a") == 81)
        if what == "link to a file":
            (folder / "new.yaml").unlink()
        else:
            (folder / "new").rename(tmp_path / "away")
        running.until(lambda: running.port("a") == 0)


def test_an_event_that_was_lost_has_everything_looked_at(tmp_path: Path, scans: list[str]) -> None:
    """The kernel keeps 16,384 events (fs.inotify.max_queued_events), and says when there were more."""
    watch = inotify.Inotify.open()
    try:
        watch.watch(str(tmp_path))
        assert watch.changed() == set()
        (tmp_path / "a.yaml").write_text("")
        assert watch.wait(10)
        assert watch.changed() == {str(tmp_path / "a.yaml")}
        limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
        for number in range(limit // 2 + 1):  # alternating, or the kernel makes one event of equal ones
            os.utime(tmp_path / "a.yaml")
            os.utime(tmp_path)
            (tmp_path / f"{number % 2}").touch()
            (tmp_path / f"{number % 2}").unlink()
        while watch.wait(0):
            pass
        assert watch.changed() is None
        assert watch.changed() == set()
    finally:
        watch.close()


# --- one file ---------------------------------------------------------------------------------------------


def test_one_file_is_watched_and_its_neighbours_are_not(tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [web("a"), web("b")]}))
    (tmp_path / "other.yaml").write_text(text(web("c")))
    with Watched(path) as running:
        running.until_synced()
        assert running.objects.keys() == {ref("a"), ref("b")}
        (tmp_path / "other.yaml").write_text(text(web("d")))
        path.write_text(json.dumps(web("a", 81)))
        running.until(lambda: running.port("a") == 81)
        assert running.objects.keys() == {ref("a")}
        path.rename(tmp_path / "gone")
        running.until(lambda: running.about(path))
        replace(path, json.dumps(web("a", 82)))
        running.until(lambda: running.port("a") == 82)
        assert running.problems == {}
        assert ref("a") not in [gone for batch in running.batches for gone in batch.deletes]


@pytest.mark.parametrize("name", ["dump.json", "dump"])
def test_one_file_that_cannot_be_read_is_not_an_empty_cluster(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("{" if name == "dump.json" else json.dumps(web("a")))
    with Watched(path) as running:
        running.until(lambda: running.about(path))
        assert not running.synced
        if name == "dump.json":
            path.write_text(json.dumps(web("a")))
            running.until_synced()
            assert running.port("a") == 80
