"""miniproxy bench: measure this machine, and write results, tables and plots."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import Failure

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.campaign import Options, Progress, Step

MODES = ("iptables-nft", "iptables-legacy", "nftables", "ipvs")
AGENTS = ("miniproxy", "kube-proxy")


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Positive numbers separated by commas; None if the option is not given."""
    if value is None:
        return None
    try:
        numbers = tuple(sorted({int(part) for part in value.split(",") if part.strip()}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 100,1000") from None
    if any(number < 1 for number in numbers):
        raise click.BadParameter(f"{value!r}: numbers must be 1 or more")
    return numbers


def _names(known: tuple[str, ...], given: str, option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint=option)
    return names


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes, few repetitions: two minutes.")
@click.option(
    "--sizes",
    callback=_numbers,
    metavar="NUMBERS",
    help="Numbers of services.  [default: 100,1000,5000; quick: 100,500]",
)
@click.option(
    "--more-sizes",
    callback=_numbers,
    metavar="NUMBERS",
    help="And these for miniproxy alone.  [default: 10000; quick: none]",
)
@click.option("--endpoints", type=click.IntRange(1, 16), default=2, show_default=True, help="Of each service.")
@click.option("--modes", help=f"Of {', '.join(MODES)}.  [default: those this kernel has]")
@click.option("--agents", default=",".join(AGENTS), show_default=True, help="kube-proxy needs its programs.")
@click.option("--pairs", type=click.IntRange(1), help="Runs of each agent, mode and size.  [default: 2; quick: 1]")
@click.option("--kubernetes", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER",
              help="With etcd, kube-apiserver, kube-proxy.  [default: $KUBEBUILDER_ASSETS, PATH]")  # fmt: skip
@click.option("--manifests", is_flag=True, help="Read manifests even where an API server is at hand.")
@click.option("--uml", is_flag=True, help="Do it all inside user-mode Linux, which has IPVS where this kernel has not.")
@click.option("--environment", default="", help="Words for what this runs in, if it is not a machine of its own.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("benchmarks"),
              show_default=True, help="For results.json, README.md and plots.")  # fmt: skip
@click.option("--report", is_flag=True, help="Measure nothing: make tables and plots from results.json anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of tables.")
def command(
    quick: bool,
    sizes: tuple[int, ...] | None,
    more_sizes: tuple[int, ...] | None,
    endpoints: int,
    modes: str | None,
    agents: str,
    pairs: int | None,
    kubernetes: Path | None,
    manifests: bool,
    uml: bool,
    environment: str,
    output: Path,
    report: bool,
    as_json: bool,
) -> None:
    """Measure how fast the kernel follows: each agent in each mode at each size, in throw-away namespaces.

    Both agents read the same objects from the same API server, with minSyncPeriod 1 ms, in turn. Where no API server
    is at hand, miniproxy is measured alone, from manifests. Ctrl-C is safe: what was measured is reported. Needs
    root; the machine's own network stays untouched.

    \b
    Examples:
      sudo miniproxy bench --quick
      sudo miniproxy bench --modes nftables --sizes 100,1000,5000,10000 --more-sizes '' --agents miniproxy
      sudo miniproxy bench --uml --modes iptables-legacy,ipvs --sizes 50,200 --more-sizes 1000 --pairs 1
      sudo hack/bench                                   the standard run, with the Kubernetes programs built first
    """
    import msgspec
    from rich.console import Console

    from ..bench import report as reporting
    from ..bench.results import load
    from ..lab.netns import LabError, require_system

    console = Console(stderr=True, highlight=False)
    if uml:
        raise SystemExit(_inside_uml(sys.argv[1:]))
    if report:
        try:
            results = load(output / "results.json")
        except (OSError, msgspec.DecodeError) as error:
            raise Failure(f"cannot read {output / 'results.json'}: {error}") from None
    else:
        options = _options(quick, sizes, more_sizes, endpoints, modes, agents, pairs, environment)
        try:
            require_system()
            results = _measure(console, options, None if manifests else _folders(kubernetes), output)
        except LabError as error:
            raise Failure(str(error)) from None
    written = reporting.write(results, output)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(results), indent=1))
    else:
        click.echo(reporting.markdown(results))
    console.print(f"written: {', '.join(str(path) for path in written)}")
    for run in results.runs:
        if run.failed:
            console.print(f"failed: {run.agent}, {run.mode}, {run.services} services: {run.failed}", markup=False)
    if results.interrupted:
        raise SystemExit(130)
    if any(run.failed for run in results.runs):
        raise SystemExit(1)


