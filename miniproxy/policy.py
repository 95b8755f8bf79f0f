"""Which endpoints serve which traffic of a service port, on this node: the whole truth about traffic policies,
topology hints and terminating endpoints. Pure; kube-proxy's CategorizeEndpoints is the reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .model import Endpoint, Node, ServicePort


class Serving(NamedTuple):
    """Endpoints by the traffic they serve; each tuple is sorted as `str(endpoint)` and free of duplicates."""

    cluster: tuple[Endpoint, ...] = ()  # traffic under policy Cluster
    local: tuple[Endpoint, ...] = ()  # traffic under policy Local
    reachable: tuple[Endpoint, ...] = ()  # the union: whatever any traffic may reach from this node
    any: bool = False  # False: nobody anywhere serves, so refuse; True and no `local`: policy Local drops


def categorize(port: ServicePort, endpoints: Iterable[Endpoint], node: Node) -> Serving:
    """Sort out the endpoints of one service port; `endpoints` may come in any order."""
    endpoints = sorted(endpoints, key=str)
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    if port.uses_cluster_endpoints:
        cluster = tuple(_nearest([e for e in endpoints if e.ready], node)) or _draining(endpoints)
    if not port.uses_local_endpoints:
        return Serving(cluster, (), cluster, bool(cluster))
    mine = [e for e in endpoints if e.node and e.node == node.name]
    local = tuple(e for e in mine if e.ready) or _draining(mine)
    anybody = bool(cluster) or any(e.ready or (e.serving and e.terminating) for e in endpoints)
    return Serving(cluster, local, _merge(cluster, local), anybody)


def _draining(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """The last resort: endpoints that are going away but still answer (KEP-1669)."""
    return tuple(e for e in endpoints if e.serving and e.terminating)


def _nearest(ready: list[Endpoint], node: Node) -> list[Endpoint]:
    """Those in the narrowest topology that every ready endpoint is hinted for and one of them serves: node, zone, all.

    One ready endpoint without hints switches them off for all: the controller has not placed it yet, and
    ignoring it would overload the others.
    """
    if not ready or not (ready[0].node_hints or ready[0].zone_hints):
        return ready
    for here, hinted in (
        (node.name, [e.node_hints for e in ready]),
        (node.zone, [e.zone_hints for e in ready]),
    ):
        if here and all(hinted) and any(here in hints for hints in hinted):
            return [e for e, hints in zip(ready, hinted, strict=True) if here in hints]
    return ready


def _merge(cluster: tuple[Endpoint, ...], local: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Local endpoints may be draining or outside the topology, so neither tuple need contain the other."""
    if not cluster:
        return local
    extra = set(local).difference(cluster)
    return tuple(sorted((*cluster, *extra), key=str)) if extra else cluster
