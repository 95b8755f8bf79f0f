"""miniproxy lab: a cluster of network namespaces, kept up for a person to play with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import click

from .errors import Failure

if TYPE_CHECKING:
    from rich.console import Console

    from ..lab import Lab, LabSpec

MODES = ("iptables", "ipvs", "nftables")
VARIANTS = ("auto", "nft", "legacy")
DEFAULT_NAME = "lab"
_LOOKS = {"ipvs": "ipvsadm -Ln", "nftables": "nft list ruleset"}  # at what the kernel holds

_name = click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which lab; several can be up.")


@contextmanager
def failing_clearly() -> Iterator[None]:
    """Turns what a lab complains about into the command's own failure."""
    from ..lab import LabError

    try:
        yield
    except LabError as error:
        raise Failure(*str(error).splitlines()) from None


def attach(name: str) -> Lab:
    from ..lab import Lab
    from ..lab.netns import require_system

    require_system()
    return Lab.attach(name)


def _elsewhere(name: str) -> bool:
    """Whether a lab runs in user-mode Linux, so that commands have to be passed on. Raises LabError."""
    from ..lab import state
    from ..lab.netns import require_system

    require_system()
    return state.read_record(name).machine


@click.group()
def command() -> None:
    """A cluster of network namespaces on this machine: nodes, pods and an agent on each node.

    To learn and to try out Service networking without Kubernetes. Everything lives in network namespaces named
    mp-NAME-…; the machine's own links, addresses, routes and rules stay untouched, and `down` leaves nothing.
    Needs root.

    \b
    Examples:
      miniproxy lab up
      miniproxy lab status
      miniproxy lab exec client-1 -- curl -s http://10.96.0.10/
      miniproxy lab exec node1 -- iptables-save -t nat
      miniproxy lab scale web 2
      miniproxy lab down
    """


@command.command()
@_name
@click.option("--nodes", default=2, show_default=True, help="How many nodes.")
@click.option("--pods-per-node", default=4, show_default=True, help="How many pods that serve, on each node.")
@click.option("--proxy-mode", type=click.Choice(MODES), default="iptables", show_default=True,
              help="What the agents program.")  # fmt: skip
@click.option("--iptables-variant", type=click.Choice(VARIANTS), default="auto", show_default=True,
              help="Which iptables the agents use.")  # fmt: skip
@click.option("--overlay", type=click.Choice(["host-gw", "vxlan"]), default="host-gw", show_default=True,
              help="How nodes reach each other's pods: by routes, or through a VXLAN.")  # fmt: skip
@click.option("--no-agents", is_flag=True, help="Only nodes and pods; no Service works then.")
def up(
    name: str,
    nodes: int,
    pods_per_node: int,
    proxy_mode: str,
    iptables_variant: str,
    overlay: str,
    no_agents: bool,
) -> None:
    """Build a lab and leave it running.

    \b
    Examples:
      miniproxy lab up
      miniproxy lab up --nodes 3 --overlay vxlan --iptables-variant legacy
      miniproxy lab up --proxy-mode ipvs            in user-mode Linux, if this kernel has no IPVS
      miniproxy lab up --no-agents --name bare      run agents of your own in its nodes
    """
    from ..lab import Lab, LabSpec, uml

    with failing_clearly():
        spec = LabSpec(name=name, nodes=nodes, pods_per_node=pods_per_node, overlay=overlay)  # type: ignore[arg-type]
        if proxy_mode == "ipvs" and not uml.has_ip_vs():
            agents = ["--no-agents"] if no_agents else []
            _up_elsewhere(spec, ["--proxy-mode=ipvs", f"--iptables-variant={iptables_variant}", *agents])
            return
        lab = Lab(spec)
        lab.up()
        try:
            if not no_agents:
                lab.start_agents(mode=proxy_mode, variant=iptables_variant)
            lab.stay()
        except BaseException:
            lab.down()
            raise
        _show(_console(), lab.status())


