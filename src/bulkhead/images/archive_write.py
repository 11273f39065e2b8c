"""`save`: images as an archive that every docker, podman and skopeo reads.

"docker" (docker save from 25 on): an OCI layout with plain tar layers, and manifest.json beside it
for older readers. "oci": manifests, indexes and blobs exactly as they are stored or came from the
registry, so that digests survive. Equal images give equal archives: times are 0, order is fixed.
"""

import tarfile
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import BinaryIO

import msgspec

from bulkhead.errors import Corrupt, Invalid, NotFound
from bulkhead.images import assemble
from bulkhead.images.archive_read import CONTAINERD_NAME, REF_NAME, DockerImage
from bulkhead.images.catalog import Catalog, canonical
from bulkhead.images.names import Entry, Snapshot
from bulkhead.oci.digest import of as digest_of
from bulkhead.oci.image import (
    CONFIGS,
    LARGEST_CONFIG,
    LARGEST_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    blobs_of,
    decode_index,
    encode,
)
from bulkhead.oci.reference import Reference, parse

FORMATS = ("docker", "oci")
_LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'
_BLOCK = 512
Fetch = Callable[[str, int, str], Generator[bytes, None, None]]
"""The exact bytes of a blob by digest, size and diff id ("" for what is no layer)."""


class _Tar:
    """A tar on its way into `out`; members appear once."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._written: set[str] = set()

    def add(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """A file of exactly `size` bytes."""
        if name in self._written:
            return
        self._written.add(name)
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o444
        self._write(member.tobuf(tarfile.GNU_FORMAT))
        done = 0
        for piece in pieces:
            self._write(piece)
            done += len(piece)
        if done != size:
            raise Corrupt(f"{name} has {done} bytes, expected {size}")
        self._write(bytes(-size % _BLOCK))

    def _write(self, data: bytes) -> None:
        """All of `data`, also into an unbuffered file that takes only a part at a time."""
        view = memoryview(data)
        while view:
            view = view[self._out.write(view) :]

    def document(self, name: str, data: bytes) -> None:
        """A small file."""
        self.add(name, len(data), [data])

    def end(self) -> None:
        """The two empty blocks."""
        self._write(bytes(2 * _BLOCK))
        self._out.flush()


def save(catalog: Catalog, refs: list[str], out: BinaryIO, how: str, fetch: Fetch) -> None:
    """Write the images `refs` (names, repositories, ids) to `out` as `how`, one of FORMATS.

    Everything is looked up before the first byte is written.
    """
    if how not in FORMATS:
        raise Invalid(f"unknown archive format {how!r}; there are {', '.join(FORMATS)}")
    with catalog.store.lease():
        snapshot = catalog.names.read()
        chosen = [pair for ref in refs for pair in _chosen(catalog, ref, snapshot)]
        if not chosen:
            raise Invalid("no image was named")
        write(catalog, chosen, out, how, fetch)


def write(
    catalog: Catalog,
    chosen: list[tuple[Entry, Reference | None]],
    out: BinaryIO,
    how: str,
    fetch: Fetch,
) -> None:
    """Write these images, named there as said, within the caller's lease."""
    if how == "docker":
        _docker(catalog, chosen, out)
    else:
        _oci(catalog, chosen, out, fetch)


def _chosen(catalog: Catalog, ref: str, snapshot: Snapshot) -> list[tuple[Entry, Reference | None]]:
    """What `ref` stands for: a name, all tags of a repository, or an id (saved without a name)."""
    image = catalog.find_or_none(ref, snapshot)
    entry = catalog.entry(ref, snapshot) if image is None or not _is_id(ref, image) else None
    try:
        reference = None if image is not None and entry is None else parse(ref)
    except Invalid:
        reference = None
    if reference is not None and reference.tag is None and reference.digest is None:
        tags = [
            (found, found.reference)
            for found in snapshot.entries
            if found.reference is not None
            and found.reference.name == reference.name
            and found.reference.tag is not None
        ]
        if tags:
            return list(tags)
    if entry is not None:
        return [(entry, parse(canonical(parse(ref))))]
    if image is None:
        raise NotFound(f"No such image: {ref}")
    return [(snapshot.by_image[image][0], None)]


def _is_id(ref: str, image: str) -> bool:
    return ref in (image, image.partition(":")[2])


def _blob(digest: str) -> str:
    return "blobs/sha256/" + digest.partition(":")[2]


