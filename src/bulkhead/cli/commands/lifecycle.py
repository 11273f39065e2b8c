"""`stop restart kill pause unpause rm wait rename`, and `container prune`."""

from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORCE_PRUNE, Option, Parsed
from bulkhead.cli.output import filters
from bulkhead.cli.units import human_size
from bulkhead.errors import NotFound

_SIGNAL = Option("-s, --signal", "string", "Signal to send to the container")
_TIMEOUT = Option("-t, --timeout", "int", "Seconds to wait before killing the container")
_TIME = Option("--time", "int", "Seconds to wait before killing the container", hidden=True)


def _many(context: Context, parsed: Parsed, method: str, **extra: Any) -> int:
    def act(name: str) -> str:
        context.call(method, {"id": name, **extra})
        return name

    return context.each(parsed.args, act)


def _ending(parsed: Parsed) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if parsed["signal"]:
        extra["signal"] = parsed["signal"]
    for name in ("timeout", "time"):
        if name in parsed:
            extra["timeout_s"] = parsed[name]
    return extra


def stop(context: Context, parsed: Parsed) -> int:
    """`bulkhead stop`."""
    return _many(context, parsed, "workload.stop", **_ending(parsed))


def restart(context: Context, parsed: Parsed) -> int:
    """`bulkhead restart`."""
    return _many(context, parsed, "workload.restart", **_ending(parsed))


def kill(context: Context, parsed: Parsed) -> int:
    """`bulkhead kill`."""
    return _many(context, parsed, "workload.kill", signal=parsed["signal"])


def pause(context: Context, parsed: Parsed) -> int:
    """`bulkhead pause`."""
    return _many(context, parsed, "workload.pause")


def unpause(context: Context, parsed: Parsed) -> int:
    """`bulkhead unpause`."""
    return _many(context, parsed, "workload.unpause")


def rm(context: Context, parsed: Parsed) -> int:
    """`bulkhead rm`: with -f, what is not there is no error, as in docker."""

    def act(name: str) -> str | None:
        try:
            context.call(
                "workload.remove",
                {"id": name, "force": parsed["force"], "volumes": parsed["volumes"]},
            )
        except NotFound as error:
            if not parsed["force"]:
                raise
            context.err(f"bulkhead: {error.message}")
            return None
        return name

    if parsed["link"]:
        from bulkhead.errors import Unsupported

        raise Unsupported("legacy links are not supported: there is none to remove")
    return context.each(parsed.args, act)


def wait(context: Context, parsed: Parsed) -> int:
    """`bulkhead wait`: prints exit codes."""

    def act(name: str) -> str:
        found = context.call("workload.wait", {"id": name, "condition": "not-running"})
        return str(found["StatusCode"])

    return context.each(parsed.args, act)


def rename(context: Context, parsed: Parsed) -> None:
    """`bulkhead rename OLD NEW`."""
    context.call("workload.rename", {"id": parsed.args[0], "name": parsed.args[1]})


def prune(context: Context, parsed: Parsed) -> int:
    """`bulkhead container prune`."""
    if not parsed["force"] and not context.confirm(
        "WARNING! This will remove all stopped containers."
    ):
        return 1
    report(context, context.call("workload.prune", {"filters": filters(parsed)}))
    return 0


def report(context: Context, found: dict[str, Any]) -> None:
    """What a container prune removed."""
    deleted = found.get("ContainersDeleted") or []
    if deleted:
        context.out("Deleted Containers:")
        for identity in deleted:
            context.out(identity)
        context.out("")
    context.out(f"Total reclaimed space: {human_size(found.get('SpaceReclaimed') or 0)}")


def _command(words: str, summary: str, act: Any, *options: Option, example: str) -> Command:
    return Command(
        words, summary, act, arguments="CONTAINER [CONTAINER...]", options=options,
        examples=(example,), least=1, most=None, completes="container",
    )  # fmt: skip


COMMANDS = {
    "stop": _command(
        "stop", "Stop one or more running containers", stop, _SIGNAL, _TIMEOUT, _TIME,
        example="bulkhead stop -t 3 web",
    ),
    "restart": _command(
        "restart", "Restart one or more containers", restart, _SIGNAL, _TIMEOUT, _TIME,
        example="bulkhead restart web db",
    ),
    "kill": _command(
        "kill", "Kill one or more running containers", kill,
        Option("-s, --signal", "string", "Signal to send to the container", default="KILL"),
        example="bulkhead kill -s HUP web",
    ),
    "pause": _command(
        "pause", "Pause all processes within one or more containers", pause,
        example="bulkhead pause web",
    ),
    "unpause": _command(
        "unpause", "Unpause all processes within one or more containers", unpause,
        example="bulkhead unpause web",
    ),
    "rm": _command(
        "rm", "Remove one or more containers", rm,
        Option("-f, --force", "bool", "Force the removal of a running container (uses SIGKILL)"),
        Option("-l, --link", "bool", "Refused: legacy links are not supported"),
        Option("-v, --volumes", "bool", "Remove anonymous volumes associated with the container"),
        example="bulkhead rm -fv web",
    ),
    "wait": _command(
        "wait", "Block until one or more containers stop, then print their exit codes", wait,
        example="bulkhead wait job",
    ),
    "rename": Command(
        "rename", "Rename a container", rename, arguments="CONTAINER NEW_NAME", least=2, most=2,
        examples=("bulkhead rename web old-web",), completes="container",
    ),
    "container prune": Command(
        "container prune", "Remove all stopped containers", prune,
        options=(
            Option("--filter", "list", "Only those that match (until=TIME, label=KEY[=VALUE])"),
            FORCE_PRUNE,
        ),
        examples=("bulkhead container prune -f --filter until=24h",),
    ),
}  # fmt: skip
