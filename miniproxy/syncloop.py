"""When to sync: at once after quiet, never more often than minSyncPeriod in a burst, again after a failure, and
every syncPeriod to look for drift. It runs in the one thread that owns the kernel; sources only put into its queue.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from .agent import Agent
from .log import fields
from .model import Batch
from .observer import Observer

log = logging.getLogger(__name__)

Command = Literal["stop", "reload"]
Moment = Literal["now", "later", "never"]
_RETRY_FIRST = 0.1  # seconds; doubled at each further failure
_RETRY_MOST = 30.0
_CHECK_SHARE = 0.01  # of all time may go into looking for drift


class Pacer:
    """Says when the next sync may start: a bucket of two that refills once per `min_interval` seconds.

    Two, as in kube-proxy: a new Service and its EndpointSlice arrive one after the other, and the second should
    not wait.
    """

    BURST = 2.0

    def __init__(self, min_interval: float, now: float) -> None:
        self.min_interval = min_interval
        self._tokens = self.BURST
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until a sync may start."""
        self._refill(now)
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) * self.min_interval

    def started(self, now: float) -> None:
        self._refill(now)
        self._tokens = max(0.0, self._tokens - 1)

    def _refill(self, now: float) -> None:
        if self.min_interval <= 0:
            self._tokens = self.BURST
        else:
            self._tokens = min(self.BURST, self._tokens + (now - self._at) / self.min_interval)
        self._at = now


class SyncLoop:
    """Feeds an Agent from a queue until told to stop."""

    def __init__(
        self,
        agent: Agent,
        *,
        observer: Observer | None = None,
        tick: Callable[[], float] = lambda: float("inf"),
        settled: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.agent = agent
        self.inbox: queue.SimpleQueue[Batch | Command | Literal["addresses"]] = queue.SimpleQueue()
        self._observer = observer or Observer()
        self._tick = tick  # does what is due besides syncing; says when to be called again, by the clock
        self._tick_at = float("inf")
        self._settled = settled  # to be called when everything has been written, until it says that all is done
        self._settle: Moment = "now"  # "later": with the next look for drift
        self._clock = clock
        self._taken = 0  # batches folded in
        now = clock()
        self._pacer = Pacer(agent.settings.min_sync_period, now)
        self._check_at = now + agent.settings.sync_period
        self._retry_at: float | None = None
        self._failures = 0
        self._dirty = False

    def deliver(self, batch: Batch) -> None:
        """For sources, from any thread."""
        self._observer.delivered(batch)
        self.inbox.put(batch)

    def addresses_changed(self) -> None:
        """For whoever watches the node's addresses, from any thread."""
        self.inbox.put("addresses")

    def run(self) -> Command:
        """Until a command arrives; returns it. Everything handed over before it has been folded in."""
        while True:
            command = self._receive()
            if command:
                return command
            self.step()

    def commands_left(self) -> list[Command]:
        """Those that came after the one that ended `run`."""
        left: list[Command] = []
        with suppress(queue.Empty):
            while True:
                item = self.inbox.get_nowait()
                if item in ("stop", "reload"):
                    left.append(item)
        return left

    def step(self) -> None:
        """Do what is due now; nothing before the source has handed over everything there is."""
        if not self.agent.tracker.synced:
            return
        now = self._clock()
        if now >= self._check_at:
            self._check(now)
        if self._due(now) <= now:
            self._sync(now)
        self._tick_at = self._tick()

    def _receive(self) -> Command | None:
        """Wait for something to do, and take in everything that is there."""
        try:
            item = self.inbox.get(timeout=self._patience())
            while True:
                if item == "addresses":
                    self.agent.plan_frame()
                elif isinstance(item, str):
                    return item
                else:
                    self.agent.handle(item)
                    self._taken += 1
                self._dirty = True
                item = self.inbox.get_nowait()
        except queue.Empty:
            return None

    def _patience(self) -> float | None:
        """How long to wait for something to happen; None: until it does, there is nothing to be done before."""
        if not self.agent.tracker.synced:
            return None
        now = self._clock()
        return max(0.0, min(self._due(now), self._check_at, self._tick_at) - now)

    def _due(self, now: float) -> float:
        """When the next sync should start; infinitely late if there is no reason for one.

        What is new does not wait for what failed: it may be of the family that works.
        """
        if self._dirty:
            return now + self._pacer.wait(now)
        return self._retry_at if self._retry_at is not None else float("inf")

    def _sync(self, now: float) -> None:
        self._pacer.started(now)
        self._dirty = False
        results = self.agent.sync()
        took = self._clock() - now
        failed = [r for r in results if r.result is None]
        for r in failed:
            log.error("sync failed, the kernel keeps what it has: %s", r.error, extra=fields(family=r.family))
        if failed:
            self._failures += 1
            delay = min(_RETRY_MOST, _RETRY_FIRST * 2 ** min(self._failures - 1, 10))
            self._retry_at = self._clock() + delay
        else:
            self._failures = 0
            self._retry_at = None
            if self._settle == "now":
                self._settle = "never" if self._settled() else "later"
        self._observer.synced(results, self.agent.tracker.take_triggers(), took, self._taken)

    def _check(self, now: float) -> None:
        drift = self.agent.check()
        if self._settle == "later":
            self._settle = "now"
        # With very many services reading takes long; it may not take more than its share of the time.
        took = self._clock() - now
        self._check_at = now + max(self.agent.settings.sync_period, took / _CHECK_SHARE)
        for family, count in drift.items():
            if count > 0:
                self._observer.drifted(family, count)
                log.warning(
                    "found %d objects changed by somebody else, repairing",
                    count,
                    extra=fields(family=family),
                )
        self._dirty = True
