"""One agent, one mode, one size: from an empty kernel through every measure to the agent's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec

from .agents import Agent, AgentName, Calls, Mode, Setup, flush, rest, wait_quiet
from .client import Seen, TooLate, ask, dataplane, follow, written
from .eye import Eye
from .feeds import Feed
from .objects import Target, target
from .world import World

SEED = 20261121
_SPARE = 100_000  # numbers of services that come and go in a run
_COLD_PATIENCE = 1200.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each measure."""

    changes: int = 5  # of each kind, one after the other
    burst: int = 100
    churn: int = 100
    churn_rate: float = 20.0  # changes a second
    connections: int = 500
    defaults: int = 0  # changes with the default minSyncPeriod, after quiet


class Run(msgspec.Struct, kw_only=True):
    """What one run found. Times are seconds, memory bytes; None: not measured."""

    agent: AgentName
    mode: Mode
    feed: str
    services: int
    endpoints: int
    environment: str = ""  # "" for this machine, else what it ran in
    counting: bool = False
    failed: str = ""  # why it ended early

    started: float | None = None  # process start to everything programmed
    started_cpu: float | None = None
    full_sync: float | None = None  # the agent's own figure: filled caches to programmed kernel
    restarted: float | None = None  # process start to the end of a sync with nothing to do
    restarted_cpu: float | None = None
    restart_sync: float | None = None  # the agent's own figure
    added: list[Seen] = []  # an endpoint to a service
    removed: list[Seen] = []
    created: list[Seen] = []  # a service with its endpoints
    deleted: list[Seen] = []
    with_defaults: list[Seen] = []  # an endpoint added, minSyncPeriod as it comes
    change_sync: float | None = None  # mean of the agent's own figures, one endpoint added or removed
    change_cpu: float | None = None  # of one change, each after quiet
    burst: float | None = None  # first of the changes made to the last write
    burst_cpu: float | None = None
    churn_cpu: float | None = None  # of one change in a steady stream
    churn_own_cpu: float | None = None  # of that, in user space and in the agent itself
    churn_syncs: float | None = None  # for each change
    calls: Calls | None = None  # for each kind, of the counted changes
    counted_changes: int = 0
    latency: list[float] = []
    connections_per_second: float | None = None
    memory: int | None = None
    memory_peak: int | None = None


