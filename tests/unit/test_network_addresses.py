"""Address pools, network bodies, port wishes and generated files."""

from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest

from bulkhead.errors import Conflict, Invalid, Unavailable, Unsupported
from bulkhead.network import files, ipam, ports, records


def test_pool_gives_each_once_and_the_oldest_again() -> None:
    pool = ipam.Pool(IPv4Network("10.0.0.0/29"))
    assert str(pool.gateway) == "10.0.0.1"
    keeper = pool.take()
    taken = [pool.take() for _ in range(4)]
    assert [str(one) for one in taken] == [f"10.0.0.{n}" for n in range(3, 7)]
    with pytest.raises(Unavailable):
        pool.take()
    pool.give(taken[2])
    pool.give(taken[0])
    assert [pool.take(), pool.take()] == [taken[2], taken[0]]
    assert str(keeper) == "10.0.0.2"


def test_pool_claims() -> None:
    pool = ipam.Pool(IPv4Network("10.0.0.0/24"), auxiliary=[IPv4Address("10.0.0.7")])
    pool.claim(IPv4Address("10.0.0.9"))
    for taken in ("10.0.0.9", "10.0.0.1", "10.0.0.7", "10.0.0.0", "10.0.0.255"):
        with pytest.raises(Conflict):
            pool.claim(IPv4Address(taken))
    with pytest.raises(Invalid):
        pool.claim(IPv4Address("10.0.1.9"))


def test_pool_range_and_gateway() -> None:
    pool = ipam.Pool(
        IPv4Network("10.0.0.0/16"),
        gateway=IPv4Address("10.0.0.254"),
        within=IPv4Network("10.0.5.0/24"),
    )
    assert str(pool.take()) == "10.0.5.0"
    with pytest.raises(Invalid):
        ipam.Pool(IPv4Network("10.0.0.0/24"), gateway=IPv4Address("10.9.0.1"))


def test_chosen_subnets_avoid_what_is_busy() -> None:
    busy: list[ipam.Prefix] = [IPv4Network("10.208.0.0/13"), IPv6Network("fd00::/8")]
    chosen = ipam.choose(ipam.ipv4_candidates(default=True, start=3), busy)
    assert not any(chosen.overlaps(one) for one in busy if one.version == 4)
    with pytest.raises(Unavailable):
        ipam.choose(ipam.ipv4_candidates(default=False, start=0), [IPv4Network("0.0.0.0/0")])


def test_network_bodies() -> None:
    network, want4, want6 = records.from_docker({"Name": "app", "EnableIPv6": True})
    assert (want4, want6, network.link) == (True, True, f"bh-{network.id[:12]}")
    assert records.decode(network.encode()) == network
    for bad in (
        {"Name": "host"},
        {"Name": "-x"},
        {"Name": "a", "IPAM": {"Config": [{"Subnet": "10.0.0.1/24"}]}},
        {"Name": "a", "IPAM": {"Config": [{"Subnet": "10.0.0.0/31"}]}},
        {"Name": "a", "IPAM": {"Config": [{"Gateway": "10.0.0.1"}]}},
        {"Name": "a", "IPAM": {"Config": [{"Subnet": "10.0.0.0/24", "IPRange": "10.1.0.0/25"}]}},
        {"Name": "a", "Options": {"com.docker.network.driver.mtu": "x"}},
        {"Name": "a", "Options": {"com.docker.network.bridge.enable_icc": "maybe"}},
    ):
        with pytest.raises(Invalid):
            records.from_docker(bad)
    with pytest.raises(Unsupported):
        records.from_docker({"Name": "a", "Driver": "overlay"})


def test_port_wishes() -> None:
    (one,) = ports.wishes({"80/tcp": []}, (), publish_all=False)
    assert (one.low, one.high, one.host_address) == (0, 0, "")
    wanted = {"80": [{"HostIp": "[::1]", "HostPort": "8000-8002"}]}
    (one,) = ports.wishes(wanted, (), publish_all=False)
    assert (one.protocol, one.low, one.high, one.host_address) == ("tcp", 8000, 8002, "::1")
    assert len(ports.wishes({}, ("80/tcp", "53/udp"), publish_all=True)) == 2
    for bad in ("x", "70000", "9-8", "0x10"):
        with pytest.raises(Invalid):
            ports.wishes({"80/tcp": [{"HostPort": bad}]}, (), publish_all=False)
    with pytest.raises(Invalid):
        ports.wishes({"0/tcp": [{}]}, (), publish_all=False)


def test_files() -> None:
    parsed = files.parse_resolv("# x\nnameserver 192.0.2.1\nsearch a b\noptions ndots:2\n")
    assert parsed == files.Resolution(("192.0.2.1",), ("a", "b"), ("ndots:2",))
    text = files.resolv_conf(["127.0.0.11"], [], [], ours=True)
    assert text == "nameserver 127.0.0.11\noptions ndots:0\n"
    assert files.parse_extra_host("db:10.0.0.1", []) == [("10.0.0.1", "db")]
    assert files.parse_extra_host("db:fd00::1", []) == [("fd00::1", "db")]
    assert files.parse_extra_host("x=host-gateway", ["10.0.0.1"]) == [("10.0.0.1", "x")]
    for bad in ("db", "db:", ":1.2.3.4", "db:nowhere"):
        with pytest.raises(Invalid):
            files.parse_extra_host(bad, [])
