"""Images in the shapes of Docker's API: ImageSummary, ImageInspect, history, disk usage."""

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bulkhead.images.catalog import Catalog, Image
from bulkhead.images.names import Snapshot
from bulkhead.oci.image import ContainerConfig, History

Users = Mapping[str, Sequence[str]]
"""Names of the workloads that use an image, by image id."""

NEVER = "0001-01-01T00:00:00Z"


def unix(created: str | None) -> int:
    """RFC 3339 as seconds since 1970; 0 for none, or for what cannot be read."""
    moment = instant(created)
    return int(moment) if moment > 0 else 0


def instant(created: str | None) -> float:
    """RFC 3339 as seconds since 1970 with a fraction; 0.0 for none, or for what cannot be read."""
    if not created or created.startswith("0001-"):
        return 0.0
    try:
        return msgspec.convert(created, datetime.datetime).timestamp()
    except (msgspec.ValidationError, ValueError, OverflowError):
        return 0.0


def repo_tags(snapshot: Snapshot, image: str) -> list[str]:
    """Familiar references with tags."""
    return sorted(
        entry.reference.familiar
        for entry in snapshot.by_image.get(image, ())
        if entry.reference is not None and entry.reference.tag is not None
    )


def repo_digests(snapshot: Snapshot, image: str) -> list[str]:
    """Familiar references with digests, as registries gave them."""
    return sorted(
        entry.reference.familiar
        for entry in snapshot.by_image.get(image, ())
        if entry.reference is not None and entry.reference.digest is not None
    )


def summary(
    catalog: Catalog, image: Image, snapshot: Snapshot, users: Users, *, shared: int = -1
) -> dict[str, Any]:
    """Docker's ImageSummary; SharedSize -1 means not computed, Containers -1 users not known."""
    return {
        "Id": image.id,
        "ParentId": image.config.parent,
        "RepoTags": repo_tags(snapshot, image.id),
        "RepoDigests": repo_digests(snapshot, image.id),
        "Created": unix(image.config.created),
        "Size": image.size,
        "VirtualSize": image.size,
        "SharedSize": shared,
        "Labels": image.config.container.labels or {},
        "Containers": len(users.get(image.id, ())) if shared >= 0 else -1,
    }


def container_config(config: ContainerConfig) -> dict[str, Any]:
    """Docker's container.Config as image inspection shows it: every member, null where unset."""
    shown: dict[str, Any] = {
        "Hostname": config.hostname,
        "Domainname": config.domainname,
        "User": config.user,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "ExposedPorts": config.exposed_ports,
        "Tty": False,
        "OpenStdin": False,
        "StdinOnce": False,
        "Env": config.env,
        "Cmd": config.cmd,
        "Healthcheck": None
        if config.healthcheck is None
        else msgspec.to_builtins(config.healthcheck),
        "ArgsEscaped": config.args_escaped,
        "Image": "",
        "Volumes": config.volumes,
        "WorkingDir": config.working_dir,
        "Entrypoint": config.entrypoint,
        "OnBuild": config.on_build,
        "Labels": config.labels,
        "StopSignal": config.stop_signal,
        "StopTimeout": config.stop_timeout,
        "Shell": config.shell,
    }
    optional = ("Healthcheck", "ArgsEscaped", "StopSignal", "StopTimeout", "Shell", "ExposedPorts")
    return {key: value for key, value in shown.items() if value or key not in optional}


