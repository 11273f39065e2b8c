"""ELF files: which interpreter and shared libraries a program needs, found as ld.so(8) finds them.

Only what is asked of trusted programs of this host: 64-bit, little-endian. Nothing is executed.
"""

import glob
import os
import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_NEEDED, _STRTAB, _STRSZ, _RPATH, _RUNPATH = 1, 5, 10, 15, 29
_STANDARD = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")


class ElfError(ValueError):
    """Not an ELF file of the expected kind."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a file needs to be loaded."""

    interpreter: str
    """"" for a static program or a library."""
    libraries: tuple[str, ...]
    search: tuple[str, ...]
    """Directories of its own to look in, $ORIGIN replaced."""


def needs(path: str) -> Needs:
    """What the ELF file at `path` asks for; ElfError, OSError."""
    with open(path, "rb") as file:
        data = file.read()
    if len(data) < _HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        raise ElfError(f"{path}: not a 64-bit little-endian ELF file")
    fields = _HEADER.unpack_from(data)
    offset, size, count = fields[5], fields[9], fields[10]
    if size != _SEGMENT.size or offset + size * count > len(data):
        raise ElfError(f"{path}: damaged program headers")
    segments = [_SEGMENT.unpack_from(data, offset + size * i) for i in range(count)]
    interpreter = ""
    libraries: list[str] = []
    search: list[str] = []
    for kind, _, at, _, _, length, _, _ in segments:
        if kind == _PT_INTERP:
            interpreter = data[at : at + length].rstrip(b"\0").decode()
        elif kind == _PT_DYNAMIC:
            libraries, search = _dynamic(path, data[at : at + length], data, segments)
    return Needs(interpreter, tuple(libraries), tuple(search))


def _dynamic(
    path: str, table: bytes, data: bytes, segments: list[tuple[int, ...]]
) -> tuple[list[str], list[str]]:
    usable = len(table) - len(table) % _DYNAMIC.size
    entries = list(_DYNAMIC.iter_unpack(table[:usable]))
    address = next((value for tag, value in entries if tag == _STRTAB), None)
    if address is None:
        return [], []
    for kind, _, at, base, _, length, _, _ in segments:
        if kind == _PT_LOAD and base <= address < base + length:
            start = at + address - base
            break
    else:
        raise ElfError(f"{path}: its string table is not loaded")

    def text(value: int) -> str:
        end = data.find(b"\0", start + value)
        return data[start + value : end].decode()

    origin = os.path.dirname(os.path.realpath(path))
    wanted = [text(value) for tag, value in entries if tag == _NEEDED]
    folders = [
        folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)
        for tag, value in entries
        if tag in (_RPATH, _RUNPATH)
        for folder in text(value).split(":")
        if folder
    ]
    return wanted, folders


def directories(pattern: str = "/etc/ld.so.conf") -> list[str]:
    """Where the loader looks for libraries on this host: ld.so.conf, then the standard places."""
    found: list[str] = []
    for path in sorted(glob.glob(pattern)):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.partition("#")[0].split()
                if len(words) == 2 and words[0] == "include":
                    place = os.path.join(os.path.dirname(path), words[1])
                    found += [one for one in directories(place) if one not in _STANDARD]
                elif words:
                    found.append(words[0])
    return [*dict.fromkeys(found), *_STANDARD]


def closure(program: str) -> dict[str, str]:
    """Every file that running `program` maps: where the loader will look for it → where it is.

    ElfError names a library that is not there.
    """
    places = directories()
    files: dict[str, str] = {program: os.path.realpath(program)}
    waiting, seen = [program], set[str]()
    while waiting:
        path = waiting.pop()
        wanted = needs(path)
        if wanted.interpreter:
            files[wanted.interpreter] = os.path.realpath(wanted.interpreter)
        for name in wanted.libraries:
            if name in seen:
                continue
            seen.add(name)
            found = _find(name, (*wanted.search, *places))
            if found is None:
                raise ElfError(f"{program} needs the library {name}, which is not installed")
            files[found] = os.path.realpath(found)
            waiting.append(found)
    return files


def _find(name: str, places: tuple[str, ...]) -> str | None:
    if "/" in name:
        return name if os.path.exists(name) else None
    for place in places:
        path = f"{place}/{name}"
        if os.path.exists(path):
            return path
    return None
