"""`run` and `create`."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from bulkhead.cli.body import create_body
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Parsed, UsageError
from bulkhead.cli.run_options import CREATE, RUN
from bulkhead.cli.session import Session, Stopped, attached_fds, detach_keys, require_terminal
from bulkhead.errors import BulkheadError, Conflict, NotFound, Unavailable

_ATTEMPTS = 5
"""How often an engine is looked for after one was lost."""


def _pull(context: Context, image: str, parsed: Parsed, *, quiet: bool) -> None:
    from bulkhead.cli.pulling import pull

    pull(context, image, platform=parsed["platform"], quiet=quiet, stream=sys.stderr)


def _ensure_image(context: Context, parsed: Parsed, error: NotFound | None = None) -> None:
    """--pull: always before, missing after a NotFound for the image, never: raise it."""
    image, policy = parsed.args[0], parsed["pull"]
    if error is None:
        if policy == "always":
            _pull(context, image, parsed, quiet=parsed["quiet"])
        return
    text = error.message.lower()
    if policy == "never" or not (
        text.startswith("no such image") or "does not match the specified platform" in text
    ):
        raise error
    if not parsed["quiet"]:
        shown = image if ":" in image.rpartition("/")[2] or "@" in image else f"{image}:latest"
        context.err(f"Unable to find image '{shown}' locally")
    _pull(context, image, parsed, quiet=parsed["quiet"])


def _request(context: Context, parsed: Parsed) -> dict[str, Any]:
    """The parameters that create and run share."""
    params: dict[str, Any] = {"body": create_body(parsed, context.environ)}
    if parsed["name"]:
        params["name"] = parsed["name"]
    if parsed["platform"]:
        params["body"]["Platform"] = parsed["platform"]
    boundary = parsed["boundary"] or parsed["runtime"]
    if boundary and boundary not in ("runc", "crun", "io.containerd.runc.v2"):
        params["boundary"] = boundary
    if parsed["kernel"]:
        params["kernel"] = parsed["kernel"]
    if parsed["tenant"]:
        params["body"]["Labels"]["bulkhead.tenant"] = parsed["tenant"]
    cidfile = parsed["cidfile"]
    if cidfile and os.path.lexists(cidfile):
        raise Conflict(f"container ID file found, make sure the other container isn't running "
                       f"or delete {cidfile}")  # fmt: skip
    return params


def _write_cidfile(parsed: Parsed, identity: str) -> None:
    path = parsed["cidfile"]
    if path:
        with open(path, "x", encoding="ascii") as file:
            file.write(identity)


def _dry_run(context: Context, params: dict[str, Any]) -> int:
    plan = context.call("workload.plan", params)
    if context.json:
        from bulkhead.cli.output import dump

        context.out(dump(plan))
        return 0
    for step in plan["steps"]:
        context.out(step if isinstance(step, str) else str(step))
    return 0


def _in_machine(context: Context, word: str, parsed: Parsed) -> int:
    from bulkhead.cli.commands.machine import run_image

    return run_image(context, parsed["boundary"].removeprefix("vm:"), word, parsed)


def create(context: Context, parsed: Parsed) -> int:
    """`bulkhead create`: make a container, print its id."""
    if parsed["boundary"].startswith("vm:"):
        return _in_machine(context, "create", parsed)
    params = _request(context, parsed)
    body = params["body"]
    streams = _streams(parsed)
    body["AttachStdin"], body["AttachStdout"], body["AttachStderr"] = streams
    body["StdinOnce"] = bool(parsed["interactive"] and streams[0])
    if parsed["dry-run"]:
        return _dry_run(context, params)
    identity = _create(context, parsed, params)
    context.out(identity)
    return 0


def _create(context: Context, parsed: Parsed, params: dict[str, Any]) -> str:
    _ensure_image(context, parsed)
    try:
        made = context.call("workload.create", params)
    except NotFound as error:
        _ensure_image(context, parsed, error)
        made = context.call("workload.create", params)
    _created(context, parsed, made)
    identity: str = made["Id"]
    return identity


def _streams(parsed: Parsed) -> tuple[bool, bool, bool]:
    """Which of stdin, stdout and stderr to attach: -a's, else output, and input with -i."""
    chosen = [name.lower() for name in parsed["attach"]]
    for name in chosen:
        if name not in ("stdin", "stdout", "stderr"):
            raise UsageError(f'invalid argument "{name}" for "-a, --attach" flag: valid streams '
                             "are STDIN, STDOUT and STDERR")  # fmt: skip
    if chosen:
        return "stdin" in chosen, "stdout" in chosen, "stderr" in chosen
    return bool(parsed["interactive"]), True, True


def run(context: Context, parsed: Parsed) -> int:
    """`bulkhead run`: create, start, attach, wait; the program's exit code."""
    if parsed["boundary"].startswith("vm:"):
        return _in_machine(context, "run", parsed)
    params = _request(context, parsed)
    body = params["body"]
    if parsed["dry-run"]:
        return _dry_run(context, params)
    if parsed["detach"]:
        return _detached(context, parsed, params)
    tty = bool(parsed["tty"])
    stdin, stdout, stderr = _streams(parsed)
    require_terminal(tty, stdin)
    body["AttachStdin"], body["AttachStdout"], body["AttachStderr"] = stdin, stdout, stderr
    if stdin and parsed["interactive"]:
        body["StdinOnce"] = True
    stderr = stderr and not tty  # a terminal has one output
    params["attach"] = [stdin, stdout, stderr]
    if tty:
        from bulkhead.cli.terminal import size

        params["tty"] = True
        params["rows"], params["columns"] = size(0)
    if parsed["detach-keys"]:
        params["detach_keys"] = detach_keys(parsed["detach-keys"])
    _ensure_image(context, parsed)
    fds = attached_fds(stdin, stdout, stderr)
    try:
        return _attached(context, parsed, params, fds)
    except NotFound as error:
        _ensure_image(context, parsed, error)
        return _attached(context, parsed, params, fds)


