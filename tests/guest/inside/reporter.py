"""A pytest plugin that writes one JSON line per test to the file named by BULKHEAD_GUEST_REPORT."""

import contextlib
import json
import os

import pytest

CONSOLE = 3
"""The descriptor that `job.script` gives."""

_lines: dict[str, dict[str, object]] = {}


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(CONSOLE, f"{text}\n".encode())


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say on the console what begins."""
    _say(f"... {nodeid}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst of a test's three phases, and write it once the last one is over."""
    line = _lines.setdefault(
        report.nodeid, {"id": report.nodeid, "outcome": "passed", "seconds": 0.0, "text": ""}
    )
    seconds = line["seconds"]
    assert isinstance(seconds, float)
    line["seconds"] = seconds + report.duration
    if report.outcome != "passed" and line["outcome"] != "failed":
        line["outcome"] = report.outcome
        longrepr = report.longrepr
        line["text"] = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    if report.when == "teardown":
        del _lines[report.nodeid]
        _say(f"{line['outcome']} {report.nodeid} {line['seconds']:.1f} s")
        with open(os.environ["BULKHEAD_GUEST_REPORT"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
