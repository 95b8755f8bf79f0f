"""Reads and writes IPVS: virtual servers over generic netlink, and all of IPVS mode as one backend.

IPVS messages are encoded here, since pyroute2 takes 0.2 ms to encode one; it finds the netlink family. What the
kernel holds is read by one dump of the virtual servers and the list of real servers in /proc/net/ip_vs, instead of
a dump for each.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..config import Settings
from ..graceful import Draining, Load, Server, Service
from ..model import PROTOCOL_NAMES, PROTOCOL_NUMBERS, Family, ServicePort
from ..planner import ipvs_text, rules
from ..planner.ipvs import SETS, set_name
from ..planner.ipvs_text import (
    LINK,
    Command,
    DummyLink,
    IpSet,
    RealServer,
    Section,
    SetEntry,
    VirtualAddress,
    VirtualServer,
    parse_command,
)
from ..transaction import Change, MissingError, Transaction, TransactionError
from . import ipset, links, sysctl
from .iptables import Iptables
from .netlink import GENERIC, NO_SUBSYSTEM, TRANSIENT, Netlink, Request, attribute, attributes, explain

_BATCH = 2500  # a program or two run for each transaction; on a cold start, pods meanwhile reach the API server
_PROC = Path("/proc/thread-self/net")  # of this thread's network namespace

# Commands, linux/ip_vs.h
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST = 5, 6, 7, 8
_SET_CONFIG = 12
_COMMANDS = {
    "-A": _NEW_SERVICE,
    "-E": _SET_SERVICE,
    "-D": _DEL_SERVICE,
    "-a": _NEW_DEST,
    "-e": _SET_DEST,
    "-d": _DEL_DEST,
}
_ATTR_SERVICE, _ATTR_DEST = 1, 2
_TIMEOUT_TCP, _TIMEOUT_TCP_FIN, _TIMEOUT_UDP = 4, 5, 6
_SVC_AF, _SVC_PROTOCOL, _SVC_ADDR, _SVC_PORT, _SVC_FWMARK = 1, 2, 3, 4, 5
_SVC_SCHEDULER, _SVC_FLAGS, _SVC_TIMEOUT, _SVC_NETMASK = 6, 7, 8, 9
_DEST_ADDR, _DEST_PORT, _DEST_FORWARD, _DEST_WEIGHT, _DEST_UPPER, _DEST_LOWER = 1, 2, 3, 4, 5, 6
_DEST_ACTIVE, _DEST_INACTIVE, _DEST_AF = 7, 8, 11
_PERSISTENT = 1
_SCHEDULER_FLAGS = {8: "flag-1", 16: "flag-2", 32: "flag-3"}
_FLAG_NAMES = {("sh", 8): "sh-fallback", ("sh", 16): "sh-port", ("mh", 8): "mh-fallback", ("mh", 16): "mh-port"}
_FLAG_BITS = {name: bit for (_, bit), name in _FLAG_NAMES.items()} | {v: k for k, v in _SCHEDULER_FLAGS.items()}
_FORWARD = {"m": 0, "l": 1, "i": 2, "g": 3}
_FORWARD_LETTERS = {number: letter for letter, number in _FORWARD.items()}
_FORWARD_NAMES = {"Masq": "m", "Tunnel": "i", "Route": "g", "Local": "l"}
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_u16, _u32, _be16 = struct.Struct("=H"), struct.Struct("=I"), struct.Struct(">H")
_HEADER = struct.Struct("=BBH")  # struct genlmsghdr: command, version
_VERSION = 1

NO_IPVS = (
    "the kernel has no ip_vs, which IPVS mode needs: load the module (modprobe ip_vs) on the host, install the package "
    "that has it (linux-modules-extra-… on Ubuntu), or choose another mode with --proxy-mode iptables or nftables"
)
# A second of a kind that is no failure, or says what to do instead.
_DONE_ALREADY = {("-D", errno.ESRCH), ("-d", errno.ENOENT), ("-d", errno.ESRCH)}
_INSTEAD = {("-A", errno.EEXIST): "-E", ("-a", errno.EEXIST): "-e", ("-e", errno.ENOENT): "-a"}


# -- messages


def encode(command: Command) -> bytes:
    """The payload of a generic netlink message for one command of ipvsadm."""
    code = _COMMANDS[command.what]
    whole = code in (_NEW_SERVICE, _SET_SERVICE)
    data = _HEADER.pack(code, _VERSION, 0) + attribute(_ATTR_SERVICE, encode_service(command.service, whole=whole))
    if command.real:
        data += attribute(_ATTR_DEST, encode_real(command.real, whole=code != _DEL_DEST))
    return data


def encode_service(server: VirtualServer, *, whole: bool) -> bytes:
    """A virtual server's attributes; not `whole`: those that identify it."""
    family, address = _address(server.address)
    data = (
        attribute(_SVC_AF, _u16.pack(family))
        + attribute(_SVC_PROTOCOL, _u16.pack(PROTOCOL_NUMBERS[server.protocol]))
        + attribute(_SVC_ADDR, address)
        + attribute(_SVC_PORT, _be16.pack(server.port))
    )
    if not whole:
        return data
    flags = _PERSISTENT if server.timeout else 0
    for name in filter(None, server.flags.split(",")):
        flags |= _FLAG_BITS[name]
    # IPv6 has a prefix length where IPv4 has a mask.
    mask = 128 if family == socket.AF_INET6 else 0xFFFFFFFF
    return (
        data
        + attribute(_SVC_SCHEDULER, server.scheduler.encode() + b"\0")
        + attribute(_SVC_FLAGS, _u32.pack(flags) + b"\xff\xff\xff\xff")
        + attribute(_SVC_TIMEOUT, _u32.pack(server.timeout))
        + attribute(_SVC_NETMASK, _u32.pack(mask))
    )