def _attached(context: Context, parsed: Parsed, params: dict[str, Any], fds: list[int]) -> int:
    session = Session(
        context,
        tty=bool(parsed["tty"]),
        stdin=params["attach"][0],
        proxy=bool(parsed["sig-proxy"]),
    )

    def item(value: Any) -> None:
        if "Id" in value:
            _created(context, parsed, value)

    session.on_item = item
    with session.listening():
        try:
            result = session.run(context.engine, "workload.run", params, fds)
        except Stopped as stop:
            return 128 + stop.number
        except Unavailable as error:
            if session.target is None:
                raise
            result = attach_again(
                context, session, error, params["attach"], params.get("detach_keys", "")
            )
    return finish(context, result)


def finish(context: Context, result: dict[str, Any]) -> int:
    """The exit code that a run, attach or start -a result means; prints what must be said."""
    if result.get("Reason") == "detached":
        return 0
    error = result.get("Error")
    if isinstance(error, dict):
        error = error.get("Message")
    if error:
        context.err(f"bulkhead: {error}")
    code = result.get("StatusCode", 0)
    if code is None:
        context.err("bulkhead: the container's exit code is unknown: its record was lost")
        return 125
    return int(code)


def _status(context: Context, identity: str) -> str:
    """The workload's, from the engine that comes next; "" if it is gone (--rm)."""
    for attempt in range(_ATTEMPTS):
        context.close()
        try:
            found = context.call("workload.inspect", {"id": identity})
            return str(found["State"]["Status"])
        except NotFound:
            break
        except Unavailable:
            # A process that is being killed may still accept, for a moment.
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.1 * (attempt + 1))
    return ""


def attach_again(
    context: Context,
    session: Session,
    error: BulkheadError,
    attach: Sequence[bool],
    keys: str = "",
) -> dict[str, Any]:
    """The engine went away while the workload runs on: connect to it again at the next engine.

    The streams miss nothing if that does not take long (keeper/pump.py). Says what happened; raises
    `error` if the workload had not begun.
    """
    assert session.target is not None
    identity = session.target[1]
    if _status(context, identity) == "created":
        raise error
    context.err(
        f"bulkhead: the engine was lost and started again; container {identity[:12]} goes on, "
        "its output too"
    )
    params: dict[str, Any] = dict(zip(("stdin", "stdout", "stderr"), attach, strict=True))
    params.update({"id": identity, "again": True, "detach_keys": keys})
    try:
        result: dict[str, Any] = session.run(
            context.engine,
            "workload.attach",
            params,
            attached_fds(*attach),
            then=lambda: session.resize(context.engine) if session.tty else None,
        )
        if result.get("Reason") == "gone":
            wanted = {"id": identity, "condition": "not-running"}
            result = session.run(context.engine, "workload.wait", wanted, [])
    except Stopped as stop:
        return {"StatusCode": 128 + stop.number}
    except NotFound:
        raise error from None
    return result


def _detached(context: Context, parsed: Parsed, params: dict[str, Any]) -> int:
    if parsed["attach"]:
        raise UsageError("conflicting options: cannot specify both --attach and --detach")
    params["detach"] = True
    _ensure_image(context, parsed)
    try:
        identity = _start_detached(context, parsed, params)
    except NotFound as error:
        _ensure_image(context, parsed, error)
        identity = _start_detached(context, parsed, params)
    context.out(identity)
    return 0


def _start_detached(context: Context, parsed: Parsed, params: dict[str, Any]) -> str:
    identity = ""
    for item in context.stream("workload.run", params):
        if "Id" in item:
            identity = item["Id"]
            _created(context, parsed, item)
    return identity


def _created(context: Context, parsed: Parsed, item: dict[str, Any]) -> None:
    for warning in item.get("Warnings") or ():
        context.err(f"WARNING: {warning}")
    _write_cidfile(parsed, item["Id"])


_EXAMPLES = (
    "bulkhead run --rm -it debian:bookworm bash",
    "bulkhead run -d --name web -p 8080:80 nginx",
    "bulkhead run --rm -v ./data:/data -m 64m --cpus 0.5 debian:bookworm du -sh /data",
    "bulkhead run --dry-run debian:bookworm true",
)

COMMANDS = {
    "run": Command(
        "run",
        "Create and run a new container from an image",
        run,
        arguments="IMAGE [COMMAND] [ARG...]",
        options=RUN,
        examples=_EXAMPLES,
        least=1,
        most=None,
        interspersed=False,
        completes="image",
    ),
    "create": Command(
        "create",
        "Create a new container",
        create,
        arguments="IMAGE [COMMAND] [ARG...]",
        options=CREATE,
        examples=("bulkhead create --name job debian:bookworm true", "bulkhead start -a job"),
        least=1,
        most=None,
        interspersed=False,
        completes="image",
    ),
}
