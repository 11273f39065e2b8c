"""COPY and ADD: from sources in trees to the members of one layer.

A `Plan` maps paths of the layer to items. Its digest is the cache key of the layer: names, kinds,
modes, owners and contents; times are not in it, as BuildKit's users expect. Directories above the
target keep what the image below says of them.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from bulkhead.build.globs import clean, is_pattern, match
from bulkhead.build.ignore import Ignore
from bulkhead.build.trees import EmptyTree, Node, Tree
from bulkhead.errors import Invalid, NotFound
from bulkhead.store import tar_write

_SYMBOLIC = re.compile(r"([ugoa]*)([-+=])([rwxXst]*)\Z")


@dataclass(slots=True)
class Item:
    """One member of the layer; `tree` None and `data` for what we made ourselves."""

    node: Node
    tree: Tree | None = None
    data: bytes = b""
    implied: bool = False
    """A directory that is there because something below it is."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who gets the files; None: who has them in the source, or root for a context."""

    uid: int
    gid: int


@dataclass(slots=True)
class Options:
    """What the flags say."""

    owner: Owner | None = None
    chmod: str = ""
    parents: bool = False
    exclude: Ignore | None = None
    now_ns: int = 0
    """The time of directories that are made."""


@dataclass(slots=True)
class Plan:
    """What one instruction adds to `base`, the image below (empty for --link)."""

    base: Tree = field(default_factory=EmptyTree)
    options: Options = field(default_factory=Options)
    items: dict[str, Item] = field(default_factory=dict)

    # --- sources

    def add(self, tree: Tree, source: str, target: str, *, directory: bool) -> None:
        """Plan copying `source` to `target` (absolute). `directory`: the target must be one.

        NotFound if nothing matches.
        """
        pivot = ""
        if self.options.parents and "/./" in source:
            pivot, _, _ = source.partition("/./")
            pivot = clean(pivot)
        text = clean(source)
        if is_pattern(text):
            found = list(match(tree, text))
            if not found:
                raise NotFound(f'"/{text}": no source files were found')
            for node in found:
                self._one(tree, node, target, pivot, directory=directory or len(found) > 1)
            return
        path, single = tree.resolve(text)
        if single is None:
            raise NotFound(f'"/{text}": not found')
        named = replace(single, path=path)
        self._one(tree, named, target, pivot, directory=directory, name=text)

    def _one(
        self, tree: Tree, node: Node, target: str, pivot: str, *, directory: bool, name: str = ""
    ) -> None:
        name = name or node.path
        place = self._place(target)
        if self.options.parents:
            inner = name.removeprefix(f"{pivot}/") if pivot else name
            above = inner.rpartition("/")[0]
            self._parents_from(tree, name, above, place)
            place = f"{place}/{inner}".strip("/")
            if node.is_dir:
                self._directory(tree, node, place, nested=True, prefix=node.path)
            else:
                self._file(tree, node, place)
            return
        if node.is_dir:
            self._directory(tree, node, place, nested=False, prefix=node.path)
            return
        if directory or self._is_directory(place):
            place = f"{place}/{name.rpartition('/')[2]}".strip("/")
        self._file(tree, node, place)

    def document(self, data: bytes, name: str, target: str, *, directory: bool) -> None:
        """A heredoc."""
        place = self._place(target)
        if directory or self._is_directory(place):
            place = f"{place}/{name}".strip("/")
        self.data(data, place)

    def data(self, data: bytes, place: str, mode: int = 0o644, mtime_ns: int = 0) -> None:
        """A file of these bytes."""
        node = Node(place, stat.S_IFREG | mode, size=len(data))
        node.mtime_ns = mtime_ns or self.options.now_ns
        self._put(place, Item(self._owned(node, keep=False), None, data))

    def archive(self, tree: Tree, target: str) -> None:
        """Unpack an archive's tree into the directory `target`."""
        top = tree.node("")
        assert top is not None
        self._directory(tree, top, self._place(target), nested=False, prefix="")

    def make_directory(self, target: str) -> bool:
        """Make `target` and what is above it; whether it was missing."""
        place = self._place(target)
        if self._is_directory(place):
            return False
        self._new_directory(place)
        return True

    # --- places

    def _place(self, target: str) -> str:
        """The target below the root, with the image's links followed."""
        path, node = self.base.resolve(target.lstrip("/"), last=False)
        if node is not None and node.is_link:
            followed, beyond = self.base.resolve(path)
            if beyond is not None and beyond.is_dir:
                return followed
        return path

    def _is_directory(self, place: str) -> bool:
        item = self.items.get(place)
        if item is not None:
            return item.node.is_dir
        node = self.base.node(place)
        return node is not None and node.is_dir

    def _put(self, place: str, item: Item) -> None:
        if not place:
            raise Invalid("cannot replace the root directory by a file")
        if place.rpartition("/")[2].startswith(".wh."):
            raise Invalid(f"/{place}: names that begin with .wh. mean deletions in an image")
        self._above(place)
        if not item.node.is_dir and self._is_directory(place):
            raise Invalid(f"cannot overwrite directory /{place} with a file")
        item.node = replace(item.node, path=place)
        self.items[place] = item

    def _above(self, place: str) -> None:
        """Every directory above `place` is in the layer, with the image's attributes."""
        parts = place.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            path = "/".join(parts[:count])
            known = self.items.get(path)
            if known is not None:
                if not known.node.is_dir:
                    raise Invalid(f"cannot copy to non-directory: /{path}")
                continue
            self._new_directory(path)

    def _new_directory(self, place: str) -> None:
        """A directory of the layer: the image's if it has it, else a new one."""
        if not place or place in self.items:
            return
        self._above(place)
        node = self.base.node(place)
        if node is not None:
            if not node.is_dir:
                raise Invalid(f"cannot copy to non-directory: /{place}")
            self.items[place] = Item(replace(node, path=place), None, b"", implied=True)
            return
        fresh = Node(place, stat.S_IFDIR | 0o755, mtime_ns=self.options.now_ns)
        if self.options.owner is not None:
            fresh.uid, fresh.gid = self.options.owner.uid, self.options.owner.gid
        self.items[place] = Item(fresh, None, b"", implied=True)

    # --- copying

    def _owned(self, node: Node, *, keep: bool) -> Node:
        """With the owner and mode that the flags ask for."""
        made = replace(node)
        owner = self.options.owner
        if owner is not None:
            made.uid, made.gid = owner.uid, owner.gid
        elif not keep:
            made.uid = made.gid = 0
        if self.options.chmod and not made.is_link:
            made.mode = chmod(made.mode, self.options.chmod)
        return made

    def _file(self, tree: Tree, node: Node, place: str) -> None:
        self._put(place, Item(self._owned(node, keep=tree.keeps_owners), reader(tree, node)))

    def _excluded(self, path: str, prefix: str) -> bool:
        exclude = self.options.exclude
        if exclude is None:
            return False
        inner = path.removeprefix(f"{prefix}/") if prefix else path
        return exclude.ignored(inner)

    def _directory(self, tree: Tree, node: Node, place: str, *, nested: bool, prefix: str) -> None:
        """Copy what is in `node` into `place`; a nested or new directory also its attributes."""
        if place:
            known = self.base.node(place)
            if nested and known is not None and known.is_link:
                followed, beyond = self.base.resolve(place)
                if beyond is not None and beyond.is_dir:
                    place, known = followed, beyond
            held = self.items.get(place)
            for one in (known, held.node if held is not None else None):
                if one is not None and not one.is_dir and (held is None or one is held.node):
                    raise Invalid(f"cannot copy to non-directory: /{place}")
            if nested or (known is None and (held is None or held.implied)):
                self._put(place, Item(self._owned(node, keep=tree.keeps_owners), None))
            else:
                self._new_directory(place)
        for child in tree.children(node):
            inner = f"{place}/{child.path.rpartition('/')[2]}".lstrip("/")
            if self._excluded(child.path, prefix):
                if child.is_dir and self.options.exclude and self.options.exclude.has_exceptions:
                    self._exceptions(tree, child, inner, prefix)
                continue
            if child.is_dir:
                self._directory(tree, child, inner, nested=True, prefix=prefix)
            else:
                self._file(tree, child, inner)

    def _exceptions(self, tree: Tree, node: Node, place: str, prefix: str) -> None:
        """What exceptions take back of an excluded directory."""
        for child in tree.children(node):
            inner = f"{place}/{child.path.rpartition('/')[2]}"
            if child.is_dir:
                if self._excluded(child.path, prefix):
                    self._exceptions(tree, child, inner, prefix)
                else:
                    self._directory(tree, child, inner, nested=True, prefix=prefix)
            elif not self._excluded(child.path, prefix):
                self._file(tree, child, inner)

    def _parents_from(self, tree: Tree, name: str, above: str, place: str) -> None:
        """--parents: the source's own directories above it, with their attributes."""
        skipped = len(name.split("/")) - 1 - len(above.split("/")) if above else 0
        parts = name.split("/")[:-1]
        for count in range(skipped + 1, len(parts) + 1) if above else ():
            source = tree.node("/".join(parts[:count]))
            inner = f"{place}/{'/'.join(parts[skipped:count])}".strip("/")
            if source is None or not source.is_dir or self._is_directory(inner):
                continue
            self._put(inner, Item(self._owned(source, keep=tree.keeps_owners), None))

    # --- the layer

    def sorted(self) -> list[tuple[str, Item]]:
        """Parents before children."""
        return sorted(self.items.items(), key=lambda pair: pair[0].split("/"))

    def digest(self) -> str:
        """Of all that the layer will hold but times."""
        summer = hashlib.sha256()
        links: dict[tuple[int, ...], str] = {}
        for path, item in self.sorted():
            node = item.node
            if node.is_file:
                content = (
                    item.tree.digest(node_of(item))
                    if item.tree is not None
                    else hashlib.sha256(item.data).hexdigest()
                )
                if node.identity is not None:
                    content += " " + links.setdefault(node.identity, path)
            else:
                content = node.link
            fields = (path, str(node.mode), str(node.uid), str(node.gid), content,
                      repr(node.device), repr(sorted((node.xattrs or {}).items())))  # fmt: skip
            for text in fields:
                data = os.fsencode(text)
                summer.update(len(data).to_bytes(4, "big") + data)
        return summer.hexdigest()

    def tar(self, epoch_ns: int | None = None) -> Iterator[bytes]:
        """The layer; no time is later than `epoch_ns`."""
        links: dict[tuple[int, ...], str] = {}
        for path, item in self.sorted():
            node = item.node
            first = links.setdefault(node.identity, path) if node.identity else path
            hard = first != path
            mtime_ns = node.mtime_ns if epoch_ns is None else min(node.mtime_ns, epoch_ns)
            yield tar_write.header(
                os.fsencode(path + ("/" if node.is_dir else "")),
                node.mode, node.uid, node.gid,
                node.size if node.is_file and not hard else 0,
                mtime_ns,
                link=os.fsencode(first if hard else node.link),
                hard=hard, device=node.device,
                xattrs=None if hard else node.xattrs,
            )  # fmt: skip
            if node.is_file and not hard and node.size:
                chunks = item.tree.read(node_of(item)) if item.tree is not None else (item.data,)
                yield from _exactly(chunks, node.size, path)
                yield tar_write.padding(node.size)
        yield tar_write.END


