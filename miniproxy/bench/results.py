"""What a benchmark found, as data: a list of runs and the machine they ran on; and the statistics of them.

Figures of one kind from all runs of one agent, mode and size make a `Spread`; ratios between agents are made from
runs next to each other in time (A B A B), so that a machine that is busier in the end does not favour anybody.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from .. import __version__
from .agents import AgentName, Mode
from .run import Run


class Spread(NamedTuple):
    """Median, least and most of some figures."""

    median: float
    low: float
    high: float
    figures: int  # how many there were

    @staticmethod
    def of(figures: Iterable[float | None]) -> Spread | None:
        """None when there are none; those that are None do not count."""
        found = [figure for figure in figures if figure is not None]
        return Spread(statistics.median(found), min(found), max(found), len(found)) if found else None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran."""

    kernel: str
    processor: str
    cores: int
    memory: int  # bytes
    python: str
    tools: dict[str, str]  # version by program
    load_before: float
    load_after: float = 0.0
    began: str
    seconds: float = 0.0  # it took


class Results(msgspec.Struct, kw_only=True):
    machine: Machine
    options: dict[str, object]
    runs: list[Run] = []
    interrupted: bool = False
    notes: list[str] = []  # whatever else a reader has to know


Measure = Callable[[Run], Iterable[float | None]]


class Figure(NamedTuple):
    """A kind of figure: how to get it from a run, and what to call it."""

    name: str
    title: str
    unit: str  # "s", "bytes", "1/s", "1"
    of: Measure


def _one(get: Callable[[Run], float | None]) -> Measure:
    return lambda run: (get(run),)


FIGURES: tuple[Figure, ...] = (
    Figure("full_sync", "full sync from an empty kernel", "s", _one(lambda r: r.full_sync)),
    Figure("started", "process start to everything programmed", "s", _one(lambda r: r.started)),
    Figure("restart_sync", "sync after a restart, nothing to do", "s", _one(lambda r: r.restart_sync)),
    Figure("restarted", "process start to that sync's end", "s", _one(lambda r: r.restarted)),
    Figure("change_sync", "sync of one endpoint change", "s", _one(lambda r: r.change_sync)),
    Figure("added_kernel", "endpoint added: event to kernel", "s", lambda r: (s.kernel for s in r.added)),
    Figure("added", "endpoint added: event to connection", "s", lambda r: (s.connected for s in r.added)),
    Figure("removed", "endpoint removed: event to kernel", "s", lambda r: (s.kernel for s in r.removed)),
    Figure("created", "service created: event to connection", "s", lambda r: (s.connected for s in r.created)),
    Figure("deleted", "service deleted: event to refusal", "s", lambda r: (s.connected for s in r.deleted)),
    Figure("with_defaults", "endpoint added, default settings", "s", lambda r: (s.connected for s in r.with_defaults)),
    Figure("burst", "burst of changes: first event to last connection", "s", _one(lambda r: r.burst)),
    Figure("change_cpu", "CPU of one change", "s", _one(lambda r: r.change_cpu)),
    Figure("churn_cpu", "CPU of one change in steady churn", "s", _one(lambda r: r.churn_cpu)),
    Figure("churn_own_cpu", "of that, the agent's own in user space", "s", _one(lambda r: r.churn_own_cpu)),
    Figure("burst_cpu", "CPU of the burst", "s", _one(lambda r: r.burst_cpu)),
    Figure("started_cpu", "CPU of the cold start", "s", _one(lambda r: r.started_cpu)),
    Figure("memory", "memory, resident", "bytes", _one(lambda r: r.memory)),
    Figure("memory_peak", "memory, at most", "bytes", _one(lambda r: r.memory_peak)),
    Figure("latency", "first packet and its answer", "s", lambda r: r.latency),
    Figure("connections", "new connections, one at a time", "1/s", _one(lambda r: r.connections_per_second)),
    Figure("processes", "processes started for one change", "1", _one(lambda r: _per_change(r, 0))),
    Figure("bytes", "bytes written to tools for one change", "bytes", _one(lambda r: _per_change(r, 1))),
    Figure("operations", "operations in those for one change", "1", _one(lambda r: _per_change(r, 2))),
)
BY_NAME = {figure.name: figure for figure in FIGURES}


def _per_change(run: Run, index: int) -> float | None:
    return run.calls[index] / run.counted_changes if run.calls and run.counted_changes else None


class Case(NamedTuple):
    """What runs have to have in common to be repetitions of each other."""

    agent: AgentName
    mode: Mode
    services: int

    @staticmethod
    def of(run: Run) -> Case:
        return Case(run.agent, run.mode, run.services)


def spread(runs: Iterable[Run], case: Case, figure: Figure) -> Spread | None:
    """All figures of that kind of all runs of a case, the first of each pair of figures being as good as any."""
    return Spread.of(value for run in runs if Case.of(run) == case for value in figure.of(run))


def ratio(runs: Sequence[Run], mode: Mode, services: int, figure: Figure) -> Spread | None:
    """miniproxy / kube-proxy: the n'th run of one over the n'th run of the other."""
    sides: list[list[float]] = []
    for agent in ("miniproxy", "kube-proxy"):
        mine = [run for run in runs if Case.of(run) == Case(agent, mode, services)]
        medians = [Spread.of(figure.of(run)) for run in mine]
        sides.append([found.median for found in medians if found])
    pairs = [ours / theirs for ours, theirs in zip(*sides, strict=False) if theirs]
    return Spread.of(pairs)


def slope(runs: Sequence[Run], agent: AgentName, mode: Mode, figure: Figure) -> float | None:
    """How a figure grows with the number of services: the exponent k of services^k that fits best."""
    points = []
    for services in sorted({run.services for run in runs}):
        found = spread(runs, Case(agent, mode, services), figure)
        if found and found.median > 0:
            points.append((math.log(services), math.log(found.median)))
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def machine(programs: Mapping[str, Sequence[str]]) -> Machine:
    """Describe this one; `programs` names commands that print a version."""
    cpuinfo = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    processor = next((value.strip() for name, _, value in cpuinfo if name.strip() == "model name"), "unknown")
    commit = _first_line(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"])
    tools = {"miniproxy": f"{__version__} {commit}".strip()}
    tools |= {name: _first_line(argv) for name, argv in programs.items()}
    return Machine(
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor,
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        tools={name: version for name, version in tools.items() if version},
        load_before=os.getloadavg()[0],
        began=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )


def _first_line(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()


def save(results: Results, path: Path) -> None:
    """As JSON, so that an interruption leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    draft.rename(path)


def load(path: Path) -> Results:
    """Raises OSError, msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=Results)
