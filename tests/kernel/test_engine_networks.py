"""The engine and its networks, on a host of its own: what running workloads see of changes."""

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.errors import Conflict
from bulkhead.linux import nftables as nft
from bulkhead.linux import rtnetlink as rt
from bulkhead.network import host
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig
from tests.helpers.network_lab import ask, in_lab
from tests.helpers.residue import residue
from tests.helpers.waiting import until
from tests.kernel.test_engine_run import REASON

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")
WAIT = "while true; do sleep 1; done"
PUBLISH = {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}


@contextlib.contextmanager
def _engine(directory: Path) -> Iterator[Rig]:
    """An engine in the calling thread's network namespace, with loopback up and an image."""
    with rt.connect() as route:
        route.transact([rt.set_link(1, up=True)])
    with residue(str(directory)), rigs.engine(directory) as rig:
        rigs.load_busybox(rig)
        yield rig


def _links() -> list[str]:
    with rt.connect() as route:
        return [one.name for one in rt.links(route) if one.name.startswith("bh")]


def _tables() -> list[str]:
    with nft.connect() as netlink:
        return [one.name for one in nft.tables(netlink)]


def _content(rig: Rig, name: str, path: str) -> str:
    code, out = rigs.execute(rig, name, ["cat", path])
    assert code == 0
    return out.decode()


def _address(rig: Rig, name: str, network: str) -> str:
    found = rig.call("workload.inspect", id=name)["NetworkSettings"]["Networks"][network]
    return str(found["IPAddress"])


def _resolves(rig: Rig, name: str, asked: str, address: str) -> bool:
    code, out = rigs.execute(rig, name, ["nslookup", asked])
    return code == 0 and address in out.decode()


@in_lab
def test_engine_takes_everything_down_by_itself(tmp_path: Path) -> None:
    with _engine(tmp_path) as rig:
        host.write(host.FORWARD4, "0")
        rig.call("network.create", Name="app")
        rigs.start(rig, "web", WAIT, PortBindings=PUBLISH)
        rigs.start(rig, "db", WAIT, NetworkMode="app")
        assert host.read(host.FORWARD4) == "1"
        assert len(_links()) >= 2 and len(_tables()) == 1
        for name in ("web", "db"):
            rig.call("workload.remove", id=name, force=True)
        # Nobody calls the engine from here on.
        until(lambda: not _links(), "the bridges are gone")
        until(lambda: not _tables(), "the table is gone")
        until(lambda: host.read(host.FORWARD4) == "0", "forwarding is off again")


@in_lab
def test_engine_takes_everything_down_after_an_end_of_its_own(tmp_path: Path) -> None:
    with _engine(tmp_path) as rig:
        host.write(host.FORWARD4, "0")
        rigs.start(rig, "short", "exit 0")
        rig.call("workload.wait", id="short")
        until(lambda: not _links() and not _tables(), "bridge and table are gone")
        until(lambda: host.read(host.FORWARD4) == "0", "forwarding is off again")


@in_lab
def test_renamed_workload_is_found_by_its_new_name(tmp_path: Path) -> None:
    with _engine(tmp_path) as rig:
        rig.call("network.create", Name="app", Internal=True)
        rigs.start(rig, "web", WAIT, NetworkMode="app")
        rigs.start(rig, "client", WAIT, NetworkMode="app")
        address = _address(rig, "web", "app")
        until(lambda: _resolves(rig, "client", "web", address), "the first name is known")
        rig.call("workload.rename", id="web", name="shop")
        until(lambda: _resolves(rig, "client", "shop", address), "the new name is known")
        assert not _resolves(rig, "client", "web", address)
        shown = rig.call("workload.inspect", id="shop")["NetworkSettings"]["Networks"]["app"]
        assert "shop" in shown["DNSNames"] and "web" not in shown["DNSNames"]


@in_lab
def test_connecting_a_running_workload_changes_its_files(tmp_path: Path) -> None:
    with _engine(tmp_path) as rig:
        rig.call("network.create", Name="app", Internal=True)
        rigs.start(rig, "web", WAIT, NetworkMode="app")
        rigs.start(rig, "plain", WAIT)
        rigs.start(rig, "beside", WAIT, NetworkMode="container:plain")
        rigs.start(rig, "own", "echo 'nameserver 192.0.2.7' > /etc/resolv.conf; " + WAIT)
        until(lambda: "192.0.2.7" in _content(rig, "own", "/etc/resolv.conf"), "it wrote its own")
        before = _content(rig, "plain", "/etc/resolv.conf")
        assert "127.0.0.11" not in before
        for name in ("plain", "own"):
            rig.call("network.connect", network="app", container=name)
        for name in ("plain", "beside"):
            assert _content(rig, name, "/etc/resolv.conf").startswith("nameserver 127.0.0.11\n")
            hosts = _content(rig, name, "/etc/hosts")
            assert _address(rig, "plain", "app") in hosts
            assert _address(rig, "plain", "bridge") in hosts
            web = _address(rig, "web", "app")
            until(functools.partial(_resolves, rig, name, "web", web), "names are known")
        assert _content(rig, "own", "/etc/resolv.conf") == "nameserver 192.0.2.7\n"
        assert _address(rig, "own", "app") in _content(rig, "own", "/etc/hosts")
        left = _address(rig, "plain", "bridge")
        rig.call("network.disconnect", network="bridge", container="plain")
        assert left not in _content(rig, "plain", "/etc/hosts")
        assert left not in _content(rig, "beside", "/etc/hosts")


def _serves(address: str, text: str) -> bool:
    try:
        return ask(address, 8080, 5.0).strip() == text
    except OSError:
        # nc(1) begins anew after each connection.
        return False


def _start_server(rig: Rig, name: str) -> None:
    script = f"while true; do echo {name} | nc -l -p 80; done"
    rigs.start(rig, name, script, PortBindings=PUBLISH)


@in_lab
def test_port_goes_from_one_workload_to_the_next(tmp_path: Path) -> None:
    with _engine(tmp_path) as rig:
        for number in range(4):
            name = f"web{number}"
            _start_server(rig, name)
            for address in ("127.0.0.1", "::1"):
                until(functools.partial(_serves, address, name), f"{name} serves at {address}")
            rig.call("workload.restart", id=name, timeout_s=0)
            until(functools.partial(_serves, "::1", name), f"{name} serves again")
            rig.call("workload.remove", id=name, force=True)


@in_lab
def test_port_is_served_after_a_kill_of_the_helper(tmp_path: Path) -> None:
    with _engine(tmp_path) as rig:
        _start_server(rig, "web")
        until(functools.partial(_serves, "::1", "web"), "it is served")
        found = subprocess.run(
            ["pgrep", "-f", f"network.helper .*{tmp_path}/run$"], capture_output=True, check=True
        )
        (pid,) = found.stdout.split()
        os.kill(int(pid), signal.SIGKILL)
        until(functools.partial(_serves, "::1", "web"), "it is served by the next helper")
        rig.kill()
        rig.start()
        for address in ("127.0.0.1", "::1"):
            until(functools.partial(_serves, address, "web"), f"it is served at {address}")
        _start_server_conflicts(rig)


def _start_server_conflicts(rig: Rig) -> None:
    with pytest.raises(Conflict, match="port is already allocated"):
        _start_server(rig, "second")
