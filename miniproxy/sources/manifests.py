"""A watched folder of manifests, or one file: the cluster as files, for nodes without an API server, for ConfigMaps,
and for a look at what `kubectl get -o json` has saved of another cluster.

It answers for noticing every change of the files within a fraction of a second and for what counts when they
disagree; it hands on the objects that changed. Whatever cannot be read keeps its last good version and is
named once, with file, line and reason:

- a file that cannot be read or parsed keeps all its objects; so does the whole folder when it vanishes (an
  unmounted volume is not an empty one);
- an object that is refused keeps its last good version;
- an object in two places is taken from the first in path order, and from the other when that goes.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Iterable
from threading import Event
from typing import NamedTuple

from ..model import Batch, Object, Problem, Ref
from . import Deliver
from .checks import shown
from .documents import Document, DocumentError, documents
from .inotify import POLL_SECONDS, Watcher, watcher
from .wire import convert

log = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE_BYTES = 64 << 20
SETTLE_SECONDS = 0.05  # an editor or a copy touches a file several times in a row
SETTLE_LIMIT_SECONDS = 0.3
RESCAN_SECONDS = 5.0  # for what inotify does not see: network file systems, changes by way of a mapping
STOP_SECONDS = 0.25  # how long `stop` may go unnoticed
TRUNCATED_SECONDS = 0.5  # how long the word that a file was truncated may take to come
YOUNG_NS = 50_000_000  # a file changed that recently may change again under the same time stamp


class ManifestSource:
    """Source of the Services, EndpointSlices and Nodes in the *.yaml, *.yml and *.json files below `folder`, which may
    be one such file.

    Hidden files and folders are left out, symbolic links are followed. Every Node is handed over, not only
    this machine's.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.path.normpath(os.fspath(folder))

    def __str__(self) -> str:
        return self.folder

    def run(self, deliver: Deliver, stop: Event) -> None:
        """Block until `stop` is set. The first Batch with synced=True comes when the folder has been read."""
        files = _Files(self.folder)
        index = _Index()
        synced = woken = False
        watch = watcher(stop)
        try:
            while not stop.is_set():
                seen = self._read(files, index, watch, everything=not woken)
                batch = index.changes(synced=seen and not synced)
                synced = synced or seen
                if batch != Batch():
                    deliver(batch)
                # Nothing tells when a missing folder appears, or a link on the way to it is moved.
                calm = seen and _direct(self.folder) and not files.disturbed and not watch.half_written()
                woken = self._sleep(watch, stop, RESCAN_SECONDS if calm else POLL_SECONDS)
        finally:
            watch.close()

    def _read(self, files: _Files, index: _Index, watch: Watcher, *, everything: bool) -> bool:
        """Bring the index up to date with the folder, `everything` of it or what has changed; whether there is one.

        Looks again when something changed meanwhile: half of one state and half of the next could show an
        object as gone that has only moved to another file.
        """
        for _ in range(5):
            changed = watch.changed()
            glanced = changed is not None and not everything and files.glance(changed, index, watch)
            seen = glanced or files.scan(index, watch)
            files.disturbed = watch.wait(0) or files.disturbed
            if not files.disturbed:
                break
            watch.settle(SETTLE_SECONDS, SETTLE_LIMIT_SECONDS)
        return seen

    @staticmethod
    def _sleep(watch: Watcher, stop: Event, seconds: float) -> bool:
        """Until something changed and has settled (True), or the time is over."""
        end = time.monotonic() + seconds
        while not stop.is_set() and (left := end - time.monotonic()) > 0:
            if watch.wait(min(left, STOP_SECONDS)):
                watch.settle(SETTLE_SECONDS, SETTLE_LIMIT_SECONDS)
                return True
        return False


# --- what the objects are ---------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """One object of one file."""

    ref: Ref
    object: Object | None  # the last good version if this one is refused; None if there never was any
    refused: bool
    problems: tuple[Problem, ...]
    origin: str  # FILE:LINE


