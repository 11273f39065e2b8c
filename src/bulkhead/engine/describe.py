"""Workloads in the shapes of the Docker Engine API: inspect and list."""

import re
import shlex
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.engine import body, filters, guests, linking, stdio
from bulkhead.engine.health import Health, moment
from bulkhead.engine.records import MountPoint, Record, Workload
from bulkhead.errors import BulkheadError, Invalid, NotFound

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

NEVER = "0001-01-01T00:00:00Z"
FILTERS = frozenset({
    "ancestor", "before", "exited", "expose", "health", "id", "isolation", "is-task", "label",
    "name", "network", "publish", "since", "status", "volume", "boundary",
})  # fmt: skip
STATUSES = frozenset({"created", "restarting", "running", "removing", "paused", "exited", "dead"})


def _when(nanoseconds: int) -> str:
    return moment(nanoseconds) if nanoseconds else NEVER


def shown_status(record: Record) -> str:
    """The status as people see it."""
    return "removing" if record.removing else record.status


def state(workload: Workload) -> dict[str, Any]:
    """Docker's ContainerState."""
    record = workload.record
    described: dict[str, Any] = {
        "Status": shown_status(record),
        "Running": workload.running or record.status == "restarting",
        "Paused": record.status == "paused",
        "Restarting": record.status == "restarting",
        "OOMKilled": record.oom_killed,
        "Dead": record.status == "dead",
        "Pid": record.pid,
        "ExitCode": record.exit_code,
        "Error": record.error or record.oom_text,
        "StartedAt": _when(record.started_ns),
        "FinishedAt": _when(record.finished_ns),
    }
    health = Health.describe(workload)
    if health is not None:
        described["Health"] = health
    return described


def mount(engine: "Engine", point: MountPoint) -> dict[str, Any]:
    """Docker's MountPoint."""
    described: dict[str, Any] = {
        "Type": point.type_,
        "Source": point.source,
        "Destination": point.destination,
        "Mode": point.mode,
        "RW": point.rw,
        "Propagation": point.propagation,
    }
    if point.type_ == "volume":
        described |= {
            "Name": point.name,
            "Driver": "local",
            "Source": engine.volumes.data(point.name),
        }
    return described


def settings(engine: "Engine", workload: Workload) -> dict[str, Any]:
    """Docker's NetworkSettings; of one that does not run, what was asked for."""
    if workload.settings is not None:
        return workload.settings
    record = workload.record
    networks = {name: msgspec.to_builtins(one) for name, one in record.networks.items()}
    if record.host.network_mode in {"none", "host"}:
        networks = {record.host.network_mode: msgspec.to_builtins(body.EndpointSettings())}
    for name, one in networks.items():
        try:
            one["NetworkID"] = engine.networks.inspect(name)["Id"]
        except BulkheadError:
            one["NetworkID"] = ""
    return {
        "Bridge": "",
        "SandboxID": "",
        "SandboxKey": "",
        "Ports": {},
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        "EndpointID": "",
        "Gateway": "",
        "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0,
        "IPAddress": "",
        "IPPrefixLen": 0,
        "IPv6Gateway": "",
        "MacAddress": "",
        "Networks": networks,
    }


def _config(record: Record) -> dict[str, Any]:
    config: dict[str, Any] = msgspec.to_builtins(record.config)
    for name in ("Healthcheck", "StopTimeout", "NetworkDisabled", "MacAddress", "ArgsEscaped",
                 "Shell", "StopSignal", "ExposedPorts"):  # fmt: skip
        if config.get(name) is None:
            config.pop(name, None)
    config["Labels"] = config.get("Labels") or {}
    config["Env"] = config.get("Env") or []
    return config


def _host(record: Record) -> dict[str, Any]:
    host: dict[str, Any] = msgspec.to_builtins(record.host)
    host["Links"] = linking.shown(record)
    for name in ("ReserveCpus", "ReserveMemory", "ReserveIo"):  # ours: shown if they are set
        if not host[name]:
            del host[name]
    return host


