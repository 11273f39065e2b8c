"""Bridges, published ports and namespaces on a host of their own."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from bulkhead.errors import Conflict, Denied, Invalid, NotFound
from bulkhead.linux import nftables as nft
from bulkhead.linux import rtnetlink as rt
from bulkhead.network import host
from bulkhead.network.manager import NetworkManager
from tests.helpers.network_lab import (
    HOST4,
    OUTSIDE4,
    EndpointRequest,
    Lab,
    ask,
    cannot_reach,
    in_lab,
    udp_ask,
    udp_echo,
    udp_insist,
)
from tests.helpers.waiting import until

PUBLISH = {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}


def _nothing_of_ours() -> bool:
    with rt.connect() as route, nft.connect() as netlink:
        links = [one.name for one in rt.links(route) if one.name.startswith("bh")]
        tables = [one.name for one in nft.tables(netlink)]
    return not links and not tables


def _bury(killed: NetworkManager) -> None:
    """Close what a killed engine's process would have lost; nothing else."""
    killed._lobby.close(lambda _: None)
    killed._bridges.route.close()
    killed._bridges.filter.close()
    killed._link.close()


@in_lab
def test_default_bridge_nat_to_outside(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.serve_outside(7000)
        one = lab.run("one")
        assert one.ask(OUTSIDE4, 7000) == f"outside {HOST4}"
        assert one.attachment.hostname == one.id[:12]
        assert f"{one.address()}\t{one.id[:12]}" in one.attachment.hosts


@in_lab
def test_waiting_namespace_is_used_and_works(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.serve_outside(7000)
        first = lab.run("first")
        lab.settle()
        second = lab.run("second")
        assert second.ask(OUTSIDE4, 7000) == f"outside {HOST4}"
        second.serve(81)
        assert first.ask(second.address(), 81) == f"second {first.address()}"


@in_lab
def test_nothing_remains_after_the_last(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        before = host.read(host.FORWARD4)
        host.write(host.FORWARD4, "0")
        one = lab.run("one", ports=PUBLISH)
        assert host.read(host.FORWARD4) == "1"
        lab.stop(one)
        lab.settle()
        until(_nothing_of_ours, "bridge and table are gone")
        assert host.read(host.FORWARD4) == "0"
        assert os.listdir(lab.home.in_run("network", "workloads")) == []
        assert before in {"0", "1"}


@in_lab
def test_published_port_from_everywhere(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        web = lab.run("web", ports=PUBLISH)
        web.serve(80)
        lab.start_helper()
        gateway = web.settings["Networks"]["bridge"]["Gateway"]
        assert ask("127.0.0.1", 8080) == f"web {gateway}"
        assert ask(HOST4, 8080).startswith("web ")
        assert ask("::1", 8080) == f"web {gateway}"
        assert lab.inside_outside(lambda: ask(HOST4, 8080)) == f"web {OUTSIDE4}"
        # Hairpin: by the host's address from beside, and to itself. Whether the source is the
        # gateway depends on br_netfilter, which redirects such packets without routing them.
        other = lab.run("other")
        assert other.ask(HOST4, 8080).startswith("web ")
        assert web.ask(HOST4, 8080).startswith("web ")
        assert web.settings["Ports"]["80/tcp"] == [
            {"HostIp": "0.0.0.0", "HostPort": "8080"},
            {"HostIp": "::", "HostPort": "8080"},
        ]


@in_lab
def test_published_on_loopback_only(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        web = lab.run("web", ports={"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]})
        web.serve(80)
        assert ask("127.0.0.1", 8080).startswith("web ")
        assert cannot_reach(HOST4, 8080)
        assert lab.inside_outside(lambda: cannot_reach(HOST4, 8080))


@in_lab
def test_published_udp(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        web = lab.run("web", ports={"53/udp": [{"HostIp": "", "HostPort": "5300"}]})
        lab.start_helper()
        with udp_echo(web, 53):
            assert udp_ask("127.0.0.1", 5300, "a") == "echo a"
            assert udp_ask("::1", 5300, "b") == "echo b"
            assert lab.inside_outside(lambda: udp_ask(HOST4, 5300, "c")) == "echo c"


@in_lab
def test_occupied_port_is_a_conflict_and_leaves_nothing(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab, socket.socket() as other:
        other.bind(("127.0.0.1", 8080))
        other.listen()
        with pytest.raises(Conflict, match="port is already allocated"):
            lab.run("web", ports=PUBLISH)
        lab.settle()
        until(_nothing_of_ours, "bridge and table are gone")
    assert not lab.workloads


@in_lab
def test_port_of_another_workload(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        first = lab.run("first", ports=PUBLISH)
        lab.start_helper()
        with pytest.raises(Conflict, match=r"Bind for 0\.0\.0\.0:8080 failed: port is already"):
            lab.run("second", ports=PUBLISH)
        # The helper is not waited for, but it still holds the port at first.
        for name in ("third", "fourth", "fifth"):
            lab.stop(first)
            first = lab.run(name, ports=PUBLISH)
            first.serve(80)
            assert ask("::1", 8080).startswith(name)


@in_lab
def test_held_port_leads_elsewhere_at_once(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        web = lab.run("web", ports=PUBLISH)
        web.serve(80, "eighty")
        web.serve(81, "eighty-one")
        lab.start_helper()
        lab.manager.publish(web.id, {"81/tcp": PUBLISH["80/tcp"]})
        assert ask("127.0.0.1", 8080).startswith("eighty-one ")
        lab.sync()
        assert ask("::1", 8080).startswith("eighty-one ")
        assert set(web.settings["Ports"]) == {"81/tcp"}
        # Given up and taken again, without waiting for the helper.
        lab.manager.publish(web.id, {})
        lab.manager.publish(web.id, PUBLISH)
        assert ask("127.0.0.1", 8080).startswith("eighty ")
        lab.sync()
        assert ask("::1", 8080).startswith("eighty ")


@in_lab
def test_free_ports_and_ranges(tmp_path: Path) -> None:
    wanted = {
        "80/tcp": [{"HostIp": "", "HostPort": ""}],
        "81/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9000-9010"}],
        "82/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9000-9010"}],
    }
    with Lab(tmp_path) as lab:
        web = lab.run("web", ports=wanted)
        shown = web.settings["Ports"]
        assert len({one["HostPort"] for one in shown["80/tcp"]}) == 1
        assert [shown[port][0]["HostPort"] for port in ("81/tcp", "82/tcp")] == ["9000", "9001"]
        with pytest.raises(Invalid, match="SCTP"):
            lab.run("other", ports={"80/sctp": [{"HostIp": "", "HostPort": "1"}]})


@in_lab
def test_publish_replaced_live(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        web = lab.run("web", ports=PUBLISH)
        web.serve(80)
        lab.start_helper()
        wanted = {"80/tcp": [{"HostIp": "", "HostPort": "8081"}]}
        lab.manager.publish(web.id, wanted)
        lab.sync()
        assert ask("127.0.0.1", 8081).startswith("web ")
        assert ask("::1", 8081).startswith("web ")
        assert cannot_reach("127.0.0.1", 8080)
        lab.manager.publish(web.id, {})
        lab.sync()
        assert cannot_reach("127.0.0.1", 8081)
        assert web.settings["Ports"] == {}


@in_lab
def test_user_defined_with_static_addresses_and_ipv6(tmp_path: Path) -> None:
    config = [{"Subnet": "10.77.0.0/24", "Gateway": "10.77.0.9"}, {"Subnet": "fd77::/64"}]
    with Lab(tmp_path) as lab:
        lab.network("app", EnableIPv6=True, IPAM={"Config": config})
        asked = EndpointRequest(ipv4="10.77.0.50", ipv6="fd77::50", mac="02:11:22:33:44:55")
        one = lab.run("one", "app", endpoints={"app": asked})
        two = lab.run("two", "app")
        shown = one.settings["Networks"]["app"]
        assert (shown["IPAddress"], shown["Gateway"]) == ("10.77.0.50", "10.77.0.9")
        assert (shown["GlobalIPv6Address"], shown["MacAddress"]) == ("fd77::50", asked.mac)
        one.serve(80, family=socket.AF_INET6)
        assert two.ask("fd77::50", 80) == f"one {two.address6('app')}"
        assert two.ask("10.77.0.50", 80) == f"one ::ffff:{two.address('app')}"
        with pytest.raises(Conflict, match="Address already in use"):
            lab.run("three", "app", endpoints={"app": asked})
        with pytest.raises(Denied, match="active endpoints"):
            lab.manager.remove("app")


@in_lab
def test_connect_and_disconnect_live(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("back")
        one, two = lab.run("one"), lab.run("two", "back")
        two.serve(80)
        assert one.cannot_reach(two.address("back"), 80)
        lab.manager.connect(one.id, "back", EndpointRequest())
        assert one.ask(two.address("back"), 80) == f"two {one.address('back')}"
        assert lab.manager.files(one.id)[1].startswith("nameserver 127.0.0.11")
        lab.manager.disconnect(one.id, "bridge")
        assert set(one.settings["Networks"]) == {"back"}
        lab.serve_outside(7000)
        assert one.ask(OUTSIDE4, 7000) == f"outside {HOST4}"
        lab.manager.disconnect(one.id, "back")
        assert one.cannot_reach(two.address("back"), 80)


@in_lab
def test_modes_none_host_container(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        first = lab.run("first")
        first.serve(80)
        shared = lab.run("shared", f"container:{first.id}")
        assert shared.ask("127.0.0.1", 80).startswith("first ")
        assert shared.attachment.hosts == first.attachment.hosts
        alone = lab.run("alone", "none")
        assert alone.cannot_reach(first.address(), 80)
        assert alone.inside(lambda: sorted(os.listdir("/proc/self/net"))) is not None
        on_host = lab.run("on-host", "host")
        assert on_host.attachment.netns_path is None
        assert on_host.ask(first.address(), 80).startswith("first ")
        with pytest.raises(Conflict, match="non running container"):
            lab.run("lost", "container:" + "f" * 64)
        with pytest.raises(NotFound):
            lab.run("lost", "nowhere")


@in_lab
def test_next_engine_takes_over(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("app")
        web = lab.run("web", "app", ports=PUBLISH)
        gone = lab.run("gone", "app")
        web.serve(80)
        lab.start_helper()
        address = web.address("app")
        # The first engine is killed: nothing of it is closed in order.
        killed = lab.manager
        gone.process.kill()
        gone.process.wait()
        _bury(killed)
        lab.manager = NetworkManager(lab.home, lab.documents)
        lab.manager.reconcile({web.id: (web.request, web.process.pid)})
        assert web.address("app") == address
        assert ask("127.0.0.1", 8080).startswith("web ")
        assert ask("::1", 8080).startswith("web ")
        assert gone.id not in lab.manager.inspect("app")["Containers"]
        second = lab.run("second", "app")
        assert second.address("app") != address
        assert second.ask(address, 80).startswith("web ")


@in_lab
def test_leftovers_of_a_killed_engine_are_removed(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("app")
        one = lab.run("one", "app", ports=PUBLISH)
        killed = lab.manager
        one.process.kill()
        one.process.wait()
        one.netns.close()
        _bury(killed)
        lab.manager = NetworkManager(lab.home, lab.documents)
        lab.manager.reconcile({})
        until(_nothing_of_ours, "bridge and table are gone")


@in_lab
def test_beside_docker(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab, nft.connect() as netlink:
        batch = nft.Batch(nft.IPV4, "filter")
        batch.add_table()
        batch.add_chain("DOCKER-USER")
        batch.add_base_chain("FORWARD", "filter", "forward", 0)
        batch.add_rule("FORWARD", [nft.jump("DOCKER-USER")])
        batch.add_rule("FORWARD", [nft.verdict(nft.DROP)])
        batch.commit(netlink)
        lab.serve_outside(7000)
        one = lab.run("one")
        assert one.ask(OUTSIDE4, 7000) == f"outside {HOST4}"
        assert len(nft.rules(netlink, nft.IPV4, "filter", "DOCKER-USER")) == 2
        lab.stop(one)
        lab.settle()
        assert nft.rules(netlink, nft.IPV4, "filter", "DOCKER-USER") == []


@in_lab
def test_firewall_that_drops_governs_ours(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab, nft.connect() as netlink:
        batch = nft.Batch(nft.INET, "strict")
        batch.add_table()
        batch.add_base_chain("forward", "filter", "forward", 0)
        batch.add_rule("forward", [nft.verdict(nft.DROP)])
        batch.commit(netlink)
        lab.serve_outside(7000)
        assert lab.run("one").cannot_reach(OUTSIDE4, 7000)


@in_lab
def test_subnet_avoids_host_routes(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        shown = lab.run("one").settings["Networks"]["bridge"]["IPAddress"]
        lab.settle()
        network = lab.network("app")
        config = lab.manager.inspect(network)["IPAM"]["Config"][0]
        assert config["Subnet"].split(".")[:2] != shown.split(".")[:2]


@in_lab
def test_udp_client_follows_a_port_to_its_next_workload(tmp_path: Path) -> None:
    wanted = {"53/udp": [{"HostIp": "", "HostPort": "5300"}]}
    with Lab(tmp_path) as lab, contextlib.ExitStack() as services:
        client = lab.inside_outside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        local = services.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        services.enter_context(client)
        client.connect((HOST4, 5300))
        local.connect(("127.0.0.1", 5300))
        both = (client, local)
        # Nobody is there yet: the kernel remembers these questions as not to be redirected.
        lab.run("any")
        for one in both:
            one.send(b"early")
        first = lab.run("first", ports=wanted)
        services.enter_context(udp_echo(first, 53, "first"))
        assert [udp_insist(one) for one in both] == ["first", "first"]
        address = first.address()
        lab.stop(first)
        second = lab.run("second", ports=wanted)
        assert second.address() != address
        services.enter_context(udp_echo(second, 53, "second"))
        assert [udp_insist(one) for one in both] == ["second", "second"]
        # Published elsewhere, while it runs.
        services.enter_context(udp_echo(second, 54, "other"))
        moved = {"54/udp": [{"HostIp": "", "HostPort": "5300"}]}
        lab.manager.publish(second.id, moved)
        assert [udp_insist(one) for one in both] == ["other", "other"]
        # By another network of the same workload.
        lab.network("app")
        lab.manager.connect(second.id, "app", EndpointRequest())
        lab.manager.disconnect(second.id, "bridge")
        assert [udp_insist(one) for one in both] == ["other", "other"]
