"""Items from Docker's JSON: what `inspect` shows of containers and images, and create requests."""

import http.client
import json
import os
import socket
import urllib.parse
from collections.abc import Mapping
from typing import Any

from bulkhead.choosing import items
from bulkhead.choosing.items import OURS, TENANT, Item, Mount, hints, within
from bulkhead.errors import Invalid, Unavailable

MOST_BYTES = 64 << 20
PROJECT = "com.docker.compose.project"
_TIMEOUT_S = 30.0
_NAMESPACES = {"NetworkMode": "network", "PidMode": "pid", "IpcMode": "ipc", "UTSMode": "uts"}


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(one) for one in value] if isinstance(value, list | tuple) else []


def from_request(
    name: str, config: Mapping[str, Any], host: Mapping[str, Any], source: str = "the request"
) -> Item:
    """The item that a create request (Config and HostConfig in Docker's JSON) describes."""
    labels = dict(config.get("Labels") or {})
    item = Item(
        name=name,
        kind="container",
        source=source,
        image=str(config.get("Image") or ""),
        tenant=labels.get(TENANT, ""),
        group=labels.get(PROJECT, ""),
        memory=int(host.get("Memory") or 0),
        nano_cpus=int(host.get("NanoCpus") or 0),
        entrypoint=_words(config.get("Entrypoint")),
        command=_words(config.get("Cmd")),
        env=_words(config.get("Env")),
        labels=labels,
        user=str(config.get("User") or ""),
        privileged=bool(host.get("Privileged")),
        capabilities=_words(host.get("CapAdd")),
        read_only=bool(host.get("ReadonlyRootfs")),
        cpuset=str(host.get("CpusetCpus") or ""),
        runtime=str(host.get("Runtime") or ""),
        restart=str((host.get("RestartPolicy") or {}).get("Name") or ""),
        health=bool(config.get("Healthcheck")),
        devices=[str(one.get("PathOnHost", "")) for one in host.get("Devices") or ()],
        host_namespaces=[
            word for key, word in _NAMESPACES.items() if str(host.get(key) or "") == "host"
        ],
    )
    item.mounts = _mounts(config, host)
    item.ports = _ports(host.get("PortBindings") or {})
    return item


def _mounts(config: Mapping[str, Any], host: Mapping[str, Any]) -> list[Mount]:
    found: dict[str, Mount] = {}
    for target in config.get("Volumes") or ():
        found[target] = Mount("volume", "", target)
    for bind in host.get("Binds") or ():
        parts = str(bind).split(":")
        if len(parts) > 1:
            kind = "bind" if parts[0].startswith(("/", ".", "~")) else "volume"
            read_only = "ro" in parts[2].split(",") if len(parts) > 2 else False
            found[parts[1]] = Mount(kind, parts[0], parts[1], read_only)
    for one in host.get("Mounts") or ():
        target = str(one.get("Target") or "")
        found[target] = Mount(
            str(one.get("Type") or "volume"), str(one.get("Source") or ""), target,
            bool(one.get("ReadOnly")),
        )  # fmt: skip
    return list(found.values())


def _ports(bindings: Mapping[str, Any]) -> list[str]:
    found = []
    for inner, outer in bindings.items():
        for one in outer or ():
            host = one.get("HostIp") or ""
            at = f"{host}:" if host not in ("", "0.0.0.0", "::") else ""
            found.append(f"{at}{one.get('HostPort') or ''}:{inner}".lstrip(":"))
    return sorted(set(found))


