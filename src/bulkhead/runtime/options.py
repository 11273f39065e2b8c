"""The command line of runc, as a table: global options, commands, their options and arguments.

Options come in Go's forms: --name value, --name=value, -name; a flag may be --flag=false. They end
at "--" or at the first argument (of exec: everything after the container's id is the command).
"""

from dataclasses import dataclass

from bulkhead.errors import Invalid


@dataclass(frozen=True, slots=True)
class Option:
    """One option; `kind` is "flag", "text", "list" or "number"."""

    names: tuple[str, ...]
    kind: str
    help_: str
    default: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """One command; `least` and `most` positional arguments (-1: any number)."""

    name: str
    usage: str
    help_: str
    options: tuple[Option, ...] = ()
    least: int = 1
    most: int = 1


def _flag(names: str, help_: str) -> Option:
    return Option(tuple(names.split()), "flag", help_)


def _text(names: str, help_: str, default: str = "") -> Option:
    return Option(tuple(names.split()), "text", help_, default)


def _list(names: str, help_: str) -> Option:
    return Option(tuple(names.split()), "list", help_)


def _number(names: str, help_: str) -> Option:
    return Option(tuple(names.split()), "number", help_)


GLOBALS = (
    _flag("debug", "log what is done"),
    _text("log", "file to write the log to", "/dev/stderr"),
    _text("log-format", "text or json", "text"),
    _text("root", "where the state of containers is kept"),
    _text("criu", "CRIU's program, for checkpoint and restore", "criu"),
    _flag("systemd-cgroup", "cgroupsPath is slice:prefix:name, a scope that systemd makes"),
    _text("rootless", "true, false or auto; rootless use is not supported yet", "auto"),
    _flag("help h", "show this"),
    _flag("version v", "print the version"),
)

_CREATE = (
    _text("bundle b", "the bundle's directory, default the current one"),
    _text("console-socket", "unix socket that receives the terminal's master"),
    _text("pid-file", "file to write the process id to"),
    _text("pidfd-socket", "unix socket that receives a pidfd of the first process"),
    _flag("no-pivot", "move the root instead of pivot_root(2), for a root on a ramdisk"),
    _flag("no-new-keyring", "no session keyring of its own: the caller's"),
    _number("preserve-fds", "how many descriptors from 3 on to pass"),
)
_IMAGES = (
    _text("image-path", "folder of the images, default ./checkpoint"),
    _text("work-path", "folder of CRIU's log, default that of the images"),
    _flag("tcp-established", "with open TCP connections"),
    _flag("tcp-close", "with open TCP connections, which are closed by a restore"),
    _flag("ext-unix-sk", "with unix sockets that lead outside"),
    _flag("shell-job", "with a session that is led from outside"),
    _flag("file-locks", "with locks on files"),
    _flag("auto-dedup", "free what an earlier pre-dump has of the same pages"),
    _flag("lazy-pages", "refused: pages are read from the image path"),
    _text("manage-cgroups-mode", "soft, full, strict or ignore", "soft"),
    _list("empty-ns", "leave a namespace empty; only network"),
)
_FORMAT = _text("format f", "table or json", "table")

