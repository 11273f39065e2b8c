"""What is ours in the API: boundaries, extensions, TLS, WebSockets, builds, limits of time."""

import http.client
import io
import json
import os
import socket
import ssl
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bulkhead.api import websocket
from tests.helpers.api_rig import CLI, Api, api, archive, newer
from tests.helpers.engine_rig import Rig
from tests.helpers.images import has_busybox
from tests.helpers.registry import need
from tests.helpers.residue import residue
from tests.helpers.waiting import until

DOCS = Path(__file__).resolve().parents[2] / "docs"
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    if os.geteuid() != 0:
        pytest.skip("engines want root")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    folder = tmp_path_factory.mktemp("own")
    with residue(str(folder)), api(folder) as made:
        yield made


class Unix(http.client.HTTPConnection):
    """HTTP over our socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def ask(here: Api, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and decoded body."""
    connection = Unix(here.path)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else None
    finally:
        connection.close()


def test_the_boundary_is_named_by_runtime_or_label(here: Api) -> None:
    label = {"bulkhead.boundary": "container"}
    for body, status in (
        ({"HostConfig": {"Runtime": "container"}}, 201),
        ({"HostConfig": {"Runtime": "runc"}, "Labels": label}, 201),
        ({"Labels": label}, 201),
        ({"HostConfig": {"Runtime": "sandbox"}, "Labels": label}, 400),
        ({"HostConfig": {"Runtime": "nope"}}, 400),
        ({"Labels": {"bulkhead.boundary": "nope"}}, 400),
    ):
        found, answer = ask(here, "POST", "/containers/create", {"Image": "busybox", **body})
        assert found == status, answer
        if status == 201:
            assert (
                ask(here, "GET", f"/containers/{answer['Id']}/json")[1]["Boundary"] == "container"
            )
            assert ask(here, "DELETE", f"/containers/{answer['Id']}")[0] == 204


def test_extensions_answer_as_their_description_says(here: Api) -> None:
    described = yaml.safe_load((DOCS / "api-extensions.yaml").read_text())
    status, reports = ask(here, "GET", "/v1.50/bulkhead/boundaries")
    assert status == 200
    required = described["components"]["schemas"]["Report"]["required"]
    assert {"container", "sandbox", "microvm"} <= {report["Name"] for report in reports}
    assert all(set(required) <= set(report) for report in reports)
    status, checks = ask(here, "GET", "/bulkhead/doctor")
    assert status == 200
    assert {check["status"] for check in checks} <= {"ok", "warn", "missing"}
    status, plan = ask(here, "POST", "/bulkhead/containers/plan", {"Image": "busybox"})
    assert status == 200
    assert plan["steps"]
    assert ask(here, "GET", "/bulkhead/containers/absent/explain")[0] == 404
    with here.client() as client:
        made = client.containers.run("busybox", ["sleep", "1000"], detach=True)
        status, explained = ask(here, "GET", f"/bulkhead/containers/{made.id}/explain")
        assert status == 200
        assert explained
        made.remove(force=True)
    from bulkhead.api import service
    from bulkhead.api.routes import ROUTES

    assert service.PARTS
    served = {route.path for route in ROUTES.all if route.path.startswith("/bulkhead/")}
    assert served == set(described["paths"])


def test_bodies_are_read_as_go_reads_them(here: Api) -> None:
    body = {
        "image": "busybox", "CMD": ["true"], "Unknown": 1, "Env": None,
        "hostConfig": {"memory": 67108864.0, "NotThere": {}, "PortBindings": None, "Init": None},
    }  # fmt: skip
    status, made = ask(here, "POST", "/containers/create", body)
    assert status == 201, made
    _, found = ask(here, "GET", f"/containers/{made['Id']}/json")
    assert found["HostConfig"]["Memory"] == 64 << 20
    assert found["Config"]["Cmd"] == ["true"]
    ask(here, "DELETE", f"/containers/{made['Id']}")


