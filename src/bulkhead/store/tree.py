"""The second form of a layer: its EROFS image unpacked into a directory, for kernels that cannot
mount it.

The image is our own, its names were judged when it was written (layer_build.py); still every step
is relative to a directory descriptor opened without following links, so that nothing outside the
new directory can be touched whatever the image says. The directory appears whole by one rename.
What the host's file system cannot hold (attributes without root, device nodes without root) is
listed in docs/store.md.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bulkhead.errors import NotFound, Unsupported
from bulkhead.linux import openat2
from bulkhead.store import files
from bulkhead.store.blobs import hexadecimal
from bulkhead.store.content import ContentStore
from bulkhead.store.erofs_read import Image, Inode

_COPY = 8 << 20
_OPAQUE = b"trusted.overlay.opaque"
_USER_OPAQUE = b"user.overlay.opaque"


def ensure(store: ContentStore, diff_id: str) -> str:
    """The layer's unpacked directory, made if it does not exist yet; NotFound, Unsupported."""
    layer = store.layer(diff_id)
    if layer is None:
        raise NotFound(f"layer {diff_id} is not in the store; pull or load its image again")
    path = f"{store.root}/layers/{hexadecimal(diff_id)}/tree"
    if os.path.isdir(path):
        return path
    with files.scratch(f"{store.root}/work", store.gate) as work, ExitStack() as undo:
        image = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, image)
        os.mkdir(f"{work}/tree", 0o755)
        root = os.open(f"{work}/tree", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, root)
        unpack(image, root)
        with store.gate.shared():
            try:
                os.rename(f"{work}/tree", path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        files.sync_directory(os.path.dirname(path))
    return path


def unpack(image: int, root: int) -> None:
    """Make the files of the image (a descriptor) below directory `root` (a descriptor)."""
    _Unpacker(image, root).run()


class _Unpacker:
    def __init__(self, image: int, root: int) -> None:
        self._fd = image
        self._image = Image(image)
        self._root = root
        self._first: dict[int, bytes] = {}
        self._directories: list[tuple[bytes, Inode]] = []
        self._owners = True
        self._parent_path: bytes | None = None
        self._parent = -1

    def run(self) -> None:
        with ExitStack() as undo:
            undo.callback(self._close_parent)
            for path, inode in self._image.walk():
                if path:
                    self._make(path, inode)
                if inode.kind == stat.S_IFDIR:
                    self._directories.append((path, inode))
            # Times of directories last, deepest first: making entries changes them.
            for path, inode in reversed(self._directories):
                with openat2.openat2(
                    self._root, os.fsdecode(path) or ".", os.O_RDONLY | os.O_DIRECTORY,
                    openat2.BENEATH | openat2.NO_SYMLINKS,
                ) as fd:  # fmt: skip
                    self._attributes(int(fd), inode)
            os.fsync(self._root)

    def _close_parent(self) -> None:
        if self._parent >= 0:
            os.close(self._parent)
            self._parent = -1

    def _directory(self, path: bytes) -> int:
        if path != self._parent_path:
            self._close_parent()
            self._parent = openat2.openat2(
                self._root, os.fsdecode(path) or ".", os.O_RDONLY | os.O_DIRECTORY,
                openat2.BENEATH | openat2.NO_SYMLINKS,
            ).take()  # fmt: skip
            self._parent_path = path
        return self._parent

    def _make(self, path: bytes, inode: Inode) -> None:
        parent, _, name = path.rpartition(b"/")
        directory = self._directory(parent)
        if inode.kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=directory)
            return
        if inode.nlink > 1:
            first = self._first.get(inode.nid)
            if first is not None:
                self._link(first, name, directory)
                return
            self._first[inode.nid] = path
        if inode.kind == stat.S_IFREG:
            self._regular(directory, name, inode)
        elif inode.kind == stat.S_IFLNK:
            target = self._image.link_target(inode)
            os.symlink(target, name, dir_fd=directory)
            self._by_name(directory, name, inode)
        else:
            self._node(directory, name, inode)

    def _link(self, first: bytes, name: bytes, directory: int) -> None:
        source_parent, _, source_name = first.rpartition(b"/")
        with openat2.openat2(
            self._root, os.fsdecode(source_parent) or ".", os.O_RDONLY | os.O_DIRECTORY,
            openat2.BENEATH | openat2.NO_SYMLINKS,
        ) as source:  # fmt: skip
            os.link(
                source_name, name, src_dir_fd=int(source), dst_dir_fd=directory,
                follow_symlinks=False,
            )  # fmt: skip

    def _regular(self, directory: int, name: bytes, inode: Inode) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            at = 0
            for start, length in inode.extents:
                self._copy(fd, start, length, at)
                at += length
            os.ftruncate(fd, inode.size)
            self._attributes(fd, inode)
        finally:
            os.close(fd)

    def _copy(self, fd: int, start: int, length: int, at: int) -> None:
        """Copy a body, leaving its holes out."""
        end = start + length
        while start < end:
            try:
                data = os.lseek(self._fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole follows
                    return
                raise
            if data >= end:
                return
            at += data - start
            start = data
            hole = min(os.lseek(self._fd, start, os.SEEK_HOLE), end)
            while start < hole:
                piece = os.pread(self._fd, min(_COPY, hole - start), start)
                view = memoryview(piece)
                while view:
                    done = os.pwrite(fd, view, at)
                    view = view[done:]
                    at += done
                start += len(piece)

    def _node(self, directory: int, name: bytes, inode: Inode) -> None:
        try:
            os.mknod(name, inode.kind | 0o600, os.makedev(*inode.device), dir_fd=directory)
        except PermissionError as error:
            if inode.device == (0, 0):
                raise Unsupported(
                    "this layer hides files of the layers below, which needs the right to make "
                    "0/0 device nodes; run as root, or in a user namespace on Linux 5.8 or newer"
                ) from error
            # As every rootless unpacker: a device that nobody here could open is left empty.
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory))
        self._by_name(directory, name, inode)

    def _by_name(self, directory: int, name: bytes, inode: Inode) -> None:
        """Attributes of what cannot be opened: through its own name, never followed."""
        if self._owners:
            with self._owner_errors():
                os.chown(name, inode.uid, inode.gid, dir_fd=directory, follow_symlinks=False)
        if inode.kind != stat.S_IFLNK:
            os.chmod(name, stat.S_IMODE(inode.mode), dir_fd=directory)
        for key, value in self._image.xattrs(inode).items():
            path = b"/proc/self/fd/%d/%s" % (directory, name)
            self._xattr(path, key, value)
        time = inode.mtime * 10**9 + inode.mtime_ns
        os.utime(name, ns=(time, time), dir_fd=directory, follow_symlinks=False)

    def _attributes(self, fd: int, inode: Inode) -> None:
        if self._owners:
            with self._owner_errors():
                os.fchown(fd, inode.uid, inode.gid)
        for key, value in self._image.xattrs(inode).items():
            self._xattr(fd, key, value)
        os.fchmod(fd, stat.S_IMODE(inode.mode))
        time = inode.mtime * 10**9 + inode.mtime_ns
        os.utime(fd, ns=(time, time))

    @contextmanager
    def _owner_errors(self) -> Iterator[None]:
        """Without the right to give files away, everything belongs to who unpacks it."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            self._owners = False

    def _xattr(self, target: int | bytes, key: bytes, value: bytes) -> None:
        follow = isinstance(target, int)
        try:
            os.setxattr(target, key, value, follow_symlinks=follow)
        except OSError as error:
            if error.errno == errno.EPERM and key == _OPAQUE:
                # An overlay mounted without privilege (userxattr) looks for this one.
                self._xattr(target, _USER_OPAQUE, value)
                return
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
                return  # listed in docs/store.md
            raise Unsupported(
                f"the store's file system cannot hold the extended attribute "
                f"{key.decode('utf-8', 'backslashreplace')} of {len(value)} bytes: {error.strerror}"
            ) from error
