"""Tagging, `rmi` and pruning, with Docker's rules and words."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from bulkhead.errors import Conflict, Invalid
from bulkhead.images import filters as filtering
from bulkhead.images.catalog import Catalog
from bulkhead.images.describe import Users
from bulkhead.images.names import Draft, Entry
from bulkhead.images.origins import Origins
from bulkhead.images.progress import short
from bulkhead.images.timestamps import now
from bulkhead.oci.digest import is_digest
from bulkhead.oci.reference import parse


def tag(catalog: Catalog, source: str, target: str) -> None:
    """Name the image `source` also `target`."""
    reference = parse(target)
    if reference.digest is not None:
        raise Invalid("refusing to create a tag with a digest reference")
    with catalog.names.update() as draft:
        snapshot = catalog.names.read()
        image = catalog.find(source, snapshot)
        named = catalog.entry(source, snapshot) if not _is_full_id(source) else None
        origin = named if named is not None else snapshot.by_image[image][0]
        draft.give(replace(origin, reference=reference.tagged(), tagged=now()))


def _is_full_id(text: str) -> bool:
    return is_digest(text) or is_digest(f"sha256:{text}")


def remove(
    catalog: Catalog,
    origins: Origins,
    text: str,
    *,
    force: bool,
    noprune: bool,
    users: Users,
    running: Collection[str],
) -> list[dict[str, str]]:
    """`docker rmi`: by a name, drop that name; by an id, all of them; then the image if unused."""
    del noprune  # no parent images are kept that could be pruned along
    result: list[dict[str, str]] = []
    with catalog.names.update() as draft:
        snapshot = catalog.names.read()
        image = catalog.find(text, snapshot)
        entry = None if _is_full_id(text) else catalog.entry(text, snapshot)
        inside = [e for e in draft.entries if e.image == image and e.reference is not None]
        if entry is not None:
            _check_name(text, entry, inside, users, force=force)
            doomed = _with_digests(entry, inside)
        else:
            _check_id(image, inside, users, running, force=force)
            doomed = inside
        for one in doomed:
            draft.untag(str(one.reference))
            result.append({"Untagged": one.reference.familiar if one.reference else ""})
        gone = not users.get(image) and len(doomed) == len(inside)
        if gone:
            draft.forget(image)
    if gone:
        result.append({"Deleted": image})
        result.extend({"Deleted": digest} for digest in _collect(catalog, origins)[1])
    return result


def _with_digests(entry: Entry, names: list[Entry]) -> list[Entry]:
    """`entry`, and the digests of its repository once no tag of that repository remains."""
    assert entry.reference is not None
    others = [e for e in names if e is not entry and e != entry]
    if entry.reference.digest is None and all(
        e.reference is not None
        and e.reference.digest is not None
        and e.reference.name == entry.reference.name
        for e in others
    ):
        return [entry, *others]
    return [entry]


def _check_name(text: str, entry: Entry, names: list[Entry], users: Users, *, force: bool) -> None:
    using = users.get(entry.image)
    if using and not force and len(_with_digests(entry, names)) == len(names):
        raise Conflict(
            f'conflict: unable to remove repository reference "{text}" (must force) - '
            f"container {using[0]} is using its referenced image {short(entry.image)}"
        )


def _check_id(
    image: str, names: list[Entry], users: Users, running: Collection[str], *, force: bool
) -> None:
    for user in users.get(image, ()):
        if user in running:
            raise Conflict(
                f"conflict: unable to delete {short(image)} (cannot be forced) - "
                f"image is being used by running container {user}"
            )
        if not force:
            raise Conflict(
                f"conflict: unable to delete {short(image)} (must be forced) - "
                f"image is being used by stopped container {user}"
            )
    repositories = {entry.reference.name for entry in names if entry.reference is not None}
    if len(repositories) > 1 and not force:
        raise Conflict(
            f"conflict: unable to delete {short(image)} (must be forced) - "
            "image is referenced in multiple repositories"
        )


def prune(
    catalog: Catalog, origins: Origins, filters: Mapping[str, Any] | None, users: Users
) -> dict[str, Any]:
    """Docker's images/prune: {"ImagesDeleted", "SpaceReclaimed" in bytes on disk}."""
    wanted = filtering.normalise(filters, filtering.PRUNE)
    dangling_only = filtering.flag(wanted, "dangling", True)
    wanted.pop("dangling", None)
    deleted: list[dict[str, str]] = []
    with catalog.names.update() as draft:
        snapshot = catalog.names.read()
        passes = filtering.predicate(wanted, snapshot, catalog.resolve)
        for identity in snapshot.by_image:
            dangling = filtering.is_dangling(snapshot, identity)
            if users.get(identity) or (dangling_only and not dangling):
                continue
            if passes(catalog.image(identity, snapshot)):
                deleted.extend(_drop(draft, identity))
    freed, digests = _collect(catalog, origins)
    deleted.extend({"Deleted": digest} for digest in digests)
    return {"ImagesDeleted": deleted or None, "SpaceReclaimed": freed}


def _drop(draft: Draft, image: str) -> list[dict[str, str]]:
    rows = [
        {"Untagged": entry.reference.familiar}
        for entry in draft.entries
        if entry.image == image and entry.reference is not None
    ]
    draft.forget(image)
    return [*rows, {"Deleted": image}]


def _collect(catalog: Catalog, origins: Origins) -> tuple[int, list[str]]:
    """Collect garbage: bytes freed, and the layers (by diff id) that went."""
    layers = set(catalog.store.layers())
    report = catalog.store.gc(catalog.roots)
    origins.forget(set(catalog.roots()))
    return report.freed, [digest for digest in report.digests if digest in layers]
