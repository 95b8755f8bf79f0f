"""`miniproxy explain` on the golden objects: what it says is what really happened (golden/behaviour.tsv)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from miniproxy.cli.explain import command
from tests.golden_rules import GOLDEN

SOURCES = {"pod": "10.128.1.10", "outside": "203.0.113.7", "outside2": "198.51.100.7", "node": "node"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifests")
    for name in ("services.json", "endpointslices.json", "node.json"):
        shutil.copy(GOLDEN / name, folder / name)
    return folder


def explain(folder: Path, *arguments: str) -> Any:
    where = ["--source", str(folder), "--config", str(GOLDEN / "config.yaml")]
    return CliRunner().invoke(command, [*arguments, *where])


def rows(*services: str) -> Iterator[tuple[str, str, str]]:
    """(side, ADDRESS:PORT, outcome) of the IPv4 rows of these services."""
    for line in (GOLDEN / "behaviour.tsv").read_text().splitlines()[1:]:
        side, service, _, _, address, outcome = line.split("\t")
        if service.split(":")[0] in services and not address.startswith("fd"):
            yield side, address, outcome


@pytest.mark.parametrize(
    ("side", "address", "outcome"),
    list(rows("feat/itplbl", "feat/lbsrc", "feat/noep", "feat/nplocal0", "feat/termmix")),
)
def test_says_what_happens(folder: Path, side: str, address: str, outcome: str) -> None:
    done = explain(folder, address, "--from", SOURCES[side], "--json")
    assert done.exit_code == 0, done.output
    (connection,) = json.loads(done.output)["connections"]
    if outcome.startswith("to "):
        reached, source = outcome.removeprefix("to ").split(" from ")
        assert set(connection["reaches"]) == set(reached.split())
        assert connection["masqueraded"] == [source == "10.128.9.1"]
    else:
        assert list(connection["verdicts"]) == [{"refused": "refused", "silent": "dropped"}[outcome]]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("feat/hint", "10.180.13.2:8080 on n2 serves nothing here: topology hints keep its traffic in z2"),
        ("feat/notready", "10.180.17.1:8080 on n1 serves nothing here: is not ready"),
        ("feat/itp", "10.180.11.2:8080 on n2 serves nothing here: is on node n2, and the traffic policy is Local"),
        ("feat/noep", "refused: nobody serves this port anywhere"),
        ("feat/itp0", "has no local endpoints"),
        ("feat/aff", "affinity for 10800 s"),
    ],
)
def test_says_why(folder: Path, target: str, said: str) -> None:
    assert said in explain(folder, target).output


@pytest.mark.parametrize(
    ("target", "said", "code"),
    [
        ("feat/nosuch", "no Service feat/nosuch", 1),
        ("feat/headless", "headless", 1),
        ("10.97.0.3:81", "feat/np answers there, on 53/UDP, 80/TCP, 99/SCTP", 1),
        ("nonsense", "write NAMESPACE/NAME, ADDRESS:PORT", 2),
    ],
)
def test_says_what_it_cannot_explain(folder: Path, target: str, said: str, code: int) -> None:
    done = explain(folder, target)
    assert (done.exit_code, said in done.output) == (code, True), done.output


def test_names_the_problems_of_the_service(folder: Path, tmp_path: Path) -> None:
    mine = with_external_ip(folder, tmp_path / "manifests", "1.2.3.400", "cip")
    assert "spec.externalIPs[0]" in explain(mine, "feat/cip").output
    assert "spec.externalIPs[0]" not in explain(mine, "feat/np").output


def test_says_what_is_wrong_with_a_service_that_cannot_be_used_at_all(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "manifests"
    shutil.copytree(folder, mine)
    services = json.loads((mine / "services.json").read_text())
    (cip,) = (s for s in services["items"] if (s["metadata"]["namespace"], s["metadata"]["name"]) == ("feat", "cip"))
    cip["spec"] |= {"clusterIP": "10.97.0.300", "clusterIPs": ["10.97.0.300"]}
    (mine / "services.json").write_text(json.dumps(services))
    said = explain(mine, "feat/cip").output
    assert "spec.clusterIPs[0]: '10.97.0.300' is not an IP address" in said
    assert "headless" not in said
    (mine / "broken.yaml").write_text("a: [")
    assert "broken.yaml" in explain(mine, "feat/nosuch").output


def with_external_ip(folder: Path, mine: Path, ip: str, *names: str) -> Path:
    """A copy of the folder, at `mine`, in which these Services of the namespace feat have an external IP."""
    shutil.copytree(folder, mine)
    services = json.loads((mine / "services.json").read_text())
    for service in services["items"]:
        if service["metadata"]["namespace"] == "feat" and service["metadata"]["name"] in names:
            service["spec"]["externalIPs"] = [ip]
    (mine / "services.json").write_text(json.dumps(services))
    return mine


@pytest.mark.parametrize("others_first", [False, True])
def test_where_two_services_claim_an_address_it_follows_the_one_that_gets_it(
    folder: Path, tmp_path: Path, others_first: bool
) -> None:
    """Whichever the source names first (the kernel's side of it is in test_reconciler.py)."""
    mine = with_external_ip(folder, tmp_path / "manifests", "192.0.2.77", "cip", "np")
    if others_first:
        services = json.loads((mine / "services.json").read_text())
        services["items"].reverse()
        (mine / "services.json").write_text(json.dumps(services))
    told = json.loads(explain(mine, "192.0.2.77:80", "--json").output)
    assert {c["service"].split(":")[0] for c in told["connections"]} == {"feat/cip", "feat/np"}
    (own,) = json.loads(explain(mine, "10.97.0.1:80", "--json").output)["connections"]
    assert [c["reaches"] for c in told["connections"]] == [own["reaches"]] * 2
    assert own["service"].startswith("feat/cip")
    assert any("feat/cip" in problem for problem in told["problems"])


@pytest.mark.parametrize("mode", ["nftables", "ipvs"])
def test_other_modes_say_whose_rules_these_are(folder: Path, mode: str) -> None:
    done = explain(folder, "feat/noep", "--proxy-mode", mode)
    assert done.exit_code == 0, done.output
    assert f"decide the same as {mode} mode does" in done.output
    assert "decide the same" not in explain(folder, "feat/noep").output


@pytest.mark.parametrize(
    ("mode", "line"),
    [
        ("nftables", "      add element ip miniproxy endpoints { 10.98.1.1 . tcp . 80 . 20000 : 10.181.0.1 . 8080"),
        ("ipvs", "      -a -t 10.98.1.1:80 -r 10.181.0.1:8080 -m -w 1"),
    ],
)
def test_in_other_modes_their_own_words_stand_beside(folder: Path, mode: str, line: str) -> None:
    done = explain(folder, "dual/cip", "--all-rules", "--proxy-mode", mode)
    assert done.exit_code == 0, done.output
    assert any(each.startswith(line) for each in done.output.splitlines())
    assert "in the kernel, " not in explain(folder, "dual/cip", "--proxy-mode", mode).output
