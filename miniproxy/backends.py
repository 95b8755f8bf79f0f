"""Chooses planner and backends for a proxy mode, and prepares the kernel for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .agent import Planner
from .config import Settings
from .kernel import iptables as kernel_iptables
from .kernel import sysctl
from .kernel.iptables import Iptables, Variant, detect_variant
from .model import Family
from .transaction import Backend, TransactionError

log = logging.getLogger(__name__)


class Dataplane(NamedTuple):
    """A mode made concrete for this node."""

    planner: Planner
    backends: Mapping[Family, Backend]
    prepare: Callable[[], None]  # kernel settings, before the first write; needs root


def iptables_variant(settings: Settings) -> Variant:
    if settings.iptables_variant != "auto":
        return settings.iptables_variant
    variant = detect_variant(Family.V4)
    log.info("using iptables-%s", variant)
    return variant


def choose(settings: Settings) -> Dataplane:
    """The dataplane that the settings name. Raises ValueError for a mode this version does not have."""
    from .planner import iptables

    if settings.mode != "iptables":
        raise ValueError(f"proxy mode {settings.mode} is not available in this version: use iptables")
    variant = iptables_variant(settings)
    backends = {family: Iptables(family, variant) for family in Family}
    return Dataplane(iptables, backends, lambda: sysctl.prepare_iptables(settings))


def cleanup() -> tuple[dict[str, int], list[str]]:
    """Remove what is ours from every mode's kernel state: objects removed by place, and what failed."""
    counts: dict[str, int] = {}
    errors: list[str] = []
    variants: tuple[Variant, ...] = ("nft", "legacy")
    for family in Family:
        for variant in variants:
            try:
                counts[f"iptables-{variant} {family}"] = kernel_iptables.cleanup(family, variant)
            except TransactionError as error:
                if not error.transient:
                    errors.append(str(error))
    return counts, errors