class Runner:
    """Does one Run. `world`'s feed holds `services` services with `endpoints` endpoints each, all of them `target`s."""

    def __init__(self, world: World, feed: Feed, setup: Setup, services: int, plan: Plan, step: Callable[[str], None]):
        self._world = world
        self._feed = feed
        self._plan = plan
        self._step = step
        self._agent = Agent(world, setup)
        self._begun = (0.0, 0.0)  # seconds and number of the syncs of the cold start
        self.run = Run(
            agent=setup.name,
            mode=setup.mode,
            feed=feed.name,
            services=services,
            endpoints=setup.endpoints,
            counting=setup.counting,
        )

    def __call__(self) -> Run:
        """All measures; `failed` says so if it could not be finished, what was found until then stays."""
        flush(self._world)
        eye = self._agent.eye()
        try:
            self._cold(eye)
            if self._agent.setup.counting:
                self._count(eye)
            elif self._agent.setup.defaults:
                self._defaults(eye)
            else:
                self._dataplane()
                self._changes(eye)
                self.run.full_sync = self.run.full_sync or self._first_of(self._begun)
                self._services(eye)
                self._burst(eye)
                self._churn(eye)
                self.run.memory, self.run.memory_peak = self._agent.memory()
                self._restart(eye)
        except (TooLate, OSError) as error:
            self.run.failed = f"{error}\n{self._world.log(self._agent.log)}"
        finally:
            self._agent.stop()
            eye.close()
        return self.run

    # -- measures

    def _cold(self, eye: Eye) -> None:
        self._step("cold start")
        start = time.perf_counter()
        self._agent.start()
        stamp, end = None, start + _COLD_PATIENCE
        while True:
            look = time.perf_counter()
            fresh = eye.stamp()
            if fresh != stamp:
                stamp = fresh
                if eye.services() >= self.run.services:
                    break
            looked = time.perf_counter() - look
            if not self._agent.running or time.perf_counter() > end:
                raise TooLate("the agent does not program the services")
            time.sleep(max(0.002, rest(looked)))
        self.run.started = time.perf_counter() - start
        # kube-proxy's IPVS mode has still to write its sets and chains when all virtual servers are there.
        wait_quiet(self._agent, eye, 1.0, _COLD_PATIENCE)
        self.run.started_cpu = self._agent.cpu()  # not before: what a tool has used shows when it has ended
        self.run.full_sync, self._begun = self._full_sync(), self._syncs()

    def _dataplane(self) -> None:
        self._step("connections")
        everything = [(target(n, 1).vip, 80) for n in range(self.run.services)]
        found = dataplane(self._world, everything, self._plan.connections, SEED)
        self.run.latency, self.run.connections_per_second = found.latency, found.per_second

    def _changes(self, eye: Eye) -> None:
        self._step("one endpoint added, removed")
        before, used = self._syncs(), self._agent.cpu()
        for index in range(self._plan.changes):
            self.run.added.append(self._add_endpoint(eye, self._pick(index)))
            wait_quiet(self._agent, eye, 0.15)
            self.run.removed.append(self._remove_endpoint(eye, self._pick(index)))
            wait_quiet(self._agent, eye, 0.15)
        self.run.change_cpu = (self._agent.cpu() - used) / (2 * self._plan.changes)
        self.run.change_sync = self._mean_sync(before)

    def _services(self, eye: Eye) -> None:
        self._step("one service created, deleted")
        for index in range(self._plan.changes):
            new = target(_SPARE + index, self.run.endpoints)
            create, delete = partial(self._feed.create, new), partial(self._feed.delete, new)
            self.run.created.append(follow(self._world, eye, create, partial(_answers, new.vip)))
            wait_quiet(self._agent, eye, 0.15)
            self.run.deleted.append(follow(self._world, eye, delete, partial(_refuses, new.vip)))
            wait_quiet(self._agent, eye, 0.15)

    def _burst(self, eye: Eye) -> None:
        self._step(f"burst of {self._plan.burst} changes")
        targets = [self._pick(index) for index in range(self._plan.burst)]
        used, start = self._agent.cpu(), time.perf_counter()
        for each in targets:
            self._feed.update(_with_another(each))
        last = _with_another(targets[-1]).endpoints[-1]
        follow(self._world, eye, lambda: None, lambda: ask(targets[-1].vip) == last)
        self.run.burst = time.perf_counter() - start
        wait_quiet(self._agent, eye)
        self.run.burst_cpu = self._agent.cpu() - used
        for each in targets:
            self._feed.update(each)
        wait_quiet(self._agent, eye)

    def _churn(self, eye: Eye) -> None:
        self._step(f"{self._plan.churn} changes, {self._plan.churn_rate:g} a second")
        (_, syncs), used, own = self._syncs(), self._agent.cpu(), self._agent.own_cpu()
        start = time.perf_counter()
        for index in range(self._plan.churn):
            picked = self._pick(index // 2)
            self._feed.update(picked if index % 2 else _with_another(picked))
            time.sleep(max(0.0, start + (index + 1) / self._plan.churn_rate - time.perf_counter()))
        wait_quiet(self._agent, eye)
        self.run.churn_cpu = (self._agent.cpu() - used) / self._plan.churn
        self.run.churn_own_cpu = (self._agent.own_cpu() - own) / self._plan.churn
        self.run.churn_syncs = (self._syncs()[1] - syncs) / self._plan.churn

    def _restart(self, eye: Eye) -> None:
        self._step("restart")
        self._agent.stop()
        start = time.time()
        self._agent.start()
        end = time.monotonic() + _COLD_PATIENCE
        while not (done := self._first_sync()):
            if not self._agent.running or time.monotonic() > end:
                raise TooLate("the agent does not come back")
            wait_quiet(self._agent, eye, 1.0)
        self.run.restarted = done - start
        self.run.restarted_cpu = self._agent.cpu()
        self.run.restart_sync = self._full_sync() or self._first_of(self._syncs())

    def _defaults(self, eye: Eye) -> None:
        self._step("default settings")
        for index in range(self._plan.defaults):
            time.sleep(2.5)
            self.run.with_defaults.append(self._add_endpoint(eye, self._pick(index)))
            time.sleep(2.5)
            self._remove_endpoint(eye, self._pick(index))

    def _count(self, eye: Eye) -> None:
        """Endpoints added and removed, with wrappers around the tools, so without a clock."""
        self._step("counting")
        operations = self._operations()
        self._agent.tools.start_counting()
        for index in range(self._plan.changes):
            self._add_endpoint(eye, self._pick(index))
            wait_quiet(self._agent, eye)
            self._remove_endpoint(eye, self._pick(index))
            wait_quiet(self._agent, eye)
        self.run.counted_changes = 2 * self._plan.changes
        told = self._agent.tools.counted()
        # An agent that does without tools says itself what it had the kernel do.
        own = round(self._operations() - operations)
        self.run.calls = told._replace(operations=max(told.operations, own))

    # -- steps

    def _add_endpoint(self, eye: Eye, before: Target) -> Seen:
        after = _with_another(before)
        return follow(self._world, eye, lambda: self._feed.update(after), lambda: ask(after.vip) == after.endpoints[-1])

    def _remove_endpoint(self, eye: Eye, after: Target) -> Seen:
        return written(lambda: eye.endpoints(after.service_name), lambda: self._feed.update(after))

    def _pick(self, index: int) -> Target:
        """The service of the index'th change: spread over all of them."""
        return target((index * 7919 + SEED) % self.run.services, self.run.endpoints)

    # -- the agent's own figures

    def _syncs(self, kind: str = "") -> tuple[float, float]:
        """(seconds, number) of the syncs of IPv4 so far; both 0 where the agent does not say."""
        name = f"kubeproxy_sync_{kind and kind + '_'}proxy_rules_duration_seconds"
        found = self._agent.metrics()
        return (
            found.get(f'{name}_sum{{ip_family="IPv4"}}', 0.0),
            found.get(f'{name}_count{{ip_family="IPv4"}}', 0.0),
        )

    def _full_sync(self) -> float | None:
        """Seconds of the full sync since the agent began; None where it does not say."""
        total, count = self._syncs("full")
        return total if count else None

    def _first_of(self, syncs: tuple[float, float]) -> float | None:
        """Where an agent does not tell full syncs from others, as kube-proxy in IPVS mode: less those that followed."""
        total, count = syncs
        return max(0.0, total - (count - 1) * (self.run.change_sync or 0.0)) if count else None

    def _first_sync(self) -> float:
        """When (Unix seconds) the first sync of IPv4 ended; 0 before. Asked when all is quiet, so as not to disturb."""
        last = self._agent.metrics().get('kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}', 0.0)
        # Another may have followed at once; then the first ended before it by no less than it took.
        return last - self._syncs("partial")[0] if last else 0.0

    def _mean_sync(self, before: tuple[float, float]) -> float | None:
        total, count = self._syncs()
        return (total - before[0]) / (count - before[1]) if count > before[1] else None

    def _operations(self) -> float:
        """What the agent says it has asked of the kernel; 0 where it does not say."""
        found = self._agent.metrics()
        return sum(v for name, v in found.items() if name.startswith("miniproxy_transaction_operations_total{"))


def _with_another(before: Target) -> Target:
    return before._replace(hosts=(*before.hosts, before.hosts[-1] + 1))


def _answers(address: str) -> bool:
    return ask(address) != ""


def _refuses(address: str) -> bool:
    return ask(address) == ""