def inspect(engine: "Engine", workload: Workload, *, size: bool = False) -> dict[str, Any]:
    """Docker's ContainerInspectResponse."""
    record = workload.record
    home, run = engine.home.workload(record.id), engine.home.workload_run(record.id)
    log = record.host.log_config
    described: dict[str, Any] = {
        "Id": record.id,
        "Created": moment(record.created_ns),
        "Path": record.args[0],
        "Args": record.args[1:],
        "State": state(workload),
        "Image": record.image_id,
        "ResolvConfPath": f"{run}/resolv.conf",
        "HostnamePath": f"{run}/hostname",
        "HostsPath": f"{run}/hosts",
        "LogPath": "" if log and log.type_ == "none" else stdio.log_path(engine.home, record),
        "Name": f"/{record.name}",
        "RestartCount": record.restart_count,
        "Driver": "erofs",
        "Platform": record.platform,
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": [
            key for key, one in workload.execs.items() if one.state == "running" and one.pid
        ]
        or None,
        "HostConfig": _host(record),
        "GraphDriver": {
            "Name": "erofs",
            "Data": {"UpperDir": f"{home}/upper", "WorkDir": f"{home}/work"},
        },
        "Mounts": [mount(engine, point) for point in record.mounts if point.type_ != "tmpfs"],
        "Config": _config(record),
        "NetworkSettings": settings(engine, workload),
        "Boundary": record.boundary,
    }
    if record.kernel:
        described["Kernel"] = record.kernel
    if record.chosen:
        described["BoundaryChoice"] = record.chosen
    if size:
        described["SizeRw"] = guests.writable_bytes(engine.home, record)
        described["SizeRootFs"] = described["SizeRw"] + _image_size(engine, record)
    return described


def _image_size(engine: "Engine", record: Record) -> int:
    if not record.image_id:  # a whole machine
        return 0
    try:
        return engine.images.resolve(record.image_id).size
    except NotFound:
        return 0


def human(seconds: int) -> str:
    """ "Less than a second", "5 minutes", "2 hours": Docker's words for a span of time."""
    if seconds < 1:
        return "Less than a second"
    if seconds == 1:
        return "1 second"
    if seconds < 60:
        return f"{seconds} seconds"
    minutes = seconds // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = int(seconds / 3600 + 0.5)
    if hours == 1:
        return "About an hour"
    for limit, divisor, word in (
        (48, 1, "hours"), (24 * 14, 24, "days"), (24 * 60, 24 * 7, "weeks"),
        (24 * 365 * 2, 24 * 30, "months"),
    ):  # fmt: skip
        if hours < limit:
            return f"{hours // divisor} {word}"
    return f"{hours // (24 * 365)} years"