def encode_real(real: RealServer, *, whole: bool) -> bytes:
    """A real server's attributes; not `whole`: those that identify it."""
    family, address = _address(real.address)
    data = attribute(_DEST_ADDR, address) + attribute(_DEST_PORT, _be16.pack(real.port))
    if whole:
        data += (
            attribute(_DEST_FORWARD, _u32.pack(_FORWARD[real.forward]))
            + attribute(_DEST_WEIGHT, _u32.pack(real.weight))
            + attribute(_DEST_UPPER, _u32.pack(0))
            + attribute(_DEST_LOWER, _u32.pack(0))
        )
    return data + attribute(_DEST_AF, _u16.pack(family))


@lru_cache(maxsize=4096)
def _address(text: str) -> tuple[int, bytes]:
    """(address family, union nf_inet_addr)"""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return family, socket.inet_pton(family, text).ljust(16, b"\0")


def decode_service(data: bytes) -> VirtualServer | None:
    """A virtual server, without its real servers, from its attributes; None for one of a kind we never make."""
    found = attributes(data)
    if _SVC_FWMARK in found or _SVC_ADDR not in found:
        return None
    (family,) = _u16.unpack(found[_SVC_AF])
    (number,) = _u16.unpack(found[_SVC_PROTOCOL])
    (flags,) = _u32.unpack_from(found[_SVC_FLAGS])
    (timeout,) = _u32.unpack(found[_SVC_TIMEOUT])
    scheduler = found[_SVC_SCHEDULER].rstrip(b"\0").decode(errors="replace")
    if number not in PROTOCOL_NAMES:
        return None
    return VirtualServer(
        PROTOCOL_NAMES[number],
        _text(family, found[_SVC_ADDR]),
        _be16.unpack(found[_SVC_PORT])[0],
        scheduler,
        _flag_names(scheduler, flags),
        timeout if flags & _PERSISTENT else 0,
    )


def _flag_names(scheduler: str, flags: int) -> str:
    return ",".join(_FLAG_NAMES.get((scheduler, bit), name) for bit, name in _SCHEDULER_FLAGS.items() if flags & bit)


def _text(family: int, raw: bytes) -> str:
    return str(ipaddress.ip_address(raw[:16] if family == socket.AF_INET6 else raw[:4]))


def _was_gone(command: Command, code: int) -> bool:
    """Whether a real server that should lose its weight is not there at all."""
    return command.what == "-e" and code == errno.ENOENT and command.real is not None and not command.real.weight


# -- the kernel's virtual servers


