"""`system.df`: bytes on disk, counted once each."""

import functools
from typing import TYPE_CHECKING, Any

from bulkhead.engine import describe, guests

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine


async def usage(engine: "Engine") -> dict[str, Any]:
    """Docker's SystemDataUsageResponse."""
    users = engine.image_users()
    images = await engine.blocking(lambda: engine.images.disk_usage(users))
    containers = []
    for workload in sorted(engine.workloads, key=lambda one: -one.record.created_ns):
        summary = describe.summary(engine, workload, size=False)
        measure = functools.partial(guests.writable_bytes, engine.home, workload.record)
        summary["SizeRw"] = await engine.blocking(measure)
        containers.append(summary)
    volumes = []
    for shown in engine.volumes.summaries({}, lambda name: 0):
        name = shown["Name"]
        size = await engine.blocking(lambda name=name: engine.volumes.usage(name))  # type: ignore[misc]
        count = len(engine.volume_users(name))
        volumes.append({**shown, "UsageData": {"Size": size, "RefCount": count}})
    cache = await engine.blocking(lambda: _cache(engine))
    return {**images, "Containers": containers, "Volumes": volumes, "BuildCache": cache}


def _cache(engine: "Engine") -> list[dict[str, Any]]:
    from bulkhead.build import prune  # an engine that never builds does without

    return prune.usage(engine.builds.cache)
