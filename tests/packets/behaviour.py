"""What connections should do (golden/behaviour.tsv), what they do, and whether they agree beyond chance."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

from miniproxy.model import Protocol
from tests.golden_rules import golden

from .topology import Namespace, Network, await_ready

# The golden rows were recorded with a time-out of 0.4 s. Over IPv6, Linux 6.18 tells a connecting TCP socket
# of a refusal only when the SYN is sent again after 1 s: the file says "silent" where the rule is a REJECT.
REFUSED_LATE = "fd00:10:96::104"

SIDES = ("pod", "node", "outside", "outside2")
SOURCES = {
    "pod": ("10.128.1.10", "fd00:128:1::10"),
    "node": ("", ""),  # whatever the node's routing says
    "outside": ("203.0.113.7", "fd00:203::7"),
    "outside2": ("198.51.100.7", ""),
}


class Row(NamedTuple):
    """One address and port of a service tried from one side; `outcome` is written as probe.py writes it."""

    side: str
    service_port: str  # "NAMESPACE/NAME:PORT NAME"
    kind: str
    protocol: Protocol
    address: str
    port: int
    outcome: str

    @property
    def service(self) -> str:
        return self.service_port.rpartition(":")[0]

    @property
    def source(self) -> str:
        return SOURCES[self.side][":" in self.address]

    def __str__(self) -> str:
        return f"{self.side} {self.service_port} {self.kind} {self.protocol} {self.address}:{self.port}"


class Outcome(NamedTuple):
    endpoints: frozenset[str]
    sources: frozenset[str]
    failures: frozenset[str]

    @staticmethod
    def parse(text: str) -> Outcome:
        endpoints: list[str] = []
        sources: list[str] = []
        failures = []
        for part in text.split(" & "):
            if part.startswith("to "):
                reached, _, seen = part.removeprefix("to ").partition(" from ")
                endpoints, sources = reached.split(), seen.split()
            else:
                failures.append(part)
        return Outcome(frozenset(endpoints), frozenset(sources), frozenset(failures))


def rows(name: str = "behaviour.tsv") -> list[Row]:
    """The golden rows, in the file's order, with the refusals that it shows as silence put right."""
    found = []
    for line in golden(name).splitlines()[1:]:
        side, service_port, kind, protocol, target, outcome = line.split("\t")
        address, _, port = target.rpartition(":")
        if address == REFUSED_LATE and outcome == "silent":
            outcome = "refused"
        found.append(Row(side, service_port, kind, cast(Protocol, protocol), address, int(port), outcome))
    return found


@cache
def items(name: str) -> Sequence[dict[str, Any]]:
    """The objects of a golden list, "services" or "endpointslices"."""
    found: list[dict[str, Any]] = json.loads(golden(f"{name}.json"))["items"]
    return found


@cache
def node() -> dict[str, Any]:
    """The golden Node object."""
    found: dict[str, Any] = json.loads(golden("node.json"))
    return found


def endpoint_addresses() -> dict[str, set[str]]:
    """The addresses of each service's endpoints, by NAMESPACE/NAME."""
    found = defaultdict(set)
    for item in items("endpointslices"):
        meta = item["metadata"]
        service = f"{meta['namespace']}/{meta['labels']['kubernetes.io/service-name']}"
        for endpoint in item.get("endpoints") or []:
            found[service].update(endpoint["addresses"])
    return found


def all_endpoints() -> set[str]:
    return set().union(*endpoint_addresses().values())


def endpoint_ports() -> set[tuple[str, int]]:
    """All (protocol, port) that endpoints serve; SCTP is left out, no row tries it."""
    ports = (port for item in items("endpointslices") for port in item.get("ports") or [])
    return {(port["protocol"], port["port"]) for port in ports if port["protocol"] != "SCTP"}


@cache
def affine_services() -> frozenset[str]:
    """The services with session affinity, as NAMESPACE/NAME."""
    return frozenset(
        f"{item['metadata']['namespace']}/{item['metadata']['name']}"
        for item in items("services")
        if item["spec"].get("sessionAffinity") == "ClientIP"
    )


def probe(network: Network, wanted: Iterable[Row]) -> dict[Row, str]:
    """Makes the connections of all rows, from all sides at the same time, and returns what they met."""
    by_side: dict[str, list[Row]] = defaultdict(list)
    for row in wanted:
        by_side[row.side].append(row)
    places = {"pod": network.client, "node": network.node}
    with ThreadPoolExecutor(len(SIDES)) as pool:
        jobs = [pool.submit(_probe_from, places.get(side, network.outside), by_side[side]) for side in by_side]
        return {row: met for job in jobs for row, met in job.result().items()}


def _probe_from(place: Namespace, wanted: Iterable[Row]) -> dict[Row, str]:
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in wanted:
        groups[row.service if row.service in affine_services() else row].append(row)
    targets = [
        [[row.source, row.protocol, row.address, row.port, len(Outcome.parse(row.outcome).endpoints)] for row in group]
        for group in groups.values()
    ]
    answer = json.loads(place.run(sys.executable, "-m", "tests.packets.probe", stdin=json.dumps(targets)))
    return {
        row: met
        for group, mets in zip(groups.values(), answer, strict=True)
        for row, met in zip(group, mets, strict=True)
    }


@contextmanager
def steady_clients(net: Network) -> Iterator[list[str]]:
    """Clients of the golden services, from a pod and from outside; at the end the list is what failed."""
    failed: list[str] = []
    with ExitStack() as stack:
        clients = []
        for side, place in (("pod", net.client), ("outside", net.outside)):
            wanted = [row for row in rows() if row.side == side and row.outcome.startswith("to ")]
            targets = [[row.source, row.protocol, row.address, row.port, 0] for row in wanted]
            client = stack.enter_context(place.module("steady"))
            assert client.stdin
            client.stdin.write(json.dumps(targets) + "\n")
            client.stdin.flush()
            await_ready(client, "a steady client")
            clients.append((side, client))
        yield failed
        for side, client in clients:
            _, wrong = json.loads(client.communicate()[0])
            failed += [f"{side} {line}" for line in wrong]


def agrees(row: Row, met: str) -> bool:
    """Whether an outcome is the row's, allowing for chance in which endpoints were met."""
    want, got = Outcome.parse(row.outcome), Outcome.parse(met)
    if got.sources != want.sources or got.failures != want.failures:
        return False
    if row.service in affine_services() and want.endpoints:
        addresses = {endpoint.rpartition(":")[0] for endpoint in got.endpoints}
        return len(addresses) == 1 and addresses <= endpoint_addresses()[row.service]
    if len(want.endpoints) >= 5:
        return got.endpoints <= want.endpoints and len(want.endpoints - got.endpoints) <= 1
    return got.endpoints == want.endpoints


def wrong_rows(met: dict[Row, str]) -> list[str]:
    """For each row that does not agree, which, what was wanted and what came."""
    return [f"{row}\n  want {row.outcome}\n  got  {got}" for row, got in met.items() if not agrees(row, got)]
