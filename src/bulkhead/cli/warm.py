"""What the command server loads before it forks, and how it learns that it is out of date."""

import importlib
import os

_MODULES = (
    "bulkhead.cli.main",
    "bulkhead.cli.dispatch",
    "bulkhead.cli.session",
    "bulkhead.cli.terminal",
    "bulkhead.cli.mounts",
    "bulkhead.cli.ports",
    "bulkhead.cli.files",
    "bulkhead.cli.output",
    "bulkhead.cli.pulling",
    "bulkhead.client.start",
    "json",
)


def load() -> None:
    """Import every command and index its options."""
    from bulkhead.cli.dispatch import load as load_command
    from bulkhead.cli.registry import COMMANDS

    for name in _MODULES:
        importlib.import_module(name)
    for words in COMMANDS:
        _ = load_command(words).table


def rehearse() -> None:
    """Walk the path of a plain `run` up to the engine, so that no page of it is touched first then.

    A forked process copies each page at its first write: better before a command than in one.
    """
    from bulkhead.cli.body import create_body
    from bulkhead.cli.dispatch import GLOBAL, find, make_context
    from bulkhead.cli.dispatch import load as load_command
    from bulkhead.cli.session import Session, attached_fds
    from bulkhead.cli.signals import FORWARDED, SignalPipe
    from bulkhead.rpc import wire

    for _ in range(3):
        parsed = GLOBAL.parse(["run", "--rm", "x", "true"], interspersed=False)
        context = make_context(parsed, os.environ)
        words, _implied, used = find(parsed.args)
        command = load_command(words).parse(parsed.args[used:])
        body = create_body(command, os.environ)
        Session(context, tty=False, stdin=False, proxy=True)
        attached_fds(False, True, True)
        data = wire.frame(wire.Message(1, "workload.run", wire.pack({"body": body}), 2))
        wire.Splitter().feed(data)
        with SignalPipe(FORWARDED):
            pass
        context.close()


def watch(package: str) -> int:
    """An inotify descriptor, readable once a file below `package` has changed ("": never)."""
    from bulkhead.linux import inotify

    fd = inotify.create()
    try:
        for directory, names, _ in os.walk(package) if package else ():
            names[:] = [name for name in names if name != "__pycache__"]
            inotify.watch(fd, directory, inotify.CLOSE_WRITE | inotify.MOVED_TO | inotify.DELETE)
    except BaseException:
        os.close(fd)
        raise
    return fd
