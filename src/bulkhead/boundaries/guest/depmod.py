"""Which kernel modules need which: modules.dep(5), made from the modules themselves.

Every module says in its .modinfo section what it depends on (`depends=a,b`). depmod(8), which is
not installed everywhere, finds the same by comparing symbols.
"""

import contextlib
import lzma
import os
import re
import sys

from bulkhead.errors import Invalid

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_SUFFIXES = (".ko", ".ko.xz", ".ko.zst")


def write(folder: str) -> None:
    """Make `folder`/modules.dep; nothing to do if there is one. Invalid for a damaged module."""
    target = f"{folder}/modules.dep"
    if os.path.exists(target):
        return
    files = {_name(path): path for path in _modules(folder)}
    with contextlib.ExitStack() as undo:
        undo.callback(_forget, f"{target}.new")
        with open(f"{target}.new", "w", encoding="ascii") as out:
            for path in files.values():
                needed = [files[name] for name in _depends(f"{folder}/{path}") if name in files]
                out.write(f"{path}: {' '.join(needed)}\n")
        os.rename(f"{target}.new", target)
        undo.pop_all()


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _modules(folder: str) -> list[str]:
    return sorted(
        os.path.relpath(f"{where}/{name}", folder)
        for where, _, names in os.walk(folder)
        for name in names
        if name.endswith(_SUFFIXES)
    )


def _name(path: str) -> str:
    return os.path.basename(path).partition(".")[0].replace("-", "_")


def _depends(path: str) -> list[str]:
    with open(path, "rb") as file:
        data = file.read()
    try:
        if path.endswith(".xz"):
            data = lzma.decompress(data)
        elif path.endswith(".zst"):
            data = zstd.decompress(data)
    except (lzma.LZMAError, zstd.ZstdError) as error:
        raise Invalid(f"the module {path} is damaged: {error}") from error
    match = _DEPENDS.search(data)
    if match is None:
        raise Invalid(f"the module {path} does not say what it depends on")
    return [name.replace("-", "_") for name in match[1].decode("ascii").split(",") if name]
