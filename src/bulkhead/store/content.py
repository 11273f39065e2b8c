"""The content store: blobs by digest, and layers as EROFS images, in the OCI image layout.

    store/
      oci-layout                 {"imageLayoutVersion": "1.0.0"}
      blobs/sha256/HEX           whole, verified, durable; never changed
      layers/HEX/                a layer by diff_id; the directory appears whole, by one rename
        image.erofs              its files (erofs_format.py)
        recipe.zst               how to give the exact tar back (recipe.py)
        layer.json               {"diff_id", "size", "entries"}
        tree/                    second form, made when the kernel cannot mount the first (tree.py)
      provenance/HEX.json        {"diff_id", "compressor", "size"} of blobs that we compressed
      partial/HEX                a blob being fetched, kept for resumption; locked by its writer
      work/RANDOM                scratch, locked by its user; swept at start and by gc
      leases/RANDOM              digests in use but not yet named, one a line; locked by its holder
      gate                       flock: shared to publish or rely on content, exclusive to collect

An uncompressed layer blob is not stored twice: `open(diff_id)` replays the recipe. Everything here
may be called from any thread, and from several processes at once.
"""

import errno
import hashlib
import io
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from bulkhead.errors import Corrupt, Invalid, NotFound
from bulkhead.store import codecs, files, ingest, recipe
from bulkhead.store.blobs import BlobWriter, hexadecimal
from bulkhead.store.limits import DEFAULT, Limits

_LAYOUT = b'{"imageLayoutVersion": "1.0.0"}\n'
_DIRECTORIES = ("blobs/sha256", "layers", "provenance", "partial", "work", "leases")
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer in the store. `size` is the bytes of its tar, `path` its EROFS image."""

    diff_id: str
    size: int
    path: str
    entries: int = 0
    digest: str = ""
    """After `ingest`: the digest of the blob it came from."""
    blob_size: int = 0
    """After `ingest`: that blob's size in bytes."""

    @property
    def form(self) -> str:
        """Which form a mount would use now: "tree" once it was unpacked, else "erofs"."""
        return "tree" if os.path.isdir(os.path.dirname(self.path) + "/tree") else "erofs"


@dataclass(slots=True)
class GcReport:
    """What a collection removed: bytes on the disk, and the digests."""

    freed: int = 0
    digests: list[str] = field(default_factory=list)


