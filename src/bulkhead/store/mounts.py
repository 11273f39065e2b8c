"""Layers as directories: each EROFS image mounted once, shared by every workload.

    <run>/layers/NAME    mount point; NAME is the first 16 hexadecimal digits of the diff_id

The mounts are read-only, nosuid and nodev (whiteouts are 0/0 character devices, which are never
opened). Where the kernel cannot mount a file (before 6.12, or a store on an overlay: ENOTBLK) a
loop device carries it; where it may mount neither, the layer is unpacked (tree.py). Which form
works is found out by trying.
"""

import errno
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress

from bulkhead.errors import Corrupt, Internal, NotFound, Unsupported
from bulkhead.linux import loop, mounts
from bulkhead.linux.fds import OwnedFd
from bulkhead.store import tree
from bulkhead.store.blobs import hexadecimal
from bulkhead.store.content import ContentStore

FORMS = ("file", "loop", "tree")
_ATTRIBUTES = mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV | mounts.ATTR_NOATIME
_NEXT_FORM = frozenset(
    (
        errno.ENOTBLK, errno.ENODEV, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENXIO,
        errno.EOPNOTSUPP, errno.ENOSYS,
    )
)  # fmt: skip
"""What says "not in this form here" and not "this image is bad"."""


_BAD_IMAGE = frozenset((errno.EINVAL, errno.EUCLEAN, errno.EBADMSG, errno.EIO))


class LayerMounts:
    """The mounted layers of one engine, in the mount namespace of the calling process.

    `forms` restricts what is tried, in order; tests use it.
    """

    def __init__(self, store: ContentStore, run_dir: str, forms: Sequence[str] = FORMS) -> None:
        self._store = store
        self._directory = f"{os.path.abspath(run_dir)}/layers"
        self._forms = list(forms)
        self._lock = threading.Lock()
        self._ready: dict[str, str] = {}
        os.makedirs(self._directory, mode=0o700, exist_ok=True)

    def lowers(self, diff_ids: Sequence[str]) -> tuple[str, ...]:
        """Directories of the layers, topmost first, from diff_ids given bottom to top.

        A layer that occurs twice is listed once, at its topmost place: overlayfs refuses the same
        directory twice, and what lies deeper of it is hidden anyway. NotFound names a missing one.
        """
        found: dict[str, None] = {}
        for diff_id in reversed(diff_ids):
            path = self._ready.get(diff_id)
            if path is None or (path.endswith("/tree") and not os.path.isdir(path)):
                with self._lock:
                    path = self._ready[diff_id] = self._provide(diff_id)
            found[path] = None
        return tuple(found)

    def _provide(self, diff_id: str) -> str:
        layer = self._store.layer(diff_id)
        if layer is None:
            raise NotFound(f"layer {diff_id} is not in the store; pull or load its image again")
        target = f"{self._directory}/{hexadecimal(diff_id)[:16]}"
        if is_mount(target):
            return target
        refusals: list[str] = []
        while self._forms:
            form = self._forms[0]
            if form == "tree":
                return tree.ensure(self._store, diff_id)
            try:
                self._mount(form, layer.path, target)
            except OSError as error:
                with suppress(OSError):
                    os.rmdir(target)
                if error.errno not in _NEXT_FORM or not os.path.exists(layer.path):
                    kind = Corrupt if error.errno in _BAD_IMAGE else Internal
                    raise kind(
                        f"layer {diff_id}: mounting {layer.path} failed: {error.strerror}"
                    ) from error
                refusals.append(f"{form}: {error.strerror}")
                del self._forms[0]
                continue
            return target
        raise Unsupported(f"layer {diff_id}: no form can be used here ({'; '.join(refusals)})")

    def _mount(self, form: str, image: str, target: str) -> None:
        device: OwnedFd | None = None
        source = image
        if form == "loop":
            device, source = loop.attach_read_only(image)
        try:
            with mounts.new_filesystem("erofs", ["ro", ("source", source)], _ATTRIBUTES) as mounted:
                os.makedirs(target, mode=0o700, exist_ok=True)
                mounts.attach(int(mounted), target)
        finally:
            if device is not None:
                device.close()

    def release_unused(
        self, in_use: Collection[str], more: Callable[[], Iterable[str]] = tuple
    ) -> list[str]:
        """Unmount the layers whose diff_ids are not `in_use`; returns the names of those gone.

        `more` gives further ones that stay; it is asked while nothing can be mounted.
        """
        gone: list[str] = []
        with self._lock:
            in_use = {*in_use, *more()}
            keep = {hexadecimal(diff_id)[:16] for diff_id in in_use}
            for diff_id in [d for d in self._ready if d not in in_use]:
                del self._ready[diff_id]
            for name in sorted(os.listdir(self._directory)):
                if name in keep:
                    continue
                target = f"{self._directory}/{name}"
                if is_mount(target):
                    mounts.unmount(target, mounts.MNT_DETACH)
                os.rmdir(target)
                gone.append(name)
        return gone

    def close(self) -> None:
        """Unmount everything and remove the directory."""
        self.release_unused(())
        with suppress(FileNotFoundError):
            os.rmdir(self._directory)


def is_mount(path: str) -> bool:
    """Whether something is mounted at directory `path`; False if it does not exist."""
    try:
        return os.lstat(path).st_dev != os.lstat(f"{path}/..").st_dev
    except FileNotFoundError:
        return False
