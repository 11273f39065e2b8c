"""One image for many layers: what a guest with few disks mounts instead of them.

    <root>/merged/NAME.erofs    what an overlay of the layers shows, as a file system image
    <root>/merged/NAME.json     the diff_ids it was made of, bottom to top

NAME follows from the diff_ids. Made once, from the mounted layers, without a file being created
per entry; removed when one of its layers is.
"""

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Collection, Sequence

from bulkhead.linux import mounts, overlayfs
from bulkhead.store import diff
from bulkhead.store.layer_build import LayerBuilder
from bulkhead.store.limits import Limits

_OVERLAY = (("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off"))


def merged_image(
    directory: str, diff_ids: Sequence[str], lowers: Sequence[str], limits: Limits
) -> str:
    """The path of the image of `diff_ids` (bottom to top), which are mounted at `lowers` (topmost
    first); takes about as long as unpacking them.
    """
    name = hashlib.sha256("\0".join(diff_ids).encode()).hexdigest()[:32]
    path = f"{directory}/{name}.erofs"
    if os.path.exists(path):
        return path
    os.makedirs(directory, mode=0o700, exist_ok=True)
    fd, scratch = tempfile.mkstemp(dir=directory, prefix=".new-")
    with contextlib.ExitStack() as undo:
        undo.callback(_forget, scratch)
        with os.fdopen(fd, "w+b") as image:
            _build(image.fileno(), lowers, limits, bytes.fromhex(name))
            os.fsync(image.fileno())
            os.fchmod(image.fileno(), 0o444)
        with open(f"{directory}/{name}.json", "w", encoding="ascii") as file:
            json.dump(list(diff_ids), file)
        os.rename(scratch, path)
        undo.pop_all()
    return path


def _build(image: int, lowers: Sequence[str], limits: Limits, uuid: bytes) -> None:
    with overlayfs.detached(lowers, _OVERLAY, attributes=mounts.ATTR_RDONLY) as root:
        pieces = diff.tar_tree(f"/proc/self/fd/{int(root)}/.")
        LayerBuilder(image, io.BytesIO(), limits).build(pieces, lambda: uuid)


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def release(directory: str, layers: Collection[str]) -> None:
    """Remove the images of which a layer is not among `layers` any more."""
    if not os.path.isdir(directory):
        return
    for entry in os.listdir(directory):
        name, extension = os.path.splitext(entry)
        if extension != ".json":
            continue
        with open(f"{directory}/{entry}", encoding="ascii") as file:
            wanted = json.load(file)
        if not set(wanted) <= set(layers):
            _forget(f"{directory}/{name}.erofs")
            _forget(f"{directory}/{entry}")
