"""Chooses planner and backends for a proxy mode, and prepares the kernel for it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from .agent import Planner, Review
from .config import Mode, Settings
from .graceful import Draining
from .kernel import iptables as kernel_iptables
from .kernel import ipvs as kernel_ipvs
from .kernel import nftables as kernel_nftables
from .kernel import sysctl
from .kernel.host import has_ipv6
from .kernel.iptables import VARIANTS, Iptables, Variant, detect_variant
from .log import fields
from .model import Family, ServicePort
from .transaction import Backend, MissingError, TransactionError

log = logging.getLogger(__name__)


class Dataplane(NamedTuple):
    """A mode made concrete for this node."""

    planner: Planner
    backends: Mapping[Family, Backend]
    prepare: Callable[[], None]  # kernel settings, before the first write; needs root. Raises TransactionError
    review: Callable[[ServicePort], Review] = lambda port: (port, ())  # what a Service asks for and cannot have
    tick: Callable[[], float] = lambda: float("inf")  # does what is due; says when to be called again
    variant: Variant | None = None  # of iptables, in modes that use it


def choose(settings: Settings, *, probing: bool = True) -> Dataplane:
    """The dataplane that the settings name. Without `probing` nothing is written to find the variant of iptables."""
    from .planner import iptables

    if settings.mode == "nftables":
        return _nftables()
    variant = _variant(settings, probing)
    if settings.mode == "ipvs":
        return _ipvs(settings, variant)
    backends = {family: Iptables(family, variant) for family in _iptables_families(variant)}
    return Dataplane(iptables, backends, lambda: sysctl.prepare_iptables(settings), variant=variant)


def _variant(settings: Settings, probing: bool) -> Variant:
    if settings.iptables_variant != "auto":
        return settings.iptables_variant
    variant = detect_variant(Family.V4, probing=probing)
    log.info("using iptables-%s", variant)
    return variant


def _families() -> list[Family]:
    """Those this machine can speak: one that it cannot would fail for ever, and is nobody's fault."""
    return [Family.V4, Family.V6] if has_ipv6() else [Family.V4]


def _iptables_families(variant: Variant) -> list[Family]:
    """Only root can ask the kernel; for others, who plan, a family is taken to be there."""
    found = _families()
    root = os.geteuid() == 0
    if root and Family.V6 in found and (problem := kernel_iptables.missing(Family.V6, variant)):
        log.warning("IPv6 is left out: %s", problem)
        found.remove(Family.V6)
    return found


def _nftables() -> Dataplane:
    from .planner import nftables

    backends = {family: kernel_nftables.Nftables(family) for family in _families()}
    return Dataplane(nftables, backends, kernel_nftables.check)


def _ipvs(settings: Settings, variant: Variant) -> Dataplane:
    from .planner import ipvs
    from .planner.ipvs_text import LAYOUT

    families = _iptables_families(variant)
    draining = {family: Draining(kernel_ipvs.Connections(), time.monotonic) for family in families}
    backends = {
        family: kernel_ipvs.IpvsBackend(family, settings, Iptables(family, variant, layout=LAYOUT), draining[family])
        for family in families
    }

    def tick() -> float:
        for family, servers in draining.items():
            if servers.due <= time.monotonic():
                _finish(family, servers)
        return min(servers.due for servers in draining.values())

    return Dataplane(
        ipvs,
        backends,
        lambda: kernel_ipvs.prepare(settings),
        kernel_ipvs.Schedulers(settings.ipvs_scheduler).review,
        tick,
        variant,
    )


def _finish(family: Family, servers: Draining) -> None:
    """Delete the real servers that have no connection left; one that cannot be deleted is tried again."""
    try:
        if count := servers.look():
            said = fields(family=family, deleted=count, waiting=len(servers))
            log.info("real servers without connections are gone", extra=said)
    except (OSError, TransactionError) as error:
        log.warning("cannot look after real servers on their way out: %s", error, extra=fields(family=family))


def leave_other_modes(mode: Mode) -> bool:
    """Remove what an agent in another mode has left: called when this mode's rules are all in place, so that every
    connection finds the one or the other. Where both are, the older ones are asked first, and both say the same.

    Returns whether nothing is left. If something is, it goes on being asked first, while Services change.
    """
    counts, errors = cleanup(keep=mode)
    for place, count in counts.items():
        if count:
            log.info("removed what another mode had left", extra=fields(place=place, objects=count))
    for error in errors:
        log.warning("cannot remove what another mode has left, it is tried again: %s", error)
    return not errors


def cleanup(keep: Mode | None = None) -> tuple[dict[str, int], list[str]]:
    """Remove what is ours from every mode's kernel state, or every mode's but one: objects removed by place, and
    what failed.
    """
    counts: dict[str, int] = {}
    errors: list[str] = []

    def attempt(place: str, clean: Callable[[], int]) -> None:
        try:
            counts[place] = clean()
        except MissingError:
            return
        except TransactionError as error:
            errors.append(str(error))

    if keep != "ipvs":
        attempt("ipvs", kernel_ipvs.cleanup_servers)
    for family in _families():
        # iptables and IPVS mode share chains: each removes what it finds of the other.
        for variant in VARIANTS if keep in (None, "nftables") else ():
            attempt(f"iptables-{variant} {family}", partial(kernel_iptables.cleanup, family, variant))
        if keep != "nftables":
            attempt(f"nftables {family}", partial(kernel_nftables.cleanup, family))
    if keep != "ipvs":
        attempt("ipset", kernel_ipvs.cleanup_sets)
    return counts, errors
