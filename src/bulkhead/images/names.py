"""Names of images: the `index.json` of the content store's OCI layout.

    store/index.json   OCI image index; one descriptor per name (or per image without one):
                         org.opencontainers.image.ref.name  canonical reference; absent: no name
                         dev.bulkhead.config                digest of the configuration: image id
                         dev.bulkhead.index                  digest of the index it was chosen from
                         dev.bulkhead.tagged                 when the name was given, RFC 3339
    store/index.lock   held with flock(2) by whoever replaces index.json

The file is replaced atomically (write beside, fsync, rename, fsync of the directory): a reader sees
one whole version, and a kill at any moment leaves the old or the new one. Everything reachable from
it is what garbage collection keeps; a damaged file is therefore an error, never an empty list.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bulkhead.errors import BulkheadError, Corrupt
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.image import OCI_INDEX, Descriptor, Index, decode_index, encode
from bulkhead.oci.reference import Reference, parse

REF_NAME = "org.opencontainers.image.ref.name"
CONFIG = "dev.bulkhead.config"
CHOSEN_FROM = "dev.bulkhead.index"
TAGGED = "dev.bulkhead.tagged"
_MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the index: `reference` None for an image that lost its names.

    `image` is the image id (digest of the configuration), `index` "" or the digest of the
    multi-platform index that the manifest was chosen from.
    """

    reference: Reference | None
    manifest: Descriptor
    image: str
    index: str = ""
    tagged: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of all names."""

    entries: tuple[Entry, ...]
    by_name: dict[str, Entry] = field(default_factory=dict)
    by_image: dict[str, list[Entry]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: tuple[Entry, ...]) -> "Snapshot":
        """With its lookup tables."""
        snapshot = cls(entries)
        for entry in entries:
            if entry.reference is not None:
                snapshot.by_name[str(entry.reference)] = entry
            snapshot.by_image.setdefault(entry.image, []).append(entry)
        return snapshot


class Draft:
    """The names while `Names.update` holds the lock; changes count when its block ends."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = list(entries)

    def find(self, name: str) -> Entry | None:
        """The entry named `name` (canonical)."""
        for entry in self.entries:
            if entry.reference is not None and str(entry.reference) == name:
                return entry
        return None

    def give(self, entry: Entry) -> None:
        """Add `entry`; its name is taken from whoever had it, who stays as an image without one.

        An entry without a name is added only if the image has no entry yet.
        """
        if entry.reference is None:
            if not any(other.image == entry.image for other in self.entries):
                self.entries.append(entry)
            return
        former = self.find(str(entry.reference))
        if former is not None:
            self.entries.remove(former)
        self.entries = [
            other
            for other in self.entries
            if other.reference is not None or other.image != entry.image
        ]
        self.entries.append(entry)
        if former is not None and former.image != entry.image:
            self.give(replace(former, reference=None, tagged=""))

    def untag(self, name: str) -> Entry | None:
        """Drop the name; an image that thereby loses its last one stays, without a name."""
        entry = self.find(name)
        if entry is not None:
            self.entries.remove(entry)
            self.give(replace(entry, reference=None, tagged=""))
        return entry

    def forget(self, image: str) -> None:
        """Drop every entry of `image`."""
        self.entries = [entry for entry in self.entries if entry.image != image]


def _entry(descriptor: Descriptor, path: str) -> Entry:
    annotations = descriptor.annotations
    name = annotations.get(REF_NAME)
    image = annotations.get(CONFIG, "")
    if not image:
        raise Corrupt(f"{path}: the entry of {descriptor.digest} has no annotation {CONFIG}")
    bare = Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        platform=descriptor.platform,
    )
    reference = parse(name) if name is not None else None
    chosen_from = annotations.get(CHOSEN_FROM, "")
    return Entry(reference, bare, image, chosen_from, annotations.get(TAGGED, ""))


def _descriptor(entry: Entry) -> Descriptor:
    annotations = {CONFIG: entry.image}
    if entry.reference is not None:
        annotations[REF_NAME] = str(entry.reference)
    if entry.index:
        annotations[CHOSEN_FROM] = entry.index
    if entry.tagged:
        annotations[TAGGED] = entry.tagged
    return Descriptor(
        media_type=entry.manifest.media_type,
        digest=entry.manifest.digest,
        size=entry.manifest.size,
        platform=entry.manifest.platform,
        annotations=annotations,
    )


class Names:
    """The names below `directory`, the store's root. Safe for threads and processes."""

    def __init__(self, directory: str) -> None:
        self.path = f"{directory}/index.json"
        self._lock_path = f"{directory}/index.lock"
        self._cached: tuple[tuple[int, int, int], Snapshot] | None = None
        self._mutex = threading.Lock()

    def read(self) -> Snapshot:
        """All names now; Corrupt if the file is damaged. Costs one stat while nothing changes."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return Snapshot(())
        key = (status.st_ino, status.st_mtime_ns, status.st_size)
        cached = self._cached
        if cached is not None and cached[0] == key:
            return cached[1]
        return self._load()

    def _load(self) -> Snapshot:
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except FileNotFoundError:
            return Snapshot(())
        try:
            index = decode_index(data, OCI_INDEX, self.path, most=_MOST)
            entries = tuple(_entry(descriptor, self.path) for descriptor in index.manifests)
        except BulkheadError as error:
            raise Corrupt(
                f"the list of images, {self.path}, is damaged ({error}); nothing is deleted while "
                "it is: restore it from a backup, or move it away and pull or load the images again"
            ) from error
        snapshot = Snapshot.of(entries)
        self._cached = ((status.st_ino, status.st_mtime_ns, status.st_size), snapshot)
        return snapshot

    @contextlib.contextmanager
    def update(self) -> Iterator[Draft]:
        """Change the names; nothing is written if the block raises or changes nothing."""
        with self._mutex, contextlib.ExitStack() as undo:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            lock = undo.enter_context(OwnedFd(os.open(self._lock_path, flags, 0o600)))
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._load().entries
            draft = Draft(before)
            yield draft
            if tuple(draft.entries) != before or not os.path.exists(self.path):
                self._replace(draft.entries)

    def _replace(self, entries: list[Entry]) -> None:
        index = Index([_descriptor(entry) for entry in entries], media_type=OCI_INDEX)
        data = encode(index)
        temporary = f"{self.path}.new"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self.path)
        with OwnedFd(os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)) as parent:
            os.fsync(parent.fileno())
        self._cached = None
