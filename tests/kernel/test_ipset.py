"""Sets are written in pyroute2's bytes, and read in the words of `ipset save`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.ipset import ipset_msg

from miniproxy.kernel import ipset
from miniproxy.kernel.netlink import attributes
from miniproxy.model import Family
from miniproxy.planner.ipvs import SETS, set_name
from miniproxy.planner.ipvs_text import IpSet, SetEntry
from miniproxy.transaction import TransactionError
from tests.ipvs import space
from tests.ipvs.space import run
from tests.ipvs.test_planner import ports
from tests.ipvs.texts import parse_sets

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
COMMANDS = {"add": 9, "del": 10}
v4 = st.ip_addresses(v=4).map(str)
v6 = st.ip_addresses(v=6).map(lambda ip: socket.inet_ntop(socket.AF_INET6, ip.packed))
ips = v4 | v6


def by_pyroute2(what: str, name: str, fields: list[tuple[str, Any]]) -> bytes:
    message = ipset_msg()
    message["header"]["type"] = 6 << 8 | COMMANDS[what]
    message["nfgen_family"] = socket.AF_INET
    data = ("IPSET_ATTR_DATA", {"attrs": fields})
    message["attrs"] = [("IPSET_ATTR_PROTOCOL", 6), ("IPSET_ATTR_SETNAME", name), data]
    message.encode()
    return bytes(message.data[16:])


def address(kind: str, ip: str) -> tuple[str, Any]:
    return kind, {"attrs": [(f"IPSET_ATTR_IPADDR_IPV{6 if ':' in ip else 4}", ip)]}


@settings(deadline=None)  # pyroute2 can be slow
@given(st.sampled_from(("add", "del")), ips, st.sampled_from(tuple(PROTOCOLS)), ports, ips, st.integers(1, 31))
def test_entries_are_pyroute2s(what: str, ip: str, protocol: str, port: int, other: str, length: int) -> None:
    fields = [address("IPSET_ATTR_IP", ip)]
    assert ipset.encode(f"{what} S {ip}").payload == by_pyroute2(what, "S", fields)
    fields += [("IPSET_ATTR_PORT", port), ("IPSET_ATTR_PROTO", PROTOCOLS[protocol])]
    assert ipset.encode(f"{what} KUBE-X {ip},{protocol}:{port}").payload == by_pyroute2(what, "KUBE-X", fields)
    fields += [address("IPSET_ATTR_IP2", other)]
    assert ipset.encode(f"{what} S {ip},{protocol}:{port},{other}").payload == by_pyroute2(what, "S", fields)
    fields += [("IPSET_ATTR_CIDR2", length)]
    assert ipset.encode(f"{what} S {ip},{protocol}:{port},{other}/{length}").payload == by_pyroute2(what, "S", fields)
    assert ipset.encode(f"{what} S {port}").payload == by_pyroute2(what, "S", [("IPSET_ATTR_PORT", port)])


@given(ips, st.sampled_from(("tcp", "udp", "sctp", "47")), ports, ips, st.integers(1, 31))
def test_an_entry_is_read_as_it_was_written(ip: str, protocol: str, port: int, other: str, length: int) -> None:
    where = f"{ip},{protocol}:{port}"
    for entry in (ip, str(port), where, f"{where},{other}", f"{where},{other}/{length}"):
        payload = ipset.encode(f"add S {entry}").payload
        assert ipset.decode_entry(attributes(payload[4:])[7]) == entry


# -- the kernel


def frame(family: Family) -> list[str]:
    inet = "inet6" if family is Family.V6 else "inet"
    return [
        f"create {set_name(name, family)} {kind} "
        + ("range 0-65535" if kind == "bitmap:port" else f"family {inet} maxelem 1048576")
        for name, (kind, _) in SETS.items()
    ]


ENTRIES = [
    *(f"add KUBE-CLUSTER-IP 10.96.{n >> 8}.{n & 255},tcp:{80 + n}" for n in range(3000)),
    "add KUBE-CLUSTER-IP 10.96.0.1,sctp:80",
    "add KUBE-6-CLUSTER-IP fd00::1,udp:53",
    "add KUBE-LOOP-BACK 10.1.0.1,tcp:80,10.1.0.1",
    "add KUBE-6-LOOP-BACK fd00::1,tcp:80,fd00::1",
    "add KUBE-LOAD-BALANCER-SOURCE-CIDR 192.0.2.1,tcp:80,203.0.113.0/24",
    "add KUBE-LOAD-BALANCER-SOURCE-CIDR 192.0.2.1,tcp:80,203.0.113.7",
    "add KUBE-6-LOAD-BALANCER-SOURCE-CID fd00::1,tcp:80,fd00:203::/64",
    "add KUBE-NODE-PORT-TCP 30000",
    "add KUBE-IPVS-IPS 10.96.0.1",
    "add KUBE-6-IPVS-IPS fd00::1",
]
ALL = [set_name(name, family) for name in SETS for family in Family]


@pytest.fixture
def node() -> Iterator[None]:
    with space.empty_namespace():
        yield


@pytest.mark.usefixtures("node")
def test_what_is_written_is_what_the_program_sees_and_what_is_read() -> None:
    ipset.restore([*frame(Family.V4), *frame(Family.V6), *ENTRIES])
    saved = run("ipset", "save")
    seen = list(parse_sets(saved, ALL))
    assert {f"add {e.set} {e.entry}" for e in seen if isinstance(e, SetEntry)} == set(ENTRIES)
    assert len([s for s in seen if isinstance(s, IpSet)]) == len(ALL)
    read = list(ipset.read(ALL))
    assert len(read) == len(set(read))
    assert set(read) == set(seen)
    run("ipset", "restore", "-exist", stdin=saved)  # sets made here are the program's own to it


@pytest.mark.usefixtures("node")
def test_what_is_so_already_is_fine() -> None:
    for _ in range(2):
        ipset.restore([*frame(Family.V4), "add KUBE-IPVS-IPS 10.0.0.1"])
    for _ in range(2):
        ipset.restore(["del KUBE-IPVS-IPS 10.0.0.1"])
    for _ in range(2):
        ipset.restore(["destroy KUBE-IPVS-IPS"])
    names = [s.name for s in ipset.read(ALL) if isinstance(s, IpSet)]
    assert sorted(names) == sorted(set(SETS) - {"KUBE-IPVS-IPS"})


@pytest.mark.usefixtures("node")
def test_refusals_name_the_set() -> None:
    run("ipset", "create", "KUBE-CLUSTER-IP", "hash:net")
    with pytest.raises(TransactionError, match=r"another type.*create KUBE-CLUSTER-IP hash:ip,port"):
        ipset.restore(frame(Family.V4))
    run("ipset", "create", "KUBE-X", "bitmap:port", "range", "1-2")
    with pytest.raises(TransactionError, match="add KUBE-X 3"):
        ipset.restore(["add KUBE-X 1", "add KUBE-X 3"])
    with pytest.raises(TransactionError, match="add KUBE-NONE"):
        ipset.restore(["add KUBE-NONE 10.0.0.1"])
    assert list(ipset.read(["KUBE-X"])) == [IpSet("KUBE-X", "bitmap:port", ""), SetEntry("KUBE-X", "1")]
