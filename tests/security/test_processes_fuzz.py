"""The holder refuses what is not right and lives on: mutated messages, mutated programs."""

import asyncio
import os
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundary.seam import LaunchRequest
from bulkhead.home import Home
from bulkhead.keeper.holder import HolderClient, ensure_holder
from bulkhead.keeper.launching import encode_request
from bulkhead.linux.program import Blob, Compiled, Fd, Len, Patched, Program
from tests.helpers.processes import ENV, command, eventually, within
from tests.helpers.scale import scaled

NATIVE = Path(__file__).parent.parent.parent / "native"
HEAD = struct.Struct("=IIiI")
EINVAL = 22
FAILED_LAUNCH = -1


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """A holder built with address and undefined-behaviour checks, if this compiler has them."""
    out = tmp_path_factory.mktemp("sanitized")
    probe = subprocess.run(
        ["gcc", "-fsanitize=address,undefined", "-x", "c", "-", "-o", str(out / "probe")],
        input=b"int main(void) { return 0; }",
        capture_output=True,
        check=False,
    )
    if probe.returncode or subprocess.run([str(out / "probe")], check=False).returncode:
        print("no sanitizers here, fuzzing the plain holder:", probe.stderr.decode()[-200:])
        return None
    subprocess.run(
        ["make", "-s", "-C", str(NATIVE), f"OUT={out}", "SANITIZE=1", f"{out}/bulkhead-holder"],
        check=True,
    )
    return str(out)


def sample() -> Compiled:
    """A program with every kind of step that does no harm, ending in one that always fails."""
    program = Program()
    slot = program.call("pid", "getpid", ok=(1, 2))
    text = Blob(b"text")
    program.call("patched", "getpid", Patched(bytes(16), ((0, 8, text), (8, 4, Len(text)))))
    program.load("load", text, 0, 4)
    with program.when(slot, failed=True):
        program.fail("fail", 1)
    program.same_inode("same", Fd(0), Fd(0))
    program.exec("exec", ["/no/such/program", "/no/other"], ["a", "b"], ENV)
    return program.compile()


