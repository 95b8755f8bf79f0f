"""A lab in IPVS mode where the kernel has no IPVS: in user-mode Linux, looked after by the same commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from miniproxy.lab import machine, state, uml
from miniproxy.lab.subprocesses import environment

from .test_life import eventually, host_network, kill_watchdog, miniproxy, traces

pytestmark = pytest.mark.skipif(
    uml.has_ip_vs() or not uml.available(), reason="this kernel has IPVS, or user-mode Linux is not installed"
)


def everything_left(name: str) -> list[str]:
    return traces(name) + [str(process) for process in uml.processes(state.machine_folder(name))]


def up(name: str, *options: str) -> list[str]:
    return ["lab", "up", "--proxy-mode", "ipvs", "--name", name, "--pods-per-node", "1", *options]


@pytest.fixture
def bare(name: str) -> Iterator[str]:
    """A lab without agents, which is up sooner."""
    built = miniproxy(*up(name, "--no-agents"))
    assert built.returncode == 0, built.stderr
    yield name
    miniproxy("lab", "down", "--name", name)


def test_the_commands_reach_into_it(name: str) -> None:
    before = host_network()

    def lab(what: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return miniproxy("lab", what, "--name", name, *arguments)

    def reached() -> str:
        said = lab("exec", "client-1", "--", "curl", "-s", "http://10.96.0.10/")
        return str(msgspec.json.decode(said.stdout)["pod"])

    try:
        built = miniproxy(*up(name))
        assert built.returncode == 0, built.stderr
        assert "the lab runs in user-mode Linux" in built.stdout
        assert f"lab {name}" in built.stdout
        assert "web-1 client-1" in built.stdout

        assert "rr" in lab("exec", "node1", "--", "ipvsadm", "-Ln").stdout
        assert lab("scale", "web", "1").stdout == "web: web-1\n"
        assert eventually(lambda: {reached() for _ in range(3)} == {"web-1"})

        healthy = lab("doctor", "node1", "default/web")
        assert healthy.returncode == 0, healthy.stdout
        assert ", mode ipvs\n" in healthy.stdout
        assert lab("exec", "node1", "--", "ipvsadm", "-D", "-t", "10.96.0.10:80").returncode == 0
        sick = lab("doctor", "node1", "default/web")
        assert sick.returncode == 1
        assert "✘ default/web:http TCP IPv4 in the kernel: 1 objects are not as planned" in sick.stdout

        assert lab("exec", "node1", "--", "sh", "-c", "echo no >&2; exit 7").returncode == 7
        nowhere = lab("exec", "nowhere", "--", "true")
        assert nowhere.returncode == 1
        assert "Places: node1" in nowhere.stderr

        (status,) = msgspec.json.decode(lab("status", "--json").stdout)
        assert (status["name"], status["mode"]) == (name, "ipvs")
        assert {service["name"]: service["pods"] for service in status["services"]}["web"] == ["web-1"]
        assert host_network() == before
    finally:
        down = lab("down")
    assert down.stdout == f"lab {name}: removed\n"
    assert everything_left(name) == []


def test_a_command_that_is_interrupted_ends_inside_too(bare: str) -> None:
    command = [sys.executable, "-m", "miniproxy", "lab", "exec", "--name", bare, "node1", "--", "sleep", "1000"]
    # Who starts tests in the background has made them deaf to an interruption, and this command with them.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, env=environment(), preexec_fn=heed) as waiting:
        time.sleep(2)
        waiting.send_signal(signal.SIGINT)
    assert waiting.returncode == 1
    asked = ("lab", "exec", "--name", bare, "node1", "--", "pgrep", "-x", "sleep")
    assert eventually(lambda: miniproxy(*asked).returncode == 1)


def test_a_machine_that_ended_is_named(bare: str) -> None:
    os.kill(state.read_processes(bare)["machine"].pid, signal.SIGKILL)
    for command in (["status", "--name", bare], ["exec", "--name", bare, "node1", "--", "true"]):
        told = miniproxy("lab", *command)
        assert told.returncode == 1
        assert f"has ended (see {machine.console(bare)})" in told.stderr
    assert miniproxy("lab", "down", "--name", bare).returncode == 0
    assert everything_left(bare) == []


@pytest.mark.parametrize("moment", [0.2, 0.5, 1.0, 2.5])
def test_a_creator_killed_midway_leaves_nothing(name: str, moment: float) -> None:
    with subprocess.Popen([sys.executable, "-m", "miniproxy", *up(name)], env=environment(), cwd="/") as creator:
        time.sleep(moment)
        creator.kill()
    assert eventually(lambda: everything_left(name) == []), everything_left(name)


def test_creator_and_watchdog_killed_midway_then_down_leaves_nothing(name: str) -> None:
    with subprocess.Popen([sys.executable, "-m", "miniproxy", *up(name)], env=environment(), cwd="/") as creator:
        time.sleep(1.5)
        creator.send_signal(signal.SIGSTOP)
        kill_watchdog(name)
        creator.kill()
    assert everything_left(name) != []
    assert miniproxy("lab", "down", "--name", name).returncode == 0
    assert everything_left(name) == []


def test_what_runs_inside_never_outlives_its_kernel(tmp_path: Path) -> None:
    """Its processes are real ones that only the kernel inside keeps from real system calls."""
    loop = ["sh", "-c", f"while date >{uml.SHARED}/beat; do :; done"]
    with (tmp_path / "log").open("w") as log:
        process = uml.boot(tmp_path, loop, log=log)
        try:
            assert eventually((tmp_path / "beat").exists)
            kernels = [pid for pid, program in uml.processes(tmp_path) if program == uml.KERNEL]
            os.kill(min(kernels), signal.SIGKILL)
            assert process.wait(10) != 0
            assert eventually(lambda: not list(uml.processes(tmp_path)))
            assert not (tmp_path / "code").exists()
        finally:
            uml.turn_off(tmp_path)
