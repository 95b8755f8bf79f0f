"""Messages encoded here are, byte for byte, what pyroute2 encodes for the same fields; what is written can be read."""

from __future__ import annotations

import socket
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.generic.ipvs import ipvsmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from miniproxy.kernel import ipvs, links
from miniproxy.kernel.netlink import Netlink, Request, attribute, attributes
from miniproxy.model import Family
from miniproxy.planner.ipvs_text import Command, RealServer, VirtualServer

from .test_planner import addresses, ports

_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP, "SCTP": socket.IPPROTO_SCTP}
_COMMANDS = {"-A": 1, "-E": 2, "-D": 3, "-a": 5, "-e": 6, "-d": 7}  # linux/ip_vs.h
_FORWARD = {"m": 0, "i": 2, "g": 3}

virtual_servers = st.builds(
    VirtualServer,
    st.sampled_from(("TCP", "UDP", "SCTP")),
    addresses,
    ports,
    st.sampled_from(("rr", "wlc", "lblcr", "mh")),
    st.sampled_from(("", "flag-1", "flag-2,flag-3")),
    st.integers(0, 86400),
    st.just(()),
)
reals = st.builds(RealServer, addresses, ports, st.integers(0, 65535), st.sampled_from("mig"))


def by_pyroute2(command: Command) -> bytes:
    """The payload behind the netlink header."""
    service, real = command.service, command.real
    family = _AF[Family.of(service.address)]
    fields: list[tuple[str, Any]] = [
        ("IPVS_SVC_ATTR_AF", family),
        ("IPVS_SVC_ATTR_PROTOCOL", _PROTOCOLS[service.protocol]),
        # pyroute2 writes 4 bytes for an IPv4 address; the kernel's field has 16, and newer kernels insist on them.
        ("IPVS_SVC_ATTR_ADDR", service.address),
        ("IPVS_SVC_ATTR_PORT", service.port),
    ]
    if command.what in ("-A", "-E"):
        bits = (service.timeout > 0) | sum(4 << int(flag[-1]) for flag in service.flags.split(",") if flag)
        fields += [
            ("IPVS_SVC_ATTR_SCHED_NAME", service.scheduler),
            ("IPVS_SVC_ATTR_FLAGS", {"flags": bits, "mask": 0xFFFFFFFF}),
            ("IPVS_SVC_ATTR_TIMEOUT", service.timeout),
            ("IPVS_SVC_ATTR_NETMASK", "255.255.255.255" if family == socket.AF_INET else "128.0.0.0"),
        ]
    attrs: list[tuple[str, Any]] = [("IPVS_CMD_ATTR_SERVICE", {"attrs": fields})]
    if real:
        fields = [("IPVS_DEST_ATTR_ADDR", real.address), ("IPVS_DEST_ATTR_PORT", real.port)]
        if command.what != "-d":
            fields += [
                ("IPVS_DEST_ATTR_FWD_METHOD", _FORWARD[real.forward]),
                ("IPVS_DEST_ATTR_WEIGHT", real.weight),
                ("IPVS_DEST_ATTR_U_THRESH", 0),
                ("IPVS_DEST_ATTR_L_THRESH", 0),
            ]
        fields.append(("IPVS_DEST_ATTR_ADDR_FAMILY", _AF[Family.of(real.address)]))
        attrs.append(("IPVS_CMD_ATTR_DEST", {"attrs": fields}))
    message = ipvsmsg()
    message["cmd"], message["version"], message["attrs"] = _COMMANDS[command.what], 1, attrs
    message.encode()
    return bytes(message.data[16:])


def widened(payload: bytes) -> bytes:
    """pyroute2's message with IPv4 addresses in 16 bytes."""
    result = payload[:4]
    for kind, nested in attributes(payload[4:]).items():
        address = 3 if kind == 1 else 1
        fields = attributes(nested)
        fields[address] = fields[address].ljust(16, b"\0")
        result += attribute(kind, b"".join(attribute(k, v) for k, v in fields.items()))
    return result


