"""The command server and both clients, against a fake engine: no privileges needed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.cli.pyclient import stop_server
from tests.helpers.fake_engine import FakeEngine, Handler
from tests.helpers.installation import NATIVE, TIMEOUT_S, Installation
from tests.helpers.waiting import until

ID = "e" * 64

CLIENTS = ["native", "python"]


class Rig:
    """A run directory with a fake engine, and a command server that has started."""

    def __init__(
        self, here: Installation, engine: FakeEngine, handlers: dict[str, Handler]
    ) -> None:
        self.here = here
        self.engine = engine
        self.handlers = handlers

    def environment(self, client: str) -> dict[str, str]:
        found = self.here.environment(server=True)
        if client == "python":
            found["BULKHEAD_CLIENT"] = "none"  # do not look for the native one
        return found

    def command(self, client: str, *argv: str) -> list[str]:
        if client == "native":
            return [str(NATIVE), *argv]
        program = "from bulkhead.cli.main import entry; entry()"
        return [sys.executable, "-c", program, *argv]

    def cli(self, client: str, *argv: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            self.command(client, *argv), capture_output=True, env=self.environment(client),
            timeout=TIMEOUT_S, **options,
        )  # fmt: skip

    def popen(self, client: str, *argv: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.command(client, *argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, env=self.environment(client),
        )  # fmt: skip

    def server_answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.here.run / "command.sock"))
            except OSError:
                return False
        return True

    def started(self) -> None:
        """Have the command server started, as the first command does."""

        def answers() -> bool:
            # Each command starts a server that is missing: one ends by itself when a file changes.
            if self.server_answers():
                return True
            self.cli("native", "--version")
            return False

        until(answers, "the command server listens")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    if not NATIVE.exists():
        pytest.skip("the native client is not built: make -C native")
    run = tmp_path / "run"
    run.mkdir()
    here = Installation(tmp_path / "root", run)
    handlers: dict[str, Handler] = {}
    with FakeEngine(str(run / "engine.sock"), handlers) as engine:
        rig = Rig(here, engine, handlers)
        rig.started()
        yield rig

        def gone() -> bool:
            # Again each time: a server that a fallen-back client began may only now be listening.
            stop_server(str(run))
            return not here.processes()

        until(gone, "the command server ends")


def ended(code: int, text: bytes = b"") -> Handler:
    def handler(params: dict[str, Any], fds: list[int]) -> Generator[dict[str, Any], None, Any]:
        yield {"Id": ID}
        yield {"Started": True}
        os.write(fds[0], text)
        return {"Id": ID, "StatusCode": code, "Reason": "exited"}

    return handler


@pytest.mark.parametrize("client", CLIENTS)
def test_streams_code_and_environment(rig: Rig, client: str, tmp_path: Path) -> None:
    rig.handlers["workload.run"] = ended(42, b"out\n")
    (tmp_path / "somewhere").mkdir()
    done = rig.cli(client, "run", "-e", "MARK", "-v", "./x:/x", "image", "a b", "",
                   cwd=tmp_path / "somewhere")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"")
    body = rig.engine.calls[-1][1]["body"]
    assert body["Cmd"] == ["a b", ""]
    assert body["HostConfig"]["Binds"] == [f"{tmp_path}/somewhere/x:/x"]
    assert "Env" not in body  # MARK is not set


@pytest.mark.parametrize("client", CLIENTS)
def test_many_commands_one_after_the_other(rig: Rig, client: str) -> None:
    rig.handlers["workload.run"] = ended(3, b"x")
    for _ in range(10):
        done = rig.cli(client, "run", "image")
        assert (done.returncode, done.stdout, done.stderr) == (3, b"x", b"")
        done = rig.cli(client, "run", "--bad", "image")
        assert done.returncode == 125
        assert done.stderr == b"bulkhead: unknown flag: --bad\nSee 'bulkhead run --help'.\n"


def test_many_commands_at_once(rig: Rig) -> None:
    rig.handlers["workload.run"] = ended(3, b"x")
    running = [rig.popen("native", "run", "image") for _ in range(12)]
    for process in running:
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, out, err) == (3, b"x", b"")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_workload(rig: Rig, client: str, number: signal.Signals) -> None:
    begun, killed = threading.Event(), threading.Event()

    def run(params: dict[str, Any], fds: list[int]) -> Generator[dict[str, Any], None, Any]:
        yield {"Id": ID}
        yield {"Started": True}
        os.write(fds[0], b"ready\n")
        begun.set()
        assert killed.wait(TIMEOUT_S)
        return {"Id": ID, "StatusCode": 128 + number, "Reason": "exited"}

    def kill(params: dict[str, Any], fds: list[int]) -> None:
        assert params == {"id": ID, "signal": number.name}
        killed.set()

    # The fake engine serves a connection's requests in turn: the kill needs another thread.
    rig.handlers.update({"workload.run": run, "workload.kill": kill})
    rig.engine.concurrent = True
    process = rig.popen(client, "run", "image")
    assert begun.wait(TIMEOUT_S)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (128 + number, b"ready\n", b"")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_signal_ends_a_command_that_only_waits(rig: Rig, client: str) -> None:
    begun, free = threading.Event(), threading.Event()

    def wait(params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        begun.set()
        free.wait(TIMEOUT_S)
        return {"StatusCode": 0}

    rig.handlers["workload.wait"] = wait
    process = rig.popen(client, "wait", "x")
    assert begun.wait(TIMEOUT_S)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    free.set()
    assert process.returncode == -signal.SIGTERM


def servers(rig: Rig) -> dict[int, tuple[int, str]]:
    """Pids of the command server and its workers: each one's parent and standard output."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"bulkhead.cli.server" in words and str(rig.here.run).encode() in words:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    found[int(entry.name)] = parent, os.readlink(entry / "fd" / "1")
    return found


