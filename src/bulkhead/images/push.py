"""Pushing an image with exactly the digests it was pulled or loaded with.

An index is pushed whole when all of its manifests are stored, else the one manifest that the name
stands for. Images made here (commit, import, bootstrap, old docker archives) keep their layers as
plain tar: those are compressed for the push, in a way that gives the same digests again.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

from bulkhead.errors import NotFound
from bulkhead.images import assemble
from bulkhead.images.archive_write import blobs_with_diff_ids, complete_index
from bulkhead.images.catalog import Catalog, canonical
from bulkhead.images.fetch import exact
from bulkhead.images.names import Entry, Snapshot
from bulkhead.images.origins import Origins
from bulkhead.images.progress import Meter, Progress, serial, short, status
from bulkhead.images.pull import in_parallel
from bulkhead.oci.digest import of as digest_of
from bulkhead.oci.image import (
    LARGEST_MANIFEST,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    decode_index,
    encode,
)
from bulkhead.oci.reference import Reference, parse
from bulkhead.registry.client import Repository
from bulkhead.registry.upload import Upload


@dataclass(frozen=True, slots=True)
class _Blob:
    """What is to be there before a manifest: `diff_id` "" for what is no layer."""

    descriptor: Descriptor
    diff_id: str


@dataclass(slots=True)
class Push:
    """One push to `repository`."""

    catalog: Catalog
    origins: Origins
    repository: Repository
    progress: Progress

    def run(self, reference: Reference) -> str:
        """Push the image named `reference`; the digest it has at the registry now."""
        self.progress = serial(self.progress)
        reference = reference.tagged()
        tag = reference.tag or reference.digest or ""
        snapshot = self.catalog.names.read()
        entry = snapshot.by_name.get(canonical(reference))
        if entry is None:
            raise NotFound(f"An image does not exist locally with the tag: {reference.familiar}")
        self.progress({"status": f"The push refers to repository [{reference.name}]"})
        with self.catalog.store.lease():
            members = complete_index(self.catalog, entry)
            if members is not None:
                for member in members:
                    self._manifest(member, member.digest)
                data = self.catalog.store.read(entry.index, LARGEST_MANIFEST)
                media_type = decode_index(data, "", entry.index).media_type
                self.repository.put_manifest(tag, data, media_type)
                pushed = entry
            else:
                pushed = replace(self._exact(entry, snapshot), index="")
                self._manifest(pushed.manifest, tag)
                data = self.catalog.store.read(pushed.manifest.digest, LARGEST_MANIFEST)
            digest = digest_of(data)
            with self.catalog.store.gate.shared(), self.catalog.names.update() as draft:
                draft.give(replace(pushed, reference=reference.with_digest(digest)))
        self._forget_compressed(pushed)
        self.progress({"status": f"{tag}: digest: {digest} size: {len(data)}"})
        aux = {"Tag": tag, "Digest": digest, "Size": len(data)}
        self.progress({"progressDetail": {}, "aux": aux})
        return digest

    # --- what to push

    def _exact(self, entry: Entry, snapshot: Snapshot) -> Entry:
        """`entry`, or the same image with compressed layers if ours keep them as plain tar."""
        if not self._is_plain(entry.manifest):
            return entry
        for other in snapshot.by_image[entry.image]:
            if not self._is_plain(other.manifest):
                return replace(other, index="")
        manifest = self.catalog.manifest(entry.manifest.digest)
        layers: list[Descriptor] = []
        for layer in manifest.layers:
            if layer.media_type != OCI_LAYER:
                layers.append(layer)
                continue
            self.progress(status("Preparing", short(layer.digest), progressDetail={}))
            digest, size = self.catalog.store.compress(layer.digest, "gzip")
            layers.append(Descriptor(media_type=OCI_LAYER + "+gzip", digest=digest, size=size))
        data = encode(Manifest(manifest.config, layers, media_type=OCI_MANIFEST))
        digest = self.catalog.store.put(data)
        compressed = Descriptor(media_type=OCI_MANIFEST, digest=digest, size=len(data))
        return replace(entry, manifest=compressed)

    def _is_plain(self, descriptor: Descriptor) -> bool:
        """Whether `assemble.put` made the manifest, and it has plain tar layers."""
        manifest = self.catalog.manifest(descriptor.digest)
        same = assemble.manifest_of(manifest.config.digest, manifest.config.size, manifest.layers)
        return (
            any(layer.media_type == OCI_LAYER for layer in manifest.layers)
            and digest_of(encode(same)) == descriptor.digest
        )

    def _forget_compressed(self, entry: Entry) -> None:
        """Drop the blobs that were made for the push; they can be made again."""
        store = self.catalog.store
        for layer in self.catalog.manifest(entry.manifest.digest).layers:
            if store.provenance(layer.digest) is not None:
                store.evict(layer.digest)

    # --- pushing

    def _blobs(self, descriptor: Descriptor) -> list[_Blob]:
        """What the manifest refers to, layers with their diff ids."""
        data = self.catalog.store.read(descriptor.digest, LARGEST_MANIFEST)
        return [_Blob(*pair) for pair in blobs_with_diff_ids(self.catalog, data)]

    def _manifest(self, descriptor: Descriptor, target: str) -> None:
        """Push a manifest's blobs, then itself under `target`."""
        unique = {blob.descriptor.digest: blob for blob in self._blobs(descriptor)}
        for blob in unique.values():
            if blob.diff_id:
                identity = short(blob.descriptor.digest)
                self.progress(status("Waiting", identity, progressDetail={}))
        in_parallel(
            (lambda blob=blob: self._blob(blob))  # type: ignore[misc]
            for blob in unique.values()
        )(self.repository.config.uploads, self.repository.cancel.cancel)
        data = self.catalog.store.read(descriptor.digest, LARGEST_MANIFEST)
        media_type = descriptor.media_type
        self.repository.put_manifest(target, data, media_type)
        self.origins.record(self.repository.reference.name, unique)

    def _blob(self, blob: _Blob) -> None:
        identity = short(blob.descriptor.digest)
        descriptor = blob.descriptor
        report: Progress = self.progress if blob.diff_id else (lambda message: None)
        meter = Meter(report, "Pushing", identity, descriptor.size)
        upload = Upload(
            self.repository,
            descriptor.digest,
            descriptor.size,
            lambda: self._bytes(blob),
            meter.reach,
        )
        home = self.repository.reference
        known = [parse(name) for name in self.origins.of(descriptor.digest)]
        neighbours = [o.path for o in known if o.domain == home.domain and o.path != home.path]
        outcome = upload.run(neighbours)
        text = {"exists": "Layer already exists", "pushed": "Pushed"}.get(
            outcome, outcome.capitalize()
        )
        report(status(text, identity, progressDetail={}))

    def _bytes(self, blob: _Blob) -> Generator[bytes, None, None]:
        """The blob, fetched again from where it came from if it was evicted."""
        return exact(
            self.catalog.store,
            self.origins,
            blob.descriptor.digest,
            blob.descriptor.size,
            blob.diff_id,
            config=self.repository.config,
            cancel=self.repository.cancel,
        )
