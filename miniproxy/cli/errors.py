"""How a command fails in front of its operator: whole lines that say what to do, and an exit code."""

from __future__ import annotations

from typing import IO, Any

import click


class Failure(click.ClickException):
    """Raise it to end a command: each line goes to standard error behind "miniproxy: ".

    `code` 1: it did not work out; 2: it was asked for wrongly.
    """

    def __init__(self, *lines: str, code: int = 1) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.exit_code = code  # type: ignore[misc]  # click reads it from the exception, declares it on the class

    def show(self, file: IO[Any] | None = None) -> None:
        for line in self.lines:
            click.echo(f"miniproxy: {line}", file=file, err=file is None)
