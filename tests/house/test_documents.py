"""Documents: links lead somewhere, promises name tests that exist, decisions are indexed."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)")
PROMISE = re.compile(r"^(\d+)\. ", re.MULTILINE)
HOLDER = re.compile(r"`((?:tests|bench)/[\w./-]+\.py)(?:::(\w+))?")


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "SPECIFICATION.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_links_lead_somewhere() -> None:
    for document in documents():
        for target in LINK.findall(document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_required_documents_exist() -> None:
    for name in ("architecture", "glossary", "security", "debugging", "benchmarks"):
        assert (ROOT / "docs" / f"{name}.md").exists(), name


def test_promises_are_numbered_and_held() -> None:
    text = (ROOT / "SPECIFICATION.md").read_text()
    numbers = [int(n) for n in PROMISE.findall(text)]
    assert numbers == list(range(1, len(numbers) + 1))
    for block in re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]:
        holders = HOLDER.findall(block)
        assert holders, f"no test or benchmark named: {block[:80]}"
        for path, function in holders:
            source = ROOT / path
            assert source.exists(), path
            if function:
                names = {
                    n.name
                    for n in ast.walk(ast.parse(source.read_text()))
                    if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
                }
                assert function in names, f"{path} has no {function}"


def test_decisions_are_indexed() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    for decision in (ROOT / "docs" / "adr").glob("[0-9]*.md"):
        assert decision.name in index, decision.name


def test_changes_are_fragments() -> None:
    for fragment in (ROOT / "changes").iterdir():
        assert fragment.suffix == ".md", fragment.name
        assert fragment.read_text().strip(), fragment.name
