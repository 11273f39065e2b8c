"""Images between programs: pushed by us and run by others, pushed by others and run by us.

Whatever way an image goes, its digest stays the same.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.dockerd import Dockerd, dockerd
from tests.helpers.images import (
    Blobs,
    build,
    busybox_tar,
    docker_archive,
    has_busybox,
    oci_archive,
    tar_of,
)
from tests.helpers.installation import Done, Installation, installation
from tests.helpers.podman import Podman, run
from tests.helpers.podman import podman as podman_of
from tests.helpers.registry import Registry, need, registry
from tests.helpers.residue import residue

SAYS = ("cat", "/said")


@dataclass
class Place:
    """Our installation, and a registry that everyone reaches."""

    ours: Installation
    registry: Registry
    folder: Path

    def name(self, text: str) -> str:
        """A name in the registry."""
        return f"{self.registry.host}/{text}"

    def cli(self, *argv: str) -> Done:
        """One command of ours, the short way."""
        return self.ours.cli(*argv, native=True, server=True)

    def digest(self, name: str) -> str:
        """The digest under which we know an image of the registry."""
        found: list[str] = json.loads(self.cli("image", "inspect", name).ok().out)[0]["RepoDigests"]
        (digest,) = {d.partition("@")[2] for d in found if d.startswith(name.rpartition(":")[0])}
        return digest

    def id(self, name: str) -> str:
        """The image's id."""
        return self.cli("image", "inspect", "-f", "{{.Id}}", name).ok().line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    folder = tmp_path_factory.mktemp("interop")
    with (
        residue(str(folder)),
        registry(folder / "registry") as running,
        installation(folder) as ours,
    ):
        yield Place(ours, running, folder)


@pytest.fixture(scope="module")
def docker(place: Place) -> Iterator[Dockerd]:
    with dockerd(place.folder, insecure=(place.registry.host,)) as running:
        yield running


def from_archive(place: Place, compression: str) -> Callable[[str], str]:
    """An image that was loaded from an OCI archive."""

    def make(name: str) -> str:
        blobs = Blobs()
        tars = [busybox_tar(), tar_of({"said": f"{name}\n".encode()})]
        image = build(blobs, tars, compression=compression)
        path = oci_archive(place.folder / "archive.tar", blobs, [(name, image.descriptor)])
        place.cli("load", "-i", str(path)).ok()
        return name

    return make


def committed(place: Place) -> Callable[[str], str]:
    """An image that we made ourselves, of a container."""

    def make(name: str) -> str:
        base = from_archive(place, "gzip")(place.name("base:1"))
        script = f"echo {name} > /said; rm /bin/yes; rm -r /home; ln -s said /other"
        place.cli("run", "--name", "maker", base, "sh", "-c", script).ok()
        place.cli("commit", "-c", "ENV MADE=here", "maker", name).ok()
        place.cli("rm", "maker").ok()
        return name

    return make


KINDS = {
    "gzip": lambda place: from_archive(place, "gzip"),
    "zstd": lambda place: from_archive(place, "zstd"),
    "commit": committed,
}


@pytest.fixture
def podman() -> Iterator[Podman]:
    need("podman", "runc")
    with podman_of("runc") as made:
        yield made


