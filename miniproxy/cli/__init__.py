"""The command line. This file is the table of commands; each lives in a file of its own, as `command`.

A command's file, and so what it needs (which takes up to a quarter of a second), is imported when the command is used:
`miniproxy --help` knows them by the table's one line each.
"""

from __future__ import annotations

from importlib import import_module

import click

from .. import __version__

COMMANDS = {
    "run": ("miniproxy.cli.run:command", "Program this node from a folder of manifests or an API server."),
    "plan": ("miniproxy.cli.plan:command", "Print what would be programmed; needs no root."),
    "explain": ("miniproxy.cli.explain:command", "Why does a Service (not) work? Walks a packet through it."),
    "doctor": ("miniproxy.cli.doctor:command", "Check this node, its Services, or one of them."),
    "cleanup": (
        "miniproxy.cli.cleanup:command",
        "Remove from the kernel what miniproxy programmed, nothing else.",
    ),
    "config": ("miniproxy.cli.config:command", "Check a configuration file, show the effective settings."),
    "lab": ("miniproxy.cli.lab:command", "A cluster of network namespaces on this machine."),
    "bench": ("miniproxy.cli.bench:command", "Measure this machine: modes, sizes, and kube-proxy beside."),
    "demo": ("miniproxy.cli.demo:command", "Watch it work: a guided minute in the lab."),
}


class LazyGroup(click.Group):
    """A group of commands known by COMMANDS, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="miniproxy", message="%(prog)s %(version)s")
def group() -> None:
    """A Kubernetes service proxy: desired minus applied is one small transaction.

    \b
    Examples:
      miniproxy run --source manifests/             a node without a cluster
      miniproxy run --config /var/lib/kube-proxy/config.conf
      miniproxy plan --source manifests/            what that would program
      miniproxy config check config.conf
    """


def main() -> None:
    """The console script; exits 0, 1 for a failure, 2 for a wrong use."""
    group(prog_name="miniproxy")
