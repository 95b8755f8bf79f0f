"""What a person looks at on a node when a Service does not work. Reads, changes nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..model import Family
from ..planner.ipvs_text import LINK
from ..planner.nft_layout import TABLE, ip
from ..transaction import MissingError, TransactionError
from . import sysctl
from .exec import Runner, run
from .iptables import VARIANTS, Iptables, tool
from .ipvs import Ipvs
from .links import link_index

_LINKS = Path("/sys/class/net")
_IPVS = Path("/proc/net/ip_vs")  # it is there while the module is loaded, which asking would do


class Fill(NamedTuple):
    """How full the table of connections is."""

    used: int
    limit: int  # 0: none


class Traces(NamedTuple):
    """Of service proxies, of whichever kind and mode."""

    chains: dict[str, int]  # "iptables-nft", … → rules in its chains KUBE-SERVICES
    tables: list[str]  # "ip miniproxy", "ip6 kube-proxy", …
    ipvs: list[str]  # "link kube-ipvs0", "12 virtual servers"


def connections() -> Fill | None:
    """None where conntrack does not say."""
    count, limit = (sysctl.read(f"net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    return Fill(int(count), int(limit)) if count and limit else None


def unfiltered_bridges(links: Path = _LINKS) -> list[str]:
    """Bridges with two ports or more, where packets from one port to another pass no rules."""
    if sysctl.read("net/bridge/bridge-nf-call-iptables") == "1":
        return []
    return sorted(p.parent.name for p in links.glob("*/brif") if len(list(p.iterdir())) > 1)


def rulesets(families: Sequence[Family], runner: Runner = run) -> tuple[dict[str, str], list[str]]:
    """What there is in each iptables ("iptables-nft", "ip6tables-legacy", …) that this system has, and why some of
    it cannot be read.

    Of all tables that exist, since asking for one by its name has the kernel make it.
    """
    found, unread = {}, []
    for family in families:
        for variant in VARIANTS:
            try:
                found[f"{tool(family)}-{variant}"] = Iptables(family, variant, runner).save()
            except MissingError:
                continue
            except TransactionError as error:
                unread.append(str(error))
    return found, unread


def traces(families: Sequence[Family], saved: dict[str, str], runner: Runner = run) -> Traces:
    """`saved` is what `rulesets` found."""
    chains = {name: count for name, text in saved.items() if (count := text.count("\n-A KUBE-SERVICES "))}
    return Traces(chains, list(_tables(families, runner)), list(_ipvs(families)))


def _tables(families: Sequence[Family], runner: Runner) -> Iterator[str]:
    for family in families:
        try:
            lines = runner(["nft", "list", "tables", ip(family)]).out.splitlines()
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return
        yield from (f"{ip(family)} {name}" for name in (TABLE, "kube-proxy") if f"table {ip(family)} {name}" in lines)


def _ipvs(families: Sequence[Family]) -> Iterator[str]:
    if link_index(LINK):
        yield f"link {LINK}"
    if not _IPVS.exists():
        return
    with Ipvs.open() as ipvs:
        servers = sum(len(ipvs.services(family)) for family in families)
    if servers:
        yield f"{servers} virtual servers"
