"""Pull-through: what is missing here is fetched from another registry and kept."""

import threading
import time
from collections.abc import Mapping
from typing import Any

from bulkhead.depot.links import Repository
from bulkhead.errors import BulkheadError, Conflict, NotFound
from bulkhead.oci.reference import Reference
from bulkhead.registry.client import Fetched
from bulkhead.registry.client import Repository as Remote
from bulkhead.registry.config import Registries
from bulkhead.registry.credentials import Credentials
from bulkhead.store.content import ContentStore

FRESH_S = 60.0
"""How long a tag is served without asking whether it has moved."""


class Proxy:
    """One upstream registry, by its domain; safe for threads."""

    def __init__(
        self,
        store: ContentStore,
        domain: str,
        *,
        credentials: Credentials | None = None,
        config: Registries | None = None,
        fresh_s: float = FRESH_S,
    ) -> None:
        self._store = store
        self._domain = domain
        self._credentials = credentials
        self._config = config
        self._fresh_s = fresh_s
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._sizes: dict[str, int] = {}

    def _remote(self, name: str) -> Remote:
        path = name
        if self._domain == "docker.io" and "/" not in name:
            path = f"library/{name}"
        reference = Reference(self._domain, path)
        return Remote(reference, self._credentials, config=self._config)

    def _once(self, key: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())

    def manifest(self, repository: Repository, reference: str) -> None:
        """Have the manifest, and the tag if it is one; NotFound.

        A tag that is known is served although upstream cannot be asked.
        """
        is_digest = reference.startswith("sha256:")
        if is_digest:
            if repository.manifest(reference) is not None:
                return
        elif time.time() - repository.tagged_at(reference) < self._fresh_s:
            return
        with self._once(f"{repository.name} {reference}"):
            fetched = self._fetch(repository, reference)
            if fetched is None:
                return
            self._store.put(fetched.data)
            repository.link_manifest(fetched.digest, fetched.media_type)
            if not is_digest:
                repository.give_tag(reference, fetched.digest)

    def _fetch(self, repository: Repository, reference: str) -> Fetched | None:
        try:
            with self._remote(repository.name) as remote:
                return remote.manifest(reference)
        except NotFound:
            raise
        except BulkheadError:
            if not reference.startswith("sha256:") and repository.tag(reference):
                return None  # old is better than nothing
            raise

    def learn(self, document: Mapping[str, Any]) -> None:
        """Remember the sizes of the blobs that a manifest names."""
        for one in (document.get("config"), *(document.get("layers") or ())):
            if isinstance(one, dict) and isinstance(one.get("size"), int):
                self._sizes[str(one.get("digest"))] = one["size"]
        if len(self._sizes) > 100_000:
            self._sizes.clear()

    def blob(self, repository: Repository, digest: str) -> None:
        """Have the blob; NotFound."""
        if repository.has_blob(digest) and self._store.has(digest):
            return
        size = self._sizes.get(digest)
        if size is None:
            raise NotFound(f"blob {digest} is in no manifest that was asked for")
        with self._once(digest):
            if not self._store.has(digest):
                with (
                    self._remote(repository.name) as remote,
                    self._store.writer(digest, size, resume=True) as writer,
                ):
                    for piece in remote.blob(digest, size, writer.offset):
                        writer.write(piece)
                    writer.commit()
            repository.link_blob(digest)


def refuse_push() -> Conflict:
    """What a push to a pull-through registry meets."""
    return Conflict("this registry is a pull-through cache: push to the registry behind it")
