"""Guests' networks: a namespace behind a tap plays the guest, its frames carried by a thread."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import pytest

from bulkhead.errors import Unsupported
from bulkhead.network import host
from bulkhead.network.model import EndpointRequest
from bulkhead.network.tap import RESOLVER, GuestNic, guest_taps
from tests.helpers.guest_nic import FakeGuest, fake_guest
from tests.helpers.network_lab import (
    HOST4,
    OUTSIDE4,
    Lab,
    Workload,
    ask,
    cannot_reach,
    in_lab,
    listen_on,
)

PUBLISH = {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _taps() -> None:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun cannot be opened here")


@contextlib.contextmanager
def _guest(
    lab: Lab, name: str, mode: str = "bridge", **more: Any
) -> Iterator[tuple[Workload, FakeGuest, list[GuestNic]]]:
    workload = lab.run(name, mode, guest=True, **more)
    nics = guest_taps(f"/proc/self/fd/{workload.netns.fileno()}")
    with fake_guest(nics) as guest:
        yield workload, guest, nics


def _resolve(guest: FakeGuest, name: str, *, tcp: bool = False) -> list[str]:
    query = dns.message.make_query(name, "A")
    send = dns.query.tcp if tcp else dns.query.udp
    answer = guest.inside(lambda: send(query, RESOLVER, timeout=PATIENCE_S))
    return sorted(item.to_text() for rrset in answer.answer for item in rrset)


@in_lab
def test_guest_has_the_addresses_of_its_workload(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.serve_outside(7000)
        other = lab.run("other")
        other.serve(81)
        with _guest(lab, "vm", ports=PUBLISH) as (vm, guest, (nic,)):
            shown = vm.settings["Networks"]["bridge"]
            assert nic.mac == shown["MacAddress"]
            assert nic.addresses == (f"{shown['IPAddress']}/{shown['IPPrefixLen']}",)
            assert [one.gateway for one in nic.routes] == ["", shown["Gateway"]]
            assert (nic.name, nic.mtu) == ("eth0", 1500)
            assert guest.inside(lambda: ask(OUTSIDE4, 7000)) == f"outside {HOST4}"
            assert guest.inside(lambda: ask(other.address(), 81)) == f"other {vm.address()}"
            lab.serve(guest.inside(lambda: listen_on(80)), "vm")
            assert other.ask(vm.address(), 80) == f"vm {other.address()}"
            assert ask("127.0.0.1", 8080) == f"vm {shown['Gateway']}"
            assert lab.inside_outside(lambda: ask(HOST4, 8080)) == f"vm {OUTSIDE4}"
            assert guest.inside(lambda: ask(HOST4, 8080)).startswith("vm ")
            # What remains in the namespace itself is on no network.
            assert vm.cannot_reach(OUTSIDE4, 7000)


@in_lab
def test_guest_with_large_transfers(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        text = "x" * 3_000_000
        lab.serve_outside(7000, text)
        with _guest(lab, "vm") as (_, guest, _nics):
            assert guest.inside(lambda: ask(OUTSIDE4, 7000)) == f"{text} {HOST4}"


@in_lab
def test_guest_asks_names_beside_it(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("app", Internal=True)
        web = lab.run("web", "app")
        with (
            _guest(lab, "vm", "app") as (vm, guest, (nic,)),
            _guest(lab, "vm2", "app") as (vm2, guest2, _),
        ):
            lab.start_helper()
            assert vm.attachment.resolv_conf.startswith(f"nameserver {nic.nameserver}\n")
            assert _resolve(guest, "web.") == [web.address("app")]
            assert _resolve(guest, "web.", tcp=True) == [web.address("app")]
            assert _resolve(guest, "vm2.") == [vm2.address("app")]
            assert _resolve(guest2, "vm.") == [vm.address("app")]
            # The next helper opens the same sockets.
            lab.stop_helper()
            lab.start_helper()
            assert _resolve(guest, "web.") == [web.address("app")]
            assert _resolve(guest, "web.", tcp=True) == [web.address("app")]


@in_lab
def test_neighbour_cannot_be_the_resolver(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("app")
        evil = lab.run("evil", "app")
        evil.serve(80)
        with _guest(lab, "vm", "app") as (vm, guest, (nic,)), _packets(evil) as wire:
            guest.inside(lambda: host.write("ipv4/neigh/eth0/locktime", "0"))
            # No helper runs: nobody listens at the address, but it is there.
            assert guest.inside(lambda: cannot_reach(RESOLVER, 54))
            before = guest.inside(lambda: _neighbour(RESOLVER))
            own = bytes.fromhex(evil.settings["Networks"]["app"]["MacAddress"].replace(":", ""))
            guest_mac = bytes.fromhex(nic.mac.replace(":", ""))
            lie = struct.pack(
                "!6s6sHHHBBH6s4s6s4s", guest_mac, own, 0x0806, 1, 0x0800, 6, 4, 2,
                own, socket.inet_aton(RESOLVER), guest_mac, socket.inet_aton(vm.address("app")),
            )  # fmt: skip
            wire.send(lie)
            # This goes the same way, after it.
            assert guest.inside(lambda: ask(evil.address("app"), 80)).startswith("evil ")
            assert guest.inside(lambda: _neighbour(RESOLVER)) == before != ""
            seen = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    seen.append(wire.recv(2048, socket.MSG_DONTWAIT))
            asked = {frame[38:42] for frame in seen if frame[12:14] == b"\x08\x06"}
            assert socket.inet_aton(evil.address("app")) in asked
            assert socket.inet_aton(RESOLVER) not in asked


def _neighbour(address: str) -> str:
    """The MAC address at which the calling thread's namespace knows a neighbour, "" if not."""
    with open("/proc/thread-self/net/arp", encoding="ascii") as file:
        for line in file:
            fields = line.split()
            if fields[0] == address:
                return fields[3]
    return ""


