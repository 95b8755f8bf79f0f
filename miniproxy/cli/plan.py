"""miniproxy plan: what would be programmed, or what differs from what is."""

from __future__ import annotations

import difflib
import json
import threading
from typing import TYPE_CHECKING, Any

import click

from ..config import Loaded
from .errors import Failure
from .options import SettingsCommand, settings_options, source_or_fail

if TYPE_CHECKING:
    from ..agent import Agent
    from ..backends import Dataplane
    from ..model import Batch, Family, Problem


@click.command(cls=SettingsCommand)
@click.option("--family", type=click.Choice(["4", "6", "both"]), default="both", show_default=True)
@click.option("--diff", is_flag=True, help="Compare with the live kernel (needs root); exit code 1 if they differ.")
@click.option("--strict", is_flag=True, help="Exit code 1 if anything is refused, as before a commit of manifests.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text and object count per family, problems.")
@settings_options
def command(loaded: Loaded, family: str, diff: bool, strict: bool, as_json: bool) -> None:
    """Print what `run` would program, as the kernel's own tool would list it. Needs no root, changes nothing.

    \b
    Examples:
      miniproxy plan --source manifests/ --hostname-override node1
      sudo miniproxy plan --source manifests/ --diff        what `run` would change
      miniproxy plan --source manifests/ --strict > /dev/null        is all of it right?
    """
    from ..model import Family

    families = [f for f in Family if family in (str(f.value), "both")]
    agent, problems, _ = planned(loaded, families)
    desired = {f: reconciler.desired.values() for f, reconciler in agent.reconcilers.items()}
    texts = {f: agent.planner.show(objects) for f, objects in desired.items()}
    if diff:
        texts = {f: _difference(agent, f, text) for f, text in texts.items()}
    if as_json:
        result: dict[str, Any] = {str(f): {"objects": len(desired[f]), "text": text} for f, text in texts.items()}
        click.echo(json.dumps({**result, "problems": [str(p) for p in problems]}, indent=2))
    else:
        for problem in problems:
            click.echo(f"refused: {problem}", err=True)
        for text in texts.values():
            click.echo(text, nl=False)
    if (diff and any(texts.values())) or (strict and problems):
        raise SystemExit(1)


def planned(loaded: Loaded, families: list[Family]) -> tuple[Agent, list[Problem], Dataplane]:
    """An agent that knows what the source holds and has planned it for this dataplane, and has written nothing."""
    from ..agent import Agent
    from ..backends import choose
    from ..kernel.links import local_addresses
    from ..problems import News

    settings = loaded.settings
    source = source_or_fail(settings)
    dataplane = choose(settings, probing=False)
    problems: list[Problem] = []

    def collect(news: News) -> None:
        problems.extend(news.appeared)

    agent = Agent(
        settings,
        dataplane.planner,
        {f: backend for f, backend in dataplane.backends.items() if f in families},
        local_addresses=local_addresses,
        announce=collect,
    )
    stop = threading.Event()

    def once(batch: Batch) -> None:
        agent.handle(batch)
        if batch.synced:
            stop.set()
        elif unreadable := [problem for problem in batch.problems if problem.ref.kind in ("API", "File")]:
            ref, reason = unreadable[0].ref, unreadable[0].reason
            raise Failure(reason if ref.kind == "API" else f"{ref.name} {reason}")

    source.run(once, stop)
    agent.replan()
    return agent, problems, dataplane


def _difference(agent: Agent, family: Family, planned_text: str) -> str:
    """A unified diff from the kernel to the plan; "" when they are the same but for spelling."""
    from ..transaction import TransactionError

    reconciler = agent.reconcilers[family]
    try:
        if not reconciler.adopt():
            return ""
    except TransactionError as error:
        raise Failure(f"cannot read the kernel: {error}", "it takes root: try again with sudo") from None
    live = agent.planner.show(reconciler.applied.values())
    lines = difflib.unified_diff(
        live.splitlines(True), planned_text.splitlines(True), f"kernel {family}", f"plan {family}", n=0
    )
    return "".join(lines)
