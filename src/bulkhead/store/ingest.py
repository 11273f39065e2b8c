"""One streaming pass from a layer's blob to its EROFS image and recipe.

    caller's thread    chunks ──┬─► blob: hash, write
                                └─► inflate ──┬─► tar hash
                                              └─► build (tar → EROFS + recipe)

hashlib and isal let go of the interpreter lock, so two cores are used well. Everything happens in
scratch space; only when all digests fit are the blob and the layer directory renamed into place.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from bulkhead.errors import Corrupt, Invalid, Unavailable
from bulkhead.store import codecs, files
from bulkhead.store.blobs import BlobWriter, hexadecimal
from bulkhead.store.layer_build import LayerBuilder
from bulkhead.store.limits import Limits
from bulkhead.store.pipeline import Channel, Crew

if TYPE_CHECKING:
    from bulkhead.store.content import ContentStore

_PIECE = 1 << 20
_SPACE_EVERY = 64 << 20


@dataclass(frozen=True, slots=True)
class Ingested:
    """What a pass found out."""

    diff_id: str
    digest: str
    blob_size: int


def even(chunks: Iterable[bytes], size: int = _PIECE) -> Iterator[bytes]:
    """The same bytes in pieces of `size` (the last may be shorter).

    An exception of the chunks is passed on after what had come before it.
    """
    pending: list[bytes] = []
    held = 0
    failure: Exception | None = None
    iterator = iter(chunks)
    while True:
        try:
            chunk = next(iterator)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        if not held and len(chunk) == size:
            yield bytes(chunk)
            continue
        pending.append(chunk)
        held += len(chunk)
        if held >= size:
            whole = b"".join(pending)
            full = held // size * size
            for at in range(0, full, size):
                yield whole[at : at + size]
            pending = [whole[full:]] if full < held else []
            held -= full
    if held:
        yield b"".join(pending)
    if failure is not None:
        raise failure


class _Guard:
    """Watches an inflated stream for bombs."""

    def __init__(self, limits: Limits, path: str) -> None:
        self._limits = limits
        self._path = path
        self._out = 0
        self._checked = 0
        self.read = 0

    def check(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces; Invalid or Unavailable when a bound is reached."""
        limits = self._limits
        for piece in pieces:
            self._out += len(piece)
            if self._out > limits.tar_bytes:
                raise Invalid(f"the archive exceeds the limit of {limits.tar_bytes} bytes")
            if self._out > limits.ratio_floor and self._out > limits.ratio * max(self.read, 1):
                raise Invalid(
                    f"the archive inflates more than {limits.ratio} times: refused as a bomb"
                )
            if self._out - self._checked > _SPACE_EVERY:
                self._checked = self._out
                space = os.statvfs(self._path)
                if space.f_bavail * space.f_frsize < limits.free_bytes:
                    raise Unavailable(f"no space left for the store on {self._path}")
            yield piece

    def count(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same compressed pieces, counted."""
        for piece in pieces:
            self.read += len(piece)
            yield piece


class _Pass:
    """The threads and files of one ingestion."""

    def __init__(self, store: "ContentStore", work: str, undo: ExitStack) -> None:
        self._store = store
        self.directory = f"{work}/layer"
        os.mkdir(self.directory, 0o755)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._image = os.open(f"{self.directory}/image.erofs", flags, 0o444)
        undo.callback(os.close, self._image)
        recipe = os.open(f"{self.directory}/recipe.zst", flags, 0o444)
        self._recipe = undo.enter_context(os.fdopen(recipe, "wb"))
        self._builder = LayerBuilder(self._image, self._recipe, store.limits)
        self._tar_hash = hashlib.sha256()
        self.guard = _Guard(store.limits, store.root)

    def hash_tar(self, pieces: Channel) -> None:
        """Thread: the diff_id."""
        for piece in pieces:
            self._tar_hash.update(piece)

    def build(self, pieces: Channel, hashed: Callable[[], None]) -> None:
        """Thread: image and recipe, durable; `hashed` waits for the diff_id."""

        def uuid() -> bytes:
            hashed()
            return self._tar_hash.digest()[:16]

        self._builder.build(iter(pieces), uuid)
        os.fsync(self._image)
        self._recipe.flush()
        os.fsync(self._recipe.fileno())

    @property
    def tar_bytes(self) -> int:
        """Size of the archive, known once it was built."""
        return self._builder.tar_bytes

    @property
    def diff_id(self) -> str:
        """Known once the tar was hashed."""
        return "sha256:" + self._tar_hash.hexdigest()

    def record(self) -> None:
        """Write layer.json and make the directory durable."""
        record = {
            "diff_id": self.diff_id,
            "size": self._builder.tar_bytes,
            "entries": self._builder.entries,
        }
        files.write_durable(f"{self.directory}/layer.json", json.dumps(record).encode() + b"\n")
        files.sync_directory(self.directory)


class _Sum:
    """Takes the place of a BlobWriter when the blob itself is not to be kept."""

    def __init__(self, want: str | None, size: int | None) -> None:
        self._want = want
        self._size = size
        self._hash = hashlib.sha256()
        self.offset = 0
        self.digest = ""

    def write(self, data: bytes) -> None:
        """Hash; Corrupt once more than the announced size has come."""
        self.offset += len(data)
        if self._size is not None and self.offset > self._size:
            raise Corrupt(f"blob {self._want or ''}: more than the announced {self._size} bytes")
        self._hash.update(data)

    def finish(self) -> str:
        """Verify size and digest."""
        self.digest = "sha256:" + self._hash.hexdigest()
        if self._size is not None and self.offset != self._size:
            raise Corrupt(f"blob {self.digest}: {self.offset} bytes instead of {self._size}")
        if self._want is not None and self.digest != self._want:
            raise Corrupt(f"blob {self._want}: its bytes have the digest {self.digest}")
        return self.digest


class _Source:
    """The caller's chunks, evened and counted; remembers whether an error was theirs."""

    def __init__(
        self, chunks: Iterable[bytes], offset: int, progress: Callable[[int], None] | None
    ) -> None:
        self._chunks = chunks
        self._done = offset
        self._progress = progress
        self.error: BaseException | None = None

    def _counted(self) -> Iterator[bytes]:
        iterator = iter(self._chunks)
        while True:
            try:
                chunk = next(iterator, None)
            except BaseException as error:
                self.error = error
                raise
            if chunk is None:
                return
            self._done += len(chunk)
            if self._progress is not None:
                self._progress(self._done)
            yield chunk

    def __iter__(self) -> Iterator[bytes]:
        return even(self._counted())


def _write_blob(pieces: Channel, sink: BlobWriter | _Sum, source: _Source) -> None:
    for piece in pieces:
        sink.write(piece)
    if source.error is None:
        sink.finish()


def _inflate(pieces: Channel, compression: str, guard: _Guard, outs: tuple[Channel, ...]) -> None:
    inflated = codecs.decompress(guard.count(pieces), compression)
    for piece in guard.check(inflated):
        for out in outs:
            out.put(piece)
    for out in outs:
        out.close()


def _stream(
    layer: _Pass,
    replayed: Iterator[bytes],
    source: _Source,
    compression: str,
    sink: BlobWriter | _Sum,
) -> str:
    """Run the threads; returns the compression, with "auto" resolved."""
    fresh = iter(source)
    first = next(replayed, b"")
    head, replayed = (first, chain((first,), replayed)) if first else (next(fresh, b""), replayed)
    if not first:
        fresh = chain((head,), fresh) if head else fresh
    if compression == "auto":
        compression = codecs.detect(head)
    with Crew() as crew:
        raw, hashing, building = crew.channel(), crew.channel(), crew.channel()
        hashed = crew.channel()
        feeds = [raw]

        def hash_tar() -> None:
            layer.hash_tar(hashing)
            hashed.close()

        def wait_hashed() -> None:
            for _ in hashed:
                pass

        crew.start(hash_tar, "hash")
        crew.start(lambda: layer.build(building, wait_hashed), "build")
        outs = (hashing, building)
        crew.start(lambda: _inflate(raw, compression, layer.guard, outs), "inflate")
        if compression:
            blob = crew.channel()
            crew.start(lambda: _write_blob(blob, sink, source), "blob")
            feeds.append(blob)
        for piece in replayed:
            raw.put(piece)
        try:
            for piece in fresh:
                for feed in feeds:
                    feed.put(piece)
        finally:
            if source.error is not None:  # what did come is written, for resumption
                for feed in feeds[1:]:
                    crew.spare(feed)
        for feed in feeds:
            feed.close()
    return compression


def run(
    store: "ContentStore",
    chunks: Iterable[bytes] | Callable[[int], Iterable[bytes]],
    compression: str,
    digest: str | None,
    diff_id: str | None,
    size: int | None,
    keep_blob: bool,
    resume: bool,
    progress: Callable[[int], None] | None,
) -> Ingested:
    """See `ContentStore.ingest`."""
    for given in (digest, diff_id):
        if given is not None:
            hexadecimal(given)
    with ExitStack() as undo:
        work = undo.enter_context(files.scratch(f"{store.root}/work", store.gate))
        layer = _Pass(store, work, undo)
        writer = undo.enter_context(store.writer(digest, size, resume)) if keep_blob else None
        sink = writer or _Sum(digest, size)
        rest = chunks(sink.offset) if callable(chunks) else chunks
        source = _Source(rest, sink.offset, progress)
        replayed = writer.replay(_PIECE) if writer else iter(())
        try:
            compression = _stream(layer, replayed, source, compression, sink)
            if diff_id is not None and layer.diff_id != diff_id:
                raise Corrupt(f"layer {diff_id}: its tar has the digest {layer.diff_id}")
            if not compression and digest is not None and layer.diff_id != digest:
                raise Corrupt(f"blob {digest}: its bytes have the digest {layer.diff_id}")
            layer.record()
            if writer is not None and compression:
                writer.publish()
            store.adopt_layer(layer.directory, layer.diff_id)
        except BaseException as error:
            if writer is not None and error is not source.error:
                writer.abort()
            raise
        if not compression:
            if writer is not None:
                writer.abort()
            return Ingested(layer.diff_id, layer.diff_id, layer.tar_bytes)
        return Ingested(layer.diff_id, sink.digest, sink.offset)
