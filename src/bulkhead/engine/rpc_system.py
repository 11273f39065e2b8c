"""RPC: the engine itself (`system.*`)."""

import asyncio
import contextlib
import os
import platform
from typing import Any

from bulkhead.engine import doctor as checks
from bulkhead.engine import filters, rpc_df
from bulkhead.engine.calls import Call, Nothing, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.health import moment
from bulkhead.errors import BulkheadError, Conflict
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.rpc import wire

METHODS = Table()
VERSION = "0.1.0"
API_VERSION, API_MINIMUM = "1.50", "1.40"
EVENT_FILTERS = frozenset(
    str.split("container daemon event image label network scope type volume plugin config")
)


class Events(Params, frozen=True):
    """Which events."""

    since: str | float | None = None
    until: str | float | None = None
    filters: dict[str, Any] | None = None


class Shutdown(Params, frozen=True):
    """How to end."""

    timeout_s: float | None = None
    force: bool = False


@METHODS.method("system.ping", Nothing)
async def ping(engine: Engine, params: Nothing, call: Call) -> dict[str, Any]:
    """Whether the engine answers, and the version of the protocol it speaks."""
    return {"pong": True, "protocol": wire.VERSION, "pid": engine.pid, "version": VERSION}


@METHODS.method("system.version", Nothing)
async def version(engine: Engine, params: Nothing, call: Call) -> dict[str, Any]:
    """Docker's SystemVersion."""
    system = os.uname()
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(system.machine, system.machine)
    python = platform.python_version()
    return {
        "Platform": {"Name": "bulkhead"},
        "Version": VERSION,
        "ApiVersion": API_VERSION,
        "MinAPIVersion": API_MINIMUM,
        "GitCommit": "",
        "GoVersion": f"python {python}",
        "Os": "linux",
        "Arch": arch,
        "KernelVersion": system.release,
        "Experimental": False,
        "BuildTime": "",
        "Components": [
            {
                "Name": "Engine",
                "Version": VERSION,
                "Details": {
                    "ApiVersion": API_VERSION,
                    "MinAPIVersion": API_MINIMUM,
                    "BuildTime": "",
                    "Experimental": "false",
                    "GitCommit": "",
                    "GoVersion": f"python {python}",
                    "Arch": arch,
                    "Os": "linux",
                    "KernelVersion": system.release,
                    "Python": python,
                    "Protocol": str(wire.VERSION),
                },
            }
        ],
    }


def _pretty_name() -> str:
    try:
        with open("/etc/os-release", encoding="utf-8") as file:
            for line in file:
                if line.startswith("PRETTY_NAME="):
                    return line.partition("=")[2].strip().strip('"')
    except OSError:
        pass
    return "Linux"


_CONSTANT: dict[str, Any] = {
    "GenericResources": None,
    "Labels": [],
    "OSVersion": "",
    "Warnings": None,
    "Debug": False,
    "ExperimentalBuild": False,
    "HttpProxy": "",
    "HttpsProxy": "",
    "NoProxy": "",
    "Swarm": {"NodeID": "", "LocalNodeState": "inactive", "ControlAvailable": False},
    "LiveRestoreEnabled": True,
    "Isolation": "",
    "InitBinary": "bulkhead-init",
    "ContainerdCommit": {"ID": ""},
    "RuncCommit": {"ID": ""},
    "InitCommit": {"ID": ""},
}


@METHODS.method("system.info", Nothing)
async def info(engine: Engine, params: Nothing, call: Call) -> dict[str, Any]:
    """Docker's SystemInfo."""
    import datetime

    states = [workload.record.status for workload in engine.workloads]
    hierarchy = cgroups.detect()
    has = hierarchy.controllers
    system = os.uname()
    images = await engine.blocking(lambda: len(engine.images.list()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _CONSTANT | {
        "ID": engine.identity,
        "Containers": len(states),
        "ContainersRunning": states.count("running"),
        "ContainersPaused": states.count("paused"),
        "ContainersStopped": len(states) - states.count("running") - states.count("paused"),
        "Images": images,
        "Driver": "erofs",
        "DriverStatus": [["Backing", "overlay of EROFS images"]],
        "Plugins": {
            "Volume": ["local"], "Network": ["bridge", "host", "null"],
            "Authorization": None, "Log": ["json-file", "none"],
        },
        "MemoryLimit": "memory" in has,
        "SwapLimit": "memory" in has,
        "CpuCfsPeriod": "cpu" in has,
        "CpuCfsQuota": "cpu" in has,
        "CPUShares": "cpu" in has,
        "CPUSet": "cpuset" in has,
        "PidsLimit": "pids" in has,
        "OomKillDisable": hierarchy.version == 1,
        "IPv4Forwarding": True,
        "NFd": len(os.listdir("/proc/self/fd")),
        "NGoroutines": len(asyncio.all_tasks()),
        "SystemTime": datetime.datetime.now(datetime.UTC).isoformat(),
        "LoggingDriver": "json-file",
        "CgroupDriver": "cgroupfs",
        "CgroupVersion": str(hierarchy.version),
        "NEventsListener": engine.events.listeners,
        "KernelVersion": system.release,
        "OperatingSystem": _pretty_name(),
        "OSType": "linux",
        "Architecture": system.machine,
        "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": {"InsecureRegistryCIDRs": ["::1/128", "127.0.0.0/8"], "Mirrors": None,
                           "IndexConfigs": {}},
        "NCPU": os.cpu_count(),
        "MemTotal": memory,
        "DockerRootDir": engine.home.root,
        "Name": system.nodename,
        "ServerVersion": VERSION,
        "Runtimes": {name: {"path": ""} for name in engine.boundary_names()},
        "DefaultRuntime": "container",
        "SecurityOptions": ["name=seccomp,profile=builtin"],
        "Started": moment(engine.started_ns),
        "Processes": {"Engine": engine.pid, "Holder": engine.processes.pid},
    }  # fmt: skip


@METHODS.method("system.reservations", Nothing)
async def reservations(engine: Engine, params: Nothing, call: Call) -> dict[str, Any]:
    """What can be reserved, what is, what is free, and by whom."""
    return engine.reservations.describe()


@METHODS.method("system.df", Nothing)
async def df(engine: Engine, params: Nothing, call: Call) -> dict[str, Any]:
    """Docker's disk usage."""
    return await rpc_df.usage(engine)


@METHODS.method("system.events", Events)
async def events(engine: Engine, params: Events, call: Call) -> None:
    """A stream of events."""
    wanted = filters.normalise(params.filters, EVENT_FILTERS)
    since, until = filters.moment_ns(params.since), filters.moment_ns(params.until)
    async with contextlib.aclosing(engine.events.stream(since, until, wanted)) as stream:
        async for event in stream:
            await call.item(event)


@METHODS.method("system.doctor", Nothing)
async def doctor(engine: Engine, params: Nothing, call: Call) -> list[dict[str, str]]:
    """What this host offers and lacks."""
    return await checks.run(engine)


@METHODS.method("system.shutdown", Shutdown)
async def shutdown(engine: Engine, params: Shutdown, call: Call) -> dict[str, Any]:
    """Stop every workload, then the engine, the keeper and the holder; nothing of ours remains."""
    running = [workload for workload in engine.workloads if workload.running]
    if params.force:
        await asyncio.gather(
            *(engine.control.stop(workload, "SIGKILL", 0) for workload in running),
            return_exceptions=True,
        )
    else:
        await asyncio.gather(
            *(engine.control.stop(workload, "", params.timeout_s) for workload in running),
            return_exceptions=True,
        )
    for workload in engine.workloads:
        if workload.record.status == "restarting":
            engine.lifecycle.abandon_restart(workload)
    left = [workload.record.name for workload in engine.workloads if workload.running]
    if left:
        raise Conflict(f"these workloads do not end: {', '.join(left)}")
    await engine.settled()
    try:
        await engine.end_helpers()
    except BulkheadError as error:
        raise Conflict(f"the holder cannot be ended: {error}") from error
    engine.stopping.set()
    return {"Stopped": len(running)}
