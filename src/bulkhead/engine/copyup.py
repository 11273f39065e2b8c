"""The first use of a volume fills it with what the image has at its place."""

import os
from typing import TYPE_CHECKING

from bulkhead.engine import views
from bulkhead.errors import Invalid
from bulkhead.linux import copying, openat2

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine


def subdirectory(path: str, subpath: str) -> str:
    """`subpath` within the volume at `path`; Invalid if it is not there or leads out."""
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with openat2.openat2(root, subpath, os.O_PATH, openat2.BENEATH) as fd:
            return os.readlink(f"/proc/self/fd/{int(fd)}")
    except OSError as error:
        raise Invalid(f"cannot access path {subpath} of the volume: {error.strerror}") from error
    finally:
        os.close(root)


async def fill(engine: "Engine", target: str, lowers: tuple[str, ...], destination: str) -> None:
    """Copy the image's directory at `destination` into the empty volume `target`."""
    if not any(_has(layer, destination) for layer in lowers) or os.listdir(target):
        return

    def copy(root: int) -> None:
        try:
            source = openat2.openat2(
                root, destination, os.O_RDONLY | os.O_DIRECTORY, openat2.IN_ROOT
            )
        except OSError:
            return
        into = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with source:
                copying.copy_directory(int(source), into)
        finally:
            os.close(into)

    await engine.blocking(lambda: views.with_layers(lowers, copy))


def _has(layer: str, destination: str) -> bool:
    try:
        root = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        openat2.openat2(root, destination, os.O_PATH, openat2.IN_ROOT).close()
    except OSError:
        return False
    finally:
        os.close(root)
    return True