@given(st.sampled_from(("-A", "-E", "-D")), virtual_servers)
def test_virtual_servers(what: str, service: VirtualServer) -> None:
    command = Command(what, service)
    assert ipvs.encode(command) == widened(by_pyroute2(command))


@given(st.sampled_from(("-a", "-e", "-d")), virtual_servers, reals)
def test_real_servers(what: str, service: VirtualServer, real: RealServer) -> None:
    command = Command(what, service, real)
    assert ipvs.encode(command) == widened(by_pyroute2(command))


@given(virtual_servers)
def test_a_virtual_server_is_read_as_it_was_written(service: VirtualServer) -> None:
    read = ipvs.decode_service(ipvs.encode_service(service, whole=True))
    assert read is not None
    named = {"flag-1": "mh-fallback", "flag-2": "mh-port"} if service.scheduler == "mh" else {}
    flags = ",".join(named.get(flag, flag) for flag in service.flags.split(","))
    assert read == service._replace(flags=flags)


@given(addresses, st.integers(1, 2**31 - 1), st.booleans())
def test_addresses(address: str, index: int, add: bool) -> None:
    request = links.change_request(address, index, add=add)
    message = ifaddrmsg()
    family = Family.of(address)
    message["family"], message["prefixlen"] = _AF[family], 128 if family is Family.V6 else 32
    message["flags"], message["index"] = 2 if add and family is Family.V6 else 0, index
    message["attrs"] = [("IFA_LOCAL", address), ("IFA_ADDRESS", address)]
    message.encode()
    assert request.payload == bytes(message.data[16:])
    assert request.kind == (20 if add else 21)


PROC = """IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr persistent 60000 FFFFFFFF
  -> 0A010001:1F90      Masq    1      3          4
  -> 0A010002:1F90      Route   0      0          0
UDP  [fd00:0010:0096:0000:0000:0000:0000:0001]:0035 rr
  -> [fd00:0001:0000:0000:0000:0000:0000:0001]:0035      Masq    1      0          0
FWM  00000007 rr
  -> 0A010009:0050      Masq    1      0          0
"""


def test_real_servers_are_read_from_proc() -> None:
    assert ipvs._real_servers(PROC, Family.V4) == {
        ("ipvs", "10.96.0.1 tcp 443"): [RealServer("10.1.0.1", 8080), RealServer("10.1.0.2", 8080, 0, "g")]
    }
    assert ipvs._real_servers(PROC, Family.V6) == {
        ("ipvs", "fd00:10:96::1 udp 53"): [RealServer("fd00:1::1", 53)],
    }


CONNECTIONS = """Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP 0A800A01 BC06 0A600001 0050 0A010001 1F90 ESTABLISHED     899
TCP 0A800A01 BC07 0A600001 0050 0A010002 1F90 TIME_WAIT        99
TCP 0A800A01 BC08 0A600001 0050 0A010003 1F90 FIN_WAIT         99
UDP 0A800A01 BC08 0A600001 0035 0A010004 1F90 UDP              99
TCP fd00:0000:0000:0000:0000:0000:0000:0009 BC06 fd00:0010:0000:0000:0000:0000:0000:0001 0050 \
fd00:0001:0000:0000:0000:0000:0000:0001 1F90 CLOSE_WAIT  9
"""


def test_connections_that_are_not_closed_yet_are_read_from_proc() -> None:
    found = set(ipvs._unfinished(CONNECTIONS.splitlines()))
    assert {(str(service.address), server.address) for service, server in found} == {
        ("10.96.0.1", "10.1.0.1"),
        ("10.96.0.1", "10.1.0.3"),
        ("fd00:10::1", "fd00:1::1"),
    }


def test_every_request_has_its_own_result() -> None:
    """On rtnetlink, which every kernel has: deleting what is not there fails, asking for a list does not."""
    wrong = Request(21, links.change_request("203.0.113.250", 1, add=False).payload)
    fine = Request(18, b"\0\0\0\0" + (1).to_bytes(4, "little") + bytes(8))  # RTM_GETLINK of the loopback
    with Netlink.open(0) as netlink:
        assert [bool(code) for code in netlink.execute([fine, wrong] * 130 + [fine])] == [False, True] * 130 + [False]
