"""`load` and `save`: every kind of archive, the way back, and archives that lie."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import BulkheadError, Corrupt, Invalid, NotFound
from bulkhead.images.service import ImageService
from bulkhead.images.tarstream import TarReader, opened
from tests.helpers.fake_registry import nothing_left, service
from tests.helpers.images import (
    Blobs,
    build,
    digest_of,
    docker_archive,
    index_of,
    oci_archive,
    tar_of,
)


@pytest.fixture
def images(tmp_path: Path) -> ImageService:
    return service(tmp_path / "home")


class Pipe(io.RawIOBase):
    """A stream that cannot seek and gives little at a time."""

    def __init__(self, data: bytes, most: int = 1000) -> None:
        self._data, self._most = io.BytesIO(data), most

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, self._most) if size >= 0 else self._most)


def load(images: ImageService, data: bytes) -> list[str]:
    return images.load(Pipe(data))  # type: ignore[arg-type]


def saved(images: ImageService, refs: list[str], how: str) -> bytes:
    out = io.BytesIO()
    images.save(refs, out, how)
    return out.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {}
        for member in tar.getmembers():
            file = tar.extractfile(member)
            found[member.name] = file.read() if file is not None else b""
        return found


@pytest.mark.parametrize("layers", ["", "gzip", "zstd"])
@pytest.mark.parametrize("docker", [False, True])
def test_an_oci_archive_keeps_every_digest(
    images: ImageService, tmp_path: Path, layers: str, docker: bool
) -> None:
    blobs = Blobs()
    image = build(
        blobs, [tar_of({"a": b"1"}), tar_of({"b": b"2"})], compression=layers, docker=docker
    )
    data = oci_archive(tmp_path / "a", blobs, [("x/y:1", image.descriptor)]).read_bytes()
    assert load(images, data) == ["x/y:1"]
    loaded = images.resolve("x/y:1")
    assert (loaded.id, loaded.manifest_digest) == (image.id, image.digest)
    back = members(saved(images, ["x/y:1"], "oci"))
    for digest, content in blobs.by_digest.items():
        assert back[f"blobs/sha256/{digest[7:]}"] == content
    other = service(tmp_path / "other")
    assert load(other, saved(images, ["x/y:1"], "oci")) == ["x/y:1"]
    assert other.resolve("x/y:1").manifest_digest == image.digest


def test_old_docker_archives_and_new_ones(images: ImageService, tmp_path: Path) -> None:
    image = build(Blobs(), [tar_of({"a": b"1"}), tar_of({"b": b"2"})])
    data = docker_archive(tmp_path / "a", image, ["x:1", "x:2"]).read_bytes()
    assert load(images, data) == ["x:1", "x:2"]
    assert images.resolve("x:2").id == image.id
    new = saved(images, ["x"], "docker")  # a repository: all of its tags
    items = json.loads(members(new)["manifest.json"])
    assert items[0]["RepoTags"] == ["x:1", "x:2"]
    assert members(new)[items[0]["Config"]] == image.config
    assert [members(new)[path] for path in items[0]["Layers"]] == image.tars
    other = service(tmp_path / "other")
    assert load(other, new) == ["x:1", "x:2"]
    assert other.resolve("x:1").id == image.id
    assert saved(other, ["x:2", "x:1"], "docker") != new
    assert saved(other, ["x"], "docker") == new


def test_equal_layers_may_be_links(images: ImageService, tmp_path: Path) -> None:
    layer = tar_of({"a": b"1"})
    image = build(Blobs(), [layer, layer])
    content = members(docker_archive(tmp_path / "a", image, ["x:1"]).read_bytes())
    first, second = json.loads(content["manifest.json"])[0]["Layers"]
    linked: dict[str, bytes | str | None] = {
        name: data for name, data in content.items() if name != second and data
    }
    linked[second] = f"../{first}"
    assert load(images, tar_of(linked)) == ["x:1"]


@pytest.mark.parametrize(
    "squeeze",
    [gzip.compress, bz2.compress, lzma.compress, zstd.compress, lambda d: gzip.compress(d) * 1],
)
def test_compressed_archives(
    images: ImageService, tmp_path: Path, squeeze: Callable[[bytes], bytes]
) -> None:
    image = build(Blobs(), [tar_of({"a": b"1" * 100_000})])
    data = docker_archive(tmp_path / "a", image, ["x:1"]).read_bytes()
    assert load(images, squeeze(data)) == ["x:1"]
    half = len(data) // 2
    assert load(images, squeeze(data[:half]) + squeeze(data[half:])) == ["x:1"]
    with pytest.raises(Corrupt, match=r"middle|short|damaged"):
        load(images, squeeze(data)[:-50])


def test_an_index_is_kept_and_saved_whole(images: ImageService, tmp_path: Path) -> None:
    blobs = Blobs()
    here = build(blobs, [tar_of({"a": b"1"})])
    there = build(blobs, [tar_of({"a": b"2"})], architecture="s390x")
    descriptor, _ = index_of(blobs, [there, here])
    data = oci_archive(tmp_path / "a", blobs, [("x:1", descriptor)]).read_bytes()
    load(images, data)
    assert images.resolve("x:1").id == here.id
    images.gc()
    back = members(saved(images, ["x:1"], "oci"))
    assert {name[-64:] for name in back if "blobs" in name} == {d[7:] for d in blobs.by_digest} - {
        digest_of(there.layers[0])[7:]
    } | {digest_of(there.layers[0])[7:]}


def test_an_image_without_a_name_is_loaded_by_id(images: ImageService, tmp_path: Path) -> None:
    blobs = Blobs()
    image = build(blobs, [tar_of({"a": b"1"})])
    said: list[dict[str, str]] = []
    path = oci_archive(tmp_path / "a", blobs, [("", image.descriptor)])
    with path.open("rb") as file:
        assert images.load(file, said.append) == [image.id]
    assert {"stream": f"Loaded image ID: {image.id}\n"} in said
    assert members(saved(images, [image.id], "docker"))["manifest.json"].count(b'"RepoTags":null')


def test_an_unbuffered_output_that_takes_little_gets_all(
    images: ImageService, tmp_path: Path
) -> None:
    class Stingy(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data[:100]))

    image = build(Blobs(), [tar_of({"a": b"1"})])
    load(images, docker_archive(tmp_path / "a", image, ["x:1"]).read_bytes())
    out = Stingy()
    images.save(["x:1"], out)
    assert out.getvalue() == saved(images, ["x:1"], "docker")


def test_what_is_not_there_cannot_be_saved(images: ImageService) -> None:
    out = io.BytesIO()
    with pytest.raises(NotFound, match="No such image: nope"):
        images.save(["nope"], out)
    with pytest.raises(Invalid, match="format"):
        images.save(["nope"], out, "zip")
    assert out.getvalue() == b""


# --- archives that lie


def refused(images: ImageService, data: bytes, words: str) -> None:
    with pytest.raises(BulkheadError, match=words):
        load(images, data)
    nothing_left(images)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no image"),
        (b"no tar at all" * 100, "not a tar"),
        (b"x" * 100, "cut short"),
        (bytes(1024), "no image"),
        (b"\x1f\x8b" + b"x" * 100, "gzip"),
        (tar_of({"readme": b"{}"}), "holds no image"),
        (tar_of({"manifest.json": b"[]"}), "holds no image"),
        (tar_of({"manifest.json": b"{"}), "cannot be read"),
        (tar_of({"index.json": b"{}"}), "members|cannot be read|manifest"),
        (tar_of({"manifest.json": b'[{"Config":"../../x","Layers":[]}]'}), "not in it"),
        (tar_of({"manifest.json": b'[{"Config":"manifest.json","Layers":[]}]'}), "cannot be read"),
        (tar_of({"a": "b", "b": "a", "manifest.json": "a"}), "circle"),
        (tar_of({"big": b"not a tar" * 1_000_000}), "too large"),
    ],
)
def test_no_archive(images: ImageService, data: bytes, words: str) -> None:
    refused(images, data, words)


def test_a_layer_that_is_not_the_configured_one(images: ImageService, tmp_path: Path) -> None:
    image = build(Blobs(), [tar_of({"a": b"1"})])
    other = build(Blobs(), [tar_of({"a": b"2"})])
    image.tars[:] = other.tars
    data = docker_archive(tmp_path / "a", image, ["x:1"]).read_bytes()
    refused(images, data, "invalid diffID for layer 0")


def test_a_layer_too_many(images: ImageService, tmp_path: Path) -> None:
    image = build(Blobs(), [tar_of({"a": b"1"})])
    image.tars.append(image.tars[0])
    data = docker_archive(tmp_path / "a", image, ["x:1"]).read_bytes()
    refused(images, data, "describes 1 layers")


@pytest.mark.parametrize("which", ["config", "layer", "manifest"])
def test_a_blob_that_has_not_its_digest(images: ImageService, tmp_path: Path, which: str) -> None:
    blobs = Blobs()
    image = build(blobs, [tar_of({"a": b"1"})], compression="")
    digest = {
        "config": image.id,
        "layer": digest_of(image.layers[0]),
        "manifest": image.digest,
    }[which]
    wrong = bytearray(blobs.by_digest[digest])
    wrong[512 if which == "layer" else 5] ^= 1
    blobs.by_digest[digest] = bytes(wrong)
    data = oci_archive(tmp_path / "a", blobs, [("x:1", image.descriptor)]).read_bytes()
    refused(images, data, "digest|JSON|has")


def test_a_blob_that_is_missing(images: ImageService, tmp_path: Path) -> None:
    for missing in (0, 1, 2):
        blobs = Blobs()
        image = build(blobs, [tar_of({"a": b"1"})])
        parts = (image.id, digest_of(image.layers[0]), image.digest)
        del blobs.by_digest[parts[missing]]
        data = oci_archive(tmp_path / "a", blobs, [("x:1", image.descriptor)]).read_bytes()
        refused(images, data, "not in")


def test_one_bad_image_of_several_names_none(images: ImageService, tmp_path: Path) -> None:
    blobs = Blobs()
    good = build(blobs, [tar_of({"a": b"1"})])
    bad = dict(good.descriptor, digest="sha256:" + "0" * 64)
    named = [("good:1", good.descriptor), ("bad:1", bad)]
    refused(images, oci_archive(tmp_path / "a", blobs, named).read_bytes(), "not in it")


def test_a_hostile_layer_is_refused(images: ImageService, tmp_path: Path) -> None:
    image = build(Blobs(), [tar_of({"../../../../etc/passwd": b"x"})])
    data = docker_archive(tmp_path / "a", image, ["x:1"]).read_bytes()
    refused(images, data, r"\.\.")


def test_a_bad_name_is_refused(images: ImageService, tmp_path: Path) -> None:
    image = build(Blobs(), [tar_of({"a": b"1"})])
    data = docker_archive(tmp_path / "a", image, ["UPPER:1"]).read_bytes()
    refused(images, data, "lowercase")


@given(st.binary(max_size=2000), st.integers(0, 4000))
def test_a_damaged_archive_never_surprises(noise: bytes, place: int) -> None:
    whole = tar_of({"a": b"x" * 700, "b" * 150: b"y", "c": "d"})
    data = whole[:place] + noise + whole[place + len(noise) :]
    source, _ = opened(io.BytesIO(data))
    try:
        reader = TarReader(source)
        for member in reader:
            assert member.size >= 0
            b"".join(reader.chunks())
    except BulkheadError:
        return
