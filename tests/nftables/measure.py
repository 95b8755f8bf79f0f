"""What nftables mode costs on this machine, as docs/nftables.md has it: python -m tests.nftables.measure [RUNS]

All in a network namespace; needs root. Prints Markdown: medians of RUNS (5) runs, in milliseconds by the clock and,
in brackets, of processor time, which depends less on what else the machine does.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple

from miniproxy.agent import Agent
from miniproxy.config import Settings
from miniproxy.kernel.nftables import Nftables
from miniproxy.model import Batch, Family, Object, Ref
from miniproxy.planner import nftables
from tests import cluster

from .inside import Inside, inside

SETTINGS = Settings(mode="nftables", node_name="n1", cluster_cidrs=("10.128.0.0/9",), node_port_addresses=("primary",))
SIZES = ((100, 2), (5000, 2), (10_000, 10))
CHANGES = 40  # of each kind, by run


def objects(services: int, endpoints: int) -> tuple[Object, ...]:
    found: list[Object] = []
    for number in range(services):
        found += [cluster.service(number), cluster.endpoints(number, endpoints)]
    return tuple(found)


class Cost(NamedTuple):
    """Milliseconds."""

    clock: float
    processor: float

    def __str__(self) -> str:
        return " (".join(f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in self) + ")"


def middle(costs: Iterable[Cost]) -> Cost:
    clock, processor = zip(*costs, strict=True)
    return Cost(median(clock), median(processor))


def processor_time() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def timed(work: Callable[[], object]) -> Cost:
    start, spent = time.perf_counter(), processor_time()
    work()
    return Cost((time.perf_counter() - start) * 1000, (processor_time() - spent) * 1000)


def fresh(place: Inside, everything: tuple[Object, ...]) -> Agent:
    agent = Agent(SETTINGS, nftables, {Family.V4: place.backend(Family.V4)})
    agent.handle(Batch(everything, synced=True))
    agent.replan()
    return agent


def synced(agent: Agent) -> None:
    (result,) = agent.sync()
    assert not result.error, result.error


def change(agent: Agent, *upserts: Object, deletes: tuple[Ref, ...] = ()) -> Cost:
    def work() -> None:
        agent.handle(Batch(upserts, deletes))
        synced(agent)

    return timed(work)


def changes(agent: Agent, endpoints: int) -> dict[str, list[Cost]]:
    """Milliseconds from the event to the kernel."""
    service, slice_ = cluster.service(60_000), cluster.endpoints(60_000, endpoints)
    found: dict[str, list[Cost]] = {"endpoint replaced": [], "service added": [], "service removed": []}
    for turn in range(CHANGES):
        found["endpoint replaced"].append(change(agent, cluster.endpoints(7, endpoints, first=1 - turn % 2)))
        found["service added"].append(change(agent, service, slice_))
        found["service removed"].append(change(agent, deletes=(service.ref, slice_.ref)))
    return found


def one_run(services: int, endpoints: int) -> dict[str, Cost]:
    result: dict[str, Cost] = {}
    everything = objects(services, endpoints)
    with inside() as place:
        planned: list[Agent] = []
        result["planning"] = timed(lambda: planned.append(fresh(place, everything)))
        result["first load"] = timed(lambda: synced(planned[0]))
        result |= {name: middle(times) for name, times in changes(planned[0], endpoints).items()}
        again = fresh(place, everything)
        result["read back, all right"] = timed(again.reconcilers[Family.V4].adopt)
    return result


def pieces(count: int) -> Cost:
    """The first load of 10,000 × 10 in so many transactions."""
    with inside() as place:
        agent = fresh(place, objects(10_000, 10))
        backend = agent.reconcilers[Family.V4].backend
        assert isinstance(backend, Nftables)
        backend.batch = -(-10_001 // count) if count > 1 else 0
        return timed(lambda: synced(agent))


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("needs root")
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    results = {size: [one_run(*size) for _ in range(runs)] for size in SIZES}
    print("| ms | " + " | ".join(f"{services:,} × {endpoints}" for services, endpoints in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name in results[SIZES[0]][0]:
        cells = [str(middle(run[name] for run in results[size])) for size in SIZES]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nfirst load of 10,000 × 10 in several transactions, ms:")
    for count in (1, 4, 20, 100):
        print(f"{count}: {middle(pieces(count) for _ in range(max(1, runs // 2)))}")


if __name__ == "__main__":
    main()
