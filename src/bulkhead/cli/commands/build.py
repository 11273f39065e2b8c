"""`build`: contexts, files, secrets; the engine builds."""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any

from bulkhead.cli import build_outputs, ssh_agents
from bulkhead.cli.building import Plain, Quiet, Shown, Terminal
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed, UsageError
from bulkhead.errors import Invalid, NotFound

_BLOCK = 512
_MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_LARGEST = 4 << 20
_SCP = re.compile(r"[a-zA-Z0-9_.-]+@[a-zA-Z0-9_.-]+:(?!//)")


def _is_remote(text: str) -> bool:
    """Whether the engine fetches the context: a git repository, or a URL."""
    schemes = ("http://", "https://", "git://", "ssh://", "github.com/")
    return text.startswith(schemes) or bool(_SCP.match(text))


def _from_stdin(options: dict[str, Any], undo: contextlib.ExitStack) -> int | None:
    """`-`: an archive, or a Dockerfile; what is to be sent."""
    head = b""
    while len(head) < _BLOCK and (piece := os.read(0, _BLOCK - len(head))):
        head += piece
    if head.startswith(_MAGICS) or head[257:262] == b"ustar":
        read, write = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, read)
        threading.Thread(target=_forward, args=(head, write), daemon=True).start()
        options["context"] = "archive"
        return read
    data = head
    while len(data) < _LARGEST and (piece := os.read(0, 1 << 16)):
        data += piece
    options["dockerfile_data"] = data
    options["context"] = "none"
    return None


def _forward(head: bytes, write: int) -> None:
    try:
        with open(write, "wb", buffering=0) as pipe:
            pipe.write(head)
            while piece := os.read(0, 1 << 20):
                view = memoryview(piece)
                while view:
                    view = view[pipe.write(view) :]
    except OSError:
        return  # the engine says why it stopped reading


def _dockerfile(options: dict[str, Any], given: str, folder: str) -> None:
    """-f: in the context by its name there, from elsewhere by its content."""
    if given == "-":
        options["dockerfile_data"] = sys.stdin.buffer.read(_LARGEST)
        return
    if not given:
        return
    path = os.path.abspath(given)
    if not os.path.exists(path) and os.path.exists(os.path.join(folder, given)):
        path = os.path.join(os.path.abspath(folder), given)
    inside = os.path.relpath(path, os.path.abspath(folder))
    options["dockerfile"] = inside
    if inside.startswith("../") or not folder:
        options["dockerfile"] = given
        options["dockerfile_data"] = _read(path, "Dockerfile")
        with contextlib.suppress(FileNotFoundError), open(f"{path}.dockerignore", "rb") as file:
            options["ignore_data"] = file.read(_LARGEST)


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_LARGEST)
    except OSError as error:
        raise NotFound(f"unable to read {what} {path}: {error.strerror}") from None


def _fields(text: str) -> dict[str, str]:
    return {k: v for k, _, v in (part.partition("=") for part in text.split(","))}


def _secrets(given: list[str], context: Context) -> dict[str, bytes]:
    found = {}
    for text in given:
        fields = _fields(text)
        name = fields.get("id", "")
        source = fields.get("src") or fields.get("source") or ""
        if not name:
            raise UsageError(f"--secret {text}: it needs an id: id=NAME,src=FILE")
        if set(fields) - {"id", "src", "source", "env", "type"}:
            raise UsageError(f"--secret {text}: unknown member; id, src, env, type")
        variable = fields.get("env") or ("" if source else name)
        if not source and variable in context.environ:
            found[name] = context.environ[variable].encode("utf-8", "surrogateescape")
        elif source or os.path.exists(name):
            found[name] = _read(os.path.expanduser(source or name), f"secret {name}")
        else:
            raise UsageError(f"--secret {text}: neither a file nor the variable {variable} exists")
    return found


def _pairs(given: list[str], environ: Any) -> dict[str, str]:
    """KEY=VALUE, or KEY with its value in the environment."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if equals:
            found[key] = value
        elif key in environ:
            found[key] = environ[key]
    return found


def _absolute(texts: list[str], key: str) -> list[str]:
    """Folders in cache places, as the engine sees them."""
    found = []
    for text in texts:
        parts = [
            f"{name}={os.path.abspath(value)}" if name == key else f"{name}={value}" if eq else name
            for name, eq, value in (part.partition("=") for part in text.split(","))
        ]
        found.append(",".join(parts))
    return found


def _auths(context: Context) -> dict[str, dict[str, str]]:
    """Credentials of every registry the configuration knows."""
    from bulkhead.cli import credentials

    found = {}
    known = credentials.load(context)
    for server in (*(known.get("auths") or {}), *(known.get("credHelpers") or {})):
        host = server.removeprefix("https://").removeprefix("http://").partition("/")[0]
        domain = "docker.io" if host in ("index.docker.io", "registry-1.docker.io") else host
        auth = credentials.find(context, f"{domain}/x")
        if auth:
            found[domain] = dict(auth)
    return found


_LIMITS = {
    "add-host": "ExtraHosts", "cgroup-parent": "CgroupParent", "cpu-period": "CpuPeriod",
    "cpu-quota": "CpuQuota", "cpu-shares": "CpuShares", "cpuset-cpus": "CpusetCpus",
    "cpuset-mems": "CpusetMems", "memory": "Memory", "memory-swap": "MemorySwap",
    "security-opt": "SecurityOpt", "shm-size": "ShmSize",
}  # fmt: skip
"""Options that are members of a step's HostConfig."""


