"""A cluster of any size, for tests of cost: service number i has address 10.96.x.y and its endpoints 10.128.x.y …"""

from __future__ import annotations

from miniproxy.model import (
    EndpointSlice,
    Family,
    Service,
    ServicePort,
    ServicePortName,
    SliceEndpoint,
    SlicePort,
)


def service(number: int, **fields: object) -> Service:
    name = ServicePortName("scale", f"svc-{number}", "http", "TCP")
    ip = f"10.{96 + number // 65536}.{number // 256 % 256}.{number % 256}"
    port = ServicePort(name, Family.V4, ip, 80, **fields)  # type: ignore[arg-type]
    return Service("scale", f"svc-{number}", (port,))


def endpoints(number: int, count: int, first: int = 0) -> EndpointSlice:
    """The only slice of service `number`: endpoints `first` to `first + count - 1` on port 8080."""
    hosts = (number * 16 + i for i in range(first, first + count))
    return EndpointSlice(
        "scale",
        f"svc-{number}-x",
        f"svc-{number}",
        Family.V4,
        (SlicePort("http", "TCP", 8080),),
        tuple(SliceEndpoint(f"10.{128 + h // 65536}.{h // 256 % 256}.{h % 256}", node="n2") for h in hosts),
    )