def test_a_websocket_carries_both_ways(here: Api) -> None:
    with here.client() as client:
        made = client.containers.create(
            "busybox", ["sh", "-c", "read x; echo got $x"], stdin_open=True
        )
        made.start()
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(here.path))
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        sock.sendall(
            f"GET /containers/{made.id}/attach/ws?stream=1&stdin=1&stdout=1 HTTP/1.1\r\n"
            f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(1)
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in data  # RFC 6455, section 1.3
        mask = b"\x01\x02\x03\x04"
        payload = bytes(a ^ mask[at % 4] for at, a in enumerate(b"typed\n"))
        sock.sendall(bytes((0x82, 0x80 | len(payload))) + mask + payload)
        data = b""
        while piece := sock.recv(1000):
            data += piece
        sock.close()
        assert data == websocket.frame(2, b"got typed\n") + websocket.frame(8, b"\x03\xe8")
        made.remove(force=True)
        assert ask(here, "GET", f"/containers/{made.id}/attach/ws")[0] == 404


def test_builds(here: Api) -> None:
    dockerfile = b'FROM busybox\nARG who=none\nRUN echo built by $who > /x\nCMD ["cat", "/x"]\n'
    with here.client() as client:
        image, lines = client.images.build(
            fileobj=io.BytesIO(dockerfile), tag="built:1", buildargs={"who": "us"}
        )
        assert any("Step 1/" in line.get("stream", "") for line in lines)
        assert image.tags == ["built:1"]
        assert client.containers.run("built:1", remove=True) == b"built by us\n"
        client.images.remove("built:1")
        assert "SpaceReclaimed" in client.images.prune_builds()
    done = here.cli("build", "-", stdin=b"FROM busybox\nRUN exit 3\n")
    assert done.code == 3
    assert ask(here, "POST", "/session")[0] == 501
    assert ask(here, "POST", "/build?version=2")[0] == 501


def test_links(here: Api) -> None:
    here.cli("run", "-d", "--name", "linked", "busybox", "sleep", "1000").ok()
    script = "grep -c other /etc/hosts; ping -c1 other >/dev/null && echo seen"
    link = ("--name", "linker", "--link", "linked:other")
    said = here.cli("run", *link, "busybox", "sh", "-c", script).ok()
    assert said.out == "1\nseen\n"
    shown = here.cli("inspect", "-f", "{{json .HostConfig.Links}}", "linker").ok()
    assert shown.out == '["/linked:/linker/other"]\n'
    done = here.cli("run", "--rm", "--link", "nope", "busybox", "true")
    assert "could not get container for nope: No such container: nope" in done.err
    body = {"Image": "busybox", "HostConfig": {"NetworkMode": "host", "Links": ["linked"]}}
    status, answer = ask(here, "POST", "/containers/create", body)
    assert (status, "can't be used with links" in answer["message"]) == (400, True)
    here.cli("rm", "-f", "linked").ok()
    here.cli("create", "--name", "linked", "busybox", "true").ok()
    done = here.cli("start", "linker")
    assert "Cannot link to a non running container: /linked AS /linker/other" in done.err
    here.cli("rm", "linked", "linker").ok()
    # On a network of one's own a link is a name that only the linking one has.
    here.cli("network", "create", "mine").ok()
    try:
        for name in ("one", "two"):
            here.cli("run", "-d", "--name", name, "--network", "mine", "--link", "one:own",
                     "busybox", "sleep", "1000").ok()  # fmt: skip
        here.cli("run", "-d", "--name", "three", "--network", "mine", "busybox", "sleep", "9").ok()
        here.cli("exec", "two", "ping", "-c1", "-W9", "own").ok()
        assert here.cli("exec", "three", "nslookup", "own").code == 1
    finally:
        here.cli("rm", "-f", "one", "two", "three").ok()
        here.cli("network", "rm", "mine").ok()


def test_networks_that_cannot_be(here: Api) -> None:
    for body, said in (
        ({"IPAM": {"Options": [None]}}, "invalid JSON"),
        ({"IPAM": {"Config": [7]}}, "invalid JSON"),
        ({"IPAM": {"Config": [{"Subnet": 3}]}}, "invalid JSON"),
        ({"IPAM": {"Driver": "other"}}, "IPAM driver other is not supported"),
        ({"ConfigFrom": {"Network": "other"}}, "ConfigFrom is not supported"),
        ({"ConfigOnly": True}, "ConfigOnly networks are not supported"),
        ({"Ingress": True}, "Ingress networks are not supported"),
    ):
        status, answer = ask(here, "POST", "/networks/create", {"Name": "never", **body})
        assert (status, said in answer["message"]) == (400, True), answer


def test_another_version_of_the_client(here: Api) -> None:
    for program in (CLI, newer("docker")):
        done = here.cli("run", "--rm", "-i", "busybox", "cat", stdin=b"typed", program=program)
        assert (done.code, done.out) == (0, "typed")
        assert "API version:" in here.cli("version", program=program).ok().out


def _certificates(folder: Path) -> None:
    """An authority, a server's certificate, a client's, and a stranger's."""

    def openssl(*argv: str) -> None:
        subprocess.run(["openssl", *argv], cwd=folder, check=True, capture_output=True)

    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("ca", "stranger"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}-key.pem",
                "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2")  # fmt: skip
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}-key.pem", "-out",
                f"{name}.csr", "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca-key.pem",
                "-CAcreateserial", "-out", f"{name}.pem", "-days", "2",
                "-extfile", "ext")  # fmt: skip