@pytest.mark.parametrize("kind", ["gzip", "zstd", "commit"])
def test_skopeo_and_podman_take_ours(
    place: Place, podman: Podman, tmp_path: Path, kind: str
) -> None:
    need("skopeo")
    name = KINDS[kind](place)(place.name(f"ours-{kind}:1"))
    place.cli("push", name).ok()
    digest = place.digest(name)
    wanted = ["skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}"]
    assert run(*wanted, f"docker://{name}").strip() == digest
    layout = tmp_path / "layout"
    run("skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"oci:{layout}:x")
    index = json.loads((layout / "index.json").read_text())
    assert index["manifests"][0]["digest"] == digest
    podman("pull", "-q", "--tls-verify=false", name)
    assert podman("image", "inspect", "-f", "{{.Digest}} sha256:{{.Id}}", name).split() == [
        digest,
        place.id(name),
    ]
    assert podman.runs(name, *SAYS) == f"{name}\n"
    if kind == "commit":
        script = "ls /bin/yes /home; readlink /other; echo $MADE"
        assert podman.runs(name, "sh", "-c", script) == "said\nhere\n"


@pytest.mark.parametrize("kind", ["gzip", "commit"])
def test_docker_takes_ours(place: Place, docker: Dockerd, kind: str) -> None:
    name = KINDS[kind](place)(place.name(f"docker-{kind}:1"))
    place.cli("push", name).ok()
    docker("pull", "-q", name).ok()
    shown = docker("image", "inspect", "-f", "{{index .RepoDigests 0}} {{.Id}}", name).ok()
    repository = name.rpartition(":")[0]
    assert shown.line == f"{repository}@{place.digest(name)} {place.id(name)}"
    assert docker("run", "--rm", "--network", "none", name, *SAYS).ok().out == f"{name}\n"
    docker("rmi", name).ok()


def test_docker_gives_to_us(place: Place, docker: Dockerd) -> None:
    tars = [busybox_tar()]
    archive = docker_archive(place.folder / "docker.tar", build(Blobs(), tars), ["base:1"])
    docker("load", "-i", str(archive)).ok()
    name = place.name("theirs-docker:1")
    script = f"echo {name} > /said; rm /bin/yes; chown 1000:1000 /tmp; chmod 1777 /tmp"
    docker("run", "--name", "maker", "--network", "none", "base:1", "sh", "-c", script).ok()
    docker("commit", "-c", "ENV MADE=there", "maker", name).ok()
    docker("rm", "maker").ok()
    docker("push", "-q", name).ok()
    place.cli("pull", "-q", name).ok()
    shown = docker("image", "inspect", "-f", "{{index .RepoDigests 0}} {{.Id}}", name).ok()
    repository = name.rpartition(":")[0]
    assert shown.line == f"{repository}@{place.digest(name)} {place.id(name)}"
    script = "cat /said; echo $MADE; stat -c %a,%u /tmp; ls /bin/yes"
    done = place.cli("run", "--rm", name, "sh", "-c", script)
    assert (done.code, done.out) == (1, f"{name}\nthere\n1777,1000\n")


def test_podman_and_skopeo_give_to_us(place: Place, podman: Podman, tmp_path: Path) -> None:
    need("skopeo")
    blobs = Blobs()
    image = build(blobs, [busybox_tar()])
    archive = oci_archive(tmp_path / "base.tar", blobs, [("localhost/base:1", image.descriptor)])
    podman("load", "-q", "-i", str(archive))
    name = place.name("theirs-podman:1")
    script = f"echo {name} > /said; rm /bin/yes"
    maker = ("run", "--name", "maker", *podman.RUN, "localhost/base:1", "sh", "-c", script)
    podman(*maker)
    podman("commit", "-q", "maker", name)
    podman("rm", "maker")
    podman("push", "-q", "--tls-verify=false", "--digestfile", str(tmp_path / "digest"), name)
    place.cli("pull", "-q", name).ok()
    assert place.digest(name) == (tmp_path / "digest").read_text()
    assert place.id(name) == "sha256:" + podman("image", "inspect", "-f", "{{.Id}}", name).strip()
    done = place.cli("run", "--rm", name, "sh", "-c", "cat /said; ls /bin/yes")
    assert (done.code, done.out) == (1, f"{name}\n")
    copied = place.name("theirs-skopeo:1")
    run(
        "skopeo", "copy", "-q", "--dest-tls-verify=false", "--digestfile", str(tmp_path / "second"),
        f"oci-archive:{archive}:localhost/base:1", f"docker://{copied}",
    )  # fmt: skip
    place.cli("pull", "-q", copied).ok()
    assert place.digest(copied) == (tmp_path / "second").read_text() == image.digest
    assert place.cli("run", "--rm", copied, "echo", "runs").ok().out == "runs\n"


def test_archives_between_docker_and_us(place: Place, docker: Dockerd, tmp_path: Path) -> None:
    name = committed(place)("archived:1")
    place.cli("save", "-o", str(tmp_path / "ours.tar"), name).ok()
    assert f"Loaded image: {name}" in docker("load", "-i", str(tmp_path / "ours.tar")).ok().out
    assert docker("image", "inspect", "-f", "{{.Id}}", name).ok().line == place.id(name)
    assert docker("run", "--rm", "--network", "none", name, *SAYS).ok().out == f"{name}\n"
    docker("save", "-o", str(tmp_path / "theirs.tar"), name).ok()
    docker("rmi", name).ok()
    identity = place.id(name)
    place.cli("rmi", name).ok()
    assert (
        place.cli("load", "-i", str(tmp_path / "theirs.tar")).ok().line == f"Loaded image: {name}"
    )
    assert place.id(name) == identity
    assert place.cli("run", "--rm", name, *SAYS).ok().out == f"{name}\n"
