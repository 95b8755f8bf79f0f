"""The stage: four network namespaces, gone when the benchmark is, however it ends.

client 10.192.0.2 ──┐                ┌── pods: any address of 10.128.0.0/10, port 8080
                    ├──── node ──────┤
                    │  172.30.0.2    └── control 172.30.0.1: etcd and kube-apiserver
service addresses: 10.96.0.0/12; where no rule translates them, the pods' namespace refuses (by a reset: ICMP
would leave one connection in a few waiting for its time-out)
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..lab import netns, state, watchdog
from ..lab.plan import LabSpec, Namespace, netns_name
from ..lab.subprocesses import environment

NODE, PODS, CLIENT, CONTROL = "node", "pods", "client", "control"
NODE_NAME = "bench-node"
NODE_IP, CONTROL_IP = "172.30.0.2", "172.30.0.1"
CLIENT_IP = "10.192.0.2"
POD_CIDR = "10.128.0.0/9"  # endpoints and the client
ENDPOINT_CIDR = "10.128.0.0/10"
SERVICE_CIDR = "10.96.0.0/12"
ENDPOINT_PORT = 8080

_SYSCTLS = (
    ("net.ipv4.ip_forward", "1"),
    ("net.ipv6.conf.all.forwarding", "1"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
    # Refusals are ICMP messages, and a prober needs each one.
    ("net.ipv4.icmp_ratelimit", "0"),
    ("net.ipv4.icmp_msgs_per_sec", "1000000"),
    ("net.ipv4.icmp_msgs_burst", "1000000"),
)
T = TypeVar("T")


class World:
    """The namespaces as a context manager; processes started in them end with it."""

    def __init__(self, name: str = "") -> None:
        self.name = name or f"b{os.getpid()}"
        self._watch: subprocess.Popen[bytes] | None = None
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> World:
        netns.require_system()
        state.sweep()
        owner = state.process(os.getpid())
        self._watch = watchdog.start(self.name, owner)
        try:
            state.claim(state.Record(spec=LabSpec(name=self.name), owner=owner, benchmark=True))
            netns.build(self.name, self._namespaces(), keep_open=watchdog.pipe(self._watch))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        state.destroy(self.name)
        for child in self._children:
            child.wait()
        if self._watch:
            with contextlib.suppress(BrokenPipeError):
                watchdog.release(self._watch)

    @property
    def folder(self) -> Path:
        """For files of any kind; it goes with the namespaces."""
        return state.folder(self.name)

    def inside(self, place: str, work: Callable[[], T]) -> T:
        """Run `work` in a namespace; a socket it makes stays there wherever it is used."""
        return netns.inside(netns_name(self.name, place), work)

    def start(
        self, place: str, argv: Sequence[str | Path], log: str, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a process in a namespace. What it prints goes to `log` in the folder."""
        enter = ["nsenter", f"--net={netns.NETNS_FOLDER / netns_name(self.name, place)}", "--"]
        with (self.folder / "log" / log).open("ab") as output:
            child = subprocess.Popen(
                [*enter, *map(str, argv)],
                env=environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                **{"stdout": output, "stderr": output, **options},
            )
        self._children.append(child)
        return child

    def run(self, place: str, argv: Sequence[str], text: str = "") -> str:
        """Run a program to its end and return what it prints. Raises CalledProcessError."""
        enter = ["nsenter", f"--net={netns.NETNS_FOLDER / netns_name(self.name, place)}", "--"]
        done = subprocess.run([*enter, *argv], input=text, capture_output=True, text=True, check=True)
        return done.stdout

    def log(self, name: str) -> str:
        """The last lines of a log, for error messages."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join((self.folder / "log" / name).read_text(errors="replace").splitlines()[-8:])
        return ""

    def _namespaces(self) -> list[Namespace]:
        def link(place: str) -> str:
            return f"link add {place} type veth peer name eth0 netns {netns_name(self.name, place)}"

        def leaf(place: str, address: str, gateway: str, *more: str) -> Namespace:
            setup = ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up", *more)
            return Namespace(place, _SYSCTLS, setup=(*setup, f"route add default via {gateway}"))

        node = Namespace(
            NODE,
            _SYSCTLS,
            links=(link(PODS), link(CLIENT), link(CONTROL)),
            setup=(
                "link set lo up",
                f"addr add {NODE_IP}/24 dev {CONTROL}",
                f"addr add 10.193.0.1/24 dev {PODS}",
                f"addr add 10.192.0.1/24 dev {CLIENT}",
                *(f"link set {place} up" for place in (PODS, CLIENT, CONTROL)),
                f"route add default via {CONTROL_IP}",
                f"route add {ENDPOINT_CIDR} via 10.193.0.2",
                f"route add {SERVICE_CIDR} via 10.193.0.2",
            ),
        )
        return [
            node,
            leaf(
                PODS,
                "10.193.0.2",
                "10.193.0.1",
                *(f"route add local {c} dev lo" for c in (ENDPOINT_CIDR, SERVICE_CIDR)),
            ),
            leaf(CLIENT, CLIENT_IP, "10.192.0.1"),
            leaf(CONTROL, CONTROL_IP, NODE_IP),
        ]
