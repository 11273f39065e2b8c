"""Relocatable ELF files as compilers make them, small."""

import struct

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION = struct.Struct("<IIQQQQIIQQ")


def relocatable(sections: list[tuple[str, int, bytes]]) -> bytes:
    """A relocatable ELF with these sections (name, type, contents), its names last."""
    names = b"\0"
    table = [SECTION.pack(*[0] * 10)]
    body = bytearray(HEADER.size)
    for name, kind, data in [*sections, (".shstrtab", 3, b"")]:
        at = len(names)
        names += name.encode() + b"\0"
        contents = names if name == ".shstrtab" else data
        body += bytes(-len(body) % 16)
        table.append(SECTION.pack(at, kind, 0, 0, len(body), len(contents), 0, 0, 16, 0))
        body += contents
    start = len(body)
    count = len(table)
    magic = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    HEADER.pack_into(body, 0, magic, 1, 62, 1, 0, 0, start, 0, 64, 0, 0, 64, count, count - 1)
    return bytes(body) + b"".join(table)
