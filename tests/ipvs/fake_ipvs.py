"""IPVS mode's kernel of one family in memory: executes transactions, and refuses what the kernel refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from miniproxy.graceful import Draining, Load, Server, Service
from miniproxy.planner import ipvs_text, rules
from miniproxy.planner.ipvs_text import (
    DummyLink,
    IpSet,
    RealServer,
    Section,
    SetEntry,
    VirtualAddress,
    VirtualServer,
    parse_command,
)
from miniproxy.transaction import Change, Transaction, TransactionError
from tests.fake_iptables import FakeIptables

_ALIKE = (DummyLink, VirtualAddress, IpSet, SetEntry, VirtualServer)


class FakeTables(FakeIptables):
    def read(self) -> dict[Any, Any]:
        return rules.parse_save(self.text(), ipvs_text.LAYOUT).objects


class FakeIpvs:
    batch = 0

    def __init__(self) -> None:
        self.clock = 0.0
        self.links: set[str] = set()
        self.addresses: set[str] = set()
        self.sets: dict[str, tuple[IpSet, set[str]]] = {}
        self.servers: dict[tuple[str, ...], VirtualServer] = {}
        self.tables = FakeTables()
        self.connections: set[tuple[Service, Server]] = set()  # real servers that have some
        self.sent: list[Transaction] = []
        self.fault: Callable[[str], None] = lambda line: None  # may raise TransactionError at any line
        self.draining = Draining(self, lambda: self.clock)

    # -- as the reconciler sees it

    def read(self) -> dict[Any, Any]:
        found: list[Any] = [*map(DummyLink, self.links), *map(VirtualAddress, self.addresses)]
        for kind, entries in self.sets.values():
            found += [kind, *(SetEntry(kind.name, entry) for entry in entries)]
        self.draining.found(self.leaving())
        for server in self.servers.values():
            tcp = server.protocol == "TCP"
            found.append(server._replace(servers=tuple(s for s in server.servers if s.weight or not tcp)))
        return {obj.key: obj for obj in found} | self.tables.read()

    def same(self, planned: Any, actual: Any) -> bool:
        return bool(planned == actual) if isinstance(planned, _ALIKE) else rules.same(planned, actual)

    def stream(self, parts: Iterable[Sequence[Change]]) -> Transaction | None:
        return None

    def render(self, changes: Sequence[Change]) -> Transaction:
        return ipvs_text.render(changes)

    def apply(self, transaction: Transaction) -> None:
        self.sent.append(transaction)
        for section in ipvs_text.sections_of(transaction):
            if section.tool == "iptables":
                self._iptables(section)
            else:
                for line in section.lines:
                    self.fault(line)
                    getattr(self, f"_{section.tool}")(line)

    # -- as graceful termination sees it

    def leaving(self) -> list[tuple[Service, Server]]:
        return [
            (Service(s.address, s.port), Server(r.address, r.port))
            for s in self.servers.values()
            if s.protocol == "TCP"
            for r in s.servers
            if not r.weight
        ]

    def loads(self, services: Iterable[Service]) -> Mapping[tuple[Service, Server], Load]:
        asked = set(services)
        return {key: Load(int(key in self.connections), 0) for key in self.leaving() if key[0] in asked}

    def unfinished(self) -> set[tuple[Service, Server]]:
        return self.connections

    def remove(self, servers: Iterable[tuple[Service, Server]]) -> None:
        for service, server in servers:
            self._serve("-d", VirtualServer("TCP", *service, ""), RealServer(*server))

    # -- the tools

    def _iptables(self, section: Section) -> None:
        for line in section.lines:
            words = line.split()
            if "--match-set" in words and words[words.index("--match-set") + 1] not in self.sets:
                raise TransactionError(f"no such set: {line}")
        self.tables.fault = self.fault
        self.tables.apply(Transaction.of(section.text))

    def _ip(self, line: str) -> None:
        words = line.split()
        if words[0] == "link":
            self.links.add(words[2])
        elif not self.links:
            raise TransactionError(f"no such link: {line}")
        elif words[1] == "add":
            self.addresses.add(words[2].partition("/")[0])
        else:
            self.addresses.discard(words[2].partition("/")[0])

    def _ipset(self, line: str) -> None:
        what, name, *rest = line.split()
        if what == "create":
            family = rest[2] if rest[1] == "family" else ""
            self.sets.setdefault(name, (IpSet(name, rest[0], family), set()))
        elif name not in self.sets:
            raise TransactionError(f"no such set: {line}")
        elif what == "destroy":
            if f"--match-set {name} " in self.tables.text():
                raise TransactionError(f"set is in use: {line}")
            del self.sets[name]
        elif what == "add":
            self.sets[name][1].add(rest[0])
        else:
            self.sets[name][1].discard(rest[0])

    def _ipvsadm(self, line: str) -> None:
        what, service, real = parse_command(line)
        self._serve(what, service, real)

    def _serve(self, what: str, service: VirtualServer, real: RealServer | None) -> None:
        known = self.servers.get(service.key)
        if what == "-A":
            self.servers[service.key] = service._replace(servers=known.servers if known else ())
        elif what == "-D":
            self.servers.pop(service.key, None)
        elif known is None:
            raise TransactionError(f"no such virtual server: {what} {service}")
        elif what == "-E":
            self.servers[service.key] = service._replace(servers=known.servers)
        else:
            assert real is not None
            others = [s for s in known.servers if (s.address, s.port) != (real.address, real.port)]
            gone = what == "-d" or (what == "-e" and not real.weight and len(others) == len(known.servers))
            self.servers[service.key] = known._replace(servers=tuple(sorted(others if gone else [*others, real])))