class Lease:
    """Protects from `gc` all that this process stores or looks up while the lease is held."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._known: set[str] = set()
        self._lock = threading.Lock()
        files.try_lock(self._fd)

    def add(self, digest: str) -> None:
        """Protect `digest`."""
        with self._lock:
            if digest not in self._known and self._fd >= 0:
                files.write_all(self._fd, digest.encode() + b"\n")
                self._known.add(digest)

    def close(self) -> None:
        """End the protection."""
        with self._lock:
            if self._fd >= 0:
                with suppress(FileNotFoundError):
                    os.unlink(self._path)
                os.close(self._fd)
                self._fd = -1


class _Replay(io.RawIOBase):
    """An iterator of bytes as a binary file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        into = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(into), len(self._rest))
        into[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def as_file(pieces: Iterator[bytes]) -> BinaryIO:
    """Bytes that come as pieces, as a file that can be read once."""
    return io.BufferedReader(_Replay(pieces), _PIECE)


class ContentStore:
    """The store in directory `root`, which is made if it does not exist."""

    def __init__(self, root: str, limits: Limits = DEFAULT) -> None:
        self.root = os.path.abspath(root)
        self.limits = limits
        for name in _DIRECTORIES:
            os.makedirs(f"{self.root}/{name}", mode=0o700, exist_ok=True)
        self.gate = files.Gate(f"{self.root}/gate")
        self._leases: set[Lease] = set()
        with self.gate.exclusive():
            files.sweep(f"{self.root}/work")
            if not os.path.exists(f"{self.root}/oci-layout"):
                self._write_layout()

    def _write_layout(self) -> None:
        path = f"{self.root}/work/{secrets.token_hex(8)}"
        files.write_durable(path, _LAYOUT)
        os.rename(path, f"{self.root}/oci-layout")
        files.sync_directory(self.root)

    def path(self, area: str, name: str) -> str:
        """The path of `name` in one of the store's directories."""
        return f"{self.root}/{area}/{name}"

    def blob_path(self, digest: str) -> str:
        """Where the blob's file is, or would be."""
        return f"{self.root}/blobs/sha256/{hexadecimal(digest)}"

    def scratch_file(self) -> tuple[int, str]:
        """A new locked file in scratch space: (descriptor, path)."""
        path = self.path("work", secrets.token_hex(8))
        with self.gate.shared():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            files.try_lock(fd)
        return fd, path

    # -- leases -------------------------------------------------------------------------------

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """While held, `gc` keeps everything this store object stores or finds present."""
        with self.gate.shared():
            lease = Lease(self.path("leases", secrets.token_hex(8)))
        self._leases.add(lease)
        try:
            yield lease
        finally:
            self._leases.discard(lease)
            lease.close()

    def _note(self, digest: str) -> None:
        for lease in tuple(self._leases):
            lease.add(digest)

    # -- blobs --------------------------------------------------------------------------------

    def _stored(self, digest: str) -> int | None:
        """The size of the blob's file, or None; under a lease it then stays."""
        path = self.blob_path(digest)
        with self.gate.shared():
            try:
                size = os.stat(path).st_size
            except FileNotFoundError:
                return None
            self._note(digest)
        return size

    def has(self, digest: str) -> bool:
        """Whether the blob can be read: it is stored, or is the tar of a layer that is."""
        return self._stored(digest) is not None or self.layer(digest) is not None

    def size(self, digest: str) -> int:
        """Bytes of the blob; NotFound."""
        size = self._stored(digest)
        if size is not None:
            return size
        layer = self.layer(digest)
        if layer is None:
            raise NotFound(f"blob {digest} is not in the store")
        return layer.size

    def open(self, digest: str) -> BinaryIO:
        """The blob for reading; NotFound. Its bytes were verified when they were stored.

        A layer's tar that exists only as image and recipe is replayed: not seekable.
        """
        if self._stored(digest) is not None:
            with suppress(FileNotFoundError):
                return open(self.blob_path(digest), "rb")
        if self.layer(digest) is None:
            raise NotFound(f"blob {digest} is not in the store")
        return as_file(self.tar(digest))

    def read(self, digest: str, limit: int = 16 << 20) -> bytes:
        """A small blob, verified again; Invalid beyond `limit` bytes, NotFound, Corrupt."""
        if self.size(digest) > limit:
            raise Invalid(f"blob {digest} is larger than {limit} bytes")
        with self.open(digest) as stream:
            data = stream.read()
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise Corrupt(f"blob {digest} in {self.root} is damaged; remove it and fetch it again")
        return data

    def put(self, data: bytes) -> str:
        """Store `data`, durable when this returns its digest."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if not self.has(digest):
            with self.writer(digest, len(data)) as writer:
                writer.write(data)
                writer.commit()
        return digest

    def writer(
        self, digest: str | None = None, size: int | None = None, resume: bool = False
    ) -> BlobWriter:
        """Write a blob piecemeal. With `resume` and a digest, `.offset` says where to go on."""
        return BlobWriter(self, digest, size, resume)

    def adopt_blob(self, path: str, digest: str) -> None:
        """Publish the finished file `path` (on the store's file system) as blob `digest`."""
        with self.gate.shared():
            os.chmod(path, 0o444)
            os.rename(path, self.blob_path(digest))
            self._note(digest)
        files.sync_directory(f"{self.root}/blobs/sha256")

    def evict(self, digest: str) -> int:
        """Drop a blob's file, keeping its layer; returns the bytes freed (0 if there was none)."""
        path = self.blob_path(digest)
        try:
            freed = os.stat(path).st_blocks * 512
            os.unlink(path)
        except FileNotFoundError:
            return 0
        return freed

    # -- layers -------------------------------------------------------------------------------

    def layer(self, diff_id: str) -> Layer | None:
        """The layer with this diff_id, or None."""
        directory = f"{self.root}/layers/{hexadecimal(diff_id)}"
        with self.gate.shared():
            try:
                with open(f"{directory}/layer.json", "rb") as stream:
                    record = json.load(stream)
            except FileNotFoundError:
                return None
            self._note(diff_id)
        return Layer(diff_id, record["size"], f"{directory}/image.erofs", record["entries"])

    def layers(self) -> list[str]:
        """The diff_ids of all layers."""
        return ["sha256:" + name for name in sorted(os.listdir(f"{self.root}/layers"))]

    def blobs(self) -> list[str]:
        """The digests of all stored blobs."""
        return ["sha256:" + name for name in sorted(os.listdir(f"{self.root}/blobs/sha256"))]

    def ingest(
        self,
        chunks: Iterable[bytes] | Callable[[int], Iterable[bytes]],
        *,
        compression: str = "auto",
        digest: str | None = None,
        diff_id: str | None = None,
        size: int | None = None,
        keep_blob: bool = True,
        resume: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Layer:
        """Store a layer from its (compressed) blob in one pass: hash, inflate, hash, write.

        `compression` is gzip, zstd, bzip2, xz, "" or auto (told by the first bytes). `digest`,
        `size` and `diff_id` are verified if given. With `resume`, `chunks` is called with the
        offset to go on from, and what an exception of the chunks left is kept for the next call.
        `progress` is told the blob's bytes so far, in the calling thread.
        Invalid for archives that are refused, Corrupt for wrong bytes; nothing is left behind then.
        """
        result = ingest.run(
            self, chunks, compression, digest, diff_id, size, keep_blob, resume, progress
        )
        layer = self.layer(result.diff_id)
        if layer is None:
            raise NotFound(f"layer {result.diff_id} was removed while it was stored; hold a lease")
        return Layer(
            layer.diff_id, layer.size, layer.path, layer.entries, result.digest, result.blob_size
        )

    def adopt_layer(self, path: str, diff_id: str) -> None:
        """Publish a finished layer directory; the one that is there already stays."""
        with self.gate.shared():
            try:
                os.rename(path, f"{self.root}/layers/{hexadecimal(diff_id)}")
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            self._note(diff_id)
        files.sync_directory(f"{self.root}/layers")

    def tar(self, diff_id: str) -> Iterator[bytes]:
        """The layer's exact tar; NotFound, and Corrupt at the end if it has another digest."""
        directory = f"{self.root}/layers/{hexadecimal(diff_id)}"
        with ExitStack() as undo:
            with self.gate.shared():
                try:
                    stream = undo.enter_context(open(f"{directory}/recipe.zst", "rb"))
                    image = undo.enter_context(open(f"{directory}/image.erofs", "rb"))
                except FileNotFoundError:
                    raise NotFound(f"layer {diff_id} is not in the store") from None
                self._note(diff_id)
            summer = hashlib.sha256()
            for piece in recipe.replay(stream, image.fileno()):
                summer.update(piece)
                yield piece
        if "sha256:" + summer.hexdigest() != diff_id:
            raise Corrupt(
                f"layer {diff_id} in {self.root} is damaged; remove its image and pull it"
            )

    def compress(self, diff_id: str, compression: str = "gzip") -> tuple[str, int]:
        """A compressed blob of the layer, stored: (digest, size). Equal layers give equal blobs.

        How it was made is recorded, so it survives `evict`.
        """
        compressor = codecs.DEFAULT_COMPRESSOR.get(compression)
        if compressor is None:
            raise Invalid(f"unknown compression {compression!r}")
        with self.writer() as writer:
            for piece in codecs.compress(self.tar(diff_id), compressor):
                writer.write(piece)
            digest = writer.finish()
            record = {"diff_id": diff_id, "compressor": compressor, "size": writer.offset}
            with files.scratch(f"{self.root}/work", self.gate) as work:
                files.write_durable(f"{work}/p", json.dumps(record).encode())
                os.rename(f"{work}/p", self.path("provenance", hexadecimal(digest) + ".json"))
            return writer.publish(), writer.offset

    def provenance(self, digest: str) -> dict[str, object] | None:
        """What is known of a blob that `compress` made, or None."""
        try:
            with open(self.path("provenance", hexadecimal(digest) + ".json"), "rb") as stream:
                record: dict[str, object] = json.load(stream)
        except FileNotFoundError:
            return None
        return record

    def blob_for(self, digest: str, diff_id: str) -> Iterator[bytes]:
        """The exact blob of a layer: stored, the tar itself, or recompressed if we made it.

        NotFound, naming the remedy, for an evicted blob that another program compressed. Corrupt
        after the last piece if recompression no longer gives the digest.
        """
        if digest == diff_id or os.path.exists(self.blob_path(digest)):
            with self.open(digest) as stream:
                while piece := stream.read(_PIECE):
                    yield piece
            return
        record = self.provenance(digest)
        if record is None or record["diff_id"] != diff_id:
            raise NotFound(
                f"blob {digest} of layer {diff_id} was evicted and can only be fetched again: "
                "another program compressed it. Pull its image again, or push to a registry "
                "that has the blob"
            )
        summer = hashlib.sha256()
        for piece in codecs.compress(self.tar(diff_id), str(record["compressor"])):
            summer.update(piece)
            yield piece
        if "sha256:" + summer.hexdigest() != digest:
            raise Corrupt(
                f"blob {digest} of layer {diff_id} was evicted and compressing it again gives "
                "other bytes with this version of the compressor. Pull its image again"
            )

    # -- space --------------------------------------------------------------------------------

    def layer_bytes(self, diff_id: str) -> int:
        """Bytes the layer occupies on the disk, all forms, without its blob."""
        return files.disk_bytes(f"{self.root}/layers/{hexadecimal(diff_id)}")

    def disk_usage(self) -> int:
        """Bytes the whole store occupies on the disk."""
        return files.disk_bytes(self.root)

    def gc(
        self, roots: Callable[[], Iterable[str]], partial_age_s: float = 24 * 3600.0
    ) -> GcReport:
        """Remove every blob and layer that neither `roots()` nor a lease names.

        `roots` must give manifests, configurations, layer blobs and diff_ids; it is asked while
        nothing can be published. Partial blobs untouched for `partial_age_s` go too.
        """
        report = GcReport()
        with self.gate.exclusive():
            keep = {hexadecimal(digest) for digest in roots()} | self._leased()
            for name in os.listdir(f"{self.root}/blobs/sha256"):
                if name not in keep:
                    report.freed += files.disk_bytes(f"{self.root}/blobs/sha256/{name}")
                    os.unlink(f"{self.root}/blobs/sha256/{name}")
                    report.digests.append("sha256:" + name)
            for name in os.listdir(f"{self.root}/layers"):
                if name not in keep:
                    report.freed += files.disk_bytes(f"{self.root}/layers/{name}")
                    doomed = self.path("work", secrets.token_hex(8))
                    os.rename(f"{self.root}/layers/{name}", doomed)
                    files.remove_tree(doomed)
                    report.digests.append("sha256:" + name)
            self._forget_provenance(keep)
            report.freed += files.sweep_partial(f"{self.root}/partial", partial_age_s)
            files.sweep(f"{self.root}/work")
        return report

    def _forget_provenance(self, keep: set[str]) -> None:
        for name in os.listdir(f"{self.root}/provenance"):
            if name.partition(".")[0] not in keep:
                os.unlink(self.path("provenance", name))

    def _leased(self) -> set[str]:
        """Digests (hexadecimal) under live leases; leases of dead processes are removed."""
        keep: set[str] = set()
        for name in os.listdir(f"{self.root}/leases"):
            path = self.path("leases", name)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            with open(fd, "rb") as stream:
                if files.try_lock(stream.fileno()):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                else:
                    keep.update(line[7:71].decode() for line in stream if line.endswith(b"\n"))
        return keep
