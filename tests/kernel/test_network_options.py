"""Options of networks and their effect, on a host of its own."""

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Network
from pathlib import Path

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rrset
import pytest

from bulkhead.errors import Invalid, Unavailable, Unsupported
from bulkhead.linux import netns
from bulkhead.linux import rtnetlink as rt
from bulkhead.network import host
from tests.helpers.network_lab import (
    HOST4,
    HOST6,
    OUTSIDE4,
    OUTSIDE6,
    EndpointRequest,
    Lab,
    Workload,
    ask,
    cannot_reach,
    in_lab,
    listen_on,
    udp_ask,
    udp_echo,
)

PUBLISH = {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}
BRIDGE = "com.docker.network.bridge."
PATIENCE_S = 30.0


def _mtu(workload: Workload) -> int:
    with netns.inside(workload.netns.fileno(), rt.connect) as route:
        return rt.link(route, "eth0").mtu


@in_lab
def test_ipv6_of_our_own_choice_and_router_advertisements(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("six", EnableIPv6=True)
        uplink = "ipv6/conf/up0/accept_ra"
        host.write(uplink, "1")
        host.write(host.FORWARD6, "0")
        lab.serve(lab.inside_outside(lambda: listen_on(7000, socket.AF_INET6)), "outside")
        config = lab.manager.inspect("six")["IPAM"]["Config"]
        ours = IPv6Network(config[1]["Subnet"])
        assert ours.prefixlen == 64 and ours.subnet_of(IPv6Network("fd00::/8"))
        one = lab.run("one", "six")
        assert one.ask(OUTSIDE6, 7000) == f"outside {HOST6}"
        # Who forwards takes no default route from advertisements, unless this is 2.
        assert (host.read(host.FORWARD6), host.read(uplink)) == ("1", "2")
        lab.stop(one)
        lab.settle()
        assert (host.read(host.FORWARD6), host.read(uplink)) == ("0", "1")


@in_lab
def test_settings_somebody_else_changed_stay(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        host.write(host.FORWARD4, "0")
        one = lab.run("one")
        host.write(host.FORWARD4, "0")
        host.write("ipv4/conf/up0/forwarding", "1")
        lab.stop(one)
        lab.settle()
        assert host.read(host.FORWARD4) == "0"
        assert host.read("ipv4/conf/up0/forwarding") == "1"


@in_lab
def test_mtu_as_asked_for_and_as_the_uplink_has_it(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab, rt.connect() as route:
        lab.network("small", Options={"com.docker.network.driver.mtu": "1400"})
        route.transact([rt.set_link(name="up0", mtu=1380)])
        assert _mtu(lab.run("one", "small")) == 1400
        assert _mtu(lab.run("two")) == 1380
        links = {one.name: one for one in rt.links(route)}
        assert {one.mtu for one in links.values() if one.kind == "bridge"} == {1400, 1380}
        with pytest.raises(Invalid, match="not an MTU"):
            lab.network("bad", Options={"com.docker.network.driver.mtu": "12"})


@in_lab
def test_routed_network_is_reached_by_its_own_addresses(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.serve_outside(7000)
        lab.network("open", Options={f"{BRIDGE}gateway_mode_ipv4": "routed"})
        web, closed = lab.run("web", "open"), lab.run("closed")
        for one in (web, closed):
            one.serve(80)
        with netns.inside(lab.outside.fileno(), rt.connect) as far:
            index = rt.link(far, "out0").index
            route = rt.add_route(index=index, gateway=HOST4, prefix=IPv4Network("10.208.0.0/12"))
            far.transact([route])
        assert lab.inside_outside(lambda: ask(web.address("open"), 80)) == f"web {OUTSIDE4}"
        assert lab.inside_outside(lambda: cannot_reach(closed.address(), 80))
        assert web.ask(OUTSIDE4, 7000) == f"outside {web.address('open')}"
        with pytest.raises(Unsupported, match="use nat or routed"):
            lab.network("bad", Options={f"{BRIDGE}gateway_mode_ipv4": "isolated"})


@in_lab
def test_without_masquerade_and_with_a_chosen_source(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab, rt.connect() as route:
        lab.serve_outside(7000)
        index = rt.link(route, "up0").index
        route.transact([rt.add_address(index, IPv4Interface("198.51.100.9/24"))])
        lab.network("plain", Options={f"{BRIDGE}enable_ip_masquerade": "false"})
        lab.network("from9", Options={"com.docker.network.host_ipv4": "198.51.100.9"})
        plain, from9 = lab.run("plain", "plain"), lab.run("from9", "from9")
        assert from9.ask(OUTSIDE4, 7000) == "outside 198.51.100.9"
        with netns.inside(lab.outside.fileno(), rt.connect) as far:
            back = rt.link(far, "out0").index
            prefix = IPv4Network("10.208.0.0/12")
            far.transact([rt.add_route(index=back, gateway=HOST4, prefix=prefix)])
        assert plain.ask(OUTSIDE4, 7000) == f"outside {plain.address('plain')}"


@in_lab
def test_ports_are_bound_where_the_network_says(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("home", Options={f"{BRIDGE}host_binding_ipv4": "127.0.0.1"})
        web = lab.run("web", "home", ports=PUBLISH)
        web.serve(80)
        assert web.settings["Ports"] == {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]}
        assert ask("127.0.0.1", 8080).startswith("web ")
        assert lab.inside_outside(lambda: cannot_reach(HOST4, 8080))


@in_lab
def test_list_filters_and_prune(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("one", Labels={"kind": "a"})
        lab.network("two", Labels={"kind": "b"})
        three = lab.network("three")
        lab.run("user", "two")

        def names(**filters: list[str]) -> list[str]:
            return sorted(one["Name"] for one in lab.manager.list(filters))

        assert names() == ["bridge", "host", "none", "one", "three", "two"]
        assert names(type=["custom"]) == ["one", "three", "two"]
        assert names(type=["builtin"]) == ["bridge", "host", "none"]
        assert names(driver=["bridge"]) == ["bridge", "one", "three", "two"]
        assert names(label=["kind"]) == ["one", "two"]
        assert names(label=["kind=b"]) == ["two"]
        assert names(name=["wo"]) == ["two"]
        assert names(id=[three[:12]]) == ["three"]
        assert names(dangling=["true"]) == ["one", "three"]
        assert "two" in names(dangling=["false"])
        assert lab.manager.prune({"label": ["kind"]}) == ["one"]
        assert lab.manager.prune() == ["three"]
        assert names(type=["custom"]) == ["two"]


@in_lab
def test_range_of_addresses(tmp_path: Path) -> None:
    config = {
        "Subnet": "10.77.0.0/24",
        "Gateway": "10.77.0.1",
        "IPRange": "10.77.0.128/30",
        "AuxiliaryAddresses": {"router": "10.77.0.129"},
    }
    with Lab(tmp_path) as lab:
        lab.network("app", IPAM={"Config": [config]})
        given = [lab.run(f"w{n}", "app").address("app") for n in range(3)]
        assert given == ["10.77.0.128", "10.77.0.130", "10.77.0.131"]
        with pytest.raises(Unavailable, match="no available IPv4 addresses"):
            lab.run("late", "app")
        # One of the subnet beside the range may be asked for.
        asked = {"app": EndpointRequest(ipv4="10.77.0.7")}
        other = lab.run("other", "app", endpoints=asked)
        lab.workloads[0].serve(80)
        assert other.ask("10.77.0.128", 80) == "w0 10.77.0.7"
        lab.stop(lab.workloads[0])
        assert lab.run("next", "app").address("app") == "10.77.0.128"


@pytest.mark.parametrize("filtered", ["0", "1"])
@in_lab
def test_published_port_of_a_network_without_communication(tmp_path: Path, filtered: str) -> None:
    with Lab(tmp_path) as lab:
        with contextlib.suppress(FileNotFoundError):
            for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
                host.write(f"bridge/{name}", filtered)
        lab.network("apart", Options={f"{BRIDGE}enable_icc": "false"})
        web = lab.run("web", "apart", ports=PUBLISH)
        web.serve(80)
        lab.start_helper()
        beside, elsewhere = lab.run("beside", "apart"), lab.run("elsewhere")
        assert beside.cannot_reach(web.address("apart"), 80)
        for one in (beside, elsewhere):
            assert one.ask(HOST4, 8080).startswith("web ")
            assert one.cannot_reach(web.address("apart"), 80)
        assert ask("127.0.0.1", 8080).startswith("web ")
        assert lab.inside_outside(lambda: ask(HOST4, 8080)) == f"web {OUTSIDE4}"


@in_lab
def test_end_of_the_one_whose_network_was_joined(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("app")
        subnet = lab.manager.inspect("app")["IPAM"]["Config"][0]["Subnet"]
        address = str(IPv4Address(int(IPv4Network(subnet).network_address) + 7))
        asked = {"app": EndpointRequest(ipv4=address)}
        first = lab.run("first", "app", endpoints=asked)
        shared = lab.run("shared", f"container:{first.id}")
        shared.serve(80, "stale")
        client = lab.run("client", "app")
        assert client.ask(address, 80).startswith("stale ")
        assert shared.settings["Networks"] == {}
        lab.stop(first)
        assert client.cannot_reach(address, 80)
        second = lab.run("second", "app", endpoints=asked)
        second.serve(80)
        assert client.ask(address, 80).startswith("second ")
        with pytest.raises(Invalid, match="conflicting options"):
            lab.run("bad", f"container:{second.id}", ports=PUBLISH)


@in_lab
def test_ports_are_held_again_after_a_crash_of_the_helper(tmp_path: Path) -> None:
    wanted = {**PUBLISH, "53/udp": [{"HostIp": "", "HostPort": "5300"}]}
    with Lab(tmp_path) as lab:
        web = lab.run("web", ports=wanted)
        web.serve(80)
        lab.start_helper()
        with udp_echo(web, 53):
            assert ask("::1", 8080).startswith("web ")
            lab.stop_helper()
            lab.start_helper()
            assert ask("::1", 8080).startswith("web ")
            assert udp_ask("::1", 5300, "a") == "echo a"
            for kind, port in ((socket.SOCK_STREAM, 8080), (socket.SOCK_DGRAM, 5300)):
                with socket.socket(socket.AF_INET, kind) as other, pytest.raises(OSError):
                    other.bind(("0.0.0.0", port))


# -- name servers


@contextlib.contextmanager
def _name_server(sockets: Callable[[], tuple[socket.socket, socket.socket]]) -> Iterator[list[str]]:
    """A server that knows every A record as 192.0.2.1; what it was asked."""
    udp, tcp = sockets()
    asked: list[str] = []
    ending = threading.Event()

    def answer(data: bytes) -> bytes:
        query = dns.message.from_wire(data)
        question = query.question[0]
        asked.append(question.name.to_text())
        made = dns.message.make_response(query)
        made.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", "192.0.2.1"))
        return made.to_wire()

    def serve_udp() -> None:
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                data, source = udp.recvfrom(4096)
                udp.sendto(answer(data), source)

    def serve_tcp() -> None:
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                peer, _ = tcp.accept()
                with peer:
                    peer.settimeout(PATIENCE_S)
                    data = peer.recv(4096)
                    while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
                        data += peer.recv(4096)
                    made = answer(data[2:])
                    peer.sendall(len(made).to_bytes(2, "big") + made)

    for one in (udp, tcp):
        one.settimeout(0.1)
    threads = [threading.Thread(target=one) for one in (serve_udp, serve_tcp)]
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        ending.set()
        for thread in threads:
            thread.join()
        udp.close()
        tcp.close()


def _sockets(address: str) -> tuple[socket.socket, socket.socket]:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, 53))
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tcp.bind((address, 53))
    tcp.listen()
    return udp, tcp


def _resolve(workload: Workload, name: str, *, tcp: bool = False) -> str:
    query = dns.message.make_query(name, "A")
    send = dns.query.tcp if tcp else dns.query.udp
    answer = workload.inside(lambda: send(query, "127.0.0.11", timeout=PATIENCE_S))
    if answer.rcode():
        return dns.rcode.to_text(answer.rcode())
    return str(answer.answer[0][0].to_text())


@in_lab
def test_servers_on_the_hosts_loopback_are_asked_for_workloads(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab, _name_server(lambda: _sockets("127.0.0.1")) as asked:
        one = lab.run("one", dns=("127.0.0.1",))
        assert one.attachment.resolv_conf.startswith("nameserver 127.0.0.11\n")
        lab.start_helper()
        assert _resolve(one, "first.example.") == "192.0.2.1"
        assert _resolve(one, "second.example.", tcp=True) == "192.0.2.1"
        assert asked == ["first.example.", "second.example."]


@in_lab
def test_servers_are_asked_one_after_the_other(tmp_path: Path) -> None:
    def outside() -> tuple[socket.socket, socket.socket]:
        return lab.inside_outside(lambda: _sockets(OUTSIDE4))

    with Lab(tmp_path) as lab, _name_server(outside) as asked:
        lab.network("app")
        lab.network("closed", Internal=True)
        # Nobody listens at the first.
        servers = ("127.0.0.1", OUTSIDE4)
        one, two = lab.run("one", "app", dns=servers), lab.run("two", "closed", dns=servers)
        lab.start_helper()
        assert _resolve(one, "far.example.") == "192.0.2.1"
        assert _resolve(one, "one.") == one.address("app")
        assert _resolve(two, "far.example.") == "SERVFAIL"
        assert asked == ["far.example."]


# -- doctor


def _nft(*words: str) -> None:
    subprocess.run(["nft", *words], check=True)


@in_lab
def test_doctor_names_what_stands_in_the_way_and_its_remedy_helps(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        found = {one.check: one for one in lab.manager.doctor()}
        for check in ("bridges, cables and nftables", "firewall", "connection tracking"):
            assert found[f"network: {check}"].status == "ok", found
        _nft("add", "table", "inet", "strict")
        hook = "{ type filter hook forward priority 0; policy drop; }"
        _nft("add", "chain", "inet", "strict", "forward", hook)
        lab.serve_outside(7000)
        one = lab.run("one", ports=PUBLISH)
        one.serve(80)
        assert one.cannot_reach(OUTSIDE4, 7000)
        (warned,) = [one for one in lab.manager.doctor() if one.check == "network: firewall"]
        assert warned.status == "warn" and "inet strict forward" in warned.detail
        subprocess.run(["sh", "-e", "-c", warned.remedy], check=True)
        assert one.ask(OUTSIDE4, 7000) == f"outside {HOST4}"
        assert lab.inside_outside(lambda: ask(HOST4, 8080)) == f"one {OUTSIDE4}"
