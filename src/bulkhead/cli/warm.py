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


def watch(package: str) -> int:
    """An inotify descriptor that is readable once a file of the package has changed."""
    from bulkhead.linux import inotify

    fd = inotify.create()
    try:
        for directory, names, _ in os.walk(package):
            names[:] = [name for name in names if name != "__pycache__"]
            inotify.watch(fd, directory, inotify.CLOSE_WRITE | inotify.MOVED_TO | inotify.DELETE)
    except BaseException:
        os.close(fd)
        raise
    return fd
