"""`move`: a workload goes behind another boundary and back, under load; failures go back."""

import contextlib
import http.client
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bulkhead import Client
from bulkhead.errors import BulkheadError, Invalid
from tests.guest.test_conformance import _unusable
from tests.guest.test_shows_data import DATABASE, IMAGE, PACKAGES
from tests.helpers import engine_rig as rigs
from tests.helpers import guest_kernel
from tests.helpers.engine_rig import Rig
from tests.helpers.nginx import archive
from tests.helpers.residue import residue
from tests.helpers.waiting import until

SITE = """
cat > /tmp/nginx.conf <<END
user root; worker_processes 1; error_log /dev/stderr; pid /tmp/nginx.pid; events {}
http { access_log off; server { listen 80; root /srv; } }
END
mkdir -p /srv; echo "served by $(uname -r)" > /srv/kernel
test -e /srv/kept || cat /proc/sys/kernel/random/uuid > /srv/kept
exec nginx -c /tmp/nginx.conf -g 'daemon off;'
"""
CHECK = {"Test": ["TCP", "80"], "Interval": 10**9}
SECOND = 10**9
PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if os.geteuid() != 0 or shutil.which("busybox") is None:
        pytest.skip("needs root, busybox-static")
    if reason := _unusable("microvm"):
        pytest.skip(reason)
    made_of = archive("postgresql", PACKAGES, IMAGE)
    directory = tmp_path_factory.mktemp("moves")
    guest_kernel.provide(directory / "root")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        with made_of.open("rb") as file:
            made.rpc.stream("image.load", {}, [file.fileno()])
        made.call("network.create", Name="site")
        yield made
        made.call("network.remove", name="site")


class Load:
    """Requests without an end, each on a connection of its own; what failed."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._place = host, port, path
        self._stop = threading.Event()
        self.failed: list[str] = []
        self.answers: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        host, port, path = self._place
        while not self._stop.is_set():
            connection = http.client.HTTPConnection(host, port, timeout=120)
            try:
                connection.request("GET", path, headers={"Connection": "close"})
                answer = connection.getresponse()
                text = answer.read().decode().strip()
                if answer.status != 200:
                    self.failed.append(f"status {answer.status}")
                self.answers.append(text)
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(f"{host}: {type(error).__name__}: {error}")
            finally:
                connection.close()

    def goes_on(self) -> None:
        """Wait for some more answers."""
        seen = len(self.answers)
        until(lambda: len(self.answers) > seen + 3, "it serves", 300)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _move(rig: Rig, name: str, to: str, **more: Any) -> dict[str, Any]:
    return dict(rig.call("workload.move", id=name, to=to, **more))


def _place(rig: Rig, name: str) -> tuple[str, str, Any]:
    """The address, the hardware address and the published ports."""
    settings = rig.call("workload.inspect", id=name)["NetworkSettings"]
    one = next(iter(settings["Networks"].values()))
    return one["IPAddress"], one["MacAddress"], settings["Ports"]


def _names(rig: Rig) -> list[str]:
    return sorted(one["Names"][0] for one in rig.call("workload.list", all=True))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_server_moves_without_a_failed_request(rig: Rig) -> None:
    port = _free_port()
    config = {"Image": IMAGE, "Healthcheck": CHECK, "ExposedPorts": {"80/tcp": {}}}
    bound = {"80/tcp": [{"HostPort": str(port)}]}
    rigs.start(rig, "web", SITE, config, NetworkMode="site", PortBindings=bound, Memory=256 << 20)
    try:
        before = _place(rig, "web")
        ours = os.uname().release
        with Load("127.0.0.1", port, "/kernel") as published, Load(before[0], 80, "/kept") as near:
            until(lambda: published.answers and near.answers, "it serves", 120)
            published.failed.clear()  # it had not begun to listen
            near.failed.clear()
            assert set(published.answers) == {f"served by {ours}"}
            for boundary in ("microvm", "container"):
                moved = _move(rig, "web", boundary, timeout_s=PATIENCE_S)
                print(boundary, moved)
                assert (moved["Name"], moved["Boundary"], moved["Way"]) == (
                    "web", boundary, "ready first",
                )  # fmt: skip
                published.goes_on()
                assert _place(rig, "web") == before
                assert (published.answers[-1] == f"served by {ours}") == (boundary == "container")
                assert _names(rig) == ["/web"]
        assert published.failed == [] and near.failed == []
        assert len(set(near.answers)) == 1, "what it had written came along"
    finally:
        rig.call("workload.remove", id="web", force=True)


WRITER = """
n=0
while [ ! -e /tmp/stop ]; do
  n=$((n+1))
  insert="insert into lines (n) values ($n) on conflict do nothing"
  until psql -h db -U postgres -qAtX -c "$insert" 2>>/tmp/errors; do
    [ -e /tmp/stop ] && exit; sleep 0.2
  done
  echo $n > /tmp/written
