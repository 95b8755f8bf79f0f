"""Walks a packet through iptables rules as the kernel would, without sending one.

Takes rules as iptables-save prints them (from a kernel or from a plan) and a packet that opens a connection,
and hands on an Outcome: which endpoints it can reach and how likely, or how else it ends, with every rule on
the way. Pure.

It walks where a service proxy's rules live: tables nat and filter, in the order of the kernel's hooks.
Tables raw and mangle are not looked at. A match or target that it does not know is an error as soon as the
outcome depends on it, never a guess. Packet and Outcome know nothing about iptables.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum, StrEnum
from functools import lru_cache
from typing import NamedTuple, TypeVar

import msgspec

from .model import Family, Protocol


class TraceError(ValueError):
    """The outcome depends on something the tracer does not know; the message names the rule."""


class Packet(msgspec.Struct, frozen=True):
    """The first packet of a connection, as it is before any translation."""

    source: str
    destination: str
    protocol: Protocol
    port: int  # the destination's
    interface: str = ""  # where it comes in; "" for a packet that a process on the node itself sends

    @property
    def family(self) -> Family:
        return Family.of(self.destination)


class Verdict(StrEnum):
    ENDPOINT = "endpoint"  # translated to an endpoint and let through
    DROPPED = "dropped"  # silence
    REFUSED = "refused"  # an ICMP error or a reset
    UNTOUCHED = "untouched"  # no service: let through to where it was sent


class Target(NamedTuple):
    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class Step(NamedTuple):
    """One rule on a packet's way. `taken` is False for one that would take a client seen before."""

    place: str  # "nat KUBE-SERVICES"
    rule: str  # as the kernel prints it, without its chain; or the chain's policy
    why: str  # what matched; "" for a rule that takes every packet
    taken: bool = True


class Branch(NamedTuple):
    """One way the dice can fall."""

    probability: float
    verdict: Verdict
    endpoint: Target | None  # for Verdict.ENDPOINT
    masqueraded: bool  # the endpoint sees an address of the node instead of the client's
    steps: tuple[Step, ...]


class Outcome(NamedTuple):
    packet: Packet
    branches: tuple[Branch, ...]  # their probabilities add up to 1

    @property
    def verdicts(self) -> dict[Verdict, float]:
        """How likely each verdict is."""
        return _sums((branch.verdict, branch.probability) for branch in self.branches)

    @property
    def endpoints(self) -> dict[Target, float]:
        """How likely each endpoint is for a client that no endpoint remembers."""
        return _sums((branch.endpoint, branch.probability) for branch in self.branches if branch.endpoint)

    @property
    def masqueraded(self) -> frozenset[bool]:
        """Whether endpoints see an address of the node; both are possible (a pod that may reach itself)."""
        return frozenset(branch.masqueraded for branch in self.branches if branch.endpoint)


K = TypeVar("K")


def _sums(pairs: Iterable[tuple[K, float]]) -> dict[K, float]:
    sums: dict[K, float] = {}
    for key, probability in pairs:
        sums[key] = sums.get(key, 0.0) + probability
    return sums


# -- rules as data


class Match(NamedTuple):
    """One condition of a rule: an option of iptables itself ("-s"), or a module and its options."""

    name: str
    options: tuple[tuple[str, bool, str], ...]  # (option, negated, value)


class Rule(NamedTuple):
    text: str
    matches: tuple[Match, ...]
    target: str  # "" for a rule that only counts
    goto: bool
    arguments: Mapping[str, str]  # the target's options


class Chain(NamedTuple):
    policy: str  # "ACCEPT" or "DROP"; "-" for a chain that is jumped to
    rules: list[Rule]


Rules = Mapping[str, Mapping[str, Chain]]  # by table, then chain


