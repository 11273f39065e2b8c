"""`load`: images from docker-archive (docker save old and new, podman, skopeo) and OCI archive.

The archive is read once, front to back, from a file or a pipe: a member that is JSON is kept in
memory, any other is taken for a layer and goes straight into the store while it is read. What the
members mean (manifest.json, or index.json and its manifests) is settled at the end, where every
digest that was promised is compared with the one found. Nothing has a name before that; what was
stored for a refused archive is garbage, collected at the next occasion.
"""

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

from bulkhead.errors import Corrupt, Invalid
from bulkhead.images import assemble
from bulkhead.images.catalog import Catalog, host_platform
from bulkhead.images.progress import Meter, Progress, serial, short, stream
from bulkhead.images.tarstream import TarReader, compression_of, looks_like_tar, opened
from bulkhead.oci import platform as platforms
from bulkhead.oci.digest import of as digest_of
from bulkhead.oci.image import (
    INDEXES,
    LARGEST_CONFIG,
    OCI_INDEX,
    Descriptor,
    ImageConfig,
    Manifest,
    blobs_of,
    decode_config,
    decode_index,
    decode_manifest,
    decode_object,
    media_type_of,
)
from bulkhead.oci.image import (
    compression_of as stated_compression,
)
from bulkhead.oci.reference import Reference, parse

_LARGEST_JSON = LARGEST_CONFIG
_ALL_JSON = 128 << 20
"""Bytes of JSON kept in memory for one archive."""
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})\Z")
_HEAD = 512
REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"


