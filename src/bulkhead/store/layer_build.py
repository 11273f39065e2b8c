"""Turns the members of one layer archive into an EROFS image and a recipe.

This is where an archive's claims are judged: names, links, whiteouts, attributes, bounds. The tree
is our own data structure, so no name can lead out of it; what would need a guess is refused.
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from bulkhead.errors import Corrupt, Invalid
from bulkhead.store import erofs_format as fmt
from bulkhead.store import tar_read as tar
from bulkhead.store import xattrs
from bulkhead.store.erofs_write import Directory, ImageWriter
from bulkhead.store.limits import Limits
from bulkhead.store.recipe import RecipeWriter
from bulkhead.store.tar_read import ByteSource, Entry, TarReader, show

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_RESERVED = b".wh..wh."
_NAME_MAX = 255
_SYMLINK_MAX = 4095
_KINDS = {
    tar.CHAR: fmt.FT_CHAR,
    tar.BLOCK_DEVICE: fmt.FT_BLOCK,
    tar.FIFO: fmt.FT_FIFO,
}


class LayerBuilder:
    """Consumes an archive once; `image` is an empty file's descriptor, `recipe` a binary file."""

    def __init__(self, image: int, recipe: BinaryIO, limits: Limits) -> None:
        self._writer = ImageWriter(image)
        self._recipe = RecipeWriter(recipe)
        self._limits = limits
        self._root = Directory(None)
        self._paths: dict[bytes, Directory] = {b"": self._root}
        self._apparent = 0
        self.entries = 0

    def build(self, pieces: Iterator[bytes], uuid: Callable[[], bytes]) -> int:
        """Read all `pieces`; returns the image's size in bytes. `uuid` is asked for at the end."""
        source = ByteSource(pieces)
        for entry in TarReader(source, self._recipe.literal, self._limits):
            self._count()
            self._member(entry, source)
        self._recipe.close()
        if source.consumed != self._recipe.total:
            raise Corrupt("a layer's recipe does not add up")
        return self._writer.finish(self._root, uuid)

    @property
    def tar_bytes(self) -> int:
        """Size of the archive, known after `build`."""
        return self._recipe.total

    def _count(self) -> None:
        self.entries += 1
        if self.entries > self._limits.entries:
            raise Invalid(f"the archive has more than {self._limits.entries} members")

    # -- names --------------------------------------------------------------------------------

    def _normal(self, raw: bytes, what: str, owner: bytes) -> bytes:
        """`raw` as components joined by slashes, "" for the root; Invalid if it is unsafe."""
        if len(raw) > self._limits.path_bytes:
            raise Invalid(f"archive member {show(owner)}: {what} exceeds the limit of path length")
        if raw.startswith(b"/"):
            raise Invalid(f"archive member {show(owner)}: {what} is absolute")
        parts = [part for part in raw.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise Invalid(f"archive member {show(owner)}: {what} leads upwards by '..'")
        if len(parts) > self._limits.depth:
            raise Invalid(f"archive member {show(owner)}: {what} exceeds the limit of depth")
        return b"/".join(parts)

    def _parent(self, path: bytes, owner: bytes) -> tuple[Directory, bytes]:
        """The directory that holds `path`'s last component, made if it is only implied."""
        parent, _, name = path.rpartition(b"/")
        limit = _NAME_MAX + (len(_WHITEOUT) if name.startswith(_WHITEOUT) else 0)
        if len(name) > limit:
            raise Invalid(f"archive member {show(owner)}: a component exceeds 255 bytes")
        found = self._paths.get(parent)
        if found is None:
            found = self._imply(parent, owner)
        return found, name

    def _imply(self, path: bytes, owner: bytes) -> Directory:
        here = self._root
        done = b""
        for part in path.split(b"/"):
            done = done + b"/" + part if done else part
            if len(part) > _NAME_MAX:
                raise Invalid(f"archive member {show(owner)}: a component exceeds 255 bytes")
            if part.startswith(_WHITEOUT):
                raise Invalid(f"archive member {show(owner)}: its parent is a whiteout")
            child = here.children.get(part)
            if child is None:
                self._count()
                child = here.children[part] = Directory(here)
                self._paths[done] = child
            elif isinstance(child, int):
                kind = "a symbolic link" if child & 7 == fmt.FT_SYMLINK else "not a directory"
                raise Invalid(
                    f"archive member {show(owner)}: its parent {show(done)} is {kind} "
                    "in the same archive"
                )
            here = child
        return here

    def _put(self, path: bytes, owner: bytes, child: int) -> None:
        """Enter a node that is no directory; the last of several members of one name wins."""
        parent, name = self._parent(path, owner)
        old = parent.children.get(name)
        if isinstance(old, Directory):
            if old.children or old.whiteouts:
                raise Invalid(
                    f"archive member {show(owner)}: it would replace a directory of the same "
                    "archive that is not empty"
                )
            del self._paths[path]
        elif old is not None:
            self._writer.unlink(old)
        parent.children[name] = child

    # -- members ------------------------------------------------------------------------------

    def _member(self, entry: Entry, source: ByteSource) -> None:
        path = self._normal(entry.name, "its name", entry.name)
        name = path.rpartition(b"/")[2]
        if entry.xattrs:
            entry.xattrs = xattrs.kept(
                entry.name,
                entry.xattrs,
                directory=entry.kind == tar.DIRECTORY,
                regular=entry.kind == tar.REGULAR,
                symlink=entry.kind == tar.SYMLINK,
            )
        if name.startswith(_WHITEOUT):
            self._store(entry, source, inline=False)
            self._whiteout(path, name, entry)
        elif entry.kind == tar.DIRECTORY:
            self._directory(path, entry)
        elif not path:
            raise Invalid(f"archive member {show(entry.name)}: the root must be a directory")
        elif entry.kind == tar.REGULAR:
            self._regular(path, entry, source)
        elif entry.kind == tar.LINK:
            self._hardlink(path, entry)
        elif entry.kind == tar.SYMLINK:
            self._symlink(path, entry)
        else:
            self._special(path, entry)

    def _whiteout(self, path: bytes, name: bytes, entry: Entry) -> None:
        parent, _ = self._parent(path, entry.name)
        if name == _OPAQUE:
            parent.opaque = True
            return
        if name.startswith(_RESERVED):
            return  # bookkeeping of aufs, which every unpacker skips
        hidden = name[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise Invalid(f"archive member {show(entry.name)}: a whiteout of nothing")
        if parent.whiteouts is None:
            parent.whiteouts = set()
        parent.whiteouts.add(hidden)

    def _directory(self, path: bytes, entry: Entry) -> None:
        found = self._paths.get(path)
        if found is None:
            parent, name = self._parent(path, entry.name)
            old = parent.children.get(name)
            if isinstance(old, int):
                self._writer.unlink(old)
            found = parent.children[name] = Directory(parent)
            self._paths[path] = found
        found.mode, found.uid, found.gid = entry.mode, entry.uid, entry.gid
        found.mtime, found.mtime_ns = entry.mtime, entry.mtime_ns
        found.xattrs = entry.xattrs

    def _store(self, entry: Entry, source: ByteSource, *, inline: bool) -> tuple[int, bytes]:
        """Store the body as (offset of the whole blocks, tail still in memory)."""
        stored = entry.stored
        tail = stored % fmt.BLOCK_SIZE
        if not inline or (tail and not self._writer.inlinable(tail, entry.xattrs)):
            tail = 0
        full = stored - tail
        start = 0
        if full:
            before = source.consumed
            start = self._writer.data(source.views(full), full)
            if source.consumed - before != full:
                raise Invalid(f"archive member {show(entry.name)}: the archive ends within it")
            self._recipe.copy(start, full)
        body = source.take(tail) if tail else b""
        if len(body) != tail:
            raise Invalid(f"archive member {show(entry.name)}: the archive ends within it")
        return start, body

    def _regular(self, path: bytes, entry: Entry, source: ByteSource) -> None:
        self._apparent += entry.size
        if self._apparent > self._limits.apparent_bytes:
            raise Invalid(
                f"the archive's files exceed {self._limits.apparent_bytes} bytes together"
            )
        tail = b""
        if entry.sparse is not None:
            start = self._sparse(entry, source)
        else:
            start, tail = self._store(entry, source, inline=True)
        child, tail_at = self._node(fmt.FT_REGULAR, entry, size=entry.size, start=start, tail=tail)
        if tail:
            self._recipe.copy(tail_at, len(tail))
        self._put(path, entry.name, child)

    def _sparse(self, entry: Entry, source: ByteSource) -> int:
        start = self._writer.sparse(entry.size)
        for offset, length in entry.sparse or ():
            at = start + offset
            self._recipe.copy(at, length)
            for view in source.views(length):
                self._writer.patch(at, view)
                at += len(view)
            if at != start + offset + length:
                raise Invalid(f"archive member {show(entry.name)}: the archive ends within it")
        return start

    def _node(
        self, kind: int, entry: Entry, *, size: int = 0, start: int = 0, tail: bytes = b"",
        device: int = 0,
    ) -> tuple[int, int]:  # fmt: skip
        return self._writer.node(
            kind,
            entry.mode,
            (entry.uid, entry.gid),
            (entry.mtime, entry.mtime_ns),
            entry.xattrs,
            device=device,
            size=size,
            start=start,
            tail=tail,
        )

    def _hardlink(self, path: bytes, entry: Entry) -> None:
        target = self._normal(entry.link, "its link target", entry.name)
        parent, _, name = target.rpartition(b"/")
        directory = self._paths.get(parent)
        child = directory.children.get(name) if directory else None
        if child is None:
            raise Invalid(
                f"archive member {show(entry.name)}: its link target {show(entry.link)} is not "
                "in the archive before it"
            )
        if isinstance(child, Directory):
            raise Invalid(f"archive member {show(entry.name)}: a hard link to a directory")
        if target == path:
            return
        self._writer.link(child)
        self._put(path, entry.name, child)

    def _symlink(self, path: bytes, entry: Entry) -> None:
        target = entry.link
        if not 0 < len(target) <= _SYMLINK_MAX:
            raise Invalid(
                f"archive member {show(entry.name)}: its link target is empty or too long"
            )
        entry.mode = 0o777
        child, _ = self._node(fmt.FT_SYMLINK, entry, size=len(target), tail=target)
        self._put(path, entry.name, child)

    def _special(self, path: bytes, entry: Entry) -> None:
        major, minor = entry.major, entry.minor
        if entry.kind == tar.FIFO:
            major = minor = 0
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise Invalid(f"archive member {show(entry.name)}: its device number is out of range")
        if entry.kind == tar.CHAR and not major and not minor:
            raise Invalid(
                f"archive member {show(entry.name)}: a character device 0:0, which would hide "
                "a file of the layers below; whiteouts are written as '.wh.' names"
            )
        child, _ = self._node(_KINDS[entry.kind], entry, device=fmt.pack_device(major, minor))
        self._put(path, entry.name, child)
