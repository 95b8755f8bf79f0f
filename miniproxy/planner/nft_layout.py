"""The fixed part of nftables mode: which sets, maps, chains and rules there are (docs/nftables.md says why).

The names, types and codes here are what the elements of nftables.py have to fit. Text only, pure; hands on
`Chain`s and declarations in nft's language.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..config import Settings
from ..model import Family, Node

TABLE = "miniproxy"
EXACT = 8  # up to this many endpoints, a size is their exact number
LARGEST = 65536  # endpoints of one service port that are used; the rest is left out
MOST_SLOTS = 1024  # the same with session affinity, where rules grow with endpoints
SIZES = tuple(range(1, EXACT + 1)) + tuple(1 << i for i in range(4, 17))
UNIT = 10_000  # the code of the first endpoint of size n is n × UNIT
LOCAL = 1_000_000_000  # added to the codes of endpoints that serve outside traffic under policy Local
DRAWS = 8  # a miss has a probability below 1/2, so one connection in 256 at most comes to the last rule
PROBES = 16  # slots a client tries, with session affinity, before it takes the first that has an endpoint
CLIENTS = 1_048_576  # clients remembered for session affinity, at most
ANY = {Family.V4: "0.0.0.0", Family.V6: "::"}  # the address of a NodePort in our sets


class Hook(NamedTuple):
    """Where a base chain is called from; `priority` is the kernel's number."""

    type: str
    name: str
    priority: int

    def __str__(self) -> str:
        return f"type {self.type} hook {self.name} priority {self.priority}; policy accept;"


class Chain(NamedTuple):
    """A chain with all its rules, in order. One that was read has only the rules' comments; see `marks`."""

    name: str
    hook: Hook | None
    rules: tuple[str, ...]

    @property
    def key(self) -> tuple[str, ...]:
        return ("chain", self.name)

    @property
    def marks(self) -> tuple[str, ...]:
        """The rules' comments. Each ends in a digest of its rule: nft spells rules in its own way, which changes
        with its version, so this is how ours are known when they are read back.
        """
        return tuple(rule.rpartition(' comment "')[2].rstrip('"') for rule in self.rules)


class Affinity(NamedTuple):
    """What frontends with session affinity share: a chain, and a map of the same name.

    The map holds their endpoints by slot; `slots` is how many the chain looks through.
    """

    node_port: bool
    local: bool
    seconds: int
    slots: int

    @property
    def name(self) -> str:
        kind, policy = "node-port" if self.node_port else "address", "local" if self.local else "all"
        return f"affinity-{kind}-{policy}-{self.seconds}-{self.slots}"

    @staticmethod
    def named(name: str) -> Affinity | None:
        """The group of that name; None for any other name."""
        words = name.removeprefix("affinity-node-port-").removeprefix("affinity-address-").split("-")
        if len(words) != 3 or words[0] not in ("all", "local") or not (words[1] + words[2]).isdigit():
            return None
        group = Affinity(name.startswith("affinity-n"), words[0] == "local", int(words[1]), int(words[2]))
        return group if group.name == name else None


def ip(family: Family) -> str:
    """nft's name of the family."""
    return "ip6" if family is Family.V6 else "ip"


def size_of(count: int) -> int:
    """The size by whose rule `count` endpoints are chosen from."""
    return count if count <= EXACT else power_of_two(count)


def map_of(size: int) -> str:
    """The map that holds the endpoints of that size.

    The kernel looks at each rule that refers to a map for each element that is added to it, and a size beyond EXACT
    has as many rules as all exact ones together. So each of those has a map of its own.
    """
    return "endpoints" if size <= EXACT else f"endpoints-{size}"


def power_of_two(count: int) -> int:
    """The smallest that is not less than count (≥ 1)."""
    return 1 << (count - 1).bit_length()


# -- what is made with the table