class DockerImage(msgspec.Struct, rename="pascal"):
    """One element of manifest.json (docker's image tarball specification 1.2)."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    """A member that was stored as a layer; `digest` and `size` are those of its bytes as found."""

    diff_id: str
    tar_size: int
    digest: str
    size: int
    compressed: bool


@dataclass(slots=True)
class _Contents:
    """What an archive holds, by member name."""

    documents: dict[str, bytes] = field(default_factory=dict)
    layers: dict[str, _Layer] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def follow(self, name: str) -> str:
        """The member that `name` is, or links to (docker wrote equal layers as links)."""
        name = _clean(name)
        for _ in range(10):
            if name not in self.links:
                return name
            name = self.links[name]
        raise Invalid(f"the archive's member {name!r} is a circle of links")

    def document(self, name: str) -> bytes | None:
        """The JSON member `name`."""
        return self.documents.get(self.follow(name))

    def layer(self, name: str) -> _Layer | None:
        """The layer member `name`."""
        return self.layers.get(self.follow(name))


def _clean(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


def load(
    catalog: Catalog, file: BinaryIO, progress: Progress, under: Reference | None = None
) -> list[str]:
    """Store and name the images of the archive `file`; their familiar names, or ids without one.

    `under`: its first image gets this name, whatever the archive says, and no other is named.
    Invalid for what is no image archive, Corrupt for one whose digests are wrong: then nothing of
    it is named.
    """
    report = serial(progress)
    with assemble.leased(catalog):
        contents = _scan(catalog, file, report)
        if (document := contents.document("manifest.json")) is not None:
            images = list(_docker_images(catalog, contents, document))
        elif (document := contents.document("index.json")) is not None:
            images = list(_oci_images(catalog, contents, document))
        else:
            raise Invalid(
                "the archive holds no image: neither manifest.json nor index.json is in it"
            )
        if not images:
            raise Invalid("the archive holds no image")
        if under is not None:
            images = [(images[0][0], [under])]
        loaded: list[str] = []
        for stored, references in images:
            assemble.name(catalog, stored, references)
            for reference in references:
                report(stream(f"Loaded image: {reference.familiar}"))
                loaded.append(reference.familiar)
            if not references:
                report(stream(f"Loaded image ID: {stored.image}"))
                loaded.append(stored.image)
    return loaded


def _scan(catalog: Catalog, file: BinaryIO, progress: Progress) -> _Contents:
    contents = _Contents()
    source, _ = opened(file)
    reader = TarReader(source)
    room = _ALL_JSON
    for member in reader:
        name = _clean(member.name)
        if member.kind in "12":
            base = posixpath.dirname(name) if member.kind == "2" else ""
            contents.links[name] = _clean(posixpath.join(base, member.target))
        elif member.kind in "07":
            head = reader.read(_HEAD)
            if _is_layer(head, name):
                contents.layers[name] = _ingest(catalog, name, head, member.size, reader, progress)
            elif member.size <= min(room, _LARGEST_JSON):
                contents.documents[name] = head + b"".join(reader.chunks())
                room -= member.size
            else:
                raise Invalid(f"the archive's member {name!r} is no layer, and too large for JSON")
            contents.links.pop(name, None)
    return contents


def _is_layer(head: bytes, name: str) -> bool:
    if compression_of(head) or looks_like_tar(head):
        return True
    return name.endswith("/layer.tar")


def _ingest(
    catalog: Catalog, name: str, head: bytes, size: int, reader: TarReader, progress: Progress
) -> _Layer:
    """Store one layer while it is read; a name that states a digest must be true."""
    kind = compression_of(head)
    if kind not in ("", "gzip", "zstd"):
        raise Invalid(f"layer {name!r} is compressed with {kind}; gzip and zstd are supported")
    promised = _BLOB.match(name)
    digest = f"sha256:{promised[1]}" if promised else None
    meter = Meter(progress, "Loading layer", short(digest or name.split("/")[0]), size)

    def chunks() -> Iterator[bytes]:
        yield head
        yield from reader.chunks()

    layer = catalog.store.ingest(
        chunks(),
        compression=kind,
        digest=digest,
        size=size,
        keep_blob=bool(kind and promised),
        progress=meter.reach,
    )
    meter.show()
    return _Layer(layer.diff_id, layer.size, layer.digest, layer.blob_size, bool(kind))


def _docker_images(
    catalog: Catalog, contents: _Contents, document: bytes
) -> Iterator[tuple[assemble.Stored, list[Reference]]]:
    try:
        items = msgspec.json.decode(document, type=list[DockerImage])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"the archive's manifest.json cannot be read: {error}") from error
    exact = _exact_manifests(contents)
    for item in items:
        data = contents.document(item.config)
        if data is None:
            raise Invalid(f"the archive's manifest.json names {item.config!r}, which is not in it")
        config = decode_config(data, f"the archive's {item.config}")
        layers = [_needed(contents, path) for path in item.layers]
        _compare(config, layers, item.config)
        references = [parse(tag).tagged() for tag in item.repo_tags or ()]
        manifest = exact.get(digest_of(data))
        if manifest is not None and _complete(catalog, contents, manifest[1]):
            yield _keep(catalog, contents, *manifest), references
        else:
            plain = [assemble.tar_layer(layer.diff_id, layer.tar_size) for layer in layers]
            yield assemble.put(catalog, data, plain), references


def _needed(contents: _Contents, path: str) -> _Layer:
    layer = contents.layer(path)
    if layer is None:
        raise Invalid(f"the archive's manifest.json names layer {path!r}, which is not in it")
    return layer


def _compare(config: ImageConfig, layers: list[_Layer], what: str) -> None:
    wanted = config.rootfs.diff_ids
    if len(wanted) != len(layers):
        raise Corrupt(
            f"{what} describes {len(wanted)} layers, but the archive gives it {len(layers)}"
        )
    for position, (diff_id, layer) in enumerate(zip(wanted, layers, strict=True)):
        if diff_id != layer.diff_id:
            raise Corrupt(
                f"invalid diffID for layer {position} of {what}: "
                f"expected {diff_id}, got {layer.diff_id}"
            )


def _exact_manifests(contents: _Contents) -> dict[str, tuple[Descriptor, Manifest, bytes]]:
    """The manifests of the archive's OCI side, by image id (docker 25 and later write both)."""
    document = contents.document("index.json")
    if document is None:
        return {}
    found: dict[str, tuple[Descriptor, Manifest, bytes]] = {}
    for descriptor in decode_index(document, OCI_INDEX, "the archive's index.json").manifests:
        data = contents.document(_blob_path(descriptor.digest))
        if data is None or descriptor.media_type in INDEXES:
            continue
        what = f"the archive's manifest {descriptor.digest}"
        _check_blob(descriptor, data, what)
        manifest = decode_manifest(data, descriptor.media_type, what)
        found[manifest.config.digest] = (descriptor, manifest, data)
    return found


def _blob_path(digest: str) -> str:
    return "blobs/sha256/" + digest.partition(":")[2]


def _check_blob(descriptor: Descriptor, data: bytes, what: str) -> None:
    if descriptor.size != len(data) or digest_of(data) != descriptor.digest:
        raise Corrupt(
            f"{what} has {len(data)} bytes and digest {digest_of(data)}; "
            f"expected {descriptor.size} bytes and {descriptor.digest}"
        )


def _complete(catalog: Catalog, contents: _Contents, manifest: Manifest) -> bool:
    return all(
        contents.layer(_blob_path(layer.digest)) is not None or catalog.store.has(layer.digest)
        for layer in manifest.layers
    )


