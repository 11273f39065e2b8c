"""DHCP: what a machine is told, and that nothing else is answered."""

import struct
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from bulkhead.network import dhcp

MAC = "02:42:0a:00:00:05"
LEASE = dhcp.Lease(
    mac=MAC,
    address="10.0.0.5/16",
    server="169.254.53.53",
    routes=[("169.254.53.53/32", ""), ("0.0.0.0/0", "10.0.0.1")],
    nameservers=["169.254.53.53", "fd00::1"],
    hostname="web",
    mtu=1400,
)


def ask(kind: int, *, mac: str = MAC, current: str = "0.0.0.0", **options: bytes) -> bytes:
    header = struct.pack(
        "!BBBBIHH4s4s4s4s16s64s128s", 1, 1, 6, 0, 77, 0, 0, IPv4Address(current).packed, b"", b"",
        b"", bytes.fromhex(mac.replace(":", "")), b"", b"",
    )  # fmt: skip
    told = bytes([53, 1, kind])
    for name, data in options.items():
        told += bytes([int(name.removeprefix("o")), len(data)]) + data
    return header + b"\x63\x82\x53\x63" + told + b"\xff"


def told(reply: bytes | None) -> dict[int, bytes]:
    assert reply is not None
    assert reply[236:240] == b"\x63\x82\x53\x63"
    assert struct.unpack_from("!I", reply, 4) == (77,)
    return dhcp._options(reply[240:])


def test_it_is_offered_its_own_address() -> None:
    reply = dhcp.answer(ask(1), LEASE)
    options = told(reply)
    assert reply is not None
    assert reply[16:20] == IPv4Address("10.0.0.5").packed
    assert options[53] == b"\2"
    assert options[1] == IPv4Address("255.255.0.0").packed
    assert options[3] == IPv4Address("10.0.0.1").packed
    assert options[6] == IPv4Address("169.254.53.53").packed
    assert options[12] == b"web"
    assert options[26] == struct.pack("!H", 1400)
    assert options[51] == b"\xff" * 4
    on_link = bytes([32, 169, 254, 53, 53, 0, 0, 0, 0])
    assert options[121] == on_link + bytes([0, 10, 0, 0, 1])


def test_a_request_for_it_is_granted_and_others_are_not() -> None:
    own, other = IPv4Address("10.0.0.5").packed, IPv4Address("10.0.0.6").packed
    assert told(dhcp.answer(ask(3, o50=own), LEASE))[53] == b"\5"
    assert told(dhcp.answer(ask(3, current="10.0.0.5"), LEASE))[53] == b"\5"
    refused = dhcp.answer(ask(3, o50=other), LEASE)
    assert told(refused)[53] == b"\6"
    assert refused is not None
    assert refused[16:20] == b"\0" * 4
    assert dhcp.answer(ask(3, o50=own, o54=other), LEASE) is None


def test_others_are_not_answered() -> None:
    assert dhcp.answer(ask(1, mac="02:00:00:00:00:01"), LEASE) is None
    assert dhcp.answer(ask(4), LEASE) is None
    assert dhcp.answer(b"", LEASE) is None


@given(st.binary(max_size=600))
def test_garbage_is_survived(data: bytes) -> None:
    dhcp.answer(data, LEASE)
    dhcp.answer(ask(1)[:240] + data, LEASE)
