"""Writing one blob: hidden until it is whole, verified and durable."""

import hashlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bulkhead.errors import Conflict, Corrupt, Invalid
from bulkhead.store import files

if TYPE_CHECKING:
    from bulkhead.store.content import ContentStore

_HEX = frozenset("0123456789abcdef")


def hexadecimal(digest: str) -> str:
    """The 64 hexadecimal characters of a "sha256:…" digest; Invalid for anything else."""
    algorithm, _, text = digest.partition(":")
    if algorithm != "sha256" or len(text) != 64 or not _HEX.issuperset(text):
        raise Invalid(f"not a sha256 digest: {digest!r}")
    return text


class BlobWriter:
    """Made by `ContentStore.writer`; use it in a `with` block and end with `commit()`.

    Without `commit` nothing is seen of it; with `resume` an interrupted writer's bytes are kept for
    the next one, unless `abort()` says otherwise.
    """

    def __init__(
        self, store: "ContentStore", digest: str | None, size: int | None, resume: bool
    ) -> None:
        self._store = store
        self._want = digest
        self._size = size
        self._hash = hashlib.sha256()
        self._fd = -1
        self.offset = 0
        self.digest = ""
        self._keep = resume and digest is not None
        if self._keep and digest is not None:
            self._open_partial(hexadecimal(digest))
        if self._fd < 0:
            self._keep = False
            self._fd, self._path = store.scratch_file()

    def _open_partial(self, name: str) -> None:
        path = self._store.path("partial", name)
        with self._store.gate.shared():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not files.try_lock(fd):  # someone is fetching the same blob now
                os.close(fd)
                return
        self._fd, self._path = fd, path
        while piece := os.read(fd, 1 << 20):
            self._hash.update(piece)
            self.offset += len(piece)
        if self._size is not None and self.offset > self._size:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            self._hash = hashlib.sha256()
            self.offset = 0

    def replay(self, size: int) -> Iterator[bytes]:
        """The bytes resumed from, in pieces of at most `size`."""
        end = self.offset
        for at in range(0, end, size):
            yield os.pread(self._fd, min(size, end - at), at)

    def write(self, data: bytes | memoryview) -> None:
        """Append; Corrupt once more than the announced size has come."""
        self.offset += len(data)
        if self._size is not None and self.offset > self._size:
            self._keep = False
            raise Corrupt(f"blob {self._want or ''}: more than the announced {self._size} bytes")
        self._hash.update(data)
        files.write_all(self._fd, data)

    def finish(self) -> str:
        """Verify size and digest and make the bytes durable; not yet seen. Returns the digest."""
        self.digest = "sha256:" + self._hash.hexdigest()
        if self._size is not None and self.offset != self._size:
            if self.offset > self._size:
                self._keep = False
            raise Corrupt(
                f"blob {self._want or self.digest}: {self.offset} bytes instead of {self._size}"
            )
        if self._want is not None and self.digest != self._want:
            self._keep = False
            raise Corrupt(f"blob {self._want}: its bytes have the digest {self.digest}")
        os.fsync(self._fd)
        return self.digest

    def publish(self) -> str:
        """After `finish`: make it seen."""
        if not self.digest or self._fd < 0:
            raise Conflict("a blob can be published only once, after it was finished")
        self._store.adopt_blob(self._path, self.digest)
        self._keep = True  # there is nothing left to remove
        self.close()
        return self.digest

    def commit(self) -> str:
        """Verify, make durable, make seen; returns the digest."""
        self.finish()
        return self.publish()

    def abort(self) -> None:
        """Forget everything written, also what could have been resumed."""
        self._keep = False
        self.close()

    def close(self) -> None:
        """End without commit: what was written goes, or stays for a later `resume`."""
        if self._fd < 0:
            return
        if not self._keep:
            files.remove_tree(self._path)
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
