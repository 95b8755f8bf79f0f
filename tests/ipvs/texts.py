"""What ipvsadm and ipset say, as kernel objects: the agent itself asks the kernel, these are how others see it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from miniproxy.planner.ipvs_text import IpSet, SetEntry, VirtualServer, parse_command


def parse_servers(text: str) -> list[VirtualServer]:
    """The virtual servers of an `ipvsadm -Sn` text."""
    found: dict[tuple[str, ...], VirtualServer] = {}
    for line in text.splitlines():
        _, service, real = parse_command(line)
        known = found.setdefault(service.key, service)
        if real:
            found[service.key] = known._replace(servers=tuple(sorted((*known.servers, real))))
    return list(found.values())


def parse_sets(text: str, names: Iterable[str]) -> Iterator[IpSet | SetEntry]:
    """The sets of these names, and their entries, from the output of `ipset save`."""
    wanted = set(names)
    for line in text.splitlines():
        words = line.split(" ", 3)
        if len(words) < 3 or words[1] not in wanted:
            continue
        if words[0] == "create":
            family = re.search(r"\bfamily (\w+)", line)
            yield IpSet(words[1], words[2], family.group(1) if family else "")
        elif words[0] == "add":
            yield SetEntry(words[1], words[2])
