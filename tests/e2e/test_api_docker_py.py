"""docker-py against our socket: every public method of what it offers for one machine."""

import inspect
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError, ContainerError, ImageNotFound, NotFound
from docker.models import containers, images, networks, volumes
from docker.types import IPAMConfig, IPAMPool, Mount, Ulimit

from tests.helpers.api_rig import Api, api
from tests.helpers.images import has_busybox
from tests.helpers.registry import registry
from tests.helpers.residue import residue
from tests.helpers.waiting import until

SLEEP = ["sleep", "1000"]
pytestmark = [
    # docker-py leaves responses of its streams to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    if os.geteuid() != 0:
        pytest.skip("engines want root")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    folder = tmp_path_factory.mktemp("docker-py")
    with residue(str(folder)), api(folder) as made:
        yield made


@pytest.fixture
def client(here: Api) -> Iterator[Any]:
    with here.client() as made:
        yield made
        for left in made.containers.list(all=True):
            left.remove(force=True, v=True)


def tar_of(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_the_client(client: Any) -> None:
    assert client.ping() is True
    assert client.version()["ApiVersion"] == "1.50"
    info = client.info()
    assert info["OSType"] == "linux"
    assert info["Swarm"]["LocalNodeState"] == "inactive"
    usage = client.df()
    assert usage["LayersSize"] > 0
    assert [image["RepoTags"] for image in usage["Images"]] == [["busybox:latest"]]
    assert client.plugins.list() == []
    with pytest.raises(APIError) as error:
        client.nodes.list()
    assert error.value.status_code == 503


def test_run(client: Any) -> None:
    assert client.containers.run("busybox", ["echo", "hi"], remove=True) == b"hi\n"
    both = client.containers.run(
        "busybox", ["sh", "-c", "echo out; echo err >&2"], stderr=True, remove=True
    )
    assert sorted(both.split()) == [b"err", b"out"]
    with pytest.raises(ContainerError) as failed:
        client.containers.run("busybox", ["sh", "-c", "echo no >&2; exit 3"], remove=True)
    assert failed.value.exit_status == 3
    with pytest.raises(ImageNotFound):
        client.api.inspect_image("absent")
    with pytest.raises(APIError, match="executable file not found"):
        client.containers.run("busybox", ["nope"], remove=True)
    (left,) = client.containers.list(all=True)
    assert left.status == "created"


def test_the_life_of_a_container(client: Any) -> None:
    made = client.containers.create(
        "busybox", SLEEP, name="life", labels={"a": "b"}, environment={"X": "y"},
        ports={"80/tcp": ("127.0.0.1", None)}, mem_limit="64m", working_dir="/tmp", tty=True,
        ulimits=[Ulimit(name="nofile", soft=100, hard=200)], cap_drop=["NET_RAW"],
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 2}, read_only=False,
        extra_hosts={"one": "1.2.3.4"}, tmpfs={"/t": "size=1m"}, sysctls={"net.core.somaxconn": 99},
        healthcheck={"test": ["CMD", "true"], "interval": 10**9, "retries": 1}, init=True,
        log_config={"type": "json-file", "config": {"max-size": "1m"}}, stop_signal="SIGKILL",
    )  # fmt: skip
    assert made.status == "created"
    assert made.health == "unknown"
    made.start()
    made.reload()
    assert made.status == "running"
    assert made.name == "life"
    assert made.labels == {"a": "b"}
    assert made.short_id == made.id[:12]
    assert made.image.tags == ["busybox:latest"]
    assert made.ports["80/tcp"][0]["HostIp"] == "127.0.0.1"
    assert client.api.port(made.id, 80)[0]["HostPort"]
    assert client.containers.get("life").id == made.id
    assert [one.id for one in client.containers.list(filters={"label": "a=b"})] == [made.id]
    assert client.containers.list(filters={"status": "exited"}) == []
    assert any("sleep" in " ".join(row) for row in made.top()["Processes"])
    made.resize(height=30, width=100)
    made.pause()
    made.reload()
    assert made.status == "paused"
    made.unpause()
    made.rename("renamed")
    made.reload()
    assert made.name == "renamed"
    made.update(mem_limit="32m", memswap_limit="64m")
    made.reload()
    assert made.attrs["HostConfig"]["Memory"] == 32 << 20
    made.restart(timeout=0)
    made.kill("SIGKILL")
    assert made.wait()["StatusCode"] == 137
    made.start()
    made.stop(timeout=0)
    made.remove(v=True)
    with pytest.raises(NotFound, match="No such container"):
        made.reload()
    with pytest.raises(NotFound):
        client.containers.get("renamed")


def test_waiting(client: Any) -> None:
    made = client.containers.create("busybox", ["sh", "-c", "exit 4"], auto_remove=True)
    codes: list[Any] = []
    waiting = threading.Thread(target=lambda: codes.append(made.wait(condition="removed")))
    waiting.start()
    made.start()
    waiting.join(60)
    assert codes == [{"StatusCode": 4}]


def test_output(client: Any) -> None:
    script = "echo one; echo two >&2; cat; exit 0"
    made = client.containers.create("busybox", ["sh", "-c", script], stdin_open=True)
    made.start()
    connected = made.attach_socket(params={"stdin": 1, "stream": 1, "stdout": 1, "stderr": 1})
    raw: socket.socket = connected._sock
    raw.sendall(b"typed\n")
    raw.shutdown(socket.SHUT_WR)
    until(lambda: b"typed" in made.logs(), "what was typed is logged")
    made.stop(timeout=0)
    connected.close()
    assert made.logs(stdout=True, stderr=False) == b"one\ntyped\n"
    assert made.logs(stdout=False, stderr=True) == b"two\n"
    assert made.logs(stderr=False, tail=1) == b"typed\n"
    assert b"Z one" in made.logs(timestamps=True)
    assert sorted(made.logs(stream=True, follow=True)) == [b"one\n", b"two\n", b"typed\n"]
    assert b"one" in made.attach(stdout=True, stderr=False, logs=True, stream=False)
    follower = client.containers.create("busybox", ["sh", "-c", "echo live; echo odd >&2"])
    streaming = follower.attach(stream=True, logs=False, demux=True)
    follower.start()
    seen = list(streaming)
    assert (b"live\n", None) in seen
    assert (None, b"odd\n") in seen


def test_stats(client: Any) -> None:
    made = client.containers.run("busybox", SLEEP, detach=True)
    once = made.stats(stream=False)
    assert once["cpu_stats"]["cpu_usage"]["total_usage"] > 0
    assert once["precpu_stats"]["cpu_usage"]["total_usage"] > 0
    assert once["name"] == f"/{made.name}"
    streaming = made.stats(decode=True)
    assert next(streaming)["memory_stats"]
    streaming.close()


def test_files(client: Any, tmp_path: Path) -> None:
    made = client.containers.run("busybox", SLEEP, detach=True)
    assert made.put_archive("/tmp", tar_of("put", b"content"))
    stream, found = made.get_archive("/tmp/put")
    assert found["name"] == "put"
    assert found["size"] == 7
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
        file = tar.extractfile("put")
        assert file is not None
        assert file.read() == b"content"
    with pytest.raises(NotFound):
        made.get_archive("/tmp/absent")
    assert {"Path": "/tmp/put", "Kind": 1} in made.diff()
    with tarfile.open(fileobj=io.BytesIO(b"".join(made.export()))) as tar:
        assert "tmp/put" in [name.removeprefix("./") for name in tar.getnames()]
    image = made.commit("committed", tag="1", message="said", author="me", changes="ENV A=b")
    assert image.tags == ["committed:1"]
    assert "A=b" in image.attrs["Config"]["Env"]
    assert client.containers.run("committed:1", ["cat", "/tmp/put"], remove=True) == b"content"
    client.images.remove("committed:1")


def test_exec(client: Any) -> None:
    made = client.containers.run("busybox", SLEEP, detach=True)
    assert made.exec_run(["echo", "in"]).output == b"in\n"
    assert made.exec_run(["sh", "-c", "exit 6"]).exit_code == 6
    split = made.exec_run(["sh", "-c", "echo o; echo e >&2"], demux=True)
    assert split.output == (b"o\n", b"e\n")
    assert made.exec_run(["pwd"], workdir="/tmp", user="5", environment={"A": "b"}).output
    assert b"".join(made.exec_run(["echo", "s"], stream=True).output) == b"s\n"
    assert made.exec_run(["tty"], tty=True).output.startswith(b"/dev/pts/")
    assert not made.exec_run(["true"], detach=True).output
    low = client.api
    created = low.exec_create(made.id, ["cat"], stdin=True, tty=False)
    connected = low.exec_start(created["Id"], socket=True)
    raw: socket.socket = connected._sock
    raw.sendall(b"echoed")
    raw.shutdown(socket.SHUT_WR)
    data = b""
    while piece := raw.recv(1000):
        data += piece
    connected.close()
    assert data == b"\x01\0\0\0\0\0\0\x06echoed"
    assert low.exec_inspect(created["Id"])["ExitCode"] == 0
    terminal = low.exec_create(made.id, ["sleep", "5"], tty=True)
    connected = low.exec_start(terminal["Id"], tty=True, socket=True)
    until(lambda: low.exec_inspect(terminal["Id"])["Running"], "the exec runs")
    low.exec_resize(terminal["Id"], height=10, width=20)
    connected.close()
    with pytest.raises(APIError, match="already"):
        low.exec_start(created["Id"])
    with pytest.raises(NotFound, match="No such exec instance"):
        low.exec_inspect("absent")


def test_images(client: Any, tmp_path: Path) -> None:
    image = client.images.get("busybox")
    assert image.short_id == image.id[:19]
    assert image.labels == {}
    assert len(image.history()) >= 1
    assert image.tag("other", tag="2")
    image.reload()
    assert sorted(image.tags) == ["busybox:latest", "other:2"]
    saved = b"".join(image.save(named="other:2"))
    client.images.remove("other:2")
    assert [loaded.tags for loaded in client.images.load(saved)] == [["busybox:latest", "other:2"]]
    both = client.api._get(
        client.api._url("/images/get"), params={"names": ["busybox:latest", "other:2"]}
    ).content
    assert len(both) >= len(saved)
    assert [one.id for one in client.images.list("other")] == [image.id]
    assert client.images.list(filters={"dangling": True}) == []
    client.images.remove("other:2")
    with pytest.raises(ImageNotFound):
        client.images.get("other:2")
    assert client.images.prune()["ImagesDeleted"] is None
    imported = client.api.import_image_from_data(
        tar_of("file", b"data"), repository="flat", tag="1", changes=["ENV A=b"]
    )
    assert "sha256" in imported
    client.images.get("flat:1").remove()
    with pytest.raises(APIError):
        client.images.search("busybox:nothing/of that kind")


def test_a_registry(client: Any, tmp_path: Path) -> None:
    with registry(tmp_path) as server:
        login = client.login("user", "secret", registry=server.host, reauth=True)
        assert login["Status"] == "Login Succeeded"
        name = f"{server.host}/some/where"
        client.images.get("busybox").tag(name, tag="1")
        lines = list(client.images.push(name, tag="1", stream=True, decode=True))
        assert any("digest: sha256:" in line.get("status", "") for line in lines)
        assert not any("error" in line for line in lines)
        data = client.images.get_registry_data(f"{name}:1")
        assert data.id.startswith("sha256:")
        assert data.has_platform("linux")
        client.images.remove(f"{name}:1")
        assert client.images.pull(name, tag="1").tags
        assert data.pull().id
        assert client.images.pull(name, all_tags=True)
        with pytest.raises(NotFound):
            client.images.pull(name, tag="absent")
        client.images.remove(f"{name}:1", force=True)


def test_networks(client: Any) -> None:
    pool = IPAMPool(subnet="10.78.0.0/24", gateway="10.78.0.1")
    made = client.networks.create(
        "net", driver="bridge", labels={"l": "1"}, internal=True,
        ipam=IPAMConfig(pool_configs=[pool]), check_duplicate=True,
    )  # fmt: skip
    assert made.name == "net"
    assert made.short_id
    one = client.containers.run("busybox", SLEEP, detach=True, network="net", name="one")
    two = client.containers.run("busybox", SLEEP, detach=True, name="two")
    made.connect(two, aliases=["second"], ipv4_address="10.78.0.77")
    made.reload()
    assert {container.name for container in made.containers} == {"one", "two"}
    assert one.exec_run(["ping", "-c1", "-W5", "second"]).exit_code == 0
    two.reload()
    found = two.attrs["NetworkSettings"]["Networks"]["net"]
    assert found["IPAddress"] == "10.78.0.77"
    made.disconnect(two)
    made.disconnect(one, force=True)
    assert [net.name for net in client.networks.list(names=["net"])] == ["net"]
    assert client.networks.get("net").attrs["Internal"] is True
    with pytest.raises(APIError) as error:
        client.networks.create("net")
    assert error.value.status_code == 409
    made.remove()
    client.networks.create("unused")
    assert client.networks.prune()["NetworksDeleted"] == ["unused"]
    with pytest.raises(NotFound, match="network absent not found"):
        client.networks.get("absent")


def test_volumes(client: Any) -> None:
    made = client.volumes.create("vol", driver="local", labels={"l": "1"})
    assert made.name == "vol"
    assert made.short_id == "vol"
    mount = Mount("/v", "vol", type="volume")
    writing = ["sh", "-c", "echo kept > /v/f"]
    client.containers.run("busybox", writing, mounts=[mount], remove=True)
    binds = {"vol": {"bind": "/v", "mode": "ro"}}
    kept = client.containers.run("busybox", ["cat", "/v/f"], volumes=binds, remove=True)
    assert kept == b"kept\n"
    made.reload()
    assert [one.name for one in client.volumes.list(filters={"label": "l"})] == ["vol"]
    assert client.volumes.get("vol").attrs["Scope"] == "local"
    made.remove(force=True)
    with pytest.raises(NotFound, match="no such volume"):
        client.volumes.get("vol")
    client.api.create_volume()
    assert len(client.volumes.prune()["VolumesDeleted"]) == 1


def test_events(client: Any) -> None:
    since = int(time.time()) - 1
    client.containers.run("busybox", ["true"], name="seen", remove=True)
    filters = {"container": "seen", "event": ["create", "start", "die", "destroy"]}
    past = client.events(since=since, until=int(time.time()) + 1, filters=filters, decode=True)
    assert [event["Action"] for event in past] == ["create", "start", "die", "destroy"]
    live = client.events(decode=True, filters={"type": "volume"})
    client.volumes.create("evented")
    assert next(live)["Actor"]["ID"] == "evented"
    live.close()
    client.volumes.get("evented").remove()


def test_older_versions_of_the_api(here: Api) -> None:
    for version in ("1.40", "1.41", "1.44"):
        with here.client(version) as old:
            assert old.containers.run("busybox", ["echo", "old"], remove=True) == b"old\n"
            image = old.images.list()[0].attrs
            assert ("VirtualSize" in image) == (version < "1.44")
    with here.client("1.24") as ancient:
        assert ancient.api.get(f"{ancient.api.base_url}/v1.20/info").status_code == 400
        assert ancient.info()["Driver"]
    with here.client("1.99") as future, pytest.raises(APIError, match="too new"):
        future.containers.list()


ELSEWHERE = {"build": "test_api_own", "prune_builds": "test_api_own", "collection": ""}
"""Methods that other tests try, and names that are none."""


def test_every_public_method_is_tried() -> None:
    text = Path(__file__).read_text()
    missing = []
    for module, names in (
        (containers, ("Container", "ContainerCollection")),
        (images, ("Image", "ImageCollection", "RegistryData")),
        (networks, ("Network", "NetworkCollection")),
        (volumes, ("Volume", "VolumeCollection")),
    ):
        for name in names:
            for method, _ in inspect.getmembers(getattr(module, name), inspect.isfunction):
                public = not method.startswith("_") and method not in {"prepare_model"}
                if public and f".{method}(" not in text and method not in ELSEWHERE:
                    missing.append(f"{name}.{method}")
    assert not missing
