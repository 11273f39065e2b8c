"""`bulkhead compare`, as its user runs it."""

import csv
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.installation import Installation, installation
from tests.helpers.residue import residue

TRACING = Path("/sys/kernel/tracing/instances")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("caches are dropped and filters read by root alone")
    folder = tmp_path_factory.mktemp("compare")
    with residue(str(folder)), installation(folder) as here:
        here.load_busybox(folder)
        yield here


def test_figures_are_measured_and_written(here: Installation, tmp_path: Path) -> None:
    report, table = tmp_path / "report.html", tmp_path / "figures.csv"
    words = ("--quick", "--boundaries", "container", "--only", "image,network,surface,command")
    command = ("busybox", "sh", "-c", "echo done")
    done = here.cli(
        "compare", *words, "--json", "--html", str(report), "--csv", str(table), *command
    ).ok()  # fmt: skip
    found = json.loads(done.out)
    figures = {(one["subject"], one["metric"]): one for one in found["figures"]}
    assert found["command"] == list(command[1:])
    for subject in ("host", "container"):
        for metric in ("net.trip", "net.in", "net.out"):
            one = figures[subject, metric]
            assert one["low"] <= one["value"] <= one["high"], one
            assert one["value"] > 0
    assert figures["container", "command.exit"]["value"] > 0
    assert ("host", "command.exit") not in figures
    everything = figures["host", "surface.filter"]["value"]
    assert 0 < figures["container", "surface.filter"]["value"] < everything
    assert set(csv_subjects(table)) == {"host", "container"}
    assert "<svg" in report.read_text()
    seen = {one["metric"]: one["note"].split() for one in found["figures"]
            if one["subject"] == "container" and one["metric"] == "surface.seen"}  # fmt: skip
    if not seen:
        (gap,) = [one for one in found["gaps"] if one["metric"] == "surface.seen"][:1]
        pytest.skip(f"no tracing here: {gap['reason']}")
    # Not its own calls, which begin at a moment: on a busy host, before they are watched.
    assert {"accept4", "write"} <= set(seen["surface.seen"])
    again = json.loads(here.cli("compare", "--last", "--json").ok().out)
    assert again == found


def csv_subjects(path: Path) -> list[str]:
    with path.open() as file:
        return [row["subject"] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--boundaries", "jail"), "no such boundary: jail"),
        (("--only", "speed"), "no such group: speed"),
        (("--rounds", "3"), "at least 6"),
        (("--quick", "--rounds", "9"), "exclude each other"),
        (("127.0.0.1:1/none", "true"), "127.0.0.1:1"),
    ],
)
def test_bad_words_are_told_in_one_line(
    here: Installation, words: tuple[str, ...], said: str
) -> None:
    done = here.cli("compare", *words)
    assert done.code != 0
    assert said in done.err
    assert "Traceback" not in done.err


def test_ended_in_the_middle_it_takes_everything_away(here: Installation) -> None:
    """Neighbours and servers run at that moment; images and tracing instances exist."""
    words = ("compare", "--quick", "--boundaries", "container", "--only", "noise")
    with here.popen(*words) as process:
        try:
            deadline = time.monotonic() + 120
            assert process.stderr is not None
            while b"neighbours" not in (line := process.stderr.readline()):
                assert line and time.monotonic() < deadline
        finally:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert here.cli("ps", "-aq").ok().out == ""
    assert "bulkhead-compare" not in here.cli("images").ok().out
    assert not [one for one in TRACING.glob("bulkhead-compare-*") if TRACING.is_dir()]
