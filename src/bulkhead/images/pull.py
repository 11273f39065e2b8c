"""Pulling an image: manifest, configuration, layers in parallel, then the name.

Each layer goes from the connection straight into the store, which verifies its digests. The name
is given last, within a lease; an aborted pull leaves whole layers (found again by the next one),
the start of unfinished blobs (resumed by the next one), and no name.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass

from bulkhead.errors import Corrupt, NotFound
from bulkhead.images import assemble
from bulkhead.images.catalog import Catalog, Image, canonical, host_platform
from bulkhead.images.origins import Origins
from bulkhead.images.progress import Meter, Progress, serial, short, status
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import (
    INDEXES,
    Descriptor,
    ImageConfig,
    Manifest,
    Platform,
    blobs_of,
    compression_of,
    decode_config,
    decode_index,
    decode_manifest,
    decode_object,
    media_type_of,
)
from bulkhead.oci.reference import Reference
from bulkhead.registry.client import Fetched, Repository
from bulkhead.registry.waiting import Cancelled

ALL = "all"


@dataclass(slots=True)
class Pull:
    """One pull. `keep_blobs`: whether compressed blobs stay beside the layers made from them."""

    catalog: Catalog
    origins: Origins
    repository: Repository
    progress: Progress
    keep_blobs: bool = True

    def run(self, reference: Reference, platform: str | None) -> Image:
        """Pull `reference` for `platform` ("os/arch", "all", None: this machine)."""
        self.progress = serial(self.progress)
        reference = reference.tagged()
        target = reference.digest or reference.tag or ""
        with self.catalog.store.lease():
            fetched = self.repository.manifest(target)
            # Not before: what fails until here is an answer with a status, and no stream.
            name = reference.path.removeprefix("library/")
            self.progress(status(f"Pulling from {name}", target))
            stored = self._top(fetched, reference, platform)
            names = [reference.with_digest(fetched.digest)]
            if reference.digest is None:
                names.append(reference)
            before = self.catalog.names.read().by_name.get(canonical(reference))
            assemble.name(self.catalog, stored, names)
        fresh = before is None or before.image != stored.image
        what = "Downloaded newer image" if fresh else "Image is up to date"
        self.progress({"status": f"Digest: {fetched.digest}"})
        self.progress({"status": f"Status: {what} for {reference.familiar}"})
        return self.catalog.image(stored.image)

    def _top(self, fetched: Fetched, reference: Reference, platform: str | None) -> assemble.Stored:
        what = f"manifest for {reference.familiar}"
        kind = media_type_of(decode_object(fetched.data, what), fetched.media_type, what)
        wanted = host_platform() if platform in (None, ALL) else platforms.parse(platform or "")
        if kind not in INDEXES:
            explicit = None if platform in (None, ALL) else wanted
            return self._image(fetched, what, explicit)
        index = decode_index(fetched.data, fetched.media_type, what)
        exact = platform not in (None, ALL)
        chosen = platforms.choose(index.manifests, wanted, reference.familiar, exact=exact)
        if platform == ALL:
            for member in index.manifests:
                if member is not chosen:
                    self._member(member)
        child = self.repository.manifest(chosen.digest, size=chosen.size)
        media_type_of(decode_object(child.data, what), chosen.media_type, what)
        stored = self._image(child, f"manifest {chosen.digest}", None)
        self.catalog.store.put(fetched.data)
        return assemble.Stored(stored.image, stored.manifest, fetched.digest)

    def _member(self, member: Descriptor) -> None:
        """Store another manifest of an index: an image, or whatever else (attestations)."""
        fetched = self.repository.manifest(member.digest, size=member.size)
        what = f"manifest {member.digest}"
        unknown = member.platform is None or member.platform.os in ("", "unknown")
        if not unknown:
            self._image(fetched, what, None)
            return
        for blob in blobs_of(fetched.data, what):
            if not self.catalog.store.has(blob.digest):
                stream = self.repository.blob(blob.digest, blob.size)
                writer = self.catalog.store.writer(blob.digest, blob.size)
                with closing(stream), writer:
                    for piece in stream:
                        writer.write(piece)
                    writer.commit()
        self.catalog.store.put(fetched.data)

    def _image(self, fetched: Fetched, what: str, platform: Platform | None) -> assemble.Stored:
        manifest = decode_manifest(fetched.data, fetched.media_type, what)
        data, config = self._config(manifest)
        if len(config.rootfs.diff_ids) != len(manifest.layers):
            raise Corrupt(
                f"{what} has {len(manifest.layers)} layers, but its configuration names "
                f"{len(config.rootfs.diff_ids)}"
            )
        if platform is not None and platforms.normalise(config.platform) != platform:
            raise NotFound(
                f"image with reference {self.repository.reference.familiar} was found but does "
                f"not match the specified platform: wanted {platform}, actual: {config.platform}"
            )
        self._layers(manifest, config)
        store = self.catalog.store
        store.put(data)
        store.put(fetched.data)
        blobs = [manifest.config.digest, *(layer.digest for layer in manifest.layers)]
        self.origins.record(self.repository.reference.name, blobs)
        descriptor = Descriptor(
            media_type=manifest.media_type, digest=fetched.digest, size=len(fetched.data)
        )
        return assemble.Stored(manifest.config.digest, descriptor)

    def _config(self, manifest: Manifest) -> tuple[bytes, ImageConfig]:
        wanted = manifest.config
        store = self.catalog.store
        if store.has(wanted.digest):
            data = store.read(wanted.digest)
        else:
            data = self.repository.small_blob(wanted.digest, wanted.size)
        return data, decode_config(data, f"image configuration {wanted.digest}")

    def _layers(self, manifest: Manifest, config: ImageConfig) -> None:
        """Fetch what is missing, several at once; the first failure stops the others."""
        missing: dict[str, Descriptor] = {}
        for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
            self.catalog.store.has(layer.digest)  # within the lease: keeps a stored blob
            if self.catalog.store.layer(diff_id) is not None:
                self.progress(status("Already exists", short(layer.digest), progressDetail={}))
                continue
            if missing.setdefault(diff_id, layer).digest != layer.digest:
                continue
            self.progress(status("Pulling fs layer", short(layer.digest), progressDetail={}))
        work = [(layer, diff_id) for diff_id, layer in missing.items()]
        in_parallel(
            (lambda layer=layer, diff_id=diff_id: self._layer(layer, diff_id))  # type: ignore[misc]
            for layer, diff_id in work
        )(self.repository.config.downloads, self.repository.cancel.cancel)

    def _layer(self, layer: Descriptor, diff_id: str) -> None:
        identity = short(layer.digest)
        meter = Meter(self.progress, "Downloading", identity, layer.size)

        compression = compression_of(layer)
        with ExitStack() as undo:

            def chunks(offset: int) -> Iterable[bytes]:
                meter.current = offset
                stream = self.repository.blob(layer.digest, layer.size, offset)
                return undo.enter_context(closing(stream))

            self.catalog.store.ingest(
                chunks,
                compression=compression,
                digest=layer.digest,
                diff_id=diff_id,
                size=layer.size,
                keep_blob=bool(compression) and self.keep_blobs,
                resume=True,
                progress=meter.reach,
            )
        for text in ("Verifying Checksum", "Download complete", "Pull complete"):
            self.progress(status(text, identity, progressDetail={}))


def in_parallel(
    tasks: Iterable[Callable[[], None]],
) -> Callable[[int, Callable[[], None]], None]:
    """Run `tasks` on some threads: `in_parallel(tasks)(how_many, stop)`.

    The first failure calls `stop`, which must make the others end; it is raised once all have.
    """

    def run(workers: int, stop: Callable[[], None]) -> None:
        with ThreadPoolExecutor(workers, thread_name_prefix="bulkhead-transfer") as pool:
            futures: list[Future[None]] = [pool.submit(task) for task in tasks]
            done, pending = wait(futures, return_when=FIRST_EXCEPTION)
            if pending:
                for future in pending:
                    future.cancel()
                stop()
                wait(pending)
        del done
        errors = [
            error
            for future in futures
            if not future.cancelled() and (error := future.exception()) is not None
        ]
        real = [error for error in errors if not isinstance(error, Cancelled)]
        for error in (*real, *errors):
            raise error

    return run
