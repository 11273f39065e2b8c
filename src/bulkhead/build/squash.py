"""--squash: the layers that a build added become one."""

import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bulkhead.build import keys
from bulkhead.build.cache import Step
from bulkhead.build.copying import Item, Plan, reader
from bulkhead.build.trees import ArchiveTree, Node
from bulkhead.images import assemble
from bulkhead.images.timestamps import now, of_nanoseconds
from bulkhead.oci.image import History

if TYPE_CHECKING:
    from bulkhead.build.builder import Builder
    from bulkhead.build.steps import State

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


def squash(builder: "Builder", state: "State") -> None:
    """Replace the stage's own layers by their sum."""
    own = state.layers[state.inherited :]
    if len(own) < 2:
        return
    key = keys.key("squash", layers=own)
    store = builder.host.store
    known = builder.cache.get(key)
    if known is None or store.layer(known.diff_id) is None:
        with ExitStack() as undo:
            plan = Plan()
            for diff_id in own:
                tree = ArchiveTree.read_from(store.tar(diff_id), builder.directory)
                undo.callback(tree.close)
                _apply(plan, tree, tree.node("") or Node("", stat.S_IFDIR | 0o755))
            layer = store.ingest(plan.tar(), compression="", keep_blob=False)
        known = Step(key, layer.diff_id, layer.size, now(), "squash", "squash")
        builder.cache.put(known)
    state.layers[state.inherited :] = [known.diff_id]
    state.descriptors[state.inherited :] = [assemble.tar_layer(known.diff_id, known.size)]
    created = known.created
    if builder.epoch is not None:
        created = of_nanoseconds(builder.epoch * 10**9)
    for entry in state.history:
        entry.empty_layer = entry.empty_layer or entry.comment.startswith("bulkhead build")
    state.history.append(History(created, "", comment="merge of the build's layers"))


def _below(plan: Plan, path: str) -> Iterator[str]:
    prefix = f"{path}/"
    yield from [one for one in plan.items if one.startswith(prefix)]


def _apply(plan: Plan, tree: ArchiveTree, folder: Node) -> None:
    """One layer's members over those before."""
    children = tree.children(folder)
    if any(child.path.rpartition("/")[2] == _OPAQUE for child in children):
        for path in _below(plan, folder.path):
            del plan.items[path]
    for child in children:
        above, _, name = child.path.rpartition("/")
        if name.startswith(_WHITEOUT) and name != _OPAQUE:
            gone = f"{above}/{name.removeprefix(_WHITEOUT)}".lstrip("/")
            for path in [gone, *_below(plan, gone)]:
                plan.items.pop(path, None)
        elif name != _OPAQUE:
            hidden = f"{above}/{_WHITEOUT}{name}".lstrip("/")
            before = plan.items.get(child.path)
            if plan.items.pop(hidden, None) is not None and child.is_dir:
                mark = f"{child.path}/{_OPAQUE}"
                plan.items[mark] = Item(Node(mark, stat.S_IFREG | 0o644))
            if before is not None and before.node.is_dir and not child.is_dir:
                for path in _below(plan, child.path):
                    del plan.items[path]
        plan.items[child.path] = Item(child, reader(tree, child))
        if child.is_dir:
            _apply(plan, tree, child)


def tidied(
    chunks: Iterable[bytes], directory: str, targets: Sequence[str], latest_ns: int | None
) -> Iterator[bytes]:
    """A layer's tar without the empty places of mounts, and with no time later than `latest_ns`.

    For layers that come from a guest, whose writable disk nobody else looks into.
    """
    with ExitStack() as undo:
        tree = ArchiveTree.read_from(chunks, directory)
        undo.callback(tree.close)
        plan = Plan()
        _apply(plan, tree, tree.node("") or Node("", stat.S_IFDIR | 0o755))
        for target in targets:
            path = target.strip("/")
            item = plan.items.get(path)
            if item is None or (item.node.is_file and item.node.size):
                continue
            if not any(True for _ in _below(plan, path)):
                del plan.items[path]
        yield from plan.tar(latest_ns)
