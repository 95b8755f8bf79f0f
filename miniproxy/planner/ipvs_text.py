"""The kernel objects of IPVS mode, and their text in the languages of ipvsadm, ipset, ip and iptables.

A transaction is a script in sections, each of which its tool would take as it stands. It is not atomic, so the order
matters: what is dispensed with goes first (room), and a VIP becomes an address of the node only when all that serves
it is there; deleting goes the other way round.

    # ip -batch                      addresses that go
    # ipvsadm --restore              virtual servers that go
    # ipset restore                  entries that go; sets and entries that come
    # iptables-restore --noflush
    # ipvsadm --restore              virtual servers that come or change, and their real servers
    # ip -batch                      addresses that come
    # ipset restore                  sets that go: no rule may refer to them any more

Where iptables mode's rules are replaced, those of the table nat come after the addresses: until then they serve.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Literal, NamedTuple

from ..model import Protocol
from ..transaction import Change, Transaction
from . import iptables, rules
from .iptables import IptablesObject, Layout

LINK = "kube-ipvs0"
OUT_FILTER = "KUBE-IPVS-OUT-FILTER"

# Everything of iptables mode that IPVS mode lacks is named too, so that what is left of it is found, and removed; but
# for the chain that is the kubelet's too.
LAYOUT = Layout(
    fixed={
        "nat": {*iptables.LAYOUT.fixed["nat"], *iptables.LAYOUT.dispatch["nat"]},
        "filter": {*iptables.LAYOUT.fixed["filter"], *iptables.LAYOUT.dispatch["filter"]}
        - {OUT_FILTER, iptables.SHARED_FIREWALL},
    },
    dispatch={"nat": set(), "filter": {OUT_FILTER}},
)

# -- kernel objects


class DummyLink(NamedTuple):
    """A link of type dummy, which needs not be up to hold addresses."""

    name: str

    @property
    def key(self) -> tuple[str, ...]:
        return ("link", self.name)


class VirtualAddress(NamedTuple):
    """An address of kube-ipvs0."""

    address: str

    @property
    def key(self) -> tuple[str, ...]:
        return ("address", self.address)


class IpSet(NamedTuple):
    """A set, empty. Sizes are not part of it: they only limit."""

    name: str
    kind: str  # type as ipset names it
    family: str  # "inet", "inet6"; "" for sets of ports

    @property
    def key(self) -> tuple[str, ...]:
        return ("set", self.name)


class SetEntry(NamedTuple):
    """One entry of a set, as `ipset save` prints it."""

    set: str
    entry: str

    @property
    def key(self) -> tuple[str, ...]:
        return ("entry", self.set, self.entry)


class RealServer(NamedTuple):
    """Where a virtual server sends connections. Part of it, so that two that claim one VIP:port never mix."""

    address: str
    port: int
    weight: int = 1
    forward: str = "m"  # as the options of ipvsadm: m masquerade, g direct routing, i tunnel


class VirtualServer(NamedTuple):
    """A VIP:port that IPVS balances; a TCP real server with weight 0 is on its way out and not part of it."""

    protocol: Protocol
    address: str
    port: int
    scheduler: str
    flags: str = ""  # of the scheduler, as ipvsadm prints them: "mh-fallback,mh-port"
    timeout: int = 0  # seconds that a client stays with its real server; 0: does not
    servers: tuple[RealServer, ...] = ()  # sorted

    @property
    def key(self) -> tuple[str, ...]:
        return ("ipvs", f"{self.address} {self.protocol.lower()} {self.port}")


IpvsObject = DummyLink | VirtualAddress | IpSet | SetEntry | VirtualServer
Object = IpvsObject | IptablesObject


# -- transactions

Tool = Literal["ip", "ipvsadm", "ipset", "iptables"]
_TITLES: dict[Tool, str] = {
    "ip": "# ip -batch",
    "ipvsadm": "# ipvsadm --restore",
    "ipset": "# ipset restore",
    "iptables": "# iptables-restore --noflush",
}
_MOST_ENTRIES = 1 << 20  # a hash of a set grows as it fills; this only bounds it
_SERVICE_OPTIONS = {"TCP": "-t", "UDP": "-u", "SCTP": "--sctp-service"}
_PROTOCOLS: dict[str, Protocol] = {"-t": "TCP", "-u": "UDP", "--sctp-service": "SCTP"}


class Section(NamedTuple):
    tool: Tool
    lines: list[str]

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


# -- writing


def render(changes: Sequence[Change]) -> Transaction:
    """The script that makes these changes."""
    by_kind: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        kind = change.key[0]
        by_kind[kind if kind in ("link", "address", "set", "entry", "ipvs") else "iptables"].append(change)
    sets = by_kind["set"]
    chains = by_kind["iptables"]
    serving = [c for c in chains if _table(c) == "nat"] if any(map(_replaces_services, chains)) else []
    # ipset puts neighbours of one set into one message.
    entries = sorted(by_kind["entry"], key=lambda change: change.key[1])
    sections = (
        Section("ip", [f"addr del {_address(c)}" for c in by_kind["address"] if c.after is None]),
        Section("ipvsadm", [f"-D {_service(c.before)}" for c in by_kind["ipvs"] if c.after is None]),
        Section(
            "ipset",
            [
                *(f"del {c.before.set} {c.before.entry}" for c in entries if c.after is None),
                *(_create(c.after) for c in sets if c.after is not None),
                *(f"add {c.after.set} {c.after.entry}" for c in entries if c.after is not None),
            ],
        ),
        Section("iptables", _rules(c for c in chains if not serving or _table(c) != "nat")),
        Section("ipvsadm", [line for c in by_kind["ipvs"] if c.after is not None for line in _serve(c)]),
        Section(
            "ip",
            [
                *(f"link add {c.after.name} type dummy" for c in by_kind["link"] if c.after is not None),
                *(f"addr add {_address(c)}" for c in by_kind["address"] if c.after is not None),
            ],
        ),
        Section("iptables", _rules(serving)),
        Section("ipset", [f"destroy {c.before.name}" for c in sets if c.after is None]),
    )
    return script(sections)


def _table(change: Change) -> str:
    return str(change.key[1])


def _rules(changes: Iterable[Change]) -> list[str]:
    return rules.render(list(changes)).text.splitlines()


def _replaces_services(change: Change) -> bool:
    """Whether a chain goes or changes to which iptables mode's rules for cluster IPs belong."""
    return change.before is not None and change.key == ("chain", "nat", iptables.SERVICES)


