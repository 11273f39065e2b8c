"""exec: one more process in a container."""

from contextlib import ExitStack

import msgspec

from bulkhead.boundaries.container_extras import Extras
from bulkhead.boundary.seam import Stdio
from bulkhead.errors import Conflict, Invalid, NotFound, Unsupported
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Capabilities, Process, User, validate_process
from bulkhead.runtime import console, extras, lifecycle, parent
from bulkhead.runtime.driving import drive
from bulkhead.runtime.main import Context
from bulkhead.runtime.records import Record
from bulkhead.runtime.records import state as spec_state
from bulkhead.runtime.spawner import PTY, Spawner


def exec_(context: Context) -> int:
    """Run a process in a container and wait for it; its exit code (0 if detached)."""
    _refuse(context)
    identity, *words = context.arguments
    record = context.records.load(identity)
    status = context.records.status(record)
    if status == "stopped":
        raise Conflict("cannot exec in a stopped container")
    if status == "paused" and not context.flag("ignore-paused"):
        raise Conflict("cannot exec in a paused container (use --ignore-paused to override)")
    process = _process(context, record, words)
    detach = context.flag("detach")
    socket = context.text("console-socket")
    if detach and process.terminal and not socket:
        raise Invalid("a detached process with a terminal needs --console-socket")
    fds = extras.preserved(context.number("preserve-fds"))
    if process.terminal and not socket:
        parent.current().require_caller("carries a terminal")
    if not detach:
        parent.current().adopt_orphans()
    masters: list[OwnedFd] = []

    def take(_pid: int, master: OwnedFd) -> bool:
        if socket:
            console.send(socket, int(master))
        else:
            masters.append(master.duplicate())
        return False

    with ExitStack() as undo:
        spawner = Spawner()
        spawner.notes[PTY] = take
        stdio = Stdio(terminal=True) if process.terminal else lifecycle.streams(undo)
        container = lifecycle.load(context.records, record, spawner)
        told = spec_state(record, status)
        listener = extras.listener(container.bundle.spec, told, spawner, undo)
        also = Extras(keep_numbers=True, listener=listener)
        launched = drive(container.exec("exec", process, stdio, fds, also))
    if context.text("pidfd-socket"):
        extras.send_pidfd(context.text("pidfd-socket"), launched.pid)
    if context.text("pid-file"):
        lifecycle.write_pid(context.text("pid-file"), launched.pid)
    if detach:
        return 0
    for master in masters:
        console.relay(master)
    return parent.current().follow(launched.pid, ())


def _refuse(context: Context) -> None:
    if context.texts("cgroup"):
        raise Unsupported("--cgroup is not supported: a process joins the container's own group")


def _process(context: Context, record: Record, words: list[str]) -> Process:
    path = context.text("process")
    if path:
        process = _read(path)
    else:
        process = _like_the_first(context, record, words)
    process = lifecycle.usable(process)
    validate_process(process)
    return process


def _read(path: str) -> Process:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Process)
    except FileNotFoundError:
        raise NotFound(f"--process {path}: no such file") from None
    except msgspec.MsgspecError as error:
        raise Invalid(f"--process {path}: {error}") from None


def _like_the_first(context: Context, record: Record, words: list[str]) -> Process:
    """The container's own process with another command, changed as the options say."""
    if not words:
        raise Invalid("exec needs a command, or --process with a file")
    first = context.records.spec(record.id).process
    assert first is not None
    return msgspec.structs.replace(
        first,
        args=words,
        terminal=context.flag("tty"),
        env=[*first.env, *context.texts("env")],
        cwd=context.text("cwd") or first.cwd,
        user=_user(context, first.user),
        apparmor_profile=context.text("apparmor") or first.apparmor_profile,
        selinux_label=context.text("process-label") or first.selinux_label,
        no_new_privileges=first.no_new_privileges or context.flag("no-new-privs"),
        capabilities=_capabilities(first, context.texts("cap")),
    )


def _capabilities(first: Process, added: list[str]) -> Capabilities | None:
    sets = first.capabilities
    if sets is None or not added:
        return sets
    names = [name if name.startswith("CAP_") else f"CAP_{name}" for name in map(str.upper, added)]
    return msgspec.structs.replace(
        sets,
        bounding=[*sets.bounding, *names],
        effective=[*sets.effective, *names],
        permitted=[*sets.permitted, *names],
    )


def _user(context: Context, user: User) -> User:
    wanted = context.text("user")
    if wanted:
        uid, colon, gid = wanted.partition(":")
        if not uid.isdecimal() or (colon and not gid.isdecimal()):
            raise Invalid(f"--user {wanted!r} is not UID[:GID]")
        user = msgspec.structs.replace(user, uid=int(uid), gid=int(gid) if colon else user.gid)
    groups = context.texts("additional-gids")
    if not all(group.isdecimal() for group in groups):
        raise Invalid("--additional-gids takes numbers")
    if groups:
        extra = [*user.additional_gids, *map(int, groups)]
        user = msgspec.structs.replace(user, additional_gids=extra)
    return user