def sets(family: Family) -> dict[str, str]:
    """Declarations of all sets and maps, by name."""
    address = "ipv6_addr" if family is Family.V6 else "ipv4_addr"
    to = f"{ip(family)} daddr . meta l4proto . th dport"
    coded = f"typeof {to} . numgen random mod 1"
    return {
        "cluster-ips": f"set {{ type {address}; }}",
        "node-ips": f"set {{ type {address}; }}",
        "external": f"set {{ typeof {to}; }}",
        "external-local": f"set {{ typeof {to}; }}",
        **dict.fromkeys(map(map_of, SIZES), f"map {{ {coded} : {ip(family)} daddr . th dport; }}"),
        "sizes": f"set {{ {coded}; }}",
        "affinity": f"map {{ {coded} : verdict; }}",
        "occupied": f"set {{ {coded}; }}",
        "clients": (
            # `type`, with a mark for the slot: nft 1.0.6 cannot read back `typeof` of five fields.
            f"set {{ type {address} . inet_proto . inet_service . {address} . mark;"
            f" flags dynamic,timeout; size {CLIENTS}; timeout 3h; }}"
        ),
        "hairpin": f"set {{ type {address} . {address}; }}",
        "refused": f"set {{ typeof {to}; }}",
        "dropped": f"set {{ typeof {to}; }}",
        "guarded": f"set {{ typeof {to}; }}",
        "allowed": f"set {{ typeof {to} . {ip(family)} saddr; flags interval; }}",
        "counted": f"set {{ typeof {to}; counter; }}",
    }


def layout(family: Family) -> str:
    """The mark our table bears; a table with another mark cannot be used."""
    content = repr((sets(family), *choosing(family)))
    return f"miniproxy layout {zlib.crc32(content.encode()):08x}"


def choosing(family: Family) -> Iterator[Chain]:
    """The chains that choose endpoints: they depend on nothing but the family."""
    for prefix, node_port in (("", False), ("node-port-", True)):
        to = _destination(family, node_port=node_port)
        for name, first in ((f"{prefix}choose-all", 0), (f"{prefix}choose-local", LOCAL)):
            yield _chain(name, _plain(_choose(family, to, name, first)))
            for size in SIZES[EXACT:]:
                yield _chain(f"{name}-{size}", _plain(_draw(family, to, size, first)))


def _choose(family: Family, to: str, name: str, first: int) -> Iterator[str]:
    for size in SIZES[:EXACT]:
        yield _dnat(family, f"{to} . numgen random mod {size} offset {first + size * UNIT}", map_of(size))
    yield f"{to} . {_constant(first)} vmap @affinity"
    for size in SIZES[EXACT:]:
        yield f"{to} . {_constant(first + size * UNIT)} @sizes goto {name}-{size}"