def parse(text: str) -> Rules:
    """The output of iptables-save or ip6tables-save. Raises TraceError for a line that is neither's."""
    tables: dict[str, dict[str, Chain]] = {}
    table: dict[str, Chain] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            match line[:1]:
                case "*":
                    table = tables.setdefault(line[1:].strip(), {})
                case ":":
                    name, policy = line[1:].split()[:2]
                    table[name] = Chain(policy, [])
                case "-" | "[":  # "[packets:bytes]" comes first where counters were asked for
                    _, _, rest = line.partition("-A ")
                    name, _, rule = rest.partition(" ")
                    table[name].rules.append(_parse_rule(rule))
        except (ValueError, KeyError, IndexError) as error:
            raise TraceError(f"line {number} is not iptables-save output: {line} ({error})") from None
    return tables


def _parse_rule(text: str) -> Rule:
    matches: list[tuple[str, list[tuple[str, bool, str]]]] = []
    target, goto = "", False
    arguments: dict[str, str] = {}
    for option, negated, value in _options(text):
        if option in ("-j", "-g"):
            target, goto = value, option == "-g"
        elif target:
            arguments[option] = value
        elif option == "-m":
            matches.append((value, []))
        elif option.startswith("--"):
            matches[-1][1].append((option, negated, value))
        else:
            matches.append((option, [(option, negated, value)]))
    return Rule(text, tuple(Match(name, tuple(options)) for name, options in matches), target, goto, arguments)


def _options(text: str) -> Iterator[tuple[str, bool, str]]:
    option, negated, values = "", False, list[str]()
    next_negated = False
    for token in _words(text):
        if token == "!":
            next_negated = True
        elif token.startswith("-"):
            if option:
                yield option, negated, " ".join(values)
            option, negated, values = token, next_negated, []
            next_negated = False
        else:
            values.append(token)
    if option:
        yield option, negated, " ".join(values)


def _words(text: str) -> list[str]:
    """shlex.split, which takes most of the time that tens of thousands of rules take, where it is not needed: quotes
    around whole words.
    """
    parts = text.split('"')
    spaced = all(part[:1] == " " == part[-1:] for part in parts[2:-1:2])
    plain = len(parts) % 2 and spaced and (len(parts) == 1 or (parts[0][-1:] == " " and parts[-1][:1] in ("", " ")))
    if not plain or "\\" in text or "'" in text:
        return shlex.split(text)
    return [word for i, part in enumerate(parts) for word in ((part,) if i % 2 else part.split())]


# -- the walk


class _State(NamedTuple):
    """A packet on its way: only what differs from the Packet it started as, or from branch to branch."""

    source: str  # "" once it is masqueraded: which address of the node depends on routing
    destination: str
    port: int
    interface: str  # where it came in, for the hook it is in; "" where there is none
    mark: int = 0
    translated: bool = False
    probability: float = 1.0
    steps: tuple[Step, ...] = ()


class _End(Enum):
    """How a chain leaves a packet."""

    RETURNED = "goes on after the jump, or to the policy"
    ACCEPTED = "leaves the table's hook"
    DROPPED = "is gone"
    REFUSED = "is gone, and the sender is told"


_VERDICTS = {_End.DROPPED: Verdict.DROPPED, _End.REFUSED: Verdict.REFUSED}
_Ends = list[tuple[_State, _End]]


def trace(rules: Rules, packet: Packet, local: Iterable[str]) -> Outcome:
    """Where `packet` goes on a node with these rules (of the packet's family) and addresses.

    `local` are the node's addresses or ranges of them; loopback is always among them. Connection tracking is
    taken to know nothing of the connection. Raises TraceError where the rules cannot be followed.
    """
    walk = _Walk(rules, packet, (*local, "127.0.0.0/8", "::1"))
    start = _State(packet.source, packet.destination, packet.port, packet.interface)
    ends = walk.received(start) if packet.interface else walk.sent(start)
    return Outcome(packet, tuple(_branch(state, end) for state, end in ends))


def _branch(state: _State, end: _End) -> Branch:
    endpoint = Target(state.destination, state.port) if state.translated and end not in _VERDICTS else None
    verdict = _VERDICTS.get(end, Verdict.ENDPOINT if endpoint else Verdict.UNTOUCHED)
    return Branch(state.probability, verdict, endpoint, not state.source, state.steps)


