"""New images from tar streams: `commit` of a workload's changes, `import` of a root file system."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from bulkhead.errors import Conflict, Invalid
from bulkhead.images import assemble
from bulkhead.images.catalog import Catalog, Image, host_platform
from bulkhead.images.changes import apply
from bulkhead.images.timestamps import now
from bulkhead.oci.image import (
    ContainerConfig,
    Descriptor,
    History,
    ImageConfig,
    RootFS,
)
from bulkhead.oci.platform import parse as parse_platform
from bulkhead.oci.reference import Reference, parse


def commit(
    catalog: Catalog,
    parent: Image | None,
    chunks: Iterable[bytes],
    *,
    config: Mapping[str, Any] | None,
    changes: Sequence[str],
    ref: str | None,
    author: str,
    comment: str,
) -> Image:
    """An image of `parent` plus the layer whose tar (with whiteouts) `chunks` give.

    `config` is the workload's configuration in Docker's shape; None: the parent's. `changes` are
    Dockerfile instructions. Without `ref` the image has no name.
    """
    reference = _reference(ref)
    base = parent.config.container if parent is not None else ContainerConfig()
    merged = apply(_merged(config, base), changes)
    with catalog.store.lease():
        layers, history = _inherited(catalog, parent)
        layer = catalog.store.ingest(chunks, compression="", keep_blob=False)
        created = now()
        entry = History(created, " ".join(merged.cmd or ()), author, comment)
        if layer.entries:
            layers.append(assemble.tar_layer(layer.diff_id, layer.size))
            diff_ids = [*(parent.diff_ids if parent else ()), layer.diff_id]
        else:
            entry.empty_layer = True
            diff_ids = list(parent.diff_ids if parent else ())
        platform = parent.config.platform if parent is not None else host_platform()
        made = ImageConfig(
            architecture=platform.architecture,
            os=platform.os,
            variant=platform.variant,
            config=merged,
            rootfs=RootFS(diff_ids=diff_ids),
            history=[*history, entry],
            created=created,
            author=author,
            comment=comment,
        )
        stored = assemble.put_config(catalog, made, layers)
        assemble.name(catalog, stored, [reference] if reference else [])
    return catalog.image(stored.image)


def _reference(ref: str | None) -> Reference | None:
    if not ref:
        return None
    reference = parse(ref).tagged()
    if reference.digest is not None:
        raise Invalid("cannot import digest reference")
    return reference


def _merged(config: Mapping[str, Any] | None, base: ContainerConfig) -> ContainerConfig:
    """The workload's configuration as an image's: host names and what belongs to a run go."""
    if config is None:
        return base
    names = {field.encode_name for field in msgspec.structs.fields(ContainerConfig)}
    unset = {"Hostname", "Domainname"}
    known = {
        key: value for key, value in config.items() if key in names - unset and value is not None
    }
    try:
        return msgspec.convert(known, ContainerConfig)
    except msgspec.ValidationError as error:
        raise Invalid(f"the configuration to commit is wrong: {error}") from error


def _inherited(catalog: Catalog, parent: Image | None) -> tuple[list[Descriptor], list[History]]:
    """Layers and history of the parent; Conflict if it was removed meanwhile."""
    if parent is None:
        return [], []
    if not catalog.store.has(parent.manifest_digest):
        raise Conflict(f"image {parent.id} was removed while it was committed to")
    layers = list(catalog.manifest(parent.manifest_digest).layers)
    for layer, diff_id in zip(layers, parent.diff_ids, strict=True):
        catalog.store.has(layer.digest)  # within the lease: keeps a stored blob
        if catalog.store.layer(diff_id) is None:
            raise Conflict(f"layer {diff_id} of image {parent.id} was removed meanwhile")
    return layers, list(parent.config.history or ())


def import_root(
    catalog: Catalog,
    chunks: Iterable[bytes],
    *,
    ref: str | None,
    changes: Sequence[str],
    message: str,
    platform: str | None,
) -> Image:
    """An image of one layer, the root file system tar (compressed or not) that `chunks` give."""
    reference = _reference(ref)
    config = apply(ContainerConfig(), changes)
    target = parse_platform(platform) if platform else host_platform()
    with catalog.store.lease():
        layer = catalog.store.ingest(chunks, compression="auto", keep_blob=False)
        created = now()
        made = ImageConfig(
            architecture=target.architecture,
            os=target.os,
            variant=target.variant,
            config=config,
            rootfs=RootFS(diff_ids=[layer.diff_id]),
            history=[History(created, comment=message)],
            created=created,
            comment=message,
        )
        stored = assemble.put_config(catalog, made, [assemble.tar_layer(layer.diff_id, layer.size)])
        assemble.name(catalog, stored, [reference] if reference else [])
    return catalog.image(stored.image)
