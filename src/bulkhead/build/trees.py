"""Trees of files that COPY and ADD take from: a directory, an image's layers, an archive.

A tree is asked by paths relative to its root ("" is the root itself). Symbolic links are resolved
here, by `resolve`, and never lead out of the root; the kernel is only asked for paths without any.
"""

import hashlib
import os
import stat
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from bulkhead.build.ignore import Ignore
from bulkhead.errors import Invalid, NotFound
from bulkhead.linux import openat2
from bulkhead.linux.fds import OwnedFd
from bulkhead.store import codecs, tar_read
from bulkhead.store.tar_read import ByteSource, TarReader

_PIECE = 1 << 20
_MOST_LINKS = 40
_DEEPEST = 128
"""Components of a name in an archive."""
_BENEATH = openat2.BENEATH | openat2.NO_SYMLINKS
_KINDS = {
    tar_read.REGULAR: stat.S_IFREG,
    tar_read.SYMLINK: stat.S_IFLNK,
    tar_read.CHAR: stat.S_IFCHR,
    tar_read.BLOCK_DEVICE: stat.S_IFBLK,
    tar_read.DIRECTORY: stat.S_IFDIR,
    tar_read.FIFO: stat.S_IFIFO,
}


@dataclass(slots=True)
class Node:
    """One file. `mode` has its type; `identity` is equal for names of one file, None without."""

    path: str
    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] | None = None
    identity: tuple[int, ...] | None = None
    stamp: tuple[int, ...] = ()
    """What changes whenever the content does; () if nothing says so."""
    offset: int = 0
    sparse: list[tuple[int, int]] | None = None
    children: "dict[str, Node] | None" = None

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


class Digests:
    """Digests of contents by what the kernel says of a file; safe for threads.

    A file whose change time is as good as now when it was read is not remembered: it could change
    again without that being seen.
    """

    _MOST = 200_000
    _RECENT_NS = 2 * 10**9

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._lock = Lock()

    def get(self, stamp: tuple[int, ...]) -> str:
        """The digest, "" if it is not known."""
        with self._lock:
            return self._known.get(stamp, "")

    def put(self, stamp: tuple[int, ...], digest: str, now_ns: int) -> None:
        """Remember it."""
        if not stamp or now_ns - stamp[-1] < self._RECENT_NS:
            return
        with self._lock:
            self._known[stamp] = digest
            if len(self._known) > self._MOST:
                self._known.popitem(last=False)


class Tree(ABC):
    """Base of all."""

    keeps_owners = True
    """Whether owners mean something (not those of a context)."""

    @abstractmethod
    def node(self, path: str) -> Node | None:
        """What is at `path`, whose parents must not be links; not followed."""

    @abstractmethod
    def children(self, node: Node) -> list[Node]:
        """What a directory holds, sorted by name."""

    @abstractmethod
    def read(self, node: Node) -> Iterator[bytes]:
        """A regular file's content."""

    def digest(self, node: Node) -> str:
        """Hexadecimal SHA-256 of a regular file's content."""
        summer = hashlib.sha256()
        for piece in self.read(node):
            summer.update(piece)
        return summer.hexdigest()

    def resolve(self, path: str, *, last: bool = True) -> tuple[str, Node | None]:
        """Where `path` leads: its path without links, and what is there, None if nothing.

        `last`: also if the last component is a link. What does not exist keeps its name.
        """
        pending = [part for part in path.split("/") if part not in ("", ".")]
        done: list[str] = []
        links = 0
        node = self.node("")
        while pending:
            part = pending.pop(0)
            if part == "..":
                done = done[:-1]
                node = self.node("/".join(done))
                continue
            here = "/".join((*done, part))
            found = self.node(here) if node is not None and node.is_dir else None
            if found is not None and found.is_link and (pending or last):
                links += 1
                if links > _MOST_LINKS:
                    raise Invalid(f"too many levels of symbolic links in {path!r}")
                if found.link.startswith("/"):
                    done = []
                node = self.node("/".join(done))
                pending = [p for p in found.link.split("/") if p not in ("", ".")] + pending
                continue
            done.append(part)
            node = found
        return "/".join(done), node

    def text(self, path: str, largest: int = 4 << 20) -> bytes | None:
        """A small file's content, links followed; None if there is none. Invalid if too large."""
        _, node = self.resolve(path)
        if node is None or not node.is_file:
            return None
        if node.size > largest:
            raise Invalid(f"{path} has more than {largest} bytes")
        return b"".join(self.read(node))