def _packets(workload: Workload) -> socket.socket:
    """A socket for all frames on a workload's interface; packet(7)."""

    def work() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind(("eth0", 0))
        return made

    return workload.inside(work)


@in_lab
def test_guest_on_several_networks(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("one")
        lab.network("two", EnableIPv6=True)
        web = lab.run("web", "two")
        web.serve(80, family=socket.AF_INET6)
        endpoints = {"two": EndpointRequest()}
        with _guest(lab, "vm", "one", endpoints=endpoints) as (vm, guest, nics):
            assert [nic.name for nic in nics] == ["eth0", "eth1"]
            assert nics[1].addresses[1].split("/")[0] == vm.address6("two")
            here = vm.address6("two")
            assert guest.inside(lambda: ask(web.address6("two"), 80)) == f"web {here}"
            assert guest.inside(lambda: ask(web.address("two"), 80)).startswith("web ")


@in_lab
def test_guest_on_ipv6_only(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("six", EnableIPv4=False, EnableIPv6=True)
        web = lab.run("web", "six")
        web.serve(80, family=socket.AF_INET6)
        with _guest(lab, "vm", "six") as (vm, guest, _nics):
            lab.start_helper()
            answer = f"web {vm.address6('six')}"
            assert guest.inside(lambda: ask(web.address6("six"), 80)) == answer
            query = dns.message.make_query("web.", "AAAA")
            found = guest.inside(lambda: dns.query.udp(query, RESOLVER, timeout=PATIENCE_S))
            assert found.answer[0][0].to_text() == web.address6("six")


@in_lab
def test_modes_of_guests(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        plain = lab.run("plain")
        alone = lab.run("alone", "none", guest=True)
        assert guest_taps(f"/proc/self/fd/{alone.netns.fileno()}") == []
        vm = lab.run("vm", guest=True)
        lab.network("app")
        with pytest.raises(Unsupported, match="network mode host"):
            lab.run("bad", "host", guest=True)
        with pytest.raises(Unsupported, match="from inside of it only"):
            lab.run("bad", f"container:{plain.id}", guest=True)
        with pytest.raises(Unsupported, match="from inside of it only"):
            lab.run("bad", f"container:{vm.id}")
