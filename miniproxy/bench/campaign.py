"""Which runs, in which order: by size, so that objects are only ever added; within a size by mode; within a mode
the agents in turn, A B A B, so that what drifts on the machine meets all of them alike.
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import msgspec

from ..lab.netns import LabError
from ..lab.subprocesses import python_module
from . import ipvs_tools, python_iptables
from .agents import AgentName, Mode, Setup, flush
from .apiserver import ApiServer, Programs
from .feeds import Api, Feed, Folder
from .objects import target
from .results import Results, machine, save
from .run import Plan, Run, Runner
from .world import ENDPOINT_PORT, NODE, PODS, World

_SERVER_PATIENCE = 20.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    modes: tuple[Mode, ...]
    sizes: tuple[int, ...]  # services; kube-proxy too
    more_sizes: tuple[int, ...] = ()  # services; miniproxy alone, once
    endpoints: int = 2
    pairs: int = 2  # runs of each agent, mode and size
    agents: tuple[AgentName, ...] = ("miniproxy", "kube-proxy")
    plan: Plan = Plan()
    defaults_at: int = 0  # services for the runs with default settings; 0: none
    counting_at: int = 0  # services for the runs that count what tools are told; 0: none
    writer_up_to: int = 1000  # services that python-iptables is to write; it takes a third of a millisecond a rule
    environment: str = ""  # what this runs in, if it is not the machine itself


class Step(NamedTuple):
    """One run to come."""

    agent: AgentName
    mode: Mode
    services: int
    kind: str = ""  # "", "defaults", "counting"

    def __str__(self) -> str:
        return f"{self.services} services, {self.mode}, {self.agent}{f' ({self.kind})' if self.kind else ''}"


def steps(options: Options) -> Iterator[Step]:
    """All runs in their order."""
    for services in sorted({*options.sizes, *options.more_sizes}):
        paired = services in options.sizes
        agents = options.agents if paired else tuple(a for a in options.agents if a == "miniproxy")
        for mode in options.modes:
            for _ in range(options.pairs if paired else 1):
                yield from (Step(agent, mode, services) for agent in agents)
            if services == options.defaults_at:
                yield from (Step(agent, mode, services, "defaults") for agent in agents)
            if services == options.counting_at:
                yield from (Step(agent, mode, services, "counting") for agent in agents)


class Progress(NamedTuple):
    """How to tell somebody who waits."""

    total: Callable[[int], None]
    loading: Callable[[int], None]  # objects to load
    loaded: Callable[[int], None]  # so many more
    begin: Callable[[Step], None]
    doing: Callable[[str], None]
    done: Callable[[], None]


def run(options: Options, programs: Programs | None, output: Path, progress: Progress) -> Results:
    """Do it all; results are in `output`/results.json after every run, whatever comes. Raises LabError.

    Without `programs` agents read manifests, and kube-proxy, which cannot, is left out.
    """
    if programs is None or programs.kube_proxy is None:
        options = msgspec.structs.replace(options, agents=tuple(a for a in options.agents if a == "miniproxy"))
    # As an installed package is; or where PYTHONDONTWRITEBYTECODE is set each start would compile everything anew.
    compileall.compile_dir(Path(__file__).parents[1], quiet=1)
    began = time.monotonic()
    described = machine(_versions(programs))
    results = Results(machine=described, options=msgspec.to_builtins(options))
    output.mkdir(parents=True, exist_ok=True)
    todo = list(steps(options))
    progress.total(len(todo))

    def keep() -> None:
        now = {"seconds": round(time.monotonic() - began, 1), "load_after": os.getloadavg()[0]}
        results.machine = msgspec.structs.replace(described, **now)
        save(results, output / "results.json")

    try:
        with World() as world:
            _campaign(world, options, programs, todo, results, progress, keep)
    except KeyboardInterrupt:
        results.interrupted = True
    keep()
    return results


def _campaign(
    world: World,
    options: Options,
    programs: Programs | None,
    todo: list[Step],
    results: Results,
    progress: Progress,
    keep: Callable[[], None],
) -> None:
    feed, kubeconfig, folder = _feed(world, programs)
    _serve(world)
    loaded = 0
    for index, step in enumerate(todo):
        if step.services > loaded:
            progress.loading(2 * (step.services - loaded))
            feed.load((target(n, options.endpoints) for n in range(loaded, step.services)), progress.loaded)
            loaded = step.services
        progress.begin(step)
        if step.mode == "ipvs" and _turns(step, todo[max(0, index - 1) : index]):
            # Before the agents, since it has the kernel load its modules, which would be held against the first.
            results.runs.append(_writer(world, options, step, "tools", ipvs_tools, progress))
        setup = Setup(
            name=step.agent,
            mode=step.mode,
            endpoints=options.endpoints,
            kubeconfig=kubeconfig,
            folder=folder,
            program=programs.kube_proxy if programs else None,
            defaults=step.kind == "defaults",
            counting=step.kind == "counting",
        )
        found = Runner(world, feed, setup, step.services, options.plan, progress.doing)()
        found.environment = options.environment
        results.runs.append(found)
        progress.done()
        keep()
        small = step.services <= options.writer_up_to and python_iptables.available()
        if step.mode == "iptables-legacy" and small and _turns(step, todo[index + 1 : index + 2]):
            results.runs.append(_writer(world, options, step, "python-iptables", python_iptables, progress))


def _turns(step: Step, neighbour: Sequence[Step]) -> bool:
    """Whether the run before or after, if there is one, is of another mode or size."""
    return [(other.mode, other.services) for other in neighbour] != [(step.mode, step.services)]


def _writer(
    world: World, options: Options, step: Step, name: AgentName, program: ModuleType, progress: Progress
) -> Run:
    """The same services written by something else, for the record."""
    progress.doing(name)
    flush(world)
    log = f"{name}.log"
    argv = python_module(program.__name__, str(step.services), str(options.endpoints))
    start = time.perf_counter()
    status = world.start(NODE, argv, log, {"XTABLES_LOCKFILE": str(world.folder / "lock")}).wait()
    found = Run(agent=name, mode=step.mode, feed="", services=step.services, endpoints=options.endpoints)
    found.environment = options.environment
    if status:
        found.failed = world.log(log)
        return found
    told = json.loads(world.log(log).splitlines()[-1])
    found.started = time.perf_counter() - start
    found.full_sync, found.change_sync, found.memory = told["full"], told.get("change"), told.get("memory")
    return found


def _feed(world: World, programs: Programs | None) -> tuple[Feed, Path | None, Folder | None]:
    if programs is None:
        folder = Folder(world.folder / "manifests")
        return folder, None, folder
    server = ApiServer(world, programs)
    server.start()
    return Api(server), server.kubeconfig, None


def _serve(world: World) -> None:
    """Start what answers in the pods."""
    world.start(PODS, python_module("miniproxy.bench.server", str(ENDPOINT_PORT)), "server.log")
    end = time.monotonic() + _SERVER_PATIENCE
    while "ready" not in world.log("server.log"):
        if time.monotonic() > end:
            raise LabError(f"the pods' server does not start: {world.log('server.log')}")
        time.sleep(0.02)


def _versions(programs: Programs | None) -> dict[str, list[str]]:
    found = {"iptables": ["iptables", "--version"], "nft": ["nft", "--version"]}
    if shutil.which("ipvsadm"):
        found["ipvsadm"] = ["ipvsadm", "--version"]
    if programs:
        found["kube-apiserver"] = [str(programs.kube_apiserver), "--version"]
        if programs.kube_proxy:
            found["kube-proxy"] = [str(programs.kube_proxy), "--version"]
    return found
