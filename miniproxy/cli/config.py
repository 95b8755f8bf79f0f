"""`miniproxy config`: check a file, show the effective settings, print the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import Loaded
from ..config_schema import go_duration
from .errors import Failure
from .options import SettingsCommand, announce, load_or_fail, settings_options


@click.group()
def command() -> None:
    """Check a configuration file, show the effective settings.

    \b
    Examples:
      miniproxy config check /var/lib/kube-proxy/config.conf
      miniproxy config show --config config.conf --proxy-mode nftables
      miniproxy config show --json | jq .settings.cluster_cidrs
    """


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print an object with the keys ok, problems and warnings.")
def check(file: Path, as_json: bool) -> None:
    """Say everything that is wrong with FILE, with line and field; exit 1 if anything is.

    FILE is what kube-proxy's --config takes: a KubeProxyConfiguration v1alpha1 in YAML or JSON. Warnings name
    what is well-formed but has no effect here.

    \b
    Example, a running cluster's:
      kubectl -n kube-system get configmap kube-proxy -o jsonpath='{.data.config\\.conf}' > config.conf
      miniproxy config check config.conf
    """
    try:
        warnings = load_or_fail(file, {}).warnings
    except Failure as failure:
        if not as_json:
            raise
        _print_json({"ok": False, "problems": list(failure.lines), "warnings": []})
        raise SystemExit(1) from None
    if as_json:
        _print_json({"ok": True, "problems": [], "warnings": list(warnings)})
        return
    for warning in warnings:
        click.echo(f"warning: {warning}")
    count = len(warnings)
    click.echo(f"{file}: good" + (f" ({count} warning{'s' * (count != 1)})" if count else ""))


@command.command(cls=SettingsCommand)
@click.option("--json", "as_json", is_flag=True, help="Print an object with the keys settings, origins and warnings.")
@settings_options
def show(loaded: Loaded, as_json: bool) -> None:
    """Show every setting, its value, and where it came from: default, a line of the file, or a flag."""
    announce(loaded)
    values = {name: getattr(loaded.settings, name) for name in loaded.origins}
    if as_json:
        origins = {name: origin._asdict() for name, origin in loaded.origins.items()}
        _print_json({"settings": values, "origins": origins, "warnings": list(loaded.warnings)})
        return
    rows = [(name, display(value), str(loaded.origins[name])) for name, value in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        click.echo(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}")


@command.command(hidden=True)
def reference() -> None:
    """Print the table of fields and flags of docs/config.md."""
    from .reference import markdown

    click.echo(markdown(), nl=False)


def display(value: object) -> str:
    """A setting's value as an operator would write it; "-" for an empty one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return go_duration(value)
    if isinstance(value, tuple):
        return ",".join(value) or "-"
    if value is None:
        return "left alone"  # the kernel's own value
    return str(value) or "-"


def _print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2))