class Ipvs:
    """IPVS of the network namespace in which it is opened; use it in `with`."""

    def __init__(self, netlink: Netlink, kind: int) -> None:
        self._netlink = netlink
        self._kind = kind  # number of the generic netlink family

    @classmethod
    def open(cls) -> Ipvs:
        """Raises TransactionError when the kernel has no ip_vs."""
        return cls(Netlink.open(GENERIC), _family())

    def __enter__(self) -> Ipvs:
        return self

    def __exit__(self, *_: object) -> None:
        self._netlink.__exit__(None, None, None)

    def execute(self, commands: Sequence[Command]) -> list[tuple[Command, int]]:
        """Make these changes, whatever becomes of each; returns those that failed, with the errno."""
        failed = self._try(commands)
        again = [c._replace(what=_INSTEAD[c.what, code]) for c, code in failed if (c.what, code) in _INSTEAD]
        return [f for f in failed if (f[0].what, f[1]) not in _INSTEAD] + (self._try(again) if again else [])

    def _try(self, commands: Sequence[Command]) -> list[tuple[Command, int]]:
        results = self._netlink.execute([Request(self._kind, encode(command)) for command in commands])
        return [
            (command, code)
            for command, code in zip(commands, results, strict=True)
            if code and (command.what, code) not in _DONE_ALREADY and not _was_gone(command, code)
        ]

    def services(self, family: Family) -> list[VirtualServer]:
        """All virtual servers of a family, without real servers."""
        found = []
        for payload in self._netlink.dump(Request(self._kind, _HEADER.pack(_GET_SERVICE, _VERSION, 0))):
            data = attributes(payload[_HEADER.size :]).get(_ATTR_SERVICE, b"")
            server = decode_service(data)
            if server and Family.of(server.address) is family:
                found.append(server)
        return found

    def servers(self, family: Family) -> list[VirtualServer]:
        """All virtual servers of a family with all their real servers, also those of weight 0."""
        found = self.services(family)
        reals = _real_servers((_PROC / "ip_vs").read_text(), family) if found else {}
        for server in found:
            # A message for each takes ten times as long as reading the file, but the file is not complete where several
            # network namespaces have IPVS, as kind's nodes do: from page to page the kernel finds its place by counting
            # this namespace's virtual servers, and has counted all before.
            if server.key not in reals:
                reals[server.key] = [real for real, _ in self._dump(server)]
        return [server._replace(servers=tuple(sorted(reals[server.key]))) for server in found]

    def loads(self, service: VirtualServer) -> Iterator[tuple[Server, Load]]:
        """The real servers of weight 0 of a virtual server. Raises OSError (ESRCH when it is gone)."""
        for real, load in self._dump(service):
            if not real.weight:
                yield Server(real.address, real.port), load

    def _dump(self, service: VirtualServer) -> Iterator[tuple[RealServer, Load]]:
        identity = attribute(_ATTR_SERVICE, encode_service(service, whole=False))
        family, _ = _address(service.address)
        for payload in self._netlink.dump(Request(self._kind, _HEADER.pack(_GET_DEST, _VERSION, 0) + identity)):
            found = attributes(attributes(payload[_HEADER.size :]).get(_ATTR_DEST, b""))
            if found:
                forward, weight, active, inactive = (
                    _u32.unpack(found[kind])[0] for kind in (_DEST_FORWARD, _DEST_WEIGHT, _DEST_ACTIVE, _DEST_INACTIVE)
                )
                port = _be16.unpack(found[_DEST_PORT])[0]
                real = RealServer(_text(family, found[_DEST_ADDR]), port, weight, _FORWARD_LETTERS.get(forward, "?"))
                yield real, Load(active, inactive)

    def has_scheduler(self, name: str) -> bool:
        """Try it on a virtual server that no packet can reach; the kernel loads the module if it can."""
        probe = VirtualServer("TCP", _PROBE_ADDRESS, _PROBE_PORT, name)
        failed = self.execute([Command("-A", probe)])
        self.execute([Command("-D", probe)])
        return not failed

    def set_timeouts(self, tcp: float | None, tcp_fin: float | None, udp: float | None) -> None:
        """Seconds an idle connection is remembered; None leaves one alone. Raises OSError."""
        wanted = ((_TIMEOUT_TCP, tcp), (_TIMEOUT_TCP_FIN, tcp_fin), (_TIMEOUT_UDP, udp))
        # The kernel takes all three or none, and leaves those alone that are 0.
        data = b"".join(attribute(kind, _u32.pack(round(seconds or 0))) for kind, seconds in wanted)
        (code,) = self._netlink.execute([Request(self._kind, _HEADER.pack(_SET_CONFIG, _VERSION, 0) + data)])
        if code:
            raise OSError(code, f"cannot set IPVS timeouts: {explain(code)}")


