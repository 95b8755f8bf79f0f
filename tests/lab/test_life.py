"""Labs come and go without a trace, whatever happens to whoever made them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from miniproxy.lab import Lab, LabError, LabSpec, netns, state
from miniproxy.lab.subprocesses import environment

PATIENCE = 30.0


def small(name: str) -> Lab:
    return Lab(LabSpec(name=name, pods_per_node=1))


def host_network() -> dict[str, str]:
    """What a lab must not change, as text; without the counters."""
    commands = {
        "links": "ip -o link",
        "addresses": "ip -o addr",
        "routes": "ip route show table all",
        "routes of IPv6": "ip -6 route show table all",
        "rules": "ip rule; ip -6 rule",
        "sysctls": "sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.icmp_ratelimit",
        "nft": "iptables-nft-save | grep -v ^#; ip6tables-nft-save | grep -v ^#",
        "legacy": "iptables-legacy-save | grep -v ^#; ip6tables-legacy-save | grep -v ^#",
    }
    return {
        what: subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
        for what, command in commands.items()
    }


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def traces(name: str) -> list[str]:
    """What is left of a lab: namespaces, processes whose command names it, its folder."""
    left = netns.existing(name)
    if state.folder(name).exists():
        left.append(str(state.folder(name)))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if name.encode() in words:
                left.append(f"{entry.name}: {b' '.join(words).decode()}")
    return left


def miniproxy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "miniproxy", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_up_and_down_leave_the_host_as_it_was(name: str) -> None:
    before = host_network()
    with small(name) as lab:
        assert len(netns.existing(name)) == len(lab.plan.namespaces)
        assert host_network() == before
    assert traces(name) == []
    assert host_network() == before


def test_a_failure_inside_removes_the_lab(name: str) -> None:
    with pytest.raises(RuntimeError, match="boom"), small(name):
        raise RuntimeError("boom")
    assert traces(name) == []


def test_a_name_in_use_is_refused_and_nothing_happens_to_the_lab(name: str) -> None:
    with small(name) as lab:
        with pytest.raises(LabError, match=f"a lab named '{name}' exists already"):
            Lab(LabSpec(name=name)).up()
        assert lab.pod("client-1").get(lab.plan.servers[0].ips[0], 8080).outcome == "answered"


def test_labs_live_side_by_side(name: str) -> None:
    with small(f"{name}a") as one, small(f"{name}b") as other:
        ip = one.plan.servers[0].ips[0]
        one.down()
        assert other.pod("client-1").get(ip, 8080).outcome == "answered"
        assert traces(f"{name}a") == []


def test_processes_in_a_lab_end_with_it(name: str) -> None:
    """Also those nobody recorded: a shell of somebody who was looking around."""
    with small(name) as lab:
        guest = subprocess.Popen(lab.node("node1").command(["sleep", "1000"]))
    assert guest.wait(PATIENCE) == -signal.SIGKILL


def test_a_recorded_pid_that_is_another_process_now_is_not_touched(name: str) -> None:
    bystander = subprocess.Popen(["sleep", "1000"])
    try:
        with small(name):
            wrong = state.Process(bystander.pid, state.process(bystander.pid).started - 1)
            state.replace(state.folder(name) / "pids" / "node1", msgspec.json.encode(wrong))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def creator(name: str) -> subprocess.Popen[bytes]:
    """A process that builds a lab, says so, and waits."""
    program = (
        "import sys, time; from miniproxy.lab import Lab, LabSpec\n"
        "lab = Lab(LabSpec(name=sys.argv[1], pods_per_node=1)); lab.up(); print('up', flush=True); time.sleep(600)"
    )
    return subprocess.Popen([sys.executable, "-c", program, name], env=environment(), stdout=subprocess.PIPE, cwd="/")


def kill_watchdog(name: str) -> None:
    """Ends the watchdog of a lab, so that nobody is left who would clean up."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"watchdog" in words and name.encode() in words:
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.parametrize("moment", [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6])
def test_a_creator_killed_midway_leaves_nothing(name: str, moment: float) -> None:
    child = creator(name)
    time.sleep(moment * random.uniform(0.9, 1.1))
    child.kill()
    child.wait()
    assert eventually(lambda: traces(name) == []), traces(name)


@pytest.mark.parametrize("moment", [0.15, 0.25, 0.35, 1.0])
def test_creator_and_watchdog_killed_midway_then_down_leaves_nothing(name: str, moment: float) -> None:
    child = creator(name)
    time.sleep(moment)
    child.send_signal(signal.SIGSTOP)  # or the watchdog's end would come before the creator's next step
    kill_watchdog(name)
    child.kill()
    child.wait()
    done = miniproxy("lab", "down", "--name", name)
    assert done.returncode == 0, done.stderr
    assert traces(name) == []


def test_the_next_lab_sweeps_away_what_a_dead_owner_left(name: str) -> None:
    child = creator(name)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    child.send_signal(signal.SIGSTOP)
    kill_watchdog(name)
    child.kill()
    child.wait()
    assert traces(name) != []
    with small(f"{name}n"):
        assert traces(name) == []


def test_the_commands(name: str) -> None:
    up = miniproxy("lab", "up", "--name", name, "--no-agents", "--nodes", "1", "--pods-per-node", "2")
    try:
        assert up.returncode == 0, up.stderr
        assert f"lab {name}" in up.stdout
        assert "web-1 web-2" in up.stdout

        again = miniproxy("lab", "up", "--name", name)
        assert again.returncode == 1
        assert "exists already" in again.stderr

        (status,) = msgspec.json.decode(miniproxy("lab", "status", "--name", name, "--json").stdout)
        assert status["name"] == name
        assert [node["name"] for node in status["nodes"]] == ["node1"]
        assert {service["name"]: service["pods"] for service in status["services"]}["hairpin"] == ["web-1"]

        said = miniproxy("lab", "exec", "--name", name, "client-1", "--", "curl", "-s", "http://10.244.1.12:8080/")
        assert msgspec.json.decode(said.stdout)["pod"] == "web-2"
        nowhere = miniproxy("lab", "exec", "--name", name, "nowhere", "--", "true")
        assert nowhere.returncode == 1
        assert "Places: node1" in nowhere.stderr

        assert miniproxy("lab", "scale", "--name", name, "web", "1").stdout == "web: web-1\n"
        assert Lab.attach(name).pods_behind("web") == ["web-1"]
    finally:
        down = miniproxy("lab", "down", "--name", name)
    assert down.stdout == f"lab {name}: removed\n"
    assert traces(name) == []
    assert miniproxy("lab", "status", "--name", name).returncode == 1


def test_down_spares_the_lab_of_a_running_process(name: str) -> None:
    with small(name):
        refused = miniproxy("lab", "down", "--name", name)
        assert refused.returncode == 1
        assert f"belongs to process {os.getpid()}" in refused.stderr
        assert netns.existing(name)


def test_without_root_a_lab_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="needs root"):
        Lab().up()


def test_without_iproute2_a_lab_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LabError, match="install the package iproute2"):
        Lab().up()
