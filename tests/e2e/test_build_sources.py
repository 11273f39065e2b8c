"""Where builds take from, where they go, and what a Dockerfile may ask for."""

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_build_behaviour import Workshop, cached
from tests.helpers.depot import depot
from tests.helpers.images import has_busybox
from tests.helpers.installation import Installation, installation

pytestmark = pytest.mark.skipif(not has_busybox(), reason="busybox is not installed here")
_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")
_SSH = pytest.mark.skipif(
    not (shutil.which("ssh-agent") and shutil.which("ssh-keygen")),
    reason="OpenSSH's client is not installed here",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("sources")
    with installation(folder / "here") as here:
        here.load_busybox(folder)
        yield here


@pytest.fixture
def shop(installed: Installation, tmp_path: Path) -> Workshop:
    return Workshop(installed, tmp_path)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL where it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _git(place: Path, *words: str) -> str:
    stamp = "2020-02-02T02:02:02+0000"
    env = {
        **os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_DATE": stamp,
        "GIT_COMMITTER_DATE": stamp,
    }  # fmt: skip
    who = ("-c", "user.name=n", "-c", "user.email=n@example.com", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ["git", *who, *words], cwd=place, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(served: tuple[Path, str], tmp_path: Path) -> tuple[str, list[str]]:
    """The URL of a repository with two commits on main and one on a branch, and their names."""
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    _git(work, "init", "-q")
    commits = []
    for number in ("1", "2"):
        (work / "file").write_text(f"{number}\n")
        (work / "Dockerfile").write_text("FROM busybox\nCOPY file /f\n")
        (work / "sub" / "Dockerfile").write_text("FROM busybox\nCOPY . /sub\n")
        (work / "sub" / "run").write_text("#!/bin/sh\n")
        (work / "sub" / "run").chmod(0o755)
        _git(work, "add", ".")
        _git(work, "commit", "-q", "-m", number)
        commits.append(_git(work, "rev-parse", "HEAD"))
    _git(work, "tag", "v1", commits[0])
    bare = served[0] / "app.git"
    _git(tmp_path, "clone", "-q", "--bare", str(work), str(bare))
    _git(bare, "update-server-info")
    return f"{served[1]}/app.git", commits


@_GIT
def test_add_of_repositories(shop: Workshop, repository: tuple[str, list[str]]) -> None:
    url, commits = repository
    text = (
        f"FROM busybox\nADD {url} /head\nADD {url}#v1 /tag/\nADD {url}#{commits[0]}:sub /sub/\n"
        f"ADD --keep-git-dir=true --checksum={commits[1]} {url}#main /kept\n"
        f"ADD {url}?ref=main&subdir=sub /query\n"
    )
    shop.build("-t", "added", dockerfile=text).ok()
    script = (
        "cat /head/file /tag/file /kept/file; ls -A /sub /head /query; stat -c %a /sub/run;"
        " stat -c %Y /tag/file; cat /kept/.git/HEAD; ls /kept/.git/objects >/dev/null && echo git"
    )
    stamp = "1580608922"
    said = shop.run("added", "sh", "-c", script).split("\n")
    assert said[:3] == ["2", "1", "2"]
    assert said[3:-1] == [
        "/head:", "Dockerfile", "file", "sub", "", "/query:", "Dockerfile", "run", "",
        "/sub:", "Dockerfile", "run", "755", stamp, commits[1], "git",
    ]  # fmt: skip
    again = shop.build("-t", "added").ok()
    assert len(cached(again)) == 5
    for wrong, words in (
        (f"ADD --checksum={'0' * 40} {url} /x", "digest mismatch"),
        (f"ADD {url}#gone /x", "cannot fetch"),
        (f"ADD {url}#main:../.. /x", "leads out"),
        (f"ADD {url}#main:gone /x", "no directory"),
        (f"ADD {url}#--upload-pack=x /x", "malformed"),
        ("ADD --keep-git-dir=true file /x", "git sources only"),
    ):
        shop.build(dockerfile=f"FROM busybox\n{wrong}\n").failed(1, "Dockerfile:2:", words)


@_GIT
def test_remote_contexts(
    shop: Workshop, served: tuple[Path, str], repository: tuple[str, list[str]]
) -> None:
    url, commits = repository
    first = shop("build", "-q", f"{url}#{commits[0]}").ok().line
    assert shop.run(first, "cat", "/f") == "1\n"
    sub = shop("build", "-q", f"{url}#v1:sub").ok().line
    assert shop.run(sub, "ls", "/sub").split() == ["Dockerfile", "run"]
    folder, server = served
    with tarfile.open(folder / "context.tgz", "w:gz") as tar:
        for name, data in (("d/File", b"FROM busybox\nCOPY a /a\n"), ("a", b"packed\n")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    packed = shop("build", "-q", "-f", "d/File", f"{server}/context.tgz").ok().line
    assert shop.run(packed, "cat", "/a") == "packed\n"
    (folder / "File").write_text("FROM busybox\nRUN echo alone > /x\n")
    alone = shop("build", "-q", f"{server}/File").ok().line
    assert shop.run(alone, "cat", "/x") == "alone\n"
    shop("build", f"{server}/gone.tar").failed(1, "404")
    here = ["--unix-socket", f"{shop.here.run}/docker.sock", "-s", "-X", "POST", "http://d/build"]
    if shutil.which("curl"):
        done = subprocess.run(
            ["curl", *here, "-G", "--data-urlencode", f"remote={url}#v1", "-d", "t=remote"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "Successfully tagged remote:latest" in done.stdout
        assert shop.run("remote", "cat", "/f") == "1\n"


def test_outputs(shop: Workshop, tmp_path: Path) -> None:
    text = "FROM busybox AS made\nRUN mkdir /d; echo x > /d/f; ln -s f /d/l; chmod 750 /d/f\n"
    text += "FROM scratch\nCOPY --from=made /d /d\n"
    out = tmp_path / "out"
    shop.build("-o", str(out), "-t", "nowhere", dockerfile=text).ok()
    assert (out / "d" / "f").read_text() == "x\n" and os.readlink(out / "d" / "l") == "f"
    assert (out / "d" / "f").stat().st_mode & 0o777 == 0o750
    assert shop("images", "-q", "nowhere").ok().out == ""
    tar = tmp_path / "out.tar"
    shop.build("-o", f"type=tar,dest={tar}").ok()
    with tarfile.open(tar) as archive:
        assert {"d", "d/f", "d/l"} <= {name.strip("./") for name in archive.getnames()}
    oci, docker = tmp_path / "oci.tar", tmp_path / "docker.tar"
    shop.build("-t", "packed:1", "-o", f"type=oci,dest={oci}", "-o", f"type=docker,dest={docker}",
               "-o", "type=image", "--metadata-file", str(tmp_path / "meta")).ok()  # fmt: skip
    identity = shop("images", "-q", "--no-trunc", "packed:1").ok().line
    noted = json.loads((tmp_path / "meta").read_text())
    assert noted["containerimage.config.digest"] == identity and noted["image.name"] == "packed:1"
    for path in (oci, docker):
        with tarfile.open(path) as archive:
            index = archive.extractfile("index.json")
            assert index is not None
            (one,) = json.load(index)["manifests"]
            assert one["annotations"]["org.opencontainers.image.ref.name"].endswith("packed:1")
    shop("rmi", "packed:1").ok()
    shop("load", "-i", str(docker)).ok()
    assert shop("images", "-q", "--no-trunc", "packed:1").ok().line == identity
    piped = shop("build", "-q", "-o", "-", str(shop.context)).ok()
    assert "d/f" in piped.out and "sha256:" not in piped.out
    shop.build("-o", f"type=tar,dest={tmp_path}/never", dockerfile="FROM busybox\nRUN no\n").failed(
        1, "Dockerfile:2:1: "
    )
    assert not [name for name in os.listdir(tmp_path) if "never" in name]
    shop.build("-o", "type=what,dest=x").failed(125, "type is one of")


def test_pushed_at_once(shop: Workshop, tmp_path: Path) -> None:
    with depot(tmp_path / "depot") as registry:
        name = f"{registry.host}/app:1"
        shop.build("--push", "-t", name, dockerfile="FROM busybox\nRUN echo 1 > /x\n").ok()
        assert registry("GET", "/v2/app/manifests/1").status == 200
    shop.build("--push").failed(1, "needs a name")


def test_what_a_file_may_ask_for(shop: Workshop) -> None:
    text = "FROM busybox\nRUN --network=host ip -o link > /links\n"
    shop.build(dockerfile=text).failed(1, "Dockerfile:2:1: network.host is not allowed", "--allow")
    shop.build("--allow", "network.host", "-t", "host", dockerfile=text).ok()
    text = "FROM busybox\nRUN --security=insecure grep CapEff /proc/self/status > /caps\n"
    shop.build(dockerfile=text).failed(1, "Dockerfile:2:1: security.insecure is not allowed")
    shop.build("--allow", "security.insecure", "-t", "insecure", dockerfile=text).ok()
    usual = shop.run("busybox", "grep", "CapEff", "/proc/self/status")
    assert int(shop.run("insecure", "cat", "/caps").split()[1], 16) > int(usual.split()[1], 16)


def test_the_image_is_its_own_cache(shop: Workshop, tmp_path: Path) -> None:
    text = "FROM busybox\nRUN true\nRUN cat /proc/sys/kernel/random/uuid > /d\nENV A=b\n"
    with depot(tmp_path / "depot") as registry:
        name = f"{registry.host}/inline:1"
        shop.build("-t", name, "--push", "--cache-to", "type=inline", dockerfile=text).ok()
        made = shop.run(name, "cat", "/d")
        shop("rmi", name).ok()
        shop("builder", "prune", "-af").ok()
        again = shop.build("-t", "again", "--cache-from", name).ok()
        assert len(cached(again)) == 2
        assert shop.run("again", "cat", "/d") == made


def test_cache_mounts_that_begin_with_files(shop: Workshop) -> None:
    text = (
        "FROM busybox AS seed\nRUN mkdir -p /s/in; echo seed > /s/in/f; chmod 700 /s/in\n"
        "FROM busybox\nARG N\n"
        "RUN --mount=type=cache,id=seeded,target=/c,from=seed,source=/s/in "
        "cat /c/f > /f; echo $N >> /c/f\n"
    )
    shop.build("-t", "seeded", "--build-arg", "N=1", dockerfile=text).ok()
    assert shop.run("seeded", "cat", "/f") == "seed\n"
    shop.build("-t", "seeded", "--build-arg", "N=2").ok()
    assert shop.run("seeded", "cat", "/f") == "seed\n1\n"


@_SSH
def test_key_files(shop: Workshop, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    text = "FROM busybox\nRUN --mount=type=ssh,id=k test -S $SSH_AUTH_SOCK && echo > /there\n"
    shop.build("--ssh", f"k={key}", "-t", "keyed", dockerfile=text).ok()
    shop.run("keyed", "ls", "/there")
    key.write_text("no key\n")
    shop.build("--no-cache", "--ssh", f"k={key}").failed(1, "cannot be used")
    shop.build("--ssh", f"k={tmp_path}/nothing").failed(125, "neither an agent's socket nor")
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "p", "-f", str(locked)], check=True)
    shop.build("--no-cache", "--ssh", f"k={locked}").failed(1, "cannot be used")
