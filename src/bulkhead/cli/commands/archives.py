"""`save load import export commit`: archives through descriptors, never through this process."""

import os
import sys
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed
from bulkhead.cli.progress import Progress
from bulkhead.cli.pulling import follow
from bulkhead.errors import Invalid, NotFound

_OUTPUT = Option("-o, --output", "string", "Write to a file, instead of STDOUT", complete="file")
_CHANGE = Option("-c, --change", "list", "Apply Dockerfile instruction to the created image")


class _Output:
    """Where an archive goes: a new file beside PATH that takes its name at the end, or stdout."""

    def __init__(self, path: str, verb: str) -> None:
        self._path = path
        self._fresh = ""
        if path:
            folder = os.path.dirname(os.path.abspath(path))
            if not os.path.isdir(folder):
                raise NotFound(f'invalid output path: directory "{folder}" does not exist')
            if os.path.exists(path) and not os.path.isfile(path):
                self.fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # a device or pipe: as it is
                return
            self._fresh = f"{folder}/.{os.path.basename(path)}.{os.getpid()}"
            self.fd = os.open(
                self._fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
            )
        elif os.isatty(1):
            raise Invalid(f"cowardly refusing to {verb} to a terminal. Use the -o flag or redirect")
        else:
            sys.stdout.flush()
            self.fd = 1

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.fd != 1:
            os.close(self.fd)
        if self._fresh:
            if error is None:
                os.rename(self._fresh, self._path)
            else:
                os.unlink(self._fresh)


def save(context: Context, parsed: Parsed) -> None:
    """`bulkhead save`."""
    params: dict[str, Any] = {"names": parsed.args}
    if parsed["archive-format"]:
        params["format"] = parsed["archive-format"]
    with _Output(parsed["output"], "save") as fd:
        context.call("image.save", params, (fd,))


def export(context: Context, parsed: Parsed) -> None:
    """`bulkhead export`."""
    with _Output(parsed["output"], "export") as fd:
        context.call("workload.export", {"id": parsed.args[0]}, (fd,))


def export_workload(context: Context, parsed: Parsed) -> None:
    """`bulkhead export-workload`."""
    with _Output(parsed["output"], "export") as fd:
        found = context.call("workload.pack", {"id": parsed.args[0]}, (fd,))
    for source in found["Left"]:
        context.err(f"WARNING: {source} is a folder of this host and was left out")


def import_workload(context: Context, parsed: Parsed) -> None:
    """`bulkhead import-workload FILE|-`."""
    fd = 0 if parsed.args[0] == "-" else _open(parsed.args[0])
    params: dict[str, Any] = {
        "name": parsed["name"],
        "boundary": parsed["boundary"],
        "kernel": parsed["kernel"],
        "trust": parsed["trust"],
    }
    try:
        made = context.call("workload.unpack", params, (fd,))
    finally:
        if fd:
            os.close(fd)
    for warning in made["Warnings"]:
        context.err(f"WARNING: {warning}")
    context.out(made["Id"])


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"open {path}: no such file or directory") from None


def load(context: Context, parsed: Parsed) -> None:
    """`bulkhead load`."""
    path = parsed["input"]
    if not path and os.isatty(0):
        raise Invalid("requested load from stdin, but stdin is empty; name a file with -i")
    fd = _open(path) if path else 0
    sys.stdout.flush()
    progress = Progress(sys.stdout, quiet=parsed["quiet"] or not sys.stdout.isatty())
    try:
        found = follow(context, "image.load", {}, progress, (fd,))
    finally:
        if fd:
            os.close(fd)
    names = found.get("Names") if isinstance(found, dict) else found
    said = progress.said
    for name in names or ():
        kind = "Loaded image ID" if name.startswith("sha256:") else "Loaded image"
        if f"{kind}: {name}" not in said:
            context.out(f"{kind}: {name}")


def import_image(context: Context, parsed: Parsed) -> None:
    """`bulkhead import FILE|URL|- [REPOSITORY[:TAG]]`."""
    source = parsed.args[0]
    params: dict[str, Any] = {
        "ref": parsed.args[1] if len(parsed.args) > 1 else "",
        "message": parsed["message"],
        "changes": list(parsed["change"]),
    }
    if parsed["platform"]:
        params["platform"] = parsed["platform"]
    if source.startswith(("http://", "https://")):
        identity = _import_url(context, source, params)
    else:
        fd = 0 if source == "-" else _open(source)
        try:
            identity = _imported(context.call("image.import", params, (fd,)))
        finally:
            if fd:
                os.close(fd)
    context.out(identity)


def _imported(found: Any) -> str:
    return str(found["Id"] if isinstance(found, dict) else found)


