"""docker's own client on dockerd and on us, the same lines: output, errors and exit codes."""

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import api_scenes as scenes
from tests.helpers.api_rig import CLI, Api, api, archive, newer
from tests.helpers.dockerd import Dockerd, dockerd
from tests.helpers.images import has_busybox
from tests.helpers.parity import plain_environment
from tests.helpers.residue import residue

KNOWN = {
    "D run --rm -v /nope:/x:zz busybox true": "ours says which volume",
    "D run --rm --network nope busybox true": "refused before anything is made",
    "D run --rm --runtime nope busybox true": "as newer versions of dockerd say it",
    "D exec one nope": "exit code 127, as newer versions of dockerd",
    "echo nonsense | D load": "other words for an archive that is none",
    "D network create --driver nope bad": "ours says which drivers there are",
    "D history --format '{{.CreatedBy}}' built:1 | head -3": "as newer builders write it",
    "printf 'FROM busybox\\nRUN exit 3\\n' | D build - 2>&1 | tail -1": "file, line and caret",
}
"""Lines that differ, and why; docs/compatibility.md lists them."""
MOST_KNOWN = 10
KNOWN_NEWER = {
    "D version --format '{{.Server.Os}} {{.Client.APIVersion}}'": "1.50 here, 1.41 there",
}
"""Lines that differ for the newer client only."""
NEWER_SCENES = ("run", "life", "volumes", "words")


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Dockerd, Api, Path]]:
    if os.geteuid() != 0:
        pytest.skip("both want root here")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    folder = tmp_path_factory.mktemp("compare")
    with residue(str(folder)), dockerd(folder, network=True) as docker, api(folder) as ours:
        docker("load", "-i", str(archive(folder))).ok()
        yield docker, ours, folder


def _play(
    socket: Path, folder: Path, client: str, names: Collection[str]
) -> dict[str, scenes.Answer]:
    """Every line's answer."""
    folder.mkdir()
    (folder / "client").mkdir()
    environment = plain_environment(DOCKER_CONFIG=str(folder / "client"), DOCKER_BUILDKIT="0")
    program = [client, "--host", f"unix://{socket}"]
    return {
        line: scenes.ask(program, line, environment, folder)
        for name in names
        for line in scenes.lines_of(scenes.SCENES[name])
    }


def _differences(
    pair: tuple[Dockerd, Api, Path], client: str, names: Collection[str], known: Collection[str]
) -> list[str]:
    """Lines that are answered otherwise, with both answers."""
    docker, ours, folder = pair
    with ThreadPoolExecutor(2) as pool:
        playing = pool.submit(_play, docker.socket, folder / "theirs", client, names)
        own = pool.submit(_play, ours.path, folder / "ours", client, names).result()
        theirs = playing.result()
    return [
        f"$ {line}\ndocker: {theirs[line]}\nours:   {own[line]}"
        for line in theirs
        if theirs[line] != own[line] and line not in known
    ]


def test_the_same_lines(pair: tuple[Dockerd, Api, Path]) -> None:
    wrong = _differences(pair, CLI, scenes.SCENES, KNOWN)
    assert not wrong, "\n".join(["", *wrong])


def test_the_same_lines_by_a_newer_client(pair: tuple[Dockerd, Api, Path]) -> None:
    wrong = _differences(pair, newer("docker"), NEWER_SCENES, {**KNOWN, **KNOWN_NEWER})
    assert not wrong, "\n".join(["", *wrong])


def test_enough_lines_and_few_exceptions() -> None:
    tried = {line for scene in scenes.SCENES.values() for line in scenes.lines_of(scene)}
    assert len(tried) >= 150
    assert {*KNOWN, *KNOWN_NEWER} <= tried
    assert len({*KNOWN, *KNOWN_NEWER}) <= MOST_KNOWN
    text = Path(__file__).parents[2].joinpath("docs", "compatibility.md").read_text()
    text = text.replace("\\|", "|")
    for line in (*KNOWN, *KNOWN_NEWER):
        assert f"`{line.replace('D ', 'docker ')}`" in text, line
