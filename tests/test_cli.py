"""The command line: help that comes at once, errors in whole lines, kube-proxy's flags as they are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from miniproxy import __version__
from miniproxy.cli import COMMANDS, group
from miniproxy.cli.options import SettingsCommand, settings_options
from miniproxy.config import Loaded
from miniproxy.config_schema import FLAGS
from tests.golden_rules import GOLDEN

HEAVY = ("kubernetes", "pyroute2", "yaml", "rich", "prometheus_client", "msgspec", "logging", "asyncio")
KUBEADM = Path(__file__).parent / "configs" / "kubeadm.yaml"


def miniproxy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "miniproxy", *arguments], capture_output=True, text=True, check=False)


@click.command(cls=SettingsCommand)
@click.argument("words", nargs=-1)
@click.option("--own", is_flag=True, help="Of the command itself.")
@settings_options
def probe(loaded: Loaded, words: tuple[str, ...], own: bool) -> None:
    """A command like any with settings."""
    s = loaded.settings
    click.echo(json.dumps([s.mode, s.masquerade_all, s.ipvs_strict_arp, s.verbosity, s.source, list(words), own]))


def run_probe(*arguments: str) -> list[object]:
    result = CliRunner().invoke(probe, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    answer: list[object] = json.loads(result.output)
    return answer


# Help


def test_help_names_every_command() -> None:
    done = miniproxy("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert line in done.stdout
        assert len(line) < 80


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(argument: str) -> None:
    code = (
        "import sys\nfrom miniproxy.cli import main\n"
        f"sys.argv = ['miniproxy', {argument!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('imported:', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.rpartition("imported: ")[2].split()
    assert "click" in imported
    assert [name for name in HEAVY if name in imported] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(group, [name, "--help"], prog_name="miniproxy")
    assert result.exit_code == 0, result.output
    assert f"miniproxy {name}" in result.output.partition("Example")[2], "an example of its use"


def test_version() -> None:
    assert miniproxy("--version").stdout == f"miniproxy {__version__}\n"


def test_help_of_settings_shows_groups_and_hides_what_has_no_effect() -> None:
    output = CliRunner().invoke(probe, ["--help"]).output
    headings = [line for line in output.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[0] == "Options:"
    assert len(headings) >= 6
    for flag in FLAGS:
        assert (f"--{flag.name} " in output) is not bool(flag.ignored), flag.name


# Flags as kube-proxy's are written


def test_booleans_stand_alone_or_take_a_value_behind_an_equals_sign() -> None:
    assert run_probe("--masquerade-all", "--ipvs-strict-arp=true", "--proxy-mode=ipvs")[:3] == ["ipvs", True, True]
    assert run_probe("--masquerade-all=false", "--own")[1:2] == [False]


def test_verbosity_has_a_short_form() -> None:
    assert [run_probe("-v", "4")[3], run_probe("--v=5")[3], run_probe("-v6")[3]] == [4, 5, 6]


def test_the_command_line_of_kubeadms_daemonset() -> None:
    assert run_probe(f"--config={KUBEADM}", "--hostname-override=node-1")[0] == "iptables"


def test_a_commands_own_arguments_reach_it() -> None:
    assert run_probe("--source", "folder", "--own", "a", "b")[4:] == ["folder", ["a", "b"], True]


# Errors


def test_wrong_flags_are_all_named_and_end_with_2() -> None:
    done = miniproxy("config", "show", "--proxy-mode=userspace", "--iptables-masquerade-bit=40")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        'miniproxy: --proxy-mode: "userspace" is none of iptables, ipvs, nftables (blank means "iptables")',
        "miniproxy: --iptables-masquerade-bit: 40 is not a bit number from 0 to 31",
    ]


def test_an_unknown_command_or_flag_ends_with_2() -> None:
    unknown = miniproxy("rum")
    assert (unknown.returncode, "No such command 'rum'" in unknown.stderr) == (2, True)
    unknown = miniproxy("config", "show", "--proxy-mod=ipvs")
    assert (unknown.returncode, "--proxy-mode" in unknown.stderr) == (2, True)


# config check and config show


def test_check_of_a_good_file() -> None:
    done = miniproxy("config", "check", str(KUBEADM))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{KUBEADM}: good\n", "")


def test_check_of_a_bad_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(KUBEADM.read_text().replace("masqueradeBit: null", "masqueradeBit: 99"))
    done = miniproxy("config", "check", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"miniproxy: {file}:{line}: {section}.masqueradeBit: 99 is not a bit number from 0 to 31"
        for line, section in ((30, "iptables"), (55, "nftables"))
    ]
    as_json = miniproxy("config", "check", "--json", str(file))
    assert as_json.returncode == 1
    assert (json.loads(as_json.stdout)["ok"], len(json.loads(as_json.stdout)["problems"])) == (False, 2)


def test_check_prints_warnings_and_succeeds(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(KUBEADM.read_text().replace("enableDSR: false", "enableDSR: true"))
    done = miniproxy("config", "check", str(file))
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"warning: {file}:63: winkernel.enableDSR: has no effect: it is for Windows",
        f"{file}: good (1 warning)",
    ]


def test_show_as_table_and_as_json() -> None:
    arguments = ("config", "show", "--config", str(KUBEADM), "--hostname-override=n1", "--conntrack-max-per-core=0")
    rows = {line.split()[0]: line.split(None, 1)[1] for line in miniproxy(*arguments).stdout.splitlines()}
    assert rows["node_name"].split() == ["n1", "--hostname-override"]
    assert rows["cluster_cidrs"].split() == ["10.244.0.0/16", f"{KUBEADM}:10", "clusterCIDR"]
    assert rows["conntrack_max_per_core"].split() == ["left", "alone", "--conntrack-max-per-core"]
    assert rows["sync_period"].split() == ["30s", "default"]
    shown = json.loads(miniproxy(*arguments, "--json").stdout)
    assert shown["settings"]["cluster_cidrs"] == ["10.244.0.0/16"]
    assert shown["settings"]["conntrack_max_per_core"] is None
    assert shown["origins"]["cluster_cidrs"] == {"kind": "file", "where": f"{KUBEADM}:10", "field": "clusterCIDR"}
    assert set(shown["settings"]) == set(shown["origins"]) == set(rows)


@pytest.mark.parametrize("command", [["plan"], ["explain", "default/web"], ["doctor"]])
def test_a_source_that_is_not_there_is_named_and_not_waited_for(command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(group, [*command, "--source", str(tmp_path / "nothing")])
    assert done.exit_code == 1
    assert f"{tmp_path}/nothing is no folder, and no file" in done.output


def test_a_saved_cluster_is_looked_at_without_one(tmp_path: Path) -> None:
    """As `kubectl get nodes,services,endpointslices -A -o json` prints it."""
    kinds = [json.loads((GOLDEN / f"{kind}.json").read_text()) for kind in ("services", "endpointslices")]
    names = {"ServiceList": ("v1", "Service"), "EndpointSliceList": ("discovery.k8s.io/v1", "EndpointSlice")}
    things = [
        {"apiVersion": names[found["kind"]][0], "kind": names[found["kind"]][1], **item}
        for found in kinds
        for item in found["items"]
    ]
    dump = tmp_path / "cluster.json"
    dump.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": things}))
    done = CliRunner().invoke(group, ["explain", "feat/cip", "--source", str(dump), "--hostname-override", "n1"])
    assert done.exit_code == 0, done.output
    assert "reaches " in done.output
