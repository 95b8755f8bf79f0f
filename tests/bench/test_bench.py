"""The benchmark at tiny sizes, against the real kernel: that it measures everything, and what it does with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from miniproxy.bench import campaign, kernel, python_iptables, report
from miniproxy.bench.agents import Calls, Mode, flush
from miniproxy.bench.apiserver import Programs, find
from miniproxy.bench.campaign import Options, Progress, Step
from miniproxy.bench.client import Seen, ask
from miniproxy.bench.eye import IptablesLegacy, IptablesNft, Nftables
from miniproxy.bench.feeds import Folder
from miniproxy.bench.objects import target
from miniproxy.bench.results import BY_NAME, Case, Machine, Results, load, ratio, save, slope, spread
from miniproxy.bench.run import Plan, Run
from miniproxy.bench.world import CLIENT, NODE, World
from miniproxy.cli import group
from miniproxy.lab import netns
from miniproxy.lab.subprocesses import python_module
from miniproxy.sources.wire import convert

root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")
TINY = Plan(changes=1, burst=3, churn=4, churn_rate=50, connections=10, defaults=1)
QUIET = Progress(*[lambda *_: None] * 6)


def programs() -> Programs | None:
    """kube-apiserver and kube-proxy, where hack/build-kubernetes has made them."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    found = find([Path(folder)] if folder else [])
    return found if found and found.kube_proxy else None


def check_complete(run: Run) -> None:
    """Everything was measured, and in an order that cannot be otherwise."""
    assert run.failed == ""
    for changes in (run.added, run.created, run.deleted):
        assert [seen for seen in changes if seen.connected is not None] == changes != []
    assert all(seen.kernel is not None for seen in run.removed)
    assert run.started is not None
    assert run.restarted is not None
    assert run.burst is not None
    assert run.full_sync is not None
    assert 0 < run.full_sync < run.started
    assert len(run.latency) == TINY.connections
    assert run.memory is not None
    assert run.memory > 1 << 20


# -- the whole instrument


@root
@pytest.mark.parametrize("mode", [mode for mode in kernel.modes() if mode != "ipvs"] if os.geteuid() == 0 else [])
def test_miniproxy_from_manifests(mode: Mode, tmp_path: Path) -> None:
    options = Options(modes=(mode,), sizes=(3,), pairs=1, plan=TINY, counting_at=3, defaults_at=3)
    results = campaign.run(options, None, tmp_path, QUIET)
    full, defaults, counted = (run for run in results.runs if run.agent == "miniproxy")
    check_complete(full)
    assert full.agent == "miniproxy"
    assert full.feed == "manifests"
    assert len(defaults.with_defaults) == 1
    assert counted.calls is not None
    assert counted.counted_changes == 2
    assert load(tmp_path / "results.json").runs == results.runs
    assert not [name for name in netns.existing_all() if name.startswith(f"mp-b{os.getpid()}-")]


@root
@pytest.mark.skipif(programs() is None, reason="needs kube-apiserver and kube-proxy: hack/build-kubernetes")
def test_both_agents_from_one_api_server(tmp_path: Path) -> None:
    options = Options(modes=("iptables-nft",), sizes=(3,), pairs=1, plan=TINY, counting_at=3)
    results = campaign.run(options, programs(), tmp_path, QUIET)
    full = [run for run in results.runs if not run.counting]
    assert [run.agent for run in full] == ["miniproxy", "kube-proxy"]
    for run in full:
        check_complete(run)
        assert run.feed == "kube-apiserver"
    ours, theirs = (run.calls for run in results.runs if run.counting)
    assert ours is not None
    assert theirs is not None
    assert ours.processes > 0
    assert theirs.processes > 0  # it gathers for a while what we write at once
    assert 0 < ours.operations <= theirs.operations
    found = ratio(results.runs, "iptables-nft", 3, BY_NAME["memory"])
    assert found is not None
    page = report.write(results, tmp_path)[1].read_text()
    assert "## miniproxy / kube-proxy" in page


@root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_reports_what_there_is_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "miniproxy",
        "bench",
        "--manifests",
        "--sizes",
        "3",
        "--more-sizes",
        "",
        "--pairs",
        "50",
    ]
    argv += ["--modes", kernel.modes()[0], "--output", str(tmp_path)]
    bench = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "results.json").exists() and bench.poll() is None:
        time.sleep(0.1)
    bench.send_signal(number)
    output, errors = bench.communicate()
    assert bench.returncode == 130, errors
    assert "**interrupted**" in output
    results = load(tmp_path / "results.json")
    assert results.interrupted
    assert results.runs
    assert not [name for name in netns.existing_all() if name.startswith(f"mp-b{bench.pid}-")]


