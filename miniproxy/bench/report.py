"""Results in words: README.md with the tables, and the plots beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .agents import AgentName, Mode
from .results import BY_NAME, FIGURES, Case, Figure, Results, Spread, ratio, slope, spread

_HEADLINE = ("full_sync", "started", "restart_sync", "restarted", "change_sync", "change_cpu", "added", "memory")
_BY_SIZE = ("full_sync", "change_sync", "added", "change_cpu", "churn_own_cpu", "latency", "memory")
_NAMES: tuple[AgentName, ...] = ("miniproxy", "kube-proxy")


def write(results: Results, output: Path) -> list[Path]:
    """Write README.md and plots; returns what was written. `output` has results.json already.

    Without matplotlib, which only developers need, there are no plots.
    """
    from . import plots

    page = output / "README.md"
    try:
        pictures = plots.draw(results, output)
    except ModuleNotFoundError:
        pictures = []
    others = sorted(other.parent.name for other in output.glob("*/README.md"))
    page.write_text(markdown(results, [picture.name for picture in pictures], others))
    return [output / "results.json", page, *pictures]


def markdown(results: Results, pictures: Sequence[str] = (), others: Sequence[str] = ()) -> str:
    """The whole page; `others` are folders beside it with results of other runs."""
    parts = ["# Benchmarks", _introduction(results), *(_picture(name) for name in pictures)]
    if others:
        parts.append("Other runs: " + ", ".join(f"[{name}]({name}/README.md)" for name in others))
    modes = _modes(results)
    both = _shared(results)
    if both:
        parts += ["## miniproxy / kube-proxy", _ratios(results, modes, both)]
    for mode in modes:
        parts += [f"## {mode}", *_mode(results, mode)]
    parts += ["## Growth", _growth(results, modes), "## How to repeat it", _REPEAT, "## How it was measured", _METHOD]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(results: Results) -> str:
    machine = results.machine
    lines = [
        f"- {machine.processor}, {machine.cores} cores, {machine.memory / 2**30:.1f} GiB; {machine.kernel}; "
        f"{machine.python}",
        *(f"- {name}: {version}" for name, version in machine.tools.items()),
        f"- began {machine.began}, took {machine.seconds / 60:.1f} minutes; load average {machine.load_before:.1f} "
        f"before, {machine.load_after:.1f} after",
    ]
    lines += [
        f"- **measured in {where}**: compare with other figures from there only" for where in _environments(results)
    ]
    lines += [f"- {note}" for note in results.notes]
    if results.interrupted:
        lines.append("- **interrupted**: some runs are missing")
    for run in results.runs:
        if run.failed:
            why = run.failed.splitlines()[0]
            lines.append(f"- {run.agent}, {run.mode}, {run.services} services did not finish: {why}")
    return "Medians, with (least – most).\n\n" + "\n".join(lines)


def _environments(results: Results) -> list[str]:
    return sorted({run.environment for run in results.runs if run.environment})


def _picture(name: str) -> str:
    return f"![{Path(name).stem.replace('-', ' ')}]({name})"


def _modes(results: Results) -> list[Mode]:
    return list(dict.fromkeys(run.mode for run in results.runs))


def _sizes(results: Results, agent: AgentName | None = None, mode: Mode | None = None) -> list[int]:
    mine = (run for run in results.runs if agent in (None, run.agent) and mode in (None, run.mode))
    return sorted({run.services for run in mine})


def _shared(results: Results) -> int:
    """The largest size that both agents were measured at; 0: there is none."""
    return max({*_sizes(results, "miniproxy")} & {*_sizes(results, "kube-proxy")}, default=0)


def _ratios(results: Results, modes: Sequence[Mode], services: int) -> str:
    figures = [BY_NAME[name] for name in _HEADLINE]
    rows = []
    for mode in modes:
        size = max({*_sizes(results, "miniproxy", mode)} & {*_sizes(results, "kube-proxy", mode)}, default=0)
        cells = [_ratio(ratio(results.runs, mode, size, figure)) for figure in figures]
        rows.append([f"{mode}, {size:,} services", *cells])
    return "Below 1, miniproxy takes less.\n\n" + _table(["", *(figure.title for figure in figures)], rows)


def _mode(results: Results, mode: Mode) -> Iterator[str]:
    sizes = _sizes(results, None, mode)
    largest = max({*_sizes(results, "kube-proxy", mode)} or sizes)
    rows = []
    for figure in FIGURES:
        places = [(agent, size) for agent in _NAMES for size in (largest, *reversed(sizes))]
        found: list[str] = []
        for agent in _NAMES:
            # What is measured at one size only, the counts for example, is shown with it.
            size = next((s for a, s in places if a == agent and spread(results.runs, Case(a, mode, s), figure)), 0)
            value = spread(results.runs, Case(agent, mode, size), figure)
            found.append(_value(value, figure) + (f" at {size:,}" if value and size != largest else ""))
        if any(found):
            rows.append([figure.title, *found, _ratio(ratio(results.runs, mode, largest, figure))])
    yield f"At {largest:,} services:"
    yield _table(["", *_NAMES, "ratio"], rows)
    yield from filter(None, (_python_iptables(results, mode), _tools(results, mode)))
    if len(sizes) > 1:
        yield "By number of services:"
        head = ["services", *(f"{BY_NAME[name].title}: {agent}" for name in _BY_SIZE for agent in _NAMES)]
        table = []
        for size in sizes:
            cells = [
                _value(spread(results.runs, Case(agent, mode, size), BY_NAME[name]), BY_NAME[name], short=True)
                for name in _BY_SIZE
                for agent in _NAMES
            ]
            table.append([f"{size:,}", *cells])
        yield _table(*_without_empty(head, table))


def _python_iptables(results: Results, mode: Mode) -> str:
    """A line for each size that python-iptables wrote."""
    lines = [
        f"{size:,} services in {_value(full, BY_NAME['full_sync'])}, one endpoint more in "
        f"{_value(change, BY_NAME['change_sync'])}"
        for size in _sizes(results, "python-iptables", mode)
        if (full := spread(results.runs, Case("python-iptables", mode, size), BY_NAME["full_sync"]))
        and (change := spread(results.runs, Case("python-iptables", mode, size), BY_NAME["change_sync"]))
    ]
    return f"For the record, python-iptables as the writer of the same rules: {'; '.join(lines)}." if lines else ""


def _tools(results: Results, mode: Mode) -> str:
    """For each size, how long the system's tools took for the same state, and how miniproxy compares."""
    figure = BY_NAME["full_sync"]
    lines = [
        f"{_value(theirs, figure)} for {size:,} services, to which miniproxy's full sync is as "
        f"{_digits(ours.median / theirs.median)} to 1"
        for size in _sizes(results, "tools", mode)
        if (theirs := spread(results.runs, Case("tools", mode, size), figure))
        and (ours := spread(results.runs, Case("miniproxy", mode, size), figure))
    ]
    tools = "`ipset restore`, `ip -batch` and `ipvsadm --restore`, told the same state as text, take together"
    return f"For the record, {tools} {'; '.join(lines)}." if lines else ""


