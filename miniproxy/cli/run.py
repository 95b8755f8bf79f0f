"""miniproxy run: the agent of one node."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import click

from .. import log as logs
from ..config import ConfigError, Loaded, load
from ..log import fields
from .errors import Failure
from .options import SettingsCommand, announce, settings_options

log = logs.get("run")


@click.command(cls=SettingsCommand)
@settings_options
@click.pass_context
def command(ctx: click.Context, loaded: Loaded) -> None:
    """Program this node's kernel, and keep it up to date, until told to stop.

    It reads Services, EndpointSlices and its own Node from the API server (--kubeconfig; in a pod, its service
    account) or from a folder of manifests (--source), adopts what is right in the kernel already, and from then on
    writes what changes. On SIGTERM it ends and leaves all rules in place,
    so that connections go on while it is restarted or replaced; `miniproxy cleanup` removes them. On SIGHUP it
    reads its configuration again.

    \b
    Examples:
      miniproxy run --kubeconfig /var/lib/kube-proxy/kubeconfig.conf --hostname-override node1
      miniproxy run --source /etc/miniproxy/manifests --hostname-override node1
      miniproxy run --config /var/lib/kube-proxy/config.conf --source ./manifests
    """
    announce(loaded)
    while _serve(loaded) == "reload":
        loaded = _reload(ctx, loaded)
    log.info("stopped; the rules stay and keep serving")


def _serve(loaded: Loaded) -> str:
    """Run with one configuration until a signal ends it; says which: "stop" or "reload"."""
    from .. import sources
    from ..agent import Agent
    from ..backends import choose
    from ..kernel import conntrack
    from ..kernel.links import local_addresses
    from ..kernel.sysctl import forwarding_problem
    from ..report import SyncLog
    from ..syncloop import SyncLoop

    settings = loaded.settings
    try:
        source = sources.choose(settings)
    except ValueError as error:
        raise Failure(str(error), code=2) from None
    try:
        dataplane = choose(settings)
    except ValueError as error:
        raise Failure(str(error)) from None
    dataplane.prepare()
    observer = SyncLog()
    agent = Agent(
        settings,
        dataplane.planner,
        dataplane.backends,
        local_addresses=local_addresses,
        conntrack=conntrack,
        observer=observer,
    )
    for problem in filter(None, map(forwarding_problem, agent.reconcilers)):
        log.warning("%s", problem)

    loop = SyncLoop(agent, observer=observer)
    stop = threading.Event()
    thread = threading.Thread(target=source.run, args=(loop.deliver, stop), name="source", daemon=True)

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.inbox.put("reload" if number == signal.SIGHUP else "stop")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    thread.start()
    log.info("started", extra=fields(mode=settings.mode, node=settings.node_name, source=str(source)))
    try:
        return loop.run()
    finally:
        stop.set()
        thread.join(timeout=5)


def _reload(ctx: click.Context, loaded: Loaded) -> Loaded:
    """Read the configuration again; a broken one is reported, and the old one stays."""
    flags = {name: value for name, value in ctx.params.items() if name != "config_file"}
    try:
        fresh = load(ctx.params["config_file"], flags)
    except ConfigError as error:
        for problem in error.problems:
            log.error("configuration not reloaded, the old one stays: %s", problem)
        return loaded
    announce(fresh)
    return fresh
