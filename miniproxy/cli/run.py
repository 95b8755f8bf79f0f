"""miniproxy run: the agent of one node."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import click

from .. import log as logs
from ..config import ConfigError, Loaded, Settings, load
from ..kernel import host
from ..log import fields
from .errors import Failure
from .options import SettingsCommand, announce, settings_options, source_or_fail

if TYPE_CHECKING:
    from ..backends import Dataplane
    from ..syncloop import Command, SyncLoop

log = logs.get("run")

_WATCH_AGAIN = 5.0  # seconds


@click.command(cls=SettingsCommand)
@click.option("--init-only", is_flag=True, help="Do what takes full root rights (modules, kernel settings), and end.")
@settings_options
def command(loaded: Loaded, init_only: bool) -> None:
    """Program this node's kernel, and keep it up to date, until told to stop.

    It reads Services, EndpointSlices and its own Node from the API server (--kubeconfig; in a pod, its service
    account) or from a folder of manifests (--source), adopts what is right in the kernel already, and from then on
    writes what changes. On SIGTERM it ends and leaves all rules in place, so that connections go on while it is
    restarted or replaced; `miniproxy cleanup` removes them. On SIGHUP it reads its configuration again.

    \b
    Examples:
      miniproxy run --kubeconfig /var/lib/kube-proxy/kubeconfig.conf --hostname-override node1
      miniproxy run --source /etc/miniproxy/manifests --hostname-override node1
      miniproxy run --config /var/lib/kube-proxy/config.conf --source ./manifests
      miniproxy run --config config.conf --init-only            then run the agent with NET_ADMIN and no more
    """
    # What is known of a large cluster is hundreds of thousands of objects without a cycle among them: looking through
    # them for garbage as often as Python does by itself costs a quarter of a sync from nothing.
    gc.set_threshold(100_000, 50, 10)
    announce(loaded)
    if init_only:
        _initialize(loaded)
        return
    signals = _Signals()
    dataplane = None
    while _serve(loaded, dataplane, signals) == "reload":
        loaded, dataplane = _reload(loaded)
    log.info("stopped; the rules stay and keep serving")


def _initialize(loaded: Loaded) -> None:
    """Prepare the kernel for an agent that, from then on, needs NET_ADMIN only."""
    settings = loaded.settings
    host.load_modules(host.modules(settings))
    _dataplane(settings)
    log.info("the kernel is prepared", extra=fields(mode=settings.mode))


class _Signals:
    """Hands signals to whoever serves, as commands; what comes while nobody does waits for the next.

    A thread reads them from where the interpreter writes them at once. Handlers run in the main thread, which does not
    notice a signal that comes just before it begins to wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: SyncLoop | None = None
        self._waiting: list[Command] = []
        self._taken = False

    def go_to(self, loop: SyncLoop) -> None:
        with self._lock:
            for command in self._waiting:
                loop.inbox.put(command)
            self._waiting.clear()
            self._loop = loop
        if not self._taken:
            self._take()

    def wait(self) -> None:
        """From now on keep what comes, and what the loop has not taken."""
        with self._lock:
            if self._loop is not None:
                self._waiting += self._loop.commands_left()
                self._loop = None

    def _take(self) -> None:
        self._taken = True
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._follow, args=(readable,), name="signals", daemon=True).start()

    def _follow(self, readable: int) -> None:
        while True:
            for number in os.read(readable, 64):
                command: Command = "reload" if number == signal.SIGHUP else "stop"
                with self._lock:
                    if self._loop is None:
                        self._waiting.append(command)
                    else:
                        self._loop.inbox.put(command)


def _serve(loaded: Loaded, dataplane: Dataplane | None, signals: _Signals) -> str:
    """Run with one configuration until a signal ends it; says which: "stop" or "reload"."""
    settings = loaded.settings
    host.set_oom_score(settings.oom_score_adj)
    source = source_or_fail(settings)
    stop = threading.Event()
    # The source lists while all the rest is loaded and the kernel is read; what it finds waits for the loop.
    looping: Future[SyncLoop] = Future()
    feed = (lambda batch: looping.result().deliver(batch)), stop
    thread = threading.Thread(target=source.run, args=feed, name="source", daemon=True)
    thread.start()

    from ..agent import Agent
    from ..backends import leave_other_modes
    from ..kernel import conntrack
    from ..kernel.links import local_addresses
    from ..kernel.sysctl import forwarding_problem
    from ..monitoring import Monitoring
    from ..syncloop import SyncLoop

    dataplane = dataplane or _dataplane(settings)
    monitoring = Monitoring(settings, list(dataplane.backends), source, local_addresses)
    agent = Agent(
        settings,
        dataplane.planner,
        monitoring.backends(dataplane.backends),
        local_addresses=local_addresses,
        conntrack=monitoring.conntrack(conntrack),
        review=dataplane.review,
        observer=monitoring.observer,
    )
    for problem in filter(None, map(forwarding_problem, agent.reconcilers)):
        log.warning("%s", problem)

    loop = SyncLoop(
        agent,
        observer=monitoring.observer,
        tick=dataplane.tick,
        settled=lambda: leave_other_modes(settings.mode),
    )

    signals.go_to(loop)
    monitoring.start(stop_agent=lambda: loop.inbox.put("stop"))
    threading.Thread(target=_watch_addresses, args=(loop.addresses_changed, stop), daemon=True).start()
    looping.set_result(loop)
    log.info("started", extra=fields(mode=settings.mode, node=settings.node_name, source=str(source)))
    try:
        agent.look()
        command = loop.run()
    finally:
        signals.wait()
        stop.set()
        thread.join(timeout=5)
        monitoring.stop()
    if monitoring.fatal:
        raise Failure(monitoring.fatal)
    return command


def _watch_addresses(changed: Callable[[], None], stop: threading.Event) -> None:
    from ..kernel import links

    while not stop.is_set():
        try:
            links.watch(changed, stop.is_set)
        except OSError as error:
            log.warning("cannot watch the node's addresses, trying again: %s", error)
            stop.wait(_WATCH_AGAIN)
            changed()


def _dataplane(settings: Settings) -> Dataplane:
    """The mode's dataplane, the kernel ready for it."""
    from ..backends import choose
    from ..transaction import TransactionError

    dataplane = choose(settings)
    try:
        dataplane.prepare()
    except (ValueError, TransactionError) as error:
        raise Failure(str(error)) from None
    host.prepare_conntrack(settings)
    return dataplane


def _reload(loaded: Loaded) -> tuple[Loaded, Dataplane | None]:
    """Read the configuration again; one that cannot be used is reported, and the old one stays."""
    try:
        fresh = load(loaded.config_file, loaded.flags)
        source_or_fail(fresh.settings)
        dataplane = _dataplane(fresh.settings)
    except (ConfigError, Failure) as error:
        for problem in error.problems if isinstance(error, ConfigError) else error.lines:
            log.error("configuration not reloaded, the old one stays: %s", problem)
        return loaded, None
    announce(fresh)
    return fresh, dataplane