def _options(
    quick: bool,
    sizes: tuple[int, ...] | None,
    more_sizes: tuple[int, ...] | None,
    endpoints: int,
    modes: str | None,
    agents: str,
    pairs: int | None,
    environment: str,
) -> Options:
    from ..bench import kernel
    from ..bench.campaign import Options
    from ..bench.run import Plan

    chosen = _names(MODES, modes, "--modes") if modes is not None else kernel.modes()
    sizes = sizes if sizes is not None else (100, 500) if quick else (100, 1000, 5000)
    more = more_sizes if more_sizes is not None else () if quick or not sizes else (10000,)
    middle = sizes[len(sizes) // 2] if sizes else 0
    plan = Plan(changes=2, burst=50, churn=20, connections=100) if quick else Plan(defaults=5)
    return Options(
        modes=chosen,  # type: ignore[arg-type]
        sizes=sizes,
        more_sizes=tuple(size for size in more if size not in sizes),
        endpoints=endpoints,
        pairs=pairs or (1 if quick else 2),
        agents=_names(AGENTS, agents, "--agents"),  # type: ignore[arg-type]
        plan=plan,
        defaults_at=0 if quick else middle,
        counting_at=0 if quick else middle,
        environment=environment,
    )


def _inside_uml(arguments: list[str]) -> int:
    """The same command in a machine of its own; its exit code."""
    from ..lab import uml

    if not uml.available():
        raise Failure(f"user-mode Linux is not installed: {uml.HOW_TO_GET_IT}")
    again = [argument for argument in arguments if argument != "--uml"]
    assets = os.environ.get("KUBEBUILDER_ASSETS")  # the machine inside has an environment of its own
    if assets and "--manifests" not in again and not any(each.startswith("--kubernetes") for each in again):
        again += ["--kubernetes", assets]
    return uml.run([sys.executable, "-m", "miniproxy", *again, "--environment", "user-mode Linux, one CPU"])


def _folders(given: Path | None) -> list[Path]:
    if given:
        return [given]
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    return [Path(assets)] if assets else []


def _measure(console: Console, options: Options, folders: list[Path] | None, output: Path):  # type: ignore[no-untyped-def]
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench import campaign
    from ..bench.apiserver import find

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # both are an interruption that reports what there is
    programs = find(folders) if folders is not None else None
    if programs is None or programs.kube_proxy is None:
        console.print("no API server or kube-proxy at hand (hack/build-kubernetes makes them): miniproxy alone")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        return campaign.run(options, programs, output, _progress(bars))


def _progress(bars) -> Progress:  # type: ignore[no-untyped-def]
    from ..bench.campaign import Progress

    runs = bars.add_task("starting", total=None)
    objects = bars.add_task("objects", total=None, visible=False)
    label = ""

    def loading(count: int) -> None:
        bars.reset(objects, total=count, visible=True, description="loading objects")

    def begin(step: Step) -> None:
        nonlocal label
        label = str(step)
        bars.update(objects, visible=False)
        bars.update(runs, description=label)

    return Progress(
        total=lambda count: bars.update(runs, total=count),
        loading=loading,
        loaded=lambda count: bars.advance(objects, count),
        begin=begin,
        doing=lambda what: bars.update(runs, description=f"{label}: {what}"),
        done=lambda: bars.advance(runs),
    )
