"""`machine create ls run`: VMs with the engine inside, and `--boundary vm:NAME`."""

import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.commands import vm
from bulkhead.cli.options import FORMAT_LONG, JSON, Option, Parsed
from bulkhead.cli.output import Row
from bulkhead.errors import BulkheadError, NotFound, Unsupported

PREFIX = "vm:"
"""What `--boundary` begins with when a machine's name follows."""
DEFAULT_IMAGE = "debian:bookworm"


def create(context: Context, parsed: Parsed) -> None:
    """`bulkhead machine create NAME`."""
    parsed.values.setdefault("image", DEFAULT_IMAGE)
    parsed.values.setdefault("cpus", min(2, os.cpu_count() or 1) * 1_000_000_000)
    vm.make(context, parsed, engine=True)


def ls(context: Context, parsed: Parsed) -> None:
    """`bulkhead machine ls`."""
    vm.MACHINES.show(context, parsed, vm.rows(one for one in machines(context)))


def machines(context: Context) -> list[dict[str, Any]]:
    """The machines there are."""
    return [one for one in context.call("vm.list") if one["Engine"]]


def run(context: Context, parsed: Parsed) -> int:
    """`bulkhead machine run NAME ARGS…`."""
    name, *argv = parsed.args
    return inside(context, name, argv)


def inside(
    context: Context,
    name: str,
    argv: Sequence[str],
    *,
    fds: tuple[int, int, int] = (0, 1, 2),
    tenant: str = "",
) -> int:
    """Run `bulkhead ARGV` by the engine of machine `name`, for `tenant`; its exit code."""
    params: dict[str, Any] = {"id": name, "argv": list(argv)}
    if tenant:
        params["tenant"] = tenant
    sys.stdout.flush()
    if fds == (0, 1, 2) and os.isatty(0) and os.isatty(1):
        from bulkhead.cli.terminal import raw, size

        params["tty"] = True
        params["rows"], params["columns"] = size(0)
        with raw(0):
            return int(context.call("machine.run", params, fds)["StatusCode"])
    with context.connect() as connection:
        return int(connection.call("machine.run", params, fds)["StatusCode"])


def captured(context: Context, name: str, argv: Sequence[str]) -> tuple[int, str]:
    """The same without input; its exit code and output."""
    reading, writing = os.pipe()
    data: list[bytes] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as file:
            data.append(file.read())

    reader = threading.Thread(target=read)
    reader.start()
    null = os.open(os.devnull, os.O_RDWR)
    try:
        code = inside(context, name, argv, fds=(null, writing, null))
    finally:
        os.close(null)
        os.close(writing)
        reader.join()
    return code, data[0].decode("utf-8", "replace")


def tree(context: Context, above: Sequence[Row], *, every: bool, plain: bool) -> list[Row]:
    """The rows of `ps` with those of each running machine below its own."""
    running = {one["Name"] for one in machines(context) if one["State"] == "running"}
    found: list[Row] = []
    for row in above:
        found.append(row)
        if row["Names"] not in running:
            continue
        code, text = captured(context, row["Names"], ["ps", "--format=json", *["-a"] * every])
        if code != 0:
            context.err(f"bulkhead: {row['Names']}: its engine does not answer")
            continue
        for line in text.splitlines():
            inner = {**dict.fromkeys(row, ""), **json.loads(line), "_labels": {}}
            mark = f"{row['Names']}/" if plain else "└─ "
            found.append({**inner, "Names": mark + inner["Names"]})
    return found


def run_image(context: Context, name: str, word: str, parsed: Parsed) -> int:
    """`run` and `create --boundary vm:NAME …`: the image goes there if it is missing, ports too."""
    ports = [_port(text) for text in parsed["publish"]]
    image = parsed.args[0]
    if captured(context, name, ["image", "inspect", image])[0] != 0:
        _send(context, name, image)
    if ports:
        _publish(context, name, ports)
    given = len(parsed.words) - len(parsed.args)
    words = [word, *_without(parsed.words[:given]), *parsed.words[given:]]
    return inside(context, name, words, tenant=parsed["tenant"] or "")


def _without(options: Sequence[str]) -> list[str]:
    """The options without --boundary."""
    found: list[str] = []
    skip = False
    for word in options:
        if not skip and not word.startswith("--boundary="):
            skip = word == "--boundary"
            if not skip:
                found.append(word)
        else:
            skip = False
    return found


def _port(text: str) -> tuple[str, str]:
    """(port, protocol) of PORT:PORT[/PROTOCOL]; Unsupported for other forms."""
    port, _, target = text.rpartition(":")
    if not port.isdecimal():
        raise Unsupported(
            f"--publish {text}: in a machine a port is published as PORT:PORT, on the host and the "
            "machine alike"
        )
    return port, target.partition("/")[2] or "tcp"


def _publish(context: Context, name: str, wanted: Sequence[tuple[str, str]]) -> None:
    """Lead the host's ports to the same ports of the machine, beside those there are."""
    found = context.call("workload.inspect", {"id": name})["HostConfig"].get("PortBindings") or {}
    for port, protocol in wanted:
        found.setdefault(f"{port}/{protocol}", [{"HostIp": "", "HostPort": port}])
    context.call("workload.update", {"id": name, "body": {"PortBindings": found}})


def _send(context: Context, name: str, image: str) -> None:
    """Copy an image of the host's into the machine; NotFound if it is not here either."""
    reading, writing = os.pipe()
    failed: list[BulkheadError] = []

    def save() -> None:
        try:
            with context.connect() as connection:
                connection.call("image.save", {"names": [image]}, (writing,))
        except BulkheadError as error:
            failed.append(error)
        finally:
            os.close(writing)

    saver = threading.Thread(target=save)
    saver.start()
    null = os.open(os.devnull, os.O_RDWR)
    try:
        code = inside(context, name, ["load"], fds=(reading, null, 2))
    finally:
        os.close(null)
        os.close(reading)
        saver.join()
    if failed and isinstance(failed[0], NotFound):
        raise NotFound(f"{failed[0].message}: neither here nor in the machine {name}")
    if failed:
        raise failed[0]
    if code != 0:
        raise NotFound(f"the image {image} could not be copied into the machine {name}")


COMMANDS = {
    "machine create": Command(
        "machine create", "Create a VM with the engine inside", create, arguments="NAME",
        options=vm.create_options(),
        examples=("bulkhead machine create --memory 2g --start tenant1",), least=1, most=1,
    ),
    "machine ls": Command(
        "machine ls", "List VMs with the engine inside", ls,
        options=(FORMAT_LONG, JSON, Option("-q, --quiet", "bool", "Only display ids")),
        examples=("bulkhead machine ls",),
    ),
    "machine run": Command(
        "machine run", "Run a command of bulkhead's by the engine in a machine", run,
        arguments="MACHINE COMMAND [ARG...]", interspersed=False,
        examples=("bulkhead machine run tenant1 ps -a",), least=2, most=None,
        completes="container",
    ),
}  # fmt: skip