def mutations(data: bytes, rng: random.Random, protect: int = 0) -> Iterator[bytes]:
    """Endless variants: flipped bits, interesting integers, cuts and repetitions."""
    interesting = (0, 1, 7, 8, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
    while True:
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            if len(out) <= protect:
                break
            at = rng.randrange(protect, len(out))
            kind = rng.randrange(5)
            if kind == 0:
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                size = rng.choice((1, 2, 4, 8))
                at -= at % size
                value = rng.choice(interesting) & ((1 << 8 * size) - 1)
                out[at : at + size] = value.to_bytes(size, "little")
            elif kind == 2:
                del out[at:]
            elif kind == 3:
                out[at:at] = out[at : at + rng.randrange(1, 64)]
            else:
                out[at] = rng.randrange(256)
        yield bytes(out)


def safe(program: bytes) -> bytes:
    """The program with every CALL's number made getpid's: a fuzzed one must not run wild."""
    out = bytearray(program)
    if len(out) < 32:
        return program
    ops = min(struct.unpack_from("=I", out, 12)[0], (len(out) - 32) // 80)
    getpid = struct.unpack_from("=I", sample().data, 32 + 4)[0]
    for at in range(32, 32 + 80 * ops, 80):
        if out[at] in (1, 6):  # CALL, FORK
            out[at] = 1
            struct.pack_into("=I", out, at + 4, getpid)
        elif out[at] in (2, 7):  # WRITE, GATE: would write files, would wait
            out[at] = 12
    return bytes(out)


class Peer:
    """A raw connection to the holder, made again when the holder drops it."""

    def __init__(self, home: Home) -> None:
        self._path = home.in_run("holder.sock")
        self._sock: socket.socket | None = None
        self.seq = 0

    def ask(self, kind: int, body: bytes, fds: list[int]) -> int | None:
        """Send one message; the status of the answer, None if the connection was dropped."""
        if self._sock is None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._sock.settimeout(60)
            self._sock.connect(self._path)
        self.seq += 1
        try:
            socket.send_fds(self._sock, [HEAD.pack(kind, self.seq, 0, 0) + body], fds)
            while True:
                data = self._sock.recv(1 << 17)
                if len(data) < HEAD.size:
                    break
                got, seq, status, _ = HEAD.unpack_from(data)
                if got == 64 and seq == self.seq:
                    return int(status)
        except (ConnectionError, BrokenPipeError):
            pass
        self.close()
        return None

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


async def start(tmp_path: Path, native: str | None) -> HolderClient:
    # Short, for Peer's address.
    return await ensure_holder(Home(f"{tmp_path}/r", f"{tmp_path}/r"), native)


async def still_well(client: HolderClient, pid: int) -> None:
    assert client.pid == pid, "the holder has died and was started again"
    compiled = command(["/bin/true"])
    seen: list[str] = []
    client.on_exit(lambda event: seen.append(event.id))
    await client.launch(
        LaunchRequest(id="well", program=compiled.data, clone_flags=0, fds=(), steps=compiled.steps)
    )
    await eventually(lambda: "well" in seen, "a launch after all that")
    log = Path(client.home.in_run("holder.log")).read_text(errors="replace")
    assert "Sanitizer" not in log and "runtime error" not in log, log
    await within(client.shutdown(force=True))
    await client.close()


def body_of(program: bytes, identity: str) -> bytes:
    request = LaunchRequest(
        id=identity, program=program, clone_flags=0, fds=(0,), steps=(), record="", meta=b"meta"
    )
    parts, _, close = encode_request(request)
    for fd in close:
        os.close(fd)
    return b"".join(parts)


def test_mutated_programs_are_refused_or_fail(tmp_path: Path, checked: str | None) -> None:
    rng = random.Random(1)

    async def main() -> None:
        client = await start(tmp_path, checked)
        pid, peer = client.pid, Peer(client.home)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            assert peer.ask(2, body_of(sample().data, "sane"), [null]) == FAILED_LAUNCH
            variants = mutations(sample().data, rng)
            statuses: dict[int | None, int] = {}
            for n in range(scaled(1500)):
                program = safe(next(variants))
                status = peer.ask(2, body_of(program, f"f{n}"), [null])
                statuses[status] = statuses.get(status, 0) + 1
            assert set(statuses) <= {EINVAL, FAILED_LAUNCH, 0}
            assert statuses[EINVAL] > 0 and statuses[FAILED_LAUNCH] > 0
        finally:
            os.close(null)
            peer.close()
        await still_well(client, pid)

    asyncio.run(main())


def test_mutated_messages_harm_nobody(tmp_path: Path, checked: str | None) -> None:
    rng = random.Random(2)
    supervise = struct.pack("=4I", 4, 2, 1, 0) + b"name/no/such\0argument\0A=B\0"
    samples = {
        1: b"",
        2: body_of(sample().data, "message"),
        3: b"id",
        4: b"id",
        5: b"",
        6: supervise,
        7: b"name",
        9: b"id",
        77: b"unknown",
    }

    async def main() -> None:
        client = await start(tmp_path, checked)
        pid, peer = client.pid, Peer(client.home)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            for kind, body in samples.items():
                variants = mutations(body or b"\0", rng)
                for _ in range(scaled(150)):
                    fuzzed = next(variants)
                    if kind == 2:
                        fuzzed = fuzzed[:48] + body[48:][: len(fuzzed) - 48]
                    peer.ask(kind, fuzzed, [null] * rng.choice((0, 1, 1, 2, 200)))
                    if kind == 6:
                        peer.ask(7, b"name", [])
        finally:
            os.close(null)
            peer.close()
        await still_well(client, pid)

    asyncio.run(main())


def test_a_file_of_a_program_that_is_none_is_refused(tmp_path: Path, checked: str | None) -> None:
    async def main() -> None:
        client = await start(tmp_path, checked)
        pid, peer = client.pid, Peer(client.home)
        folder = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
        read, write = os.pipe()
        empty = os.memfd_create("empty")
        huge = os.memfd_create("huge")
        os.truncate(huge, 1 << 40)
        head = struct.pack("=Q10I", 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
        try:
            for fd in (folder, read, empty, huge):
                assert peer.ask(2, head, [fd]) == EINVAL
            assert peer.ask(2, head, []) == EINVAL
        finally:
            for fd in (folder, read, write, empty, huge):
                os.close(fd)
            peer.close()
        await still_well(client, pid)

    asyncio.run(main())
