"""`system prune`, `system shutdown`, `doctor` and `serve`."""

import os
import sys
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORCE_PRUNE, FORMAT, JSON, Option, Parsed
from bulkhead.cli.output import filters, one, table
from bulkhead.cli.units import human_size
from bulkhead.errors import Unavailable


def prune(context: Context, parsed: Parsed) -> int:
    """`bulkhead system prune`: containers, networks, images, and volumes if asked."""
    kinds = ["all stopped containers", "all networks not used by at least one container"]
    if parsed["volumes"]:
        kinds.append("all anonymous volumes not used by at least one container")
    kinds.append(
        "all images without at least one container associated to them"
        if parsed["all"]
        else "all dangling images"
    )
    warning = "WARNING! This will remove:\n" + "\n".join(f"  - {kind}" for kind in kinds) + "\n"
    if not parsed["force"] and not context.confirm(warning):
        return 1
    from bulkhead.cli.commands import images, lifecycle, network, volume

    wanted = filters(parsed)
    freed = 0
    found = context.call("workload.prune", {"filters": wanted})
    freed += found.get("SpaceReclaimed") or 0
    for identity in _heading(context, "Deleted Containers:", found.get("ContainersDeleted")):
        context.out(identity)
    network.report(context, context.call("network.prune", {"filters": wanted}))
    if parsed["volumes"]:
        found = context.call("volume.prune", {"filters": wanted})
        freed += found.get("SpaceReclaimed") or 0
        volume.report(context, found, total=False)
    if parsed["all"]:
        wanted = {**wanted, "dangling": ["false"]}
    found = context.call("image.prune", {"filters": wanted})
    freed += found.get("SpaceReclaimed") or 0
    images.report_prune(context, found, total=False)
    context.out(f"Total reclaimed space: {human_size(freed)}")
    _ = lifecycle
    return 0


def _heading(context: Context, title: str, entries: list[str] | None) -> list[str]:
    if entries:
        context.out(title)
        return [*entries, ""]
    return []


def shutdown(context: Context, parsed: Parsed) -> int:
    """`bulkhead system shutdown`: workloads, engine, holder and command server end."""
    from bulkhead.cli.pyclient import stop_server
    from bulkhead.client.start import connect

    # After a kill or a stop of the engine alone, only another one can end what runs on.
    left = any(os.path.exists(context.home.in_run(f"{name}.sock")) for name in ("engine", "holder"))
    try:
        connection = connect(context.home, start=left)
    except Unavailable:
        context.err("the engine does not run")
    else:
        with connection:
            params: dict[str, Any] = {"timeout_s": parsed["timeout"], "force": parsed["force"]}
            connection.call("system.shutdown", params)
            while True:  # gone when the connection ends
                try:
                    connection.receive()
                except (Unavailable, OSError):
                    break
    stop_server(context.home.run)
    return 0


def doctor(context: Context, parsed: Parsed) -> int:
    """`bulkhead doctor`: 1 when something needed is missing."""
    checks = context.call("system.doctor", {})
    if not one(context, parsed, checks):
        colours = {"ok": "32", "warn": "33", "missing": "31"}
        paint = sys.stdout.isatty()
        rows = [[check["status"], check["check"], check.get("detail") or ""] for check in checks]
        for at, line in enumerate(table(["STATUS", "CHECK", "DETAIL"], rows).splitlines()):
            status = rows[at - 1][0] if at else ""
            if paint and status in colours:
                line = f"\x1b[{colours[status]}m{status}\x1b[0m{line[len(status) :]}"
            context.out(line)
            if at and status != "ok" and checks[at - 1].get("remedy"):
                context.out(f"{' ' * 10}remedy: {checks[at - 1]['remedy']}")
    return 1 if any(check["status"] == "missing" for check in checks) else 0


def serve(context: Context, parsed: Parsed) -> None:
    """`bulkhead serve`: become the engine."""
    from bulkhead.client.start import engine_environment

    command = [
        sys.executable, "-m", "bulkhead.engine",
        "--root", context.home.root, "--run-root", context.home.run,
    ]  # fmt: skip
    if parsed["log-level"]:
        command += ["--log-level", parsed["log-level"]]
    for address in parsed["host"] or ():
        command += ["--host", address]
    if parsed["tlsverify"]:
        command += ["--tlsverify"]
    for name in ("tlscacert", "tlscert", "tlskey"):
        if parsed[name]:
            command += [f"--{name}", os.path.abspath(parsed[name])]
    sys.stdout.flush()
    os.execve(command[0], command, engine_environment())


COMMANDS = {
    "system prune": Command(
        "system prune", "Remove unused data", prune,
        options=(
            Option("-a, --all", "bool", "Remove all unused images, not just dangling ones"),
            Option("--filter", "list", "Only those that match (label=KEY[=VALUE], until=TIME)"),
            FORCE_PRUNE,
            Option("--volumes", "bool", "Prune anonymous volumes"),
        ),
        examples=("bulkhead system prune -af --volumes",),
    ),
    "system shutdown": Command(
        "system shutdown", "Stop the engine and all that belongs to it", shutdown,
        options=(
            Option("-f, --force", "bool", "Kill running containers instead of stopping them"),
            Option("-t, --timeout", "int", "Seconds to wait for containers to stop", default=10),
        ),
        examples=("bulkhead system shutdown", "bulkhead system shutdown --force"),
    ),
    "doctor": Command(
        "doctor", "Check what this host offers, and how to mend what it lacks", doctor,
        options=(FORMAT, JSON), examples=("bulkhead doctor",),
    ),
    "serve": Command(
        "serve", "Run the engine in the foreground", serve,
        options=(
            Option("--log-level", "string", "How much to log",
                   choices=("debug", "info", "warning", "error")),
            Option("-H, --host", "list",
                   "Where to serve the Docker API: unix://PATH, tcp://ADDRESS:PORT with TLS"),
            Option("--tlsverify", "bool", "Demand certificates of clients (needed with tcp://)"),
            Option("--tlscacert", "string", "Certificates that sign those of clients"),
            Option("--tlscert", "string", "The server's certificate"),
            Option("--tlskey", "string", "The key of the server's certificate"),
        ),
        examples=(
            "bulkhead serve",
            "bulkhead --root /srv/bulkhead serve",
            "bulkhead serve --host unix:///run/bulkhead/docker.sock --host tcp://0.0.0.0:2376 "
            "--tlsverify --tlscacert ca.pem --tlscert cert.pem --tlskey key.pem",
        ),
    ),
}  # fmt: skip