class _Index:
    """All entries of all files, and what of them has been handed over."""

    def __init__(self) -> None:
        self._claims: dict[Ref, dict[str, list[_Entry]]] = {}  # ref → path → its entries there
        self._refs: dict[str, list[Ref]] = {}  # path → what it claims
        self._file_problems: dict[Ref, tuple[Problem, ...]] = {}
        self._served: dict[Ref, Object] = {}
        self._reported: dict[Ref, tuple[Problem, ...]] = {}
        self._dirty: dict[Ref, None] = {}  # in order of appearance

    def put(self, path: str, entries: list[_Entry]) -> None:
        """What a file holds from now on; [] when it is gone."""
        good: dict[Ref, Object] = {}
        for ref in self._refs.pop(path, []):
            for entry in self._claims[ref].pop(path, []):
                if entry.object is not None:
                    good.setdefault(ref, entry.object)
            self._dirty[ref] = None
        for entry in entries:
            if entry.object is None:
                entry = entry._replace(object=good.get(entry.ref))
            self._claims.setdefault(entry.ref, {}).setdefault(path, []).append(entry)
            self._dirty[entry.ref] = None
        if entries:
            self._refs[path] = list(dict.fromkeys(entry.ref for entry in entries))

    def report(self, path: str, problems: Iterable[_FileProblem]) -> None:
        """All that is wrong with a file itself, from now on."""
        ref = _file(path)
        self._file_problems[ref] = tuple(
            Problem(ref, wrong.field, wrong.reason, f"{ref.name}:{wrong.line}" if wrong.line else "")
            for wrong in problems
        )
        self._dirty[ref] = None

    def changes(self, synced: bool) -> Batch:
        """What became different since the last call."""
        upserts: list[Object] = []
        deletes: list[Ref] = []
        problems: list[Problem] = []
        for ref in self._dirty:
            thing, wrong = self._now(ref)
            known = self._reported.get(ref, ())
            over = {_comparable(problem) for problem in known} - {_comparable(problem) for problem in wrong}
            if thing is not None and (over or thing != self._served.get(ref)):
                upserts.append(thing)
            elif thing is None and (over or ref in self._served):
                deletes.append(ref)
            else:  # the same as before, so what was said about it still stands
                said = {_comparable(problem) for problem in known}
                problems += [problem for problem in wrong if _comparable(problem) not in said]
                self._remember(ref, thing, wrong)
                continue
            problems += wrong
            self._remember(ref, thing, wrong)
        self._dirty.clear()
        return Batch(tuple(upserts), tuple(deletes), tuple(problems), synced)

    def _now(self, ref: Ref) -> tuple[Object | None, tuple[Problem, ...]]:
        """The object to serve and all that is wrong with it."""
        if ref.kind == "File":
            return None, self._file_problems.get(ref, ())
        claims = [entry for _, entries in sorted(self._claims[ref].items()) for entry in entries]
        if not claims:
            del self._claims[ref]
            return None, ()
        chosen = next((entry for entry in claims if entry.object is not None), claims[0])
        problems: list[Problem] = []
        for entry in claims:
            if entry is chosen or entry.refused:
                problems += entry.problems
            if entry is not chosen:
                reason = f"is also in {chosen.origin}, and that one is used: remove one of them"
                problems.append(Problem(ref, "", reason, entry.origin))
        # A refused object may have come from another file; it is not gone as long as something claims it.
        return chosen.object or self._served.get(ref), tuple(problems)

    def _remember(self, ref: Ref, thing: Object | None, problems: tuple[Problem, ...]) -> None:
        self._served.pop(ref, None)
        self._reported.pop(ref, None)
        if thing is not None:
            self._served[ref] = thing
        if problems:
            self._reported[ref] = problems
        elif ref.kind == "File":
            self._file_problems.pop(ref, None)


def _file(path: str) -> Ref:
    return Ref("File", "", shown(path))


def _comparable(problem: Problem) -> tuple[str, str, str]:
    """Without the line: a problem that only moved to another one is the same."""
    return problem.field, problem.reason, problem.origin.rpartition(":")[0]


# --- what the files hold ----------------------------------------------------------------------------------

Signature = tuple[int, ...]


class _FileProblem(NamedTuple):
    line: int  # 0: the file as such
    field: str
    reason: str


