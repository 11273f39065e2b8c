"""Contexts, .dockerignore, COPY's plans and cache keys, without an engine."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.build import classic, keys
from bulkhead.build.copying import Options, Owner, Plan, chmod
from bulkhead.build.globs import match
from bulkhead.build.ignore import Ignore, lines
from bulkhead.build.trees import ArchiveTree, Context, DirectoryTree, EmptyTree, Tree
from bulkhead.errors import Invalid, NotFound, Unsupported

IGNORED = [
    # patterns, ignored, kept
    ("a", ["a", "a/b"], ["b", "b/a", "ab"]),
    ("/a", ["a", "a/b"], ["b/a"]),
    ("*/a", ["x/a", "x/a/y"], ["a", "x/y/a"]),
    ("**/a", ["a", "x/a", "x/y/a"], ["xa"]),
    ("*.md\n!README.md", ["x.md"], ["README.md", "d/x.md"]),
    ("*.md\n!README*.md\nREADME-secret.md", ["x.md", "README-secret.md"], ["README.md"]),
    ("*.md\nREADME-secret.md\n!README*.md", ["x.md"], ["README-secret.md"]),
    ("temp?", ["tempa", "tempb/c"], ["temp", "tempaa"]),
    ("# comment\n\n  x  ", ["x"], ["# comment"]),
    ("a/**", ["a/b", "a/b/c"], ["a", "ab"]),
    ("a\n!a/keep", ["a/x", "a"], ["a/keep", "a/keep/y"]),
    ("[a-c]x", ["ax", "cx"], ["dx"]),
    ("[^a]x", ["bx"], ["ax"]),
    (r"\!x", ["!x"], ["x"]),
    ("a/../b", ["b"], ["a"]),
    ("a*b*c", ["abc", "axbxbyc", "abcbc"], ["ab", "acb", "a/bc"]),
    ("**/a/*/b", ["a/x/b", "a/a/x/b", "q/a/y/b"], ["a/b", "a/x/y/b"]),
    ("a**/b", ["ab", "ax/b", "a/x/b"], ["b"]),
    ("**/x*y*/z", ["xy/z", "d/x1y2/z"], ["xy/w/z", "x/yz"]),
    ("**\n!src", ["x", "y/z"], ["src", "src/x"]),
    ("*\n!*.go", ["x", "d"], ["x.go"]),
    ("", [], ["x"]),
    ("\ufeffx", ["x"], []),
    (".", [], ["x"]),
]


@pytest.mark.parametrize(("text", "out", "kept"), IGNORED, ids=[repr(i[0]) for i in IGNORED])
def test_ignore(text: str, out: list[str], kept: list[str]) -> None:
    rules = Ignore(lines(text))
    assert [path for path in out if not rules.ignored(path)] == []
    assert [path for path in kept if rules.ignored(path)] == []


def test_hostile_patterns_take_no_time() -> None:
    deep, long = "/".join("a" * 128), "a" * 255
    for pattern in ("*a" * 60 + "b", "**/a/" * 40 + "b", "**/" * 90 + "b", "?*" * 60 + "b"):
        rules = Ignore([pattern])
        assert not rules.ignored(long)
        assert not rules.ignored(deep)
    with pytest.raises(Invalid, match=r"\*\*"):
        Ignore(["a**" * 5])


@pytest.mark.parametrize("pattern", ["[a", "a\\", "!"])
def test_patterns_that_are_wrong(pattern: str) -> None:
    with pytest.raises(Invalid):
        Ignore([pattern])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A context."""
    for name, text in {
        "a.txt": "a", "b.txt": "b", "d/c.txt": "c", "d/e/f.md": "f", "d/e/g.txt": "g",
        ".hidden": "h",
    }.items():  # fmt: skip
        place = tmp_path / "context" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    context = tmp_path / "context"
    (tmp_path / "secret").write_text("outside")
    (context / "out").symlink_to("../secret")
    (context / "absolute").symlink_to("/etc")
    (context / "link").symlink_to("d/e")
    (context / "loop").symlink_to("loop")
    return context


def packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, ".")
    return buffer.getvalue()


@pytest.fixture(params=["directory", "archive"])
def tree(folder: Path, request: Any, tmp_path: Path) -> Iterator[Tree]:
    if request.param == "archive":
        archive = ArchiveTree.read_from(iter([packed(folder)]), str(tmp_path))
        archive.keeps_owners = False
        yield archive
        archive.close()
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield DirectoryTree(fd, owners=False)
    os.close(fd)