done
"""
READY = {"Test": ["CMD-SHELL", "/usr/lib/postgresql/*/bin/pg_isready -q -h localhost"],
         "Interval": SECOND}  # fmt: skip


def _written(rig: Rig) -> int:
    text = rigs.execute(rig, "writer", ["cat", "/tmp/written"])[1].decode().strip()
    return int(text) if text.isdecimal() else 0


def _writes_on(rig: Rig) -> None:
    seen = _written(rig)
    until(lambda: _written(rig) > seen + 3, "rows are written", 300)


def _query(rig: Rig, text: str) -> tuple[int, str]:
    command = ["psql", "-h", "db", "-U", "postgres", "-qAtX", "-c", text]
    code, out = rigs.execute(rig, "writer", command)
    return code, out.decode().strip()


def test_a_database_moves_without_a_lost_row(rig: Rig) -> None:
    config = {"Image": IMAGE, "Healthcheck": READY, "StopSignal": "SIGINT"}
    rigs.start(rig, "db", DATABASE, config, NetworkMode="site", Binds=["rows:/data"],
               Memory=256 << 20)  # fmt: skip
    rigs.start(rig, "writer", "sleep 100000", {"Image": IMAGE}, NetworkMode="site")
    try:
        until(lambda: _query(rig, "select 1") == (0, "1"), "the database answers", 300)
        assert _query(rig, "create table lines (n int primary key)")[0] == 0
        before = _place(rig, "db")
        writer = threading.Thread(target=rigs.execute, args=(rig, "writer", ["bash", "-c", WRITER]))
        writer.start()
        try:
            for boundary in ("microvm", "container"):
                _writes_on(rig)
                moved = _move(rig, "db", boundary, timeout_s=PATIENCE_S, drain_s=2.0)
                print(f"to {boundary}: nobody answered for {moved['Gap']:.3f} s")
                assert (moved["Way"], moved["Boundary"]) == ("stopped first", boundary)
                assert moved["Gap"] > 0 and _place(rig, "db") == before
                _writes_on(rig)
        finally:
            rigs.execute(rig, "writer", ["touch", "/tmp/stop"])
            writer.join()
        last = _written(rig)
        assert _query(rig, "select count(*), max(n) from lines") == (0, f"{last}|{last}")
    finally:
        for name in ("writer", "db"):
            rig.call("workload.remove", id=name, force=True)
        rig.call("volume.remove", name="rows")


@pytest.mark.parametrize(
    ("what", "words", "config", "host", "more"),
    [
        ("create", "kernel of its own", {}, {"PidMode": "host"}, {}),
        ("start", "ended", {}, {}, {}),
        ("ready", "not ready after", {"Healthcheck": CHECK}, {}, {"timeout_s": 1.0}),
        ("stopped-ready", "not ready after", {"Healthcheck": CHECK},
         {"Binds": ["lines:/data"]}, {"timeout_s": 1.0}),
    ],
)  # fmt: skip
def test_a_failure_goes_back(
    rig: Rig, what: str, words: str, config: dict[str, Any], host: dict[str, Any],
    more: dict[str, Any],
) -> None:  # fmt: skip
    """The kernel decides: behind the other boundary it ends, or never listens."""
    ours = os.uname().release
    end = "sleep 1000" if config else "exit 9"
    script = f'[ "$(uname -r)" = {ours} ] || {end}; echo served > /tmp/index.html; '
    script += "exec httpd -f -p 80 -h /tmp"
    port = _free_port()
    identity = rigs.start(
        rig, "going", script, config, NetworkMode="site",
        PortBindings={"80/tcp": [{"HostPort": str(port)}]}, **host,
    )  # fmt: skip
    try:
        with Load("127.0.0.1", port, "/") as load:
            until(lambda: load.answers, "it serves", 120)
            before, images = _place(rig, "going"), _images(rig)
            with pytest.raises(BulkheadError, match=words):
                _move(rig, "going", "microvm", **more)
            assert _names(rig) == ["/going"]
            assert rig.call("workload.inspect", id="going")["Id"] == identity
            until(lambda: rigs.state(rig, "going")["Running"], "it runs again", 120)
            assert _place(rig, "going") == before and _images(rig) == images
            load.goes_on()
            assert set(load.answers) == {"served"}
    finally:
        rig.call("workload.remove", id="going", force=True)
        if "Binds" in host:
            rig.call("volume.remove", name="lines")


def _images(rig: Rig) -> list[str]:
    return sorted(one["Id"] for one in rig.call("image.list", all=True))


def test_one_that_does_not_run_moves_at_once(rig: Rig) -> None:
    image = {"Image": rigs.IMAGE, "Volumes": {"/anonymous": {}}}
    rigs.start(rig, "still", "echo kept > /kept; echo $HOSTNAME > /anonymous/name", image)
    until(lambda: not rigs.state(rig, "still")["Running"], "it has ended")
    with Client(root=str(rig.root), run=str(rig.run), start_engine=False) as client:
        still = client.containers.get("still")
        before = still.inspect().raw
        moved = still.move("microvm")
        assert (moved.name, moved.boundary, moved.way) == ("still", "microvm", "stopped")
        after = still.inspect().raw
        assert after["Mounts"] == before["Mounts"] and after["Id"] == moved.id != before["Id"]
        still.move("container")
        assert _names(rig) == ["/still"]
        assert b"kept\n" in client.containers.get("still").get_archive("/kept")
        with pytest.raises(Invalid, match="already"):
            still.move("container")
        still.remove(volumes=True)


def test_an_engine_that_is_killed_in_between_goes_back(rig: Rig) -> None:
    ours = os.uname().release
    script = f'[ "$(uname -r)" = {ours} ] || sleep 1000; exec httpd -f -p 80 -h /tmp'
    identity = rigs.start(
        rig, "torn", script, {"Healthcheck": CHECK}, NetworkMode="site", Binds=["torn:/data"]
    )
    place = _place(rig, "torn")
    mover = threading.Thread(target=_torn, args=(rig,))
    mover.start()
    until(lambda: not rigs.state(rig, identity)["Running"], "the old one is stopped", 300)
    rig.kill()
    mover.join()
    rig.start()
    try:
        until(lambda: rigs.state(rig, "torn")["Running"], "the old one runs again", 120)
        assert rig.call("workload.inspect", id="torn")["Id"] == identity
        until(lambda: _names(rig) == ["/torn"], "nothing else is left", 120)
        assert _place(rig, "torn")[0] == place[0]
    finally:
        rig.call("workload.remove", id="torn", force=True)
        rig.call("volume.remove", name="torn")


def _torn(rig: Rig) -> None:
    with contextlib.suppress(BulkheadError, OSError, EOFError), rigs.Rpc(rig.socket) as rpc:
        rpc.call("workload.move", id="torn", to="microvm", timeout_s=300.0)
