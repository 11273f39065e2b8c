"""Write src/bulkhead/linux/syscall_numbers.json from the kernel's own headers.

    python scripts/syscall_tables.py HEADERS PACKAGE

HEADERS is the folder usr/lib/linux/uapi of Debian's `linux-libc-dev` (trixie or later: one package
holds every architecture), PACKAGE its name and version, recorded in the file. The headers are
`make headers_install` output: asm/unistd_64.h, asm/unistd_32.h (x86), asm/unistd-eabi.h (arm).
Calls that are newer than those headers stand in `NEWER`, with the release that brought them; they
have one number on every architecture (include/uapi/asm-generic/unistd.h, scripts/syscall.tbl).
"""

import json
import re
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "src/bulkhead/linux/syscall_numbers.json"

HEADERS = {
    "x86_64": "x86/asm/unistd_64.h",
    "x86": "x86/asm/unistd_32.h",
    "aarch64": "arm64/asm/unistd_64.h",
    "arm": "arm/asm/unistd-eabi.h",
}

NEWER = {
    "setxattrat": 463,  # 6.13
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,  # 6.15
    "file_getattr": 468,  # 6.17
    "file_setattr": 469,
}
NEWER_X86_64 = {"uprobe": 336}  # 6.18

ARM_PRIVATE = {"breakpoint": 1, "cacheflush": 2, "usr26": 3, "usr32": 4, "set_tls": 5}
"""arch/arm/include/uapi/asm/unistd.h: __ARM_NR_BASE (0x0f0000) plus these."""
ARM_PRIVATE_BASE = 0x0F0000

DEFINE = re.compile(r"#define __NR_(\w+)\s+(?:\(__NR_SYSCALL_BASE \+ )?(\d+)\)?\s*$", re.MULTILINE)


def table(architecture: str, text: str) -> dict[str, int]:
    """The calls a header defines, with those newer than it."""
    numbers = {name: int(number) for name, number in DEFINE.findall(text)}
    numbers.update(NEWER)
    if architecture == "x86_64":
        numbers.update(NEWER_X86_64)
    if architecture == "arm":
        numbers |= {name: ARM_PRIVATE_BASE + number for name, number in ARM_PRIVATE.items()}
    if len(set(numbers.values())) != len(numbers):
        raise SystemExit(f"{architecture}: two calls share a number")
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    headers, package = Path(sys.argv[1]), sys.argv[2]
    tables = {arch: table(arch, (headers / path).read_text()) for arch, path in HEADERS.items()}
    lines = [
        f' "source": {json.dumps(f"{package}, usr/lib/linux/uapi; scripts/syscall_tables.py")}'
    ]
    lines += [f" {json.dumps(arch)}: {json.dumps(numbers)}" for arch, numbers in tables.items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
