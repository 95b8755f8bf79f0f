"""miniproxy explain: why does my Service (not) work?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..config import Loaded
from .errors import Failure
from .options import SettingsCommand, settings_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..agent import Agent
    from ..explain import Candidate, Place, Walks
    from ..model import Problem, ServicePort
    from ..trace import Outcome


@click.command(cls=SettingsCommand)
@click.argument("target")
@click.option("--from", "origin", default="node", metavar="node|IP", help="Who connects: this node, or an address.")
@click.option("--interface", default="", help="Interface the packet comes in by; default: eth0 for an address.")
@click.option("--all-rules", is_flag=True, help="Every rule on the way, not only the verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@settings_options
def command(loaded: Loaded, target: str, origin: str, interface: str, all_rules: bool, as_json: bool) -> None:
    """Explain where a connection to TARGET would end, and why. Needs no root, sends no packet.

    TARGET is a Service (NAMESPACE/NAME, then every address it answers on is explained) or ADDRESS:PORT.

    It tells which Service that is, what is wrong with it, which of its endpoints serve on this node and why the
    others do not, and how the first packet passes the rules: to which endpoints, with whose source address, refused
    or dropped.

    \b
    Examples:
      miniproxy explain default/web --source manifests/ --hostname-override node1
      miniproxy explain 10.96.0.10:80 --from 10.244.1.7 --all-rules
      miniproxy explain 172.30.0.2:30080 --from 203.0.113.7
      miniproxy explain [fd00:96::10]:80 --json
    """
    from ..explain import Walks, concerns
    from ..kernel.links import local_addresses
    from ..model import Family
    from .plan import planned

    agent, problems, _ = planned(loaded, list(Family))
    found = find_places(agent, problems, target)
    walk = Walks(agent.tracker, agent.settings, local_addresses)
    results = [_explain(agent, walk, place, origin, interface) for place in found]
    services = {place.port.name[:2] for place in found}
    about = [p for p in problems if any(concerns(p, *service) for service in services)]
    if as_json:
        click.echo(
            json.dumps({"problems": [str(p) for p in about], "connections": list(map(_plain, results))}, indent=2)
        )
    else:
        _print(agent, about, results, all_rules)


def find_places(agent: Agent, problems: Sequence[Problem], target: str) -> list[Place]:
    """Where the target answers, in families that this node has; that it does nowhere ends the command, with why."""
    from ..explain import concerns, places
    from ..sources.checks import address

    def served(**where: Any) -> list[Place]:
        return [p for p in places(agent.tracker, **where) if p.port.family in agent.reconcilers]

    if "/" in target:
        found = served(service=target)
        if found:
            return found
        wrong = [str(p) for p in problems if concerns(p, *target.split("/", 1)) or p.ref.kind in ("API", "File")]
        if wrong:
            raise Failure(f"no Service {target} can be served", *wrong)
        if agent.tracker.service(*target.split("/", 1)):
            raise Failure(
                f"Service {target} is none that a service proxy serves",
                "it is headless, of type ExternalName, or left to another proxy by its label "
                "service.kubernetes.io/service-proxy-name",
            )
        raise Failure(
            f"no Service {target} with a cluster IP is known",
            "headless and ExternalName Services, and those of another proxy, are not a service proxy's business",
        )
    host, _, number = target.rpartition(":")
    if not number.isdigit() or not host:
        raise Failure(f"{target}: write NAMESPACE/NAME, ADDRESS:PORT or [ADDRESS]:PORT", code=2)
    ip = address(host.strip("[]"))
    found = served(address=ip, number=int(number)) if ip else []
    if not found:
        elsewhere = places(agent.tracker, address=ip) if ip else []
        ports = ", ".join(sorted({f"{p.number}/{p.port.name.protocol}" for p in elsewhere}))
        owner = f"; {'/'.join(elsewhere[0].port.name[:2])} answers there, on {ports}" if elsewhere else ""
        raise Failure(f"no Service known here answers on {target}{owner}")
    return found


class _Result:
    """One place, explained."""

    def __init__(self, place: Place, candidates: list[Candidate], outcome: Outcome, origin: str) -> None:
        self.place = place
        self.candidates = candidates
        self.outcome = outcome
        self.origin = origin


def _explain(agent: Agent, walk: Walks, place: Place, origin: str, interface: str) -> _Result:
    from .. import explain, trace

    family = place.port.family
    if origin == "node":
        source, interface = agent.tracker.node.ip(family) or place.address, ""
    else:
        source, interface = origin, interface or "eth0"
    try:
        outcome = walk(explain.packet(place, source, interface))
    except (trace.TraceError, ValueError) as error:
        raise Failure(f"{place.address}:{place.number} from {origin}: {error}") from None
    candidates = explain.candidates(agent.tracker, (place.port.name, family))
    return _Result(place, candidates, outcome, origin)


def _plain(result: _Result) -> dict[str, Any]:
    place, outcome = result.place, result.outcome
    return {
        "service": str(place.port.name),
        "kind": place.kind,
        "address": place.address,
        "port": place.number,
        "protocol": place.port.name.protocol,
        "from": result.origin,
        "verdicts": {str(v): share for v, share in outcome.verdicts.items()},
        "reaches": {str(e): share for e, share in outcome.endpoints.items()},
        "masqueraded": sorted(outcome.masqueraded),
        "endpoints": [
            {
                "address": str(c.endpoint),
                "node": c.endpoint.node,
                "cluster": c.cluster,
                "local": c.local,
                "whyNot": c.why_not,
            }
            for c in result.candidates
        ],
        "ways": [[{"place": s.place, "rule": s.rule, "why": s.why} for s in b.steps] for b in outcome.branches],
    }


def _print(agent: Agent, problems: list[Problem], results: list[_Result], all_rules: bool) -> None:
    node = agent.tracker.node
    click.echo(f"on node {node.name or '?'}, zone {node.zone or 'unknown'}")
    if not node.ips:
        click.secho(f"! no Node object named {node.name!r} is known: say --hostname-override", fg="yellow")
    for problem in problems:
        click.secho(f"! {problem}", fg="yellow")
    mode = agent.settings.mode
    if mode != "iptables":
        click.echo(
            f"the way is shown by the rules of iptables mode, which decide the same as {mode} mode does (docs/modes.md "
            f"has the exceptions); --all-rules also shows what {mode} mode has for the Service"
        )
    shown: set[object] = set()
    for result in results:
        key = (result.place.port.name, result.place.port.family)
        if key not in shown:
            shown.add(key)
            _print_port(result)
            if all_rules and mode != "iptables":
                _print_own(agent, result.place.port)
        _print_way(result, all_rules)


def _print_port(result: _Result) -> None:
    port = result.place.port
    internal = "Local" if port.internal_local else "Cluster"
    external = "Local" if port.external_local else "Cluster"
    affinity = f", affinity for {port.affinity_seconds} s" if port.affinity_seconds else ""
    click.secho(f"\n{port.name} {port.name.protocol} {port.family}", bold=True)
    click.echo(f"  traffic policy: internal {internal}, external {external}{affinity}")
    if not result.candidates:
        click.echo("  no endpoints: no EndpointSlice of this Service has any for this port and family")
    for c in result.candidates:
        roles = [name for name, yes in (("Cluster", c.cluster), ("Local", c.local)) if yes]
        where = f"on {c.endpoint.node}" if c.endpoint.node else "on no node"
        state = f"serves {' and '.join(roles)} traffic" if roles else f"serves nothing here: {c.why_not}"
        click.echo(f"  {'✔' if roles else '✘'} {c.endpoint} {where} {state}")


def _print_own(agent: Agent, port: ServicePort) -> None:
    """What the kernel has to be told of a service port alone; what serves others too is not shown."""
    from ..transaction import Change

    reconciler = agent.reconcilers[port.family]
    changes = [Change(obj.key, None, obj) for obj in reconciler.wanted(port.name)]
    shared = ("add table ", "add set ", "add map ", "add chain ", "add rule ")  # an affinity group's
    click.echo(f"  in the kernel, {agent.settings.mode} mode:")
    for line in reconciler.backend.render(changes).text.splitlines():
        if not line.startswith(shared):
            click.echo(f"      {line}")


def _print_way(result: _Result, all_rules: bool) -> None:
    from ..explain import sentence

    place = result.place
    where = place.where if place.address else f"(no address of the node is known):{place.number}"
    click.echo(f"  {place.kind} {where} from {result.origin}: ", nl=False)
    click.secho(sentence(result.outcome), bold=True)
    reached = bool(result.outcome.endpoints)
    for branch in result.outcome.branches if all_rules else result.outcome.branches[: 0 if reached else 1]:
        steps = branch.steps if all_rules else branch.steps[-1:]
        for step in steps:
            click.echo(f"      {step.place}: {step.rule}" + (f"   [{step.why}]" if step.why else ""))
