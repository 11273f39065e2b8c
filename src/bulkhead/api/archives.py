"""`/containers/{id}/archive` and `export`: files of containers as tar streams."""

import base64
from typing import Any

from bulkhead.api.answers import OK, Reply, json_line
from bulkhead.api.exchange import Exchange, with_download, with_upload
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.errors import Invalid

TAR = "application/x-tar"


def _path(x: Exchange) -> str:
    path = x.text("path")
    if not path:
        raise Invalid("bad parameter: path cannot be empty")
    return path


async def _described(x: Exchange) -> dict[str, str]:
    """The header that tells what the path is."""
    found: dict[str, Any] = await x.call(
        "workload.archive_stat", {"id": x.at["id"], "path": _path(x)}
    )
    text = base64.b64encode(json_line(found)[:-1]).decode()
    return {"X-Docker-Container-Path-Stat": text}


@ROUTES.add("HEAD", "/containers/{id}/archive")
async def describe(x: Exchange) -> Reply:
    """What the path is."""
    return Reply(200, headers=await _described(x))


@ROUTES.add("GET", "/containers/{id}/archive")
async def get(x: Exchange) -> object:
    """What lies at the path, as tar."""
    headers = await _described(x)
    params = {"id": x.at["id"], "path": _path(x)}
    await with_download(x, lambda out: x.call("workload.archive_get", params, [out]), TAR, headers)
    return SENT


@ROUTES.add("PUT", "/containers/{id}/archive")
async def put(x: Exchange) -> Reply:
    """Unpack the tar in the body, of any compression, into the directory."""
    params = {
        "id": x.at["id"],
        "path": _path(x),
        "no_overwrite_dir_non_dir": x.flag("noOverwriteDirNonDir"),
        "copy_uid_gid": x.flag("copyUIDGID"),
    }
    await with_upload(x, lambda file: x.call("workload.archive_put", params, [file]))
    return OK


@ROUTES.add("GET", "/containers/{id}/export")
async def export(x: Exchange) -> object:
    """Its whole root, as tar."""
    identity = x.engine.workloads.find(x.at["id"]).id
    await with_download(
        x, lambda out: x.call("workload.export", {"id": identity}, [out]),
        "application/octet-stream",
    )  # fmt: skip
    return SENT
