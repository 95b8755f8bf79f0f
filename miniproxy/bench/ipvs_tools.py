"""For the record: the system's tools write IPVS mode, `python -m miniproxy.bench.ipvs_tools SERVICES ENDPOINTS`.

Has `ipset restore`, `ip -batch` and `ipvsadm --restore` write the state that miniproxy plans for so many services, into
the network namespace it runs in, and prints a line of JSON: the seconds they took, together and each. They are given
the whole state at once, as text: no agent that uses them could be faster.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict

from ..agent import Agent
from ..backends import choose, cleanup
from ..config import Settings
from ..kernel.links import local_addresses
from ..model import Batch, Family
from ..planner.ipvs_text import Tool, sections_of
from ..sources.wire import convert
from .objects import target
from .world import NODE_NAME, POD_CIDR

_TOOLS: dict[Tool, list[str]] = {
    "ipset": ["ipset", "restore"],
    "ip": ["ip", "-batch", "-"],
    "ipvsadm": ["ipvsadm", "--restore"],
}
_WARM_UP = 3  # services


def planned(services: int, endpoints: int) -> Agent:
    """An agent that knows so many services, and has written nothing."""
    settings = Settings(mode="ipvs", node_name=NODE_NAME, cluster_cidrs=(POD_CIDR,), iptables_variant="legacy")
    dataplane = choose(settings)
    agent = Agent(settings, dataplane.planner, dataplane.backends, local_addresses=local_addresses)
    targets = [target(number, endpoints) for number in range(services)]
    found = [convert(raw).object for each in targets for raw in (each.service(), each.slice())]
    agent.handle(Batch(tuple(obj for obj in found if obj), synced=True))
    agent.replan()
    return agent


def state(services: int, endpoints: int) -> dict[Tool, str]:
    """What each tool has to be told, from nothing."""
    texts: dict[Tool, str] = defaultdict(str)
    for section in sections_of(planned(services, endpoints).reconcilers[Family.V4].preview()):
        texts[section.tool] += section.text
    return texts


def write(texts: dict[Tool, str]) -> dict[Tool, float]:
    """Seconds that each tool takes."""
    took = {}
    for tool, argv in _TOOLS.items():
        start = time.perf_counter()
        subprocess.run(argv, input=texts[tool].encode(), check=True, stdout=subprocess.DEVNULL)
        took[tool] = time.perf_counter() - start
    return took


def main(services: int, endpoints: int) -> None:
    """Measure, and print. Before that a few services come and go, for the kernel to load its modules."""
    planned(_WARM_UP, endpoints).sync()
    cleanup()
    took = write(state(services, endpoints))
    print(json.dumps({"full": sum(took.values()), **took}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
