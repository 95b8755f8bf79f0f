"""The tracer predicts what real connections did under the same rules (golden/behaviour.tsv), and says why."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniproxy.model import Family
from miniproxy.trace import Outcome, Packet, Rules, Target, TraceError, Verdict, _words, parse, trace

from .golden_rules import golden, without_nfacct
from .packets import behaviour
from .packets.behaviour import Row
from .packets.topology import NODE, PODS_GATEWAY

RULES = {
    Family.V4: parse(without_nfacct(golden("iptables-save.txt"))),
    Family.V6: parse(without_nfacct(golden("ip6tables-save.txt"))),
}
# n1's addresses: on its uplink, and its sides of the links to pods, client and outside
LOCAL = (*NODE, *PODS_GATEWAY, "10.128.1.1", "fd00:128:1::1", "203.0.113.1", "fd00:203::1")
INTERFACES = {"pod": "client", "node": "", "outside": "outside", "outside2": "outside"}
WORDS = {Verdict.DROPPED: "silent", Verdict.REFUSED: "refused", Verdict.UNTOUCHED: "silent"}


def outcome(row: Row) -> Outcome:
    family = Family.of(row.address)
    source = row.source or NODE[family is Family.V6]
    packet = Packet(source, row.address, row.protocol, row.port, INTERFACES[row.side])
    return trace(RULES[family], packet, LOCAL)


def predict(row: Row) -> str:
    """The outcome in the words of behaviour.tsv, with all endpoints that are possible."""
    found = outcome(row)
    endpoints = " ".join(sorted(f"{target.ip}:{target.port}" for target in found.endpoints))
    gateway = PODS_GATEWAY[":" in row.address]
    sources = " ".join(sorted({gateway if hidden else found.packet.source for hidden in found.masqueraded}))
    parts = [f"to {endpoints} from {sources}"] if endpoints else []
    return " & ".join(parts + sorted({WORDS[verdict] for verdict in found.verdicts if verdict in WORDS}))


def right(row: Row) -> bool:
    if row.service not in behaviour.affine_services():
        return predict(row) == row.outcome
    want, got = (behaviour.Outcome.parse(text) for text in (row.outcome, predict(row)))
    return want.endpoints <= got.endpoints and want.sources == got.sources and want.failures == got.failures


def test_every_golden_row_is_predicted() -> None:
    rows = behaviour.rows()
    wrong = [f"{row}\n  want {row.outcome}\n  got  {predict(row)}" for row in rows if not right(row)]
    assert not wrong, f"{len(wrong)} of {len(rows)} rows\n" + "\n".join(wrong)


def row(text: str) -> Row:
    """The golden row that prints as `text`."""
    return next(row for row in behaviour.rows() if str(row) == text)


def test_endpoints_are_equally_likely() -> None:
    found = outcome(row("pod feat/cip:http vip TCP 10.97.0.1:80"))
    assert {str(target): round(p, 6) for target, p in found.endpoints.items()} == {
        f"10.180.0.{i}:8080": round(1 / 3, 6) for i in (1, 2, 3)
    }
    assert found.masqueraded == {False}


def test_probabilities_add_up() -> None:
    for golden_row in behaviour.rows():
        assert sum(outcome(golden_row).verdicts.values()) == pytest.approx(1)


def test_steps_explain_a_drop() -> None:
    [branch] = outcome(row("pod feat/lbsrc:http lb TCP 192.0.2.18:80")).branches
    assert [step.place for step in branch.steps] == [
        "nat PREROUTING",
        "nat KUBE-SERVICES",
        "nat KUBE-FW-4CF5SCBHRVGALFEH",
        "filter FORWARD",
        "filter KUBE-PROXY-FIREWALL",
    ]
    assert branch.steps[-1].why == "destination 192.0.2.18 is in 192.0.2.18/32, protocol tcp, port 80 is 80"
    assert "will be dropped by KUBE-PROXY-FIREWALL" in branch.steps[2].rule


def test_affinity_is_noted_as_a_possibility() -> None:
    found = outcome(row("pod feat/aff:http vip TCP 10.97.0.13:80"))
    assert set(map(str, found.endpoints)) == {"10.180.10.1:8080", "10.180.10.2:8080"}
    for branch in found.branches:
        noted = [step for step in branch.steps if not step.taken]
        assert len(noted) == 2
        assert "remembered in KUBE-SEP-CHVAVGPQ3HXXG42X in the last 10800 s" in noted[0].why


def test_a_pod_that_reaches_itself_is_masqueraded() -> None:
    packet = Packet("10.180.0.1", "10.97.0.1", "TCP", 80, "pods")
    hidden = {str(branch.endpoint): branch.masqueraded for branch in trace(RULES[Family.V4], packet, LOCAL).branches}
    assert hidden == {"10.180.0.1:8080": True, "10.180.0.2:8080": False, "10.180.0.3:8080": False}


HEAD = """*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:HERE - [0:0]
"""
PACKET = Packet("10.0.0.1", "10.0.0.2", "TCP", 80, "eth0")


def rules(*lines: str, policy: str = "ACCEPT", table_filter: tuple[str, ...] = ()) -> Rules:
    filter_text = f"*filter\n:INPUT ACCEPT [0:0]\n:FORWARD {policy} [0:0]\n:OUTPUT ACCEPT [0:0]\n"
    return parse(HEAD + "\n".join([*lines, "COMMIT", ""]) + filter_text + "\n".join([*table_filter, "COMMIT", ""]))


@pytest.mark.parametrize(
    "rule",
    [
        "-A PREROUTING -p tcp -m multiport --dports 80,81 -j DROP",
        "-A PREROUTING -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT",
        "-A PREROUTING -m conntrack --ctorigsrc 10.0.0.2/32 -j ACCEPT",
        "-A PREROUTING -m statistic --mode nth --every 2 --packet 0 -j ACCEPT",
        "-A PREROUTING -p tcp -m tcp --sport 53 -j ACCEPT",
        "-A PREROUTING -m addrtype --dst-type BROADCAST -j ACCEPT",
        "-A PREROUTING -o eth1 -j ACCEPT",
        "-A PREROUTING -m recent --update --name x --rsource -j ACCEPT",
        "-A PREROUTING -j TPROXY --on-port 1 --on-ip 0.0.0.0",
        "-A PREROUTING -j MARK --set-mark-from-the-future 1",
        "-A PREROUTING -p tcp -j DNAT --to-destination 10.0.0.3-10.0.0.9:80",
    ],
)
def test_what_is_not_known_is_an_error_that_names_the_rule(rule: str) -> None:
    with pytest.raises(TraceError) as error:
        trace(rules(rule), PACKET, ())
    assert rule.removeprefix("-A PREROUTING ") in str(error.value)
    assert "nat PREROUTING" in str(error.value)


def test_what_is_not_known_does_not_matter_where_another_match_fails() -> None:
    unreached = "-A PREROUTING -m multiport --dports 80,81 -d 10.9.9.9/32 -j DROP"
    assert trace(rules(unreached), PACKET, ()).verdicts == {Verdict.UNTOUCHED: 1}


def test_policy_and_rules_of_filter_decide_after_nat() -> None:
    dnat = "-A PREROUTING -d 10.0.0.2/32 -p tcp -j DNAT --to-destination 10.0.0.3:8080"
    assert trace(rules(dnat), PACKET, ()).endpoints == {Target("10.0.0.3", 8080): 1}
    assert trace(rules(dnat, policy="DROP"), PACKET, ()).verdicts == {Verdict.DROPPED: 1}
    accept = ("-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT",)
    assert trace(rules(dnat, policy="DROP", table_filter=accept), PACKET, ()).verdicts == {Verdict.ENDPOINT: 1}
    # An endpoint on the node itself does not pass FORWARD.
    assert trace(rules(dnat, policy="DROP"), PACKET, ("10.0.0.0/29",)).verdicts == {Verdict.ENDPOINT: 1}


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        ("-i eth0", True),
        ("-i eth+", True),
        ("-i cni+", False),
        ("! -i cni+", True),
        ("-s 10.0.0.0/24 ! -d 10.0.0.2/32", False),
        ("-p tcp -m tcp --dport 79:81", True),
        ("-p tcp -m tcp ! --dport 80", False),
        ("-p udp -m udp --dport 80", False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", False),
        ("-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT", True),
        ("-m conntrack --ctorigdst 10.0.0.2/32", True),
        ("-m conntrack --ctorigdst 10.0.0.9/32", False),
        ("-m mark --mark 0x1/0x1", False),
        ("-m mark ! --mark 0x1/0x1", True),
    ],
)
def test_matches(rule: str, taken: bool) -> None:
    found = trace(rules(table_filter=(f"-A FORWARD {rule} -j DROP",)), PACKET, ())
    assert (Verdict.DROPPED in found.verdicts) is taken


def test_a_return_goes_on_after_the_jump() -> None:
    found = trace(
        rules(
            "-A PREROUTING -j HERE",
            "-A PREROUTING -p tcp -j DNAT --to-destination 10.0.0.3:1",
            "-A HERE -p tcp -j RETURN",
            "-A HERE -p tcp -j DNAT --to-destination 10.0.0.4:1",
        ),
        PACKET,
        (),
    )
    assert found.endpoints == {Target("10.0.0.3", 1): 1}


def test_a_goto_does_not_come_back() -> None:
    lines = ("-A PREROUTING -g HERE", "-A PREROUTING -p tcp -j DNAT --to-destination 10.0.0.3:1")
    assert trace(rules(*lines), PACKET, ()).verdicts == {Verdict.UNTOUCHED: 1}


def test_counters_in_the_text_do_not_matter() -> None:
    text = HEAD + "[12:34] -A PREROUTING -p tcp -j DNAT --to-destination 10.0.0.3:1\nCOMMIT\n"
    assert trace(parse(text), PACKET, ()).endpoints == {Target("10.0.0.3", 1): 1}


@pytest.mark.parametrize("text", ["*nat\n-A NOWHERE -j ACCEPT\n", "*nat\n:X\n", '*nat\n:X - [0:0]\n-A X -d "\n'])
def test_text_that_is_not_iptables_save_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(TraceError, match=r"line [23] is not iptables-save output"):
        parse(text)


@given(st.text("a-\"\\' !", max_size=12))
def test_words_are_the_shells(text: str) -> None:
    try:
        wanted = shlex.split(text)
    except ValueError:
        with pytest.raises(ValueError, match="No "):
            _words(text)
    else:
        assert _words(text) == wanted
