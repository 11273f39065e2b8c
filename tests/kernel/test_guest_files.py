"""Directories of the host in a guest, by the file server; the guest is only a namespace."""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import file_battery
from tests.helpers.files_rig import Files
from tests.helpers.waiting import DEADLINE_S, until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
)
BATTERY = file_battery.__file__


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that everybody may pass through, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="bh-files-", dir="/var/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def _shared(folder: Path, script: str, **more: object) -> tuple[int, bytes, bytes, Path]:
    source = folder / "source"
    source.mkdir(exist_ok=True)
    with Files(folder / "guest", script, [source], **more) as files:  # type: ignore[arg-type]
        return *files.monitor.wait(), source


@pytest.mark.parametrize("valid", ["0", "250", "5000o"])
def test_files_are_as_on_the_host(folder: Path, valid: str) -> None:
    plain = folder / "plain"
    plain.mkdir()
    command = [sys.executable, "-I", BATTERY]
    wanted = subprocess.run(
        [*command, str(plain)], capture_output=True, timeout=DEADLINE_S, check=True
    )
    script = f"exec {' '.join(command)} {{0}}"
    code, out, err, _ = _shared(folder, script, valid=valid)
    assert (code, err) == (0, b"")
    assert out.decode().splitlines() == wanted.stdout.decode().splitlines()


def test_what_is_written_is_on_the_host(folder: Path) -> None:
    script = "echo one > {0}/a; mkdir {0}/d; echo two >> {0}/d/b; chown 5:6 {0}/a; chmod 640 {0}/a"
    code, _, err, source = _shared(folder, script)
    assert (code, err) == (0, b"")
    found = (source / "a").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (5, 6, 0o640)
    assert (source / "a").read_text() == "one\n"
    assert (source / "d/b").read_text() == "two\n"


def test_large_files_come_whole(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    data = os.urandom(1 << 20) * 20
    (source / "in").write_bytes(data)
    code, _, err, _ = _shared(folder, "cp {0}/in {0}/out; cmp {0}/in {0}/out")
    assert (code, err) == (0, b"")
    assert (source / "out").read_bytes() == data


def test_changes_of_the_host_are_seen(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    (source / "now").write_text("first\n")
    script = (
        "cat {0}/now; echo > {0}/ready; while [ ! -e {0}/go ]; do :; done; cat {0}/now; ls {0};"
        "while ! grep -q more {0}/now; do :; done; echo grown"
    )
    with Files(folder / "guest", script, [source], valid="100") as files:
        until(lambda: (source / "ready").exists(), "it has read")
        (source / "now").write_text("second, and longer\n")
        time.sleep(0.2)  # longer than the guest may believe what it has seen
        (source / "go").touch()
        with (source / "now").open("a") as file:
            file.write("more\n")
        code, out, _ = files.monitor.wait()
    assert code == 0
    lines = out.decode().splitlines()
    assert lines[0] == "first" and lines[1] == "second, and longer" and lines[-1] == "grown"
    assert {"go", "now", "ready"} <= set(lines)


def test_locks_hold_between_guest_and_host(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    for name in ("flock", "posix"):
        (source / name).touch()
    code = (
        "import fcntl,os,sys; a=open('{0}/flock','r+'); b=open('{0}/posix','r+');"
        "fcntl.flock(a, fcntl.LOCK_EX); fcntl.lockf(b, fcntl.LOCK_EX, 10);"
        "open('{0}/ready','w'); fcntl.flock(open('{0}/mine','w'), fcntl.LOCK_EX); sys.stdin.read()"
    )
    script = f'exec {sys.executable} -I -c "{code}"'
    held = (source / "mine").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    with Files(folder / "guest", script, [source]) as files:
        until(lambda: (source / "ready").exists(), "the guest has its locks")
        with (source / "flock").open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with (source / "posix").open("r+") as file:
            with pytest.raises(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 5)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 10)
        held.close()  # which the guest has waited for
        assert files.monitor.wait(b"")[0] == 0
    with (source / "flock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_waiting_lock_can_be_interrupted(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    with (source / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, out, _, _ = _shared(folder, "timeout 1 flock {0}/lock true || echo ended by $?")
    assert (code, out) == (0, b"ended by 124\n")


def test_two_directories_and_a_mount_below(folder: Path) -> None:
    first, second = folder / "first", folder / "second"
    for source in (first, second):
        source.mkdir()
    (first / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "below", str(first / "below")], check=True)
    try:
        script = "echo x > {0}/below/a; echo y > {1}/b; cat {0}/below/a; mv {0}/below/a {1}/c"
        with Files(folder / "guest", script, [first, second]) as files:
            assert files.monitor.wait() == (0, b"x\n", b"")
        assert (second / "c").read_text() == "x\n"
    finally:
        subprocess.run(["umount", str(first / "below")], check=True)


def test_the_end_of_the_server_is_the_end_of_the_guest_in_words(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    script = "echo begun; while :; do echo > {0}/a; done"
    with Files(folder / "guest", script, [source]) as files:
        assert files.monitor.process.stdout is not None
        assert files.monitor.process.stdout.readline() == b"begun\n"
        files.server.kill()
        code, _, err = files.monitor.wait()
    assert code == 125
    assert b"the file server ended" in err


def test_what_is_mapped_is_written_back_at_the_end(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    (source / "map").write_bytes(bytes(1 << 16))
    code = (
        "import mmap,os,signal; f=open('{0}/map','r+b'); m=mmap.mmap(f.fileno(), 1<<16);"
        "m[5000:5005]=b'dirty'; os.kill(os.getpid(), 9)"
    )
    done, _, _, _ = _shared(folder, f'exec {sys.executable} -I -c "{code}"')
    assert done == 137
    assert (source / "map").read_bytes()[5000:5005] == b"dirty"
