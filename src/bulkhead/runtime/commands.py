"""The commands of a container's life, as the command line has them."""

import json
import signal

from bulkhead.errors import Invalid
from bulkhead.runtime import console, extras, lifecycle, parent
from bulkhead.runtime.lifecycle import Options
from bulkhead.runtime.main import Context
from bulkhead.runtime.records import state as spec_state


def _options(context: Context) -> Options:
    return Options(
        fds=extras.preserved(context.number("preserve-fds")),
        keyring=not context.flag("no-new-keyring"),
        pivot=not context.flag("no-pivot"),
        pidfd_socket=context.text("pidfd-socket"),
        systemd=bool(context.general["systemd-cgroup"]),
        bundle=context.text("bundle") or ".",
        console_socket=context.text("console-socket"),
        pid_file=context.text("pid-file"),
        warn=context.warn,
    )


def create(context: Context) -> int:
    """Make a container; its program waits for `start`."""
    options = _options(context)
    context.records.path(context.arguments[0])
    _refuse_terminal(context, options, "create")
    lifecycle.create(context.records, context.arguments[0], options)
    return 0


def start(context: Context) -> int:
    """Run a created container's program."""
    lifecycle.start(context.records, context.arguments[0], context.warn)
    return 0


def run(context: Context) -> int:
    """create, start, and unless detached wait and delete; the program's exit code."""
    options = _options(context)
    identity = context.arguments[0]
    detach = context.flag("detach")
    _refuse_terminal(context, options, "run")
    if not detach and not context.flag("no-subreaper"):
        parent.current().adopt_orphans()
    record = lifecycle.create(context.records, identity, options)
    try:
        lifecycle.start(context.records, identity, context.warn)
    except BaseException:
        _remove(context, identity)
        raise
    if detach:
        return 0
    for master in options.master:
        console.relay(master)
    after = () if context.flag("keep") else (*context.again(), "delete", "--force", identity)
    return parent.current().follow(record.pid, after)


def _refuse_terminal(context: Context, options: Options, command: str) -> None:
    """A terminal without a console socket is carried by the process that the caller started."""
    if not options.console_socket:
        spec, _ = lifecycle.read_bundle(options.bundle)
        if spec.process is not None and spec.process.terminal:
            if command == "create":
                raise Invalid("process.terminal needs --console-socket with create")
            if context.flag("detach"):
                raise Invalid("process.terminal needs --console-socket with --detach")
            parent.current().require_caller("carries a terminal")


def _remove(context: Context, identity: str) -> None:
    lifecycle.delete(context.records, identity, force=True, warn=context.warn)


def state(context: Context) -> int:
    """Print a container's state."""
    record = context.records.load(context.arguments[0])
    shown = spec_state(record, context.records.status(record))
    shown |= {"rootfs": record.rootfs, "created": record.created, "owner": record.owner}
    print(json.dumps(shown, indent=2))
    return 0


def kill(context: Context) -> int:
    """Signal a container."""
    wanted = context.arguments[1] if len(context.arguments) > 1 else "SIGTERM"
    lifecycle.kill(
        context.records, context.arguments[0], _signal(wanted), everyone=context.flag("all")
    )
    return 0


def _signal(text: str) -> int:
    """A signal by number or name, with or without SIG."""
    if text.isascii() and text.isdigit() and 0 < int(text) < signal.NSIG:
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    for known in signal.Signals:
        if known.name == name:
            return int(known)
    raise Invalid(f"unknown signal {text!r}")


def delete(context: Context) -> int:
    """Remove a container."""
    lifecycle.delete(
        context.records, context.arguments[0], force=context.flag("force"), warn=context.warn
    )
    return 0
