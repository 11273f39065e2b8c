"""Putting an image together from a configuration and layers that are stored, and naming it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bulkhead.images.catalog import Catalog
from bulkhead.images.names import Entry
from bulkhead.images.timestamps import now
from bulkhead.oci.digest import of
from bulkhead.oci.image import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    Manifest,
    encode,
)
from bulkhead.oci.reference import Reference


@dataclass(frozen=True, slots=True)
class Stored:
    """An image whose blobs are all in the store but which no name protects yet."""

    image: str
    manifest: Descriptor
    index: str = ""


def tar_layer(diff_id: str, size: int) -> Descriptor:
    """The descriptor of a layer that is kept as plain tar (given back from its recipe)."""
    return Descriptor(media_type=OCI_LAYER, digest=diff_id, size=size)


def put(catalog: Catalog, config: bytes, layers: Sequence[Descriptor]) -> Stored:
    """Store a configuration and the manifest that joins it to `layers`.

    Call it within a lease of the store; the same arguments give the same digests.
    """
    image = catalog.store.put(config)
    data = encode(manifest_of(image, len(config), layers))
    catalog.store.put(data)
    return Stored(image, Descriptor(media_type=OCI_MANIFEST, digest=of(data), size=len(data)))


def manifest_of(image: str, size: int, layers: Sequence[Descriptor]) -> Manifest:
    """The manifest that `put` writes for a configuration of `size` bytes."""
    config = Descriptor(media_type=OCI_CONFIG, digest=image, size=size)
    return Manifest(config, list(layers), media_type=OCI_MANIFEST)


def put_config(catalog: Catalog, config: ImageConfig, layers: Sequence[Descriptor]) -> Stored:
    """`put` of a configuration of ours."""
    return put(catalog, encode(config), layers)


def name(catalog: Catalog, stored: Stored, references: Sequence[Reference]) -> None:
    """Give the image its names; without any it becomes an image without a name.

    The store's gate keeps a collection that has read the names already from running past this.
    """
    with catalog.store.gate.shared(), catalog.names.update() as draft:
        stamp = now()
        for reference in references or (None,):
            draft.give(Entry(reference, stored.manifest, stored.image, stored.index, stamp))


@contextlib.contextmanager
def leased(catalog: Catalog) -> Iterator[None]:
    """What is written in the block is safe from garbage collection until the block ends."""
    with catalog.store.lease():
        yield
