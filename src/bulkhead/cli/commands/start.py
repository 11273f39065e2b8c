"""`start`."""

from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import DETACH_KEYS, SIG_PROXY, Option, Parsed, UsageError
from bulkhead.errors import Unavailable, Unsupported


def start(context: Context, parsed: Parsed) -> int:
    """`bulkhead start`: with -a or -i one container, attached before it starts."""
    if parsed["checkpoint"]:
        raise Unsupported("--checkpoint: checkpoints are not supported")
    if not parsed["attach"] and not parsed["interactive"]:

        def act(name: str) -> str:
            context.call("workload.start", {"id": name})
            return name

        return context.each(parsed.args, act)
    if len(parsed.args) > 1:
        raise UsageError("you cannot start and attach multiple containers at once", code=1)
    return _attached(context, parsed)


def _attached(context: Context, parsed: Parsed) -> int:
    from bulkhead.cli.commands.run import attach_again, finish
    from bulkhead.cli.session import (
        Session,
        Stopped,
        attached_fds,
        detach_keys,
        require_terminal,
    )

    found = context.call("workload.inspect", {"id": parsed.args[0]})
    config, identity = found["Config"], found["Id"]
    tty = bool(config.get("Tty"))
    stdin = bool(parsed["interactive"] and config.get("OpenStdin"))
    require_terminal(tty, stdin)
    stderr = not tty
    params: dict[str, Any] = {
        "id": identity, "stdin": stdin, "stdout": True, "stderr": stderr, "logs": False,
    }  # fmt: skip
    if parsed["detach-keys"]:
        params["detach_keys"] = detach_keys(parsed["detach-keys"])
    session = Session(
        context,
        tty=tty,
        stdin=stdin,
        proxy=bool(parsed["sig-proxy"]),
        target=("workload", identity),
    )
    started: list[int] = []

    def then() -> None:
        started.append(context.engine.send("workload.start", {"id": identity}))
        if tty:
            session.resize(context.engine)

    session.watch = started
    with session.listening():
        try:
            result = session.run(
                context.engine,
                "workload.attach",
                params,
                attached_fds(stdin, True, stderr),
                then=then,
            )
        except Stopped as stop:
            return 128 + stop.number
        except Unavailable as error:
            keys = params.get("detach_keys", "")
            result = attach_again(context, session, error, (stdin, True, stderr), keys)
    if result.get("Reason") == "detached":
        return 0
    if result.get("StatusCode") is None:
        result = context.call("workload.wait", {"id": identity, "condition": "not-running"})
    return finish(context, result)


COMMANDS = {
    "start": Command(
        "start", "Start one or more stopped containers", start,
        arguments="CONTAINER [CONTAINER...]",
        options=(
            Option("-a, --attach", "bool", "Attach STDOUT/STDERR and forward signals"),
            Option("--checkpoint", "string", "Refused: not supported", hidden=True),
            DETACH_KEYS,
            Option("-i, --interactive", "bool", "Attach container's STDIN"),
            SIG_PROXY,
        ),
        examples=("bulkhead start web", "bulkhead start -ai job"),
        least=1, most=None, completes="container",
    )
}  # fmt: skip