# -- its parts


@root
def test_a_benchmark_is_no_lab() -> None:
    """It is among the labs to be swept up after a crash, and the lab's commands leave it alone."""
    with World() as world:
        assert world.name not in CliRunner().invoke(group, ["lab", "status", "--json"]).stdout
        named = CliRunner().invoke(group, ["lab", "status", "--name", world.name])
        assert named.exit_code == 1
        assert "is a benchmark that runs" in named.output


@root
def test_eyes_see_what_the_tools_wrote() -> None:
    with World() as world:
        nft, legacy = IptablesNft(world), IptablesLegacy(world, endpoints=2)
        sets = Nftables(world, "t", "s")
        before = nft.stamp(), legacy.stamp(), sets.stamp()
        assert (nft.services(), legacy.services(), sets.services()) == (0, 0, 0)
        rules = "".join(f"-A KUBE-SERVICES -d 10.96.0.{n} -j ACCEPT\n" for n in range(5))
        text = (
            f"*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n{rules}COMMIT\n"
        )
        world.run(NODE, ["iptables-nft-restore"], text)
        # Five rules, of which one counts as the one for NodePorts.
        assert nft.services() == 4
        many = "".join(f"-A KUBE-SERVICES -d 10.96.1.{n} -j ACCEPT\n" for n in range(1, 141))
        world.run(NODE, ["iptables-legacy-restore"], f"*nat\n:KUBE-SERVICES - [0:0]\n{many}COMMIT\n")
        assert legacy.services() >= 10
        elements = ", ".join(str(n) for n in range(1, 3001))
        declared = f"add table ip t\nadd set ip t s {{ type inet_service; }}\nadd element ip t s {{ {elements} }}\n"
        world.run(NODE, ["nft", "-f", "-"], declared)
        assert sets.services() == 3000
        after = nft.stamp(), legacy.stamp(), sets.stamp()
        assert all(a != b for a, b in zip(before, after, strict=True))
        flush(world)
        assert (nft.services(), sets.services()) == (0, 0)
        for eye in (nft, legacy, sets):
            eye.close()


@root
def test_nobody_answers_where_nothing_is_programmed() -> None:
    with World() as world:
        assert world.inside(CLIENT, lambda: ask(target(0, 1).vip)) == ""


