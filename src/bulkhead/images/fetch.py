"""A blob's exact bytes, wherever they can be had: stored, made again, or fetched again."""

from collections.abc import Generator
from contextlib import closing

from bulkhead.errors import BulkheadError, NotFound
from bulkhead.images.origins import Origins
from bulkhead.oci.reference import parse
from bulkhead.registry.client import Repository
from bulkhead.registry.config import Registries
from bulkhead.registry.waiting import Cancel
from bulkhead.store.content import ContentStore

_PIECE = 1 << 20


def exact(
    store: ContentStore,
    origins: Origins,
    digest: str,
    size: int,
    diff_id: str,
    *,
    config: Registries | None,
    cancel: Cancel | None = None,
) -> Generator[bytes, None, None]:
    """The blob of `size` bytes; `diff_id` "" if it is no layer.

    An evicted blob that another program compressed is fetched from a repository it came from;
    NotFound if none of them gives it.
    """
    try:
        if diff_id:
            yield from store.blob_for(digest, diff_id)
            return
        with store.open(digest) as file:
            while piece := file.read(_PIECE):
                yield piece
        return
    except NotFound as error:
        gone = error
    for name in origins.of(digest):
        origin = Repository(parse(name), config=config, cancel=cancel)
        with origin, closing(origin.blob(digest, size)) as pieces:
            try:
                first = next(pieces, b"")
            except BulkheadError:
                continue  # another repository may still have it
            yield first
            yield from pieces
            return
    raise gone
