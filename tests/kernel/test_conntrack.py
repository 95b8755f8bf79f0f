"""Conntrack against the real kernel: flows made with conntrack(8), looked at and deleted over netlink."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from miniproxy.flows import Flow, Stale
from miniproxy.model import Endpoint, Family
from tests.packets.topology import Namespace

VIP = {Family.V4: ("10.96.0.10", "10.96.0.11"), Family.V6: ("fd00:96::10", "fd00:96::11")}
ENDPOINT = {Family.V4: ("10.1.0.1", "10.1.0.2"), Family.V6: ("fd00:1::1", "fd00:1::2")}
CLIENT = {Family.V4: "10.2.0.7", Family.V6: "fd00:2::7"}


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace.create() as namespace:
        yield namespace


def fill(namespace: Namespace, family: Family, ports: tuple[int, ...] = (53, 54)) -> set[Flow]:
    """A UDP flow from one client to every address, port and endpoint."""
    made = set()
    client = CLIENT[family]
    for number, (vip, port, endpoint) in enumerate(itertools.product(VIP[family], ports, ENDPOINT[family])):
        argv = ["conntrack", "-I", "-p", "udp", "-t", "600", "-s", client, "-d", vip, "-r", endpoint, "-q", client]
        argv += ["--sport", str(4000 + number), "--dport", str(port)]
        argv += ["--reply-port-src", "53", "--reply-port-dst", str(4000 + number)]
        namespace.run(*argv)
        made.add(Flow(family, "UDP", vip, port, answer(endpoint)))
    return made


def answer(ip: str) -> str:
    return str(Endpoint(ip, 53))


def call(namespace: Namespace, expression: str) -> Any:
    """Evaluate an expression on kernel.conntrack inside the namespace; what it gives must be JSON."""
    modules = ("kernel.conntrack", "flows", "model")
    names = "".join(f"from miniproxy.{module} import *\n" for module in modules)
    return json.loads(namespace.run(sys.executable, "-c", f"import json\n{names}print(json.dumps({expression}))"))


def flows(namespace: Namespace, family: Family) -> set[Flow]:
    return {Flow(Family(f[0]), *f[1:]) for f in call(namespace, f"list(flows(Family({int(family)})))")}


def forget(namespace: Namespace, *stale: Stale) -> int:
    plain = [(int(s.family), *s[1:4], sorted(s.living)) for s in stale]
    made = f"[Stale(Family(s[0]), *s[1:4], frozenset(s[4])) for s in {plain}]"
    found: int = call(namespace, f"forget({made})")
    return found


@pytest.mark.parametrize("family", Family)
def test_lists_what_is_there(namespace: Namespace, family: Family) -> None:
    assert flows(namespace, family) == set()
    made = fill(namespace, family)
    fill(namespace, Family.V6 if family is Family.V4 else Family.V4)
    assert flows(namespace, family) == made


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("living", [(), (0,), (0, 1)])
def test_forgets_what_none_of_the_living_answers(namespace: Namespace, family: Family, living: tuple[int, ...]) -> None:
    made = fill(namespace, family)
    answers = frozenset(answer(ENDPOINT[family][n]) for n in living)
    to = VIP[family][1]
    gone = {f for f in made if (f.destination, f.port) == (to, 53) and f.endpoint not in answers}
    assert forget(namespace, Stale(family, "UDP", to, 53, answers)) == len(gone) == 2 - len(living)
    assert flows(namespace, family) == made - gone


def test_forgetting_what_is_not_there(namespace: Namespace) -> None:
    made = fill(namespace, Family.V4)
    nobody = [
        Stale(Family.V4, "SCTP", "10.96.0.10", 53, frozenset()),
        Stale(Family.V4, "UDP", "10.96.0.9", 53, frozenset()),
    ]
    assert forget(namespace, *nobody) == 0
    assert flows(namespace, Family.V4) == made


def test_of_two_words_about_one_place_the_last_counts(namespace: Namespace) -> None:
    made = fill(namespace, Family.V4)
    to, answers = VIP[Family.V4][0], [answer(ip) for ip in ENDPOINT[Family.V4]]
    older = Stale(Family.V4, "UDP", to, 53, frozenset(answers[:1]))
    assert forget(namespace, older, older._replace(living=frozenset(answers))) == 0
    assert flows(namespace, Family.V4) == made


def test_many_ports_at_once(namespace: Namespace) -> None:
    made = fill(namespace, Family.V4, tuple(range(1000, 1010)))
    to = VIP[Family.V4][0]
    assert forget(namespace, *(Stale(Family.V4, "UDP", to, port, frozenset()) for port in range(1000, 1009))) == 18
    assert flows(namespace, Family.V4) == {f for f in made if f.destination != to or f.port == 1009}


def test_many_flows(namespace: Namespace) -> None:
    """More than one netlink message can carry."""
    made = fill(namespace, Family.V4, tuple(range(1000, 1060)))
    assert flows(namespace, Family.V4) == made
