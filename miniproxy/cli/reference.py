"""The configuration's reference as Markdown tables, made from the schema; docs/config.md holds a copy."""

from __future__ import annotations

from ..config import Settings
from ..config_schema import ALL_MODES, FIELDS, FLAGS, MODE_DEFAULTS, STOCK, Field
from .config import display


def markdown() -> str:
    """Both tables, with headings."""
    fields = [
        "| field | value | default | what it does | flag |",
        "|---|---|---|---|---|",
        *(_row(f"`{f.path}`", f.kind.name, _default(f), _meaning(f), _flags(f)) for f in FIELDS),
    ]
    in_file = {field.setting for field in FIELDS}
    alone = [
        "| flag | value | default | what it does |",
        "|---|---|---|---|",
        *(
            _row(
                f"`--{flag.name}`",
                flag.kind.name,
                _shown(getattr(Settings(), flag.setting)) if flag.setting else "",
                f"no effect: {flag.ignored}" if flag.ignored else flag.help.rstrip("."),
            )
            for flag in FLAGS
            if flag.setting not in in_file or not flag.setting
        ),
    ]
    return "\n".join(["## Fields", "", *fields, "", "## Flags without a field", "", *alone, ""])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _meaning(field: Field) -> str:
    if field.refused:
        return f"**refused** if true: {field.refused}"
    if field.ignored:
        stock = STOCK.get(field.path)
        silent = f" (said only if not {' or '.join(str(value) for value in stock)})" if stock else ""
        return f"no effect, warned about: {field.ignored}{silent}"
    only = "" if field.modes == ALL_MODES else f" ({', '.join(field.modes)} mode)"
    return field.help + only


def _default(field: Field) -> str:
    if field.setting == "node_name":
        return "host name"
    if not field.setting:
        return ""
    own = getattr(Settings(), field.setting)
    by_mode = {mode: MODE_DEFAULTS[mode].get(field.setting, own) for mode in field.modes}
    if len(set(by_mode.values())) == 1:
        return _shown(by_mode[field.modes[0]])
    return ", ".join(f"{mode}: {_shown(value)}" for mode, value in by_mode.items())


def _shown(value: object) -> str:
    shown = display(value)
    return "empty" if shown == "-" else shown if value is None else f"`{shown}`"


def _flags(field: Field) -> str:
    matching = [flag for flag in FLAGS if flag.setting == field.setting and set(flag.modes) & set(field.modes)]
    return ", ".join(f"`--{flag.name}`" for flag in matching) if field.setting else ""
