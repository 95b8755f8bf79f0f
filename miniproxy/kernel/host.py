"""What takes all of root's rights, once, before an agent that has few: kernel modules, and conntrack's settings.

In a cluster an init container does this (`miniproxy run --init-only`); the agent itself then needs NET_ADMIN only.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from ..config import Settings
from . import sysctl
from .exec import Runner, run

log = logging.getLogger(__name__)

_NETFILTER = Path("/proc/sys/net/netfilter")
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_IPV6 = Path("/proc/net/if_inet6")
_HASHSIZE = Path("/sys/module/nf_conntrack/parameters/hashsize")
_MOST_CONNECTIONS = 1 << 20  # kube-proxy's limit: a table for machines with hundreds of cores would fill their memory


def set_oom_score(score: int, file: Path = _OOM_SCORE) -> None:
    """How gladly the kernel ends this process when memory is short. To lower it takes CAP_SYS_RESOURCE; in a pod the
    kubelet has set what fits its priority class.
    """
    try:
        file.write_text(str(score))
    except OSError as error:
        log.debug("oom_score_adj stays as it is: %s", error.strerror)


def has_ipv6(file: Path = _IPV6) -> bool:
    """Whether the kernel speaks IPv6 at all (it does not with ipv6.disable=1); links may still have none."""
    return file.exists()


def modules(settings: Settings) -> tuple[str, ...]:
    """Those the kernel does not load by itself when an unprivileged writer first needs them."""
    if settings.mode == "nftables":
        return ("nf_conntrack", "nf_tables")
    iptables = ("nf_conntrack", "ip_tables", "ip6_tables")  # the legacy variant's
    if settings.mode == "ipvs":
        return (*iptables, "ip_set", "ip_vs", f"ip_vs_{settings.ipvs_scheduler}", "dummy")
    return iptables


def load_modules(names: tuple[str, ...], runner: Runner = run) -> None:
    """Load what is not there. One that cannot be is no failure: most kernels have some of them built in."""
    for name in names:
        try:
            done = runner(["modprobe", name])
        except (OSError, subprocess.TimeoutExpired) as error:
            log.info("cannot load kernel modules: %s", error)
            return
        if done.code:
            log.info("module %s is not there, or built into the kernel: %s", name, done.err.strip())


def connections_limit(settings: Settings, cores: int) -> int | None:
    """How many connections conntrack may track, by kube-proxy's formula; None: leave it alone."""
    if settings.conntrack_max_per_core is None:
        return None
    return min(_MOST_CONNECTIONS, max(settings.conntrack_max_per_core * cores, settings.conntrack_min))


def prepare_conntrack(settings: Settings, netfilter: Path = _NETFILTER, hashsize: Path = _HASHSIZE) -> None:
    """Set conntrack's limit and timeouts. What the kernel does not let us set is a warning: rules work without."""
    wanted: dict[str, float | None] = {
        "nf_conntrack_tcp_timeout_established": settings.conntrack_tcp_established_timeout,
        "nf_conntrack_tcp_timeout_close_wait": settings.conntrack_tcp_close_wait_timeout,
        "nf_conntrack_tcp_be_liberal": 1 if settings.conntrack_tcp_be_liberal else None,
        "nf_conntrack_udp_timeout": settings.conntrack_udp_timeout,
        "nf_conntrack_udp_timeout_stream": settings.conntrack_udp_stream_timeout,
    }
    for name, value in wanted.items():
        if value is not None:
            sysctl.ensure(name, str(int(value)), netfilter)
    limit = connections_limit(settings, os.cpu_count() or 1)
    # The limit is the whole machine's: in a network namespace that is not the first, as kind's nodes are, it is
    # read-only. So is it in our own container, after the init container has set it.
    if limit is not None and os.access(netfilter / "nf_conntrack_max", os.W_OK):
        sysctl.ensure("nf_conntrack_max", str(limit), netfilter)
        # The hash table: with more than 4 connections to a bucket it gets slow.
        if int(sysctl.read(hashsize.name, hashsize.parent) or limit) < limit // 4:
            sysctl.ensure(hashsize.name, str(limit // 4), hashsize.parent)
