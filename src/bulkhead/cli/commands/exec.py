"""`exec` and `attach`."""

import os
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import DETACH_KEYS, SIG_PROXY, Option, Parsed
from bulkhead.cli.session import (
    Session,
    Stopped,
    attached_fds,
    detach_keys,
    require_terminal,
)
from bulkhead.errors import Conflict, Unavailable


def _exec_body(context: Context, parsed: Parsed) -> dict[str, Any]:
    """docker's ExecConfig."""
    attached = not parsed["detach"]
    body: dict[str, Any] = {
        "Cmd": parsed.args[1:],
        "AttachStdin": bool(parsed["interactive"] and attached),
        "AttachStdout": attached,
        "AttachStderr": attached,
        "Tty": bool(parsed["tty"]),
    }
    if parsed["env"] or parsed["env-file"]:
        from bulkhead.cli.body import environment

        body["Env"] = environment(parsed["env-file"], parsed["env"], context.environ)
    for flag, name in (("user", "User"), ("workdir", "WorkingDir"), ("privileged", "Privileged")):
        if parsed[flag]:
            body[name] = parsed[flag]
    return body


def exec_command(context: Context, parsed: Parsed) -> int:
    """`bulkhead exec`: the program's exit code."""
    body = _exec_body(context, parsed)
    tty, stdin = body["Tty"], body["AttachStdin"]
    require_terminal(tty, stdin)
    stderr = body["AttachStderr"] = body["AttachStderr"] and not tty
    identity = context.call("exec.create", {"id": parsed.args[0], "body": body})["Id"]
    params: dict[str, Any] = {"id": identity, "detach": bool(parsed["detach"]), "tty": tty}
    if parsed["detach"]:
        context.call("exec.start", params)
        return 0
    if tty:
        from bulkhead.cli.terminal import size

        params["rows"], params["columns"] = size(0)
    if parsed["detach-keys"]:
        params["detach_keys"] = detach_keys(parsed["detach-keys"])
    session = Session(context, tty=tty, stdin=stdin, proxy=False, target=("exec", identity))
    try:
        result = session.run(
            context.engine, "exec.start", params, attached_fds(stdin, True, stderr)
        )
    except Stopped as stop:
        return 128 + stop.number
    if result.get("Reason") == "detached":
        return 0
    code = result.get("ExitCode")
    if code is None:
        code = context.call("exec.inspect", {"id": identity}).get("ExitCode")
    return int(code or 0)


def attach(context: Context, parsed: Parsed) -> int:
    """`bulkhead attach`: the container's exit code."""
    from bulkhead.cli.commands.run import attach_again, finish

    found = context.call("workload.inspect", {"id": parsed.args[0]})
    state, config = found["State"], found["Config"]
    if not state.get("Running"):
        raise Conflict("You cannot attach to a stopped container, start it first")
    if state.get("Paused"):
        raise Conflict("You cannot attach to a paused container, unpause it first")
    if state.get("Restarting"):
        raise Conflict("You cannot attach to a restarting container, wait until it is running")
    tty = bool(config.get("Tty"))
    stdin = bool(config.get("OpenStdin")) and not parsed["no-stdin"]
    if stdin and tty and not os.isatty(0):
        require_terminal(tty, stdin)
    params: dict[str, Any] = {
        "id": found["Id"], "stdin": stdin, "stdout": True, "stderr": not tty, "logs": False,
    }  # fmt: skip
    if parsed["detach-keys"]:
        params["detach_keys"] = detach_keys(parsed["detach-keys"])
    session = Session(
        context,
        tty=tty,
        stdin=stdin,
        proxy=bool(parsed["sig-proxy"]),
        target=("workload", found["Id"]),
    )
    with session.listening():
        try:
            result = session.run(
                context.engine,
                "workload.attach",
                params,
                attached_fds(stdin, True, not tty),
                then=(lambda: session.resize(context.engine)) if tty else None,
            )
        except Stopped as stop:
            return 128 + stop.number
        except Unavailable as error:
            keys = params.get("detach_keys", "")
            result = attach_again(context, session, error, (stdin, True, not tty), keys)
    if result.get("Reason") == "detached":
        return 0
    if result.get("StatusCode") is None:
        result = context.call("workload.wait", {"id": found["Id"], "condition": "not-running"})
    return finish(context, result)


COMMANDS = {
    "exec": Command(
        "exec", "Execute a command in a running container", exec_command,
        arguments="CONTAINER COMMAND [ARG...]",
        options=(
            Option("-d, --detach", "bool", "Detached mode: run command in the background"),
            DETACH_KEYS,
            Option("-e, --env", "list", "Set environment variables"),
            Option("--env-file", "list", "Read in a file of environment variables",
                   complete="file"),
            Option("-i, --interactive", "bool", "Keep STDIN open even if not attached"),
            Option("--privileged", "bool", "Give extended privileges to the command"),
            Option("-t, --tty", "bool", "Allocate a pseudo-TTY"),
            Option("-u, --user", "string", "Username or UID (<name|uid>[:<group|gid>])"),
            Option("-w, --workdir", "string", "Working directory inside the container"),
        ),
        examples=("bulkhead exec -it web bash", "bulkhead exec -u 33 web id"),
        least=2, most=None, interspersed=False, completes="container",
    ),
    "attach": Command(
        "attach", "Attach local standard streams to a running container", attach,
        arguments="CONTAINER",
        options=(
            DETACH_KEYS,
            Option("--no-stdin", "bool", "Do not attach STDIN"),
            SIG_PROXY,
        ),
        examples=("bulkhead attach web",),
        least=1, most=1, completes="container",
    ),
}  # fmt: skip
