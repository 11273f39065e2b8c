"""Images of another machine run in containers, by QEMU's user mode, and leave no registration."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.errors import NotFound, Unsupported
from bulkhead.isolation import binfmt
from tests.helpers import engine_rig as rigs
from tests.helpers import images
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until
from tests.kernel.test_engine_run import REASON

COMPILER = "aarch64-linux-gnu-gcc"
SOURCE = Path(__file__).resolve().parents[1] / "helpers" / "foreign.c"
FOREIGN = "foreign:latest"


def _unusable() -> str:
    if REASON:
        return REASON
    if os.uname().machine == "aarch64":
        return "this machine runs arm64 itself"
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is not installed (apt-get install gcc-aarch64-linux-gnu)"
    try:
        binfmt.interpreter("arm64")
        binfmt.check_kernel()
    except Unsupported as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_unusable()), reason=_unusable() or "usable")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("engine")
    program = directory / "probe"
    subprocess.run([COMPILER, "-static", "-O1", "-o", program, SOURCE], check=True)
    files: dict[str, bytes | str | None] = dict.fromkeys(("bin", "etc", "proc", "dev", "sys"))
    files["bin/probe"] = program.read_bytes()
    blobs = images.Blobs()
    made = images.build(blobs, [images.tar_of(files)], architecture="arm64",
                        config={"Cmd": ["/bin/probe"]})  # fmt: skip
    archive = images.oci_archive(directory / "foreign.tar", blobs, [(FOREIGN, made.descriptor)])
    with residue(str(directory)), rigs.engine(directory) as started:
        rigs.load_busybox(started)
        with archive.open("rb") as file:
            started.rpc.stream("image.load", {}, [file.fileno()])
        yield started


def _registered() -> list[str]:
    return sorted(os.listdir(binfmt.PLACE)) if os.path.isdir(binfmt.PLACE) else []


def test_programs_of_another_machine_run_with_their_children(rig: Rig) -> None:
    before = _registered()
    done = rigs.run(rig, ["/bin/probe"], config={"Image": FOREIGN, "Platform": "linux/arm64"})
    assert (done.code, done.err) == (0, b"")
    assert done.out == b"again aarch64 0\n"
    assert _registered() == before


def test_exec_logs_and_signals(rig: Rig) -> None:
    body = {"Image": FOREIGN, "Cmd": ["/bin/probe", "wait"], "Platform": "linux/arm64"}
    rig.call("workload.create", name="arm", body=body)
    rig.call("workload.start", id="arm")
    until(lambda: rigs.logs(rig, "arm") == b"waiting\n", "it has said so")
    code, out = rigs.execute(rig, "arm", ["/bin/probe", "machine"])
    assert (code, out) == (0, b"/bin/probe aarch64 0\n")
    rig.call("workload.kill", id="arm", signal="TERM")
    assert rig.call("workload.wait", id="arm")["StatusCode"] == 5
    rig.call("workload.remove", id="arm")


def test_files_have_the_owners_that_they_have_outside(rig: Rig, tmp_path: Path) -> None:
    done = rigs.run(
        rig, ["/bin/probe", "write", "/data/made"], Binds=[f"{tmp_path}:/data"],
        config={"Image": FOREIGN, "Platform": "linux/arm64"},
    )  # fmt: skip
    assert done.code == 0
    made = tmp_path / "made"
    assert (made.read_text(), made.stat().st_uid) == ("aarch64", 0)


def test_the_platform_that_was_asked_for_must_be_the_images(rig: Rig) -> None:
    with pytest.raises(NotFound, match="does not match the specified platform"):
        rigs.run(rig, ["true"], config={"Platform": "linux/arm64"})


def test_what_needs_the_hosts_namespaces_is_refused(rig: Rig) -> None:
    if binfmt.registered("arm64"):
        pytest.skip("this host runs arm64 programs everywhere: nothing needs to be refused")
    config = {"Image": FOREIGN, "Platform": "linux/arm64"}
    for host, word in (({"Privileged": True}, "--privileged"), ({"PidMode": "host"}, "--pid")):
        with pytest.raises(Unsupported, match=word):
            rigs.run(rig, ["/bin/probe"], config=config, **host)
    with pytest.raises(Unsupported, match="--boundary container emulates"):
        rigs.run(rig, ["/bin/probe"], config=config, boundary="sandbox")


def test_a_missing_emulator_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="apt-get install qemu-user-static"):
        binfmt.interpreter("arm64")
    with pytest.raises(Unsupported, match="cannot be run"):
        binfmt.interpreter("vax")
