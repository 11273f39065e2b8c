"""Docker's classic builder as its clients know it: /build's query, and its messages."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bulkhead.errors import Invalid, Unsupported

_BUILDKIT = (
    "BuildKit sessions are not supported by this daemon: set DOCKER_BUILDKIT=0 "
    "(COMPOSE_DOCKER_CLI_BUILD=0 for old Compose), or use bulkhead build"
)
_HUB = ("https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io")
_NUMBERS = {
    "memory": "Memory",
    "memswap": "MemorySwap",
    "cpushares": "CpuShares",
    "cpuperiod": "CpuPeriod",
    "cpuquota": "CpuQuota",
    "shmsize": "ShmSize",
}
_TEXTS = {"cpusetcpus": "CpusetCpus", "cpusetmems": "CpusetMems", "cgroupparent": "CgroupParent"}

Query = Mapping[str, str | Sequence[str]]


def _one(query: Query, name: str) -> str:
    value = query.get(name, "")
    return value if isinstance(value, str) else (value[-1] if value else "")


def _many(query: Query, name: str) -> list[str]:
    value = query.get(name, ())
    return [value] if isinstance(value, str) else list(value)


def _flag(query: Query, name: str) -> bool:
    return _one(query, name).lower() not in ("", "0", "no", "false", "none")


def _json(query: Query, name: str, kind: type) -> Any:
    text = _one(query, name)
    if not text:
        return kind()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"error reading {name}: {error}") from None
    if found is None:
        return kind()
    if not isinstance(found, kind):
        raise Invalid(f"error reading {name}: expected a JSON {kind.__name__}")
    return found


def _texts(query: Query, name: str) -> dict[str, str]:
    """A JSON object of texts; null members are left out."""
    found = {}
    for key, value in _json(query, name, dict).items():
        if value is not None and not isinstance(value, str):
            raise Invalid(f"error reading {name}: the value of {key} is not a string")
        if value is not None:
            found[key] = value
    return found


def auths(registry_config: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """X-Registry-Config by domain."""
    found = {}
    for server, given in (registry_config or {}).items():
        domain = "docker.io" if server in _HUB else server.partition("://")[2] or server
        if isinstance(given, dict):
            found[domain.partition("/")[0]] = {
                key: value for key, value in given.items() if isinstance(value, str)
            }
    return found


def parameters(query: Query, registry_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of `build.run` for a request to /build.

    Invalid for what is malformed; Unsupported, in one line, for what asks for BuildKit.
    """
    if _one(query, "version") == "2" or _one(query, "session"):
        raise Unsupported(_BUILDKIT)
    remote = _one(query, "remote")
    if remote == "client-session":
        raise Unsupported(_BUILDKIT)
    if _one(query, "outputs"):
        raise Unsupported("outputs are not supported by the classic builder: use bulkhead build")
    network = _one(query, "networkmode")
    options: dict[str, Any] = {
        "tags": [tag for tag in _many(query, "t") if tag],
        "dockerfile": _one(query, "dockerfile"),
        "args": _texts(query, "buildargs"),
        "labels": _texts(query, "labels"),
        "target": _one(query, "target"),
        "no_cache": _flag(query, "nocache"),
        "pull": _flag(query, "pull"),
        "platform": _one(query, "platform"),
        "squash": _flag(query, "squash"),
        "network": "" if network == "default" else network,
        "cache_from": [name for name in _json(query, "cachefrom", list) if isinstance(name, str)],
        "limits": _limits(query),
        "auths": auths(registry_config),
        "format": "classic",
        "context": "remote" if remote else "archive",
        "remote": remote,
    }
    return {"options": options}


def _limits(query: Query) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for name, member in _NUMBERS.items():
        text = _one(query, name)
        if text and text != "0":
            try:
                limits[member] = int(text)
            except ValueError:
                raise Invalid(f"{name}: {text!r} is not a number") from None
    for name, member in _TEXTS.items():
        if _one(query, name):
            limits[member] = _one(query, name)
    if _one(query, "ulimits"):
        limits["Ulimits"] = _json(query, "ulimits", list)
    hosts = [host for text in _many(query, "extrahosts") for host in text.split(",") if host]
    if hosts:
        limits["ExtraHosts"] = hosts
    return limits


class Renderer:
    """Turns events (`report`) into docker's messages; the output of one stage at a time."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._stages: dict[int, int] = {}
        """The stage of each step."""
        self._waiting: dict[int, list[dict[str, Any]]] = {}
        self._ended: set[int] = set()
        self._live: int | None = None
        self._number = 0
        self._total = 0

    def event(self, event: dict[str, Any]) -> None:
        """One event."""
        kind = event["event"]
        if kind == "plan":
            self._total = event["total"]
        elif kind == "stage":
            self._finished(event["stage"])
        elif kind == "warning":
            self._send({"stream": f"[Warning] {event['text']}\n"})
        elif kind == "image":
            self._image(event)
        elif kind == "start":
            self._stages[event["id"]] = event["stage"]
            if event["stage"] >= 0:
                self._say(event["stage"], {"step": event["text"]})
        elif self._stages.get(event["id"], -1) >= 0:
            self._told(self._stages[event["id"]], event)

    def _told(self, stage: int, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "output":
            self._say(stage, {"stream": event["data"].decode("utf-8", "replace")})
        elif kind == "status":
            self._say(stage, event["message"])
        elif kind == "done":
            if event["cached"]:
                self._say(stage, {"stream": " ---> Using cache\n"})
            if event["layer"]:
                short = event["layer"].removeprefix("sha256:")[:12]
                self._say(stage, {"stream": f" ---> {short}\n"})

    def _say(self, stage: int, message: dict[str, Any]) -> None:
        if self._live is None:
            self._live = stage
        if self._live == stage:
            self._out(message)
        else:
            self._waiting.setdefault(stage, []).append(message)

    def _out(self, message: dict[str, Any]) -> None:
        if "step" in message:
            self._number += 1
            total = max(self._total, self._number)
            message = {"stream": f"Step {self._number}/{total} : {message['step']}\n"}
        self._send(message)

    def _finished(self, stage: int) -> None:
        self._ended.add(stage)
        while self._live in self._ended:
            self._live = next(iter(self._waiting), None)
            if self._live is None:
                return
            for message in self._waiting.pop(self._live):
                self._out(message)

    def _image(self, event: dict[str, Any]) -> None:
        self._send({"aux": {"ID": event["id"]}})
        self._send({"stream": f"Successfully built {event['id'].removeprefix('sha256:')[:12]}\n"})
        for name in event["names"]:
            self._send({"stream": f"Successfully tagged {name}\n"})
