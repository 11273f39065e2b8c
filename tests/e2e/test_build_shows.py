"""Ten real Dockerfiles: built, run, built again from the cache, and on a clean installation."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.building import base_archive
from tests.helpers.dockerfiles import COPIES, MOUNTS, PROJECTS, Project
from tests.helpers.installation import Done, Installation, installation

EPOCH = "1700000000"


@dataclass
class Site:
    """An installation that has the base image."""

    here: Installation

    def __call__(self, *argv: str, cwd: Path | None = None, **environment: str) -> Done:
        return self.here.cli(*argv, cwd=cwd, native=True, server=True, **environment)

    def build(self, project: Project, folder: Path, *more: str) -> Done:
        """Build it (and what it stands on) reproducibly; what was said."""
        if project.before:
            before = project.write(folder / "before", project.before)
            self("build", "-q", "-t", f"{project.name}-before", str(before),
                 SOURCE_DATE_EPOCH=EPOCH).ok()  # fmt: skip
        context = project.write(folder / "context")
        if project is COPIES:
            (context / "archive.tar").write_bytes(_archive())
            (context / "archive.tar.gz").write_bytes(b"never")
        return self("build", "--progress", "plain", "-t", project.name, "--iidfile",
                    str(folder / "id"), *project.options, *more, ".",
                    cwd=context, SOURCE_DATE_EPOCH=EPOCH).ok()  # fmt: skip

    def layers(self, name: str) -> list[str]:
        """Its layers' digests."""
        found: list[str] = json.loads(self("inspect", name).ok().out)[0]["RootFS"]["Layers"]
        return found


def _archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("inside.txt")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"i\n"))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installation(tmp_path_factory.mktemp("one")) as here:
        here.cli("load", "-i", str(base_archive())).ok()
        yield Site(here)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installation(tmp_path_factory.mktemp("two")) as here:
        here.cli("load", "-i", str(base_archive())).ok()
        yield Site(here)


@pytest.mark.parametrize("project", PROJECTS, ids=[project.name for project in PROJECTS])
def test_ten_dockerfiles(site: Site, clean: Site, project: Project, tmp_path: Path) -> None:
    site.build(project, tmp_path / "a")
    identity = (tmp_path / "a" / "id").read_text()
    said = site("run", "--rm", project.name, *project.command).ok().out
    for text in project.says:
        assert text in said
    if project is COPIES:
        for text in ("\ndocs/README", "node_modules", "debug.log"):
            assert text not in said

    again = site.build(project, tmp_path / "a").err
    assert (tmp_path / "a" / "id").read_text() == identity
    steps = [line for line in again.splitlines() if " RUN " in line or " COPY " in line]
    assert again.count("CACHED") >= len(steps)

    clean.build(project, tmp_path / "b")
    assert clean.layers(project.name) == site.layers(project.name)
    assert (tmp_path / "b" / "id").read_text() == identity


def test_secrets_are_nowhere_in_the_image(site: Site, tmp_path: Path) -> None:
    site.build(MOUNTS, tmp_path)
    saved = tmp_path / "saved.tar"
    site("save", "-o", str(saved), "mounts").ok()
    data = saved.read_bytes()
    assert b"rotated" in data
    base = site("inspect", "mounts").ok().out
    assert b"unguessable" not in data and "unguessable" not in base
    assert "unguessable" not in site("history", "--no-trunc", "mounts").ok().out
