"""Deleting the directories of workloads."""

import contextlib
import os
import shutil

_NOTHING = 40
"""Entries of a directory tree that is deleted on the spot."""


def delete_tree(path: str) -> None:
    """Delete a directory and everything in it, also what a workload made unreadable."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def delete_small(path: str, most: int = _NOTHING) -> bool:
    """`delete_tree` if there are at most `most` entries, else nothing changes; whether it did.

    Only for trees that nobody changes meanwhile.
    """
    found: list[tuple[str, bool]] = []
    if not _list(path, found, most):
        return False
    for entry, directory in reversed(found):
        if directory:
            os.rmdir(entry)
        else:
            os.unlink(entry)
    return True


def _list(path: str, found: list[tuple[str, bool]], most: int) -> bool:
    """Append `path` and what is below, parents first; False if that is more than `most`."""
    found.append((path, True))
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    found.append((entry.path, False))
                elif not _list(entry.path, found, most):
                    return False
                if len(found) > most:
                    return False
    except FileNotFoundError:
        found.pop()
    return True