def _draw(family: Family, to: str, size: int, first: int) -> Iterator[str]:
    """More than size/2 of the indices are taken: draw until one is hit, and last from those that surely are."""
    for count in [size] * DRAWS + [size // 2 + 1]:
        yield _dnat(family, f"{to} . numgen random mod {count} offset {first + size * UNIT}", map_of(size))


# -- what is made when a service with session affinity needs it


def affinity_map(family: Family) -> str:
    """The declaration of a group's map."""
    return sets(family)[map_of(1)]


def affinity_chain(family: Family, group: Affinity) -> Chain:
    """Set `clients` remembers (destination, client, slot). A client that is remembered goes to its slot's endpoint;
    any other tries slots and takes the first that has an endpoint. Its port decides their order, as good as chance
    but the same each time one rule asks: a client whose time is over gets a new endpoint, as in the other modes.
    """
    to = _destination(family, node_port=group.node_port)
    saddr = f"{ip(family)} saddr"
    first = LOCAL if group.local else 0
    codes = range(first, first + group.slots)

    def go(code: str) -> str:
        return _dnat(family, f"{to} . {code}", group.name)

    def client(code: str) -> str:
        return f"{{ {to} . {saddr} . {code} timeout {group.seconds}s }}"

    remembered, forgotten = [], []
    for code in codes:
        slot, as_mark = _constant(code), f"meta mark & 0x0 | {code:#x}"
        known = f"{to} . {slot} @occupied {to} . {saddr} . {as_mark} @clients"
        remembered.append(f"{known} update @clients {client(as_mark)} {go(slot)}")
        forgotten.append(f"delete @clients {{ {to} . {saddr} . {as_mark} }}")  # its endpoint is gone
    # Other seeds for another number of slots: the clients of a slot would share a few of twice as many.
    seeds = range(group.slots * PROBES, (group.slots + 1) * PROBES)
    probes = [f"jhash {saddr} . th sport mod {group.slots} seed {seed:#x} offset {first}" for seed in seeds]
    chosen = [f"{to} . {probe} @occupied update @clients {client(probe)} {go(probe)}" for probe in probes]
    # When no more clients can be remembered, they are served all the same.
    unremembered = [*map(go, probes), *(go(_constant(code)) for code in codes)]
    return _chain(group.name, _plain([*remembered, *forgotten, *chosen, *unremembered]))


# -- what depends on the settings


class Frame:
    """The chains around those that choose: who may pass, who is masqueraded, what is refused."""

    def __init__(self, settings: Settings, node: Node, family: Family) -> None:
        self.settings = settings
        self.family = family
        self.ip = ip(family)
        self.to = _destination(family, node_port=False)
        self.to_port = _destination(family, node_port=True)
        self.mark_bit = f"{settings.masquerade_mark:#010x}"
        self.mark = f"meta mark set meta mark | {self.mark_bit}"
        self.pods, self.not_pods = _pods(settings, node, family)
        self.service_cidrs = settings.service_cidrs or node.service_cidrs

    def chains(self) -> Iterator[Chain]:
        yield from self.hooks()
        yield from self.filters()
        yield _chain("services", self.services())
        yield _chain("cluster", self.cluster())
        yield _chain("node-ports", self.entries(self.to_port, "node-port-"))
        for prefix in ("", "node-port-"):
            yield _chain(f"{prefix}external", [(self.mark, "masquerade"), (f"goto {prefix}choose-all", "")])
            yield _chain(f"{prefix}external-local", self.external_local(prefix))
        yield _chain("masquerading", self.masquerade())

    def hooks(self) -> Iterator[Chain]:
        """Hooks and priorities are kube-proxy's, so whatever was made to live beside it lives beside us."""
        guard = [("ct state new jump firewall", "")]
        refuse = [("ct state new jump refuse", ""), ("ct state new jump cluster-ips", "")]
        refuse_in = [("ct state new jump refuse-node-ports", ""), ("ct state new jump refuse", "")]
        services = [("jump services", "")]
        yield _chain("filter-prerouting", guard, Hook("filter", "prerouting", -110))
        yield _chain("filter-output-early", guard, Hook("filter", "output", -110))
        yield _chain("filter-input", refuse_in, Hook("filter", "input", 0))
        yield _chain("filter-forward", refuse, Hook("filter", "forward", 0))
        yield _chain("filter-output", refuse, Hook("filter", "output", 0))
        yield _chain("nat-prerouting", services, Hook("nat", "prerouting", -100))
        yield _chain("nat-output", services, Hook("nat", "output", -100))
        yield _chain("nat-postrouting", [("jump masquerading", "")], Hook("nat", "postrouting", 100))
        if self.settings.nftables_counters:
            # A packet on the loopback device has been counted on its way out.
            count = "ct status dnat jump count"
            yield _chain("count-prerouting", [(f'iifname != "lo" {count}', "")], Hook("filter", "prerouting", -90))
            yield _chain("count-output", [(count, "")], Hook("filter", "output", -90))
            yield _chain("count", self.count())

    def filters(self) -> Iterator[Chain]:
        cidrs = ", ".join(cidr for cidr in self.service_cidrs if Family.of(cidr) is self.family)
        unallocated = [(f"{self.ip} daddr {{ {cidrs} }} drop", "no such cluster IP")] if cidrs else []
        yield _chain("cluster-ips", [(f"{self.ip} daddr @cluster-ips reject", "no such port"), *unallocated])
        for name, to in (("refuse", self.to), ("refuse-node-port", self.to_port)):
            yield _chain(name, [(f"{to} @refused reject", ""), (f"{to} @dropped drop", "")])
        yield _chain("refuse-node-ports", self.to_node("goto refuse-node-port"))
        yield _chain("firewall", [(f"{self.to} @guarded goto firewall-guarded", "")])
        yield _chain("firewall-guarded", [(f"{self.to} . {self.ip} saddr @allowed return", ""), ("drop", "")])

    def services(self) -> Iterator[tuple[str, str]]:
        yield f"{self.ip} daddr @cluster-ips goto cluster", ""
        yield from self.entries(self.to, "")
        yield from self.to_node("goto node-ports")

    def entries(self, to: str, prefix: str) -> Iterator[tuple[str, str]]:
        yield f"{to} @external goto {prefix}external", ""
        yield f"{to} @external-local goto {prefix}external-local", ""

    def to_node(self, verdict: str) -> Iterator[tuple[str, str]]:
        """To an address of the node that serves NodePorts. Rules ask the kernel which addresses are its own."""
        addresses = node_port_addresses(self.settings)
        if "primary" in addresses:
            yield f"{self.ip} daddr @node-ips {verdict}", ""
            return
        loopback = "::1" if self.family is Family.V6 else "127.0.0.0/8"
        # Ranges of the other family alone say nothing about this one.
        for cidr in [c for c in addresses if Family.of(c) is self.family] or [f"{ANY[self.family]}/0"]:
            within = "" if cidr.endswith("/0") else f"{self.ip} daddr {cidr} "
            yield f"{self.ip} daddr != {loopback} {within}fib daddr type local {verdict}", ""

    def cluster(self) -> Iterator[tuple[str, str]]:
        """Traffic to a cluster IP from outside the pod network has to come back through this node."""
        if self.settings.masquerade_all:
            yield self.mark, "masquerade all"
        elif self.not_pods:
            yield f"{self.not_pods} {self.mark}", "masquerade traffic from outside the cluster"
        yield "goto choose-all", ""

    def external_local(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Policy Local is about traffic from outside; pods and this node reach all endpoints, as they would if
        the load balancer sent them to any node.
        """
        if self.pods:
            yield f"{self.pods} goto {prefix}choose-all", "short-circuit for pods"
        yield f"fib saddr type local {self.mark}", "masquerade the node's own traffic"
        yield f"fib saddr type local goto {prefix}choose-all", "short-circuit for the node"
        yield f"goto {prefix}choose-local", ""

    def masquerade(self) -> Iterator[tuple[str, str]]:
        # Cleared, so that a packet that is encapsulated and comes by again is not masqueraded twice.
        clear = f"meta mark set meta mark ^ {self.mark_bit}"
        yield f"meta mark & {self.mark_bit} != 0 {clear} masquerade fully-random", ""
        yield f"ct status dnat {self.ip} saddr . {self.ip} daddr @hairpin masquerade fully-random", "hairpin"

    def count(self) -> Iterator[tuple[str, str]]:
        original = f"ct original {self.ip} daddr"
        port = "meta l4proto . ct original proto-dst @counted"
        for protocol in ("tcp", "udp", "sctp"):  # only a known protocol tells nft what proto-dst is
            yield f"meta l4proto {protocol} {original} . {port} return", ""
            yield f"meta l4proto {protocol} {original} & {ANY[self.family]} . {port} return", ""


def node_port_addresses(settings: Settings) -> tuple[str, ...]:
    return settings.node_port_addresses or ("primary",)


def _pods(settings: Settings, node: Node, family: Family) -> tuple[str, str]:
    """What matches traffic of pods, and all other traffic; ("", "") where nothing says who is a pod."""
    match settings.detect_local_mode:
        case "BridgeInterface":
            return f'iifname "{settings.bridge_interface}"', f'iifname != "{settings.bridge_interface}"'
        case "InterfaceNamePrefix":
            prefix = settings.interface_name_prefix
            return f'iifname "{prefix}*"', f'iifname != "{prefix}*"'
        case "NodeCIDR":
            cidr = next((c for c in node.pod_cidrs if Family.of(c) is family), "")
        case _:
            cidr = settings.cluster_cidr(family)
    return (f"{ip(family)} saddr {cidr}", f"{ip(family)} saddr != {cidr}") if cidr else ("", "")


# -- words of the language


def _chain(name: str, rules: Iterable[tuple[str, str]], hook: Hook | None = None) -> Chain:
    """A chain from (rule, remark) pairs."""
    marked = (
        f'{rule} comment "{remark}{" " if remark else ""}#{zlib.crc32(rule.encode()):08x}"' for rule, remark in rules
    )
    return Chain(name, hook, tuple(marked))


def _plain(rules: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((rule, "") for rule in rules)


def _constant(code: int) -> str:
    """A constant as a field of a look-up: nft takes no plain number there."""
    return f"numgen random mod 1 offset {code}"


def _destination(family: Family, *, node_port: bool) -> str:
    return f"{ip(family)} daddr{f' & {ANY[family]}' if node_port else ''} . meta l4proto . th dport"


def _dnat(family: Family, lookup: str, name: str) -> str:
    return f"dnat {ip(family)} to {lookup} map @{name}"
