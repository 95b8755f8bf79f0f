"""miniproxy demo: a minute in the lab that shows what the agent does, and whether it does it right."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from .lab import MODES, VARIANTS, examples, failing_clearly

if TYPE_CHECKING:
    from rich.console import Console

    from ..lab import Lab
    from ..lab.tour import Step

STAY_NAME = "demo"
_BAR = 40  # characters of the longest bar


@click.command()
@click.option("--stay", is_flag=True, help="Leave the lab running at the end, to play with.")
@click.option("--proxy-mode", type=click.Choice(MODES), default="iptables", show_default=True,
              help="What the agents program.")  # fmt: skip
@click.option("--iptables-variant", type=click.Choice(VARIANTS), default="auto", show_default=True,
              help="Which iptables the agents use.")  # fmt: skip
@click.option("--name", help='Name of the lab.  [default: one of its own, or "demo" with --stay]')
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead.")
def command(stay: bool, proxy_mode: str, iptables_variant: str, name: str | None, as_json: bool) -> None:
    """Watch it work: builds a cluster of network namespaces, starts an agent per node, and connects.

    Each step says what should happen, tries it with real connections, and marks whether it did. Exit code 0: all
    of it did; 1: something did not. Needs root; the machine's own network stays untouched.

    \b
    Examples:
      miniproxy demo
      miniproxy demo --iptables-variant legacy
      miniproxy demo --proxy-mode ipvs              in user-mode Linux, if this kernel has no IPVS
      miniproxy demo --stay                         then play: miniproxy lab status --name demo
    """
    import msgspec
    from rich.console import Console

    from ..lab import Lab, LabError, LabSpec, uml
    from ..lab.netns import require_system

    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    # A name of its own, so that it never meets another; only a lab that stays needs one to remember.
    name = name or (STAY_NAME if stay else f"demo{os.getpid()}")
    began = time.monotonic()
    with failing_clearly():
        require_system()
        if proxy_mode == "ipvs" and not uml.has_ip_vs():
            raise SystemExit(_elsewhere(stay, as_json))
        with Lab(LabSpec(name=name)) as lab:
            try:
                steps = _walk(console, lab, proxy_mode, iptables_variant)
            except LabError as error:
                raise LabError(f"{error}\nAll logs are in {_save(lab)}.") from None
            held = all(step.held for step in steps)
            saved = "" if held else str(_save(lab))
            if stay:
                lab.stay()
    seconds = time.monotonic() - began
    if as_json:
        click.echo(json.dumps({"held": held, "seconds": round(seconds, 1), "logs": saved,
                               "steps": msgspec.to_builtins(steps)}, indent=2))  # fmt: skip
    _verdict(console, steps, seconds, saved)
    if stay:
        _how_to_play(console, name, proxy_mode)
    raise SystemExit(0 if held else 1)


def _elsewhere(stay: bool, as_json: bool) -> int:
    """The same demo on a kernel that has IPVS; its exit code."""
    from ..lab import LabError, uml

    if not uml.available():
        raise LabError(f"this machine's kernel has no IPVS: {uml.HOW_TO_GET_IT}")
    if stay:
        raise LabError("this machine's kernel has no IPVS: for a lab that stays, in user-mode Linux, see "
                       "`miniproxy lab up --proxy-mode ipvs`.")  # fmt: skip
    if not as_json:
        click.echo("This machine's kernel has no IPVS, so the demo runs in user-mode Linux: give it a minute or two.")
    options = ["--proxy-mode", "ipvs", *(["--json"] if as_json else [])]
    return uml.run([sys.executable, "-m", "miniproxy", "demo", *options])


def _walk(console: Console, lab: Lab, mode: str, variant: str) -> list[Step]:
    """Starts the agents and takes the tour, printing as it goes."""
    from ..lab.tour import tour

    plan = lab.plan
    console.print(
        f"\n[bold]A cluster of {len(plan.nodes)} nodes with {len(plan.servers)} pods[/], all in network namespaces "
        f"of their own: mp-{lab.spec.name}-…"
    )
    started = time.monotonic()
    lab.start_agents(mode=mode, variant=variant)
    console.print(
        f"An agent on each node programs {len(lab.services)} Services in {mode} mode; "
        f"all of them answer after {time.monotonic() - started:.1f} s."
    )
    steps = []
    for number, step in enumerate(tour(lab), start=1):
        _show(console, number, step)
        steps.append(step)
    return steps


def _show(console: Console, number: int, step: Step) -> None:
    console.print(f"\n[bold]{number}. {escape(step.title)}[/]")
    console.print(f"   {escape(step.about)}", style="dim")
    most = max(step.counts.values(), default=0)
    for pod, count in step.counts.items():
        console.print(f"   {pod:8} [cyan]{'█' * max(1, count * _BAR // most)}[/] {count}")
    for rule in step.rules:
        console.print(f"   [cyan]{escape(rule)}[/]")
    for expectation in step.expectations:
        mark = "[green]✔[/]" if expectation.held else "[red]✘[/]"
        seen = f"  [dim]{escape(expectation.seen)}[/]" if expectation.seen else ""
        console.print(f"   {mark} {escape(expectation.text)}{seen}")


def _verdict(console: Console, steps: list[Step], seconds: float, saved: str) -> None:
    expectations = [expectation for step in steps for expectation in step.expectations]
    held = sum(expectation.held for expectation in expectations)
    if not saved:
        console.print(f"\n[bold green]All {held} expectations held[/], in {seconds:.0f} s.")
        return
    console.print(f"\n[bold red]{len(expectations) - held} of {len(expectations)} expectations did not hold:[/]")
    for step in steps:
        for expectation in step.expectations:
            if not expectation.held:
                console.print(f"  ✘ {escape(f'{step.title}: {expectation.text}')}  {escape(expectation.seen)}")
    console.print(f"The agents' logs, rules and manifests are in {saved}")


def _how_to_play(console: Console, name: str, mode: str) -> None:
    console.print("\nThe lab stays. Try:")
    for line in [f"miniproxy lab status --name {name}", *examples(name, mode)]:
        console.print(f"  {line}", markup=False)


def _save(lab: Lab) -> Path:
    """Keeps what a failure is explained with: the lab itself is gone at the end. Returns the folder."""
    folder = Path(tempfile.mkdtemp(prefix="miniproxy-demo-"))
    for part in ("log", "manifests"):
        shutil.copytree(lab.folder / part, folder / part)
    for node in lab.plan.nodes:
        place = lab.node(node.name)
        for tool in ("iptables-nft-save", "iptables-legacy-save", "ip6tables-nft-save", "ip6tables-legacy-save"):
            if shutil.which(tool):
                (folder / f"{node.name}-{tool}.txt").write_text(place.run(tool, check=False))
    return folder