class _Walk:
    def __init__(self, rules: Rules, packet: Packet, local: tuple[str, ...]) -> None:
        self.rules = rules
        self.packet = packet
        self.local = local

    def is_local(self, ip: str) -> bool:
        return any(_inside(ip, addresses) for addresses in self.local)

    def received(self, start: _State) -> _Ends:
        """From an interface: routed after PREROUTING, to a process on the node or out again."""
        ends: _Ends = []
        for state, end in self.hooks(start, ("nat", "PREROUTING")):
            if end in _VERDICTS:
                ends.append((state, end))
            elif self.is_local(state.destination):
                ends += self.hooks(state, ("filter", "INPUT"))
            else:
                ends += self.hooks(state, ("filter", "FORWARD"), ("nat", "POSTROUTING"))
        return ends

    def sent(self, start: _State) -> _Ends:
        """From a process on the node; what is for the node itself then comes in through lo."""
        ends: _Ends = []
        for state, end in self.hooks(start, ("nat", "OUTPUT"), ("filter", "OUTPUT"), ("nat", "POSTROUTING")):
            if end not in _VERDICTS and self.is_local(state.destination):
                # Table nat is not asked again: the connection has its translation.
                ends += self.hooks(state._replace(interface="lo"), ("filter", "INPUT"))
            else:
                ends.append((state, end))
        return ends

    def hooks(self, start: _State, *places: tuple[str, str]) -> _Ends:
        """Through base chains one after the other, as far as the packet gets."""
        ends: _Ends = [(start, _End.ACCEPTED)]
        for table, name in places:
            gone = [(state, end) for state, end in ends if end in _VERDICTS]
            on_their_way = [state for state, end in ends if end not in _VERDICTS]
            ends = gone + [end for state in on_their_way for end in self.base_chain(table, name, state)]
        return ends

    def base_chain(self, table: str, name: str, state: _State) -> _Ends:
        if name == "POSTROUTING":
            state = state._replace(interface="")
        chain = self.rules.get(table, {}).get(name)
        if chain is None:
            return [(state, _End.ACCEPTED)]
        ends = self.chain(table, name, state)
        if chain.policy != "DROP":
            return ends
        step = Step(f"{table} {name}", "policy DROP", "no rule decided")
        return [(_after(state, step), _End.DROPPED) if end is _End.RETURNED else (state, end) for state, end in ends]

    def chain(self, table: str, name: str, start: _State) -> _Ends:
        """Through one chain and those it jumps to."""
        place = f"{table} {name}"
        ends: _Ends = []
        here = [start]
        for rule in self.rules[table][name].rules:
            leaves = rule.goto or rule.target == "RETURN"
            staying: list[_State] = []
            for state in here:
                test = self.test(place, rule, state)
                if test.remembered:
                    state = _after(state, Step(place, rule.text, test.remembered, taken=False))
                if test.probability < 1:
                    staying.append(state._replace(probability=state.probability * (1 - test.probability)))
                if test.probability > 0:
                    hit = state._replace(probability=state.probability * test.probability)
                    hit = _after(hit, Step(place, rule.text, test.why))
                    for after, end in self.act(table, place, rule, hit):
                        if end is _End.RETURNED and not leaves:
                            staying.append(after)
                        else:
                            ends.append((after, end))
            here = staying
        return ends + [(state, _End.RETURNED) for state in here]

    def act(self, table: str, place: str, rule: Rule, state: _State) -> _Ends:
        """What a rule does with a packet it takes. RETURNED: nothing final."""
        arguments = rule.arguments
        match rule.target:
            case "" | "RETURN" | "LOG" | "NFLOG":
                return [(state, _End.RETURNED)]
            case "ACCEPT":
                return [(state, _End.ACCEPTED)]
            case "DROP":
                return [(state, _End.DROPPED)]
            case "REJECT":
                return [(state, _End.REFUSED)]
            case "MARK" if set(arguments) == {"--set-xmark"}:
                value, _, mask = arguments["--set-xmark"].partition("/")
                return [(state._replace(mark=(state.mark & ~_number(mask)) ^ _number(value)), _End.RETURNED)]
            case "DNAT" if set(arguments) == {"--to-destination"}:
                return [(_translate(place, rule, state), _End.ACCEPTED)]
            case "MASQUERADE":
                return [(state._replace(source=""), _End.ACCEPTED)]
            case chain if chain in self.rules[table]:
                return self.chain(table, chain, state)
            case _:
                raise TraceError(f"{place}: unknown target in the rule: {rule.text}")

    def test(self, place: str, rule: Rule, state: _State) -> _Test:
        """Whether a rule takes a packet: all matches must. Not to know one is an error if no other fails."""
        probability, reasons, remembered, unknown = 1.0, list[str](), "", ""
        for match in rule.matches:
            try:
                test = _test(match, self, state)
            except _UnknownError as error:
                unknown = unknown or str(error)
                continue
            if test.remembered:
                remembered = test.remembered
            elif not test.probability:
                return _NO
            else:
                probability *= test.probability
                reasons += [test.why] if test.why else []
        if unknown:
            raise TraceError(f"{place}: cannot tell whether {unknown} matches, in the rule: {rule.text}")
        return _Test(0.0, "", remembered) if remembered else _Test(probability, ", ".join(reasons))


