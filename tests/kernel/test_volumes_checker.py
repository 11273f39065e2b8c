"""e2fsck on what a guest has written: it mends, and its jail holds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bulkhead.errors import Conflict, Unavailable
from bulkhead.volumes import checker, disks

LACKING = [name for name in ("mke2fs", "e2fsck", "debugfs") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(LACKING) or os.geteuid() != 0,
    reason=f"not installed: {', '.join(LACKING)}" if LACKING else "needs root",
)
TRY = """
import os, socket
from bulkhead.isolation.seccomp.compile import compile_filter
from bulkhead.linux import seccomp
from bulkhead.volumes import checker
filter_ = compile_filter(checker.profile())
checker.confine(1 << 20)
assert os.getgroups() == []
seccomp.install(filter_.program, filter_.flags)
assert os.getuid() == os.geteuid() == checker.own_uid()
status = open("/proc/self/status").read()
assert "CapEff:\\t0000000000000000" in status and "NoNewPrivs:\\t1" in status, status
tries = {
    "write": lambda: open(PLACE, "w"), "socket": lambda: socket.socket(),
    "fork": os.fork, "mount": lambda: os.chroot("/"), "read": lambda: open("/etc/shadow"),
}
for name, attempt in tries.items():
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(f"{name} was possible")
print("held")
"""


def test_what_a_guest_left_is_mended_once(tmp_path: Path) -> None:
    image = disks.make(str(tmp_path / "v"), 32 << 20)
    broken = ["debugfs", "-w", "-R", "setb 6000 10", image]
    subprocess.run(broken, check=True, capture_output=True)
    disks.take_back(str(tmp_path / "v"))  # no guest had it
    assert subprocess.run(["e2fsck", "-n", "-f", image], capture_output=True).returncode != 0
    disks.lend(str(tmp_path / "v"))

    def refuse() -> None:
        raise Conflict("a guest has it")

    with pytest.raises(Conflict, match="a guest has it"):
        disks.take_back(str(tmp_path / "v"), refuse)
    disks.take_back(str(tmp_path / "v"))
    assert subprocess.run(["e2fsck", "-n", "-f", image], capture_output=True).returncode == 0
    disks.take_back(str(tmp_path / "v"), refuse)  # it is checked: nobody is asked


def test_what_cannot_be_mended_is_told(tmp_path: Path) -> None:
    image = disks.make(str(tmp_path / "v"), 32 << 20)
    with open(image, "r+b") as file:
        file.write(os.urandom(1 << 20))
    disks.lend(str(tmp_path / "v"))
    with pytest.raises(Unavailable, match="e2fsck: "):
        disks.take_back(str(tmp_path / "v"))


def test_its_jail_holds(tmp_path: Path) -> None:
    script = f"PLACE = {str(tmp_path / 'x')!r}\n{TRY}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr
    assert len(checker.UIDS) == 1 << 22 and checker.UIDS.stop <= 0x70000000
