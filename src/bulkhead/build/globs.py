"""Wildcards of COPY and ADD: Go's filepath.Match, and `**` for any number of components."""

import re
from collections.abc import Iterator

from bulkhead.build.ignore import matcher
from bulkhead.build.trees import Node, Tree
from bulkhead.errors import Invalid

_SPECIAL = re.compile(r"[*?\[\\]")


def is_pattern(text: str) -> bool:
    """Whether there is a wildcard in it."""
    return _SPECIAL.search(text) is not None


def clean(path: str) -> str:
    """Relative to the root, `..` clamped there."""
    done: list[str] = []
    for part in path.split("/"):
        if part == "..":
            done = done[:-1]
        elif part not in ("", "."):
            done.append(part)
    return "/".join(done)


def match(tree: Tree, pattern: str) -> Iterator[Node]:
    """The nodes whose paths match, sorted, a directory before what is in it. Invalid."""
    parts = pattern.split("/")
    fixed: list[str] = []
    while parts and not is_pattern(parts[0]):
        fixed.append(parts.pop(0))
    try:
        matches = matcher("/".join(parts))
    except (ValueError, re.error) as error:
        raise Invalid(f"bad pattern {pattern!r}: {error}") from None
    base, top = tree.resolve("/".join(fixed))
    if top is None or not top.is_dir:
        return
    depth = 0 if "**" in parts else len(parts)
    prefix = f"{base}/" if base else ""

    def walk(node: Node, level: int) -> Iterator[Node]:
        for child in tree.children(node):
            if matches(child.path.removeprefix(prefix)):
                yield child
            if child.is_dir and (not depth or level < depth):
                yield from walk(child, level + 1)

    yield from walk(top, 1)
