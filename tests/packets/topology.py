"""The network of the golden behaviour: node n1 between its pods, the world outside and its uplink.

```
 outside   203.0.113.7, 198.51.100.7 ──┐                ┌── pods    every endpoint address, behind 10.128.9.1
                                       ├── node (n1) ───┤
 uplink    172.30.0.1, drops all ──────┘ 172.30.0.2     └── client  10.128.1.10
```

All of it is in network namespaces without names. Each is held open by a process that ends when this one does,
and every process started in them dies with this one, so nothing can be left behind, and any number of these
networks can exist at a time. It answers for links, addresses and processes; it knows nothing about services.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Self

import msgspec

ROOT = Path(__file__).parents[2]

# (address of the node on the link, addresses of the other side), per family
PODS_GATEWAY = ("10.128.9.1", "fd00:128:9::1")
NODE = ("172.30.0.2", "fd00:30::2")

SYSCTLS = (
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv6.conf.all.accept_dad=0",
    "net.ipv6.conf.default.accept_dad=0",
)
# With the usual rate limits a refusal (ICMP port unreachable) is often not sent, and looks like silence.
NODE_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv4.icmp_ratelimit=0",
    "net.ipv4.icmp_msgs_per_sec=100000",
    "net.ipv4.icmp_msgs_burst=10000",
    "net.ipv6.icmp.ratelimit=0",
)


class Namespace:
    """A network namespace (with a mount namespace for a /run and /sys of its own) and the processes in it."""

    def __init__(self, holder: subprocess.Popen[str]) -> None:
        self._holder = holder
        self.pid = holder.pid

    @classmethod
    @contextmanager
    def create(cls, sysctls: Iterable[str] = ()) -> Iterator[Self]:
        # /run: iptables' lock /run/xtables.lock is one per machine otherwise, also for separate namespaces.
        script = (
            "mount -t tmpfs tmpfs /run && mount -t sysfs sysfs /sys && ip link set lo up && "
            f"sysctl -qew {' '.join([*SYSCTLS, *sysctls])} && echo ready && exec cat"
        )
        holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,  # its end, when this process ends however that may be, ends `cat`
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            await_ready(holder, "a network namespace (root is needed)")
            yield cls(holder)
        finally:
            holder.kill()
            holder.communicate()

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` in here and dies with the process that started it."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", f"--wd={ROOT}"]
        return ["setpriv", "--pdeathsig", "KILL", *enter, *argv]

    def run(self, *argv: str, stdin: str = "") -> str:
        """Runs a command to its end and returns its standard output; raises AssertionError when it fails."""
        done = subprocess.run(self.command(argv), input=stdin, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(argv)}: exit code {done.returncode}\n{done.stderr}"
        return done.stdout

    def ip(self, *lines: str) -> None:
        self.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")

    @contextmanager
    def process(self, *argv: str, log: IO[str] | int) -> Iterator[subprocess.Popen[str]]:
        """A process in here, killed at the end if it has not ended by then."""
        process = subprocess.Popen(
            self.command(argv), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()

    @contextmanager
    def module(self, name: str, *argv: str) -> Iterator[subprocess.Popen[str]]:
        """A module of this package run as a program, once it says that it is ready."""
        with self.process(sys.executable, "-m", f"{__package__}.{name}", *argv, log=subprocess.PIPE) as process:
            yield process


class Network(msgspec.Struct, frozen=True):
    node: Namespace
    pods: Namespace
    client: Namespace
    outside: Namespace
    uplink: Namespace

    def iptables_save(self, variant: str) -> tuple[str, str]:
        """What the node's kernel holds, (IPv4, IPv6), as text."""
        return (
            self.node.run(f"iptables-{variant}-save"),
            self.node.run(f"ip6tables-{variant}-save"),
        )

    def restore(self, variant: str, texts: tuple[str, str]) -> None:
        for command, text in zip(("iptables", "ip6tables"), texts, strict=True):
            self.node.run(f"{command}-{variant}-restore", stdin=text)


def _connect(node: Namespace, name: str, peer: Namespace, gateways: Sequence[str], addresses: Sequence[str]) -> None:
    """A link from the node to `peer`, the node being the peer's default route."""
    node.ip(
        f"link add {name} type veth peer name eth0 netns {peer.pid}",
        *(f"addr add {gateway} dev {name} nodad" for gateway in gateways),
        f"link set {name} up",
    )
    peer.ip(
        *(f"addr add {address} dev eth0 nodad" for address in addresses),
        "link set eth0 up",
        f"route add 0.0.0.0/0 via {gateways[0].split('/')[0]}",
        f"route add ::/0 via {gateways[1].split('/')[0]}",
    )


@contextmanager
def network(endpoints: Iterable[str]) -> Iterator[Network]:
    """The golden network; every address of `endpoints` is one of the pods' namespace."""
    with ExitStack() as stack:
        node = stack.enter_context(Namespace.create(NODE_SYSCTLS))
        pods, client, outside, uplink = (stack.enter_context(Namespace.create()) for _ in range(4))
        # The uplink has no routes beyond the link and forwards nothing: what goes there is not answered.
        node.ip(f"link add eth0 type veth peer name eth0 netns {uplink.pid}")
        uplink.ip("addr add 172.30.0.1/24 dev eth0", "addr add fd00:30::1/64 dev eth0 nodad", "link set eth0 up")
        node.ip(
            f"addr add {NODE[0]}/24 dev eth0",
            f"addr add {NODE[1]}/64 dev eth0 nodad",
            "link set eth0 up",
            "route add 0.0.0.0/0 via 172.30.0.1",
            "route add ::/0 via fd00:30::1",
        )
        pods_gateways = (f"{PODS_GATEWAY[0]}/24", f"{PODS_GATEWAY[1]}/64")
        _connect(node, "pods", pods, pods_gateways, ("10.128.9.2/24", "fd00:128:9::2/64"))
        client_addresses = ("10.128.1.10/24", "fd00:128:1::10/64")
        _connect(node, "client", client, ("10.128.1.1/24", "fd00:128:1::1/64"), client_addresses)
        outside_addresses = ("203.0.113.7/24", "198.51.100.7/32", "fd00:203::7/64")
        _connect(node, "outside", outside, ("203.0.113.1/24", "fd00:203::1/64"), outside_addresses)
        node.ip("route add 198.51.100.7/32 via 203.0.113.7")
        own = sorted(set(endpoints))
        pods.ip(*(f"addr add {address} dev lo" + " nodad" * (":" in address) for address in own))
        via = {True: "fd00:128:9::2", False: "10.128.9.2"}
        node.ip(*(f"route add {address} via {via[':' in address]}" for address in own))
        yield Network(node, pods, client, outside, uplink)


@contextmanager
def echo_server(where: Namespace, ports: Iterable[tuple[str, int]]) -> Iterator[None]:
    """Servers for each (protocol, port) on all addresses of `where`; see echo.py for what they answer."""
    arguments = [f"{protocol}:{port}" for protocol, port in sorted(set(ports))]
    with where.module("echo", *arguments) as server:
        await_ready(server, "the echo server")
        yield


def await_ready(process: subprocess.Popen[str], what: str) -> None:
    """Reads the line "ready", which a helper process prints when it is."""
    assert process.stdout
    line = process.stdout.readline()
    assert line == "ready\n", f"{what} does not start: {line}"


def settle(condition: Callable[[], bool], seconds: float) -> bool:
    """Looks every 50 ms whether a condition has come true, for so long; returns whether it has."""
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return true
