"""nginx published while dockerd runs, whose firewall drops what is forwarded by default."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.dockerd import Dockerd, dockerd
from tests.helpers.images import Blobs, build, busybox_tar, docker_archive, has_busybox
from tests.helpers.installation import TIMEOUT_S, Installation, installation
from tests.helpers.nginx import NGINX, nginx_archive
from tests.helpers.residue import residue
from tests.helpers.waiting import until

SERVE = ("nginx", "-g", "daemon off;")


class Beside(Installation):
    """An installation in the network namespace of a dockerd."""

    docker: Dockerd

    def command(self, *argv: str, native: bool = False) -> list[str]:
        return self.docker.enter(*super().command(*argv, native=native))


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dockerd]:
    folder = tmp_path_factory.mktemp("docker")
    with dockerd(folder, network=True) as running:
        if not has_busybox():
            pytest.skip("no static busybox here (apt-get install busybox-static)")
        tar = docker_archive(folder / "b.tar", build(Blobs(), [busybox_tar()]), ["busybox:latest"])
        running("load", "-i", str(tar)).ok()
        # Its first container leaves groups that stay as long as it does: not ours to account for.
        running("run", "--rm", "-p", "8082:80", "busybox", "true").ok()
        yield running


@pytest.fixture
def here(tmp_path: Path, docker: Dockerd) -> Iterator[Beside]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    archive = nginx_archive()
    made = Beside(tmp_path / "root", tmp_path / "run")
    made.docker = docker
    with residue(str(tmp_path)), installation(tmp_path):  # its end stops what runs here
        made.cli("load", "-i", str(archive)).ok()
        made.load_busybox(tmp_path)
        yield made


def inside(docker: Dockerd, *argv: str) -> str:
    done = subprocess.run(
        docker.enter(*argv), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr}"


@contextlib.contextmanager
def neighbour(docker: Dockerd) -> Iterator[list[str]]:
    """Another machine on a cable of its own: a command line that runs programs there.

    The host's end has 10.99.0.1, the neighbour's 10.99.0.2.
    """
    ready, tell = os.pipe()
    script = "echo; exec sleep 100000"
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, ready)
        other = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=tell)
        os.close(tell)
        undo.callback(other.wait)
        undo.callback(other.kill)
        assert os.read(ready, 1) == b"\n"
        for argv in (
            ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "eth0",
             "netns", str(other.pid)],
            ["ip", "addr", "add", "10.99.0.1/24", "dev", "cable"],
            ["ip", "link", "set", "cable", "up"],
        ):  # fmt: skip
            subprocess.run(docker.enter(*argv), check=True)
        there = ["nsenter", f"--net=/proc/{other.pid}/ns/net"]
        for argv in (
            ["ip", "addr", "add", "10.99.0.2/24", "dev", "eth0"],
            ["ip", "link", "set", "eth0", "up"],
            ["ip", "route", "add", "default", "via", "10.99.0.1"],
        ):
            subprocess.run([*there, *argv], check=True)
        yield there


def test_nginx_beside_dockerd(here: Beside, docker: Dockerd) -> None:
    # As docker sets it where it is the one who turns forwarding on.
    inside(docker, "iptables", "-P", "FORWARD", "DROP")
    rules = inside(docker, "iptables", "-S", "FORWARD")
    assert "-P FORWARD DROP" in rules
    assert "DOCKER-USER" in rules
    docker("run", "-d", "--name", "other", "-p", "8081:80", "busybox", "sleep", "1000").ok()
    here.cli("network", "create", "net").ok()
    web = ("run", "-d", "--name", "web", "--network", "net", "-p", "8080:80", NGINX, *SERVE)
    here.cli(*web).ok()
    with neighbour(docker) as there:
        fetch = ["curl", "-sS", "--max-time", "30"]

        def answered() -> bool:
            return "Welcome to nginx" in inside(docker, *fetch, "http://127.0.0.1:8080/")

        until(answered, "nginx answers on the host")
        # From outside: forwarded, which docker's policy drops unless we are let through.
        done = subprocess.run(
            [*there, *fetch, "http://10.99.0.1:8080/"], capture_output=True, text=True, check=False
        )
        assert "Welcome to nginx" in done.stdout, done.stderr
        get = ("run", "--rm", "--network", "net", "busybox", "wget", "-qO-", "http://web/")
        assert "Welcome to nginx" in here.cli(*get).ok().out
        # And out: to the neighbour, from a network of ours.
        ping = ("run", "--rm", "busybox", "ping", "-c", "1", "-W", "30", "10.99.0.2")
        here.cli(*ping).ok()
    # docker's own still works, and its rules stay when we are gone.
    assert docker("port", "other").ok().line.startswith("80/tcp -> ")
    here.cli("rm", "-f", "web").ok()
    here.cli("network", "rm", "net").ok()
    docker("rm", "-f", "other").ok()
    here.cli("system", "shutdown", "--force").ok()
    assert inside(docker, "nft", "list", "tables").count("bulkhead") == 0
    assert (
        inside(docker, "iptables", "-S", "DOCKER-USER")
        == "-N DOCKER-USER\n-A DOCKER-USER -j RETURN\n"
    )
    # Their namespaces are gone, and with them, soon, the interfaces that waited for workloads.
    until(lambda: not _ours(docker), "our interfaces are gone")


def _ours(docker: Dockerd) -> list[str]:
    links = inside(docker, "ip", "-br", "link").splitlines()
    return [line for line in links if line.startswith("bh")]
