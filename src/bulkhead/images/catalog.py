"""What images there are: names and content put together, read-only.

An image's id is the digest of its configuration, as in Docker. Configurations and manifests never
change, so what was decoded once is kept in memory by digest.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bulkhead.errors import Corrupt, Invalid, NotFound
from bulkhead.images.names import Entry, Names, Snapshot
from bulkhead.oci import platform as platforms
from bulkhead.oci.digest import is_digest, verify
from bulkhead.oci.image import (
    CONFIGS,
    LARGEST_CONFIG,
    LARGEST_MANIFEST,
    ImageConfig,
    Manifest,
    Platform,
    blobs_of,
    decode_config,
    decode_index,
    decode_manifest,
)
from bulkhead.oci.reference import Reference, could_be_id, parse
from bulkhead.store.content import ContentStore

_CACHED = 1024


@dataclass(frozen=True, slots=True)
class Image:
    """One image as the rest of the program sees it; `size` is the bytes of its layers as tar.

    `names` are familiar references ("debian:bookworm"); `created` is RFC 3339 or "".
    """

    id: str
    config: ImageConfig
    diff_ids: tuple[str, ...]
    names: tuple[str, ...]
    manifest_digest: str
    size: int
    created: str


def host_platform() -> Platform:
    """The platform of this machine."""
    return platforms.of_machine(os.uname().machine)


class Catalog:
    """Reads images from `store` by the names in `names`."""

    def __init__(self, store: ContentStore, names: Names) -> None:
        self.store = store
        self.names = names
        self.held: Callable[[], Iterable[str]] = tuple
        """Digests that are needed although no name needs them: those of workloads."""
        self._configs: dict[str, ImageConfig] = {}
        self._manifests: dict[str, Manifest] = {}
        self._images: tuple[Snapshot | None, dict[str, Image]] = (None, {})
        self._mutex = threading.Lock()

    def config(self, digest: str) -> ImageConfig:
        """The configuration with this digest; Corrupt if it is not stored or not readable."""
        found = self._configs.get(digest)
        if found is None:
            found = decode_config(self.store.read(digest, LARGEST_CONFIG), f"image {digest}")
            with self._mutex:
                if len(self._configs) >= _CACHED:
                    self._configs.clear()
                self._configs[digest] = found
        return found

    def manifest(self, digest: str) -> Manifest:
        """The manifest with this digest."""
        found = self._manifests.get(digest)
        if found is None:
            data = self.store.read(digest, LARGEST_MANIFEST)
            found = decode_manifest(data, "", f"manifest {digest}")
            with self._mutex:
                if len(self._manifests) >= _CACHED:
                    self._manifests.clear()
                self._manifests[digest] = found
        return found

    def image(self, identity: str, snapshot: Snapshot | None = None) -> Image:
        """The image with exactly this id, which the snapshot must hold."""
        snapshot = snapshot or self.names.read()
        if self._images[0] is not snapshot:
            self._images = (snapshot, {})
        images = self._images[1]
        if identity not in images:
            images[identity] = self._describe(identity, snapshot.by_image[identity])
        return images[identity]

    def described(self) -> int | None:
        """How many images there are, if `image` needs no file for any of them; else None."""
        snapshot = self.names.read()
        known, images = self._images
        whole = known is snapshot and len(images) == len(snapshot.by_image)
        return len(images) if whole else None

    def _describe(self, identity: str, entries: list[Entry]) -> Image:
        config = self.config(identity)
        names = sorted(e.reference.familiar for e in entries if e.reference and e.reference.tag)
        return Image(
            id=identity,
            config=config,
            diff_ids=tuple(config.rootfs.diff_ids),
            names=tuple(names),
            manifest_digest=entries[0].manifest.digest,
            size=sum(self.layer_size(diff_id) for diff_id in config.rootfs.diff_ids),
            created=config.created or "",
        )

    def layer_size(self, diff_id: str) -> int:
        """Bytes of the layer as a tar; 0 while it is not stored."""
        layer = self.store.layer(diff_id)
        return layer.size if layer is not None else 0

    def find(self, text: str, snapshot: Snapshot | None = None) -> str:
        """The image id that `text` means, as Docker looks it up.

        A full id first, then a reference (tag "latest" by default), then a prefix of one id.
        NotFound "No such image: …"; Invalid for text that can be neither.
        """
        snapshot = snapshot or self.names.read()
        full = text if text.startswith("sha256:") else f"sha256:{text}"
        if is_digest(full):
            if full in snapshot.by_image:
                return full
            raise NotFound(f"No such image: {text}")
        entry = self.entry(text, snapshot)
        if entry is not None:
            return entry.image
        if could_be_id(text):
            matches = [image for image in snapshot.by_image if image.startswith(_prefix(text))]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise Invalid(f"ambiguous image id prefix: {text} ({len(matches)} images match)")
        raise NotFound(f"No such image: {text}")

    def find_or_none(self, text: str, snapshot: Snapshot) -> str | None:
        """`find`, None for no image; Invalid as there."""
        try:
            return self.find(text, snapshot)
        except NotFound:
            return None

    def entry(self, text: str, snapshot: Snapshot) -> Entry | None:
        """The entry of the reference `text`, or None; Invalid if it is no reference nor an id."""
        try:
            reference = parse(text)
        except Invalid:
            if could_be_id(text):
                return None
            raise
        return snapshot.by_name.get(canonical(reference))

    def resolve(self, text: str) -> Image:
        """The image that `text` means; NotFound if none."""
        snapshot = self.names.read()
        return self.image(self.find(text, snapshot), snapshot)

    def roots(self) -> Iterator[str]:
        """Every digest that a name, an image without one, or who uses them, needs; for gc.

        Blobs, the index an image was chosen from with those of its manifests that are stored, and
        layers by diff id. The store is locked while it asks: only files are read here.
        """
        yield from self.held()
        seen: set[str] = set()
        for entry in self.names.read().entries:
            key = f"{entry.manifest.digest} {entry.index}"
            if key not in seen:
                seen.add(key)
                yield from self.reach(entry)

    def reach(self, entry: Entry) -> Iterator[str]:
        """Every digest that `entry` needs, some of them more than once."""
        manifests = [entry.manifest.digest]
        if entry.index:
            yield entry.index
            manifests += self._stored_members(entry.index)
        for digest in manifests:
            yield digest
            yield from self._reachable(digest)

    def _raw(self, digest: str) -> bytes | None:
        """A stored blob's bytes, verified; None if it is not there."""
        try:
            with open(self.store.blob_path(digest), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        verify(data, digest, where=f"blob {digest} in {self.store.root}")
        return data

    def _reachable(self, digest: str) -> Iterator[str]:
        data = self._raw(digest)
        if data is None:
            raise Corrupt(
                f"manifest {digest}, which an image needs, is gone from {self.store.root}"
            )
        for blob in blobs_of(data, f"manifest {digest}"):
            yield blob.digest
            if blob.media_type in CONFIGS and (config := self._raw(blob.digest)) is not None:
                yield from decode_config(config, blob.digest).rootfs.diff_ids

    def _stored_members(self, digest: str) -> list[str]:
        data = self._raw(digest)
        if data is None:
            return []
        members = decode_index(data, "", f"index {digest}").manifests
        return [m.digest for m in members if os.path.exists(self.store.blob_path(m.digest))]


def canonical(reference: Reference) -> str:
    """The key of a name: with the default tag; a digest makes the tag void, as in Docker."""
    if reference.digest is not None:
        return str(reference.with_digest(reference.digest))
    return str(reference.tagged())


def _prefix(text: str) -> str:
    return text if text.startswith("sha256:") else f"sha256:{text}"
