"""DNS messages and the index of names, without sockets; hostile bytes among them."""

import dns.flags
import dns.message
import dns.rcode
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.network import dns as ours
from bulkhead.network.loop import Loop
from bulkhead.network.names import Names
from bulkhead.network.resolver import Asker, Resolver

WEB = {
    "network": "n1",
    "network_name": "app",
    "ipv4": "10.0.0.2",
    "ipv6": "fd00::2",
    "names": ["Web"],
}
DB = {"network": "n2", "network_name": "back", "ipv4": "10.1.0.2", "names": ["db"]}
ASKER = {"network": "n1", "network_name": "app", "ipv4": "10.0.0.3", "names": ["asker"]}


def _resolver() -> tuple[Resolver, Loop]:
    names = Names()
    names.put("web", [WEB])
    names.put("db", [DB])
    names.put("asker", [ASKER])
    loop = Loop()
    return Resolver(loop, names), loop


def _ask(message: bytes, workload: str = "asker", *, stream: bool = False) -> list[bytes]:
    resolver, loop = _resolver()
    got: list[bytes] = []
    try:
        asker = Asker(workload, None, None, forward=False)
        resolver.handle(asker, message, "10.0.0.3", got.append, stream=stream)
    finally:
        loop.close()
    return got


def _answer(name: str, kind: str = "A", workload: str = "asker") -> dns.message.Message:
    (got,) = _ask(dns.message.make_query(name, kind).to_wire(), workload)
    return dns.message.from_wire(got)


def _texts(message: dns.message.Message) -> list[str]:
    return [item.to_text() for rrset in message.answer for item in rrset]


def test_names_of_own_networks() -> None:
    for name in ("web.", "WEB.", "web.app."):
        assert _texts(_answer(name)) == ["10.0.0.2"]
    assert _texts(_answer("web.", "AAAA")) == ["fd00::2"]
    assert _texts(_answer("2.0.0.10.in-addr.arpa.", "PTR")) == ["web.app."]
    quiet = _answer("web.", "MX")
    assert (quiet.rcode(), quiet.answer) == (0, [])


def test_names_of_other_networks_are_unknown() -> None:
    for name, kind in (("db.", "A"), ("db.back.", "A"), ("2.0.1.10.in-addr.arpa.", "PTR")):
        assert _answer(name, kind).rcode() == dns.rcode.SERVFAIL
    assert _answer("web.", workload="db").rcode() == dns.rcode.SERVFAIL
    assert _answer("web.", workload="stranger").rcode() == dns.rcode.SERVFAIL


def test_dropped_workload_is_forgotten() -> None:
    names = Names()
    names.put("web", [WEB])
    names.put("two", [{**WEB, "ipv4": "10.0.0.9", "ipv6": ""}])
    names.drop("web")
    assert names.find(["n1"], "web") == ([bytes([10, 0, 0, 9])], [])
    names.drop("two")
    names.drop("two")
    assert names.find(["n1"], "web") is None
    assert names.reverse(["n1"], "10.0.0.2") is None


def test_links_are_names_for_one_alone() -> None:
    names = Names()
    identity = "ab" * 32
    names.put("web", [WEB])
    names.put(identity, [{**WEB, "names": ["db", identity[:12]], "ipv4": "10.0.0.5", "ipv6": ""}])
    links = ["DB:Store", f"{identity}:other", "web", "db:web"]
    names.put("asker", [{**WEB, "names": ["asker"], "request": {"links": links}}])
    db: tuple[list[bytes], list[bytes]] = ([bytes([10, 0, 0, 5])], [])
    for name in ("store", "other", "web", "db"):
        assert names.find(["n1"], name, "asker") == db
    assert names.find(["n1"], "store") is None
    assert names.find(["n1"], "store", "web") is None
    names.drop("asker")
    assert names.find(["n1"], "store", "asker") is None


def test_many_addresses_are_truncated_for_datagrams_only() -> None:
    names = Names()
    for number in range(100):
        names.put(str(number), [{**WEB, "ipv4": f"10.0.1.{number}"}])
    loop = Loop()
    try:
        resolver = Resolver(loop, names)
        got: list[bytes] = []
        message = dns.message.make_query("web.", "A", use_edns=False).to_wire()
        for stream in (False, True):
            resolver.handle(Asker("1", None, None), message, "", got.append, stream=stream)
    finally:
        loop.close()
    short = dns.message.from_wire(got[0])
    assert len(got[0]) <= 512
    assert short.flags & dns.flags.TC
    assert len(_texts(dns.message.from_wire(got[1]))) == 100


def test_what_is_not_a_plain_question() -> None:
    query = dns.message.make_query("web.", "A")
    response = dns.message.make_response(query).to_wire()
    assert _ask(response) == []
    assert _ask(b"") == []
    update = bytearray(query.to_wire())
    update[2] |= 5 << 3
    assert _ask(bytes(update))[0][3] & 15 == ours.NOTIMP
    loop_name = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1"
    assert _ask(loop_name)[0][3] & 15 == ours.FORMERR
    long = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0" + (b"\x3f" + b"a" * 63) * 5 + b"\0\0\1\0\1"
    assert _ask(long)[0][3] & 15 == ours.FORMERR


@given(st.binary(max_size=600))
def test_hostile_bytes_get_one_small_answer_or_none(message: bytes) -> None:
    for stream in (False, True):
        got = _ask(message, stream=stream)
        assert len(got) <= 1
        assert all(len(one) <= len(message) + 64 for one in got)


@given(st.binary(max_size=300), st.integers(0, 65535))
def test_hostile_tails_after_a_valid_header(tail: bytes, flags: int) -> None:
    head = b"\x12\x34" + flags.to_bytes(2, "big") + b"\0\1\0\0\0\0\0\1"
    for one in _ask(head + tail):
        assert one[:2] == b"\x12\x34"
        assert one[2] & 0x80


@given(st.binary(max_size=200))
def test_foreign_responses_do_not_fit(response: bytes) -> None:
    query = ours.parse_query(dns.message.make_query("web.", "A").to_wire())
    if ours.fits(response, query, 0x1234):
        assert response[:2] == b"\x12\x34"
