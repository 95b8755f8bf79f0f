"""Folds any number of events into what is known now, and remembers which service ports that touched.

An object is folded in at once; what it means for a service port is worked out only when somebody
asks for that port. So a burst of a thousand slice updates costs a thousand dictionary writes, and one look-up
per service port at the next sync.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from .model import (
    Batch,
    Endpoint,
    EndpointSlice,
    Family,
    Node,
    Object,
    PortKey,
    Protocol,
    Ref,
    Service,
    ServiceCIDR,
    ServicePort,
    ServicePortName,
)

ServiceKey = tuple[str, str]  # (namespace, name)


class Tracker:
    """The objects as last seen and the service ports whose kernel state may have changed since `take()`."""

    def __init__(self, node_name: str, bind_address: str = "0.0.0.0") -> None:
        """`bind_address` is the node's own, whatever its Node object says; 0.0.0.0 and :: are none."""
        self.node_name = node_name
        self._bind_address = bind_address
        self.node = Node(node_name).at(bind_address)
        self.synced = False
        self._services: dict[ServiceKey, Service] = {}
        self._ports: dict[PortKey, ServicePort] = {}
        self._service_cidrs: dict[str, tuple[str, ...]] = {}
        self._slices: dict[Ref, EndpointSlice] = {}
        self._slices_of: dict[ServiceKey, dict[str, EndpointSlice]] = {}
        self._changed: set[PortKey] = set()
        self._triggered: list[tuple[Family, float]] = []

    def apply(self, batch: Batch) -> None:
        """Fold in one batch; an object equal to the one known changes nothing."""
        for obj in batch.upserts:
            self._upsert(obj)
        for ref in batch.deletes:
            self._delete(ref)
        self.synced |= batch.synced

    def take(self) -> set[PortKey]:
        """The service ports touched since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def touch_all(self) -> None:
        """Count everything as changed: what the node is, or how to plan, is not what it was."""
        self._changed.update(self._ports)

    def keys(self, family: Family) -> list[PortKey]:
        """All service ports of a family."""
        return [key for key in self._ports if key[1] is family]

    def touch_external(self) -> None:
        """Count as changed what is reachable at addresses of the node, or could be: they are not what they were."""
        self._changed.update(key for key, port in self._ports.items() if port.externally_accessible)

    def port(self, key: PortKey) -> ServicePort | None:
        return self._ports.get(key)

    def ports(self) -> Iterator[ServicePort]:
        return iter(self._ports.values())

    def service(self, namespace: str, name: str) -> Service | None:
        """A Service as the source has it, also one without ports that a proxy serves."""
        return self._services.get((namespace, name))

    def slices(self, namespace: str, service: str) -> list[EndpointSlice]:
        """All slices of a Service."""
        return list(self._slices_of.get((namespace, service), {}).values())

    def service_count(self) -> int:
        return len(self._services)

    def endpoints(self, key: PortKey) -> list[Endpoint]:
        """All endpoints of a service port, merged from its slices, no two with the same address and port.

        Slices may repeat an endpoint while the controller moves it from one to another; the more useful
        statement wins, so that the result does not depend on the order of events.
        """
        name, family = key
        found: dict[tuple[str, int], Endpoint] = {}
        for endpoint in self._listed(name, family):
            seen = found.get((endpoint.ip, endpoint.port))
            if seen is None or self._usefulness(endpoint) > self._usefulness(seen):
                found[endpoint.ip, endpoint.port] = endpoint
        return list(found.values())

    def take_triggers(self) -> list[tuple[Family, float]]:
        """When (Unix seconds) the changes came about that the slices seen since the last call carry."""
        times, self._triggered = self._triggered, []
        return times

    def _listed(self, name: ServicePortName, family: Family) -> Iterator[Endpoint]:
        slices = self._slices_of.get((name.namespace, name.name), {})
        for slice_name in sorted(slices):
            found = slices[slice_name]
            if found.family is not family:
                continue
            numbers = [p.port for p in found.ports if p.name == name.port and p.protocol == name.protocol]
            for e in found.endpoints:
                for number in numbers:
                    yield Endpoint(e.ip, number, e.ready, e.serving, e.terminating, e.node, e.zone_hints, e.node_hints)

    def _usefulness(self, endpoint: Endpoint) -> tuple[bool, bool, bool, bool]:
        return (
            endpoint.node == self.node_name,
            endpoint.ready,
            endpoint.serving,
            endpoint.terminating,
        )

    def _upsert(self, obj: Object) -> None:
        if isinstance(obj, EndpointSlice):
            self._put_slice(obj.ref, obj)
        elif isinstance(obj, Service):
            self._put_service((obj.namespace, obj.name), obj)
        elif isinstance(obj, ServiceCIDR):
            self._put_service_cidr(obj.name, obj.cidrs)
        elif obj.name == self.node_name:
            self._put_node(obj)

    def _delete(self, ref: Ref) -> None:
        if ref.kind == "EndpointSlice":
            self._put_slice(ref, None)
        elif ref.kind == "Service":
            self._put_service((ref.namespace, ref.name), None)
        elif ref.kind == "ServiceCIDR":
            self._put_service_cidr(ref.name, ())
        # A deleted Node object changes nothing: its last known zone and addresses keep serving.

    def _put_service(self, key: ServiceKey, new: Service | None) -> None:
        old = self._services.pop(key, None)
        if new is not None:
            self._services[key] = new
        before = _by_key(old.ports if old else ())
        after = _by_key(new.ports if new else ())
        for port_key in before.keys() | after.keys():
            if before.get(port_key) == after.get(port_key):
                continue
            self._changed.add(port_key)
            if port_key in after:
                self._ports[port_key] = after[port_key]
            else:
                del self._ports[port_key]

    def _put_slice(self, ref: Ref, new: EndpointSlice | None) -> None:
        old = self._slices.get(ref)
        if old == new:
            return
        if old is not None:
            del self._slices[ref]
            self._unlink(old)
        if new is not None:
            self._slices[ref] = new
        if new is not None and new.service:
            self._slices_of.setdefault((new.namespace, new.service), {})[new.name] = new
            if new.triggered:
                self._triggered.append((new.family, new.triggered))
        self._touch_slices(old, new)

    def _unlink(self, old: EndpointSlice) -> None:
        key = (old.namespace, old.service)
        slices = self._slices_of.get(key)
        if slices is None:
            return
        del slices[old.name]
        if not slices:
            del self._slices_of[key]

    def _touch_slices(self, old: EndpointSlice | None, new: EndpointSlice | None) -> None:
        """Mark the service ports that either version of a slice speaks of."""
        for found in (old, new):
            if found is None or not found.service:
                continue
            service = self._services.get((found.namespace, found.service))
            named: set[tuple[str, Protocol]] = {(p.name, p.protocol) for p in found.ports}
            for port in service.ports if service else ():
                if port.family is found.family and (port.name.port, port.name.protocol) in named:
                    self._changed.add((port.name, port.family))

    def _put_service_cidr(self, name: str, cidrs: tuple[str, ...]) -> None:
        self._service_cidrs[name] = cidrs
        self._put_node(self.node)

    def _put_node(self, node: Node) -> None:
        cidrs = {cidr for cidrs in self._service_cidrs.values() for cidr in cidrs}
        node = msgspec.structs.replace(node.at(self._bind_address), service_cidrs=tuple(sorted(cidrs)))
        old, self.node = self.node, node
        if (old.zone, old.ips, old.pod_cidrs) != (node.zone, node.ips, node.pod_cidrs):
            self.touch_all()


def _by_key(ports: Iterable[ServicePort]) -> dict[PortKey, ServicePort]:
    return {(port.name, port.family): port for port in ports}
