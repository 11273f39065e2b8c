"""The tool that finds what tests leave: it must find it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.residue import residue


@contextlib.contextmanager
def _found(what: str) -> Iterator[None]:
    with pytest.raises(AssertionError, match=what), residue(settle_s=0):
        yield


def test_a_child_is_found() -> None:
    with _found("sleep 4711"):
        child = subprocess.Popen(["sleep", "4711"])
    child.kill()
    child.wait()


def test_an_orphan_is_found() -> None:
    with _found("sleep 4712"):
        script = "sleep 4712 >/dev/null 2>&1 & echo $!"
        done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    os.kill(int(done.stdout), signal.SIGKILL)


def test_a_file_is_found(tmp_path: Path) -> None:
    place = Path(f"/var/tmp/bulkhead-residue-{os.getpid()}")
    with _found(place.name):
        place.mkdir()
    place.rmdir()


def test_a_namespace_is_found() -> None:
    ours = ["unshare", "--net", "sh", "-c", "echo; exec sleep 4713"]
    with _found("net:"):
        child = subprocess.Popen(ours, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    child.kill()
    child.communicate()
