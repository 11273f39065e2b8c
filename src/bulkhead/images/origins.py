"""Where a blob came from or went to: repositories that are known to have it.

    store/origins/HEX    one "domain/path" a line, newest last, at most eight

A hint and no more: it lets a push mount a blob within one registry, and an evicted blob be fetched
again. What it says may be outdated; a lost file costs a transfer.
"""

import os
import threading
from collections.abc import Iterable

from bulkhead.oci.digest import encoded

_MOST = 8


class Origins:
    """The records below `directory`, the store's root."""

    def __init__(self, directory: str) -> None:
        self._directory = f"{directory}/origins"
        self._lock = threading.Lock()
        os.makedirs(self._directory, mode=0o700, exist_ok=True)

    def of(self, digest: str) -> list[str]:
        """Repositories ("domain/path") that had the blob, newest first."""
        try:
            with open(f"{self._directory}/{encoded(digest)}", encoding="utf-8") as file:
                return list(reversed(file.read().split()))
        except FileNotFoundError:
            return []

    def record(self, repository: str, digests: Iterable[str]) -> None:
        """Remember that `repository` has the blobs."""
        with self._lock:
            for digest in digests:
                known = [other for other in reversed(self.of(digest)) if other != repository]
                path = f"{self._directory}/{encoded(digest)}"
                temporary = f"{path}.{os.getpid()}.new"
                with open(temporary, "w", encoding="utf-8") as file:
                    file.writelines(f"{name}\n" for name in [*known, repository][-_MOST:])
                os.rename(temporary, path)

    def forget(self, keep: set[str]) -> None:
        """Drop the records of blobs whose digest is not in `keep`."""
        with self._lock:
            for name in os.listdir(self._directory):
                if f"sha256:{name}" not in keep:
                    os.unlink(f"{self._directory}/{name}")