def add_image(item: Item, image: Mapping[str, Any]) -> None:
    """What the image (Docker's ImageInspect) adds to it."""
    config = image.get("Config") or {}
    item.os = str(image.get("Os") or "")
    item.architecture = str(image.get("Architecture") or "")
    item.disk_bytes = int(image.get("Size") or 0)
    if not item.entrypoint:
        item.command = item.command or _words(config.get("Cmd"))
        item.entrypoint = _words(config.get("Entrypoint"))
    item.user = item.user or str(config.get("User") or "")
    targets = {one.target for one in item.mounts}
    item.mounts += [
        Mount("volume", "", target)
        for target in config.get("Volumes") or ()
        if target not in targets
    ]
    labels = {str(key): str(value) for key, value in (config.get("Labels") or {}).items()}
    item.stated += hints(labels)
    foreign = {key: value for key, value in labels.items() if not key.startswith(OURS)}
    item.labels = {**foreign, **item.labels}
    item.health = item.health or bool(config.get("Healthcheck"))


def from_container(shown: Mapping[str, Any], source: str) -> Item:
    """The item that a container (Docker's ContainerInspect) is."""
    config, host = shown.get("Config") or {}, shown.get("HostConfig") or {}
    item = from_request(str(shown.get("Name", "")).lstrip("/"), config, host, source)
    for one in shown.get("Mounts") or ():
        target = str(one.get("Destination") or "")
        if target not in {mount.target for mount in item.mounts}:
            source_ = str(one.get("Name") or one.get("Source") or "")
            kind = str(one.get("Type") or "volume")
            item.mounts.append(Mount(kind, source_, target, one.get("RW") is False))
    networks = (shown.get("NetworkSettings") or {}).get("Networks") or {}
    item.networks = [one for one in networks if one not in ("bridge", "host", "none")]
    item.argv = [str(shown.get("Path") or ""), *_words(shown.get("Args"))]
    if not (shown.get("State") or {}).get("Running", True):
        item.notes.append("it does not run")
    return item


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """To the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


def _connection(host: str) -> http.client.HTTPConnection:
    scheme, _, rest = host.partition("://")
    if not rest and host.startswith("/"):
        scheme, rest = "unix", host
    if scheme == "unix":
        return _UnixConnection(rest)
    if scheme in ("tcp", "http"):
        try:
            at = urllib.parse.urlsplit(f"//{rest}")
            name, port = at.hostname, at.port or 2375
        except ValueError as error:
            raise Invalid(f"--docker {host}: {error}") from None
        if name:
            return http.client.HTTPConnection(name, port, timeout=_TIMEOUT_S)
    raise Invalid(f"--docker {host}: name it as unix:///PATH or tcp://HOST:PORT")


def _get(connection: http.client.HTTPConnection, path: str, host: str) -> Any:
    connection.request("GET", path)
    answer = connection.getresponse()
    data = answer.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise Invalid(f"{host}: {path} answers with more than {MOST_BYTES >> 20} MiB")
    if answer.status != 200:
        raise Unavailable(f"{host}: GET {path} answers {answer.status}")
    found = json.loads(data)
    json.dumps(found, ensure_ascii=False).encode()  # ValueError for halves of characters
    return found


def inventory(host: str) -> list[Item]:
    """The containers of a Docker host, over its API; only read, nothing is changed there."""
    connection = _connection(host)
    try:
        found = []
        images: dict[str, Any] = {}
        for one in _get(connection, "/containers/json?all=1", host):
            identity = urllib.parse.quote(str(one["Id"]), safe="")
            shown = _get(connection, f"/containers/{identity}/json", host)
            item = from_container(shown, host)
            image = str(shown.get("Image") or "")
            if image and image not in images:
                try:
                    where = f"/images/{urllib.parse.quote(image, safe=':')}/json"
                    images[image] = _get(connection, where, host)
                except Unavailable:
                    images[image] = {}
            if images.get(image):
                add_image(item, images[image])
            within(item.memory, items.MOST_BYTES, f"{host}: {item.name}: memory")
            within(item.nano_cpus, items.MOST_NANO_CPUS, f"{host}: {item.name}: processors")
            found.append(item)
        return found
    except (OSError, http.client.HTTPException) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise Unavailable(f"{host} cannot be reached: {reason}") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise Invalid(f"{host} does not answer as a Docker host does: {error}") from error
    finally:
        connection.close()
