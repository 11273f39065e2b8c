"""What the build cache holds, and removing what it can do without."""

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bulkhead.build.cache import DEFAULT_KEEP, Cache
from bulkhead.errors import Invalid
from bulkhead.images.timestamps import of_nanoseconds
from bulkhead.store.unpack import unpack

_AGE = re.compile(r"(\d+)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FILTERS = frozenset({"until", "unused-for", "id", "type", "description", "inuse", "shared"})


@dataclass(slots=True)
class Pruned:
    """What went: ids, and the bytes of cache mounts (those of layers are told by the store)."""

    deleted: list[str] = field(default_factory=list)
    freed: int = 0


def usage(cache: Cache) -> list[dict[str, Any]]:
    """Docker's BuildCache records, the least recently used first."""
    rows = [
        {
            "ID": step.key[:25], "Type": "regular", "Description": step.what,
            "InUse": False, "Shared": False, "Size": step.size, "CreatedAt": step.created,
            "LastUsedAt": of_nanoseconds(int(step.used * 10**9)), "UsageCount": step.hits,
        }
        for step in cache.steps()
        if step.diff_id
    ]  # fmt: skip
    rows += [
        {
            "ID": os.path.basename(mount.path)[:25], "Type": "exec.cachemount",
            "Description": f"cache mount {mount.name}", "InUse": False, "Shared": False,
            "Size": mount.size, "CreatedAt": "", "UsageCount": 0,
            "LastUsedAt": of_nanoseconds(int(mount.used * 10**9)),
        }
        for mount in cache.mounts()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: str(row["LastUsedAt"]))


def _age(text: str) -> float:
    found = _AGE.findall(text)
    if not found or "".join(n + u for n, u in found) != text:
        raise Invalid(f"{text!r} is not an age: write 24h or 7d")
    return float(sum(int(number) * _SECONDS[unit] for number, unit in found))


def _wanted(filters: Mapping[str, Any] | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, values in (filters or {}).items():
        if name not in _FILTERS:
            raise Invalid(f"Invalid filter '{name}'")
        found[name] = list(values)
    return found


def run(
    cache: Cache, *, everything: bool, keep: int = 0, filters: Mapping[str, Any] | None = None
) -> Pruned:
    """Remove results, the least recently used first, until at most `keep` bytes are left.

    Cache mounts are removed only with `everything`. Filters: `until`/`unused-for` (an age), `id`,
    `type`, `description`.
    """
    wanted = _wanted(filters)
    ages = [_age(text) for text in (*wanted.get("until", ()), *wanted.get("unused-for", ()))]
    latest = time.time() - max(ages) if ages else None
    pruned = Pruned()
    steps, mounts = cache.steps(), cache.mounts() if everything else []
    left = sum(step.size for step in steps) + sum(mount.size for mount in mounts)
    kinds = wanted.get("type")
    for step in steps:
        if keep and left <= keep:
            return pruned
        if (latest is not None and step.used > latest) or (kinds and "regular" not in kinds):
            continue
        if not _matches(wanted, step.key, step.what):
            continue
        cache.forget(step.key)
        left -= step.size
        pruned.deleted.append(step.key[:25])
    for mount in mounts:
        if keep and left <= keep:
            return pruned
        name = os.path.basename(mount.path)
        if (latest is not None and mount.used > latest) or (
            kinds and "exec.cachemount" not in kinds
        ):
            continue
        if _matches(wanted, name, f"cache mount {mount.name}") and cache.remove_mount(mount):
            left -= mount.size
            pruned.freed += mount.size
            pruned.deleted.append(name[:25])
    return pruned


def _matches(wanted: Mapping[str, list[str]], identity: str, what: str) -> bool:
    ids, texts = wanted.get("id"), wanted.get("description")
    if ids and not any(identity.startswith(one) for one in ids):
        return False
    return not texts or any(one in what for one in texts)


def automatic(cache: Cache) -> None:
    """Keep the cache within its bound (BULKHEAD_BUILD_CACHE bytes, 20 GiB)."""
    text = os.environ.get("BULKHEAD_BUILD_CACHE", "")
    bound = int(text) if text.isdecimal() else DEFAULT_KEEP
    if sum(step.size for step in cache.steps()) > bound:
        run(cache, everything=False, keep=bound)


def fill(path: str, chunks: Iterable[bytes]) -> None:
    """Unpack an archive into a cache mount's directory."""
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        unpack(chunks, root)
    finally:
        os.close(root)
