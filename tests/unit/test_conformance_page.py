"""docs/conformance.md is a table of the conformance suite, with each blank explained."""

import re
from pathlib import Path

import pytest
from scripts import conformance

RESULT = """<testsuites><testsuite>
<testcase name="test_one[a]"/><testcase name="test_one[b]"/><testcase name="test_one[gone]">
<skipped message="not installed"/></testcase>
<testcase name="test_a_guest_s_end[a]"/><testcase name="test_a_guest_s_end[b]">
<skipped message="has no end"/></testcase>
<testcase name="test_three[a]"/><testcase name="test_three[b]"><failure message="x"/></testcase>
</testsuite></testsuites>"""


def test_a_run_becomes_a_table(tmp_path: Path) -> None:
    path = tmp_path / "result.xml"
    path.write_text(RESULT)
    cells = conformance.read(path)
    assert conformance.columns(cells) == ["a", "b"]
    assert conformance.shares(cells) == {"a": 1.0, "b": pytest.approx(1 / 3)}
    page = conformance.write(cells, ["test_one", "test_a_guest_s_end", "test_three"])
    assert "| One | yes | yes |" in page
    assert "| A guest's end | yes | (1) |" in page
    assert "1. has no end" in page


def test_the_page_has_the_tests_and_every_reason() -> None:
    page = conformance.PAGE.read_text(encoding="utf-8")
    tests = conformance.order()
    shown = [test for test in tests if f"| {conformance.words(test)} |" in page]
    assert len(shown) >= len(tests) * 0.9, "run scripts/conformance.py"
    for number in set(re.findall(r"\((\d+)\) \|", page)):
        assert re.search(rf"^{number}\. \S", page, re.MULTILINE)
    (total,) = (line for line in page.splitlines() if line.startswith("| **holds**"))
    parts = [int(part) for part in re.findall(r"(\d+)%", total)]
    (names,) = (line.split("|")[2:-1] for line in page.splitlines() if line.startswith("|  | "))
    columns = {name.strip(): part for name, part in zip(names, parts, strict=True)}
    boundaries = [part for name, part in columns.items() if ":" not in name]
    assert len(boundaries) >= 3
    assert min(boundaries) >= conformance.LEAST * 100