class Tls(Rig):
    """An engine that serves TCP on a port of the kernel's choice."""

    def command(self) -> list[str]:
        folder = self.root.parent
        return [
            *super().command(), "--host", "tcp://127.0.0.1:0", "--tlsverify",
            "--tlscacert", f"{folder}/ca.pem", "--tlscert", f"{folder}/server.pem",
            "--tlskey", f"{folder}/server-key.pem",
        ]  # fmt: skip

    def port(self) -> int:
        assert self.process is not None
        inodes = set()
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            link = os.readlink(f"/proc/{self.process.pid}/fd/{name}")
            inodes.add(link.removeprefix("socket:[").removesuffix("]"))
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                return int(fields[1].partition(":")[2], 16)
        raise AssertionError("the engine listens on no port")


def test_tcp_needs_certificates_of_both_sides(tmp_path: Path) -> None:
    need("openssl")
    if os.geteuid() != 0:
        pytest.skip("engines want root")
    _certificates(tmp_path)
    rig = Tls(tmp_path / "root", tmp_path / "run")
    with residue(str(tmp_path)):
        rig.start()
        try:
            port = rig.port()
            for name, welcome in (("client", True), ("stranger", False)):
                context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
                context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}-key.pem")
                assert _pings(port, context) is welcome
            assert not _pings(port, ssl.create_default_context(cafile=str(tmp_path / "ca.pem")))
            cli = [CLI, "--host", f"tcp://127.0.0.1:{port}", "--tlsverify", "--tlscacert",
                   "ca.pem", "--tlscert", "client.pem", "--tlskey", "client-key.pem"]  # fmt: skip
            for command, said in (
                (["load", "-q", "-i", str(archive(tmp_path))], b"Loaded image: busybox:latest\n"),
                (["run", "--rm", "-i", "busybox", "sh", "-c", "cat; echo end"], b"typed\nend\n"),
            ):
                done = subprocess.run([*cli, *command], cwd=tmp_path, capture_output=True,
                                      timeout=TIMEOUT_S, input=b"typed\n")  # fmt: skip
                assert (done.returncode, done.stdout) == (0, said), done.stderr
        finally:
            rig.end()


def _pings(port: int, context: ssl.SSLContext) -> bool:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/_ping")
        return connection.getresponse().read() == b"OK"
    except (ssl.SSLError, OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def test_tcp_without_certificates_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "root", tmp_path / "run")
    command = [*rig.command(), "--host", "tcp://127.0.0.1:0"]
    done = subprocess.run(command, env=rig.environment(), capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert b"without mutual TLS" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_large_archive_goes_in_and_out(here: Api) -> None:
    data = os.urandom(1 << 20) * 24
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("large")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    with here.client() as client:
        made = client.containers.create("busybox", ["true"])
        made.put_archive("/tmp", buffer.getvalue())
        stream, _ = made.get_archive("/tmp/large")
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
            file = tar.extractfile("large")
            assert file is not None
            assert file.read() == data
        made.remove()
    until(lambda: here.descriptors() < 40, "pipes are closed")
