"""What builds promise beside their result: cache, errors, arguments, secrets, cancellation."""

import functools
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.culling import kill
from tests.helpers.depot import depot
from tests.helpers.images import has_busybox
from tests.helpers.installation import Done, Installation, installation
from tests.helpers.waiting import until

pytestmark = pytest.mark.skipif(not has_busybox(), reason="busybox is not installed here")


class Workshop:
    """An installation with busybox, and a context."""

    def __init__(self, here: Installation, folder: Path) -> None:
        self.here = here
        self.context = folder / "context"
        self.context.mkdir()

    def write(self, **files: str) -> None:
        """Files of the context; `__` in a name is a dot, `_0_` a slash."""
        for name, text in files.items():
            place = self.context / name.replace("_0_", "/").replace("__", ".")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)

    def build(self, *argv: str, dockerfile: str = "") -> Done:
        """`bulkhead build … CONTEXT`."""
        if dockerfile:
            (self.context / "Dockerfile").write_text(dockerfile)
        return self.here.cli(
            "build", "--progress", "plain", *argv, str(self.context), native=True, server=True
        )

    def __call__(self, *argv: str, stdin: bytes = b"") -> Done:
        return self.here.cli(*argv, native=True, server=True, stdin=stdin)

    def run(self, *argv: str) -> str:
        """What a container says."""
        return self("run", "--rm", *argv).ok().out


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("builds")
    with installation(folder / "here") as here:
        here.load_busybox(folder)
        yield here


@pytest.fixture
def shop(installed: Installation, tmp_path: Path) -> Workshop:
    return Workshop(installed, tmp_path)


def cached(done: Done) -> list[str]:
    """Texts of the steps that came from the cache."""
    names = {}
    found = []
    for line in done.err.splitlines():
        number, _, rest = line.partition(" ")
        if rest.startswith("["):
            names[number] = rest.partition("] ")[2]
        elif rest == "CACHED":
            found.append(names[number])
    return found


def test_the_cache_follows_contents(shop: Workshop) -> None:
    shop.write(a="1", b="1")
    text = (
        "FROM busybox\nCOPY a /a\nRUN echo $(cat /a) > /c\nCOPY b /b\n"
        "RUN cat /proc/sys/kernel/random/uuid > /d\n"
    )
    shop.build("-t", "cache", dockerfile=text).ok()
    made = shop.run("cache", "cat", "/d")
    os.utime(shop.context / "a", (1, 1))
    assert len(cached(shop.build("-t", "cache").ok())) == 4
    assert shop.run("cache", "cat", "/d") == made
    shop.write(b="2")
    assert cached(shop.build("-t", "cache").ok()) == ["COPY a /a", "RUN echo $(cat /a) > /c"]
    assert shop.run("cache", "cat", "/d") != made
    shop.write(b="1")
    assert len(cached(shop.build("-t", "cache").ok())) == 4
    assert shop.run("cache", "cat", "/d") == made
    assert cached(shop.build("-t", "cache", "--no-cache").ok()) == []
    assert shop.run("cache", "cat", "/d") != made


def test_only_arguments_that_are_declared_matter(shop: Workshop) -> None:
    text = "FROM busybox\nRUN echo before > /x\nARG V=1\nRUN echo $V > /v\n"
    shop.build("-t", "args", dockerfile=text).ok()
    again = shop.build("-t", "args", "--build-arg", "V=2", "--build-arg", "W=3").ok()
    assert cached(again) == ["RUN echo before > /x"]
    assert "[W] were not consumed" in again.err
    assert shop.run("args", "cat", "/v") == "2\n"
    proxied = shop.build("-t", "args", "--build-arg", "http_proxy=p", "--build-arg", "V=2").ok()
    assert len(cached(proxied)) == 2


def test_errors_show_their_place(shop: Workshop) -> None:
    text = "FROM busybox\nRUN echo out && \\\n  exit 3\n"
    done = shop.build(dockerfile=text).failed(1, "Dockerfile:2:1: ", "non-zero code: 3")
    assert "   2 | RUN echo out && \\\n" in done.err
    assert "out" in done.err
    shop.build(dockerfile="FROM busybox\nCOPY gone /\n").failed(1, "Dockerfile:2:6: ", "not found")
    shop.build(dockerfile="FROM busybox\nUSER nobody9\nRUN id\n").failed(
        1, "Dockerfile:3:1: ", "unable to find user nobody9"
    )
    shop.build(dockerfile='FROM busybox\nRUN ["/nothing"]\n').failed(1, "/nothing")
    shop.build("-f", "/nowhere/Dockerfile").failed(1, "/nowhere/Dockerfile")
    assert shop("ps", "-aq").ok().out == ""


def test_parallel_stages_fail_as_one(shop: Workshop) -> None:
    text = (
        "FROM busybox AS slow\nRUN sleep 1000\nFROM busybox AS bad\nRUN sleep 0.2; exit 9\n"
        "FROM busybox\nCOPY --from=slow /etc /a\nCOPY --from=bad /etc /b\n"
    )
    shop.build(dockerfile=text).failed(1, "Dockerfile:4:1: ", "code: 9")
    until(lambda: shop("ps", "-aq").ok().out == "", "the slow step is killed")


