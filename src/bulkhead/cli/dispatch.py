"""From words to a command, and from exceptions to lines and exit codes."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import HelpWanted, Option, Parsed, Table, UsageError
from bulkhead.cli.registry import ALIASES, COMMANDS, GROUPS, IMPLIED
from bulkhead.errors import BulkheadError
from bulkhead.home import default

if TYPE_CHECKING:
    from bulkhead.client.connection import Connection

GLOBAL = Table(
    (
        Option("--root", "string", "Directory of the installation's state", complete="file"),
        Option("--run-root", "string", "Directory of the installation's sockets", complete="file"),
        Option("--config", "string", "Directory of docker's client configuration", complete="file"),
        Option("-H, --host", "string", "The engine's socket, as unix://PATH/engine.sock"),
        Option("-D, --debug", "bool", "Show the traceback of errors"),
        Option("--json", "bool", "Machine-readable output where a command has --format"),
        Option("-v, --version", "bool", "Print version information and quit"),
    )
)

# Errors of these commands leave codes below 125 to the workload.
_OTHERWISE = {"run": 125, "exec": 1}
_EXIT = {"command-not-found": 127, "command-not-executable": 126}


def load(words: str) -> Command:
    """The Command behind canonical `words`; imports its module."""
    module = importlib.import_module(f"bulkhead.cli.commands.{COMMANDS[words][0]}")
    command: Command = module.COMMANDS[words]
    return command


def find(argv: Sequence[str]) -> tuple[str, tuple[str, ...], int]:
    """The canonical words `argv` starts with, options they imply, and how many words they are.

    ("", (), 0) or (group, (), 1) when no command is named.
    """
    if not argv:
        return "", (), 0
    two = " ".join(argv[:2])
    if two in ALIASES:
        return ALIASES[two], IMPLIED.get(two, ()), 2
    if two in COMMANDS:
        return two, (), min(2, len(argv))
    if argv[0] in COMMANDS:
        return argv[0], (), 1
    if argv[0] in GROUPS:
        if len(argv) > 1 and not argv[1].startswith("-"):
            raise UsageError(f"unknown command: bulkhead {two}", code=1)
        return argv[0], (), 1
    raise UsageError(f"unknown command: bulkhead {argv[0]}", code=1)


def make_context(parsed: Parsed, environ: Mapping[str, str]) -> Context:
    """The Context that the global options describe; UsageError for a host that is no socket."""
    root, run = parsed["root"] or environ.get("BULKHEAD_ROOT"), parsed["run-root"]
    host = parsed["host"]
    if host:
        scheme, _, path = host.partition("://")
        if scheme != "unix" or not path.endswith("/engine.sock"):
            raise UsageError(f"--host {host}: only unix://RUN-ROOT/engine.sock is supported")
        run = run or path.removesuffix("/engine.sock")
    context = Context(default(root or None, run or environ.get("BULKHEAD_RUN")), environ)
    context.debug = parsed["debug"]
    context.json = parsed["json"]
    context.config = parsed["config"]
    return context


def dispatch(
    argv: Sequence[str], environ: Mapping[str, str], parked: "list[Connection] | None" = None
) -> int:
    """Run one command line; the exit code."""
    words = ""
    context: Context | None = None
    try:
        try:
            parsed = GLOBAL.parse(argv, interspersed=False)
            if parsed["version"]:
                from bulkhead.cli.commands.version import short

                print(short())
                return 0
            context = make_context(parsed, environ)
            context.parked = parked if parked is not None else []
            words, implied, used = find(parsed.args)
            rest = [*implied, *parsed.args[used:]]
            if not words or words in GROUPS:
                return _overview(words, rest)
            command = load(words)
            return command.run(context, command.parse(rest)) or 0
        except HelpWanted:
            from bulkhead.cli.help import command_help, overview

            print(command_help(words) if words in COMMANDS else overview(words))
            return 0
        finally:
            sys.stdout.flush()
            if context is not None:
                context.close()
                if parked is None:
                    while context.parked:
                        context.parked.pop().close()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return report(error, words, debug=context is not None and context.debug)


def _overview(words: str, rest: Sequence[str]) -> int:
    from bulkhead.cli.help import overview

    if rest and rest != ["--help"] and rest != ["-h"]:
        raise UsageError(f"unknown flag: {rest[0]}")
    print(overview(words))
    return 0


def report(error: BaseException, words: str, *, debug: bool) -> int:
    """Print what went wrong as people want to read it; the exit code."""
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return 141  # as if SIGPIPE had ended us, like docker
    if isinstance(error, KeyboardInterrupt):
        return 130
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, UsageError):
        see = f"bulkhead {words} --help" if words else "bulkhead --help"
        _complain(f"bulkhead: {error.message}\nSee '{see}'.")
        code = error.details.get("code", 125)
        return code if isinstance(code, int) else 125
    if isinstance(error, BulkheadError):
        _complain(f"bulkhead: {error.message}")
        if words not in _OTHERWISE or "no_terminal" in error.details:
            return 1
        return _EXIT.get(error.category, _OTHERWISE[words])
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"bulkhead: {where}{error.strerror or error}")
        return 125 if words in ("run", "exec") else 1
    if not debug:
        import traceback

        traceback.print_exception(error)
    _complain(f"bulkhead: internal error: {type(error).__name__}: {error}; please report it")
    return 125 if words in ("run", "exec") else 1


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _drop_stdout() -> None:
    """Let nothing try to flush to the closed pipe again."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
