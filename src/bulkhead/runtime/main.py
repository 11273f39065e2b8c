"""The entry of `bulkhead-runtime`: options, the log that engines read, exit codes.

An error is one line on standard error and, with --log, one more in that file (containerd, Docker
and Podman show their user the last line of level error there). The exit code is 1, that of `run`
and `exec` the process's own.
"""

import json
import os
import sys
import time
from importlib import import_module

from bulkhead.errors import BulkheadError, Invalid
from bulkhead.runtime.options import COMMANDS, GLOBALS, Command, Option, Values, parse
from bulkhead.runtime.records import PLANNER, Records

VERSION = "0.1.0"
SPEC_VERSION = "1.3.0"

_MODULES = {
    "exec": "executing",
    "list": "describing",
    "ps": "describing",
    "events": "describing",
    "spec": "examples",
    "features": "examples",
    "update": "limits",
    "pause": "limits",
    "resume": "limits",
    "checkpoint": "checkpoints",
    "restore": "checkpoints",
}
"""Where a command is, unless in `commands`."""


class Context:
    """What a command has: its options, its arguments, the records, the log."""

    def __init__(self, general: Values, values: Values, arguments: list[str]) -> None:
        self.general, self.values, self.arguments = general, values, arguments
        self.records = Records(str(general["root"]) or default_root())

    def text(self, name: str) -> str:
        """The value of a text option."""
        return str(self.values[name])

    def flag(self, name: str) -> bool:
        """Whether a flag is given."""
        return bool(self.values[name])

    def number(self, name: str) -> int:
        """The value of a number option, 0 if it is not given."""
        value = self.values[name]
        assert isinstance(value, int)
        return value

    def texts(self, name: str) -> list[str]:
        """The values of an option that may be given often."""
        value = self.values[name]
        assert isinstance(value, list)
        return value

    def again(self) -> tuple[str, ...]:
        """The global options for another command of the same kind."""
        general = self.general
        named = ("log", "log-format", "root")
        return tuple(f"--{name}={general[name]}" for name in named if general[name])

    def warn(self, text: str) -> None:
        """One line of level warning in the log."""
        log(self.general, "warning", text)


def default_root() -> str:
    """/run/bulkhead-runtime, for a user without privileges a folder of their own."""
    if os.geteuid() == 0:
        return "/run/bulkhead-runtime"
    return os.path.join(
        os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}"), "bulkhead-runtime"
    )


def log(general: Values, level: str, text: str) -> None:
    """Append one line to the log."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if general["log-format"] == "json":
        line = json.dumps({"level": level, "msg": text, "time": moment})
    else:
        line = f"time={json.dumps(moment)} level={level} msg={json.dumps(text)}"
    path = str(general["log"])
    if path == "/dev/stderr":
        print(line, file=sys.stderr)
        return
    with open(path, "a", encoding="utf-8") as file:
        print(line, file=file)


WARM = ("create", "start", "run", "state", "kill", "delete", "exec", "pause", "resume")
"""The commands that the native client gives to a planner; native/runtime.c."""


def preload() -> None:
    """Import what these commands need."""
    for name in ("commands", "executing", "limits", "hooks"):
        import_module(f"bulkhead.runtime.{name}")


def entry(native: str) -> None:
    """Run `sys.argv` for the native client at that path, and leave a planner for the next one."""
    words = sys.argv[1:]
    if words[:1] == ["planner"]:
        from bulkhead.runtime.planner import main as serve

        serve(words[1])
        os._exit(0)
    code = main(words)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    if os.environ.get("BULKHEAD_RUNTIME_PLANNER") not in ("0", "1"):
        start_planner(native, words)
    os._exit(code)


def start_planner(native: str, words: list[str]) -> None:
    """Start a planner for the root directory that `words` mean, if one would serve them."""
    try:
        general, rest = parse(GLOBALS, words)
    except Invalid:
        return
    root = str(general["root"]) or default_root()
    if rest[:1] == [] or rest[0] not in WARM or not os.path.isdir(root):
        return
    folder = os.path.abspath(f"{root}/{PLANNER}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if _has_planner(folder):
            return
        log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
    except OSError:
        return  # a read-only root: the next command is as slow as this one
    streams = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in ((0, null), (1, log), (2, log))]
    environment = {**os.environ, "BULKHEAD_RUNTIME_PLANNER": "0"}
    os.posix_spawn(
        native, [native, "planner", folder], environment, file_actions=streams, setsid=True
    )


def _has_planner(folder: str) -> bool:
    """Whether a planner of this mount namespace serves in `folder`: it holds the lock."""
    import fcntl

    path = f"{folder}/{os.stat('/proc/self/ns/mnt').st_ino}.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    general: Values = parse(GLOBALS, [])[0]
    try:
        general, rest = parse(GLOBALS, words)
        return _dispatch(general, rest)
    except BulkheadError as error:
        text = str(error)
    except OSError as error:
        text = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    return _fail(general, text)


def _fail(general: Values, text: str) -> int:
    if general["log"] != "/dev/stderr":
        try:
            log(general, "error", text)
        except OSError as error:
            print(f"bulkhead-runtime: --log {general['log']}: {error.strerror}", file=sys.stderr)
    print(f"bulkhead-runtime: {text}", file=sys.stderr)
    return 1


def _dispatch(general: Values, rest: list[str]) -> int:
    if general["version"]:
        print(f"bulkhead-runtime version {VERSION}\nspec: {SPEC_VERSION}")
        return 0
    if general["help"] or not rest or rest[0] in ("help", "h"):
        _help()
        return 0
    if general["log-format"] not in ("text", "json"):
        raise Invalid(f"unknown log-format {general['log-format']!r}: text or json")
    command = {one.name: one for one in COMMANDS}.get(rest[0])
    if command is None:
        raise Invalid(f"no command {rest[0]!r}; see bulkhead-runtime --help")
    if any(word in ("--help", "-h") for word in rest[1:2]):
        _command_help(command)
        return 0
    values, positional = parse(command.options, rest[1:])
    if not command.least <= len(positional) or len(positional) > command.most >= 0:
        raise Invalid(f"usage: bulkhead-runtime {command.name} [OPTION…] {command.usage}".rstrip())
    module = import_module(f"bulkhead.runtime.{_MODULES.get(command.name, 'commands')}")
    function = {"exec": "exec_", "list": "list_"}.get(command.name, command.name)
    code = getattr(module, function)(Context(general, values, positional))
    assert isinstance(code, int)
    return code


def _shown(option: Option) -> str:
    names = ", ".join(("--" if len(name) > 1 else "-") + name for name in option.names)
    value = "" if option.kind == "flag" else " VALUE"
    default = f" (default {option.default})" if option.default else ""
    return f"  {names + value:34} {option.help_}{default}"


def _help() -> None:
    print("Usage: bulkhead-runtime [OPTION…] COMMAND [OPTION…] [ARGUMENT…]\n")
    print("An OCI runtime with runc's command line.\n\nCommands:")
    for command in COMMANDS:
        print(f"  {command.name:9} {command.help_}")
    print("\nOptions:")
    print("\n".join(map(_shown, GLOBALS)))
    print("\nExamples:\n  bulkhead-runtime run --bundle /bundles/web web")
    print("  podman --runtime /usr/local/bin/bulkhead-runtime run --rm IMAGE true")


def _command_help(command: Command) -> None:
    print(f"Usage: bulkhead-runtime {command.name} [OPTION…] {command.usage}\n\n{command.help_}")
    if command.options:
        print("\n".join(("\nOptions:", *map(_shown, command.options))))