def _after(state: _State, step: Step) -> _State:
    return state._replace(steps=(*state.steps, step))


def _translate(place: str, rule: Rule, state: _State) -> _State:
    ip, _, port = rule.arguments["--to-destination"].rpartition(":")
    try:
        address = str(ipaddress.ip_address(ip.strip("[]")))
        return state._replace(destination=address, port=int(port), translated=True)
    except ValueError:
        raise TraceError(f"{place}: not ADDRESS:PORT in the rule: {rule.text}") from None


# -- matches


class _Test(NamedTuple):
    probability: float  # that it matches
    why: str = ""
    remembered: str = ""  # not, but it would for a client that has been here before: what it depends on


class _UnknownError(Exception):
    """A match or an option of one that the tracer does not know; its words."""


_NO = _Test(0.0)


def _yes(hit: bool, why: str = "") -> _Test:
    return _Test(1.0, why) if hit else _NO


def _test(match: Match, walk: _Walk, state: _State) -> _Test:
    words = " ".join([match.name, *(f"{'! ' * no}{option} {value}".strip() for option, no, value in match.options)])
    known = _MATCHES.get(match.name)
    if known is None:
        raise _UnknownError(words)
    options = {option: (negated, value) for option, negated, value in match.options}
    return known(_Options(options, words), walk, state)


class _Options:
    """The options of one match; asking for them says which are known."""

    def __init__(self, options: Mapping[str, tuple[bool, str]], words: str) -> None:
        self.given = options
        self.words = words

    def only(self, name: str) -> tuple[bool, str]:
        """(negated, value) of the one option the match may have."""
        if set(self.given) != {name}:
            raise _UnknownError(self.words)
        return self.given[name]

    def unknown(self) -> _UnknownError:
        return _UnknownError(self.words)


def _source(options: _Options, walk: _Walk, state: _State) -> _Test:
    negated, addresses = options.only("-s")
    if not state.source:
        raise options.unknown()
    return _yes(
        _inside(state.source, addresses) != negated,
        f"source {state.source} is {'not ' * negated}in {addresses}",
    )


def _destination(options: _Options, walk: _Walk, state: _State) -> _Test:
    negated, addresses = options.only("-d")
    hit = _inside(state.destination, addresses) != negated
    return _yes(hit, f"destination {state.destination} is {'not ' * negated}in {addresses}")


def _protocol(options: _Options, walk: _Walk, state: _State) -> _Test:
    negated, protocol = options.only("-p")
    own = walk.packet.protocol.lower()
    return _yes((protocol in (own, "all")) != negated, f"protocol {own}")


def _interface(options: _Options, walk: _Walk, state: _State) -> _Test:
    negated, name = options.only("-i")
    same = state.interface.startswith(name[:-1]) if name.endswith("+") else state.interface == name
    hit = (same and bool(state.interface)) != negated
    came = f"came in through {state.interface}" if state.interface else "did not come in through an interface"
    return _yes(hit, f"{came}, {'not ' * negated}{name}")


