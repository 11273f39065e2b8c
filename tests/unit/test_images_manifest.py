"""Manifests, indexes and configurations: what is read and what is refused; platforms."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import BulkheadError, Corrupt, Invalid, NotFound, Unsupported
from bulkhead.oci import image as oci
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import Descriptor, Platform

DIGEST = "sha256:" + "b" * 64


def manifest(**changes: Any) -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {"mediaType": oci.OCI_CONFIG, "digest": DIGEST, "size": 2},
        "layers": [{"mediaType": oci.OCI_LAYER + "+gzip", "digest": DIGEST, "size": 3}],
    }
    document.update(changes)
    return json.dumps({k: v for k, v in document.items() if v is not None}).encode()


def layer(**changes: Any) -> dict[str, Any]:
    return {"mediaType": oci.OCI_LAYER, "digest": DIGEST, "size": 3, **changes}


def test_a_manifest_is_read() -> None:
    read = oci.decode_manifest(manifest(), oci.OCI_MANIFEST)
    assert read.layers[0].size == 3
    assert oci.compression_of(read.layers[0]) == "gzip"
    assert oci.decode_manifest(manifest(mediaType=None)).media_type == oci.OCI_MANIFEST


def test_what_is_written_carries_the_required_members() -> None:
    made = oci.Manifest(Descriptor(media_type=oci.OCI_CONFIG, digest=DIGEST, size=0), [])
    document = json.loads(oci.encode(made))
    assert document["schemaVersion"] == 2
    assert document["config"]["size"] == 0
    assert json.loads(oci.encode(oci.Index([])))["manifests"] == []


@pytest.mark.parametrize(
    ("data", "declared", "kind", "words"),
    [
        (manifest(manifests=[]), "", Corrupt, "both an index and a manifest"),
        (manifest(), oci.OCI_INDEX, Corrupt, "calls itself"),
        (manifest(), oci.DOCKER_MANIFEST, Corrupt, "calls itself"),
        (manifest(mediaType=oci.OCI_INDEX), "", Corrupt, "not its members"),
        (manifest(mediaType="text/html"), "", Unsupported, "not an image"),
        (manifest(schemaVersion=1), "", Unsupported, "schema 1"),
        (b'{"fsLayers": []}', "", Unsupported, "schema 1"),
        (b"{}", oci.DOCKER_SCHEMA1[1], Unsupported, "schema 1"),
        (manifest(schemaVersion=3), "", Unsupported, "schemaVersion 3"),
        (b"[1]", "", Corrupt, "not a JSON object"),
        (b"\xff\xfe", "", Corrupt, "not a JSON object"),
        (b"[" * 100_000, "", Corrupt, "not a JSON object"),
        (manifest(layers=None), "", Corrupt, "cannot be read"),
        (manifest(layers=[layer(size=-1)]), "", Invalid, "claims -1 bytes"),
        (manifest(layers=[layer(size=1 << 62)]), "", Invalid, "claims"),
        (manifest(layers=[layer(size=1.5)]), "", Corrupt, "cannot be read"),
        (manifest(layers=[layer(digest="sha256:../../x")]), "", Invalid, "not a digest"),
        (manifest(layers=[layer(digest="sha512:" + "a" * 128)]), "", Invalid, "not sha256"),
        (manifest(layers=[layer(mediaType="a/b")]), "", Unsupported, "media type"),
        (manifest(layers=[layer()] * 501), "", Invalid, "501 layers"),
        (
            manifest(config={"mediaType": "application/vnd.x", "digest": DIGEST, "size": 1}),
            "",
            Unsupported,
            "artifact",
        ),
        (
            manifest(config={"mediaType": oci.OCI_CONFIG, "digest": DIGEST, "size": 1 << 40}),
            "",
            Invalid,
            "claims",
        ),
    ],
)
def test_a_hostile_manifest_is_refused(
    data: bytes, declared: str, kind: type[BulkheadError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        oci.decode_manifest(data, declared)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for decode in (oci.decode_manifest, oci.decode_index):
        try:
            decode(data)
        except BulkheadError:
            continue
        raise AssertionError("random bytes were taken for a manifest")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["config", "layers", "manifests", "mediaType"]), _json))
def test_any_json_is_read_or_refused(document: dict[str, Any]) -> None:
    data = json.dumps({"schemaVersion": 2, **document}).encode()
    for decode in (oci.decode_manifest, oci.decode_index, oci.blobs_of):
        try:
            decode(data, "what")
        except BulkheadError:
            continue


def test_a_configuration_with_an_impossible_root_is_refused() -> None:
    with pytest.raises(Unsupported, match="of type 'x'"):
        oci.decode_config(b'{"rootfs": {"type": "x", "diff_ids": []}}')
    with pytest.raises(Invalid, match="not a digest"):
        oci.decode_config(b'{"rootfs": {"type": "layers", "diff_ids": ["../x"]}}')
    many = json.dumps({"rootfs": {"type": "layers", "diff_ids": [DIGEST] * 501}})
    with pytest.raises(Invalid, match="501 layers"):
        oci.decode_config(many.encode())


def test_dockers_own_members_are_read() -> None:
    config: dict[str, Any] = {
        "User": "u",
        "ExposedPorts": {"80/tcp": {}},
        "Entrypoint": None,
        "OnBuild": [],
        "Healthcheck": {"Test": ["CMD", "x"], "Interval": 5},
        "Unknown": 1,
    }
    document = {"os": "linux", "architecture": "amd64", "config": config, "container": "abc"}
    read = oci.decode_config(json.dumps(document).encode())
    assert read.container.user == "u"
    assert read.container.healthcheck is not None
    assert read.container.healthcheck.interval == 5


def offered(*texts: str) -> list[Descriptor]:
    found = []
    for number, text in enumerate(texts):
        parts = text.split("/")
        platform = Platform(parts[1], parts[0], parts[2] if len(parts) > 2 else "")
        found.append(Descriptor(digest=f"{number}", platform=platform))
    return found


@pytest.mark.parametrize(
    ("machine", "available", "chosen"),
    [
        ("x86_64", ("linux/arm64", "linux/amd64"), 1),
        ("x86_64", ("linux/386", "linux/amd64"), 1),
        ("x86_64", ("linux/arm64", "linux/386"), 1),
        ("x86_64", ("linux/amd64/v3", "linux/amd64"), 1),
        ("x86_64", ("windows/amd64", "linux/amd64"), 1),
        ("aarch64", ("linux/arm/v7", "linux/arm64/v8"), 1),
        ("aarch64", ("linux/arm/v6", "linux/arm/v7"), 1),
        ("armv7l", ("linux/arm/v5", "linux/arm/v6", "linux/arm64"), 1),
        ("x86_64", ("unknown/unknown", "linux/amd64"), 1),
    ],
)
def test_the_best_manifest_of_an_index(
    machine: str, available: tuple[str, ...], chosen: int
) -> None:
    found = platforms.choose(offered(*available), platforms.of_machine(machine), "x")
    assert found.digest == str(chosen)


def test_an_index_without_a_fitting_manifest_says_what_it_has() -> None:
    with pytest.raises(NotFound, match=r"no matching manifest for linux/riscv64 .* linux/amd64"):
        platforms.choose(offered("linux/amd64"), platforms.parse("linux/riscv64"), "x")
    with pytest.raises(NotFound):  # named by the user: no second best
        platforms.choose(offered("linux/386"), platforms.parse("linux/amd64"), "x", exact=True)
    with pytest.raises(NotFound):
        platforms.choose([], platforms.parse("linux/amd64"), "x")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("linux/x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
    ],
)
def test_platforms_are_normalised(text: str, normal: str) -> None:
    assert str(platforms.parse(text)) == normal


@pytest.mark.parametrize("text", ["", "a/b/c/d", "linux", "linux/"])
def test_a_bad_platform_is_invalid(text: str) -> None:
    with pytest.raises(Invalid):
        platforms.parse(text)
