"""PostgreSQL and nginx keep their data on the same volumes when the boundary changes.

Containers, a user-space kernel, a microVM: one after the other serves the files that the others
have left, on one network, by name, to a client behind another boundary.
"""

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.guest.test_conformance import _unusable
from tests.helpers import engine_rig as rigs
from tests.helpers import guest_kernel
from tests.helpers.engine_rig import Rig
from tests.helpers.nginx import archive
from tests.helpers.residue import residue
from tests.helpers.waiting import until

IMAGE = "debian-postgresql:bookworm"
PACKAGES = ("nginx-light", "postgresql", "redis-server")
BOUNDARIES = ("container", "sandbox", "microvm")
DATABASE = """
bin=$(echo /usr/lib/postgresql/*/bin)
own="setpriv --reuid postgres --regid postgres --clear-groups"
if [ ! -e /data/db ]; then
  mkdir /data/db; chown postgres:postgres /data/db
  $own $bin/initdb -D /data/db -A trust --no-locale -E UTF8 -N
  echo 'host all all all trust' >> /data/db/pg_hba.conf
fi
exec $own $bin/postgres -D /data/db -k /tmp -h '*' -c shared_buffers=16MB -c max_connections=20
"""
WEB = """
mkdir -p /site/pages; echo "page of $ME" > "/site/pages/$ME"
cat > /tmp/nginx.conf <<END
user root; worker_processes 1; error_log /dev/stderr; pid /tmp/nginx.pid; events {}
http { access_log /site/access.log; server { listen 80; root /site/pages; } }
END
exec nginx -c /tmp/nginx.conf -g 'daemon off;'
"""
FETCH = 'exec 3<>/dev/tcp/web/80; printf "GET /%s HTTP/1.0\\r\\n\\r\\n" "$PAGE" >&3; cat <&3'


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if os.geteuid() != 0 or shutil.which("busybox") is None:
        pytest.skip("needs root, busybox-static")
    made_of = archive("postgresql", PACKAGES, IMAGE)
    directory = tmp_path_factory.mktemp("data")
    if not _unusable("microvm"):
        guest_kernel.provide(directory / "root")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        with made_of.open("rb") as file:
            made.rpc.stream("image.load", {}, [file.fileno()])
        made.call("network.create", Name="site")
        rigs.start(made, "client", "sleep 100000", {"Image": IMAGE}, NetworkMode="site")
        yield made
        made.call("workload.remove", id="client", force=True)
        made.call("network.remove", name="site")


def _query(rig: Rig, text: str) -> tuple[int, str]:
    command = ["psql", "-h", "db", "-U", "postgres", "-qAtX", "-c", text]
    code, out = rigs.execute(rig, "client", command, Env=["PGCONNECT_TIMEOUT=5"])
    return code, out.decode().strip()


def _fetch(rig: Rig, page: str) -> str:
    _, out = rigs.execute(rig, "client", ["bash", "-c", FETCH], Env=[f"PAGE={page}"])
    return out.decode()


@pytest.fixture(scope="module")
def left() -> list[str]:
    """The boundaries that have served so far."""
    return []


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_data_stays_when_the_boundary_changes(rig: Rig, left: list[str], boundary: str) -> None:
    reason = _unusable(boundary)
    if reason:
        pytest.skip(reason)
    common = {"boundary": boundary, "NetworkMode": "site", "Memory": 512 << 20}
    rigs.start(rig, "db", DATABASE, {"Image": IMAGE}, Binds=["database:/data"], **common)
    config = {"Image": IMAGE, "Env": [f"ME={boundary}"]}
    rigs.start(rig, "web", WEB, config, Binds=["pages:/site"], **common)
    try:
        until(lambda: _query(rig, "select 1") == (0, "1"), "the database answers", 300)
        if not left:
            assert _query(rig, "create table visits (n serial, who text)")[0] == 0
        assert _query(rig, "select who from visits order by n")[1].split() == left
        assert _query(rig, f"insert into visits (who) values ('{boundary}')")[0] == 0
        left.append(boundary)
        assert _query(rig, "checkpoint; select count(*) from visits") == (0, str(len(left)))
        until(lambda: f"page of {boundary}" in _fetch(rig, boundary), "the page is served", 300)
        for other in left:
            assert f"page of {other}" in _fetch(rig, other)
    except AssertionError:
        print(rigs.logs(rig, "db").decode()[-3000:], rigs.logs(rig, "web").decode()[-2000:])
        raise
    finally:
        for name, signal in (("db", "INT"), ("web", "QUIT")):
            rig.call("workload.stop", id=name, signal=signal, timeout_s=60)
        code = rigs.state(rig, "db")["ExitCode"]
        for name in ("db", "web"):
            rig.call("workload.remove", id=name, force=True)
    assert code == 0


def test_every_boundary_has_left_its_lines(rig: Rig, left: list[str]) -> None:
    """Both volumes as the host sees them at the end."""
    command = ["sh", "-c", "ls /site/pages; cat /site/access.log"]
    done = rigs.run(rig, command, Binds=["pages:/site:ro"], config={"Image": IMAGE})
    for boundary in left:
        assert boundary.encode() in done.out.split()
        assert f"GET /{boundary} ".encode() in done.out
    for name in ("pages", "database"):
        rig.call("volume.remove", name=name)
