"""The same command lines for docker and for us, and what differs in what they answer.

A scene is a shell script of which every line is one case; `D` is the program. What is random
(identifiers, times, addresses, sizes on disk) is made equal on both sides before comparing.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.installation import TIMEOUT_S

_ERRORS = [
    (r"(?m)^(docker|bulkhead|Error response from daemon|Error|ERROR): ", ""),
    (r"(?m)^time=.*$", ""),
    (r"(?ms)^\n?Usage:.*", ""),
    (r"requires exactly", "requires"),
    (r"\"", "'"),
    (r"(?m)^See '.*--help'\.?$", ""),
    (r"(failed to create shim task: )?OCI runtime (create|exec) failed: ", ""),
    (r"(runc create|exec) failed: unable to start container process: ", ""),
    (r"(?m)(: unknown)?\.?$", ""),
    (r"(?m)^No such (network|volume): (\S+)$", r"no \1 \2"),
    (r"(?m)^network (\S+) not found$", r"no network \1"),
    (r"(?m)^get (\S+): no such volume$", r"no volume \1"),
    (r"\n+", "\n"),
]
"""What only words an error otherwise: prefixes of who says it, hints at the help, the last full
stop, what newer versions of docker say as we do.
"""
_RULES = [
    (r"sha256:[0-9a-f]{64}", "<digest>"),
    (r"\b[0-9a-f]{64}\b", "<id>"),
    (r"\b[0-9a-f]{12}\b", "<short>"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( [+-]\d{4} [A-Z]+|Z|[+-]\d\d:\d\d)?", "<time>"),
    (r"(Less than a second|About an? \w+|\d+ (second|minute|hour|day|month|year)s?) ago", "<ago>"),
    (r"Up (Less than a second|About an? \w+|\d+ \w+)", "Up <time>"),
    (r"\b\d+(\.\d+)?(B|kB|MB|GB|KiB|MiB|GiB)\b", "<size>"),
    (r"\b(10|172|192)\.\d+\.\d+\.\d+(/\d+)?", "<address>"),
    (r"\b(docker|bulkhead)\b", "<program>"),
    (r" {2,}", "  "),
    (r"(?m)[ \r]+$", ""),
]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What one command said, made comparable."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        lines = [f"exit code {self.code}"]
        lines += [f"  out| {line}" for line in self.out.splitlines()]
        return "\n".join(lines + [f"  err| {line}" for line in self.err.splitlines()])


def comparable(text: str, *, errors: bool = False) -> str:
    """`text` without what is different at every call."""
    if errors:
        for pattern, by in _ERRORS * 2:
            text = re.sub(pattern, by, text.strip())
        text = text.lower()
    for pattern, by in _RULES:
        text = re.sub(pattern, by, text)
    return text.rstrip("\n")


def ask(program: Sequence[str], line: str, environment: Mapping[str, str], folder: Path) -> Answer:
    """Run one line of a scene with `program` as `D`, in `folder`."""
    words = " ".join(f"'{word}'" for word in program)
    done = subprocess.run(
        ["sh", "-c", f'D() {{ {words} "$@"; }}\n{line}'], env={**environment, "TZ": "UTC"},
        cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return Answer(done.returncode, comparable(out), comparable(err, errors=True))


def lines_of(scene: str) -> list[str]:
    """The cases of a scene."""
    return [line.strip() for line in scene.strip().splitlines() if line.strip()]


def plain_environment(**more: str) -> dict[str, str]:
    """What both programs get."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER", "BULKHEAD"))}
    return {**keep, **more}