def _up_elsewhere(spec: LabSpec, options: list[str]) -> None:
    """The same lab on a kernel that has IPVS."""
    from ..lab import LabError, machine, uml

    if not uml.available():
        raise LabError(f"this machine's kernel has no IPVS: {uml.HOW_TO_GET_IT}")
    click.echo("This machine's kernel has no IPVS, so the lab runs in user-mode Linux: give it half a minute.")
    shape = [f"--nodes={spec.nodes}", f"--pods-per-node={spec.pods_per_node}", f"--overlay={spec.overlay}"]
    with machine.booted(spec):
        # What it prints is the lab's status, which comes again below.
        if machine.run(spec.name, ["lab", "up", f"--name={spec.name}", *shape, *options], BytesIO()):
            raise LabError("the lab does not come up in user-mode Linux.")
        found = machine.status(spec.name)
    _show(_console(), found)


@command.command()
@click.option("--name", help="Only this lab; without it, all of them.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object for each lab.")
def status(name: str | None, as_json: bool) -> None:
    """Show labs: nodes and agents, pods, Services, and commands to try.

    \b
    Examples:
      miniproxy lab status
      miniproxy lab status --json | jq '.[0].services[] | {name, cluster_ips, pods}'
    """
    from ..lab import state

    with failing_clearly():
        names = [name] if name else [each for each in state.labs() if not state.read_record(each).benchmark]
        found = [_status(each) for each in names]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not found:
        click.echo("No lab is up. `miniproxy lab up` builds one.")
    else:
        console = _console()
        for each in found:
            _show(console, each)


def _status(name: str) -> dict[str, Any]:
    from ..lab import machine

    return machine.status(name) if _elsewhere(name) else attach(name).status()


@command.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_name
@click.argument("where")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, where: str, cmd: tuple[str, ...]) -> None:
    """Run a command at a place: a node, a pod, or outside of the cluster.

    \b
    Examples:
      miniproxy lab exec node1 -- iptables-save -t nat
      miniproxy lab exec web-1 -- ip addr
      miniproxy lab exec outside -- curl -s http://172.30.0.1:30080/
      miniproxy lab exec client-1 -- bash
    """
    from ..lab import machine

    words = cmd[1:] if cmd[0] == "--" else cmd
    if not words:
        raise Failure("say which command to run: miniproxy lab exec WHERE -- COMMAND", code=2)
    with failing_clearly():
        if _elsewhere(name):
            raise SystemExit(machine.run(name, ["lab", "exec", "--name", name, where, "--", *words]))
        place = attach(name).place(where)
    os.execvpe("ip", place.command(words), place.environment())


@command.command(context_settings={"ignore_unknown_options": True})
@_name
@click.argument("node")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def doctor(name: str, node: str, arguments: tuple[str, ...]) -> None:
    """Run `miniproxy doctor` on a NODE with its agent's settings; ARGUMENTS are the doctor's.

    \b
    Examples:
      miniproxy lab doctor node1
      miniproxy lab doctor node1 default/empty
      miniproxy lab doctor node2 10.96.0.10:80 --json
    """
    from ..lab import machine
    from ..lab.subprocesses import python_module

    with failing_clearly():
        if _elsewhere(name):
            raise SystemExit(machine.run(name, ["lab", "doctor", "--name", name, node, *arguments]))
        lab = attach(name)
        place, settings = lab.node(node), lab.agent_settings(node)
    words = python_module("miniproxy", "doctor", *settings, *arguments)
    os.execvpe("ip", place.command(words), place.environment())


@command.command()
@_name
@click.argument("service")
@click.argument("count", type=click.IntRange(0))
def scale(name: str, service: str, count: int) -> None:
    """Put the first COUNT pods (web-1, web-2, …) behind a SERVICE, by rewriting its slices.

    \b
    Examples:
      miniproxy lab scale web 2
      miniproxy lab scale empty 1
    """
    from ..lab import machine

    with failing_clearly():
        if _elsewhere(name):
            raise SystemExit(machine.run(name, ["lab", "scale", "--name", name, service, str(count)]))
        pods = attach(name).scale(service, count)
    click.echo(f"{service}: {', '.join(pods) or 'no pods'}")


