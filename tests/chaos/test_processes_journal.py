"""The keeper dies at every line of its pump, one after the other: the log is exact each time."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bulkhead
from bulkhead.keeper import logs
from bulkhead.linux import syscall
from tests.helpers.scale import SCALE

SOURCE = str(Path(bulkhead.__file__).parent.parent)
DRIVER = str(Path(__file__).parent.parent / "helpers" / "keeper_driver.py")
# Long and short lines, an unfinished one in the end, bytes that are no UTF-8; rotation happens.
OUTPUTS = (
    b"one\ntwo\n",
    b"x" * 40_000 + b"\n" + b"y" * 20_000,
    b"".join(b"line %d \xc3\xa4\xff\n" % n for n in range(300)) + b"unfinished",
)


class Machine:
    """What outlives a keeper: the four descriptors and the pipe."""

    def __init__(self, pieces: tuple[bytes, ...]) -> None:
        self.fds = [os.memfd_create("journal"), os.memfd_create("staging"), *os.pipe()]
        self.read, self.write = os.pipe()
        syscall.call("fcntl", self.write, 1031, 1 << 20)  # F_SETPIPE_SZ: all of it fits
        for piece in pieces:
            os.write(self.write, piece)

    def drive(self, log: str, kill_at: int) -> int | None:
        """One keeper's life; lines executed, None if it was killed."""
        high = [
            os.dup2(fd, 50 + i, inheritable=True) for i, fd in enumerate([*self.fds, self.read])
        ]
        argv = [sys.executable, "-I", "-S", DRIVER, SOURCE, log, str(kill_at)]
        try:
            done = subprocess.run(argv, pass_fds=high, stdout=subprocess.PIPE, check=False)
        finally:
            for fd in high:
                os.close(fd)
        if done.returncode == -9:
            return None
        assert done.returncode == 0
        return int(done.stdout)

    def close_write(self) -> None:
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def close(self) -> None:
        self.close_write()
        for fd in (*self.fds, self.read):
            os.close(fd)


def logged(path: str) -> bytes:
    async def main() -> bytes:
        return b"".join([r.data async for r in logs.read(path)])

    return asyncio.run(main())


@pytest.mark.parametrize("which", range(len(OUTPUTS)))
def test_a_kill_at_any_line_loses_and_doubles_nothing(tmp_path: Path, which: int) -> None:
    output = OUTPUTS[which]
    machine = Machine((output,))
    machine.close_write()
    total = machine.drive(str(tmp_path / "whole"), 0)
    machine.close()
    assert total
    assert logged(str(tmp_path / "whole")) == output
    kills = range(1, total + 1)
    # Every line once would be thousands of processes for the long outputs: spread them.
    step = max(1, int(len(kills) / (25 * SCALE)))
    for kill_at in kills[which::step]:
        log = str(tmp_path / f"log{kill_at}")
        machine = Machine((output,))
        machine.close_write()
        try:
            assert machine.drive(log, kill_at) is None
            # The next one dies too, a little later, and the one after that as well.
            machine.drive(log, 25)
            machine.drive(log, 60)
            assert machine.drive(log, 0) is not None
        finally:
            machine.close()
        assert logged(log) == output, f"killed at line {kill_at}"
        assert logs.partial(log) == {}