def _named(descriptor: Descriptor, reference: Reference | None) -> Descriptor:
    """`descriptor` with the annotations that carry a name."""
    annotations: dict[str, str] = {}
    if reference is not None and reference.tag is not None:
        annotations = {CONTAINERD_NAME: str(reference), REF_NAME: str(reference)}
    return Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=annotations,
    )


def _docker(catalog: Catalog, chosen: list[tuple[Entry, Reference | None]], out: BinaryIO) -> None:
    store = catalog.store
    items: dict[str, DockerImage] = {}
    documents: dict[str, bytes] = {}
    descriptors: list[Descriptor] = []
    for entry, reference in chosen:
        config = store.read(entry.image, LARGEST_CONFIG)
        diff_ids = catalog.config(entry.image).rootfs.diff_ids
        layers = [assemble.tar_layer(diff_id, catalog.layer_size(diff_id)) for diff_id in diff_ids]
        manifest = encode(assemble.manifest_of(entry.image, len(config), layers))
        documents[entry.image] = config
        documents[digest_of(manifest)] = manifest
        descriptors.append(
            _named(
                Descriptor(
                    media_type=OCI_MANIFEST,
                    digest=digest_of(manifest),
                    size=len(manifest),
                ),
                reference,
            )
        )
        item = items.setdefault(
            entry.image, DockerImage(_blob(entry.image), [_blob(d) for d in diff_ids])
        )
        if reference is not None and reference.tag is not None:
            item.repo_tags = [*(item.repo_tags or ()), reference.familiar]
    tar = _Tar(out)
    tar.document("oci-layout", _LAYOUT)
    tar.document("index.json", encode(Index(descriptors, media_type=OCI_INDEX)))
    tar.document("manifest.json", msgspec.json.encode(list(items.values())))
    for digest in sorted(documents):
        tar.document(_blob(digest), documents[digest])
    for image in items:
        for diff_id in catalog.config(image).rootfs.diff_ids:
            tar.add(_blob(diff_id), catalog.layer_size(diff_id), store.tar(diff_id))
    tar.end()


def _oci(
    catalog: Catalog, chosen: list[tuple[Entry, Reference | None]], out: BinaryIO, fetch: Fetch
) -> None:
    tar = _Tar(out)
    descriptors: list[Descriptor] = []
    manifests: dict[str, bytes] = {}
    indexes: dict[str, bytes] = {}
    for entry, reference in chosen:
        members = complete_index(catalog, entry)
        if members is not None:
            data = catalog.store.read(entry.index, LARGEST_MANIFEST)
            indexes[entry.index] = data
            kind = decode_index(data, "", entry.index).media_type
            top = Descriptor(media_type=kind, digest=entry.index, size=len(data))
        else:
            members, top = [entry.manifest], entry.manifest
        for member in members:
            manifests[member.digest] = catalog.store.read(member.digest, LARGEST_MANIFEST)
        descriptors.append(_named(top, reference))
    tar.document("oci-layout", _LAYOUT)
    tar.document("index.json", encode(Index(descriptors, media_type=OCI_INDEX)))
    for digest, data in sorted({**manifests, **indexes}.items()):
        tar.document(_blob(digest), data)
    for data in manifests.values():
        for blob, diff_id in blobs_with_diff_ids(catalog, data):
            with closing(fetch(blob.digest, blob.size, diff_id)) as pieces:
                tar.add(_blob(blob.digest), blob.size, pieces)
    tar.end()


def blobs_with_diff_ids(catalog: Catalog, manifest: bytes) -> list[tuple[Descriptor, str]]:
    """The configuration, then the layers of a manifest with their diff ids ("" if not known)."""
    config, *layers = blobs_of(manifest, "manifest")
    diff_ids: list[str] = []
    if config.media_type in CONFIGS and catalog.store.has(config.digest):
        diff_ids = catalog.config(config.digest).rootfs.diff_ids
    if len(diff_ids) != len(layers):
        diff_ids = [""] * len(layers)
    return [(config, ""), *zip(layers, diff_ids, strict=True)]


def complete_index(catalog: Catalog, entry: Entry) -> list[Descriptor] | None:
    """The manifests of the entry's index; None unless it and all that they need can be had."""
    store = catalog.store
    if not entry.index or not store.has(entry.index):
        return None
    members = decode_index(store.read(entry.index, LARGEST_MANIFEST), "", entry.index).manifests
    for member in members:
        if not store.has(member.digest):
            return None
        data = store.read(member.digest, LARGEST_MANIFEST)
        for blob, diff_id in blobs_with_diff_ids(catalog, data):
            if not store.has(blob.digest) and not (diff_id and store.layer(diff_id) is not None):
                return None
    return members