def _port(options: _Options, walk: _Walk, state: _State) -> _Test:
    if not options.given:  # "-m tcp" alone, said again after "-p tcp"
        return _Test(1.0)
    negated, ports = options.only("--dport")
    first, _, last = ports.partition(":")
    hit = (int(first) <= state.port <= int(last or first)) != negated
    return _yes(hit, f"port {state.port} is {'not ' * negated}{ports}")


def _comment(options: _Options, walk: _Walk, state: _State) -> _Test:
    return _Test(1.0)


def _conntrack(options: _Options, walk: _Walk, state: _State) -> _Test:
    if "--ctorigdst" in options.given:
        negated, addresses = options.only("--ctorigdst")
        hit = _inside(walk.packet.destination, addresses) != negated
        return _yes(hit, f"sent to {walk.packet.destination}, {'not ' * negated}in {addresses}")
    negated, wanted = options.only("--ctstate")
    states = {"NEW"} | ({"DNAT"} if state.translated else set())
    return _yes(bool(states & set(wanted.split(","))) != negated, f"connection is {' and '.join(sorted(states))}")


def _mark(options: _Options, walk: _Walk, state: _State) -> _Test:
    negated, wanted = options.only("--mark")
    value, _, mask = wanted.partition("/")
    return _yes((state.mark & _number(mask) == _number(value)) != negated, f"mark is {state.mark:#x}")


def _addrtype(options: _Options, walk: _Walk, state: _State) -> _Test:
    if set(options.given) == {"--dst-type"}:
        (negated, kind), what, address = options.given["--dst-type"], "destination", state.destination
    else:
        (negated, kind), what, address = options.only("--src-type"), "source", state.source
    if kind != "LOCAL" or not address:
        raise options.unknown()
    hit = walk.is_local(address) != negated
    return _yes(hit, f"{what} {address} is {'not ' * negated}an address of this node")


def _statistic(options: _Options, walk: _Walk, state: _State) -> _Test:
    if set(options.given) != {"--mode", "--probability"} or options.given["--mode"] != (False, "random"):
        raise options.unknown()
    negated, value = options.given["--probability"]
    probability = 1 - float(value) if negated else float(value)
    return _Test(probability, f"by chance, {probability:.0%}")


_RECENT_DETAILS = {"--name", "--mask", "--rsource", "--seconds", "--reap"}


def _recent(options: _Options, walk: _Walk, state: _State) -> _Test:
    what = set(options.given) - _RECENT_DETAILS
    if any(negated for negated, _ in options.given.values()) or "--name" not in options.given:
        raise options.unknown()
    name = options.given["--name"][1]
    if what == {"--set"}:
        return _Test(1.0, f"the client is remembered in {name}")
    if what == {"--rcheck"}:
        seconds = options.given.get("--seconds", (False, ""))[1]
        since = f"in the last {seconds} s" if seconds else "before"
        return _Test(0.0, "", f"session affinity: taken if the client was remembered in {name} {since}")
    raise options.unknown()


_MATCHES: Mapping[str, Callable[[_Options, _Walk, _State], _Test]] = {
    "-s": _source,
    "-d": _destination,
    "-p": _protocol,
    "-i": _interface,
    "tcp": _port,
    "udp": _port,
    "sctp": _port,
    "comment": _comment,
    "conntrack": _conntrack,
    "mark": _mark,
    "addrtype": _addrtype,
    "statistic": _statistic,
    "recent": _recent,
}


def _number(text: str) -> int:
    """A mark or a mask as iptables prints it; "" is the mask of all bits."""
    return int(text, 0) if text else 0xFFFFFFFF


@lru_cache(maxsize=65536)
def _inside(ip: str, addresses: str) -> bool:
    return Family.of(ip) is Family.of(addresses) and _address(ip) in _network(addresses)


@lru_cache(maxsize=65536)
def _network(addresses: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(addresses, strict=False)


@lru_cache(maxsize=1024)
def _address(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(ip)
