"""Compiled filters, kept in memory and on disk.

    DIRECTORY/KEY.bpf   sha256 of what follows (32 bytes) | flags (4, little-endian) | instructions

KEY is the sha256 of the rules, the machine, and the compiler's own source and tables, so that a
new release never reads an old one's filters. Files are written whole (rename(2)), by anybody with
the same result: no lock. Bytes that fail their own hash are never used: the filter is compiled
again and the file replaced.
"""

import contextlib
import hashlib
import os
from functools import cache

import msgspec

from bulkhead.isolation.seccomp.compile import Filter, compile_filter
from bulkhead.linux import seccomp as kernel
from bulkhead.linux import syscall
from bulkhead.oci.runtime import Seccomp

_encode = msgspec.msgpack.Encoder(order="deterministic").encode

MEMORY_LIMIT = 256
"""Filters kept in memory; a machine uses a handful of profiles."""


@cache
def _compiler() -> bytes:
    """Hash of what the result depends on besides the rules."""
    from importlib import resources  # imports are most of a runtime's time

    digest = hashlib.sha256()
    for package, name in (
        ("bulkhead.isolation.seccomp", "compile.py"),
        ("bulkhead.linux", "seccomp.py"),
        ("bulkhead.linux", "syscall_numbers.json"),
    ):
        digest.update(resources.files(package).joinpath(name).read_bytes())
    return digest.digest()


class FilterCache:
    """Compiles each set of rules once; `directory` None keeps nothing on disk."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._memory: dict[bytes, Filter] = {}

    def get(self, seccomp: Seccomp) -> Filter:
        """The filter of `seccomp` on this machine; the errors of `compile_filter`."""
        rules = _encode(seccomp)
        found = self._memory.get(rules)
        if found is None:
            if len(self._memory) >= MEMORY_LIMIT:
                self._memory.clear()
            found = self._memory[rules] = self._from_disk(rules, seccomp)
        return found

    def _from_disk(self, rules: bytes, seccomp: Seccomp) -> Filter:
        if self._directory is None:
            return compile_filter(seccomp)
        key = hashlib.sha256(_compiler() + syscall.machine().encode() + b"\0" + rules).hexdigest()
        path = f"{self._directory}/{key}.bpf"
        try:
            with open(path, "rb") as file:
                data = file.read(36 + 8 * kernel.MAX_INSTRUCTIONS + 1)
        except (FileNotFoundError, NotADirectoryError):
            pass
        else:
            if _intact(data):
                return Filter(data[36:], int.from_bytes(data[32:36], "little"))
            _warn("%s is damaged; compiling anew", path)
        compiled = compile_filter(seccomp)
        self._save(path, compiled)
        return compiled

    def _save(self, path: str, compiled: Filter) -> None:
        assert self._directory is not None
        body = compiled.flags.to_bytes(4, "little") + compiled.program
        from tempfile import mkstemp  # imports are most of a runtime's time

        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            handle, temporary = mkstemp(dir=self._directory)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(body).digest() + body)
                os.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            # A cache that cannot be written costs time, not safety.
            _warn("cannot write %s: %s", path, error.strerror)


def _warn(text: str, *values: object) -> None:
    import logging  # imports are most of a runtime's time

    logging.getLogger(__name__).warning("seccomp cache: %s", text % values)


def _intact(data: bytes) -> bool:
    if len(data) <= 36 or (len(data) - 36) % 8 or (len(data) - 36) // 8 > kernel.MAX_INSTRUCTIONS:
        return False
    return hashlib.sha256(data[32:]).digest() == data[:32]