def _oci_images(
    catalog: Catalog, contents: _Contents, document: bytes
) -> Iterator[tuple[assemble.Stored, list[Reference]]]:
    index = decode_index(document, OCI_INDEX, "the archive's index.json")
    for descriptor in index.manifests:
        yield _oci_image(catalog, contents, descriptor), _names(descriptor.annotations)


def _oci_image(catalog: Catalog, contents: _Contents, outer: Descriptor) -> assemble.Stored:
    """Store the image of one descriptor; of a nested index, the manifest for this machine."""
    descriptor, chosen_from = outer, ""
    for _ in range(3):
        what = f"the archive's {descriptor.digest}"
        data = contents.document(_blob_path(descriptor.digest))
        if data is None:
            raise Invalid(f"the archive's index.json names {descriptor.digest}, which is not in it")
        _check_blob(descriptor, data, what)
        kind = media_type_of(decode_object(data, what), descriptor.media_type, what)
        if kind not in INDEXES:
            manifest = decode_manifest(data, descriptor.media_type, what)
            return _keep(catalog, contents, descriptor, manifest, data, chosen_from)
        members = decode_index(data, descriptor.media_type, what).manifests
        chosen_from = chosen_from or catalog.store.put(data)
        chosen = platforms.choose(members, host_platform(), what)
        for member in members:
            if member is not chosen:
                _keep_sibling(catalog, contents, member)
        descriptor = chosen
    raise Invalid(f"the archive's {outer.digest} nests indexes too deeply")


def _keep_sibling(catalog: Catalog, contents: _Contents, member: Descriptor) -> None:
    """Store an index's other manifest, so that the index can be saved and pushed as it is.

    One of which something is missing stays out: such archives hold one platform of several.
    """
    data = contents.document(_blob_path(member.digest))
    if data is None:
        return
    what = f"the archive's {member.digest}"
    _check_blob(member, data, what)
    for blob in blobs_of(data, what):
        inside = contents.document(_blob_path(blob.digest))
        if inside is not None:
            _check_blob(blob, inside, f"the archive's {blob.digest}")
            catalog.store.put(inside)
        elif not catalog.store.has(blob.digest):
            return
    catalog.store.put(data)


def _keep(
    catalog: Catalog,
    contents: _Contents,
    descriptor: Descriptor,
    manifest: Manifest,
    data: bytes,
    index: str = "",
) -> assemble.Stored:
    """Store a manifest exactly as it is, once its configuration and layers proved right."""
    what = f"manifest {descriptor.digest}"
    config_data = contents.document(_blob_path(manifest.config.digest))
    if config_data is None:
        raise Invalid(f"{what} needs {manifest.config.digest}, which is not in the archive")
    _check_blob(manifest.config, config_data, f"{what}: configuration")
    config = decode_config(config_data, f"image {manifest.config.digest}")
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise Corrupt(f"{what} has {len(manifest.layers)} layers, its configuration another number")
    for position, (layer, diff_id) in enumerate(
        zip(manifest.layers, config.rootfs.diff_ids, strict=True)
    ):
        found = contents.layer(_blob_path(layer.digest))
        if found is None:
            if catalog.store.has(layer.digest) and catalog.store.layer(diff_id) is not None:
                continue
            raise Invalid(f"{what} needs layer {layer.digest}, which is not in the archive")
        _check_layer(layer, found, f"layer {position} of {what}")
        if found.diff_id != diff_id:
            raise Corrupt(
                f"invalid diffID for layer {position} of {what}: "
                f"expected {diff_id}, got {found.diff_id}"
            )
    catalog.store.put(config_data)
    catalog.store.put(data)
    kept = Descriptor(
        media_type=manifest.media_type, digest=descriptor.digest, size=descriptor.size
    )
    return assemble.Stored(manifest.config.digest, kept, index)


def _check_layer(layer: Descriptor, found: _Layer, what: str) -> None:
    if found.size != layer.size or found.digest != layer.digest:
        raise Corrupt(
            f"{what} has {found.size} bytes and digest {found.digest}; "
            f"expected {layer.size} bytes and {layer.digest}"
        )
    if bool(stated_compression(layer)) != found.compressed:
        raise Corrupt(f"{what} is not compressed as its media type {layer.media_type} says")


def _names(annotations: dict[str, str]) -> list[Reference]:
    """The names an index entry carries: containerd's full one, or the specification's short one.

    A mere tag says nothing about the repository: such an image is loaded without a name.
    """
    for key in (CONTAINERD_NAME, REF_NAME):
        text = annotations.get(key, "")
        if "/" in text or ":" in text:
            try:
                return [parse(text).tagged()]
            except Invalid:
                continue
    return []
