"""A workload moves to another installation, and from one kernel to another on the way."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue
from tests.kernel.test_transfer import pack, unpack

REASON = "" if shutil.which("linux.uml") else "user-mode-linux is not installed"
if os.geteuid() != 0:
    REASON = "needs root"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Rig, Rig]]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with (
        residue(str(tmp_path)),
        rigs.engine(tmp_path / "here") as here,
        rigs.engine(tmp_path / "there") as there,
    ):
        rigs.load_busybox(here)
        yield here, there


def _run(rig: Rig, name: str) -> bytes:
    rig.call("workload.start", id=name)
    rig.call("workload.wait", id=name)
    return rigs.logs(rig, name, tail=2)


def test_a_guest_moves_with_its_disk_and_volume(machines: tuple[Rig, Rig], tmp_path: Path) -> None:
    here, there = machines
    script = "echo x >> /made; echo y >> /data/kept; wc -l < /made; wc -l < /data/kept"
    rigs.start(here, "moving", script, boundary="sandbox", Binds=["moving-data:/data"])
    here.call("workload.wait", id="moving")
    assert rigs.logs(here, "moving") == b"1\n1\n"
    pack(here, "moving", tmp_path / "first")
    # To another installation, and there in a container.
    unpack(there, tmp_path / "first", boundary="container")
    assert there.call("workload.inspect", id="moving")["Boundary"] == "container"
    assert _run(there, "moving") == b"2\n2\n"
    pack(there, "moving", tmp_path / "second")
    # And back, as a guest again, beside the first.
    here.call("workload.remove", id="moving")
    here.call("volume.remove", name="moving-data")
    unpack(here, tmp_path / "second", boundary="sandbox")
    assert _run(here, "moving") == b"3\n3\n"
