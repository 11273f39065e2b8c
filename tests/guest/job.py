"""What a guest is to run, and what came of it: the part that is the same for every guest."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TAIL = 60
SCALE = 0.1
"""Guests are slow: counts that scale are a tenth."""
HANG_S = 240
"""After so long in one test the guest writes every thread's stack into its output."""


@dataclass(frozen=True)
class Result:
    """One test inside the guest."""

    id: str
    outcome: str
    seconds: float
    text: str


def script(tests: Sequence[str], python: str, exchange: str, timeout_s: int) -> str:
    """The shell script of a job; it leaves report, output and code in `exchange` of the guest.

    Each test's name goes to the console when it begins and when it has ended: if the guest hangs,
    that is all there is.
    """
    words = " ".join(shlex.quote(test) for test in tests)
    return f"""
export PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export BULKHEAD_TEST_SCALE={SCALE} BULKHEAD_GUEST=1 BULKHEAD_GUEST_REPORT={exchange}/report
timeout {timeout_s} {python} -m pytest -q -p tests.guest.inside.reporter \\
    -o faulthandler_timeout={HANG_S} {words} 3>&1 >{exchange}/output 2>&1 </dev/null
echo $? >{exchange}/code
tail -n 15 {exchange}/output
"""


def results(exchange: Path) -> list[Result]:
    """What the reporter wrote."""
    report = exchange / "report"
    if not report.exists():
        return []
    return [Result(**json.loads(line)) for line in report.read_text().splitlines()]


def tail(text: str) -> str:
    """The end of a log."""
    return "\n".join(text.splitlines()[-TAIL:])


def told(exchange: Path, log: str, what: str, subtests: pytest.Subtests) -> None:
    """Repeat each of the guest's tests as a subtest; fail if the guest did not get through."""
    found = results(exchange)
    for result in found:
        with subtests.test(msg=result.id):
            if result.outcome == "skipped":
                pytest.skip(result.text)
            assert result.outcome == "passed", f"in {what}: {result.text}"
    code = (exchange / "code").read_text().strip() if (exchange / "code").exists() else "none"
    output = (exchange / "output").read_text() if (exchange / "output").exists() else ""
    ended = code == "0" or (code == "1" and any(r.outcome == "failed" for r in found))
    assert ended, f"{what}: pytest ended with {code}\n{tail(output)}\n--- console\n{tail(log)}"
    assert any(result.outcome == "passed" for result in found), f"{what}: nothing ran\n{output}"
