"""`cp`: files between a container and here, as one tar stream through a pipe."""

import os
import sys
import threading
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.copying import add_local, extract, resolve_local
from bulkhead.cli.options import Option, Parsed, UsageError
from bulkhead.errors import Invalid, NotFound


def split(argument: str) -> tuple[str, str]:
    """(container, path) of CONTAINER:PATH; ("", path) of a local path, by docker's rules."""
    if os.path.isabs(argument):
        return "", argument
    name, colon, path = argument.partition(":")
    if not colon or name.startswith("."):
        return "", argument
    return name, path


def cp(context: Context, parsed: Parsed) -> None:
    """`bulkhead cp`."""
    (source_name, source), (target_name, target) = split(parsed.args[0]), split(parsed.args[1])
    if source_name and target_name:
        raise UsageError("copying between containers is not supported", code=1)
    if not source_name and not target_name:
        raise UsageError("must specify at least one container source", code=1)
    if source_name:
        _out(context, source_name, source, target, parsed)
        return
    _in(context, source, target_name, target, parsed)


def _stat(context: Context, name: str, path: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = context.call("workload.archive_stat", {"id": name, "path": path})
    except NotFound as error:
        if "no such container" in error.message.lower():
            raise
        return None
    return found


_S_IFDIR = 1 << 31
_S_IFLNK = 1 << 27


def _is_directory(stat: dict[str, Any]) -> bool:
    return bool(stat["mode"] & _S_IFDIR)


def _out(context: Context, name: str, path: str, target: str, parsed: Parsed) -> None:
    path = path or "/"
    if parsed["follow-link"]:
        stat = _stat(context, name, path)
        if stat and stat["mode"] & _S_IFLNK and stat.get("linkTarget"):
            path = os.path.join(os.path.dirname(path), stat["linkTarget"])
    if target == "-":
        if os.isatty(1):
            raise Invalid("cowardly refusing to write an archive to a terminal; redirect it")
        sys.stdout.flush()
        context.call("workload.archive_get", {"id": name, "path": path}, (1,))
        return
    stat = _stat(context, name, path)
    if stat is None:
        raise NotFound(f"Could not find the file {path} in container {name}")
    contents = path.endswith("/.") or path == "."
    place = resolve_local(target, stat["name"], directory=_is_directory(stat), contents=contents)
    read, write = os.pipe2(os.O_CLOEXEC)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            context.call("workload.archive_get", {"id": name, "path": path}, (write,))
        except Exception as error:
            failures.append(error)
        finally:
            os.close(write)

    engine = context.engine  # connected here, so that the thread only uses it
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        with open(read, "rb") as stream:
            extract(stream, place, keep_owner=parsed["archive"])
    except Invalid:
        engine.close()
        raise
    thread.join()
    if failures:
        raise failures[0]
    if not parsed["quiet"]:
        context.err(f"Successfully copied to {os.path.abspath(place.shown)}")


def _in(context: Context, source: str, name: str, target: str, parsed: Parsed) -> None:
    target = target or "/"
    params: dict[str, Any] = {
        "id": name,
        "path": target,
        "no_overwrite_dir_non_dir": True,
        "copy_uid_gid": bool(parsed["archive"]),
    }
    if source == "-":
        stat = _stat(context, name, target)
        if stat is None or not _is_directory(stat):
            raise Invalid(f'destination "{name}:{target}" must be a directory')
        context.call("workload.archive_put", params, (0,))
        return
    if parsed["follow-link"]:
        source = os.path.realpath(source)
    if not os.path.lexists(source):
        raise NotFound(f"lstat {source}: no such file or directory")
    contents = source.endswith("/.") or source == "."
    is_directory = os.path.isdir(source) and (source.endswith("/") or not os.path.islink(source))
    stat = _stat(context, name, target)
    if stat is not None and stat["mode"] & _S_IFLNK and stat.get("linkTarget"):
        target = os.path.join(os.path.dirname(target), stat["linkTarget"])
        stat = _stat(context, name, target)
    if stat is not None and _is_directory(stat):
        params["path"] = target
        inner = "." if contents else os.path.basename(os.path.abspath(source))
    elif stat is not None and is_directory:
        raise Invalid(f"cannot copy a directory to a file: {name}:{target}")
    elif stat is None and target.endswith("/") and not is_directory:
        raise Invalid(f'destination directory "{name}:{target}" must be a directory that exists')
    else:
        params["path"] = os.path.dirname(target.rstrip("/")) or "/"
        inner = os.path.basename(target.rstrip("/"))
    _send(context, params, source, inner)
    if not parsed["quiet"]:
        context.err(f"Successfully copied to {name}:{target}")


def _send(context: Context, params: dict[str, Any], source: str, inner: str) -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    failures: list[BaseException] = []

    def feed() -> None:
        try:
            with open(write, "wb") as stream:
                add_local(stream, source, inner)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=feed, daemon=True)
    engine = context.engine
    try:
        number = engine.send("workload.archive_put", params, (read,))
    finally:
        os.close(read)
    thread.start()
    from bulkhead.client.connection import failure

    while True:
        message = engine.receive()
        if message.id == number and message.done:
            break
    if message.error is not None:
        raise failure(message.error)
    thread.join()
    if failures and not isinstance(failures[0], BrokenPipeError):
        raise failures[0]


COMMANDS = {
    "cp": Command(
        "cp", "Copy files/folders between a container and the local filesystem", cp,
        arguments="CONTAINER:SRC_PATH DEST_PATH|- | SRC_PATH|- CONTAINER:DEST_PATH",
        options=(
            Option("-a, --archive", "bool", "Archive mode (copy all uid/gid information)"),
            Option("-L, --follow-link", "bool", "Always follow symbol link in SRC_PATH"),
            Option("-q, --quiet", "bool", "Suppress the line at the end"),
        ),
        examples=("bulkhead cp web:/etc/nginx/nginx.conf .", "bulkhead cp ./html web:/var/www/"),
        least=2, most=2, completes="container",
    )
}  # fmt: skip
