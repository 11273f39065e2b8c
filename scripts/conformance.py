"""Runs the conformance suite on every boundary and writes its table: docs/conformance.md.

    python scripts/conformance.py              run, print the table, write the page
    python scripts/conformance.py RESULT.xml…  the table of runs that were made with --junitxml

Rows are the tests of tests/guest/test_conformance.py, columns the boundaries. A blank has its
reason below the table; a failure has none, and no page is written then.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests/guest/test_conformance.py"
PAGE = ROOT / "docs/conformance.md"
LEAST = 0.95
"""Part of the rows that must hold behind every boundary (second kernels may hold less)."""
YES = "yes"
_HEAD = """# Conformance

What is promised of a workload, and behind which boundary it holds: one suite
(`tests/guest/test_conformance.py`), the same tests on each. `python scripts/conformance.py` writes
this page from a run of it.

"""
Cells = dict[str, dict[str, str]]
"""By test and column: YES, or why not."""


def main(arguments: Sequence[str]) -> int:
    """The command; 1 if something failed or a column is below what it must reach."""
    if arguments:
        cells: Cells = {}
        for name in arguments:
            for test, row in read(Path(name)).items():
                cells.setdefault(test, {}).update(row)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.xml"
            command = [sys.executable, "-m", "pytest", "-q", str(SUITE), f"--junitxml={result}"]
            environment = {**os.environ, "BULKHEAD_CONFORMANCE": "all"}
            subprocess.run(command, cwd=ROOT, env=environment, check=False)
            cells = read(result)
    failed = [f"{test} [{column}]" for test, row in cells.items() for column in row
              if row[column].startswith("failed")]  # fmt: skip
    page = write(cells, order())
    print(page)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    parts = shares(cells).items()
    short = [name for name, part in parts if part < LEAST and ":" not in name]
    for name in short:
        print(f"{name} holds less than {LEAST:.0%} of the rows", file=sys.stderr)
    if failed or short:
        return 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


def order() -> list[str]:
    """The tests of the suite, as they stand there."""
    tree = ast.parse(SUITE.read_text(encoding="utf-8"))
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def read(result: Path) -> Cells:
    """The outcomes of a run; see pytest's junitxml."""
    cells: Cells = {}
    for case in ElementTree.parse(result).getroot().iter("testcase"):
        found = re.fullmatch(r"(test_\w+)\[([^\]]+)\]", case.get("name", ""))
        if found is None:
            continue
        skipped = case.find("skipped")
        outcome = YES
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        elif skipped is not None:
            outcome = skipped.get("message", "") or "skipped"
        cells.setdefault(found[1], {})[found[2]] = outcome
    return cells


def columns(cells: Cells) -> list[str]:
    """The boundaries, in the order of the run, less those that could not run at all."""
    names = dict.fromkeys(column for row in cells.values() for column in row)
    return [name for name in names if any(row.get(name) == YES for row in cells.values())]


def shares(cells: Cells) -> Mapping[str, float]:
    """The part of the rows that holds in each column."""
    return {
        name: sum(row.get(name) == YES for row in cells.values()) / len(cells)
        for name in columns(cells)
    }


def words(test: str) -> str:
    """A test's name as a sentence."""
    text = test.removeprefix("test_").replace("_s_", "'s ").replace("_", " ")
    return text[0].upper() + text[1:]


def write(cells: Cells, tests: Sequence[str]) -> str:
    """The page."""
    names = columns(cells)
    reasons: dict[str, int] = {}
    lines = ["| " + " | ".join(["", *names]) + " |", "|---" * (len(names) + 1) + "|"]
    for test in tests:
        row = cells.get(test, {})
        marks = []
        for name in names:
            outcome = row.get(name, "not run")
            mark = YES if outcome == YES else f"({reasons.setdefault(outcome, len(reasons) + 1)})"
            marks.append(mark)
        lines.append("| " + " | ".join([words(test), *marks]) + " |")
    total = [f"{part:.0%}" for part in shares(cells).values()]
    lines.append("| " + " | ".join(["**holds**", *total]) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return _HEAD + "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