def status_line(workload: Workload) -> str:
    """Docker's "Up 5 minutes (healthy)" and the like."""
    record = workload.record
    now = time.time_ns()
    if record.removing:
        return "Removal In Progress"
    if workload.running:
        up = f"Up {human((now - record.started_ns) // 10**9)}"
        if record.status == "paused":
            return f"{up} (Paused)"
        health = Health.describe(workload)
        if health is not None:
            word = health["Status"]
            return f"{up} ({'health: starting' if word == 'starting' else word})"
        return up
    if record.status == "created":
        return "Created"
    ago = human((now - record.finished_ns) // 10**9)
    if record.status == "restarting":
        return f"Restarting ({record.exit_code}) {ago} ago"
    return f"Exited ({record.exit_code}) {ago} ago"


def _ports(workload: Workload) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for key, bindings in ((workload.settings or {}).get("Ports") or {}).items():
        number, _, protocol = key.partition("/")
        base = {"PrivatePort": int(number), "Type": protocol or "tcp"}
        if not bindings:
            found.append(base)
        for one in bindings or ():
            found.append({**base, "IP": one["HostIp"], "PublicPort": int(one["HostPort"])})
    return found


def summary(engine: "Engine", workload: Workload, *, size: bool) -> dict[str, Any]:
    """Docker's ContainerSummary."""
    record = workload.record
    known = settings(engine, workload)
    described: dict[str, Any] = {
        "Id": record.id,
        "Names": [f"/{record.name}"],
        "Image": record.image,
        "ImageID": record.image_id,
        "Command": " ".join(shlex.quote(word) for word in record.args),
        "Created": record.created_ns // 10**9,
        "Ports": _ports(workload),
        "Labels": record.config.labels or {},
        "State": shown_status(record),
        "Status": status_line(workload),
        "HostConfig": {"NetworkMode": record.host.network_mode},
        "NetworkSettings": {"Networks": known["Networks"]},
        "Mounts": [mount(engine, point) for point in record.mounts if point.type_ != "tmpfs"],
        "Boundary": record.boundary,
    }
    health = Health.describe(workload)
    if health is not None:
        described["Health"] = {k: health[k] for k in ("Status", "FailingStreak")}
    if size:
        described["SizeRw"] = guests.writable_bytes(engine.home, record)
        described["SizeRootFs"] = described["SizeRw"] + _image_size(engine, record)
    return described


def select(
    engine: "Engine", *, everything: bool, limit: int, given: Mapping[str, Any] | None
) -> list[Workload]:
    """The workloads that `list` shows, newest first."""
    wanted = filters.normalise(given, FILTERS)
    for value in wanted.get("status", ()):
        if value not in STATUSES:
            raise Invalid(f"invalid filter 'status={value}'")
    tests = [_test(engine, key, values) for key, values in wanted.items() if values]
    chosen = sorted(engine.workloads, key=lambda one: -one.record.created_ns)
    shown_all = everything or limit > 0 or bool({"status", "exited"} & set(wanted))
    chosen = [
        one
        for one in chosen
        if (shown_all or one.running or one.record.status == "restarting")
        and all(test(one) for test in tests)
    ]
    return chosen[:limit] if limit > 0 else chosen


Test = Callable[[Workload], bool]


def _test(engine: "Engine", key: str, values: list[str]) -> Test:
    maker = _TESTS.get(key)
    if maker is not None:
        return maker(engine, values)
    simple: dict[str, Test] = {
        "id": lambda w: any(w.id.startswith(v) for v in values),
        "label": lambda w: filters.labels_match(w.record.config.labels or {}, values),
        "status": lambda w: shown_status(w.record) in values,
        "boundary": lambda w: w.record.boundary in values,
        "is-task": lambda w: not filters.truth(values),
        "isolation": lambda w: "default" in values,
        "health": lambda w: ((Health.describe(w) or {}).get("Status") or "none") in values,
        "volume": lambda w: any(
            v in {p.name, p.destination, p.source} for v in values for p in w.record.mounts if v
        ),
        "network": lambda w: any(
            v == name or v == one.get("NetworkID") or v == w.record.host.network_mode
            for v in values
            for name, one in settings(engine, w)["Networks"].items()
        ),
    }
    return simple[key]


def _names(engine: "Engine", values: list[str]) -> Test:
    try:
        patterns = [re.compile(value.removeprefix("^/").removeprefix("/")) for value in values]
        exact = [re.compile(value) for value in values]
    except re.error as error:
        raise Invalid(f"invalid filter 'name': {error}") from None
    return lambda w: (
        any(e.search(f"/{w.record.name}") or e.search(w.record.name) for e in exact)
        or any(p.search(w.record.name) for p in patterns if p.pattern)
    )


def _exited(engine: "Engine", values: list[str]) -> Test:
    try:
        codes = {int(value) for value in values}
    except ValueError:
        raise Invalid(f"invalid filter 'exited={values}'") from None
    return lambda w: not w.running and w.record.status != "created" and w.record.exit_code in codes


def _ancestor(engine: "Engine", values: list[str]) -> Test:
    wanted = set()
    for value in values:
        try:
            wanted.add(engine.images.resolve(value).id)
        except NotFound:
            continue
    return lambda w: w.record.image_id in wanted or w.record.image in values


def _relative(engine: "Engine", values: list[str], sign: int) -> Test:
    border = engine.workloads.find(values[-1]).record.created_ns
    return lambda w: (w.record.created_ns - border) * sign > 0


def _port_test(engine: "Engine", values: list[str], *, published: bool) -> Test:
    wanted: set[str] = set()
    for value in values:
        span, _, protocol = value.partition("/")
        first, _, last = span.partition("-")
        try:
            numbers = range(int(first), int(last or first) + 1)
        except ValueError:
            raise Invalid(f"invalid port: {value}") from None
        wanted.update(f"{number}/{protocol or 'tcp'}" for number in numbers)

    def test(workload: Workload) -> bool:
        record = workload.record
        keys = record.host.port_bindings if published else record.config.exposed_ports
        return not wanted.isdisjoint(keys or ())

    return test


_TESTS: dict[str, Callable[["Engine", list[str]], Test]] = {
    "name": _names,
    "exited": _exited,
    "ancestor": _ancestor,
    "before": lambda engine, values: _relative(engine, values, -1),
    "since": lambda engine, values: _relative(engine, values, 1),
    "publish": lambda engine, values: _port_test(engine, values, published=True),
    "expose": lambda engine, values: _port_test(engine, values, published=False),
}