def heads(rig: Rig) -> list[int]:
    """Those of them whose parent is none of them."""
    found = servers(rig)
    return [pid for pid, (parent, _) in found.items() if parent not in found]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_worker_that_dies_is_told(rig: Rig, client: str) -> None:
    def stats(params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        for pid, (_, output) in servers(rig).items():
            if output.startswith("pipe:"):
                os.kill(pid, signal.SIGKILL)
        return {}

    rig.handlers["system.info"] = stats
    done = rig.cli(client, "info")
    assert done.returncode == 125
    assert b"ended unexpectedly" in done.stderr
    rig.handlers["workload.run"] = ended(0)
    assert rig.cli(client, "run", "image").returncode == 0


def test_workers_end_when_the_server_is_killed(rig: Rig) -> None:
    begun, free = threading.Event(), threading.Event()

    def wait(params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        begun.set()
        assert free.wait(TIMEOUT_S)
        return {"StatusCode": 7}

    rig.handlers["workload.wait"] = wait
    busy = rig.popen("native", "wait", "x")
    try:
        assert begun.wait(TIMEOUT_S)
        # Servers that were begun at the same time end once they see the lock taken.
        until(lambda: len(heads(rig)) == 1, "there is one server")
        os.kill(heads(rig)[0], signal.SIGKILL)
        # What waits ends at once; the command that runs is not harmed.
        until(lambda: len(servers(rig)) == 1, "the workers that wait end")
    finally:
        free.set()
    out, err = busy.communicate(timeout=TIMEOUT_S)
    assert (busy.returncode, out, err) == (0, b"7\n", b"")
    until(lambda: not servers(rig), "the worker that was busy ends")
    rig.handlers["workload.run"] = ended(5)
    assert rig.cli("native", "run", "image").returncode == 5


def test_when_it_is_quiet_one_worker_waits(rig: Rig) -> None:
    rig.started()

    def workers() -> int:
        heads_ = set(heads(rig))
        return sum(1 for parent, _ in servers(rig).values() if parent in heads_)

    until(lambda: workers() == 1, "the others have ended")

    def busy() -> bool:
        rig.cli("native", "--version")
        return workers() == 2

    until(busy, "there are two again")
    until(lambda: workers() == 1, "but not for long")


def test_another_installation_is_refused_and_falls_back(rig: Rig, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.write_bytes(NATIVE.read_bytes())
    copy.chmod(0o755)
    rig.handlers["workload.run"] = ended(5)
    done = subprocess.run([copy, "run", "image"], env=rig.environment("native"), timeout=TIMEOUT_S)
    assert done.returncode == 5


def test_without_server_python_runs_the_command(rig: Rig) -> None:
    rig.handlers["workload.run"] = ended(6, b"y")
    done = rig.here.cli("run", "image", native=True, server=False)
    assert (done.code, done.out) == (6, "y")


def test_the_socket_is_private(rig: Rig) -> None:
    assert (rig.here.run / "command.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\0" * 24, b"BHC1" + b"\xff" * 20, b"BHC1\1\0\0\0\x10\0\0\0" + b"\1" * 40]
)
def test_nonsense_on_the_socket_harms_nobody(rig: Rig, data: bytes) -> None:
    for _ in range(4):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(rig.here.run / "command.sock"))
            sock.sendall(data)
    rig.handlers["workload.run"] = ended(4)
    assert rig.cli("native", "run", "image").returncode == 4