COMMANDS = (
    Command("create", "ID", "make a container up to the moment before its program runs", _CREATE),
    Command("start", "ID", "run a created container's program"),
    Command(
        "run",
        "ID",
        "create and start a container, and wait for it",
        (
            *_CREATE,
            _flag("detach d", "do not wait"),
            _flag("keep", "do not delete it at its end"),
            _flag("no-subreaper", "do not adopt the container's orphans"),
        ),
    ),
    Command("state", "ID", "print a container's state as JSON"),
    Command(
        "kill",
        "ID [SIGNAL]",
        "signal a container's first process",
        (_flag("all a", "signal every process"),),
        most=2,
    ),
    Command(
        "delete",
        "ID",
        "remove a container",
        (_flag("force f", "kill it first if it runs; no error if it is not there"),),
    ),
    Command(
        "exec",
        "ID [COMMAND [ARGUMENT…]]",
        "run one more process in a container",
        (
            _text("console-socket", "unix socket that receives the terminal's master"),
            _text("cwd", "working directory"),
            _list("env e", "NAME=VALUE to add to the environment"),
            _flag("tty t", "with a terminal"),
            _text("user u", "UID[:GID]"),
            _list("additional-gids g", "supplementary group"),
            _text("process p", "file with the process as JSON"),
            _flag("detach d", "do not wait"),
            _text("pid-file", "file to write the process id to"),
            _text("process-label", "SELinux label"),
            _text("apparmor", "AppArmor profile"),
            _flag("no-new-privs", "no program gains privileges"),
            _list("cap c", "capability to add"),
            _text("pidfd-socket", "unix socket that receives a pidfd of the process"),
            _number("preserve-fds", "how many descriptors from 3 on to pass"),
            _list("cgroup", "refused: the process joins the container's own group"),
            _flag("ignore-paused", "also in a paused container"),
        ),
        most=-1,
    ),
    Command(
        "list",
        "",
        "the containers of this root",
        (_FORMAT, _flag("quiet q", "ids only")),
        least=0,
        most=0,
    ),
    Command("ps", "ID [PS-OPTION…]", "the processes of a container", (_FORMAT,), most=-1),
    Command("pause", "ID", "freeze every process of a container"),
    Command("resume", "ID", "let them go on"),
    Command(
        "update",
        "ID",
        "change a container's limits",
        (
            _text("resources r", "file with linux.resources as JSON, - for standard input"),
            _number("blkio-weight", "block I/O weight, 10 to 1000"),
            _number("cpu-period", "CFS period, microseconds"),
            _number("cpu-quota", "CFS quota, microseconds"),
            _number("cpu-share", "CPU shares"),
            _number("cpu-rt-period", "realtime period, microseconds"),
            _number("cpu-rt-runtime", "realtime runtime, microseconds"),
            _text("cpuset-cpus", "processors"),
            _text("cpuset-mems", "memory nodes"),
            _text("memory", "bytes"),
            _text("memory-reservation", "bytes"),
            _text("memory-swap", "bytes, memory and swap together; -1: no limit"),
            _number("pids-limit", "number of tasks"),
            _text("l3-cache-schema", "refused"),
            _text("mem-bw-schema", "refused"),
        ),
    ),
    Command(
        "events",
        "ID",
        "statistics and out-of-memory events as JSON lines",
        (_text("interval", "time between two statistics", "5s"), _flag("stats", "print once")),
    ),
    Command(
        "checkpoint",
        "ID",
        "save a container's processes, and remove it",
        (
            *_IMAGES,
            _flag("leave-running", "let it go on"),
            _flag("pre-dump", "save memory only, and let it go on"),
            _text("parent-path", "images of an earlier pre-dump, relative to the image path"),
            _flag("link-remap", "with files that were removed but are open"),
            _flag("tcp-skip-in-flight", "without connections that are not accepted yet"),
            _text("page-server", "refused: pages are written to the image path"),
            _text("status-fd", "refused: wait for the command"),
        ),
    ),
    Command(
        "restore",
        "ID",
        "make a container of a checkpoint, and wait for it",
        (
            *_IMAGES,
            *_CREATE,
            _flag("detach d", "do not wait"),
            _flag("no-subreaper", "do not adopt the container's orphans"),
            _text("lsm-profile", "TYPE:NAME of the AppArmor or SELinux profile"),
            _text("lsm-mount-context", "refused: mounts keep their contexts"),
        ),
    ),
    Command(
        "spec",
        "",
        "write an example config.json",
        (_text("bundle b", "where"), _flag("rootless", "for a user without privileges")),
        least=0,
        most=0,
    ),
    Command("features", "", "what this runtime supports, as JSON", least=0, most=0),
)

Values = dict[str, "str | bool | int | list[str]"]


def parse(options: tuple[Option, ...], words: list[str]) -> tuple[Values, list[str]]:
    """(values by the options' first names, the rest); Invalid for what is not in the table."""
    known = {name: option for option in options for name in option.names}
    values: Values = {option.names[0]: _initial(option) for option in options}
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return values, words[position + 1 :]
        if len(word) < 2 or not word.startswith("-"):
            break
        position += 1
        name, equals, value = word.lstrip("-").partition("=")
        option = known.get(name)
        if option is None:
            raise Invalid(f"flag provided but not defined: -{name}")
        if option.kind == "flag":
            values[option.names[0]] = _boolean(name, value) if equals else True
            continue
        if not equals:
            if position == len(words):
                raise Invalid(f"flag needs an argument: -{name}")
            value = words[position]
            position += 1
        _set(values, option, value)
    return values, words[position:]


def _initial(option: Option) -> "str | bool | int | list[str]":
    return {"flag": False, "list": [], "number": 0}.get(option.kind, option.default)  # type: ignore[return-value]


def _boolean(name: str, value: str) -> bool:
    if value not in ("true", "false", "1", "0"):
        raise Invalid(f'invalid boolean value "{value}" for -{name}')
    return value in ("true", "1")


def _set(values: Values, option: Option, value: str) -> None:
    name = option.names[0]
    before = values[name]
    if isinstance(before, list):
        values[name] = [*before, value]
    elif option.kind == "number":
        try:
            values[name] = int(value)
        except ValueError:
            raise Invalid(f'invalid value "{value}" for flag -{name}: not a number') from None
    else:
        values[name] = value
