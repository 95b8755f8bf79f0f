"""The checks a person makes when a Service does not work, in her order. Reads and connects; changes nothing.

`node` looks at what all Services need, `services` at what is wrong with any, `service` at one of them from its slices
to a connection. What is known of the cluster comes from an agent that has planned and writes nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

from . import explain
from .agent import Agent
from .explain import Place
from .flows import CONNECTIONLESS, Flows
from .httpd import parse_address
from .kernel import conntrack, inspection, sysctl
from .kernel.iptables import Variant
from .kernel.links import local_addresses
from .model import Endpoint, Family, PortKey, Problem, ServicePort
from .planner.nft_layout import TABLE
from .policy import categorize
from .trace import TraceError
from .transaction import TransactionError

State = Literal["fine", "note", "wrong"]
T = TypeVar("T")

_FULL = 0.9  # of conntrack's table: new connections are dropped when there is no place
_CATCH_UP = 1.0  # seconds an agent that runs gets for what it has not written yet
_PATIENCE = 2.0  # seconds for an answer; a SYN is sent again after one
_SELECTOR = "see its selector, and whether pods with these labels exist"
_SUDO = "it takes root: try again with sudo"
_MOST = 8  # endpoints that are connected to, names in a list


class Finding(NamedTuple):
    """What one check came to."""

    state: State  # "note": may be meant so
    about: str
    seen: str
    advice: str = ""  # what to do about it


class Doctor:
    """`problems` are those that came up when `agent` planned; `variant` is of iptables, None if the mode has none."""

    def __init__(
        self, agent: Agent, problems: Sequence[Problem], variant: Variant | None, *, connecting: bool = True
    ) -> None:
        self.agent = agent
        self.tracker = agent.tracker
        self.settings = agent.settings
        self.problems = problems
        self._variant = variant
        self._connecting = connecting
        self._families = list(agent.reconcilers)
        self._walk = explain.Walks(agent.tracker, agent.settings, local_addresses)
        self._differing: dict[Family, dict[str, int]] = {}

    # -- the node

    def node(self) -> Iterator[Finding]:
        """What every Service on this node depends on."""
        yield from self._agent()
        yield from self._own_node()
        yield from self._kernel()
        saved, unread = inspection.rulesets(self._families)
        yield from self._others(saved, unread)
        yield from self._forwarding(saved)
        yield from self._connections()

    def _agent(self) -> Iterator[Finding]:
        about = "the agent"
        where = self.settings.healthz_bind_address
        if not where:
            yield Finding("note", about, "serves no health: healthzBindAddress is empty")
            return
        answer = _ask(where, "/healthz")
        if answer is None:
            advice = "start one (miniproxy run); in a cluster, see why its pod on this node does not run"
            yield Finding("wrong", about, f"no service proxy answers at {where}: the kernel keeps what it has", advice)
            return
        status, body = answer
        mode = (_ask(self.settings.metrics_bind_address, "/proxyMode") or (0, ""))[1]
        if status != http.HTTPStatus.OK:
            yield Finding("wrong", about, f"is not healthy: {body}", "its log says what it cannot read or write")
        elif mode and mode != self.settings.mode:
            advice = f"say --proxy-mode {mode}, or --config with the agent's file"
            yield Finding("wrong", about, f"runs in mode {mode}, and this looks for {self.settings.mode}", advice)
        else:
            yield Finding("fine", about, f"is healthy, its last word is of {_updated(body)}{mode and f', mode {mode}'}")

    def _own_node(self) -> Iterator[Finding]:
        node = self.tracker.node
        about = f"node {node.name}"
        if not node.ips:
            known = "no Node object of this name has an address: NodePorts and policy Local cannot work"
            yield Finding("wrong", about, known, "say --hostname-override as the Node object is named")
            return
        mine = {ip for family in Family for ip in local_addresses(family)}
        strange = [ip for ip in node.ips if ip not in mine]
        if strange:
            advice = "run this on the node itself, or name the node with --hostname-override"
            yield Finding(
                "wrong", about, f"has no link with the address {' '.join(strange)} of its Node object", advice
            )
        else:
            yield Finding("fine", about, f"has the addresses of its Node object: {' '.join(node.ips)}")

    def _kernel(self) -> Iterator[Finding]:
        for family in self._families:
            yield _reading(self._held, f"the kernel, {family}", family)

    def _held(self, about: str, family: Family) -> Finding:
        differing = self.differing(family)
        if not differing:
            count = len(self.agent.reconcilers[family].desired)
            return Finding("fine", about, f"holds what is planned, {count} objects")
        count = sum(differing.values())
        seen = f"{count} objects are not as planned: {_named(f'{who} ({n})' for who, n in differing.items())}"
        advice = "miniproxy plan --diff shows them; a healthy agent repairs them at its next check"
        return Finding("wrong", about, seen, advice)

    def differing(self, family: Family) -> dict[str, int]:
        """Objects that are not as planned, by the service port they belong to. Raises TransactionError."""
        if family not in self._differing:
            reconciler = self.agent.reconcilers[family]
            if reconciler.adopt():
                time.sleep(_CATCH_UP)
                reconciler.adopt()
            self._differing[family] = reconciler.differing()
        return self._differing[family]

    def _others(self, saved: dict[str, str], unread: list[str]) -> Iterator[Finding]:
        if os.geteuid():
            yield Finding("note", "other service proxies", "cannot be looked for", _SUDO)
            return
        mode = self.settings.mode
        found = inspection.traces(self._families, saved)
        names = [f"{n} rules in {name}" for name, n in found.chains.items() if not name.endswith(f"-{self._variant}")]
        names += [f"table {t}" for t in found.tables if not (mode == "nftables" and t.endswith(f" {TABLE}"))]
        names += found.ipvs if mode != "ipvs" else []
        if names:
            advice = "if no other service proxy runs here, a start of the agent removes what other modes have left"
            yield Finding("wrong", "other service proxies", f"also here: {', '.join(names)}", advice)
        for reason in unread:
            seen = f"some cannot be looked for: {reason}"
            yield Finding("note", "other service proxies", seen, "in a container, iptables-legacy takes NET_RAW")
        if not names and not unread:
            yield Finding("fine", "other service proxies", "none has left anything here")

    def _forwarding(self, saved: dict[str, str]) -> Iterator[Finding]:
        used = {port.family for port in self.tracker.ports()}
        wrong = [problem for family in sorted(used) if (problem := sysctl.forwarding_problem(family))]
        for problem in wrong:
            yield Finding("wrong", "forwarding", problem)
        if not wrong:
            yield Finding("fine", "forwarding", "is on")
        for name in (name for name, text in saved.items() if ":FORWARD DROP " in text):
            seen = f"{name} drops what no rule accepts (policy of FORWARD)"
            yield Finding("note", "forwarding", seen, "the network plugin has to accept packets from and to pods")
        if bridges := inspection.unfiltered_bridges():
            seen = (
                f"packets between ports of {' '.join(bridges)} pass no rules: replies of pods there stay untranslated"
            )
            advice = "if pods are there: modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1"
            yield Finding("note", "forwarding", seen, advice)

    @staticmethod
    def _connections() -> Iterator[Finding]:
        fill = inspection.connections()
        if fill is None or not fill.limit:
            return
        state: State = "wrong" if fill.used >= _FULL * fill.limit else "fine"
        advice = "new ones are dropped when it is full: raise conntrack.maxPerCore" if state == "wrong" else ""
        yield Finding(state, "conntrack", f"{fill.used} of {fill.limit} connections", advice)

    # -- all Services

    def services(self) -> Iterator[Finding]:
        """What is wrong with any Service. Looks at all of them."""
        for problem in self.problems:
            yield _of_problem(problem)
        ports = list(self.tracker.ports())
        unserved = [p for p in ports if not categorize(p, self.tracker.endpoints(_key(p)), self.tracker.node).any]
        seen = f"{len(ports)} service ports are known"
        if unserved:
            seen += f"; {len(unserved)} are refused, since nobody serves them: {_named(map(_name, unserved))}"
            yield Finding("note", "services", seen, "miniproxy doctor NAMESPACE/NAME tells why")
        else:
            yield Finding("fine", "services", f"{seen}; all have somebody to serve them")

    # -- one Service

    def service(self, namespace: str, name: str, places: Sequence[Place]) -> Iterator[Finding]:
        """One Service, at these places where it answers."""
        for problem in self.problems:
            if explain.concerns(problem, namespace, name):
                yield _of_problem(problem)
        for port in dict.fromkeys(place.port for place in places):
            yield from self._endpoints(port)
            yield _reading(self._programmed, f"{_name(port)} in the kernel", port)
            if port.name.protocol in CONNECTIONLESS:
                yield _reading(self._flows, f"{_name(port)} flows", port)
        for place in places:
            yield self._place(place)

    def _endpoints(self, port: ServicePort) -> Iterator[Finding]:
        about = f"{_name(port)} endpoints"
        candidates = explain.candidates(self.tracker, _key(port))
        serving = [c.endpoint for c in candidates if not c.why_not]
        if not candidates:
            yield Finding("wrong", about, *self._no_endpoints(port))
        elif not serving:
            why = _named(f"{c.endpoint} {c.why_not}" for c in candidates)
            yield Finding("wrong", about, f"none serves here: {why}", "see the pods' readiness, and the traffic policy")
        else:
            aside = len(candidates) - len(serving)
            more = f"; {aside} do not: {_named(f'{c.endpoint} {c.why_not}' for c in candidates if c.why_not)}"
            yield Finding("fine", about, f"{len(serving)} serve here{more if aside else ''}")
            yield from self._reached(about, port, serving)

    def _no_endpoints(self, port: ServicePort) -> tuple[str, str]:
        """Why a service port has no endpoints at all, and what to do."""
        slices = self.tracker.slices(port.name.namespace, port.name.name)
        if not slices:
            return "no EndpointSlice names this Service", _SELECTOR
        mine = [s for s in slices if s.family is port.family]
        if not mine:
            return f"its slices have no {port.family} addresses", "pods have to have addresses of both families"
        offered = {f"{p.name or '(unnamed)'}/{p.protocol}" for s in mine for p in s.ports}
        wanted = f"{port.name.port or '(unnamed)'}/{port.name.protocol}"
        if wanted in offered:
            return "its slices are empty", _SELECTOR
        seen = f"its slices have the ports {', '.join(sorted(offered)) or 'of none'}, not {wanted}"
        return seen, "ports go together by name and protocol: see targetPort, and the pods' port names"

    def _reached(self, about: str, port: ServicePort, endpoints: Sequence[Endpoint]) -> Iterator[Finding]:
        if not self._connecting or port.name.protocol != "TCP":
            return
        asked = endpoints[:_MOST]
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda e: _connect(e.ip, e.port), asked))
        bad = [f"{e} {answer}" for e, answer in zip(asked, answers, strict=True) if answer]
        if bad:
            advice = "refused: nothing listens there, see targetPort; no answer: routes to pods, or a network policy"
            yield Finding("wrong", about, f"asked directly, from this node: {', '.join(bad)}", advice)
        else:
            yield Finding("fine", about, f"asked directly, {len(asked)} of {len(endpoints)} take connections")

    def _programmed(self, about: str, port: ServicePort) -> Finding:
        missing = self.differing(port.family).get(str(port.name), 0)
        count = len(self.agent.reconcilers[port.family].wanted(port.name))
        if not missing:
            return Finding("fine", about, f"all {count} objects are as planned")
        advice = "miniproxy plan --diff shows them; if the agent runs, its log says what it cannot write"
        return Finding("wrong", about, f"{missing} objects are not as planned, of {count}", advice)

    def _flows(self, about: str, port: ServicePort) -> Finding:
        """Whether clients without connections are still sent to endpoints that are gone."""
        flows = Flows(local_addresses)
        flows.change(_key(port), port, self.tracker.endpoints(_key(port)))
        places = {stale[:4]: stale for stale in flows.all(port.family)}
        known = conntrack.flows(port.family) if places else ()
        stale = [flow for flow in known if flow[:4] in places and places[flow[:4]].means(flow)]
        if not stale:
            return Finding("fine", about, "none goes to an endpoint that does not serve")
        gone = _named(sorted({flow.endpoint for flow in stale}))
        advice = f"a healthy agent forgets them; by hand: conntrack -D -p {port.name.protocol.lower()} -r ADDRESS"
        return Finding("wrong", about, f"{len(stale)} still go to {gone}, which do not serve", advice)

    def _place(self, place: Place) -> Finding:
        """Where a connection from this node to it ends, by the rules and in truth."""
        protocol = place.port.name.protocol
        about = f"{place.kind} {place.where}{'' if protocol == 'TCP' else f' {protocol}'}"
        source = self.tracker.node.ip(place.port.family) or place.address
        try:
            outcome = self._walk(explain.packet(place, source, ""))
        except (TraceError, ValueError) as error:
            return Finding("note", about, f"cannot be followed: {error}")
        if not outcome.endpoints:
            last = outcome.branches[0].steps[-1:]
            words = "" if self.settings.mode == "iptables" else "in iptables mode's words, "
            decided = "".join(f"{words}decided by {step.place}: {step.rule}" for step in last)
            return Finding("wrong", about, f"from this node {explain.sentence(outcome)}", decided)
        planned = f"by the rules, leads to {_named(map(str, outcome.endpoints))}"
        if not self._connecting or protocol != "TCP":
            return Finding("fine", about, planned)
        answer = _connect(place.address, place.number)
        if answer:
            advice = "if its endpoints answer when asked directly, something else on the way drops or rewrites it"
            return Finding("wrong", about, f"{answer}; {planned}", advice)
        return Finding("fine", about, f"connects; {planned}")


def _reading(check: Callable[[str, T], Finding], about: str, what: T) -> Finding:
    """What a check comes to that reads the kernel, or that it cannot be read."""
    try:
        return check(about, what)
    except (TransactionError, OSError) as error:
        return Finding("note", about, f"cannot be read: {error}", _SUDO if os.geteuid() else "")


def _ask(where: str, path: str) -> tuple[int, str] | None:
    """Status and body of what is served there; None if nothing is."""
    if not where:
        return None
    host, port = parse_address(where)
    connection = http.client.HTTPConnection(host or "127.0.0.1", port, timeout=_PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _updated(body: str) -> str:
    try:
        return str(json.loads(body)["lastUpdated"])
    except (ValueError, LookupError, TypeError):
        return "?"


def _connect(address: str, port: int) -> str:
    """Open a TCP connection and close it; "" if that went well, else what came of it."""
    try:
        socket.create_connection((address, port), _PATIENCE).close()
    except ConnectionRefusedError:
        return "refused the connection"
    except TimeoutError:
        return "did not answer"
    except OSError as error:
        return f"cannot be reached: {error.strerror or error}"
    return ""


def _of_problem(problem: Problem) -> Finding:
    return Finding("wrong", str(problem.ref), problem.statement)


def _key(port: ServicePort) -> PortKey:
    return port.name, port.family


def _name(port: ServicePort) -> str:
    return f"{port.name} {port.name.protocol} {port.family}"


def _named(names: Iterable[str]) -> str:
    """The first few of them."""
    names = list(names)
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