_PROBE_ADDRESS, _PROBE_PORT = "0.0.0.1", 9  # "this network" (RFC 1122) is never routed


@lru_cache(maxsize=1)
def _family() -> int:
    """The number of the generic netlink family, which stays for as long as the module is loaded."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic.ipvs import IPVSSocket

    try:
        with IPVSSocket() as sock:
            return int(sock.prid)
    except NetlinkError as error:
        raise TransactionError(NO_IPVS, transient=True) from error


def _real_servers(text: str, family: Family) -> dict[tuple[str, ...], list[RealServer]]:
    """Real servers by their virtual server's key, from /proc/net/ip_vs (addresses and ports in hexadecimal)."""
    found: dict[tuple[str, ...], list[RealServer]] = {}
    current: list[RealServer] | None = None
    for line in text.splitlines()[3:]:
        words = line.split()
        if words[0] != "->":
            current = None
            if words[0] in PROTOCOL_NUMBERS and (words[1][0] == "[") == (family is Family.V6):
                address, port = _hexadecimal(words[1])
                current = found.setdefault(("ipvs", f"{address} {words[0].lower()} {port}"), [])
        elif current is not None:
            address, port = _hexadecimal(words[1])
            current.append(RealServer(address, port, int(words[3]), _FORWARD_NAMES.get(words[2], "?")))
    return found


@lru_cache(maxsize=65536)
def _hexadecimal(text: str) -> tuple[str, int]:
    """ "0A600001:01BB" or "[fd00:0010:…:0001]:0050" """
    address, _, port = text.rpartition(":")
    if address[0] == "[":
        return str(ipaddress.ip_address(address[1:-1])), int(port, 16)
    return str(ipaddress.ip_address(bytes.fromhex(address))), int(port, 16)


# -- graceful termination


class Connections:
    """The kernel as graceful.Draining asks for it."""

    def loads(self, services: Iterable[Service]) -> Mapping[tuple[Service, Server], Load]:
        found = {}
        with Ipvs.open() as ipvs:
            for service in services:
                try:
                    for server, load in ipvs.loads(_identity(service)):
                        found[service, server] = load
                except OSError as error:
                    if error.errno != errno.ESRCH:
                        raise
        return found

    def unfinished(self) -> set[tuple[Service, Server]]:
        with (_PROC / "ip_vs_conn").open() as lines:
            return set(_unfinished(lines))

    def remove(self, servers: Iterable[tuple[Service, Server]]) -> None:
        commands = [Command("-d", _identity(service), RealServer(*server)) for service, server in servers]
        with Ipvs.open() as ipvs:
            for command, code in ipvs.execute(commands):
                raise TransactionError(f"{_name(command)}: {explain(code)}", transient=True)


def _unfinished(lines: Iterable[str]) -> Iterator[tuple[Service, Server]]:
    """From /proc/net/ip_vs_conn: protocol, client and port, VIP and port, real server and port, state, …"""
    for line in lines:
        words = line.split()
        if words[0] == "TCP" and words[7] not in ("TIME_WAIT", "CLOSE"):
            vip, server = (str(_conn_address(words[i])) for i in (3, 5))
            yield Service(vip, int(words[4], 16)), Server(server, int(words[6], 16))


def _conn_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text) if ":" in text else ipaddress.ip_address(bytes.fromhex(text))


def _identity(service: Service) -> VirtualServer:
    return VirtualServer("TCP", service.address, service.port, "")


def _name(command: Command) -> str:
    service, real = command.service, command.real
    name = f"virtual server {service.protocol} {service.address} port {service.port}"
    return f"{name}, real server {real.address} port {real.port}" if real else name