def _import_url(context: Context, url: str, params: dict[str, Any]) -> str:
    """Download through a pipe while the engine reads it."""
    import threading

    import urllib3

    read, write = os.pipe2(os.O_CLOEXEC)
    failures: list[Exception] = []

    def download() -> None:
        try:
            with (
                open(write, "wb", buffering=0) as pipe,
                urllib3.PoolManager() as pool,
                pool.request("GET", url, preload_content=False) as answer,
            ):
                if answer.status != 200:
                    raise NotFound(f"{url}: the server answers {answer.status}")
                for chunk in answer.stream(1 << 20):
                    pipe.write(chunk)
        except (NotFound, OSError, urllib3.exceptions.HTTPError) as error:
            failures.append(error)

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    try:
        identity = _imported(context.call("image.import", params, (read,)))
    except Exception as error:
        thread.join(1.0)
        if failures:
            raise failures[0] from error
        raise
    finally:
        os.close(read)
    thread.join()
    if failures:
        context.call("image.remove", {"name": identity, "force": True, "noprune": False})
        raise failures[0]
    return identity


def commit(context: Context, parsed: Parsed) -> None:
    """`bulkhead commit CONTAINER [REPOSITORY[:TAG]]`."""
    from bulkhead.cli.commands.images import split_tag

    repository, tag = "", ""
    if len(parsed.args) > 1:
        repository, tag = split_tag(parsed.args[1])
    params: dict[str, Any] = {
        "id": parsed.args[0], "repo": repository, "tag": "latest" if tag == "<none>" else tag,
        "comment": parsed["message"], "author": parsed["author"],
        "changes": list(parsed["change"]), "pause": parsed["pause"],
    }  # fmt: skip
    context.out(context.call("workload.commit", params)["Id"])


COMMANDS = {
    "save": Command(
        "save", "Save one or more images to a tar archive (streamed to STDOUT by default)", save,
        arguments="IMAGE [IMAGE...]",
        options=(
            _OUTPUT,
            Option("--archive-format", "string", "Kind of archive",
                   choices=("docker", "oci")),
        ),
        examples=("bulkhead save -o debian.tar debian:bookworm",), least=1, most=None,
        completes="image",
    ),
    "load": Command(
        "load", "Load an image from a tar archive or STDIN", load,
        options=(
            Option("-i, --input", "string", "Read from tar archive file, instead of STDIN",
                   complete="file"),
            Option("-q, --quiet", "bool", "Suppress the load output"),
        ),
        examples=("bulkhead load -i debian.tar", "docker save web | bulkhead load"),
    ),
    "import": Command(
        "import", "Import the contents from a tarball to create a filesystem image", import_image,
        arguments="file|URL|- [REPOSITORY[:TAG]]",
        options=(
            _CHANGE,
            Option("-m, --message", "string", "Set commit message for imported image"),
            Option("--platform", "string", "Platform of the image, as OS/ARCH[/VARIANT]"),
        ),
        examples=("bulkhead import -c 'CMD /bin/sh' rootfs.tar.gz mine:latest",), least=1, most=2,
        completes="file",
    ),
    "export": Command(
        "export", "Export a container's filesystem as a tar archive", export,
        arguments="CONTAINER", options=(_OUTPUT,), least=1, most=1,
        examples=("bulkhead export -o web.tar web",), completes="container",
    ),
    "export-workload": Command(
        "export-workload", "Write a stopped container, with image and volumes, to a file",
        export_workload, arguments="CONTAINER", options=(_OUTPUT,), least=1, most=1,
        examples=("bulkhead export-workload -o db.workload db",), completes="container",
    ),
    "import-workload": Command(
        "import-workload", "Take in a container that export-workload wrote", import_workload,
        arguments="FILE|-",
        options=(
            Option("--name", "string", "Another name for it"),
            Option("--boundary", "string", "Another boundary for it"),
            Option("--kernel", "string", "Another guest kernel for it"),
            Option("--trust", "bool", "Accept what reaches the host: folders, devices, powers"),
        ),
        least=1, most=1, completes="file",
        examples=(
            "bulkhead import-workload db.workload",
            "bulkhead import-workload --boundary microvm --name db2 db.workload",
        ),
    ),
    "commit": Command(
        "commit", "Create a new image from a container's changes", commit,
        arguments="CONTAINER [REPOSITORY[:TAG]]",
        options=(
            Option("-a, --author", "string", 'Author (e.g., "Ada <ada@example.com>")'),
            _CHANGE,
            Option("-m, --message", "string", "Commit message"),
            Option("-p, --pause", "bool", "Pause container during commit", default=True),
        ),
        examples=("bulkhead commit -c 'CMD nginx' web web:1",), least=1, most=2,
        completes="container",
    ),
}  # fmt: skip
