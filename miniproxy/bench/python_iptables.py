"""For the record: python-iptables as the writer, `python -m miniproxy.bench.python_iptables SERVICES ENDPOINTS`.

Writes the chains and rules of so many services into the legacy table nat of the namespace it runs in, then one endpoint
more to one of them, each as one commit, and prints a line of JSON: seconds for both, and its memory.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..model import Endpoint, ServicePortName
from ..planner.names import endpoint_chain, service_suffix
from .objects import NAMESPACE, PORT, Target, target
from .world import ENDPOINT_PORT


def available() -> bool:
    """Whether the library is installed; it is compiled, and so it is optional."""
    return importlib.util.find_spec("iptc") is not None


class Writer:
    """One table, written when `commit` is called."""

    def __init__(self) -> None:
        import iptc

        self._iptc: Any = iptc
        self.table = iptc.Table(iptc.Table.NAT)
        self.table.autocommit = False

    def service(self, wanted: Target) -> None:
        """The dispatch rule and all chains of a new service."""
        name = ServicePortName(NAMESPACE, wanted.service_name, "http", "TCP")
        chain = f"KUBE-SVC-{service_suffix(name)}"
        self.table.create_chain(chain)
        for ip in wanted.endpoints:
            self.endpoint(name, ip)
        self.balance(name, wanted.endpoints)
        rule = self._rule(f"{name} cluster IP", chain, protocol="tcp", dst=wanted.vip)
        rule.create_match("tcp").dport = str(PORT)
        self._append("KUBE-SERVICES", rule)

    def endpoint(self, name: ServicePortName, ip: str) -> None:
        """The chain of an endpoint."""
        chain = endpoint_chain(name, Endpoint(ip, ENDPOINT_PORT))
        self.table.create_chain(chain)
        self._append(chain, self._rule(str(name), "KUBE-MARK-MASQ", src=ip))
        rule = self._rule(str(name), "DNAT", protocol="tcp")
        rule.target.to_destination = f"{ip}:{ENDPOINT_PORT}"
        self._append(chain, rule)

    def balance(self, name: ServicePortName, endpoints: Sequence[str]) -> None:
        """The rules that choose an endpoint, in place of those there are."""
        chain = f"KUBE-SVC-{service_suffix(name)}"
        self._iptc.Chain(self.table, chain).flush()
        for left, ip in zip(range(len(endpoints), 0, -1), endpoints, strict=True):
            to = endpoint_chain(name, Endpoint(ip, ENDPOINT_PORT))
            rule = self._rule(f"{name} -> {ip}:{ENDPOINT_PORT}", to)
            if left > 1:
                match = rule.create_match("statistic")
                match.mode = "random"
                match.probability = f"{1 / left:.11f}"
            self._append(chain, rule)

    def _rule(self, comment: str, to: str, **fields: str) -> Any:
        rule = self._iptc.Rule()
        for field, value in fields.items():
            setattr(rule, field, value)
        rule.create_match("comment").comment = comment
        rule.create_target(to)
        return rule

    def _append(self, chain: str, rule: Any) -> None:
        self._iptc.Chain(self.table, chain).append_rule(rule)


def main(services: int, endpoints: int) -> None:
    """Write, measure, print."""
    writer = Writer()
    start = time.perf_counter()
    for chain in ("KUBE-SERVICES", "KUBE-MARK-MASQ"):
        writer.table.create_chain(chain)
    for number in range(services):
        writer.service(target(number, endpoints))
    writer.table.commit()
    full = time.perf_counter() - start
    start = time.perf_counter()
    writer.table.refresh()  # a commit uses up what was read
    more = target(0, endpoints + 1)
    name = ServicePortName(NAMESPACE, more.service_name, "http", "TCP")
    writer.endpoint(name, more.endpoints[-1])
    writer.balance(name, more.endpoints)
    writer.table.commit()
    change = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"full": full, "change": change, "memory": memory}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
