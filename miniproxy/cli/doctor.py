"""miniproxy doctor: what is wrong with this node, or with one Service on it?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from ..config import Loaded
from .explain import find_places
from .options import SettingsCommand, settings_options
from .plan import planned

if TYPE_CHECKING:
    from ..doctor import Doctor, Finding

_MARKS = {"fine": ("✔", "green"), "note": ("!", "yellow"), "wrong": ("✘", "red")}


@click.command(cls=SettingsCommand)
@click.argument("target", required=False)
@click.option("--no-connect", is_flag=True, help="Open no connections to endpoints and Services.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@settings_options
def command(loaded: Loaded, target: str | None, no_connect: bool, as_json: bool) -> None:
    """Check this node and its Services, or look into one: TARGET is NAMESPACE/NAME or ADDRESS:PORT.

    Run it on the node, as root, with the agent's own settings. It asks the agent for its health, compares the kernel
    with what should be in it, looks for other service proxies, forwarding and a full conntrack table. Of one Service
    it checks slices, endpoints and rules, connects to its endpoints and to each of its addresses (TCP), and says which
    step fails. It changes nothing. Exit code 1: something is wrong.

    \b
    Examples:
      sudo miniproxy doctor --config /var/lib/kube-proxy/config.conf
      sudo miniproxy doctor default/web --source manifests/ --hostname-override node1
      sudo miniproxy doctor 10.96.0.10:80 --json
      miniproxy lab doctor node1 default/web         on a node of the lab
    """
    from ..doctor import Doctor
    from ..model import Family

    agent, problems, dataplane = planned(loaded, list(Family))
    doctor = Doctor(agent, problems, dataplane.variant, connecting=not no_connect)
    sections: list[tuple[str, Iterable[Finding]]] = [("this node", doctor.node())]
    if target:
        sections += _services(doctor, target)
    else:
        sections.append(("Services", doctor.services()))
    found = [(title, _shown(title, findings, as_json)) for title, findings in sections]
    if as_json:
        plain = [{"section": title, **finding._asdict()} for title, findings in found for finding in findings]
        click.echo(json.dumps({"findings": plain}, indent=2))
    if any(finding.state == "wrong" for _, findings in found for finding in findings):
        raise SystemExit(1)


def _services(doctor: Doctor, target: str) -> list[tuple[str, Iterable[Finding]]]:
    """A section for each Service that TARGET is; an address and port can be one of several protocols."""
    places = find_places(doctor.agent, doctor.problems, target)
    names = dict.fromkeys(place.port.name[:2] for place in places)
    return [
        (
            f"Service {namespace}/{name}",
            doctor.service(namespace, name, [p for p in places if p.port.name[:2] == (namespace, name)]),
        )
        for namespace, name in names
    ]


def _shown(title: str, findings: Iterable[Finding], as_json: bool) -> list[Finding]:
    """All of them; each is printed as it comes, since some take seconds."""
    done = []
    if not as_json:
        click.secho(title, bold=True)
    for finding in findings:
        done.append(finding)
        if not as_json:
            mark, colour = _MARKS[finding.state]
            click.echo(f"  {click.style(mark, fg=colour)} {finding.about}: {finding.seen}")
            if finding.advice:
                click.echo(f"      → {finding.advice}")
    return done
