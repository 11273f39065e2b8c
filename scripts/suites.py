"""Runs the test suites one after the other, each within its budget, and prints a table.

    python scripts/suites.py [--no-budget] [SUITE…]

Each suite is a folder of tests/. A suite that exceeds its budget is ended and counts as failed.
Tests of the suites that use the real kernel are run a second time, alone, when they failed: a test
that then passes is not hidden but named as *unstable* at the end, and more than UNSTABLE_MAX of
them fail the run. Sizes scale by BULKHEAD_TEST_SCALE (see tests/helpers/scale.py).
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BUDGETS = {
    "house": 120,
    "unit": 120,
    "kernel": 540,
    "security": 180,
    "e2e": 900,
    "chaos": 420,
    "guest": 1320,
}
"""Seconds; together an hour, on two cores."""

STRICT = ("house", "unit")
"""Suites whose tests depend on nothing outside the process: never run twice."""

UNSTABLE_MAX = 3


@dataclass
class Outcome:
    """How one suite went."""

    name: str
    seconds: float
    verdict: str
    unstable: list[str] = field(default_factory=list)


def pytest(arguments: list[str], failed: Path, limit: float | None) -> int | None:
    """Run pytest in a process group of its own; its exit code, or None when over `limit`."""
    environment = {**os.environ, "BULKHEAD_FAILED_TESTS": str(failed)}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "--durations=5", *arguments],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            try:
                process.wait(timeout=20)
                break
            except subprocess.TimeoutExpired:
                continue
        if isinstance(error, KeyboardInterrupt):
            raise
        return None


def run(name: str, budget: int | None) -> Outcome:
    """Run suite `name`; failures of a suite that is not STRICT get a second run, alone."""
    print(f"\n== {name}" + (f" (budget {budget} s)" if budget else ""), flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        failed = Path(folder, "failed")
        code = pytest([f"tests/{name}"], failed, budget)
        first = failed.read_text().splitlines() if failed.exists() else []
        unstable: list[str] = []
        if code == 1 and name not in STRICT and 0 < len(first) <= UNSTABLE_MAX:
            print(f"\n== {name}: again, alone: {' '.join(first)}", flush=True)
            left = None if budget is None else max(60, budget - (time.monotonic() - start))
            again = Path(folder, "again")
            code = pytest(first, again, left)
            unstable = first if code == 0 else []
    verdict = {None: "over budget", 0: "passed", 5: "no tests"}.get(code, "failed")
    return Outcome(name, time.monotonic() - start, verdict, unstable)


def main() -> int:
    """Run what was asked for; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*BUDGETS, []], metavar="SUITE")
    parser.add_argument("--no-budget", action="store_true")
    options = parser.parse_args()
    # Where this is a shell's background job SIGINT is ignored, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = options.suites or list(BUDGETS)
    outcomes = [run(name, None if options.no_budget else BUDGETS[name]) for name in names]

    print(f"\n{'suite':<10} {'verdict':<14} {'seconds':>8} {'budget':>8}")
    for outcome in outcomes:
        print(
            f"{outcome.name:<10} {outcome.verdict:<14} {outcome.seconds:>8.0f} "
            f"{BUDGETS[outcome.name]:>8}"
        )
    unstable = [test for outcome in outcomes for test in outcome.unstable]
    for test in unstable:
        print(f"UNSTABLE: failed once and passed when run again alone: {test}")
    bad = [outcome for outcome in outcomes if outcome.verdict != "passed"]
    too_many = len(unstable) > UNSTABLE_MAX
    if too_many:
        print(f"more than {UNSTABLE_MAX} unstable tests: that is a failure")
    print(f"{len(outcomes) - len(bad)} passed, {len(bad)} failed")
    return 1 if bad or too_many else 0


if __name__ == "__main__":
    sys.exit(main())
