"""miniproxy cleanup: give the kernel back."""

from __future__ import annotations

import json

import click

from .errors import Failure


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def command(as_json: bool) -> None:
    """Remove what miniproxy (or kube-proxy) programmed in this node's kernel, in every mode, and nothing else.

    Services stop working on this node until an agent runs again. What the kubelet or a CNI plugin also uses stays.
    Connections that exist already go on where conntrack knows them.

    \b
    Example:
      sudo miniproxy cleanup
    """
    import os

    from ..backends import cleanup

    if os.geteuid() != 0:
        raise Failure("cleanup changes the kernel: run it as root (sudo miniproxy cleanup)")
    counts, errors = cleanup()
    if as_json:
        click.echo(json.dumps({"removed": counts, "errors": errors}))
    else:
        for where, count in counts.items():
            click.echo(f"{where}: {f'removed {count} objects' if count else 'nothing of ours'}")
    if errors:
        raise Failure(*errors)
