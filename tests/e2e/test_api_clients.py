"""Tools that speak Docker's API: Compose, testcontainers, skopeo, Ansible.

Ryuk, which testcontainers starts to clean up behind it, is played by a double here: a Perl script
that speaks to the socket from inside a container, as Ryuk does.
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.api_rig import Api, api
from tests.helpers.databases import IMAGE, databases_archive
from tests.helpers.images import has_busybox
from tests.helpers.installation import TIMEOUT_S
from tests.helpers.registry import PASSWORD, USER, registry
from tests.helpers.residue import residue
from tests.helpers.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    if os.geteuid() != 0:
        pytest.skip("engines want root")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    folder = tmp_path_factory.mktemp("clients")
    with residue(str(folder)), api(folder) as made:
        yield made


def need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed here (apt-get install {package})")


def run(here: Api, *argv: str, cwd: Path | None = None, **more: str) -> str:
    """A program with DOCKER_HOST set; its output."""
    done = subprocess.run(
        argv, capture_output=True, env=here.environment(**more), cwd=cwd or here.folder,
        timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


STACK = """
version: "2.4"
services:
  db:
    image: busybox
    command: ["sh", "-c", "echo stored > /www/value; exec httpd -f -p 5432 -h /www"]
    healthcheck: {test: ["CMD", "wget", "-qO-", "http://127.0.0.1:5432/value"], interval: 1s,
                  timeout: 60s, retries: 60}
    volumes: ["data:/www"]
  api:
    image: busybox
    command: ["sh", "-c", "mkdir /w; wget -qO /w/index.html http://db:5432/value; httpd -f -h /w"]
    depends_on: {db: {condition: service_healthy}}
    healthcheck: {test: ["CMD", "wget", "-qO-", "http://127.0.0.1/"], interval: 1s,
                  timeout: 60s, retries: 60}
  web:
    image: busybox
    command: ["sh", "-c", "wget -qO- http://api/; exec sleep 1000"]
    stop_signal: SIGKILL
    depends_on: {api: {condition: service_healthy}}
    networks: [default, front]