def _limits(parsed: Parsed) -> dict[str, Any]:
    found = {member: parsed[name] for name, member in _LIMITS.items() if name in parsed}
    ulimits = []
    for text in parsed["ulimit"]:
        name, equals, values = text.partition("=")
        soft, _, hard = values.partition(":")
        try:
            one = {"Name": name, "Soft": int(soft), "Hard": int(hard or soft)}
        except ValueError:
            raise UsageError(f"invalid ulimit argument: {text}") from None
        if not equals or not name:
            raise UsageError(f"invalid ulimit argument: {text}")
        ulimits.append(one)
    return {**found, "Ulimits": ulimits} if ulimits else found


def _options(context: Context, parsed: Parsed) -> dict[str, Any]:
    args = _pairs(parsed["build-arg"], context.environ)
    if "SOURCE_DATE_EPOCH" in context.environ:
        args.setdefault("SOURCE_DATE_EPOCH", context.environ["SOURCE_DATE_EPOCH"])
    return {
        "tags": parsed["tag"],
        "args": args,
        "target": parsed["target"],
        "no_cache": parsed["no-cache"],
        "pull": parsed["pull"],
        "platform": parsed["platform"],
        "labels": _pairs(parsed["label"], context.environ),
        "secrets": _secrets(parsed["secret"], context),
        "allow": parsed["allow"],
        "network": "" if parsed["network"] == "default" else parsed["network"],
        "squash": parsed["squash"],
        "boundary": parsed["boundary"],
        "cache_from": _absolute(parsed["cache-from"], "src"),
        "cache_to": _absolute(parsed["cache-to"], "dest"),
        "provenance": parsed["provenance"] not in ("", "false"),
        "sbom": parsed["sbom"] not in ("", "false"),
        "limits": _limits(parsed),
        "auths": _auths(context),
    }


@contextlib.contextmanager
def _context(options: dict[str, Any], parsed: Parsed) -> Iterator[tuple[int, ...]]:
    """The descriptors to send."""
    place = parsed.args[0]
    with contextlib.ExitStack() as undo:
        options["source"] = place
        if place == "-":
            if parsed["file"] == "-":
                raise UsageError("-f - and a context from standard input exclude each other")
            options["dockerfile"] = parsed["file"]
            fd = _from_stdin(options, undo)
            yield () if fd is None else (fd,)
            return
        if _is_remote(place) and not os.path.isdir(place):
            options["context"], options["remote"] = "remote", place
            if parsed["file"] == "-":
                options["dockerfile_data"] = sys.stdin.buffer.read(_LARGEST)
            else:
                options["dockerfile"] = parsed["file"]
            yield ()
            return
        try:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise Invalid(f"the context {place} must be a directory") from None
        except OSError as error:
            message = f"unable to prepare context: path {place!r}: {error.strerror}"
            raise NotFound(message) from None
        undo.callback(os.close, fd)
        options["context"] = "directory"
        _dockerfile(options, parsed["file"], place)
        yield (fd,)


def _shown(parsed: Parsed) -> Shown:
    if parsed["quiet"] or parsed["progress"] in ("quiet", "none"):
        return Quiet()
    if parsed["progress"] == "tty" or (parsed["progress"] == "auto" and sys.stderr.isatty()):
        return Terminal(sys.stderr)
    return Plain(sys.stderr)


def _follow(items: Generator[Any, None, Any], shown: Shown) -> dict[str, Any]:
    """Show the events; the result."""
    try:
        while True:
            try:
                shown.event(next(items))
            except StopIteration as end:
                result: dict[str, Any] = end.value
                return result
    finally:
        shown.close()


def _recorded(parsed: Parsed, found: dict[str, Any]) -> None:
    """What other programs read of the result."""
    if parsed["iidfile"]:
        with open(parsed["iidfile"], "w", encoding="ascii") as file:
            file.write(found["Id"])
    if parsed["metadata-file"]:
        note = {"containerimage.config.digest": found["Id"],
                "containerimage.digest": found["Digest"],
                "image.name": ",".join(found["Names"])}  # fmt: skip
        with open(parsed["metadata-file"], "w", encoding="utf-8") as file:
            json.dump(note, file, indent=2)
            file.write("\n")


