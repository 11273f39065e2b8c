"""`registry serve`: become the registry."""

import os
import sys

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed


def serve(context: Context, parsed: Parsed) -> None:
    """`bulkhead registry serve`."""
    from bulkhead.client.start import engine_environment

    command = [sys.executable, "-m", "bulkhead.depot", "--root", context.home.root]
    command += ["--listen", parsed["listen"]]
    for name in ("storage", "users", "tlscert", "tlskey"):
        if parsed[name]:
            command += [f"--{name}", os.path.abspath(parsed[name])]
    for name in ("proxy", "log-level"):
        if parsed[name]:
            command += [f"--{name}", parsed[name]]
    for name in ("read-only", "insecure"):
        if parsed[name]:
            command.append(f"--{name}")
    sys.stdout.flush()
    os.execve(command[0], command, engine_environment())


COMMANDS = {
    "registry serve": Command(
        "registry serve", "Serve an OCI registry from the content store", serve,
        options=(
            Option("--insecure", "bool", "Plain HTTP also beyond loopback"),
            Option("--listen", "string", "Where to listen, as ADDRESS:PORT",
                   default="127.0.0.1:5000"),
            Option("--log-level", "string", "What to log",
                   choices=("debug", "info", "warning", "error")),
            Option("--proxy", "string", "Pull-through cache of this registry (docker.io, …)"),
            Option("--read-only", "bool", "Refuse pushes and deletions"),
            Option("--storage", "string", "A folder of its own instead of the engine's store",
                   complete="file"),
            Option("--tlscert", "string", "Certificate (PEM)", complete="file"),
            Option("--tlskey", "string", "Its key (PEM)", complete="file"),
            Option("--users", "string", "File of NAME:PASSWORD lines who may use it",
                   complete="file"),
        ),
        examples=(
            "bulkhead registry serve",
            "bulkhead registry serve --proxy docker.io --listen 127.0.0.1:5001",
            "bulkhead registry serve --listen :443 --tlscert r.crt --tlskey r.key --users users",
        ),
    ),
}  # fmt: skip