class _Reader(Tree):
    """A tree, and the node of it that an item was made of (which has another path now)."""

    def __init__(self, tree: Tree, node: Node) -> None:
        self.tree = tree
        self.source = node

    def node(self, path: str) -> Node | None:
        """As `Tree` says."""
        return self.source

    def children(self, node: Node) -> list[Node]:
        """As `Tree` says."""
        return []

    def read(self, node: Node) -> Iterator[bytes]:
        """As `Tree` says."""
        return self.tree.read(self.source)

    def digest(self, node: Node) -> str:
        """As `Tree` says."""
        return self.tree.digest(self.source)


def reader(tree: Tree, node: Node) -> Tree | None:
    """What gives the content of `node`, whatever it is called in a layer."""
    return _Reader(tree, node) if node.is_file else None


def node_of(item: Item) -> Node:
    """What the item's tree is asked for."""
    return item.tree.source if isinstance(item.tree, _Reader) else item.node


def _exactly(chunks: Iterable[bytes], size: int, path: str) -> Iterator[bytes]:
    """The chunks; Invalid if they are not `size` bytes: the file changes while it is read."""
    left = size
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left:
        raise Invalid(f"/{path}: the file changed while it was copied")


def chmod(mode: int, text: str) -> int:
    """`mode` changed as chmod(1) would: octal, or words like u=rwX,go-w. Invalid."""
    kind = stat.S_IFMT(mode)
    if re.fullmatch(r"[0-7]{1,5}", text):
        value = int(text, 8)
        if value > 0o7777:
            raise Invalid(f"invalid chmod parameter: {text!r}. it should be octal and at most 7777")
        return kind | value
    bits = stat.S_IMODE(mode)
    for clause in text.split(","):
        matched = _SYMBOLIC.match(clause)
        if matched is None:
            raise Invalid(
                f"invalid chmod parameter: {text!r}. it should be octal or symbolic (u=rwX,go=rX)"
            )
        bits = _symbolic(bits, matched, directory=stat.S_ISDIR(mode))
    return kind | bits


def _symbolic(bits: int, matched: "re.Match[str]", *, directory: bool) -> int:
    who, operator, what = matched[1] or "a", matched[2], matched[3]
    for letter in "ugo" if "a" in who else who:
        shift = {"u": 6, "g": 3, "o": 0}[letter]
        value = 0
        for permission in what:
            if permission == "X":
                value |= (1 << shift) if directory or bits & 0o111 else 0
            elif permission == "s":
                value |= {"u": stat.S_ISUID, "g": stat.S_ISGID, "o": 0}[letter]
            elif permission == "t":
                value |= stat.S_ISVTX
            else:
                value |= {"r": 4, "w": 2, "x": 1}[permission] << shift
        if operator == "+":
            bits |= value
        elif operator == "-":
            bits &= ~value
        else:
            special = {"u": stat.S_ISUID, "g": stat.S_ISGID, "o": 0}[letter]
            bits = (bits & ~(7 << shift) & ~special) | value
    return bits
