"""An engine of its own on temporary directories, and a synchronous way to call it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bulkhead.errors import rebuild
from bulkhead.rpc import wire

DEADLINE_S = 600.0 if os.environ.get("BULKHEAD_GUEST") else 120.0
"""Emulated guests are slow."""
SOURCE = Path(__file__).resolve().parents[2] / "src"


class Rpc:
    """One connection; requests one after the other."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise
        self.sock.settimeout(DEADLINE_S)
        self._splitter = wire.Splitter()
        self._ready: list[wire.Message] = []
        self._number = 0

    def start(self, method: str, params: dict[str, Any], fds: Sequence[int] = ()) -> int:
        """Send a request; its number."""
        self._number += 1
        data = wire.frame(
            wire.Message(id=self._number, method=method, params=wire.pack(params), fds=len(fds))
        )
        sent = socket.send_fds(self.sock, [data], list(fds)) if fds else self.sock.send(data)
        self.sock.sendall(data[sent:])
        return self._number

    def cancel(self, number: int) -> None:
        """Ask the engine to stop that request."""
        self.sock.sendall(wire.frame(wire.Message(id=number, method="cancel")))

    def receive(self) -> wire.Message:
        """The next frame."""
        while not self._ready:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the engine hung up")
            self._ready.extend(self._splitter.feed(data))
        return self._ready.pop(0)

    def frames(self, number: int) -> Generator[Any, None, Any]:
        """Items of request `number`, then its result as the generator's return value."""
        while True:
            message = self.receive()
            if message.id != number:
                continue
            if message.error is not None:
                error = message.error
                raise rebuild(error.category, error.message, error.details)
            if message.done:
                return msgspec.msgpack.decode(message.result)
            yield msgspec.msgpack.decode(message.item)

    def stream(
        self, method: str, params: dict[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> tuple[list[Any], Any]:
        """All items, and the result."""
        items = []
        frames = self.frames(self.start(method, params or {}, fds))
        while True:
            try:
                items.append(next(frames))
            except StopIteration as end:
                return items, end.value

    def call(self, method: str, fds: Sequence[int] = (), /, **params: Any) -> Any:
        """The result; the error is raised."""
        return self.stream(method, params, fds)[1]

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> "Rpc":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Rig:
    """Starts, kills and asks an engine."""

    def __init__(self, root: Path, run: Path) -> None:
        self.root, self.run = root, run
        self.process: subprocess.Popen[bytes] | None = None
        self.log = root.parent / "engine.log"
        self._rpc: Rpc | None = None

    @property
    def socket(self) -> str:
        return str(self.run / "engine.sock")

    def command(self) -> list[str]:
        """The engine's command line."""
        place = ["--root", str(self.root), "--run", str(self.run)]
        return [sys.executable, "-m", "bulkhead.engine", *place]

    def environment(self) -> dict[str, str]:
        """The engine's environment."""
        others = os.environ.get("PYTHONPATH", "")
        return {**os.environ, "PYTHONPATH": f"{SOURCE}:{others}" if others else str(SOURCE)}

    def launch(self) -> subprocess.Popen[bytes]:
        """The process alone, not waited for."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
            )

    def start(self) -> None:
        """Start the engine and wait until it answers."""
        self.process = self.launch()
        deadline = time.monotonic() + DEADLINE_S
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"the engine ended: {self.log.read_text()[-4000:]}")
            with contextlib.suppress(OSError), Rpc(self.socket) as rpc:
                rpc.call("system.ping")
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer: {self.log.read_text()[-4000:]}")
            time.sleep(0.01)

    @property
    def rpc(self) -> Rpc:
        if self._rpc is None:
            self._rpc = Rpc(self.socket)
        return self._rpc

    def call(self, method: str, fds: Sequence[int] = (), /, **params: Any) -> Any:
        return self.rpc.call(method, fds, **params)

    def hang_up(self) -> None:
        if self._rpc is not None:
            self._rpc.close()
            self._rpc = None

    def kill(self) -> None:
        """SIGKILL to the engine alone."""
        self.hang_up()
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.process = None

    def stop(self) -> int:
        """SIGTERM, and its exit code; workloads run on."""
        self.hang_up()
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE_S)
        self.process = None
        return code

    def end(self) -> None:
        """Remove every workload and stop engine, holder and keeper."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        self.hang_up()
        for found in self.call("workload.list", all=True):
            self.call("workload.remove", id=found["Id"], force=True, volumes=True)
        with contextlib.suppress(ConnectionError):
            self.call("system.shutdown", force=True)
        self.hang_up()
        assert self.process is not None
        self.process.wait(DEADLINE_S)
        self.process = None


@contextlib.contextmanager
def engine(directory: Path) -> Iterator[Rig]:
    """A running engine below `directory`; everything of it ends with the block."""
    rig = Rig(directory / "root", directory / "run")
    try:
        rig.start()
        yield rig
    finally:
        rig.end()


IMAGE = "busybox:latest"


def load_busybox(rig: Rig) -> None:
    """Have the image `IMAGE`."""
    from tests.helpers import images

    archive = rig.root.parent / "busybox.tar"
    images.busybox_archive(archive)
    with archive.open("rb") as file:
        rig.rpc.stream("image.load", {}, [file.fileno()])


class Outcome:
    """What a `workload.run` gave."""

    def __init__(self, items: list[Any], result: Any, out: bytes, err: bytes) -> None:
        self.id: str = items[0]["Id"]
        self.result = result
        self.code: int = result["StatusCode"]
        self.out = out
        self.err = err


def _drain(fd: int, into: list[bytes]) -> None:
    with os.fdopen(fd, "rb") as file:
        into.append(file.read())


def run(
    rig: Rig, command: Sequence[str], *, stdin: bytes | None = None, name: str = "", **host: Any
) -> Outcome:
    """`run --rm` attached, with a connection of its own; `host` are members of HostConfig.

    A member called `config` holds members of Config, `boundary` is what isolates it, with
    a kernel's name behind a colon if it is to have that.
    """
    config = host.pop("config", {})
    boundary = host.pop("boundary", "")
    wanted = {"AutoRemove": True, **host}
    body = {"Image": IMAGE, "Cmd": list(command), "HostConfig": wanted, **config}
    ends = [os.pipe() for _ in range(3)]
    out: list[bytes] = []
    err: list[bytes] = []
    readers = [
        threading.Thread(target=_drain, args=(ends[1][0], out)),
        threading.Thread(target=_drain, args=(ends[2][0], err)),
    ]
    fds = [ends[0][0]] if stdin is not None else []
    if stdin is not None:
        body |= {"OpenStdin": True, "StdinOnce": True, "AttachStdin": True}
        os.write(ends[0][1], stdin)
    os.close(ends[0][1])
    fds += [ends[1][1], ends[2][1]]
    for reader in readers:
        reader.start()
    try:
        with Rpc(rig.socket) as rpc:
            params = {"name": name, "body": body, "attach": [stdin is not None, True, True]}
            params["boundary"], _, params["kernel"] = boundary.partition(":")
            items, result = rpc.stream("workload.run", params, fds)
    finally:
        for fd in (ends[0][0], ends[1][1], ends[2][1]):
            os.close(fd)
        for reader in readers:
            reader.join()
    return Outcome(items, result, out[0], err[0])


def start(
    rig: Rig, name: str, script: str, config: dict[str, Any] | None = None, **host: Any
) -> str:
    """A detached workload that runs a shell script; its id. `boundary` is what isolates it."""
    boundary, _, kernel = host.pop("boundary", "").partition(":")
    body = {"Image": IMAGE, "Cmd": ["sh", "-c", script], "HostConfig": host, **(config or {})}
    made = rig.call("workload.create", name=name, body=body, boundary=boundary, kernel=kernel)
    identity: str = made["Id"]
    rig.call("workload.start", id=identity)
    return identity


def execute(rig: Rig, name: str, command: Sequence[str], **body: Any) -> tuple[int, bytes]:
    """`exec` attached; its exit code and output."""
    reading, writing = os.pipe()
    out: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(reading, out))
    reader.start()
    try:
        with Rpc(rig.socket) as rpc:
            wanted = {"Cmd": list(command), "AttachStdout": True, "AttachStderr": True, **body}
            made = rpc.call("exec.create", id=name, body=wanted)
            rpc.call("exec.start", (writing, writing), id=made["Id"])
            code: int = rpc.call("exec.inspect", id=made["Id"])["ExitCode"]
    finally:
        os.close(writing)
        reader.join()
    return code, out[0]


def logs(rig: Rig, name: str, **params: Any) -> bytes:
    """The log, both streams as they came."""
    items, _ = rig.rpc.stream("workload.logs", {"id": name, **params})
    return b"".join(data for _, data in items)


def state(rig: Rig, name: str) -> dict[str, Any]:
    """State of `inspect`."""
    found: dict[str, Any] = rig.call("workload.inspect", id=name)["State"]
    return found
