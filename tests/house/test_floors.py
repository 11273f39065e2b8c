"""The house rules: floors, cycles, ctypes, sizes, empty packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "bulkhead"

FLOORS: dict[str, int] = {
    "errors": -1, "home": 0, "linux": 0, "_native": 0,
    "oci": 1, "rpc": 1,
    "isolation": 2,
    "boundary": 3,
    "boundaries": 4, "keeper": 4,
    "store": 5, "registry": 5, "images": 6, "network": 5, "state": 5, "volumes": 6,
    "build": 7, "depot": 7, "machines": 7,
    "choosing": 8,
    "engine": 9,
    "api": 10, "client": 10, "runtime": 10, "comparing": 11, "cli": 12,
}  # fmt: skip
"""DESIGN's floors; images stands on store and registry, cli on client."""

SHARED_BY_MECHANISMS = {"lookup"}
"""Confined path look-up: a tool of the mechanisms, not one of them."""

MODULE_LINES = 600
FUNCTION_LINES = 60


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    known = {name_of(p) for p in modules()}
    guarded: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            guarded |= {id(inner) for inner in ast.walk(node)}
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            guarded |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in guarded and top_level:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor_of(module: str) -> int:
    return FLOORS[package(module)]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_down(path: Path) -> None:
    here = name_of(path)
    if here in ("bulkhead", "bulkhead.__main__"):
        return  # the lazy door to the SDK
    for target in imports(path):
        if not target.startswith("bulkhead."):
            assert target != "bulkhead", f"{here} imports the package itself"
            continue
        if package(target) == package(here):
            continue
        assert floor_of(target) < floor_of(here), f"{here} may not import {target}"


def test_isolation_mechanisms_do_not_know_each_other() -> None:
    for path in (SOURCE / "isolation").rglob("*.py"):
        here = name_of(path).split(".")
        for target in imports(path):
            parts = target.split(".")
            if parts[:2] == ["bulkhead", "isolation"] and len(parts) > 2 and len(here) > 2:
                allowed = {here[2], *SHARED_BY_MECHANISMS}
                assert parts[2] in allowed, f"{'.'.join(here)} may not import {target}"


def test_no_cycles() -> None:
    graph = {
        name_of(path): {t for t in imports(path, top_level=True) if t.startswith("bulkhead.")}
        for path in modules()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' → '.join((*trail, module))}"
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            if target != module:
                visit(target, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_ctypes_only_in_linux() -> None:
    for path in modules():
        if package(name_of(path)) != "linux":
            assert not {t for t in imports(path) if t.split(".")[0] in ("ctypes", "cffi")}, path


def test_packages_are_docstrings() -> None:
    for path in SOURCE.rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert body and isinstance(body[0], ast.Expr), f"{path} has no docstring"
        if path.parent != SOURCE:
            assert len(body) == 1, f"{path} is more than a docstring"


def test_packages_have_a_floor() -> None:
    for path in SOURCE.iterdir():
        if path.name in ("__pycache__", "__init__.py", "__main__.py", "py.typed"):
            continue
        assert path.stem in FLOORS, f"{path.name} has no floor"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MODULE_LINES, f"{path.name} has more than {MODULE_LINES} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{path.name}: {node.name} has {lines} lines"


def test_no_prints_below_the_command_line() -> None:
    for path in modules():
        if package(name_of(path)) in ("cli", "runtime"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "quit"), f"{path}: {node.func.id}()"
