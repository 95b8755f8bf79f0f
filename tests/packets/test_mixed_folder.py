"""Broken objects cost nobody else anything: the good ones of the same folder work, each broken one is named once."""

from __future__ import annotations

import json
from pathlib import Path

from tests.sources.broken import broken_objects

from . import behaviour
from .agent import command, golden_manifests, running
from .topology import echo_server, network, settle

LATER = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"namespace": "later", "name": "later"},
    "spec": {"clusterIP": "10.99.9.9", "clusterIPs": ["10.99.9.9"], "ports": [{"port": 80}]},
}


def test_good_objects_among_broken_ones(tmp_path: Path) -> None:
    broken = broken_objects()
    good = [*behaviour.items("services"), *behaviour.items("endpointslices")]
    assert len(broken) >= 20
    assert len(good) >= 50
    folder = golden_manifests(tmp_path / "manifests")
    for number, one in enumerate(broken):
        (folder / f"broken-{number}.json").write_text(json.dumps(one.object))
    rows = [row for row in behaviour.rows() if row.side == "pod"]
    log = tmp_path / "log"
    with (
        network(behaviour.all_endpoints()) as net,
        echo_server(net.pods, behaviour.endpoint_ports()),
        running(net, command(folder, "--iptables-variant", "nft"), log) as agent,
    ):

        def programmed(text: str) -> bool:
            agent.check()
            return text in "".join(net.iptables_save("nft"))

        # Both families hold something of the golden services once they have been synced.
        assert settle(lambda: programmed("feat/cip:http") and programmed("fd00:10:96::101"), 20), agent.tail()
        wrong = behaviour.wrong_rows(behaviour.probe(net, rows))
        assert not wrong, f"{len(wrong)} of {len(rows)} rows\n" + "\n".join(wrong)
        # A later change must not repeat what has been said.
        (folder / "later.json").write_text(json.dumps(LATER))
        assert settle(lambda: programmed("later/later"), 20), agent.tail()
    lines = log.read_text().splitlines()
    for one in broken:
        named = [line for line in lines if f" {one.ref}: " in line]
        assert len(named) == 1, f"{one.what}: {named}"
        assert f" {one.ref}: {one.field}: " in named[0], one.what
