"""Chain names: kube-proxy's, so that every tool and runbook written for it finds its way."""

from __future__ import annotations

import hashlib

from ..model import Endpoint, ServicePortName

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"  # of base32, RFC 4648
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]


def service_suffix(name: ServicePortName) -> str:
    """What all chains of a service port end with."""
    return suffix(hashed(name))


def endpoint_chain(name: ServicePortName, endpoint: Endpoint) -> str:
    return f"KUBE-SEP-{suffix(f'{hashed(name)}{endpoint}')}"


def hashed(name: ServicePortName) -> str:
    """What is hashed for a service port, and for each of its endpoints with the endpoint behind it."""
    return f"{name}{name.protocol.lower()}"


def suffix(text: str) -> str:
    """The end of a chain's name for what is hashed: 16 characters that any node computes alike."""
    # iptables limits chain names to 28 characters, hence the cut: 10 bytes are 16 characters. Cut first, two
    # characters at a time: the standard library encodes in Python too, and this is done for every endpoint.
    n = int.from_bytes(hashlib.sha256(text.encode()).digest()[:10], "big")
    low, n = n & 0xFFFFFFFFFF, n >> 40
    p = _PAIRS
    return (
        p[n >> 30] + p[n >> 20 & 1023] + p[n >> 10 & 1023] + p[n & 1023]
        + p[low >> 30] + p[low >> 20 & 1023] + p[low >> 10 & 1023] + p[low & 1023]
    )  # fmt: skip
