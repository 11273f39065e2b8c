"""`image bootstrap`: a Debian image from packages; the same lock gives the same image."""

import json
import shutil
import socket
import tarfile
from pathlib import Path

import pytest

from bulkhead.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from bulkhead.images import apt
from bulkhead.images.service import ImageService
from tests.helpers.fake_registry import nothing_left, service


@pytest.fixture
def images(tmp_path: Path) -> ImageService:
    return service(tmp_path / "home")


def can_bootstrap() -> None:
    for program in ("mmdebstrap", "apt-get"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed here")
    sources = apt.sources_for("debian", "bookworm", None)
    host = sources[0].uri.partition("://")[2].partition("/")[0]
    try:
        socket.create_connection((host.partition(":")[0], 80), timeout=30).close()
    except OSError as error:
        pytest.skip(f"the package mirror {host} cannot be reached: {error}")


def test_the_same_lock_gives_the_same_image(images: ImageService, tmp_path: Path) -> None:
    can_bootstrap()
    lock = tmp_path / "lock.json"
    said: list[str] = []
    first = images.bootstrap(
        "debian:bookworm", ["hostname"], None, str(lock), lambda m: said.append(m["status"])
    )
    document = json.loads(lock.read_text())
    assert document["image"] == first.id
    assert document["layer"] == first.diff_ids[0]
    assert "hostname" in {package["name"] for package in document["packages"]}
    assert all(len(package["sha256"]) == 64 for package in document["packages"])
    assert any(line.startswith("Fetching") for line in said)
    with tarfile.open(fileobj=images.store.open(first.diff_ids[0]), mode="r|") as tar:
        names = {member.name.removeprefix("./") for member in tar}
    assert {"etc/debian_version", "usr/bin/apt-get", "etc/apt/sources.list"} <= names
    assert not names & {"etc/resolv.conf", "etc/hostname", "etc/apt/apt.conf.d/99mmdebstrap"}
    again = service(tmp_path / "again")
    second = again.bootstrap("debian:bookworm", lock=str(lock))
    assert (second.id, second.manifest_digest) == (first.id, first.manifest_digest)
    with pytest.raises(Conflict, match=r"locks docker\.io/library/debian:bookworm"):
        again.bootstrap("debian:trixie", lock=str(lock))
    document["packages"][0]["sha256"] = "0" * 64
    lock.write_text(json.dumps(document))
    third = service(tmp_path / "third")
    with pytest.raises(Unavailable, match=r"[Hh]ash"):
        third.bootstrap("debian:bookworm", lock=str(lock))
    nothing_left(third)


def test_a_package_that_does_not_exist(images: ImageService) -> None:
    can_bootstrap()
    with pytest.raises(NotFound, match="no-such-package-anywhere"):
        images.bootstrap("debian:bookworm", ["no-such-package-anywhere"])
    nothing_left(images)


@pytest.mark.parametrize(
    ("name", "include", "words"),
    [
        ("debian", (), "latest|suite"),
        ("debian:bookworm", ("--allow-unauthenticated",), "not the name of a package"),
        ("debian:bookworm", ("a b",), "not the name of a package"),
        ("debian:-x", (), "invalid reference|suite"),
        ("fedora:40", (), "not supported|suite"),
    ],
)
def test_what_cannot_be_bootstrapped(
    images: ImageService, name: str, include: tuple[str, ...], words: str
) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed here")
    with pytest.raises((Invalid, Unsupported, NotFound, Unavailable), match=words):
        images.bootstrap(name, include)


def test_missing_tools_are_named(
    images: ImageService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="apt-get install apt dpkg mmdebstrap"):
        images.bootstrap("debian:bookworm")
