"""Beside a real dockerd, on one host: in its network namespace, with its bridge and its rules.

The tests' names are short, as containerd has a socket in their directory.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bulkhead.linux import netns
from bulkhead.linux import nftables as nft
from bulkhead.linux import rtnetlink as rt
from bulkhead.network import host
from tests.helpers import dockerd as peer
from tests.helpers import images
from tests.helpers.dockerd import Dockerd
from tests.helpers.network_lab import (
    HOST4,
    OUTSIDE4,
    Lab,
    Workload,
    ask,
)
from tests.helpers.waiting import until

OURS = {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}
THEIRS = "while true; do echo theirs | nc -l -p 80; done"


@pytest.fixture(autouse=True)
def _docker() -> None:
    if reason := peer.missing():
        pytest.skip(reason)


def _on_docker_host(docker: Dockerd, work: Callable[[], None]) -> None:
    """Run `work` where dockerd thinks the host is."""
    fd = os.open(f"/proc/{docker.first}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns.inside(fd, work)
    finally:
        os.close(fd)


def _rules_for_us() -> list[str]:
    with nft.connect() as netlink:
        found = nft.rules(netlink, nft.IPV4, "filter", "DOCKER-USER")
    return [one.comment for one in found if one.comment.startswith("bulkhead_")]


def _start_theirs(docker: Dockerd) -> None:
    docker("import", "-", "busybox", stdin=images.busybox_tar()).ok()
    run = ("run", "-d", "--name", "theirs", "-p", "9090:80", "busybox", "/bin/sh", "-c", THEIRS)
    docker(*run).ok()


def _theirs_answers(lab: Lab) -> bool:
    def once() -> bool:
        try:
            return ask(HOST4, 9090, 5.0).strip() == "theirs"
        except OSError:
            # Their server starts anew after each connection.
            return False

    return lab.inside_outside(once)


def _theirs_gets_out(docker: Dockerd) -> bool:
    done = docker("exec", "theirs", "/bin/sh", "-c", f"echo | nc -w 5 {OUTSIDE4} 7000")
    return done.out.startswith("outside ")


def _ours_serves(lab: Lab, web: Workload) -> None:
    assert lab.inside_outside(lambda: ask(HOST4, 8080)) == f"web {OUTSIDE4}"
    for address in ("127.0.0.1", "::1", HOST4):
        assert ask(address, 8080).startswith("web ")
    assert web.ask(OUTSIDE4, 7000) == f"outside {HOST4}"


def test_beside(tmp_path: Path) -> None:
    """Both serve, and neither disturbs the other."""

    def body(docker: Dockerd) -> None:
        with Lab(tmp_path) as lab:
            lab.serve_outside(7000)
            _start_theirs(docker)
            until(lambda: _theirs_answers(lab), "their port is served")
            assert host.read(host.FORWARD4) == "1"
            web = lab.run("web", ports=OURS)
            web.serve(80)
            lab.start_helper()
            assert len(_rules_for_us()) == 2
            _ours_serves(lab, web)
            until(lambda: _theirs_answers(lab), "their port is served beside ours")
            assert _theirs_gets_out(docker)
            # Both are asked by the host's address, from each other's side.
            answer = docker("exec", "theirs", "/bin/sh", "-c", f"echo | nc -w 9 {HOST4} 8080").out
            assert answer.startswith("web ")
            with rt.connect() as route:
                ours = [one for one in rt.links(route) if one.name.startswith("bh")]
                docker0 = rt.link(route, "docker0")
                ranges = {one.index: one.address.network for one in rt.addresses(route)}
            assert not ranges[ours[0].index].overlaps(ranges[docker0.index])
            # A container more, and one less.
            docker("run", "--rm", "busybox", "/bin/true").ok()
            _ours_serves(lab, web)
            lab.stop(web)
            lab.settle()
            until(lambda: not _rules_for_us(), "our rules are gone from DOCKER-USER")
            assert host.read(host.FORWARD4) == "1"
            until(lambda: _theirs_answers(lab), "their port is served without ours")
            assert _theirs_gets_out(docker)

    with peer.dockerd(tmp_path, network=True) as docker:
        _on_docker_host(docker, lambda: body(docker))


def test_later(tmp_path: Path) -> None:
    """Its firewall drops what it does not know, until we have seen that it is there."""

    def body(docker: Dockerd) -> None:
        with Lab(tmp_path) as lab, nft.connect() as netlink:
            # As if it were not there yet, when ours begins.
            for command in ("-P FORWARD ACCEPT", "-F FORWARD", "-F DOCKER-USER", "-X DOCKER-USER"):
                subprocess.run(["iptables", *command.split()], check=True)
            lab.serve_outside(7000)
            web = lab.run("web", ports=OURS)
            web.serve(80)
            lab.start_helper()
            _ours_serves(lab, web)
            assert not nft.chain_exists(netlink, nft.IPV4, "filter", "DOCKER-USER")
            for command in ("-N DOCKER-USER", "-I FORWARD -j DOCKER-USER", "-P FORWARD DROP"):
                subprocess.run(["iptables", *command.split()], check=True)
            until(lambda: lab.manager.refill() and _rules_for_us(), "we have seen it")
            _ours_serves(lab, web)

    with peer.dockerd(tmp_path, network=True) as docker:
        _on_docker_host(docker, lambda: body(docker))
