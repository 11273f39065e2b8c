"""What a hostile workload tries on the network, and must not reach."""

import os
import socket
from collections.abc import Callable
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.netlink import NetlinkError
from bulkhead.network import host
from tests.helpers.network_lab import HOST4, OUTSIDE4, Lab, Workload, cannot_reach, in_lab


def _with_route(workload: Workload, prefix: str, gateway: str, work: Callable[[], bool]) -> bool:
    """Do something in a namespace that has been given one more route, as root in it could."""

    def inside() -> bool:
        with rt.connect() as route:
            index = rt.link(route, "eth0").index
            route.transact([rt.add_route(index=index, gateway=gateway, prefix=IPv4Network(prefix))])
        return work()

    return workload.inside(inside)


@in_lab
def test_host_loopback_is_out_of_reach(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab, socket.socket() as secret:
        secret.bind(("127.0.0.1", 6000))
        secret.listen()
        # A published port switches route_localnet on, which is what makes the attack possible.
        one = lab.run("one", ports={"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]})
        link = next(n for n in os.listdir("/proc/sys/net/ipv4/conf") if n.startswith("bh0"))
        assert host.read(f"ipv4/conf/{link}/route_localnet") == "1"
        gateway = one.settings["Networks"]["bridge"]["Gateway"]

        def attack() -> bool:
            # Own loopback out of the way: 127.0.0.1 is then sent to the host.
            host.write("ipv4/conf/all/route_localnet", "1")
            with rt.connect() as route:
                try:
                    route.transact([rt.delete_address(1, IPv4Interface("127.0.0.1/8"))])
                except NetlinkError:
                    return False
            return _with_route_here(gateway)

        assert one.inside(attack)


def _with_route_here(gateway: str) -> bool:
    with rt.connect() as route:
        index = rt.link(route, "eth0").index
        route.transact(
            [rt.add_route(index=index, gateway=gateway, prefix=IPv4Network("127.0.0.0/8"))]
        )
    return all(cannot_reach("127.0.0.1", port) for port in (6000, 8080))


@in_lab
def test_bridges_are_closed_to_each_other(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("other")
        one, two = lab.run("one"), lab.run("two", "other")
        two.serve(80)
        assert one.cannot_reach(two.address("other"), 80)


@in_lab
def test_internal_network_stays_inside(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.serve_outside(7000)
        lab.network("closed", Internal=True)
        lab.run("open")
        one, two = lab.run("one", "closed"), lab.run("two", "closed")
        two.serve(80)
        assert one.ask(two.address("closed"), 80).startswith("two ")
        gateway = lab.manager.inspect("closed")["IPAM"]["Config"][0]["Gateway"]
        assert one.cannot_reach(OUTSIDE4, 7000)
        assert _with_route(one, "198.51.100.0/24", gateway, lambda: cannot_reach(OUTSIDE4, 7000))


@in_lab
def test_no_communication_between_containers(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.serve_outside(7000)
        lab.network("quiet", Options={"com.docker.network.bridge.enable_icc": "false"})
        one, two = lab.run("one", "quiet"), lab.run("two", "quiet")
        two.serve(80)
        assert one.cannot_reach(two.address("quiet"), 80)
        assert one.ask(OUTSIDE4, 7000) == f"outside {HOST4}"


@in_lab
def test_foreign_source_address_is_dropped(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        one = lab.run("one")
        with lab.inside_outside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as far:
            far.bind((OUTSIDE4, 7000))
            far.settimeout(1.5)

            def send(source: str) -> None:
                with rt.connect() as route:
                    route.transact([rt.add_address(1, IPv4Interface(f"{source}/32"))])
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                    made.bind((source, 0))
                    made.sendto(source.encode(), (OUTSIDE4, 7000))

            one.inside(lambda: send("203.0.113.7"))
            one.inside(lambda: send(one.address()))
            assert far.recv(100) == one.address().encode()


@in_lab
def test_unpublished_port_from_outside(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        one = lab.run("one")
        one.serve(80)

        def attack() -> bool:
            with rt.connect() as route:
                index = rt.link(route, "out0").index
                prefix = IPv4Network(f"{one.address()}/32")
                route.transact([rt.add_route(index=index, gateway=HOST4, prefix=prefix)])
            return cannot_reach(one.address(), 80)

        assert lab.inside_outside(attack)
