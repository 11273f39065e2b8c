"""From keyword arguments to docker's request bodies, for the SDK."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from bulkhead.errors import Invalid


class Options(TypedDict, total=False):
    """Keywords of `Client.run` and `Client.containers.create`. Sizes in bytes, times in seconds."""

    name: str
    entrypoint: str | Sequence[str]
    environment: Mapping[str, str]
    working_dir: str
    user: str
    hostname: str
    labels: Mapping[str, str]
    tty: bool
    stdin_open: bool
    ports: Mapping[int | str, int | str | None]
    """Container port (80, "53/udp") → host port, "address:port", or None for a free one."""
    volumes: Mapping[str, str]
    """Host path or volume name → path inside, with ":ro" and the like at its end."""
    tmpfs: Mapping[str, str]
    network: str
    network_aliases: Sequence[str]
    dns: Sequence[str]
    extra_hosts: Mapping[str, str]
    memory_bytes: int
    cpus: float
    pids_limit: int
    cap_add: Sequence[str]
    cap_drop: Sequence[str]
    privileged: bool
    read_only: bool
    init: bool
    restart: str
    sysctls: Mapping[str, str]
    security_opt: Sequence[str]
    stop_signal: str
    stop_timeout_s: int
    boundary: str
    host_config: Mapping[str, Any]
    """Further members of the Engine API's HostConfig, as they are."""


_CONFIG = {
    "working_dir": "WorkingDir", "user": "User", "hostname": "Hostname", "tty": "Tty",
    "stdin_open": "OpenStdin", "stop_signal": "StopSignal", "stop_timeout_s": "StopTimeout",
}  # fmt: skip
_HOST = {
    "memory_bytes": "Memory", "pids_limit": "PidsLimit", "privileged": "Privileged",
    "read_only": "ReadonlyRootfs", "init": "Init", "network": "NetworkMode",
}  # fmt: skip
_HOST_LISTS = {"dns": "Dns", "cap_add": "CapAdd", "cap_drop": "CapDrop",
               "security_opt": "SecurityOpt"}  # fmt: skip
_HOST_MAPS = {"tmpfs": "Tmpfs", "sysctls": "Sysctls"}
_APART = frozenset(
    ("name", "boundary", "entrypoint", "environment", "labels", "ports", "volumes", "cpus",
     "restart", "extra_hosts", "network_aliases", "host_config")
)  # fmt: skip
KNOWN = frozenset((*_CONFIG, *_HOST, *_HOST_LISTS, *_HOST_MAPS, *_APART))


def words(command: "str | Sequence[str]") -> list[str]:
    """A command as a list: a string is split like a shell would."""
    return shlex.split(command) if isinstance(command, str) else list(command)


def parameters(
    image: str, command: "str | Sequence[str] | None", options: Options, *, remove: bool
) -> dict[str, Any]:
    """Parameters of `workload.create` or `workload.run`; Invalid for an unknown keyword."""
    given: dict[str, Any] = dict(options)
    unknown = given.keys() - KNOWN
    if unknown:
        raise Invalid(f"unknown option: {', '.join(sorted(unknown))}")
    host: dict[str, Any] = {name: given[key] for key, name in _HOST.items() if key in given}
    host.update((name, list(given[key])) for key, name in _HOST_LISTS.items() if key in given)
    host.update((name, dict(given[key])) for key, name in _HOST_MAPS.items() if key in given)
    body: dict[str, Any] = {name: given[key] for key, name in _CONFIG.items() if key in given}
    body["Image"] = image
    if command is not None:
        body["Cmd"] = words(command)
    if remove:
        host["AutoRemove"] = True
    if given.keys() & _APART:
        _apart(given, body, host)
    body["HostConfig"] = host
    params: dict[str, Any] = {"body": body}
    if given.get("name"):
        params["name"] = given["name"]
    if given.get("boundary"):
        params["boundary"] = given["boundary"]
    return params


def _apart(given: dict[str, Any], body: dict[str, Any], host: dict[str, Any]) -> None:
    if "entrypoint" in given:
        body["Entrypoint"] = words(given["entrypoint"])
    if "environment" in given:
        body["Env"] = [f"{key}={value}" for key, value in given["environment"].items()]
    if "labels" in given:
        body["Labels"] = dict(given["labels"])
    if "ports" in given:
        keys = {key if "/" in str(key) else f"{key}/tcp": to for key, to in given["ports"].items()}
        body["ExposedPorts"] = {key: {} for key in keys}
        host["PortBindings"] = {key: [binding(to)] for key, to in keys.items()}
    if "volumes" in given:
        host["Binds"] = [f"{source}:{target}" for source, target in given["volumes"].items()]
    if "cpus" in given:
        host["NanoCpus"] = round(given["cpus"] * 1_000_000_000)
    if "restart" in given:
        name, _, count = given["restart"].partition(":")
        host["RestartPolicy"] = {"Name": name, "MaximumRetryCount": int(count or 0)}
    if "extra_hosts" in given:
        host["ExtraHosts"] = [f"{name}:{at}" for name, at in given["extra_hosts"].items()]
    if "network_aliases" in given:
        endpoint = {"Aliases": list(given["network_aliases"])}
        body["NetworkingConfig"] = {
            "EndpointsConfig": {given.get("network") or "default": endpoint}
        }
    host.update(given.get("host_config", {}))


def binding(to: "int | str | None") -> dict[str, str]:
    """A PortBinding of a host port, "address:port" or None."""
    address, _, port = str(to if to is not None else "").rpartition(":")
    return {"HostIp": address.strip("[]"), "HostPort": port}
