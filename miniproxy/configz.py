"""Settings in the form of their file, as /configz shows them."""

from __future__ import annotations

from typing import Any

from .config import Settings
from .config_schema import API_VERSION, CIDR_PAIR, DURATION, FIELDS, KIND, Field, go_duration


def configuration(settings: Settings) -> dict[str, Any]:
    """A KubeProxyConfiguration with every field that has an effect in this mode."""
    result: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND}
    for field in FIELDS:
        if not field.setting or settings.mode not in field.modes:
            continue
        *parents, name = field.path.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = _value(field, getattr(settings, field.setting))
    return result


def _value(field: Field, value: Any) -> Any:
    if value is None:
        value = 0 if field.zero_is_none else None
    if field.kind is DURATION and value is not None:
        return go_duration(value)
    if field.kind is CIDR_PAIR:
        return ",".join(value)
    return list(value) if isinstance(value, tuple) else value