# -- the backend


class IpvsBackend:
    """IPVS mode of one family: links, sets, virtual servers and iptables as one kind of kernel state.

    A transaction of several parts is not atomic; after a failure the reconciler reads what there is.
    """

    def __init__(self, family: Family, settings: Settings, iptables: Iptables, draining: Draining) -> None:
        self.family = family
        self.draining = draining
        self._excluded = [ipaddress.ip_network(c, strict=False) for c in settings.ipvs_exclude_cidrs]
        self._iptables = iptables
        self.batch = _BATCH

    def read(self) -> dict[Any, Any]:
        try:
            found = _read(self.family, self._excluded)
        except OSError as error:
            raise TransactionError(f"cannot read IPVS: {error}", transient=True) from error
        self.draining.found(found.draining)
        chains = self._iptables.read()
        # Iptables mode's rules go all at once, so until then each Service needs to have all that takes their place.
        self.batch = 0 if any(map(rules.serves, chains.values())) else _BATCH
        return {obj.key: obj for obj in found.objects} | chains

    def same(self, planned: Any, actual: Any) -> bool:
        if isinstance(planned, (VirtualServer, VirtualAddress, IpSet, SetEntry, DummyLink)):
            return bool(planned == actual)
        return rules.same(planned, actual)

    def stream(self, parts: Iterable[Sequence[Change]]) -> Transaction | None:
        return None

    def render(self, changes: Sequence[Change]) -> Transaction:
        return ipvs_text.render(self._iptables.possible(changes))

    def apply(self, transaction: Transaction) -> None:
        try:
            for section in ipvs_text.sections_of(transaction):
                self._apply(section)
        except OSError as error:
            raise TransactionError(f"{error}", transient=error.errno in TRANSIENT) from error

    def _apply(self, section: Section) -> None:
        match section.tool:
            case "iptables":
                self._iptables.apply(Transaction.of(section.text))
            case "ipset":
                ipset.restore(section.lines)
            case "ip":
                _link_commands(section.lines)
            case "ipvsadm":
                self._serve([parse_command(line) for line in section.lines])

    def _serve(self, commands: Sequence[Command]) -> None:
        with Ipvs.open() as ipvs:
            failed = ipvs.execute(commands)
        for command in commands:
            self._note(command)
        for command, code in failed:
            hint = ""
            if code == errno.ENOENT and command.what in ("-A", "-E"):
                hint = f": no scheduler {command.service.scheduler!r} (modprobe ip_vs_{command.service.scheduler})"
            raise TransactionError(f"{_name(command)}: {explain(code)}{hint}", transient=code in TRANSIENT)

    def _note(self, command: Command) -> None:
        """Keep track of who is on the way out."""
        service, real = command.service, command.real
        if service.protocol != "TCP" or command.what in ("-A", "-E"):
            return
        key = Service(service.address, service.port)
        if real and command.what == "-e" and not real.weight:
            self.draining.began(key, Server(real.address, real.port))
        else:
            self.draining.ended(key, Server(real.address, real.port) if real else None)


class _Found(NamedTuple):
    objects: list[Any]
    draining: list[tuple[Service, Server]]


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _read(family: Family, excluded: Sequence[Network] = ()) -> _Found:
    """What is ours but for iptables. Raises OSError, TransactionError."""
    addresses = links.addresses(family)
    objects: list[Any] = []
    if links.link_index(LINK):
        objects.append(DummyLink(LINK))
    in_sets = list(ipset.read(set_name(name, family) for name in SETS))
    objects += in_sets
    entries = {(ipvs_text.without_family(e.set), e.entry) for e in in_sets if isinstance(e, SetEntry)}
    # An excluded address is somebody else's, even on kube-ipvs0, unless our own set says that we put it there.
    vips = {
        address
        for address in addresses.virtual
        if ("KUBE-IPVS-IPS", address) in entries
        or not any(ipaddress.ip_address(address) in network for network in excluded)
    }
    objects += [VirtualAddress(address) for address in sorted(vips)]
    draining = []
    with Ipvs.open() as ipvs:
        for server in ipvs.servers(family):
            if not ipvs_text.owned(server, vips, addresses.own, entries):
                continue
            if server.protocol == "TCP":
                out = [s for s in server.servers if not s.weight]
                draining += [(Service(server.address, server.port), Server(s.address, s.port)) for s in out]
                server = server._replace(servers=tuple(s for s in server.servers if s.weight))
            objects.append(server)
    return _Found(objects, draining)


