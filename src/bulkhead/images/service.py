"""Images: the one face the engine uses. Every method may block; call them in threads.

Progress goes to a callback as Docker's JSON messages ({"status", "id", "progressDetail"} or
{"stream"}). A callback that raises aborts the operation, which leaves nothing half-named behind.

What talks to registries (urllib3, ssl, http) is imported when it is first needed: a tenth of the
engine's memory, which many an engine never uses.
"""

import os
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from bulkhead.errors import Invalid, NotFound
from bulkhead.home import Home
from bulkhead.images import archive_read, archive_write, describe, filters, removal
from bulkhead.images.assemble import Stored
from bulkhead.images.catalog import Catalog, Image
from bulkhead.images.commit import commit, import_root
from bulkhead.images.names import Entry, Names
from bulkhead.images.origins import Origins
from bulkhead.images.progress import Progress, silent
from bulkhead.oci.reference import DEFAULT_DOMAIN, Reference, parse
from bulkhead.store.content import ContentStore

if TYPE_CHECKING:
    from bulkhead.registry.client import Repository
    from bulkhead.registry.config import Registries
    from bulkhead.registry.waiting import Cancel, Clock

List = list
Auth = Mapping[str, Any] | None
"""Docker's X-Registry-Auth ({"username", "password", "identitytoken", "registrytoken"}); None: what
the engine's own docker configuration says; {}: anonymous."""


