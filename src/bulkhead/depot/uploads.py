"""Uploads that are under way. They live in memory: after a restart a client begins anew."""

import secrets
import threading
import time
from dataclasses import dataclass, field

from bulkhead.errors import Invalid, NotFound, Unavailable
from bulkhead.store.blobs import BlobWriter
from bulkhead.store.content import ContentStore

IDLE_S = 3600.0
MOST = 1000


@dataclass(slots=True)
class Upload:
    """One session; `lock` is held by the request that writes to it."""

    name: str
    repository: str
    writer: BlobWriter
    touched: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Uploads:
    """All of them."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._found: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def begin(self, repository: str) -> Upload:
        """A new one; Unavailable if there are too many."""
        self.sweep()
        with self._lock:
            if len(self._found) >= MOST:
                raise Unavailable("too many uploads are under way: try again later")
            upload = Upload(secrets.token_hex(16), repository, self._store.writer())
            upload.touched = time.monotonic()
            self._found[upload.name] = upload
            return upload

    def find(self, repository: str, name: str) -> Upload:
        """The session; NotFound."""
        with self._lock:
            upload = self._found.get(name)
        if upload is None or upload.repository != repository:
            raise NotFound(f"upload {name[:64]} is unknown")
        upload.touched = time.monotonic()
        return upload

    def end(self, upload: Upload) -> None:
        """Forget it, and what it wrote unless that was published."""
        with self._lock:
            self._found.pop(upload.name, None)
        upload.writer.close()

    def sweep(self) -> None:
        """End those that nobody has touched for an hour."""
        latest = time.monotonic() - IDLE_S
        with self._lock:
            idle = [one for one in self._found.values() if one.touched < latest]
        for upload in idle:
            if upload.lock.acquire(blocking=False):
                try:
                    self.end(upload)
                finally:
                    upload.lock.release()

    def close(self) -> None:
        """End all."""
        for upload in list(self._found.values()):
            self.end(upload)


def check_range(text: str, offset: int) -> None:
    """Invalid unless Content-Range "FIRST-LAST" begins where the upload stands."""
    first = text.removeprefix("bytes ").partition("-")[0]
    if not first.isdecimal() or int(first) != offset:
        raise Invalid(f"the upload stands at {offset}, not at {first!r}")
