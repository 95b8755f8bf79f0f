"""The options that decide Settings, shared by all commands that need them: kube-proxy's flag names, and ours.

    @click.command(cls=SettingsCommand)
    @settings_options
    def command(loaded: Loaded) -> None: ...

`settings_options` resolves --config and the flags, or ends the command with each problem on a line of its
own. `announce` sets up logging as they say and logs the warnings. `SettingsCommand` shows the options in
groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import ConfigError, Loaded, Settings, load
from ..config_schema import FLAGS, Flag
from .errors import Failure

if TYPE_CHECKING:
    from ..sources import Source


class SettingOption(click.Option):
    """An option with the heading it stands under in --help."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class SettingsCommand(click.Command):
    """A command whose --help lists its own options first, then the settings by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        params = self.get_params(ctx)
        own = [p for p in params if not isinstance(p, SettingOption)]
        settings = [p for p in params if isinstance(p, SettingOption)]
        groups: list[tuple[str, list[Any]]] = [("Options", own)]
        groups += [(heading, list(options)) for heading, options in groupby(settings, lambda o: o.group)]
        for heading, options in groups:
            if rows := [row for option in options if (row := option.get_help_record(ctx))]:
                with formatter.section(heading):
                    formatter.write_dl(rows, col_max=36)


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all options of Settings; it receives `loaded: Loaded` besides its own arguments."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        flags = {flag.key: kwargs.pop(flag.key) for flag in FLAGS}
        return function(*args, loaded=load_or_fail(kwargs.pop("config_file"), flags), **kwargs)

    config = SettingOption(
        ["--config", "config_file"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="KubeProxyConfiguration v1alpha1, YAML or JSON; flags override it.",
        group=FLAGS[0].group,
    )
    params = [config, *(_option(flag) for flag in FLAGS)]
    for param in reversed(params):
        _remember(wrapper, param)
    return wrapper


def announce(loaded: Loaded) -> None:
    """Log as the settings say from now on, the warnings first."""
    from .. import log

    log.setup(loaded.settings.log_format, loaded.settings.verbosity)
    for warning in loaded.warnings:
        log.get("config").warning("%s", warning)


def load_or_fail(file: Path | None, flags: dict[str, object]) -> Loaded:
    """`config.load` for a command: its problems end the command, as wrong use when flags are all there is."""
    try:
        return load(file, flags)
    except ConfigError as error:
        only_flags = all(problem.startswith("--") for problem in error.problems)
        raise Failure(*error.problems, code=2 if only_flags else 1) from None


def source_or_fail(settings: Settings) -> Source:
    """The source that the settings name; that there is none ends the command."""
    from .. import sources

    try:
        return sources.choose(settings)
    except ValueError as error:
        raise Failure(str(error), code=2) from None


def _remember(function: Callable[..., Any], param: click.Option) -> None:
    """What click's own decorators do: @click.command collects these."""
    function.__dict__.setdefault("__click_params__", []).append(param)


def _option(flag: Flag) -> click.Option:
    names = [f"--{flag.name}", flag.key] + ([f"-{flag.short}"] if flag.short else [])
    # pflag's booleans: "--masquerade-all" alone, or with a value behind "=".
    boolean = {"is_flag": False, "flag_value": "true"} if flag.kind.metavar == "[true|false]" else {}
    return SettingOption(
        names,
        type=str,
        metavar=flag.kind.metavar,
        help=flag.help,
        hidden=bool(flag.ignored),
        group=flag.group,
        **boolean,
    )