networks: {front: {}}
volumes: {data: {}}
"""


def test_compose_brings_up_three_services(here: Api, tmp_path: Path) -> None:
    need("docker-compose", "docker-compose")
    (tmp_path / "docker-compose.yml").write_text(STACK)

    def compose(*argv: str) -> str:
        return run(here, "docker-compose", "-p", "stack", *argv, cwd=tmp_path)

    compose("up", "-d")
    until(lambda: "stored" in compose("logs", "--no-color", "web"), "web has asked api")
    assert compose("ps").count("Up (healthy)") == 2
    assert compose("exec", "-T", "web", "wget", "-qO-", "http://api/") == "stored\n"
    assert "httpd" in compose("top", "db")
    compose("up", "-d", "--scale", "web=2")
    compose("restart", "-t", "0", "web")
    assert len(compose("ps", "-q").split()) == 4
    compose("down", "-v", "-t", "0")
    assert compose("ps", "-q") == ""
    with here.client() as client:
        assert client.containers.list(all=True) == []
        assert client.volumes.list() == []
        assert {net.name for net in client.networks.list()} == {"bridge", "host", "none"}


def test_skopeo_reads_and_writes_the_daemon(here: Api, tmp_path: Path) -> None:
    need("skopeo", "skopeo")
    daemon, policy = here.url, "--insecure-policy"
    folder = tmp_path / "copy"
    run(here, "skopeo", policy, "copy", "--src-daemon-host", daemon,
        "docker-daemon:busybox:latest", f"dir:{folder}")  # fmt: skip
    assert json.loads((folder / "manifest.json").read_text())["layers"]
    run(here, "skopeo", policy, "copy", "--dest-daemon-host", daemon, f"dir:{folder}",
        "docker-daemon:copied:1")  # fmt: skip
    with here.client() as client:
        assert client.containers.run("copied:1", ["echo", "ran"], remove=True) == b"ran\n"
        client.images.remove("copied:1")
    found = json.loads(
        run(here, "skopeo", "inspect", "--daemon-host", daemon, "docker-daemon:busybox:latest")
    )
    assert found["Os"] == "linux"


POSTGRES = """
bin=$(echo /usr/lib/postgresql/*/bin)
own="setpriv --reuid postgres --regid postgres --clear-groups"
mkdir -p /data && chown postgres /data && cd /
echo "$POSTGRES_PASSWORD" > /tmp/password
$own $bin/initdb -D /data -U "$POSTGRES_USER" --pwfile=/tmp/password -A scram-sha-256 -N >/dev/null
echo 'host all all all scram-sha-256' >> /data/pg_hba.conf
echo "CREATE DATABASE $POSTGRES_DB" | $own $bin/postgres --single -D /data postgres >/dev/null
exec $own $bin/postgres -D /data -k /tmp -h '*' -c shared_buffers=16MB -c fsync=off
"""
RYUK = r"""
use IO::Socket::UNIX;
sub ask {
    my $sock = IO::Socket::UNIX->new(Peer => "/var/run/docker.sock") or die "no socket: $!";
    print $sock "$_[0] HTTP/1.0\r\nHost: ryuk\r\n\r\n"; local $/; my $all = <$sock>; $all;
}
my $label = "%7B%22label%22%3A%5B%22org.testcontainers.session-id%3D$ENV{SESSION}%22%5D%7D";
my $all = ask("GET /v1.41/containers/json?all=1&filters=$label");
while ($all =~ /"Id":"([0-9a-f]{64})"/g) { ask("DELETE /v1.41/containers/$1?force=1&v=1"); }
print "cleaned\n";
"""


def _ask_redis(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), timeout=30) as sock:
        sock.sendall(b"SET key value\r\nGET key\r\n")
        data = b""
        while not data.endswith(b"value\r\n"):
            piece = sock.recv(1000)
            if not piece:
                break
            data += piece
        return data


@pytest.fixture
def databases(here: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """testcontainers' core, pointed at us."""
    pytest.importorskip("testcontainers.core.container", reason="testcontainers is not installed")
    made = databases_archive()
    for name, value in here.environment().items():
        if name.startswith("DOCKER"):
            monkeypatch.setenv(name, value)
    from testcontainers.core import config, container

    monkeypatch.setattr(config.testcontainers_config, "ryuk_disabled", True)
    with here.client() as client, made.open("rb") as file:
        client.images.load(file)
    yield container
    with here.client() as client:
        for left in client.containers.list(all=True):
            left.remove(force=True, v=True)


def test_testcontainers_start_databases(here: Api, databases: Any) -> None:
    from testcontainers.community.postgres import PostgresContainer

    postgres = PostgresContainer(IMAGE, username="tester", password="secret", dbname="shop")
    with postgres.with_command(["bash", "-c", POSTGRES]) as running:
        port = int(running.get_exposed_port(5432))
        with socket.create_connection((running.get_container_host_ip(), port), timeout=30) as sock:
            sock.sendall(b"\x00\x00\x00\x08\x04\xd2\x16\x2f")  # SSLRequest: any answer will do
            assert sock.recv(1) in (b"N", b"S")
        query = ["psql", "-U", "tester", "-d", "shop", "-h", "127.0.0.1", "-qAtc"]
        script = "CREATE TABLE t (n int); INSERT INTO t VALUES (40), (2); SELECT sum(n) FROM t"
        done = running.exec(["env", "PGPASSWORD=secret", *query, script])
        assert (done.exit_code, done.output) == (0, b"42\n")
        assert b"ready to accept connections" in b"".join(running.get_logs())
    redis = databases.DockerContainer(IMAGE).with_exposed_ports(6379)
    redis.with_command(["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no"])
    redis.start()
    host, port = redis.get_container_host_ip(), int(redis.get_exposed_port(6379))
    until(lambda: b"Ready to accept" in b"".join(redis.get_logs()), "Redis is ready")
    assert _ask_redis(host, port) == b"+OK\r\n$5\r\nvalue\r\n"
    _clean_up(here, redis.get_wrapped_container().labels["org.testcontainers.session-id"])


def _clean_up(here: Api, session: str) -> None:
    """As Ryuk does, by a double: from inside a container that has the socket."""
    with here.client() as client:
        host = client.api.create_host_config(
            binds=[f"{here.path}:/var/run/docker.sock"], network_mode="none"
        )
        host["UsernsMode"] = "auto"  # root in there is nobody here, and may use the socket
        made = client.api.create_container(
            IMAGE, ["perl", "-e", RYUK], environment={"SESSION": session}, host_config=host
        )["Id"]
        client.api.start(made)
        client.api.wait(made)
        assert client.api.logs(made) == b"cleaned\n"
        client.api.remove_container(made)
        assert client.containers.list(all=True) == []


def test_docker_logs_in_with_tokens(here: Api, tmp_path: Path) -> None:
    with registry(tmp_path / "registry", auth="token") as running:
        assert running.tokens is not None
        running.tokens.gives_identity = True
        refused = here.cli("login", "-u", USER, "-p", "wrong", running.host)
        assert refused.code == 1
        assert "refuses the credentials" in refused.err
        here.cli("login", "-u", USER, "-p", PASSWORD, running.host).ok()
        config = here.folder / "client" / "config.json"
        kept = json.loads(config.read_text())["auths"][running.host]
        assert kept["identitytoken"] == running.tokens.identity_token
        name = f"{running.host}/pushed:1"
        here.cli("tag", "busybox", name).ok()
        here.cli("push", name).ok()
        here.cli("rmi", name).ok()
        here.cli("pull", name).ok()
        here.cli("rmi", name).ok()
        here.cli("logout", running.host).ok()
        assert here.cli("pull", name).code == 1


def test_builds_pull_with_the_credentials_of_their_client(here: Api, tmp_path: Path) -> None:
    with registry(tmp_path / "registry", auth="basic") as running:
        name = f"{running.host}/base:1"
        here.cli("login", "-u", USER, "-p", PASSWORD, running.host).ok()
        here.cli("tag", "busybox", name).ok()
        here.cli("push", name).ok()
        here.cli("rmi", name).ok()
        dockerfile = f"FROM {name}\nRUN echo made > /x\n".encode()
        here.cli("build", "-t", "from-private", "-", stdin=dockerfile).ok()
        assert here.cli("run", "--rm", "from-private", "cat", "/x").ok().out == "made\n"
        here.cli("rmi", "from-private").ok()
        with here.client() as client:
            if name in {tag for image in client.images.list() for tag in image.tags}:
                here.cli("rmi", name).ok()
        here.cli("logout", running.host).ok()
        refused = here.cli("build", "--no-cache", "-", stdin=dockerfile)
        assert refused.code != 0
        assert "denied" in refused.err.lower() or "authentication" in refused.err.lower()


COLLECTION = Path("/usr/lib/python3/dist-packages/ansible_collections/community/docker")
PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - community.docker.docker_network: {name: play}
    - community.docker.docker_volume: {volume_name: played}
    - community.docker.docker_container:
        name: played
        image: busybox:latest
        pull: false
        command: ["sleep", "1000"]
        stop_signal: SIGKILL
        networks: [{name: play}]
        volumes: ["played:/v"]
        env: {A: b}
        recreate: false
      register: first
    - community.docker.docker_container:
        name: played
        image: busybox:latest
        pull: false
        command: ["sleep", "1000"]
        stop_signal: SIGKILL
        networks: [{name: play}]
        volumes: ["played:/v"]
        env: {A: b}
      register: second
    - ansible.builtin.assert: {that: [first is changed, second is not changed]}
    - community.docker.docker_container_exec:
        {container: played, argv: ["sh", "-c", "echo $A; cat > /v/in"], stdin: typed}
      register: ran
    - ansible.builtin.assert: {that: ["ran.stdout == 'b'"]}
    - community.docker.docker_container_info: {name: played}
      register: info
    - ansible.builtin.assert: {that: [info.exists, info.container.State.Running]}
    - community.docker.docker_container: {name: played, state: absent}
    - community.docker.docker_volume: {volume_name: played, state: absent}
    - community.docker.docker_network: {name: play, state: absent}
"""


def test_ansible_manages_containers(here: Api, tmp_path: Path) -> None:
    need("ansible-playbook", "ansible")
    if not COLLECTION.exists():
        pytest.skip(f"{COLLECTION} is not here (apt-get install ansible)")
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    said = run(here, "ansible-playbook", "-i", "localhost,", "-e",
               "ansible_python_interpreter=/usr/bin/python3", str(playbook),
               ANSIBLE_LOCALHOST_WARNING="False")  # fmt: skip
    assert "failed=0" in said
    with here.client() as client:
        assert client.containers.list(all=True) == []
