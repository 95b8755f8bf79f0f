"""The plots, by number of services: sync time, first-packet latency, CPU of one change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .agents import AgentName, Mode
from .results import BY_NAME, Case, Figure, Results, Spread, spread

_COLOURS = {"iptables-nft": "#1f77b4", "iptables-legacy": "#9467bd", "nftables": "#2ca02c", "ipvs": "#d62728"}
_STYLES: dict[AgentName, str] = {"miniproxy": "-", "kube-proxy": "--", "python-iptables": ":", "tools": ":"}
_MARKERS: dict[AgentName, str] = {"miniproxy": "o", "kube-proxy": "s", "python-iptables": "x", "tools": "+"}

# file name → title and the figures side by side
PLOTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sync-time": ("Sync time: everything, and one change", ("full_sync", "change_sync")),
    "first-packet": ("First packet to a service and its answer", ("latency",)),
    "cpu-per-change": ("CPU of one endpoint change, tools included", ("change_cpu",)),
}


def draw(results: Results, output: Path) -> list[Path]:
    """Write each plot as SVG; those without figures are left out. Returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "miniproxy"  # the same figures give the same file
    files = []
    for name, (title, figures) in PLOTS.items():
        present = [BY_NAME[figure] for figure in figures if _lines(results, BY_NAME[figure])]
        if present:
            files.append(_plot(results, title, present, output / f"{name}.svg"))
    return files


def _plot(results: Results, title: str, figures: Sequence[Figure], path: Path) -> Path:
    from matplotlib import pyplot

    picture, all_axes = pyplot.subplots(1, len(figures), figsize=(6.2 * len(figures), 4.4), squeeze=False)
    for axes, figure in zip(all_axes[0], figures, strict=True):
        for (agent, mode), points in _lines(results, figure).items():
            factor = 1e6 if figure.name == "latency" else 1e3
            middle = [found.median * factor for _, found in points]
            # The latencies of single connections spread widely, and that is not the plot's point.
            spans = [(f.median - f.low, f.high - f.median) for _, f in points] if figure.name != "latency" else []
            axes.errorbar(
                [services for services, _ in points],
                middle,
                yerr=[[span[side] * factor for span in spans] for side in (0, 1)] if spans else None,
                color=_COLOURS[mode],
                linestyle=_STYLES[agent],
                marker=_MARKERS[agent],
                capsize=3,
                label=f"{mode}, {agent}",
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("services")
        axes.set_ylabel(f"{figure.title} [{'µs' if figure.name == 'latency' else 'ms'}]")
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    where = sorted({run.environment for run in results.runs if run.environment})
    endpoints = sorted({run.endpoints for run in results.runs})
    per_service = f"{'/'.join(map(str, endpoints))} endpoints per service"
    picture.suptitle(f"{title} ({per_service}{', in ' + ', '.join(where) if where else ''})")
    lines, labels = all_axes[0][0].get_legend_handles_labels()
    columns = 2 * len(figures)
    picture.legend(lines, labels, loc="lower center", ncols=columns, fontsize="small", frameon=False)
    picture.tight_layout(rect=(0, 0.06 * -(-len(labels) // columns), 1, 1))
    picture.savefig(path, metadata={"Date": None})
    pyplot.close(picture)
    return path


def _lines(results: Results, figure: Figure) -> dict[tuple[AgentName, Mode], list[tuple[int, Spread]]]:
    """Points by services, for each agent and mode that has any."""
    lines: dict[tuple[AgentName, Mode], list[tuple[int, Spread]]] = {}
    for mode in dict.fromkeys(run.mode for run in results.runs):
        for agent in _STYLES:
            points = []
            for services in sorted({run.services for run in results.runs}):
                found = spread(results.runs, Case(agent, mode, services), figure)
                if found:
                    points.append((services, found))
            if points:
                lines[agent, mode] = points
    return lines