def script(sections: Iterable[Section]) -> Transaction:
    used = [s for s in sections if s.lines]
    return Transaction(lambda: (f"{_TITLES[s.tool]}\n{s.text}" for s in used), sum(len(s.lines) for s in used))


def sections_of(transaction: Transaction) -> Iterator[Section]:
    """What `render` put together, in order."""
    tools = {title: tool for tool, title in _TITLES.items()}
    current: Section | None = None
    for line in transaction.text.splitlines():
        if line in tools:
            if current:
                yield current
            current = Section(tools[line], [])
        elif current:
            current.lines.append(line)
    if current:
        yield current


def _address(change: Change) -> str:
    address = (change.after or change.before).address
    # Without duplicate address detection, which a link that is down never ends.
    return f"{address}/128 dev {LINK} nodad" if ":" in address else f"{address}/32 dev {LINK}"


def _create(found: IpSet) -> str:
    if found.kind == "bitmap:port":
        return f"create {found.name} {found.kind} range 0-65535"
    return f"create {found.name} {found.kind} family {found.family} maxelem {_MOST_ENTRIES}"


def _serve(change: Change) -> Iterator[str]:
    """The lines from one state of a virtual server to the next: in proportion to what differs."""
    after: VirtualServer = change.after
    before: VirtualServer | None = change.before
    service = _service(after)
    if before is None:
        yield f"-A {service} {_options(after)}"
    elif before[:-1] != after[:-1]:
        yield f"-E {service} {_options(after)}"
    old = {(s.address, s.port): s for s in before.servers} if before else {}
    for server in after.servers:
        known = old.pop((server.address, server.port), None)
        if known != server:
            yield f"{'-a' if known is None else '-e'} {service} {_real(server)}"
    for server in old.values():
        if after.protocol == "TCP":
            # It keeps its connections, and is deleted when it has none (graceful.py).
            yield f"-e {service} {_real(server._replace(weight=0))}"
        else:
            yield f"-d {service} -r {_host_port(server.address, server.port)}"


