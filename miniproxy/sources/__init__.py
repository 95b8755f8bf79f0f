"""Where objects come from. A source watches something and hands over what changed, already checked.

It answers for reading, checking and noticing changes; it hands on `Batch`es and knows nothing of kernels or
policies. wire.py does the checking for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Event
from typing import Protocol

from ..config import Settings
from ..model import Batch

Deliver = Callable[[Batch], None]


class Source(Protocol):
    """Anything that can feed the agent."""

    def run(self, deliver: Deliver, stop: Event) -> None:
        """Block until `stop` is set, calling `deliver` from this thread, one Batch at a time.

        What existed at the start ends with a Batch of synced=True; until then the agent must take nothing
        for gone. Trouble with the source itself is a Problem, never an exception.
        """
        ...


def choose(settings: Settings) -> Source:
    """The source that the settings name: a folder of manifests, or an API server.

    Raises ValueError when they name none and this is not a pod.
    """
    if settings.source:
        from .manifests import ManifestSource

        return ManifestSource(settings.source)
    if not (settings.kubeconfig or settings.master or os.environ.get("KUBERNETES_SERVICE_HOST")):
        raise ValueError(
            "say where the objects come from: --kubeconfig FILE, or --source FOLDER (in a pod, neither is needed)"
        )
    from .apiserver import ApiServer
    from .kube import KubeSource

    wants_cidrs = settings.mode == "nftables" and not settings.service_cidrs
    return KubeSource(ApiServer(settings.kubeconfig, settings.master), settings.node_name, wants_cidrs)