class ImageService:
    """Images of one installation."""

    def __init__(
        self,
        home: Home,
        store: ContentStore,
        *,
        registries: "Registries | None" = None,
        clock: "Clock | None" = None,
        keep_blobs: bool = True,
    ) -> None:
        """`registries`: instead of the configuration file; `keep_blobs`: of pulled layers."""
        self.home = home
        self.store = store
        self._registries = registries
        self._clock = clock
        self._keep_blobs = keep_blobs
        self.origins = Origins(store.root)
        self.names = Names(store.root)
        self.catalog = Catalog(store, self.names)

    # --- reading

    def resolve(self, ref: str) -> Image:
        """The image that a name, an id or a unique prefix of one means; NotFound if none."""
        return self.catalog.resolve(ref)

    def list(
        self,
        filters_: Mapping[str, Any] | None = None,
        *,
        all_: bool = False,
        users: describe.Users | None = None,
        shared_size: bool = False,
    ) -> List[dict[str, Any]]:
        """Docker's ImageSummary dicts, newest first. `all_` changes nothing: no hidden images.

        Images used by a workload but without any name are listed as dangling ones.
        """
        wanted = filters.normalise(filters_, filters.LIST)
        snapshot = self.names.read()
        passes = filters.predicate(wanted, snapshot, self.resolve)
        images = [self.catalog.image(identity, snapshot) for identity in snapshot.by_image]
        shared = describe.shared_sizes(self.catalog, images) if shared_size else {}
        rows = [
            describe.summary(
                self.catalog, image, snapshot, users or {}, shared=shared.get(image.id, -1)
            )
            for image in images
            if passes(image)
        ]
        if patterns := wanted.get("reference"):
            for row in rows:
                shown = filters.familiar_names(snapshot.by_image[row["Id"]], patterns)
                for member in ("RepoTags", "RepoDigests"):
                    row[member] = [name for name in row[member] or () if name in shown]
        rows.sort(key=lambda row: (-row["Created"], row["Id"]))
        return rows

    def inspect(self, ref: str) -> dict[str, Any]:
        """Docker's ImageInspect."""
        snapshot = self.names.read()
        image = self.catalog.image(self.catalog.find(ref, snapshot), snapshot)
        return describe.inspect(self.catalog, image, snapshot)

    def history(self, ref: str) -> List[dict[str, Any]]:
        """Docker's image history, newest first."""
        snapshot = self.names.read()
        image = self.catalog.image(self.catalog.find(ref, snapshot), snapshot)
        return describe.history(self.catalog, image, snapshot)

    def disk_usage(self, users: describe.Users | None = None) -> dict[str, Any]:
        """Docker's image part of `system df`; every layer and blob counted once, bytes on disk."""
        return describe.disk_usage(self.catalog, users or {})

    # --- names

    def tag(self, source: str, target: str) -> None:
        """Give the image `source` the further name `target`."""
        removal.tag(self.catalog, source, target)

    def remove(
        self,
        ref: str,
        force: bool = False,
        noprune: bool = False,
        users: describe.Users | None = None,
        running: Collection[str] = (),
    ) -> List[dict[str, str]]:
        """`rmi`: docker's list of {"Untagged"} and {"Deleted"}; `running`: names of running users.

        Conflict in Docker's words when a workload or another name needs it.
        """
        return removal.remove(
            self.catalog,
            self.origins,
            ref,
            force=force,
            noprune=noprune,
            users=users or {},
            running=running,
        )

    def prune(
        self, filters_: Mapping[str, Any] | None = None, users: describe.Users | None = None
    ) -> dict[str, Any]:
        """Remove images without a name (`dangling` false: all unused), then collect garbage."""
        return removal.prune(self.catalog, self.origins, filters_, users or {})

    def gc(self) -> int:
        """Delete content that no image needs; returns bytes freed on disk."""
        return self.store.gc(self.catalog.roots).freed

    # --- registries

    def _repository(self, ref: str, auth: Auth, cancel: "Cancel | None") -> "Repository":
        from bulkhead.registry.client import Repository
        from bulkhead.registry.credentials import from_auth

        return Repository(
            parse(ref), from_auth(auth), config=self._registries, cancel=cancel, clock=self._clock
        )

    def pull(
        self,
        ref: str,
        platform: str | None = None,
        auth: Auth = None,
        progress: Progress = silent,
        cancel: "Cancel | None" = None,
    ) -> Image:
        """Pull `ref` for `platform` ("os/arch[/variant]"; "all": every one; None: this machine's).

        `cancel` ends it from another thread. NotFound, Denied, Unavailable, Corrupt.
        """
        from bulkhead.images.pull import Pull

        with self._repository(ref, auth, cancel) as repository:
            pull = Pull(self.catalog, self.origins, repository, progress, self._keep_blobs)
            return pull.run(parse(ref), platform)

    def pull_all(
        self,
        ref: str,
        platform: str | None = None,
        auth: Auth = None,
        progress: Progress = silent,
        cancel: "Cancel | None" = None,
    ) -> List[Image]:
        """Pull every tag of the repository `ref`, one after the other."""
        wanted = parse(ref)
        if wanted.tag is not None or wanted.digest is not None:
            raise Invalid("tag can't be used with --all-tags/-a")
        with self._repository(ref, auth, cancel) as repository:
            tags = repository.tags()
        return [
            self.pull(str(wanted.with_tag(tag)), platform, auth, progress, cancel) for tag in tags
        ]

    def push(
        self,
        ref: str,
        auth: Auth = None,
        progress: Progress = silent,
        cancel: "Cancel | None" = None,
    ) -> str:
        """Push the image named `ref` (tag "latest" by default); the digest at the registry."""
        from bulkhead.images.push import Push

        with self._repository(ref, auth, cancel) as repository:
            return Push(self.catalog, self.origins, repository, progress).run(parse(ref))

    def push_all(
        self,
        ref: str,
        auth: Auth = None,
        progress: Progress = silent,
        cancel: "Cancel | None" = None,
    ) -> List[str]:
        """Push every tag of the repository `ref`."""
        reference = parse(ref)
        if reference.tag is not None or reference.digest is not None:
            raise Invalid("tag can't be used with --all-tags/-a")
        wanted = reference.name
        tags = [
            str(entry.reference)
            for entry in self.names.read().entries
            if entry.reference and entry.reference.name == wanted and entry.reference.tag
        ]
        if not tags:
            raise NotFound(f"An image does not exist locally with the tag: {ref}")
        return [self.push(tag, auth, progress, cancel) for tag in tags]

    def distribution(self, ref: str, auth: Auth = None) -> dict[str, Any]:
        """What the registry says of `ref`: descriptor and platforms; nothing is pulled."""
        from bulkhead.images import remote

        with self._repository(ref, auth, None) as repository:
            return remote.distribution(repository, parse(ref))

    def search(
        self, term: str, limit: int, wanted: Mapping[str, Sequence[str]], auth: Auth = None
    ) -> List[dict[str, Any]]:
        """What a registry's index finds."""
        from bulkhead.images import remote
        from bulkhead.registry.credentials import from_auth

        return remote.search(term, limit, wanted, from_auth(auth), self._registries)

    def login(self, auth: Mapping[str, Any]) -> str:
        """Show `auth` to its "serveraddress" (none: Docker Hub); Denied if it is refused.

        Returns the identity token to be kept instead of the password, "" if there is none.
        """
        from bulkhead.registry.client import login
        from bulkhead.registry.credentials import from_auth

        server = str(auth.get("serveraddress") or DEFAULT_DOMAIN)
        domain = server.partition("://")[2] if "://" in server else server
        domain = domain.partition("/")[0]
        if domain == "index.docker.io":
            domain = DEFAULT_DOMAIN
        credentials = from_auth(auth)
        assert credentials is not None
        return login(domain, credentials, config=self._registries, clock=self._clock)

    # --- archives

    def load(
        self, file: BinaryIO, progress: Progress = silent, under: Reference | None = None
    ) -> List[str]:
        """Store the images of an archive (docker-archive or OCI, compressed or not).

        Returns their familiar names, or ids of those without. `under`: as `archive_read.load` says.
        """
        return archive_read.load(self.catalog, file, progress, under)

    def save(self, refs: Sequence[str], out: BinaryIO, format_: str = "docker") -> None:
        """Write an archive of the images `refs` to `out`: "docker" or "oci"."""

        archive_write.save(self.catalog, [*refs], out, format_, self._exact)

    def export(
        self, stored: Stored, names: Sequence[Reference], out: BinaryIO, format_: str
    ) -> None:
        """An archive of an image that has no name here yet, within the caller's lease."""

        entry = Entry(None, stored.manifest, stored.image, stored.index)
        chosen: List[tuple[Entry, Reference | None]] = [(entry, name) for name in names]
        archive_write.write(self.catalog, chosen or [(entry, None)], out, format_, self._exact)

    def _exact(self, digest: str, size: int, diff_id: str) -> Generator[bytes, None, None]:
        from bulkhead.images.fetch import exact

        return exact(self.store, self.origins, digest, size, diff_id, config=self._registries)

    # --- making

    def commit(
        self,
        parent: Image | None,
        layer_chunks: Iterable[bytes],
        *,
        config: Mapping[str, Any] | None = None,
        changes: Sequence[str] = (),
        ref: str | None = None,
        author: str = "",
        comment: str = "",
    ) -> Image:
        """An image of `parent` plus one layer (its tar with whiteouts).

        `config`: the workload's, in Docker's shape (None: the parent's); `changes`: Dockerfile
        instructions applied to it.
        """
        return commit(
            self.catalog,
            parent,
            layer_chunks,
            config=config,
            changes=changes,
            ref=ref,
            author=author,
            comment=comment,
        )

    def import_(
        self,
        chunks: Iterable[bytes],
        ref: str | None = None,
        changes: Sequence[str] = (),
        message: str = "",
        platform: str | None = None,
    ) -> Image:
        """An image of one layer from a root file system's tar, compressed or not."""
        return import_root(
            self.catalog, chunks, ref=ref, changes=changes, message=message, platform=platform
        )

    def bootstrap(
        self,
        name: str,
        include: Sequence[str] = (),
        mirror: str | None = None,
        lock: str | None = None,
        progress: Progress = silent,
        platform: str = "",
    ) -> Image:
        """An image from a distribution's packages ("debian:bookworm" plus `include`).

        The lock file `lock` is used if it exists, else written; without one a fresh lock goes to
        ROOT/bootstrap/. Unsupported without mmdebstrap.
        """
        from bulkhead.images.bootstrap import Request, bootstrap

        path = lock
        if path is None:
            path = self.home.in_root("bootstrap", f"{name.replace('/', '_')}.lock.json")
            with suppress(FileNotFoundError):
                os.unlink(path)
        request = Request(name, tuple(include), mirror, path, platform)
        return bootstrap(self.catalog, request, progress)