def build(context: Context, parsed: Parsed) -> None:
    """`bulkhead build PATH | URL | -`."""
    options = _options(context, parsed)
    shown = _shown(parsed)
    with contextlib.ExitStack() as undo:
        outputs = undo.enter_context(build_outputs.opened(parsed["output"], context, options))
        options["push"] = options["push"] or parsed["push"]
        options["ssh"] = undo.enter_context(ssh_agents.agents(parsed["ssh"], context.environ))
        fds = undo.enter_context(_context(options, parsed))
        stream = context.stream("build.run", {"options": options}, (*fds, *outputs.fds))
        found = _follow(stream, shown)
        outputs.finish()
    _recorded(parsed, found)
    if parsed["quiet"]:
        (context.err if outputs.spoken else context.out)(found["Id"])
    else:
        named = "".join(f"\nnamed {name}" for name in found["Names"])
        context.err(f"built {found['Id']}{named}")


COMMANDS = {
    "build": Command(
        "build", "Build an image from a Dockerfile", build, arguments="PATH | URL | -",
        options=(
            Option("--add-host", "list", "Add a custom host-to-IP mapping (host:ip)"),
            Option("--allow", "strings",
                   "What RUN steps may ask for: network.host, security.insecure"),
            Option("--boundary", "string", "What isolates the steps (container, sandbox, microvm)"),
            Option("--build-arg", "list", "Set build-time variables"),
            Option("--cache-from", "list",
                   "Where to take the cache from: type=registry,ref=NAME or type=local,src=FOLDER"),
            Option("--cache-to", "list",
                   "Where to put the cache: type=registry,ref=NAME or type=local,dest=FOLDER"),
            Option("--cgroup-parent", "string", "Control group above those of the RUN steps"),
            Option("--compress", "bool", "For docker's sake: nothing is sent", hidden=True),
            Option("--cpu-period", "int", "Limit the CPU CFS period"),
            Option("--cpu-quota", "int", "Limit the CPU CFS quota"),
            Option("-c, --cpu-shares", "int", "CPU shares (relative weight)"),
            Option("--cpuset-cpus", "string", "CPUs in which to allow execution (0-3, 0,1)"),
            Option("--cpuset-mems", "string", "MEMs in which to allow execution (0-3, 0,1)"),
            Option("--disable-content-trust", "bool", "For docker's sake", default=True,
                   hidden=True),
            Option("-f, --file", "string", "Name of the Dockerfile (default: PATH/Dockerfile)",
                   complete="file"),
            Option("--force-rm", "bool", "Always remove intermediate containers", default=True,
                   hidden=True),
            Option("--iidfile", "string", "Write the image ID to the file", complete="file"),
            Option("--isolation", "string", "For docker's sake", choices=("", "default"),
                   hidden=True),
            Option("--label", "list", "Set metadata for an image"),
            Option("--load", "bool", "For docker's sake: the image is always here", hidden=True),
            Option("-m, --memory", "bytes", "Memory limit"),
            Option("--memory-swap", "bytes",
                   "Swap limit equal to memory plus swap: -1 for unlimited swap"),
            Option("--metadata-file", "string", "Write the result's digests as JSON to the file",
                   complete="file"),
            Option("--network", "string", "Networking mode for the RUN instructions"),
            Option("--no-cache", "bool", "Do not use the cache"),
            Option("-o, --output", "list",
                   "Where else the result goes: FOLDER, -, type=local|tar|oci|docker,dest=PATH"),
            Option("--platform", "string", "Platform to build for, as OS/ARCH[/VARIANT]"),
            Option("--progress", "string", "Kind of progress output", default="auto",
                   choices=("auto", "plain", "tty", "quiet", "none")),
            Option("--provenance", "string", "Attest how the image was built (true, false)"),
            Option("--pull", "bool", "Always attempt to pull newer images"),
            Option("--push", "bool", "Push the image under its names"),
            Option("-q, --quiet", "bool", "Print the image ID only"),
            Option("--rm", "bool", "Remove intermediate containers", default=True, hidden=True),
            Option("--sbom", "string", "Attest the packages of the image (true, false)"),
            Option("--secret", "list", "Secret for RUN: id=NAME[,src=FILE][,env=VARIABLE]"),
            Option("--security-opt", "strings", "Security options of the RUN steps"),
            Option("--shm-size", "bytes", "Size of /dev/shm"),
            Option("--squash", "bool", "Squash newly built layers into one"),
            Option("--ssh", "list", "SSH agent for RUN: default, NAME=SOCKET or NAME=KEY[,KEY]"),
            Option("-t, --tag", "list", "Name and optionally a tag (name:tag)"),
            Option("--target", "string", "Stage to build"),
            Option("--ulimit", "list", "Ulimit options (NAME=SOFT[:HARD])"),
        ),
        examples=(
            "bulkhead build -t web .",
            "bulkhead build --target test --build-arg VERSION=2 -f docker/Dockerfile .",
            "bulkhead build --secret id=token,src=token.txt -t app .",
            "bulkhead build -q --build-arg SOURCE_DATE_EPOCH=0 .",
            "bulkhead build -o out --target binaries .",
            "bulkhead build https://example.com/app.git#v1.2:server",
        ),
        least=1, most=1, completes="file",
    ),
}  # fmt: skip
