"""Chain names: kube-proxy's, so that every tool and runbook written for it finds its way."""

from __future__ import annotations

import base64
import hashlib

from ..model import Endpoint, ServicePortName


def service_suffix(name: ServicePortName) -> str:
    """What all chains of a service port end with: 16 characters that any node computes alike."""
    return _digest(f"{name}{name.protocol.lower()}")


def endpoint_chain(name: ServicePortName, endpoint: Endpoint) -> str:
    return "KUBE-SEP-" + _digest(f"{name}{name.protocol.lower()}{endpoint}")


def _digest(text: str) -> str:
    # iptables limits chain names to 28 characters, hence the cut: 10 bytes are 16 characters. Cut first, since
    # Python encodes in Python, and this is done for every endpoint.
    return base64.b32encode(hashlib.sha256(text.encode()).digest()[:10]).decode()