class Context(Tree):
    """A tree that can be a build's context."""

    @abstractmethod
    def ignoring(self, ignore: Ignore) -> None:
        """Leave out what `ignore` says."""


class DirectoryTree(Context):
    """Below a directory's descriptor, which the caller keeps open."""

    def __init__(
        self,
        root: int,
        *,
        ignore: Ignore | None = None,
        owners: bool = True,
        digests: Digests | None = None,
    ) -> None:
        self._root = root
        self._ignore = ignore
        self.keeps_owners = owners
        self._digests = digests
        self._cache: dict[str, Node | None] = {}

    def ignoring(self, ignore: Ignore) -> None:
        """As `Context` says."""
        self._ignore = ignore if ignore.rules else None
        self._cache.clear()

    def node(self, path: str) -> Node | None:
        """As `Tree` says."""
        if path in self._cache:
            return self._cache[path]
        found = self._look(path)
        self._cache[path] = found
        return found

    def _look(self, path: str) -> Node | None:
        if not path:
            return self._made("", self._root, os.fstat(self._root))
        try:
            with openat2.openat2(self._root, path, os.O_PATH | os.O_NOFOLLOW, _BENEATH) as fd:
                node = self._made(path, int(fd), os.fstat(int(fd)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Invalid(f"cannot read {path!r}: {error.strerror}") from error
        return node if self._visible(node) else None

    def _made(self, path: str, fd: int, info: os.stat_result) -> Node:
        link = os.readlink("", dir_fd=fd) if stat.S_ISLNK(info.st_mode) else ""
        return self._node(path, info, link, f"/proc/self/fd/{fd}")

    def _node(self, path: str, info: os.stat_result, link: str, xattr_path: str) -> Node:
        device = (0, 0)
        if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            device = os.major(info.st_rdev), os.minor(info.st_rdev)
        identity = None
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            identity = (info.st_dev, info.st_ino)
        return Node(
            path,
            info.st_mode,
            info.st_uid,
            info.st_gid,
            info.st_size if stat.S_ISREG(info.st_mode) else 0,
            info.st_mtime_ns,
            link,
            device,
            self._xattrs(xattr_path) if self.keeps_owners and not link else None,
            identity,
            (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns),
        )

    @staticmethod
    def _xattrs(path: str) -> dict[bytes, bytes] | None:
        found: dict[bytes, bytes] = {}
        with suppress(OSError):
            for name in sorted(os.listxattr(path)):
                if not name.startswith(("trusted.overlay.", "user.overlay.")):
                    with suppress(OSError):
                        found[os.fsencode(name)] = os.getxattr(path, name)
        return found or None

    def _visible(self, node: Node) -> bool:
        ignore = self._ignore
        if ignore is None or not ignore.ignored(node.path):
            return True
        if not node.is_dir or ignore.prunes(node.path):
            return False
        return any(True for _ in self._children(node))

    def children(self, node: Node) -> list[Node]:
        """As `Tree` says."""
        return list(self._children(node))

    def _children(self, node: Node) -> Iterator[Node]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            opened = openat2.openat2(self._root, node.path or ".", flags, _BENEATH)
        except OSError as error:
            raise Invalid(f"cannot read {node.path!r}: {error.strerror}") from error
        with opened as fd:
            prefix = f"{node.path}/" if node.path else ""
            for name in sorted(os.listdir(int(fd))):
                try:
                    info = os.stat(name, dir_fd=int(fd), follow_symlinks=False)
                    link = ""
                    if stat.S_ISLNK(info.st_mode):
                        link = os.readlink(name, dir_fd=int(fd))
                except FileNotFoundError:
                    continue
                place = f"/proc/self/fd/{int(fd)}/{name}"
                if stat.S_ISSOCK(info.st_mode):
                    continue
                child = self._node(prefix + name, info, link, place)
                if self._visible(child):
                    yield child

    def _open(self, node: Node) -> OwnedFd:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        try:
            opened = openat2.openat2(self._root, node.path, flags, _BENEATH)
        except OSError as error:
            raise Invalid(f"cannot read {node.path!r}: {error.strerror}") from error
        info = os.fstat(int(opened))
        if not stat.S_ISREG(info.st_mode):
            opened.close()
            raise Invalid(f"{node.path!r} is no longer a file")
        return opened

    def read(self, node: Node) -> Iterator[bytes]:
        """As `Tree` says."""
        with self._open(node) as fd:
            while piece := os.read(int(fd), _PIECE):
                yield piece

    def digest(self, node: Node) -> str:
        """As `Tree` says."""
        if self._digests is None:
            return super().digest(node)
        known = self._digests.get(node.stamp)
        if known:
            return known
        with self._open(node) as fd:
            summer = hashlib.sha256()
            while piece := os.read(int(fd), _PIECE):
                summer.update(piece)
            after = os.fstat(int(fd))
        found = summer.hexdigest()
        stamp = (after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns)
        if stamp == node.stamp:
            self._digests.put(stamp, found, time.time_ns())
        return found


class ArchiveTree(Context):
    """The members of a tar archive, kept in memory; the contents lie in a nameless file."""

    def __init__(
        self, spool: OwnedFd, root: Node, hashes: dict[tuple[int, int], str], count: int
    ) -> None:
        self._spool = spool
        self._top = root
        self._hashes = hashes
        self.keeps_owners = True
        self.count = count
        """Of members."""

    @classmethod
    def read_from(cls, chunks: Iterable[bytes], directory: str) -> "ArchiveTree":
        """Read a tar, compressed or not. `directory`: where the nameless file is made.

        Invalid or Corrupt for what is no archive, or a hostile one.
        """
        fd = OwnedFd(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        try:
            return cls._filled(chunks, fd)
        except BaseException:
            fd.close()
            raise

    @classmethod
    def _filled(cls, chunks: Iterable[bytes], fd: OwnedFd) -> "ArchiveTree":
        iterator = iter(chunks)
        head = b""
        for chunk in iterator:
            head += chunk
            if len(head) >= 16:
                break

        def whole() -> Iterator[bytes]:
            yield head
            yield from iterator

        source = ByteSource(codecs.decompress(whole(), codecs.detect(head)))
        root = Node("", stat.S_IFDIR | 0o755, children={})
        tree = cls(fd, root, {}, 0)
        for entry in TarReader(source, lambda _: None):
            tree._add(entry, source)
            tree.count += 1
            if tree.count > 2_000_000:
                raise Invalid("the archive has too many members")
        return tree

    def close(self) -> None:
        """Let go of the contents."""
        self._spool.close()

    def ignoring(self, ignore: Ignore) -> None:
        """As `Context` says."""
        if ignore.rules:
            self._prune(self._top, ignore)

    def _prune(self, node: Node, ignore: Ignore) -> bool:
        """Whether anything of `node` stays."""
        assert node.children is not None
        for name, child in list(node.children.items()):
            out = ignore.ignored(child.path)
            if child.is_dir:
                if (out and ignore.prunes(child.path)) or (not self._prune(child, ignore) and out):
                    del node.children[name]
            elif out:
                del node.children[name]
        return bool(node.children)

    def _parts(self, raw: bytes) -> list[str]:
        name = os.fsdecode(raw)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in name or len(parts) > _DEEPEST:
            raise Invalid(
                f"archive member {tar_read.show(raw)} leads out of the archive, or too deep"
            )
        return parts

    def _folder(self, parts: list[str]) -> Node:
        node = self._top
        for count, part in enumerate(parts, 1):
            assert node.children is not None
            child = node.children.get(part)
            if child is None or child.children is None:
                if child is not None:
                    raise Invalid(f"archive member {'/'.join(parts)!r}: a parent is no directory")
                child = Node("/".join(parts[:count]), stat.S_IFDIR | 0o755, children={})
                node.children[part] = child
            node = child
        return node

    def _add(self, entry: tar_read.Entry, source: ByteSource) -> None:
        parts = self._parts(entry.name)
        if not parts:
            for _ in source.views(entry.stored):
                pass
            return
        parent = self._folder(parts[:-1])
        assert parent.children is not None
        name, path = parts[-1], "/".join(parts)
        mtime_ns = entry.mtime * 10**9 + entry.mtime_ns
        if entry.kind == tar_read.LINK:
            target = self.node("/".join(self._parts(entry.link)))
            if target is None or target.is_dir:
                raise Invalid(f"archive member {path!r} links to what is not there")
            if target.identity is None:
                target.identity = (-1, self.count, id(target))
            copy = Node(**{s: getattr(target, s) for s in Node.__slots__})
            copy.path = path
            parent.children[name] = copy
            return
        mode = _KINDS[entry.kind] | (entry.mode & 0o7777)
        node = Node(path, mode, entry.uid, entry.gid, entry.size, mtime_ns, xattrs=entry.xattrs)
        if node.is_dir:
            before = parent.children.get(name)
            node.children = before.children if before is not None and before.children else {}
        elif node.is_link:
            node.link = os.fsdecode(entry.link)
        elif node.is_file:
            self._store(node, entry, source)
        else:
            node.device = (entry.major, entry.minor)
        parent.children[name] = node

    def _store(self, node: Node, entry: tar_read.Entry, source: ByteSource) -> None:
        node.offset = os.lseek(int(self._spool), 0, os.SEEK_CUR)
        node.sparse = entry.sparse
        summer = hashlib.sha256()
        for view in source.views(entry.stored):
            summer.update(view)
            while view:
                view = view[os.write(int(self._spool), view) :]
        if entry.sparse is None:
            self._hashes[node.offset, node.size] = summer.hexdigest()

    def node(self, path: str) -> Node | None:
        """As `Tree` says."""
        node = self._top
        for part in path.split("/") if path else ():
            if node.children is None or part not in node.children:
                return None
            node = node.children[part]
        return node

    def children(self, node: Node) -> list[Node]:
        """As `Tree` says."""
        return [child for _, child in sorted((node.children or {}).items())]

    def read(self, node: Node) -> Iterator[bytes]:
        """As `Tree` says."""
        if node.sparse is None:
            yield from self._stored(node.offset, node.size)
            return
        at, offset = 0, node.offset
        for start, length in node.sparse:
            yield from _zeros(start - at)
            yield from self._stored(offset, length)
            at, offset = start + length, offset + length
        yield from _zeros(node.size - at)

    def _stored(self, offset: int, size: int) -> Iterator[bytes]:
        end = offset + size
        while offset < end:
            piece = os.pread(int(self._spool), min(_PIECE, end - offset), offset)
            if not piece:
                raise NotFound("the archive's contents are gone")
            offset += len(piece)
            yield piece

    def digest(self, node: Node) -> str:
        """As `Tree` says."""
        known = self._hashes.get((node.offset, node.size))
        return known or super().digest(node)


def may_be_archive(first: bytes) -> bool:
    """Whether a file that begins so (512 bytes, if it has them) is a tar, or compressed."""
    magics = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
    return first[257:262] == b"ustar" or first.startswith(magics)


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        size = min(count, _PIECE)
        count -= size
        yield bytes(size)


class EmptyTree(Context):
    """Nothing: the root of `scratch`."""

    def ignoring(self, ignore: Ignore) -> None:
        """As `Context` says."""

    def node(self, path: str) -> Node | None:
        """As `Tree` says."""
        return None if path else Node("", stat.S_IFDIR | 0o755)

    def children(self, node: Node) -> list[Node]:
        """As `Tree` says."""
        return []

    def read(self, node: Node) -> Iterator[bytes]:
        """As `Tree` says."""
        return iter(())