def _link_commands(lines: Iterable[str]) -> None:
    """ "link add NAME type dummy", "addr add|del ADDRESS/LENGTH dev kube-ipvs0 …" """
    changes = []
    for line in lines:
        words = line.split()
        if words[0] == "link":
            links.make_dummy(words[2])
        else:
            changes.append((words[2].partition("/")[0], words[1] == "add"))
    for address, code in links.change_addresses(changes):
        raise TransactionError(f"address {address} of {LINK}: {explain(code)}", transient=code in TRANSIENT)


# -- preparing and cleaning up


class Schedulers:
    """Which schedulers this kernel has; asked for as Services name them."""

    def __init__(self, default: str) -> None:
        self._default = default
        self._known: set[str] = set()

    def review(self, port: ServicePort) -> tuple[ServicePort, Sequence[str]]:
        """The service port with a scheduler that works here, and what is to be said about the one it names."""
        name = port.scheduler.partition(",")[0]
        if not name or self._has(name):
            return port, ()
        reason = (
            f"the kernel has no IPVS scheduler {name!r} (annotation miniproxy.io/ipvs-scheduler): load it "
            f"(modprobe ip_vs_{name}) or name another; {self._default} is used"
        )
        return msgspec.structs.replace(port, scheduler=""), (reason,)

    def _has(self, name: str) -> bool:
        if name not in self._known:
            try:
                with Ipvs.open() as ipvs:
                    if not ipvs.has_scheduler(name):
                        return False
            except (OSError, TransactionError):
                return True  # not to be known now, and `prepare` has more to say about it
            self._known.add(name)
        return True


def prepare(settings: Settings) -> None:
    """What IPVS mode needs of the kernel. Raises TransactionError when it cannot work here."""
    with Ipvs.open() as ipvs:
        if not ipvs.has_scheduler(settings.ipvs_scheduler):
            name = settings.ipvs_scheduler
            raise TransactionError(
                f"the kernel has no IPVS scheduler {name!r} (setting ipvs.scheduler, flag --ipvs-scheduler): "
                f"load it (modprobe ip_vs_{name}) or choose another, such as rr"
            )
        timeouts = (settings.ipvs_tcp_timeout, settings.ipvs_tcp_fin_timeout, settings.ipvs_udp_timeout)
        if any(timeouts):
            ipvs.set_timeouts(*timeouts)
    sysctl.prepare_ipvs(settings)


def cleanup_servers() -> int:
    """Remove our virtual servers and kube-ipvs0; returns how many objects that was. Raises TransactionError.

    The sets have to wait until no rule refers to them.
    """
    count = 0
    # Where the module is not loaded there is nothing: asking would load it, and a library of 11 MB.
    loaded = (_PROC / "ip_vs").exists()
    try:
        for family in Family if loaded else ():
            found = _read(family).objects
            count += sum(isinstance(obj, VirtualAddress) for obj in found)
            gone = [Command("-D", obj) for obj in found if isinstance(obj, VirtualServer)]
            with Ipvs.open() as ipvs:
                failed = ipvs.execute(gone)
            for command, code in failed:
                raise TransactionError(f"{_name(command)}: {explain(code)}")
            count += len(gone)
        count += links.remove_link(LINK)
    except OSError as error:
        raise TransactionError(f"cannot clean up IPVS: {error}") from error
    return count


def cleanup_sets() -> int:
    """Destroy our sets; returns how many there were. Raises TransactionError."""
    try:
        found = [s for s in ipset.read(set_name(n, f) for n in SETS for f in Family) if isinstance(s, IpSet)]
        ipset.restore(f"destroy {s.name}" for s in found)
    except OSError as error:
        if error.errno in NO_SUBSYSTEM:
            raise MissingError("the kernel has no ipset (modprobe ip_set)") from error
        raise TransactionError(f"cannot clean up ipsets: {error}", transient=True) from error
    return len(found)
