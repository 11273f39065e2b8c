"""Round trips with Debian's docker-registry, skopeo and podman: identical digests everywhere."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.errors import Denied, NotFound, Unavailable
from bulkhead.images.service import ImageService
from bulkhead.registry.client import login
from bulkhead.registry.config import Registries
from bulkhead.registry.credentials import Credentials
from tests.helpers.fake_registry import service
from tests.helpers.images import (
    Blobs,
    BuiltImage,
    build,
    busybox_tar,
    digest_of,
    has_busybox,
    index_of,
    many_layers,
    oci_archive,
    tar_of,
)
from tests.helpers.registry import PASSWORD, USER, Registry, need, registry

KINDS = [
    (False, ""),
    (True, ""),
    (False, "basic"),
    (True, "basic"),
    (False, "token"),
    (True, "token"),
]


@pytest.fixture
def open_registry(tmp_path: Path) -> Iterator[Registry]:
    with registry(tmp_path / "registry") as running:
        yield running


def load(
    images: ImageService, tmp_path: Path, name: str, tars: list[bytes], **options: Any
) -> BuiltImage:
    blobs = Blobs()
    image = build(blobs, tars, **options)
    with oci_archive(tmp_path / "archive", blobs, [(name, image.descriptor)]).open("rb") as file:
        images.load(file)
    return image


def skopeo(*arguments: str) -> str:
    need("skopeo")
    done = subprocess.run(
        ["skopeo", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("tls", "auth"), KINDS)
def test_push_and_pull_with_every_kind_of_login(tmp_path: Path, tls: bool, auth: str) -> None:
    with registry(tmp_path / "registry", tls=tls, auth=auth) as running:
        one = service(tmp_path / "one", registries=running.config())
        name = f"{running.host}/team/app:1"
        tars = [tar_of({"a": b"1" * 5000}), tar_of({"b": b"2"})]
        image = load(one, tmp_path, name, tars)
        assert one.push(name, running.auth) == image.digest
        two = service(tmp_path / "two", registries=running.config())
        pulled = two.pull(name, None, running.auth)
        assert (pulled.id, pulled.manifest_digest) == (image.id, image.digest)
        digest = f"{running.host}/team/app@{image.digest}"
        assert two.inspect(name)["RepoDigests"] == [digest]
        assert two.pull(digest, None, running.auth).id == image.id
        with pytest.raises(NotFound, match=r"manifest for .*:nope not found: manifest unknown"):
            two.pull(f"{running.host}/team/app:nope", None, running.auth)
        if auth:
            for wrong in ({}, {"username": USER, "password": "wrong"}):
                with pytest.raises(Denied):
                    two.pull(name, None, wrong)
                with pytest.raises(Denied):
                    one.push(name, wrong)
            login(running.host, Credentials(USER, PASSWORD), config=running.config())
            two.login({"username": USER, "password": PASSWORD, "serveraddress": running.host})
            with pytest.raises(Denied):
                login(running.host, Credentials(USER, "wrong"), config=running.config())
        if tls:
            stranger = service(tmp_path / "stranger", registries=Registries(certificates=()))
            with pytest.raises(Unavailable, match=r"certificate that is not trusted.*ca\.crt"):
                stranger.pull(name, None, running.auth)
            insecure = Registries(certificates=(), insecure=(running.host,))
            careless = service(tmp_path / "careless", registries=insecure)
            assert careless.pull(name, None, running.auth).id == image.id


def test_an_identity_token_logs_in(tmp_path: Path) -> None:
    with registry(tmp_path / "registry", auth="token") as running:
        assert running.tokens is not None
        images = service(tmp_path / "one", registries=running.config())
        name = f"{running.host}/app:1"
        image = load(images, tmp_path, name, [tar_of({"a": b"1"})])
        auth = {"identitytoken": running.tokens.identity_token}
        assert images.push(name, auth) == image.digest
        assert images.pull(name, None, auth).id == image.id


def test_a_login_may_give_an_identity_token(tmp_path: Path) -> None:
    with registry(tmp_path / "registry", auth="token") as running:
        assert running.tokens is not None
        images = service(tmp_path / "one", registries=running.config())
        shown = {"username": USER, "password": PASSWORD, "serveraddress": running.host}
        assert images.login(shown) == ""
        running.tokens.gives_identity = True
        token = images.login(shown)
        assert token == running.tokens.identity_token
        assert running.tokens.requests[-1]["offline_token"] == ["true"]
        assert images.login({"identitytoken": token, "serveraddress": running.host}) == token
        with pytest.raises(Denied):
            images.login({**shown, "password": "wrong"})


def test_a_blob_is_mounted_from_another_repository(tmp_path: Path, open_registry: Registry) -> None:
    images = service(tmp_path / "one", registries=open_registry.config())
    load(images, tmp_path, f"{open_registry.host}/a:1", [tar_of({"a": b"1" * 5000})])
    images.push(f"{open_registry.host}/a:1")
    images.tag(f"{open_registry.host}/a:1", f"{open_registry.host}/b:1")
    seen: list[dict[str, Any]] = []
    images.push(f"{open_registry.host}/b:1", None, seen.append)
    assert "Mounted from a" in {message.get("status") for message in seen}
    seen.clear()
    images.push(f"{open_registry.host}/b:1", None, seen.append)
    assert "Layer already exists" in {message.get("status") for message in seen}


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_every_compression_comes_back(
    tmp_path: Path, open_registry: Registry, compression: str
) -> None:
    images = service(tmp_path / "one", registries=open_registry.config())
    name = f"{open_registry.host}/c:1"
    image = load(images, tmp_path, name, [tar_of({"a": b"1"})], compression=compression)
    assert images.push(name) == image.digest
    other = service(tmp_path / "two", registries=open_registry.config())
    assert other.pull(name).manifest_digest == image.digest


def test_an_evicted_blob_is_fetched_again_for_a_push(
    tmp_path: Path, open_registry: Registry
) -> None:
    images = service(tmp_path / "one", registries=open_registry.config())
    image = load(images, tmp_path, f"{open_registry.host}/a:1", [tar_of({"a": b"1" * 5000})])
    images.push(f"{open_registry.host}/a:1")
    images.remove(f"{open_registry.host}/a:1", force=True)
    images.pull(f"{open_registry.host}/a:1")
    layer = digest_of(image.layers[0])
    assert images.store.evict(layer) > 0
    with registry(tmp_path / "second") as second:
        images.tag(f"{open_registry.host}/a:1", f"{second.host}/a:1")
        assert images.push(f"{second.host}/a:1") == image.digest
        other = service(tmp_path / "two", registries=second.config())
        assert other.pull(f"{second.host}/a:1").manifest_digest == image.digest


def test_a_committed_image_has_the_same_digest_at_every_push(
    tmp_path: Path, open_registry: Registry
) -> None:
    images = service(tmp_path / "one", registries=open_registry.config())
    load(images, tmp_path, "base:1", [tar_of({"a": b"1"})])
    name = f"{open_registry.host}/made:1"
    made = images.commit(images.resolve("base:1"), [tar_of({"new": b"2" * 9000})], ref=name)
    digest = images.push(name)
    assert images.push(name) == digest
    other = service(tmp_path / "two", registries=open_registry.config())
    pulled = other.pull(name)
    assert (pulled.id, pulled.manifest_digest) == (made.id, digest)
    assert images.inspect(name)["RepoDigests"] == [f"{open_registry.host}/made@{digest}"]
    assert images.gc() >= 0
    assert images.push(name) == digest


def test_an_index_is_pulled_for_this_machine_or_whole(
    tmp_path: Path, open_registry: Registry
) -> None:
    blobs = Blobs()
    here = build(blobs, [tar_of({"a": b"1"})])
    there = build(blobs, [tar_of({"a": b"2"})], architecture="s390x")
    descriptor, index = index_of(blobs, [there, here])
    images = service(tmp_path / "one", registries=open_registry.config())
    name = f"{open_registry.host}/multi:1"
    with oci_archive(tmp_path / "a", blobs, [(name, descriptor)]).open("rb") as file:
        images.load(file)
    assert images.push(name) == digest_of(index)
    part = service(tmp_path / "part", registries=open_registry.config())
    assert part.pull(name).id == here.id
    assert part.inspect(name)["RepoDigests"][0].endswith(digest_of(index))
    assert part.pull(name, "linux/s390x").id == there.id
    whole = service(tmp_path / "whole", registries=open_registry.config())
    assert whole.pull(name, "all").id == here.id
    whole.gc()
    whole.tag(name, f"{open_registry.host}/again:1")
    assert whole.push(f"{open_registry.host}/again:1") == digest_of(index)
    with pytest.raises(NotFound, match="no matching manifest for linux/riscv64"):
        part.pull(name, "linux/riscv64")


def test_a_hundred_layers(tmp_path: Path, open_registry: Registry) -> None:
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    blobs = Blobs()
    image = many_layers(blobs, 100)
    name = f"{open_registry.host}/hundred:1"
    images = service(tmp_path / "one", registries=open_registry.config())
    with oci_archive(tmp_path / "a", blobs, [(name, image.descriptor)]).open("rb") as file:
        images.load(file)
    assert images.push(name) == image.digest
    other = service(tmp_path / "two", registries=open_registry.config())
    assert len(other.pull(name).diff_ids) == 100


# --- other programs


def test_skopeo_copies_what_we_pushed_and_we_pull_what_it_pushed(
    tmp_path: Path, open_registry: Registry
) -> None:
    images = service(tmp_path / "one", registries=open_registry.config())
    name = f"{open_registry.host}/ours:1"
    image = load(images, tmp_path, name, [tar_of({"a": b"1"}), tar_of({"b": b"2"})])
    images.push(name)
    shown = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{name}"))
    assert shown["Digest"] == image.digest
    skopeo(
        "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--preserve-digests",
        f"docker://{name}", f"docker://{open_registry.host}/theirs:1",
    )  # fmt: skip
    other = service(tmp_path / "two", registries=open_registry.config())
    assert other.pull(f"{open_registry.host}/theirs:1").manifest_digest == image.digest


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_skopeo_reads_our_archives_and_we_read_its(
    tmp_path: Path, open_registry: Registry, kind: str
) -> None:
    images = service(tmp_path / "one", registries=open_registry.config())
    image = load(images, tmp_path, "x/y:1", [tar_of({"a": b"1"}), tar_of({"b": b"2"})])
    ours = tmp_path / "ours.tar"
    with ours.open("wb") as file:
        images.save(["x/y:1"], file, kind.partition("-")[0])
    target = f"{open_registry.host}/from-archive:1"
    skopeo("copy", "--dest-tls-verify=false", f"{kind}:{ours}", f"docker://{target}")
    assert images.pull(target).id == image.id
    theirs = tmp_path / "theirs.tar"
    skopeo("copy", "--src-tls-verify=false", f"docker://{target}", f"{kind}:{theirs}:back/to:1")
    other = service(tmp_path / "two")
    with theirs.open("rb") as file:
        assert other.load(file) == ["back/to:1"]
    if kind == "oci-archive":
        assert other.resolve("back/to:1").id == image.id


def test_podman_pulls_what_we_pushed(tmp_path: Path, open_registry: Registry) -> None:
    need("podman")
    with tempfile.TemporaryDirectory(prefix="p") as short:  # its run root wants a short path
        podman_pulls(tmp_path, open_registry, short)


def podman_pulls(tmp_path: Path, open_registry: Registry, short: str) -> None:
    images = service(tmp_path / "one", registries=open_registry.config())
    name = f"{open_registry.host}/ours:1"
    image = load(images, tmp_path, name, [busybox_tar() if has_busybox() else tar_of({"a": b"1"})])
    images.push(name)
    podman = [
        "podman", "--root", f"{short}/root", "--runroot", f"{short}/run",
        "--storage-driver", "vfs",
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*podman, "pull", "--tls-verify=false", name],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == image.id.removeprefix("sha256:")
    shown = subprocess.run(
        [*podman, "image", "inspect", name],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert json.loads(shown.stdout)[0]["Digest"] == image.digest
    subprocess.run([*podman, "rmi", "-f", name], capture_output=True, env=environment, check=True)