def inspect(catalog: Catalog, image: Image, snapshot: Snapshot) -> dict[str, Any]:
    """Docker's ImageInspect."""
    config = image.config
    entries = snapshot.by_image[image.id]
    tagged = max((entry.tagged for entry in entries), default="")
    shown: dict[str, Any] = {
        "Id": image.id,
        "RepoTags": repo_tags(snapshot, image.id),
        "RepoDigests": repo_digests(snapshot, image.id),
        "Parent": config.parent,
        "Comment": config.comment or last_comment(config.history),
        "Created": config.created or NEVER,
        "DockerVersion": config.docker_version,
        "Author": config.author,
        "Config": container_config(config.container),
        "Architecture": config.architecture,
        "Variant": config.variant,
        "Os": config.os,
        "OsVersion": config.os_version,
        "Size": image.size,
        "VirtualSize": image.size,
        "GraphDriver": {
            "Name": "erofs",
            "Data": {
                "Layers": ":".join(
                    layer.path
                    for diff_id in image.diff_ids
                    if (layer := catalog.store.layer(diff_id)) is not None
                )
            },
        },
        "RootFS": {"Type": "layers", "Layers": list(image.diff_ids)},
        "Metadata": {"LastTagTime": tagged or NEVER},
        "Descriptor": {
            "mediaType": entries[0].manifest.media_type,
            "digest": entries[0].manifest.digest,
            "size": entries[0].manifest.size,
        },
    }
    for key in ("Variant", "OsVersion"):
        if not shown[key]:
            del shown[key]
    return shown


def last_comment(history: list[History] | None) -> str:
    """The comment of the newest history entry that has one."""
    return next((entry.comment for entry in reversed(history or ()) if entry.comment), "")


def history(catalog: Catalog, image: Image, snapshot: Snapshot) -> list[dict[str, Any]]:
    """Docker's history, newest first; only the newest entry's id is known, as after a pull."""
    remaining = list(image.diff_ids)
    rows: list[dict[str, Any]] = []
    for entry in image.config.history or ():
        size = 0
        if not entry.empty_layer and remaining:
            size = catalog.layer_size(remaining.pop(0))
        rows.append(_history_row(entry, size))
    rows.extend(_history_row(History(), catalog.layer_size(diff_id)) for diff_id in remaining)
    rows.reverse()
    if rows:
        rows[0]["Id"] = image.id
        rows[0]["Tags"] = repo_tags(snapshot, image.id) or None
    return rows


def _history_row(entry: History, size: int) -> dict[str, Any]:
    return {
        "Id": "<missing>",
        "Created": unix(entry.created),
        "CreatedBy": entry.created_by,
        "Tags": None,
        "Size": size,
        "Comment": entry.comment,
    }


def shared_sizes(catalog: Catalog, images: Sequence[Image]) -> dict[str, int]:
    """Per image, the bytes of layers that another image has too."""
    count: dict[str, int] = {}
    for image in images:
        for diff_id in set(image.diff_ids):
            count[diff_id] = count.get(diff_id, 0) + 1
    return {
        image.id: sum(
            catalog.layer_size(diff_id) for diff_id in set(image.diff_ids) if count[diff_id] > 1
        )
        for image in images
    }


def disk_usage(catalog: Catalog, users: Users) -> dict[str, Any]:
    """Docker's image part of `system df`: LayersSize in bytes on disk, each thing counted once.

    `Reclaimable` is what pruning all unused images would free: content no used image needs.
    """
    snapshot = catalog.names.read()
    images = [catalog.image(identity, snapshot) for identity in snapshot.by_image]
    shared = shared_sizes(catalog, images)
    rows = [summary(catalog, image, snapshot, users, shared=shared[image.id]) for image in images]
    used = {diff_id for image in images if users.get(image.id) for diff_id in image.diff_ids}
    layers = {diff_id: catalog.store.layer_bytes(diff_id) for diff_id in catalog.store.layers()}
    blobs = {digest: blob_bytes(catalog, digest) for digest in catalog.store.blobs()}
    needed = {
        digest
        for image in images
        if users.get(image.id)
        for entry in snapshot.by_image[image.id]
        for digest in catalog.reach(entry)
    }
    kept = sum(size for diff_id, size in layers.items() if diff_id in used)
    kept += sum(size for digest, size in blobs.items() if digest in needed)
    total = sum(layers.values()) + sum(blobs.values())
    return {"LayersSize": total, "Images": rows, "Reclaimable": total - kept}


def blob_bytes(catalog: Catalog, digest: str) -> int:
    """Bytes a blob's file occupies on the disk; 0 if it has none."""
    try:
        return os.stat(catalog.store.blob_path(digest)).st_blocks * 512
    except FileNotFoundError:
        return 0
