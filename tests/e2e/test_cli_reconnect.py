"""Attached commands when the engine is killed: the workload, its streams and its code go on."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.helpers.installation import TIMEOUT_S, Installation, installation
from tests.helpers.residue import residue

LOST = "the engine was lost and started again"
SCRIPT = "echo one; read word; echo two $word; exit 7"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    folder = tmp_path_factory.mktemp("lost")
    with residue(str(folder)), installation(folder) as here:
        here.load_busybox(folder)
        yield here


def kill_engine(here: Installation) -> None:
    (pid,) = here.pids("bulkhead.engine")
    os.kill(pid, signal.SIGKILL)


def line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def feed(process: "subprocess.Popen[bytes]", text: bytes) -> tuple[bytes, bytes]:
    return process.communicate(text, timeout=TIMEOUT_S)


@pytest.mark.parametrize("flags", [(), ("--rm",)])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_run_goes_on(here: Installation, flags: Sequence[str], meanwhile: bool) -> None:
    """`meanwhile`: the workload may end before there is an engine again."""
    with here.popen("run", "-i", *flags, "busybox", "sh", "-c", SCRIPT) as process:
        try:
            assert line(process) == b"one\n"
            kill_engine(here)
            said = b""
            if not meanwhile:
                assert process.stderr is not None
                said = process.stderr.readline()
            out, err = feed(process, b"more\n")
            assert (process.returncode, out) == (7, b"two more\n"), said + err
            assert LOST in (said + err).decode()
        finally:
            process.kill()
    listed = here.cli("ps", "-aq").ok().out.split()
    assert len(listed) == (0 if flags else 1)
    for identity in listed:
        assert here.cli("logs", identity).ok().out == "one\ntwo more\n"
        here.cli("rm", identity).ok()


@pytest.mark.parametrize("command", [("attach", "job"), ("start", "-ai", "job")])
def test_attached_later(here: Installation, command: Sequence[str]) -> None:
    ticking = "while :; do echo one; sleep 0.1; done & read word; kill $!; echo two $word; exit 7"
    here.cli("create", "-i", "--name", "job", "busybox", "sh", "-c", ticking).ok()
    if command[0] == "attach":
        here.cli("start", "job").ok()
    with here.popen(*command) as process:
        try:
            assert line(process) == b"one\n"
            kill_engine(here)
            out, err = feed(process, b"more\n")
            assert LOST in err.decode()
            assert (process.returncode, out.splitlines()[-1]) == (7, b"two more"), err
        finally:
            process.kill()
    here.cli("rm", "job").ok()


def test_signals_are_forwarded_afterwards(here: Installation) -> None:
    script = "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    with here.popen("run", "--rm", "busybox", "sh", "-c", script) as process:
        try:
            assert line(process) == b"ready\n"
            kill_engine(here)
            assert process.stderr is not None
            assert LOST in process.stderr.readline().decode()
            process.send_signal(signal.SIGINT)
            out, _ = feed(process, b"")
            assert (process.returncode, out) == (9, b"got\n")
        finally:
            process.kill()