def test_objects_are_ones_that_agents_take(tmp_path: Path) -> None:
    changing = target(7, 2)._replace(hosts=(0, 5))
    for described in (changing.service(), changing.slice()):
        found = convert(json.dumps(described).encode())
        assert not found.problems
    folder = Folder(tmp_path)
    folder.create(changing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node.json", "svc-7.json"]
    folder.delete(changing)
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"]


def test_agents_take_turns_and_sizes_only_grow() -> None:
    options = Options(modes=("nftables", "iptables-nft"), sizes=(10, 100), more_sizes=(1000,), pairs=2, counting_at=10)
    steps = list(campaign.steps(options))
    assert [step.services for step in steps] == sorted(step.services for step in steps)
    ten = [step for step in steps if step.services == 10 and step.mode == "nftables" and not step.kind]
    assert [step.agent for step in ten] == ["miniproxy", "kube-proxy"] * 2
    assert [step for step in steps if step.services == 1000] == [
        Step("miniproxy", "nftables", 1000),
        Step("miniproxy", "iptables-nft", 1000),
    ]
    assert sum(step.kind == "counting" for step in steps) == 4


# -- statistics and words


def runs() -> list[Run]:
    """Two runs of each agent at two sizes: kube-proxy's changes grow with the cluster, miniproxy's do not."""
    found = []
    for services in (100, 10_000):
        for drift in (1.0, 3.0):
            for agent, seconds in (("miniproxy", 0.01), ("kube-proxy", 0.0004 * services)):
                run = Run(agent=agent, mode="nftables", feed="manifests", services=services, endpoints=2)  # type: ignore[arg-type]
                run.change_sync = seconds * drift
                run.added = [Seen(None, seconds * drift), Seen(None, seconds * drift * 1.1)]
                run.full_sync = 1.0
                run.latency = [1e-4, 2e-4]
                run.change_cpu = 0.002
                run.calls, run.counted_changes = Calls(2, 100, 6), 2
                found.append(run)
    return found


def test_ratios_are_of_neighbours() -> None:
    found = ratio(runs(), "nftables", 10_000, BY_NAME["change_sync"])
    assert found is not None
    # The machine was three times slower for the second pair, and that shows nowhere.
    assert found[:3] == pytest.approx((0.0025, 0.0025, 0.0025))
    assert found.figures == 2


def test_spread_is_over_all_figures_of_all_runs() -> None:
    found = spread(runs(), Case("miniproxy", "nftables", 100), BY_NAME["added"])
    assert found is not None
    assert found.figures == 4
    assert found[1:3] == pytest.approx((0.01, 0.033))
    assert spread(runs(), Case("miniproxy", "ipvs", 100), BY_NAME["added"]) is None


def test_slope_tells_what_grows() -> None:
    change = BY_NAME["change_sync"]
    assert slope(runs(), "miniproxy", "nftables", change) == pytest.approx(0.0)
    assert slope(runs(), "kube-proxy", "nftables", change) == pytest.approx(1.0)
    assert slope(runs()[:4], "kube-proxy", "nftables", change) is None


@pytest.fixture
def results() -> Results:
    machine = Machine(
        kernel="Linux",
        processor="some",
        cores=2,
        memory=2**33,
        python="CPython",
        tools={},
        load_before=0.0,
        began="now",
    )
    return Results(machine=machine, options={}, runs=runs())


def test_page_and_plots(results: Results, tmp_path: Path) -> None:
    written = report.write(results, tmp_path)
    names = {path.name for path in written}
    assert names == {"results.json", "README.md", "sync-time.svg", "first-packet.svg", "cpu-per-change.svg"}
    page = (tmp_path / "README.md").read_text()
    assert "| sync of one endpoint change | 20 ms (10 – 30) | 8 s (4 – 12) | **0.0025** (0.0025 – 0.0025) |" in page
    for name in names - {"results.json", "README.md"}:
        assert f"]({name})" in page
        drawn = (tmp_path / name).read_text()
        assert drawn.lstrip().startswith("<?xml")
        assert "services" in drawn


def test_the_tools_beside_ipvs_mode_are_said(results: Results) -> None:
    run = Run(agent="miniproxy", mode="ipvs", feed="manifests", services=5000, endpoints=2, full_sync=1.5)
    tools = Run(agent="tools", mode="ipvs", feed="", services=5000, endpoints=2, full_sync=10.0)
    results.runs += [tools, run]
    page = report.markdown(results)
    assert "take together 10 s for 5,000 services, to which miniproxy's full sync is as 0.15 to 1" in page


def test_a_failure_and_where_it_ran_are_said(results: Results) -> None:
    results.runs[0].failed = "it broke\nand more"
    results.runs[1].environment = "a box"
    page = report.markdown(results)
    assert "miniproxy, nftables, 100 services did not finish: it broke\n" in page
    assert "**measured in a box**" in page


def test_report_again_from_saved_results(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path / "results.json")
    done = CliRunner().invoke(group, ["bench", "--report", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "README.md").read_text() == report.markdown(
        results, ["sync-time.svg", "first-packet.svg", "cpu-per-change.svg"]
    )


def test_json(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path / "results.json")
    done = CliRunner().invoke(group, ["bench", "--report", "--json", "--output", str(tmp_path)])
    assert msgspec.json.decode(done.stdout.encode(), type=Results) == results


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modes", "ebtables"], "'ebtables' is none of iptables-nft, iptables-legacy, nftables, ipvs"),
        (["--agents", "cilium"], "'cilium' is none of miniproxy, kube-proxy"),
        (["--sizes", "many"], "'many' is not a list of numbers such as 100,1000"),
        (["--sizes", "0"], "numbers must be 1 or more"),
        (["--report", "--output", "/nonexistent"], "cannot read /nonexistent/results.json"),
    ],
)
def test_wrong_use_is_explained(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(group, ["bench", *arguments])
    assert done.exit_code != 0
    assert said in " ".join(done.output.split())


def test_tools_that_a_counting_run_needs() -> None:
    assert shutil.which("tee")
    assert shutil.which("bash")


@root
@pytest.mark.skipif(not python_iptables.available(), reason="python-iptables is not installed")
def test_python_iptables_writes_rules_that_work() -> None:
    argv = python_module("miniproxy.bench.python_iptables", "2", "2")
    with World() as world:
        eye = IptablesLegacy(world, endpoints=2)
        before = eye.stamp()
        assert world.start(NODE, argv, "writer.log").wait() == 0, world.log("writer.log")
        assert eye.stamp() != before
        saved = world.run(NODE, ["iptables-legacy-save", "-t", "nat"])
        # Two endpoints of one service, three of the other.
        assert saved.count("--to-destination") == 5
        assert saved.count("--dport 80") == 2
        told = json.loads(world.log("writer.log"))
        assert min(told.values()) > 0
        eye.close()