def made(plan: Plan) -> dict[str, str]:
    """What the layer holds: content, link or "" by path."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(plan.tar()))) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            found[member.name] = file.read().decode() if file else member.linkname
    return found


def copied(tree: Tree, source: str, target: str, base: Tree | None = None, **more: Any) -> Any:
    plan = Plan(base or EmptyTree(), Options(**more))
    plan.add(tree, source, target, directory=target.endswith("/"))
    return made(plan)


def test_copy_places(tree: Tree) -> None:
    assert copied(tree, "a.txt", "/x") == {"x": "a"}
    assert copied(tree, "a.txt", "/x/") == {"x": "", "x/a.txt": "a"}
    assert copied(tree, "d", "/x") == {
        "x": "", "x/c.txt": "c", "x/e": "", "x/e/f.md": "f", "x/e/g.txt": "g",
    }  # fmt: skip
    assert copied(tree, "*.txt", "/x/") == {"x": "", "x/a.txt": "a", "x/b.txt": "b"}
    assert copied(tree, "d/*/g.txt", "/x/") == {"x": "", "x/g.txt": "g"}
    assert copied(tree, "../../a.txt", "/x") == {"x": "a"}
    assert copied(tree, "link", "/x") == {"x": "", "x/f.md": "f", "x/g.txt": "g"}
    assert copied(tree, "d/e/f.md", "/p/", parents=True) == {
        "p": "", "p/d": "", "p/d/e": "", "p/d/e/f.md": "f",
    }  # fmt: skip
    assert copied(tree, "d/./e/f.md", "/p/", parents=True) == {
        "p": "", "p/e": "", "p/e/f.md": "f",
    }  # fmt: skip
    exclude = Ignore(["**/*.md"])
    assert copied(tree, "d", "/x", exclude=exclude) == {
        "x": "", "x/c.txt": "c", "x/e": "", "x/e/g.txt": "g",
    }  # fmt: skip


@pytest.mark.parametrize("source", ["nothing", "out", "absolute/passwd", "*.none", "loop/x"])
def test_nothing_outside_of_the_context_is_found(tree: Tree, source: str) -> None:
    with pytest.raises((NotFound, Invalid)):
        copied(tree, source, "/x")


def test_links_in_directories_stay_links(tree: Tree) -> None:
    whole = copied(tree, ".", "/x")
    assert whole["x/out"] == "../secret"
    assert whole["x/absolute"] == "/etc"


def test_ignored_files_are_not_there(tree: Context) -> None:
    tree.ignoring(Ignore(["d", "!d/e/f.md", ".hidden"]))
    assert sorted(copied(tree, "d", "/x")) == ["x", "x/e", "x/e/f.md"]
    assert ".hidden" not in copied(tree, ".", "/x/")
    with pytest.raises(NotFound):
        copied(tree, "d/c.txt", "/x")


def test_the_image_below_decides_places(tree: Tree, tmp_path: Path) -> None:
    image = tmp_path / "image"
    (image / "usr/lib").mkdir(parents=True)
    (image / "usr").chmod(0o711)
    (image / "lib").symlink_to("usr/lib")
    (image / "file").write_text("x")
    (image / "etc").symlink_to("/../../usr")
    fd = os.open(image, os.O_RDONLY | os.O_DIRECTORY)
    base = DirectoryTree(fd)
    try:
        assert set(copied(tree, "a.txt", "/lib/x", base)) == {"usr", "usr/lib", "usr/lib/x"}
        assert set(copied(tree, "a.txt", "/usr/lib", base)) == {"usr", "usr/lib", "usr/lib/a.txt"}
        assert set(copied(tree, "a.txt", "/etc/x", base)) == {"usr", "usr/x"}
        with pytest.raises(Invalid, match="non-directory"):
            copied(tree, "a.txt", "/file/x", base)
        plan = Plan(base, Options(owner=Owner(5, 6), chmod="640"))
        plan.add(tree, "a.txt", "/usr/new/", directory=True)
        items = {path: item.node for path, item in plan.sorted()}
        assert items["usr"].mode & 0o777 == 0o711 and items["usr"].uid == os.getuid()
        assert (items["usr/new"].uid, items["usr/new"].gid) == (5, 6)
        assert items["usr/new/a.txt"].mode & 0o777 == 0o640
    finally:
        os.close(fd)


def test_the_key_of_a_copy_is_content_and_metadata_but_not_time(folder: Path) -> None:
    def key(**more: Any) -> str:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            plan = Plan(EmptyTree(), Options(**more))
            plan.add(DirectoryTree(fd, owners=False), "d", "/x", directory=False)
            return plan.digest()
        finally:
            os.close(fd)

    first = key()
    os.utime(folder / "d/c.txt", (1, 1))
    assert key() == first
    (folder / "d/c.txt").chmod(0o600)
    second = key()
    assert second != first
    (folder / "d/c.txt").write_text("d")
    third = key()
    assert third not in (first, second)
    assert key(owner=Owner(1, 1)) != third
    (folder / "a.txt").write_text("elsewhere")
    assert key() == third


def test_the_key_of_a_run() -> None:
    given: dict[str, Any] = {
        "layers": ["sha256:1"], "args": ["a"], "documents": [], "env": ["A=1", "B=2"], "user": "",
        "directory": "/", "mounts": [], "network": "", "boundary": "", "platform": "",
        "epoch": None,
    }  # fmt: skip
    first = keys.run(**given)
    assert keys.run(**{**given, "env": ["B=2", "A=1"]}) == first
    for name, value in {
        "layers": [], "args": ["b"], "env": ["A=1"], "user": "1", "directory": "/x",
        "network": "none", "mounts": [{"kind": "tmpfs"}], "epoch": 0, "boundary": "sandbox",
    }.items():  # fmt: skip
        assert keys.run(**{**given, name: value}) != first, name


def test_times_are_clamped(tree: Tree) -> None:
    plan = Plan(EmptyTree(), Options(now_ns=9 * 10**18))
    plan.add(tree, "d", "/x", directory=False)
    with tarfile.open(fileobj=io.BytesIO(b"".join(plan.tar(10**9)))) as tar:
        assert {member.mtime for member in tar} == {1}


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [("755", 0o644, 0o755), ("u=rwX,go=rX", 0o600, 0o644), ("u=rwX,go=rX", 0o700, 0o755),
     ("+x", 0o644, 0o755), ("g-w,o=", 0o666, 0o640), ("1777", 0o644, 0o1777)],
)  # fmt: skip
def test_chmod(text: str, before: int, after: int) -> None:
    assert chmod(0o100000 | before, text) == 0o100000 | after


@pytest.mark.parametrize("text", ["abc", "9", "77777", "u~r", ""])
def test_chmod_that_is_wrong(text: str) -> None:
    with pytest.raises(Invalid, match="chmod"):
        chmod(0o100644, text)


def test_globs(tree: Tree) -> None:
    assert [n.path for n in match(tree, "**/*.txt")] == [
        "a.txt", "b.txt", "d/c.txt", "d/e/g.txt",
    ]  # fmt: skip
    assert [n.path for n in match(tree, "d/?.txt")] == ["d/c.txt"]
    with pytest.raises(Invalid, match="bad pattern"):
        list(match(tree, "[a"))


def test_names_that_mean_deletions_are_refused(folder: Path) -> None:
    (folder / "d/.wh.passwd").write_text("")
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(Invalid, match="deletions"):
            copied(DirectoryTree(fd, owners=False), "d", "/etc")
    finally:
        os.close(fd)


HOSTILE = [
    ("../x", tarfile.REGTYPE, ""), ("a/../../x", tarfile.REGTYPE, ""),
    ("hard", tarfile.LNKTYPE, "../../etc/passwd"), ("hard", tarfile.LNKTYPE, "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "target"), HOSTILE)
def test_hostile_archives(name: str, kind: bytes, target: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        tar.addfile(member)
    with pytest.raises(Invalid):
        ArchiveTree.read_from(iter([buffer.getvalue()]), str(tmp_path))


def test_the_classic_query() -> None:
    found = classic.parameters(
        {"t": ["a:1", "b"], "buildargs": '{"A": "1", "B": null}', "nocache": "1", "memory": "64",
         "networkmode": "default", "labels": "{}"},
        {"https://index.docker.io/v1/": {"username": "u"}, "r.lan:5000": {"username": "v"}},
    )["options"]  # fmt: skip
    assert found["tags"] == ["a:1", "b"] and found["args"] == {"A": "1"}
    assert found["no_cache"] and not found["pull"] and found["network"] == ""
    assert found["limits"] == {"Memory": 64}
    assert set(found["auths"]) == {"docker.io", "r.lan:5000"}
    for query in ({"version": "2"}, {"session": "x"}, {"remote": "client-session"}):
        with pytest.raises(Unsupported, match="DOCKER_BUILDKIT=0"):
            classic.parameters(query)
    with pytest.raises(Invalid, match="buildargs"):
        classic.parameters({"buildargs": "["})


def test_classic_messages_of_parallel_stages() -> None:
    said: list[dict[str, Any]] = []
    renderer = classic.Renderer(said.append)
    for event in (
        {"event": "plan", "total": 3},
        {"event": "start", "id": 1, "stage": 0, "text": "FROM a"},
        {"event": "start", "id": 2, "stage": 1, "text": "FROM b"},
        {"event": "output", "id": 2, "data": b"b\n"},
        {"event": "done", "id": 2, "cached": False, "layer": ""},
        {"event": "stage", "stage": 1},
        {"event": "output", "id": 1, "data": b"a\n"},
        {"event": "done", "id": 1, "cached": True, "layer": "sha256:0123456789abcdef"},
        {"event": "stage", "stage": 0},
        {"event": "image", "id": "sha256:" + "f" * 64, "names": ["x:1"]},
    ):
        renderer.event(event)
    assert "".join(m.get("stream", "") for m in said) == (
        "Step 1/3 : FROM a\na\n ---> Using cache\n ---> 0123456789ab\nStep 2/3 : FROM b\nb\n"
        "Successfully built ffffffffffff\nSuccessfully tagged x:1\n"
    )
    assert {"aux": {"ID": "sha256:" + "f" * 64}} in said