def _service(server: VirtualServer) -> str:
    return f"{_SERVICE_OPTIONS[server.protocol]} {_host_port(server.address, server.port)}"


def _options(server: VirtualServer) -> str:
    persistent = f" -p {server.timeout}" if server.timeout else ""
    return f"-s {server.scheduler}{persistent}" + (f" -b {server.flags}" if server.flags else "")


def _real(server: RealServer) -> str:
    return f"-r {_host_port(server.address, server.port)} -{server.forward} -w {server.weight}"


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def show(objects: Iterable[Object]) -> str:
    """Objects as the tools list them: addresses, `ipvsadm -Sn`, `ipset save`, iptables-save."""
    kinds: dict[type, list[IpvsObject]] = defaultdict(list)
    chains: list[iptables.IptablesObject] = []
    for obj in objects:
        if isinstance(obj, (DummyLink, VirtualAddress, IpSet, SetEntry, VirtualServer)):
            kinds[type(obj)].append(obj)
        else:
            chains.append(obj)
    changes = [Change(obj.key, None, obj) for kind in kinds.values() for obj in sorted(kind)]
    return render(changes).text + iptables.show(chains, LAYOUT)


# -- reading


class Command(NamedTuple):
    """A line of `ipvsadm --restore`, taken apart."""

    what: str  # "-A", "-E", "-D" for a virtual server; "-a", "-e", "-d" for a real one
    service: VirtualServer  # without real servers; only its identity counts in "-D", "-a", "-e", "-d"
    real: RealServer | None = None


def parse_command(line: str) -> Command:
    """The form that `render` and `ipvsadm -Sn` write. Raises ValueError, KeyError, IndexError for anything else."""
    words = line.split()
    what, protocol = words[0], _PROTOCOLS[words[1]]
    address, port = _split(words[2])
    options: dict[str, str] = {}
    flags = []
    rest = iter(words[3:])
    for word in rest:
        if word in ("-m", "-g", "-i"):
            flags.append(word[1])
        else:
            options[word] = next(rest)
    service = VirtualServer(
        protocol, address, port, options.get("-s", ""), options.get("-b", ""), int(options.get("-p", 0))
    )
    if "-r" not in options:
        return Command(what, service)
    weight, forward = int(options.get("-w", 1)), flags[0] if flags else "m"
    return Command(what, service, RealServer(*_split(options["-r"]), weight, forward))


def _split(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


def owned(server: VirtualServer, vips: Set[str], own: Set[str], entries: Set[tuple[str, str]]) -> bool:
    """Whether a virtual server in the kernel is ours: on an address of kube-ipvs0, or stated in one of our sets.

    Sets are written before what they speak of and deleted after it, so this also holds for what an agent left
    that was killed. `vips` are the addresses of kube-ipvs0, `own` the node's others; `entries` are (set without
    its family's mark, entry).
    """
    where = f"{server.address},{server.protocol.lower()}:{server.port}"
    if server.address in vips or any((name, where) in entries for name in _ADDRESSED):
        return True
    return server.address in own and (f"KUBE-NODE-PORT-{server.protocol}", str(server.port)) in entries


_ADDRESSED = (
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-NODE-PORT-SCTP-HASH",
)


def without_family(name: str) -> str:
    """KUBE-6-X → KUBE-X."""
    return name.replace("KUBE-6-", "KUBE-", 1)