def test_the_context_is_never_left(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("outside")
    (shop.context / "up").symlink_to("../secret")
    (shop.context / "etc").symlink_to("/usr/../etc-of-the-context")
    for source in ("up", "etc/hostname", "../secret", "etc/../../secret"):
        shop.build(dockerfile=f"FROM busybox\nCOPY {source} /x\n").failed(1, "not found")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("Dockerfile", b"FROM busybox\nCOPY . /x\n"), ("../evil", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shop("build", "-", stdin=buffer.getvalue()).failed(1, "leads out of the archive")


def test_contexts_of_all_kinds(shop: Workshop) -> None:
    alone = shop("build", "-q", "-", stdin=b"FROM busybox\nRUN echo alone > /x\n").ok().line
    assert shop.run(alone, "cat", "/x") == "alone\n"
    shop("build", "-", stdin=b"FROM busybox\nCOPY a /\n").failed(1, "no build context")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in (("d/File", b"FROM busybox\nCOPY a /a\n"), ("a", b"packed\n")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    packed = shop("build", "-q", "-f", "d/File", "-", stdin=buffer.getvalue()).ok().line
    assert shop.run(packed, "cat", "/a") == "packed\n"


def test_metadata(shop: Workshop) -> None:
    text = (
        'FROM busybox AS base\nLABEL a=1 b=2\nCMD ["old"]\n'
        'FROM base\nENTRYPOINT ["/bin/echo"]\nENV E="x y"\nEXPOSE 80 90-91/udp\nVOLUME /v\n'
        "USER 5:6\nWORKDIR /w\nWORKDIR sub\nSTOPSIGNAL SIGINT\nLABEL b=3\n"
        'HEALTHCHECK --interval=1m30s --retries=4 CMD ["true"]\nONBUILD RUN x\n'
    )
    shop.build("-t", "meta:1", "-t", "meta:2", "--label", "c=4", dockerfile=text).ok()
    found = json.loads(shop("inspect", "meta:2").ok().out)[0]
    config = found["Config"]
    assert sorted(found["RepoTags"]) == ["meta:1", "meta:2"]
    assert config["Cmd"] is None and config["Entrypoint"] == ["/bin/echo"]
    assert config["Labels"] == {"a": "1", "b": "3", "c": "4"}
    assert "E=x y" in config["Env"] and config["User"] == "5:6"
    assert config["WorkingDir"] == "/w/sub" and config["StopSignal"] == "SIGINT"
    assert set(config["ExposedPorts"]) == {"80/tcp", "90/udp", "91/udp"}
    assert config["Healthcheck"] == {"Test": ["CMD", "true"], "Interval": 90 * 10**9, "Retries": 4}
    assert config["OnBuild"] == ["RUN x"]
    assert "WORKDIR /w/sub" in shop("history", "--no-trunc", "meta:1").ok().out


def test_squash(shop: Workshop) -> None:
    text = (
        "FROM busybox\nRUN echo 1 > /a; mkdir -p /d/e; echo 2 > /d/e/f\nRUN rm -r /a /d; mkdir /d\n"
        "RUN echo 3 > /b; rm /etc/passwd\n"
    )
    shop.build("-t", "squashed", "--squash", dockerfile=text).ok()
    layers = json.loads(shop("inspect", "squashed").ok().out)[0]["RootFS"]["Layers"]
    base = json.loads(shop("inspect", "busybox").ok().out)[0]["RootFS"]["Layers"]
    assert layers[: len(base)] == base and len(layers) == len(base) + 1
    said = shop.run("squashed", "sh", "-c", "ls /a /d /etc/passwd 2>&1; cat /b")
    assert said.count("No such file") == 2 and said.endswith("3\n")


def test_cache_mounts_travel(shop: Workshop, tmp_path: Path) -> None:
    text = (
        "FROM busybox\nARG N\n"
        "RUN --mount=type=cache,id=trip,target=/c echo $N >> /c/log; cp /c/log /log\n"
    )
    shop.build("-t", "trip", "--build-arg", "N=1", dockerfile=text).ok()
    archive = tmp_path / "trip.tar"
    shop("builder", "export", "-o", str(archive), "trip").ok()
    assert "trip" in shop("builder", "mounts", "-q").ok().out.split()
    shop("builder", "prune", "-af").ok()
    assert shop("builder", "mounts", "-q").ok().out == ""
    shop("builder", "import", "-i", str(archive), "trip").ok()
    shop.build("-t", "trip", "--build-arg", "N=2").ok()
    assert shop.run("trip", "cat", "/log") == "1\n2\n"


def test_the_cache_travels(shop: Workshop, tmp_path: Path) -> None:
    text = "FROM busybox\nRUN cat /proc/sys/kernel/random/uuid > /d\n"
    with depot(tmp_path / "depot") as served:
        for place, back in (
            (f"type=local,dest={tmp_path}/cache", f"type=local,src={tmp_path}/cache"),
            (f"type=registry,ref={served.host}/cache:1", f"{served.host}/cache:1"),
        ):
            shop.build("-t", "far", "--cache-to", place, dockerfile=text).ok()
            made = shop.run("far", "cat", "/d")
            shop("rmi", "far").ok()
            shop("builder", "prune", "-af").ok()
            again = shop.build("-t", "far", "--cache-from", back).ok()
            assert cached(again) == ["RUN cat /proc/sys/kernel/random/uuid > /d"]
            assert shop.run("far", "cat", "/d") == made
            shop("builder", "prune", "-af").ok()
    shop.build("--cache-from", f"type=local,src={tmp_path}/nothing").ok()


def test_attestations(shop: Workshop, tmp_path: Path) -> None:
    status = "Package: hello\nStatus: install ok installed\nVersion: 2.10-3\n"
    shop.write(status=status)
    text = "FROM busybox\nARG A\nCOPY status /var/lib/dpkg/status\n"
    shop.build("-t", "attested", "--provenance", "true", "--sbom", "true", "--build-arg", "A=b",
               dockerfile=text).ok()  # fmt: skip
    saved = tmp_path / "saved.tar"
    with depot(tmp_path / "depot") as served:
        name = f"{served.host}/attested:1"
        shop("tag", "attested", name).ok()
        shop("push", name).ok()
        index = served("GET", "/v2/attested/manifests/1").json
        image, attestation = index["manifests"]
        note = attestation["annotations"]
        assert note["vnd.docker.reference.digest"] == image["digest"]
        manifest = served("GET", f"/v2/attested/manifests/{attestation['digest']}").json
        found = {}
        for layer in manifest["layers"]:
            statement = served("GET", f"/v2/attested/blobs/{layer['digest']}").json
            found[statement["predicateType"]] = statement["predicate"]
            assert statement["subject"][0]["digest"]["sha256"] == image["digest"][7:]
        shop("rmi", name).ok()
    packages = found["https://spdx.dev/Document"]["packages"]
    assert [(p["name"], p["versionInfo"]) for p in packages] == [("hello", "2.10-3")]
    provenance = found["https://slsa.dev/provenance/v0.2"]
    assert provenance["invocation"]["parameters"]["args"]["build-arg:A"] == "b"
    assert provenance["materials"][0]["uri"] == "pkg:docker/busybox"
    assert not saved.exists()


def test_a_build_whose_client_is_killed_leaves_nothing(shop: Workshop) -> None:
    (shop.context / "Dockerfile").write_text("FROM busybox\nRUN echo begun; sleep 1000\n")
    process = shop.here.popen("build", "--progress", "plain", "-t", "never", str(shop.context))
    try:
        until(lambda: shop("ps", "-q").ok().out != "", "the step runs")
    finally:
        process.kill()
        process.communicate(timeout=120)
    until(lambda: shop("ps", "-aq").ok().out == "", "the step is gone")
    assert shop("images", "-q", "never").ok().out == ""


def test_an_engine_that_is_killed_leaves_no_step(tmp_path: Path) -> None:
    with installation(tmp_path / "here") as here:
        here.load_busybox(tmp_path)
        shop = Workshop(here, tmp_path)
        (shop.context / "Dockerfile").write_text(
            "FROM busybox\nRUN --mount=type=secret,id=s --mount=type=bind,rw,target=/b sleep 1000\n"
        )
        (tmp_path / "s").write_text("x")
        process = here.popen("build", "--secret", f"id=s,src={tmp_path}/s", str(shop.context))
        until(lambda: shop("ps", "-q").ok().out != "", "the step runs")
        assert kill(here, "engine") == 1
        process.communicate(timeout=120)
        assert process.returncode != 0
        until(lambda: shop("ps", "-aq").ok().out == "", "the next engine removes the step")
        assert os.listdir(tmp_path / "here" / "root" / "workloads") == []


def test_urls(shop: Workshop, tmp_path: Path) -> None:
    files = tmp_path / "served"
    files.mkdir()
    (files / "file.txt").write_text("fetched\n")
    with tarfile.open(files / "a.tar.gz", "w:gz") as tar:
        tar.add(files / "file.txt", "packed.txt")
    handler = functools.partial(_Quiet, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            digest = hashlib.sha256(b"fetched\n").hexdigest()
            text = (
                f"FROM busybox\nADD --checksum=sha256:{digest} {url}/file.txt /d/\n"
                f"ADD {url}/a.tar.gz /kept.gz\nADD --unpack=true {url}/a.tar.gz /unpacked/\n"
            )
            shop.build("-t", "urls", dockerfile=text).ok()
            script = "cat /d/file.txt /unpacked/packed.txt; stat -c %a /d/file.txt /kept.gz"
            assert shop.run("urls", "sh", "-c", script) == "fetched\nfetched\n600\n600\n"
            wrong = f"FROM busybox\nADD --checksum=sha256:{'0' * 64} {url}/file.txt /d/\n"
            shop.build(dockerfile=wrong).failed(1, "digest mismatch")
            gone = f"FROM busybox\nADD {url}/nothing /d/\n"
            shop.build(dockerfile=gone).failed(1, "Dockerfile:2:5: ", "404")
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass
