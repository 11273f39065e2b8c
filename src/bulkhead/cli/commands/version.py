"""`version` and `info`."""

import os
import sys
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT, JSON, Parsed
from bulkhead.cli.output import one
from bulkhead.errors import Unavailable


def version_text() -> str:
    """The installed version; the checkout's own when not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bulkhead")
    except PackageNotFoundError:
        return "0.1.0"


def short() -> str:
    """`bulkhead --version`."""
    return f"bulkhead version {version_text()}"


def version_command(context: Context, parsed: Parsed) -> int:
    """`bulkhead version`: the client's, and the engine's if it answers or can be started."""
    host = os.uname()
    client: dict[str, Any] = {
        "Version": version_text(),
        "ApiVersion": "1",
        "PythonVersion": sys.version.split()[0],
        "Os": "linux",
        "Arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(host.machine, host.machine),
    }
    server: dict[str, Any] | None = None
    problem = ""
    try:
        server = context.call("system.version")
    except Unavailable as error:
        problem = error.message
    if not one(context, parsed, {"Client": client, "Server": server}):
        context.out("Client: bulkhead")
        context.out(f" Version:           {client['Version']}")
        context.out(f" Python version:    {client['PythonVersion']}")
        context.out(f" OS/Arch:           {client['Os']}/{client['Arch']}")
        if server is not None:
            context.out("\nServer: bulkhead engine")
            for key, title in _SERVER:
                if server.get(key):
                    context.out(f" {title + ':':<18} {server[key]}")
            if server.get("Os"):
                context.out(f" {'OS/Arch:':<18} {server['Os']}/{server.get('Arch', '')}")
    if problem:
        context.err(f"bulkhead: {problem}")
        return 1
    return 0


_SERVER = (
    ("Version", "Version"),
    ("ApiVersion", "API version"),
    ("KernelVersion", "Kernel version"),
    ("BuildTime", "Built"),
)

_INFO = (
    ("Containers", "Containers"), ("ContainersRunning", " Running"),
    ("ContainersPaused", " Paused"), ("ContainersStopped", " Stopped"), ("Images", "Images"),
    ("ServerVersion", "Server Version"), ("Driver", "Storage Driver"),
    ("LoggingDriver", "Logging Driver"), ("CgroupDriver", "Cgroup Driver"),
    ("CgroupVersion", "Cgroup Version"), ("DefaultRuntime", "Default Runtime"),
    ("InitBinary", "Init Binary"), ("KernelVersion", "Kernel Version"),
    ("OperatingSystem", "Operating System"), ("OSType", "OSType"),
    ("Architecture", "Architecture"), ("NCPU", "CPUs"), ("MemTotal", "Total Memory"),
    ("Name", "Name"), ("ID", "ID"), ("DockerRootDir", "Root Dir"), ("RunDir", "Run Dir"),
)  # fmt: skip


def info(context: Context, parsed: Parsed) -> None:
    """`bulkhead info`."""
    from bulkhead.cli.units import binary_size

    found = context.call("system.info")
    if one(context, parsed, found):
        return
    context.out(f"Client:\n Version:    {version_text()}\n\nServer:")
    for key, title in _INFO:
        value = found.get(key)
        if value is None or value == "":
            continue
        context.out(f" {title}: {binary_size(value) if key == 'MemTotal' else value}")
    for line in found.get("SecurityOptions") or ():
        context.out(f" Security: {line}")
    for warning in found.get("Warnings") or ():
        context.err(f"WARNING: {warning}")


COMMANDS = {
    "version": Command(
        "version", "Show the bulkhead version information", version_command,
        options=(FORMAT, JSON),
        examples=("bulkhead version", "bulkhead version --format '{{.Server.Version}}'"),
    ),
    "info": Command(
        "info", "Display system-wide information", info, options=(FORMAT, JSON),
        examples=("bulkhead info", "bulkhead info --format '{{.CgroupVersion}}'"),
    ),
}  # fmt: skip
