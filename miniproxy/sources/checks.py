"""What user text must look like before it may go anywhere near a kernel: addresses, ranges, names.

Each check returns the canonical text, or "" for text that is refused. wire.py turns refusals into Problems.
"""

from __future__ import annotations

import re
import socket
from functools import lru_cache

from ..model import Family

# --- addresses --------------------------------------------------------------------------------------------

# The addresses the API server refuses for endpoints and external IPs: they mean something else on each node.
SPECIAL = re.compile(r"0\.0\.0\.0$|127\.|169\.254\.|224\.0\.0\.|::1?$|fe[89ab][0-9a-f]:|ff[0-9a-f]2:")
UNSPECIFIED_OR_LOOPBACK = re.compile(r"0\.0\.0\.0$|127\.|::1?$")


def _without_zeros(dotted: str) -> str:
    """10.1.0.5 from "010.001.0.5": old objects hold such text, and Go's ParseIPSloppy reads it as decimal."""
    parts = dotted.split(".")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
        return ""
    return ".".join(str(int(part)) for part in parts)


def address(text: str) -> str:
    """The canonical text of an IP address, "" if it is none. IPv4-mapped IPv6 is IPv4, as it is in Go."""
    try:
        if ":" not in text:
            try:
                return socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, text))
            except OSError:
                plain = _without_zeros(text)
                return socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, plain))
        if "." in text:
            head, _, tail = text.rpartition(":")
            tail = _without_zeros(tail)
            if not tail:
                return ""
            text = f"{head}:{tail}"
        return _v6_text(socket.inet_pton(socket.AF_INET6, text))
    except (OSError, ValueError):  # ValueError: a NUL or a lone surrogate inside
        return ""


def _v6_text(packed: bytes) -> str:
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


@lru_cache(maxsize=4096)
def cidr(text: str) -> str:
    """The canonical text of a range, host bits masked; "" if it is none. White space around it is allowed."""
    host, slash, digits = text.strip().partition("/")
    ip = address(host)
    if not ip or not slash or not re.fullmatch(r"[0-9]{1,9}", digits):
        return ""
    mapped = ":" in host and ":" not in ip  # "::ffff:10.0.0.0/104" is 10.0.0.0/8
    length = int(digits) - (96 if mapped else 0)
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    packed = socket.inet_pton(family, ip)
    bits = len(packed) * 8
    if not 0 <= length <= bits:
        return ""
    mask = (1 << bits) - (1 << (bits - length))
    network = (int.from_bytes(packed, "big") & mask).to_bytes(len(packed), "big")
    return f"{socket.inet_ntop(family, network)}/{length}"


def proxyable(text: str, family: Family | None, special: re.Pattern[str]) -> tuple[str, str]:
    """(canonical address, "") or ("", what is wrong with it). `special`: what a proxy may not use there."""
    ip = address(text)
    sample = "fd00::10" if family is Family.V6 else "10.0.0.10"
    if not ip or (family and Family.of(ip) is not family):
        return "", f"{quote(text)} is not an {family or 'IP'} address: write one such as {sample}"
    if special.match(ip):
        return "", f"{quote(text)} has a meaning of its own on every node: write an address of the network"
    return ip, ""


# --- names ------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
# A name (IP_VS_SCHEDNAME_MAXLEN is 16 with its NUL), with flags where the scheduler has some: "mh,mh-port".
SCHEDULER_NAME = re.compile(r"[a-z0-9-]{1,15}|sh(,sh-(fallback|port)){1,2}|mh(,mh-(fallback|port)){1,2}")
LABEL_RULE = "use at most 63 lower-case letters, digits and '-', with a letter or digit at both ends"
SUBDOMAIN_RULE = "use at most 253 lower-case letters, digits, '-' and '.', with a letter or digit at both ends"
LABEL_VALUE_RULE = "use at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends"


def is_subdomain(text: str) -> bool:
    return len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None


def is_label(text: str) -> bool:
    return _LABEL.fullmatch(text) is not None


# For names that many objects share. The caches also make equal names one string: a slice of a thousand endpoints names
# few nodes and zones. An object's own name would only crowd them out.
@lru_cache(maxsize=8192)
def subdomain(text: str) -> str:
    return text if is_subdomain(text) else ""


@lru_cache(maxsize=8192)
def label(text: str) -> str:
    return text if is_label(text) else ""


@lru_cache(maxsize=1024)
def label_value(text: str) -> str:
    return text if _LABEL_VALUE.fullmatch(text) else ""


def quote(text: str) -> str:
    """User text, safe to print on one line and of bounded length."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def shown(text: str) -> str:
    """A name as it may stand in a Ref, whatever the user wrote."""
    return text if len(text) <= 253 and text.isascii() and text.isprintable() else quote(text)