@command.command()
@click.option("--name", help=f"Which lab.  [default: {DEFAULT_NAME}]")
@click.option("--all", "everything", is_flag=True, help="All labs but those of a running demo or test.")
def down(name: str | None, everything: bool) -> None:
    """Remove a lab: its processes, namespaces and files, also after a crash.

    \b
    Examples:
      miniproxy lab down
      miniproxy lab down --all
    """
    from ..lab import state
    from ..lab.netns import require_system

    if name and everything:
        raise Failure("say either --name or --all", code=2)
    with failing_clearly():
        require_system()
        removed = state.sweep()
        names = state.labs() if everything else [name or DEFAULT_NAME]
        for each in names:
            owner = state.owner_of(each)
            if owner is not None and everything:
                click.echo(f"lab {each}: left alone, process {owner.pid} is using it")
            elif owner is not None:
                raise Failure(f"lab {each!r} belongs to process {owner.pid}, which removes it at its end")
            elif state.destroy(each):
                removed.append(each)
    for each in removed:
        click.echo(f"lab {each}: removed")
    if not removed:
        click.echo("There is no lab to remove." if everything else f"There is no lab named {names[0]!r}.")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _show(console: Console, status: dict[str, Any]) -> None:
    from rich.table import Table

    agents = f"{status['mode']} mode" if status["mode"] else "no agents"
    console.print(f"\n[bold]lab {status['name']}[/]  {status['overlay']}, {agents}, {status['folder']}")
    if "machine" in status:
        console.print("In user-mode Linux: files, rules and processes are in there, for `lab exec` to reach.",
                      soft_wrap=True)  # fmt: skip
    if not status["server"]:
        console.print("[red]The pods' server does not run: no pod answers. Rebuild the lab.[/]")

    nodes = Table("NODE", "IPs", "POD CIDRs", "AGENT", "PODS", box=None, pad_edge=False, padding=(0, 1))
    for node in status["nodes"]:
        agent = node["agent"]
        says = "none" if agent is None else f"pid {agent['pid']}" if agent["alive"] else "[red]ended[/]"
        pods = [pod["name"] for pod in status["pods"] if pod["node"] == node["name"]]
        nodes.add_row(node["name"], "\n".join(node["ips"]), "\n".join(node["pod_cidrs"]), says, " ".join(pods))
    console.print(nodes)
    console.print()

    services = Table("SERVICE", "TYPE", "IPs", "PORT", "PODS", box=None, pad_edge=False, padding=(0, 1))
    for service in status["services"]:
        node_port = f":{service['node_port']}" if service["node_port"] else ""
        ips = (*service["cluster_ips"], *service["load_balancer_ips"])
        ports = f"{service['port']}{node_port}/{service['protocol']}"
        services.add_row(service["name"], service["type"], "\n".join(ips), ports, _pods(service["pods"]))
    for column in services.columns:
        column.no_wrap = True
    console.print(services)
    console.print("\nTry:")
    for line in examples(status["name"], status["mode"]):
        console.print(f"  {line}", soft_wrap=True, markup=False)


def _pods(names: list[str]) -> str:
    if len(names) > 4:
        return f"{names[0]} … {names[-1]} ({len(names)})"
    return " ".join(names) or "none"


def examples(name: str, mode: str) -> list[str]:
    """Commands to paste, for a lab of that name with agents in that mode."""
    option = "" if name == DEFAULT_NAME else f" --name {name}"
    run = f"miniproxy lab exec{option}"
    return [
        f"{run} client-1 -- curl -s http://10.96.0.10/",
        f"{run} outside -- curl -s http://172.30.0.1:30080/",
        f"{run} client-1 -- curl -s 'http://[fd00:96::10]/'",
        f"{run} node1 -- {_LOOKS.get(mode, 'iptables-save -t nat')}",
        f"miniproxy lab doctor{option} node1 default/empty",
        f"miniproxy lab scale{option} web 2",
        f"miniproxy lab down{option}",
    ]
