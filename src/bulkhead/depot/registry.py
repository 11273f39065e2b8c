"""What the distribution specification says, without HTTP: manifests, blobs, tags, referrers."""

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, BinaryIO

from bulkhead.depot import links
from bulkhead.depot.links import Repository
from bulkhead.depot.proxy import Proxy, refuse_push
from bulkhead.depot.uploads import Upload, Uploads
from bulkhead.errors import BulkheadError, Denied, Invalid, NotFound
from bulkhead.oci.digest import of
from bulkhead.oci.image import INDEXES, LARGEST_MANIFEST, MANIFESTS
from bulkhead.store.content import ContentStore, as_file

_LEASE_S = 3600.0


class Problem(BulkheadError):
    """An error with the specification's code."""

    category = "invalid"

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Registry:
    """All repositories of one state directory, over one content store; safe for threads."""

    def __init__(
        self, root: str, store: ContentStore, *, proxy: Proxy | None = None, readonly: bool = False
    ) -> None:
        self.root = root
        self.store = store
        self.uploads = Uploads(store)
        self.proxy = proxy
        self._readonly = readonly
        self._guard = threading.Lock()
        self._leases = ExitStack()
        self._older = ExitStack()
        self._leased = 0.0
        os.makedirs(root, mode=0o700, exist_ok=True)
        self.protect()

    def protect(self) -> None:
        """Keep what was stored in the last hour from garbage collection until it has a link."""
        with self._guard:
            if time.monotonic() - self._leased > _LEASE_S or not self._leased:
                self._older.close()
                self._older, self._leases = self._leases, ExitStack()
                self._leases.enter_context(self.store.lease())
                self._leased = time.monotonic()

    def close(self) -> None:
        """End the uploads that are under way."""
        self.uploads.close()
        self._older.close()
        self._leases.close()

    def repository(self, name: str) -> Repository:
        """By name; Problem NAME_INVALID."""
        try:
            return Repository(self.root, links.check_name(name))
        except Invalid as error:
            raise Problem(400, "NAME_INVALID", error.message) from None

    def check_push(self) -> None:
        """Problem where nothing may be pushed."""
        if self.proxy is not None:
            raise Problem(405, "UNSUPPORTED", refuse_push().message)
        if self._readonly:
            raise Problem(405, "UNSUPPORTED", "this registry is read-only")

    @staticmethod
    def digest(text: str) -> str:
        """Checked; Problem DIGEST_INVALID."""
        try:
            links.hexadecimal(text)
        except Invalid as error:
            raise Problem(400, "DIGEST_INVALID", error.message) from None
        return text

    # --- blobs

    def blob(self, repository: Repository, digest: str) -> tuple[BinaryIO, int]:
        """The blob for reading, and its size."""
        self.digest(digest)
        if self.proxy is not None:
            try:
                self.proxy.blob(repository, digest)
            except (NotFound, Denied) as error:
                raise Problem(404, "BLOB_UNKNOWN", error.message) from None
        try:
            if not repository.has_blob(digest):
                raise NotFound("it was never pushed here")
            return self._open(digest), self._size(digest)
        except NotFound as error:
            text = f"blob {digest} is not in {repository.name}: {error.message}"
            raise Problem(404, "BLOB_UNKNOWN", text) from None

    def _open(self, digest: str) -> BinaryIO:
        """The blob; one that only the engine's own push needed is compressed again."""
        known = self.store.provenance(digest)
        if known is None or os.path.exists(self.store.blob_path(digest)):
            return self.store.open(digest)
        return as_file(self.store.blob_for(digest, str(known["diff_id"])))

    def _size(self, digest: str) -> int:
        """Its bytes; NotFound."""
        known = self.store.provenance(digest)
        size = known.get("size") if known is not None else None
        return size if isinstance(size, int) else self.store.size(digest)

    def _stored(self, digest: str) -> bool:
        known = self.store.provenance(digest)
        if known is not None and self.store.layer(str(known["diff_id"])) is not None:
            return True
        return self.store.has(digest)

    def mount(self, repository: Repository, digest: str, origin: str) -> bool:
        """Take a blob over from another repository that has it; whether that was possible."""
        self.digest(digest)
        if not links.NAME.match(origin):
            return False
        other = Repository(self.root, origin)
        if not other.has_blob(digest) or not self._stored(digest):
            return False
        repository.link_blob(digest)
        return True

    def finish(self, repository: Repository, upload: Upload, digest: str) -> None:
        """End an upload; Problem DIGEST_INVALID if its bytes are others."""
        self.digest(digest)
        try:
            found = upload.writer.finish()
            if found != digest:
                raise Problem(
                    400, "DIGEST_INVALID", f"the bytes have the digest {found}, not {digest}"
                )
            if self.store.has(digest):
                upload.writer.abort()
            else:
                upload.writer.publish()
            repository.link_blob(digest)
        finally:
            self.uploads.end(upload)

    def delete_blob(self, repository: Repository, digest: str) -> None:
        """The repository has it no longer."""
        self.check_push()
        if not repository.unlink_blob(self.digest(digest)):
            raise Problem(404, "BLOB_UNKNOWN", f"blob {digest} is not in {repository.name}")

    # --- manifests

    def manifest(self, repository: Repository, reference: str) -> tuple[bytes, str, str]:
        """Bytes, media type and digest of what a tag or digest names."""
        if ":" in reference:
            self.digest(reference)
        elif not links.TAG.match(reference):
            raise Problem(404, "MANIFEST_UNKNOWN", f"invalid tag {reference[:200]!r}")
        if self.proxy is not None:
            try:
                self.proxy.manifest(repository, reference)
            except (NotFound, Denied) as error:
                raise Problem(404, "MANIFEST_UNKNOWN", error.message) from None
        digest = reference if ":" in reference else repository.tag(reference)
        media_type = repository.manifest(digest) if digest else None
        if digest is None or media_type is None:
            if not repository.exists:
                text = f"repository {repository.name} is unknown"
                raise Problem(404, "NAME_UNKNOWN", text)
            text = f"manifest {reference} is not in {repository.name}"
            raise Problem(404, "MANIFEST_UNKNOWN", text)
        data = self.store.read(digest, LARGEST_MANIFEST)
        if self.proxy is not None:
            self.proxy.learn(json.loads(data))
        return data, media_type, digest

    def put_manifest(
        self, repository: Repository, reference: str, data: bytes, media_type: str
    ) -> tuple[str, str]:
        """Store a manifest under a tag or digest; its digest, and its subject's or ""."""
        self.check_push()
        self.protect()
        digest = of(data)
        if ":" in reference and self.digest(reference) != digest:
            text = f"the manifest has the digest {digest}, not {reference}"
            raise Problem(400, "DIGEST_INVALID", text)
        if ":" not in reference and not links.TAG.match(reference):
            raise Problem(400, "TAG_INVALID", f"invalid tag {reference[:200]!r}")
        document = _document(data)
        kind = document.get("mediaType") or media_type
        if not isinstance(kind, str) or (media_type and kind != media_type):
            text = f"sent as {media_type!r}, but it calls itself {kind!r}"
            raise Problem(400, "MANIFEST_INVALID", text)
        self._check_members(repository, document, kind)
        subject = self._subject(document)
        self.store.put(data)
        repository.link_manifest(digest, kind or MANIFESTS[0])
        if subject:
            repository.refer(subject, digest, _referrer(document, digest, len(data), kind))
        if ":" not in reference:
            repository.give_tag(reference, digest)
        return digest, subject

    def _subject(self, document: Mapping[str, Any]) -> str:
        subject = document.get("subject")
        if subject is None:
            return ""
        if not isinstance(subject, dict):
            raise Problem(400, "MANIFEST_INVALID", "subject is not a descriptor")
        return self.digest(str(subject.get("digest")))

    def _check_members(
        self, repository: Repository, document: Mapping[str, Any], kind: str
    ) -> None:
        """What the manifest names must be here, so that a pull cannot fail half-way."""
        if kind in INDEXES or "manifests" in document:
            for one in _descriptors(document.get("manifests")):
                if repository.manifest(self.digest(one["digest"])) is None:
                    text = f"manifest {one['digest']} is not in {repository.name}"
                    raise Problem(404, "MANIFEST_BLOB_UNKNOWN", text)
            return
        config = [document["config"]] if "config" in document else []
        for one in (*_descriptors(config), *_descriptors(document.get("layers") or [])):
            if one.get("urls"):
                continue
            digest = self.digest(one["digest"])
            if not repository.has_blob(digest) or not self._stored(digest):
                text = f"blob {digest} is not in {repository.name}"
                raise Problem(404, "MANIFEST_BLOB_UNKNOWN", text)
            if self._size(digest) != one.get("size"):
                text = f"blob {digest} has {self._size(digest)} bytes, not {one.get('size')}"
                raise Problem(400, "MANIFEST_INVALID", text)

    def delete_manifest(self, repository: Repository, reference: str) -> None:
        """Drop a tag, or a manifest with its tags."""
        self.check_push()
        if ":" in reference:
            gone = repository.unlink_manifest(self.digest(reference))
        else:
            gone = repository.untag(reference)
        if not gone:
            text = f"manifest {reference[:200]} is not in {repository.name}"
            raise Problem(404, "MANIFEST_UNKNOWN", text)

    # --- lists

    def tags(self, repository: Repository) -> list[str]:
        """Its tags; Problem NAME_UNKNOWN."""
        if not repository.exists:
            raise Problem(404, "NAME_UNKNOWN", f"repository {repository.name} is unknown")
        return repository.tags()

    def referrers(self, repository: Repository, digest: str, kind: str) -> list[dict[str, Any]]:
        """Descriptors of what is about `digest`; of one artifact type, "" for all."""
        found = repository.referrers(self.digest(digest))
        return [one for one in found if not kind or one.get("artifactType") == kind]


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "MANIFEST_INVALID", f"not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schemaVersion") != 2:
        raise Problem(400, "MANIFEST_INVALID", "only manifests of schemaVersion 2 are accepted")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise Problem(400, "MANIFEST_INVALID", "it is both an index and a manifest")
    return document


def _descriptors(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Problem(400, "MANIFEST_INVALID", "its members are not a list of descriptors")
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("digest"), str):
            raise Problem(400, "MANIFEST_INVALID", "a member is not a descriptor")
    return value


def _referrer(document: Mapping[str, Any], digest: str, size: int, kind: str) -> dict[str, Any]:
    config = document.get("config")
    implied = config.get("mediaType") if isinstance(config, dict) else None
    descriptor = {
        "mediaType": kind,
        "digest": digest,
        "size": size,
        "artifactType": document.get("artifactType") or implied,
        "annotations": document.get("annotations"),
    }
    return {key: value for key, value in descriptor.items() if value}