def _growth(results: Results, modes: Sequence[Mode]) -> str:
    rows = []
    for mode in modes:
        for agent in _NAMES:
            found = [slope(results.runs, agent, mode, BY_NAME[name]) for name in _BY_SIZE]
            if any(value is not None for value in found):
                rows.append([f"{mode}, {agent}", *("" if value is None else f"{value:.2f}" for value in found)])
    if not rows:
        return "One size only: nothing to say."
    explained = "The exponent k in services^k that fits best: 0 does not grow with the cluster, 1 in proportion."
    return explained + "\n\n" + _table(["", *(BY_NAME[name].title for name in _BY_SIZE)], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _ratio(found: Spread | None) -> str:
    if found is None:
        return ""
    span = f" ({_digits(found.low)} – {_digits(found.high)})" if found.figures > 1 else ""
    return f"**{_digits(found.median)}**{span}"


def _value(found: Spread | None, figure: Figure, *, short: bool = False) -> str:
    if found is None:
        return ""
    factor, unit = scale(found.median, figure.unit)
    median, low, high = (_digits(value * factor) for value in found[:3])
    spaced = f" {unit}" if unit else ""
    return f"{median}{spaced}" if short or found.figures == 1 else f"{median}{spaced} ({low} – {high})"


def scale(value: float, unit: str) -> tuple[float, str]:
    """A factor and a unit in which a value reads well."""
    if unit == "s":
        return (1e6, "µs") if value < 1e-3 else (1e3, "ms") if value < 1 else (1.0, "s")
    if unit == "bytes":
        return (1 / 2**20, "MiB") if value >= 2**20 else (1 / 1024, "KiB") if value >= 4096 else (1.0, "bytes")
    return (1.0, "/s") if unit == "1/s" else (1.0, "")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


_REPEAT = """\
    sudo hack/bench                   everything it needs, then the standard run: 20 minutes on 2 cores
    sudo miniproxy bench --quick      two minutes, small sizes; without an API server, miniproxy alone
    sudo hack/bench --uml --modes iptables-legacy,ipvs --sizes 50,200 --more-sizes 1000,5000 --pairs 1 \\
        --output docs/benchmarks/ipvs IPVS where the kernel has none, in user-mode Linux
    sudo hack/bench --sizes 10000 --endpoints 5 --modes iptables-legacy --more-sizes '' --pairs 1 \\
        --output docs/benchmarks/large
    miniproxy bench --report --output docs/benchmarks     tables and plots again from results.json

The same objects in the same order each time (no randomness but which services are connected to, with a fixed seed).
What differs from machine to machine is the absolute figures; compare ratios."""
_METHOD = """\
All in network namespaces of their own: a node, its pods (one server that answers on every endpoint's address), a
client, and a control plane. Both agents read the same objects from the same kube-apiserver, with the same
KubeProxyConfiguration: minSyncPeriod 1 ms, and no periodic sync in the time it takes. They run in turn, A B A B, each
from an empty kernel; ratios are of neighbours. What is there is asked of the kernel directly, every 0.5 to 2 ms: the
number of transactions nf_tables has committed and of rules in KUBE-SERVICES, the entries in the legacy table, the
elements of the map with the service addresses, /proc/net/ip_vs.

- *sync* figures are the agents' own (`kubeproxy_sync_…_duration_seconds`, IPv4): filled caches to programmed kernel.
  kube-proxy's IPVS mode does not say which syncs are full: there, it is all until quiet, less the mean of a change for
  each sync but the first.
- *event to …* begins when the write to the API server (or to the folder) is sent, so its time is in it, and ends with
  the kernel's last write before it worked, or with the first connection that shows the change.
- *CPU* is of the agent and all programs it started, from /proc/PID/stat, over many changes.
- *steady churn*: 100 changes at 20 a second. *burst*: 100 changes as fast as the API server takes them.
- *default settings*: minSyncPeriod 1 s as it comes, one change after 2.5 s of quiet.
- processes, bytes and operations are counted in runs of their own, by wrappers around the tools: what an agent asks of
  the kernel by itself is in no process and no bytes. miniproxy says how many operations that was; kube-proxy's IPVS
  mode does not.
- *first packet*: connect() from the client to a random service and back, one after the other."""
