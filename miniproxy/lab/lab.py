"""The lab: a cluster of network namespaces with pods that answer and, if wanted, an agent on every node.

    with Lab(LabSpec(name="demo")) as lab:
        lab.start_agents(mode="iptables")
        print(lab.pod("client-1").get("10.96.0.10", 80))

Used as a context manager a lab lives as long as its process at most (see state.py on crashes), unless `stay` is
called: then until somebody calls `down`. The addresses are in plan.py and manifests/services.yaml.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import netns, objects, state, uml, watchdog
from .netns import LabError
from .objects import LabService
from .plan import (
    CLUSTER_CIDRS,
    NETWORK,
    OUTSIDE,
    OUTSIDE_IPS,
    STRANGER,
    STRANGER_IPS,
    LabSpec,
    Plan,
    Pod,
    check,
    netns_name,
    plan,
)
from .probe import Kind, Place
from .state import READY, Process, Record
from .subprocesses import python_module

_SERVER = "server"
_PATIENCE, _SLOW_PATIENCE = 30.0, 180.0  # seconds until services answer
_SERVER_PATIENCE = 20.0
_STOP_PATIENCE = 10.0
_POLL = 0.02


class Lab:
    """A lab by its spec; nothing exists before `up`."""

    def __init__(self, spec: LabSpec | None = None) -> None:
        self.spec = spec or LabSpec()
        self._watch: subprocess.Popen[bytes] | None = None
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._agent_options: list[str] = []
        self._stays = False

    @staticmethod
    def attach(name: str) -> Lab:
        """A lab that is up already, to look at, change and remove. Raises LabError if there is none."""
        record = state.read_record(name)
        if record.benchmark:
            raise LabError(f"{name!r} is a benchmark that runs, and no lab.")
        return Lab(record.spec)

    # ---- life -----------------------------------------------------------------------------------------

    def up(self) -> None:
        """Builds the namespaces, starts the pods, writes the manifests. Raises LabError."""
        if problems := check(self.spec):
            raise LabError("; ".join(problems))
        netns.require_system()
        state.sweep()
        owner = state.process(os.getpid())
        watch = watchdog.start(self.spec.name, owner)  # before there is anything to watch over: no gap
        try:
            state.claim(Record(spec=self.spec, owner=owner))
        except BaseException:
            watchdog.release(watch)
            raise
        self._watch = watch
        try:
            netns.build(self.spec.name, self.plan.namespaces, keep_open=watchdog.pipe(watch))
            objects.write_all(self.manifests, self.plan, time.time())
            self._start_server()
        except BaseException:
            self.down()
            raise

    def stay(self) -> None:
        """Lets the lab outlive this object and its process, until `miniproxy lab down`."""
        self._stays = True
        state.write_record(msgspec.structs.replace(self._record, owner=None))
        self._end_watch()

    def down(self) -> None:
        """Removes everything of the lab; harmless when it is gone already."""
        state.destroy(self.spec.name)
        for child in self._children.values():
            child.wait()  # killed: only to leave no zombie
        self._children.clear()
        self._end_watch()

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stays:
            self.down()

    # ---- what there is --------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        return plan(self.spec)

    @property
    def folder(self) -> Path:
        return state.folder(self.spec.name)

    @property
    def manifests(self) -> Path:
        """The folder the agents watch."""
        return self.folder / "manifests"

    def log(self, role: str) -> Path:
        """What the agent of a node (role "node1"), or the pods' server (role "server"), printed."""
        return self.folder / "log" / f"{role}.log"

    @property
    def places(self) -> dict[str, Place]:
        """Everywhere one can connect from, by name: nodes, pods, "outside" and "stranger"."""
        described = self.plan
        found = [self._place(node.name, node.ips) for node in described.nodes]
        found += [self._place(pod.name, pod.ips) for pod in described.pods]
        found += [self._place(OUTSIDE, OUTSIDE_IPS), self._place(STRANGER, STRANGER_IPS)]
        return {place.name: place for place in found}

    def place(self, name: str) -> Place:
        """Raises LabError for an unknown name."""
        places = self.places
        if name not in places:
            raise LabError(f"there is no place {name!r} in lab {self.spec.name!r}. Places: {', '.join(places)}.")
        return places[name]

    def pod(self, name: str) -> Place:
        """A pod, "web-1" or "client-1", to connect from."""
        return self.place(name)

    def node(self, name: str) -> Place:
        """A node, "node1", to connect from."""
        return self.place(name)

    @property
    def outside(self) -> Place:
        """The client outside of the cluster."""
        return self.place(OUTSIDE)

    @property
    def stranger(self) -> Place:
        """Another one outside, whom the service "lb" does not admit."""
        return self.place(STRANGER)

    @property
    def services(self) -> dict[str, LabService]:
        return {name: objects.describe(service) for name, service in self._services.items()}

    def service(self, name: str) -> LabService:
        """Raises LabError for an unknown name."""
        return objects.describe(self._service(name))

    def pods_behind(self, service: str) -> list[str]:
        """Names of the pods in the slices of a service now."""
        self._service(service)
        return objects.pods_behind(self.manifests, service)

    # ---- changing it ----------------------------------------------------------------------------------

    def scale(self, service: str, count: int) -> list[str]:
        """Puts the first `count` pods (web-1, web-2, …) behind a service; returns their names."""
        servers = self.plan.servers
        if not 0 <= count <= len(servers):
            raise LabError(f"cannot scale {service!r} to {count}: the lab has {len(servers)} pods that serve.")
        return self.set_pods(service, [pod.name for pod in servers[:count]])

    def set_pods(self, service: str, pods: Sequence[str]) -> list[str]:
        """Puts exactly these pods behind a service."""
        known = {pod.name: pod for pod in self.plan.servers}
        if unknown := [name for name in pods if name not in known]:
            raise LabError(f"no such pods: {', '.join(unknown)}. Pods: {', '.join(known)}.")
        chosen: list[Pod] = [known[name] for name in pods]
        objects.write_slices(self.manifests, self._service(service), chosen, self.spec, time.time())
        return list(pods)

    # ---- agents ---------------------------------------------------------------------------------------

    def start_agents(
        self,
        *,
        mode: str = "iptables",
        variant: str = "auto",
        extra: Sequence[str] = (),
        timeout: float | None = None,
    ) -> None:
        """Starts an agent on every node and waits until the services of the lab answer.

        `extra` are more options for `miniproxy run`. Raises LabError, with the log, when an agent ends or the
        services do not answer within `timeout` seconds (30; more in user-mode Linux, where programs take long to
        start).
        """
        self._agent_options = list(extra)
        state.write_record(msgspec.structs.replace(self._record, mode=mode, variant=variant))
        for node in self.plan.nodes:
            self.start_agent(node.name)
        self.wait_until_serving(timeout or (_SLOW_PATIENCE if uml.inside() else _PATIENCE))

    def start_agent(self, node: str) -> Process:
        """Starts the agent of one node, with the options of `start_agents`."""
        command = python_module("miniproxy", "run", *self.agent_settings(node), *self._agent_options)
        return self._start(node, self.node(node), command)

    def agent_settings(self, node: str) -> list[str]:
        """The options that an agent of this node runs with; doctor, plan and explain need the same."""
        record = self._record
        return [
            f"--source={self.manifests}",
            f"--hostname-override={node}",
            f"--cluster-cidr={','.join(CLUSTER_CIDRS)}",
            f"--proxy-mode={record.mode or 'iptables'}",
            f"--iptables-variant={record.variant or 'auto'}",
        ]

    def stop_agent(self, node: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Signals the agent of a node and waits for its end; its rules stay. Raises LabError if it won't end."""
        agent = state.read_processes(self.spec.name).get(node)
        if agent is None or not state.signal_process(agent, number):
            return
        child = self._children.get(node)
        try:
            if child is not None:
                child.wait(_STOP_PATIENCE)
            elif not _until(lambda: not agent.alive, _STOP_PATIENCE):
                raise subprocess.TimeoutExpired(node, _STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            raise LabError(f"the agent on {node} does not end on {number.name}: see {self.log(node)}") from None

    @property
    def agents(self) -> dict[str, bool]:
        """Per node that ever had an agent, whether it runs."""
        recorded = state.read_processes(self.spec.name)
        return {node.name: recorded[node.name].alive for node in self.plan.nodes if node.name in recorded}

    def wait_until_serving(self, timeout: float = _PATIENCE) -> None:
        """Waits until, on every node, the cluster IPs of all services with pods answer a client pod.

        Raises LabError, with the end of an agent's log, when they do not in `timeout` seconds.
        """
        waiting = [
            (node.name, service, ip)
            for node in self.plan.nodes
            for service in self.services.values()
            if self.pods_behind(service.name)
            for ip in service.cluster_ips
        ]

        def done() -> bool:
            if dead := [node for node, alive in self.agents.items() if not alive]:
                raise LabError(f"the agent on {dead[0]} ended. {self._last_words(dead[0])}")
            while waiting and self._answers(*waiting[0]):
                waiting.pop(0)
            return not waiting

        if not _until(done, timeout):
            node, service, ip = waiting[0]
            raise LabError(
                f"{service.name} ({ip}) does not answer on {node} after {timeout:g} s"
                f" ({len(waiting)} addresses to go). {self._last_words(node)}"
            )

    def status(self) -> dict[str, Any]:
        """Everything `miniproxy lab status` shows, as JSON-able data."""
        record = self._record
        described = self.plan
        agents = self.agents
        recorded = state.read_processes(self.spec.name)
        return {
            "name": self.spec.name,
            "overlay": self.spec.overlay,
            "mode": record.mode,
            "variant": record.variant,
            "folder": str(self.folder),
            "manifests": str(self.manifests),
            "owner": record.owner.pid if record.owner else None,
            "server": _SERVER in recorded and recorded[_SERVER].alive,
            "nodes": [
                {
                    "name": node.name,
                    "netns": netns_name(self.spec.name, node.name),
                    "ips": node.ips,
                    "pod_cidrs": node.pod_cidrs,
                    "agent": {
                        "alive": agents[node.name],
                        "pid": recorded[node.name].pid,
                        "log": str(self.log(node.name)),
                    }
                    if node.name in agents
                    else None,
                }
                for node in described.nodes
            ],
            "pods": [
                {
                    "name": pod.name,
                    "node": pod.node,
                    "netns": netns_name(self.spec.name, pod.name),
                    "ips": pod.ips,
                    "serves": pod.serves,
                }
                for pod in described.pods
            ],
            "outside": [
                {"name": name, "netns": netns_name(self.spec.name, name), "ips": ips}
                for name, ips in ((OUTSIDE, OUTSIDE_IPS), (STRANGER, STRANGER_IPS))
            ],
            "services": [
                {**msgspec.to_builtins(service), "pods": self.pods_behind(service.name)}
                for service in self.services.values()
            ],
        }

    # ---- inner parts ----------------------------------------------------------------------------------

    @property
    def _record(self) -> Record:
        return state.read_record(self.spec.name)

    @property
    def _services(self) -> dict[str, dict[str, Any]]:
        return {service["metadata"]["name"]: service for service in objects.read_services()}

    def _service(self, name: str) -> dict[str, Any]:
        services = self._services
        if name not in services:
            raise LabError(f"there is no service {name!r} in the lab. Services: {', '.join(services)}.")
        return services[name]

    def _place(self, name: str, ips: tuple[str, str]) -> Place:
        lock = self.folder / f"{name}.lock"
        return Place(name, netns_name(self.spec.name, name), ips, str(lock))

    def _start(self, role: str, place: Place, command: list[str]) -> Process:
        with self.log(role).open("ab") as log:

            def start() -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    place.command(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=place.environment(),
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is for the owner, which then removes the lab in order
                )

            # `ip netns exec` becomes the process (same pid), with the namespace's own /sys. Forked inside
            # already: should we be killed before it is recorded, it is found by where it lives.
            child = netns.inside(place.netns, start)
        self._children[role] = child
        return state.write_process(self.spec.name, role, child.pid)

    def _start_server(self) -> None:
        # In the "network" namespace: whatever lives in a namespace of the lab is found when it is destroyed.
        network = self._place(NETWORK, ("", ""))
        self._start(_SERVER, network, python_module("miniproxy.lab", "server", self.spec.name))
        log = self.log(_SERVER)

        def ready() -> bool:
            if self._children[_SERVER].poll() is not None:
                raise LabError(f"the pods' server ended. {self._last_words(_SERVER)}")
            return READY in log.read_text().split()

        if not _until(ready, _SERVER_PATIENCE):
            raise LabError(f"the pods' server does not come up. {self._last_words(_SERVER)}")

    def _answers(self, node: str, service: LabService, ip: str) -> bool:
        client = self.pod(node.replace("node", "client-"))
        kind: Kind = "udp" if service.protocol == "UDP" else "http"
        answers = client.tries(ip, service.port, kind=kind, count=1, timeout=0.3)
        return answers.all("answered")

    def _last_words(self, role: str) -> str:
        with contextlib.suppress(OSError):
            lines = self.log(role).read_text(errors="replace").splitlines()[-8:]
            return "\n".join([f"The end of {self.log(role)}:", *lines])
        return ""

    def _end_watch(self) -> None:
        if self._watch is not None:
            watchdog.release(self._watch)
            self._watch = None


def _until(condition: Callable[[], bool], timeout: float) -> bool:
    """Asks every 20 ms; whether the condition came to hold within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