class _Files:
    """What is known of the files, so that only changed ones are read."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._known: dict[str, Signature] = {}  # () never matches: to be read again
        self._unreadable: set[str] = set()
        self._plain = False  # the last scan found a folder, and no link
        self._begun = False
        self._loaded = False  # at least one file has been read without fault
        self.disturbed = False  # something changed while the last scan was under way

    def scan(self, index: _Index, watch: Watcher) -> bool:
        """Tell the index what changed; whether there is a folder at all."""
        self.disturbed = False
        tree = _Tree.of(self._folder, watch)
        self._plain = False
        if tree is None:
            reason = f"is no folder, and no file ({', '.join(SUFFIXES)}), that can be read: mount or make it"
            index.report(self._folder, [_FileProblem(0, "", reason)])
            return False
        index.report(self._folder, ())
        whole = os.path.isdir(self._folder)
        self._plain = whole and not tree.links and _direct(self._folder)
        for path in [path for path in self._known if not tree.holds(path)]:
            self._forget(path, index)
        for path, signature in sorted(tree.files.items()):
            if not signature or signature != self._known.get(path) or path in self._unreadable:
                self._known[path] = self._load(path, index, watch)
        self._begun = True
        for path in self._unreadable - tree.unreadable.keys() - tree.files.keys():
            index.report(path, ())
        for path, reason in tree.unreadable.items():
            index.report(path, [_FileProblem(0, "", reason)])
        self._unreadable = set(tree.unreadable)
        # One file that cannot be read is not a cluster without Services.
        return self._loaded or whole

    def glance(self, paths: Iterable[str], index: _Index, watch: Watcher) -> bool:
        """The same for changes in these places, whatever else the folder holds; False when that takes a scan: through
        a link, one name says nothing about which files have changed.
        """
        self.disturbed = False
        found: dict[str, bool] = {}  # whether it is there
        for path in paths:
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                mode = 0
            except OSError:
                return False
            if not self._plain or path in self._unreadable or (mode and not stat.S_ISREG(mode)):
                return False
            if path.endswith(SUFFIXES) and not os.path.basename(path).startswith("."):
                found[path] = bool(mode)
        for path in sorted(found):
            if not found[path] and path in self._known:
                self._forget(path, index)
        for path in sorted(found):
            if found[path]:
                self._known[path] = self._load(path, index, watch)
        return True

    def _forget(self, path: str, index: _Index) -> None:
        del self._known[path]
        index.put(path, [])
        index.report(path, ())

    def _load(self, path: str, index: _Index, watch: Watcher) -> Signature:
        """Read a file into the index, or say what is wrong with it and leave its entries as they are."""
        signature: Signature = ()
        entries: list[_Entry] = []
        problems: list[_FileProblem] = []
        try:
            signature, data = _content(path)
            if not data and self._begun:
                # Truncated to be written anew? The kernel tells after it has happened: on a busy machine, long after.
                watch.settle(TRUNCATED_SECONDS, 4 * TRUNCATED_SECONDS)
                self.disturbed = True
                signature, data = _content(path)
            if self._half_written(path, watch):
                return ()
            if len(data) > MAX_FILE_BYTES:
                size = f"{MAX_FILE_BYTES >> 20} MiB"
                raise DocumentError(1, f"is larger than {size}: split it into several files")
            for document in documents(data, path.endswith(".json")):
                _take(document, path, entries, problems)
        except DocumentError as error:
            index.report(path, [_FileProblem(error.line, "", error.reason)])
        except OSError as error:
            index.report(path, [_FileProblem(0, "", _cannot(error))])
        else:
            self._loaded = True
            index.put(path, entries)
            index.report(path, problems)
        return signature

    def _half_written(self, path: str, watch: Watcher) -> bool:
        """Whether what was just read of a file is to be left: its writer will close it and wake us up again.

        An editor that truncates a file and writes it anew would else delete half of its objects for a moment.
        At the start all files are taken as they are: the source is not synced without them.
        """
        self.disturbed = watch.wait(0) or self.disturbed
        writing = watch.half_written()
        return self._begun and bool(writing) and os.path.realpath(path) in map(os.path.realpath, writing)


def _direct(path: str) -> bool:
    """Whether no link is on the way to it."""
    return os.path.realpath(path) == os.path.abspath(path)


def _content(path: str) -> tuple[Signature, bytes]:
    """No more than one byte over the limit. Raises OSError."""
    # O_NONBLOCK: a FIFO that took the file's place must not hold us up.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        signature = _signature(os.fstat(file.fileno()))
        return signature, file.read(MAX_FILE_BYTES + 1)


def _signature(info: os.stat_result) -> Signature:
    """What changes with the file; () while it is so young that another change could go unseen."""
    if abs(time.time_ns() - info.st_ctime_ns) < YOUNG_NS:
        return ()
    return info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino, info.st_dev


def _take(document: Document, path: str, entries: list[_Entry], problems: list[_FileProblem]) -> None:
    if document.wrong:
        problems.append(_FileProblem(document.line, document.field, document.wrong))
        return
    thing, wrong = convert(document.raw, document.kind)
    if thing is None and not wrong:
        log.debug("ignored: no proxy reads this kind", extra={"path": path, "line": document.line})
        return
    ref = thing.ref if thing is not None else wrong[0].ref
    if not ref.name:  # only the file can tell which one that is
        problems += [
            _FileProblem(document.locate(problem.field), problem.field, f"{problem.reason} (of a {ref.kind})")
            for problem in wrong
        ]
        return
    named = tuple(problem._replace(origin=f"{shown(path)}:{document.locate(problem.field)}") for problem in wrong)
    entries.append(_Entry(ref, thing, thing is None, named, f"{shown(path)}:{document.line}"))


def _cannot(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


class _Tree(NamedTuple):
    """What a folder looks like now."""

    files: dict[str, Signature]
    unreadable: dict[str, str]  # file or folder → why
    links: set[str]  # files and folders behind symbolic links

    def holds(self, path: str) -> bool:
        """Whether a file is there, or may be as far as one can see."""
        return path in self.files or any(
            path == hidden or path.startswith(hidden + os.sep) for hidden in self.unreadable
        )

    @staticmethod
    def of(folder: str, watch: Watcher) -> _Tree | None:
        """Walk it and watch all of it; None if there is no such folder or file."""
        tree = _Tree({}, {}, set())
        watched: set[str] = set()
        if os.path.isfile(folder) and folder.endswith(SUFFIXES):
            around = os.path.dirname(folder) or "."
            watched.add(around)
            watch.watch(around)
            tree._is_folder(folder, watched, watch)
            watch.keep(watched)
            return tree
        walked: set[tuple[int, int]] = set()  # a link may lead back up
        waiting = [folder]
        while waiting:
            directory = waiting.pop()
            watched.add(directory)
            watch.watch(directory)  # before it is read, lest a change falls between
            try:
                info = os.stat(directory)
                names = sorted(os.listdir(directory), reverse=True)
            except OSError as error:
                if directory == folder:
                    watch.keep(())
                    return None
                if not isinstance(error, FileNotFoundError):
                    tree.unreadable[directory] = _cannot(error)
                continue
            if (info.st_dev, info.st_ino) in walked:
                continue
            walked.add((info.st_dev, info.st_ino))
            paths = [os.path.join(directory, name) for name in names if not name.startswith(".")]
            waiting += [path for path in paths if tree._is_folder(path, watched, watch)]
        watch.keep(watched)
        return tree

    def _is_folder(self, path: str, watched: set[str], watch: Watcher) -> bool:
        """Note a file; say whether it is a folder to walk."""
        try:
            if os.path.islink(path):
                self.links.add(path)
                target = os.path.dirname(os.path.realpath(path))
                watched.add(target)
                watch.watch(target)  # where an edit of the file itself shows
            info = os.stat(path)
        except OSError as error:
            if path.endswith(SUFFIXES) and os.path.lexists(path):
                self.unreadable[path] = _cannot(error)
            return False
        if stat.S_ISDIR(info.st_mode):
            return True
        if path.endswith(SUFFIXES):
            if stat.S_ISREG(info.st_mode):
                self.files[path] = _signature(info)
            else:
                self.unreadable[path] = "is neither a file nor a folder: remove it"
        return False
