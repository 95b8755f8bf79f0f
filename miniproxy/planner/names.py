"""Chain names: kube-proxy's, so that every tool and runbook written for it finds its way."""

from __future__ import annotations

from hashlib import sha256
from struct import Struct

from ..model import Endpoint, ServicePortName

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"  # of base32, RFC 4648
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
_FIRST_10_BYTES = Struct(">QH").unpack_from


def service_suffix(name: ServicePortName) -> str:
    """What all chains of a service port end with."""
    return suffix(f"{name}{name.protocol.lower()}")


def endpoint_chain(name: ServicePortName, endpoint: Endpoint) -> str:
    return f"KUBE-SEP-{suffix(f'{name}{name.protocol.lower()}{endpoint}')}"


def suffix(text: str) -> str:
    """The end of a chain's name for what is hashed: 16 characters that any node computes alike."""
    # iptables limits chain names to 28 characters, hence the cut: 10 bytes are 16 characters. Cut first, two
    # characters at a time: the standard library encodes in Python too, and this is done for every endpoint.
    p, (a, b) = _PAIRS, _FIRST_10_BYTES(sha256(text.encode()).digest())
    return (
        f"{p[a >> 54]}{p[a >> 44 & 1023]}{p[a >> 34 & 1023]}{p[a >> 24 & 1023]}{p[a >> 14 & 1023]}"
        f"{p[a >> 4 & 1023]}{p[(a & 15) << 6 | b >> 10]}{p[b & 1023]}"
    )
