"""A hostile guest: garbage, floods, huge frames, slow reads. The monitor ends it, in bounds.

With a compiler that has sanitizers, the mutated conversations run against a checked build.
"""

import contextlib
import itertools
import os
import random
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Decoder, GuestProtocolError, Mode, Type
from bulkhead.errors import BulkheadError
from bulkhead.linux.program import Program
from tests.helpers.guest_rig import Guest, simple
from tests.helpers.hostile_guest import HostileGuest
from tests.helpers.monitor_rig import MAIN, Monitor, main_frames
from tests.helpers.scale import scaled
from tests.helpers.waiting import DEADLINE_S

NATIVE = Path(__file__).parent.parent.parent / "native"
SCRIPT = main_frames(simple("true"))
MEMORY_KB = 24 << 10
"""Far above what a monitor needs (about 1 MB), far below what is sent at it."""
BROKEN = b"the guest broke the protocol"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """Guest and monitor with address and undefined-behaviour checks, if this compiler has them."""
    out = tmp_path_factory.mktemp("sanitized")
    probe = subprocess.run(
        ["gcc", "-fsanitize=address,undefined", "-x", "c", "-", "-o", str(out / "probe")],
        input=b"int main(void) { return 0; }",
        capture_output=True,
        check=False,
    )
    if probe.returncode or subprocess.run([str(out / "probe")], check=False).returncode:
        print("no sanitizers here, fuzzing the plain programs:", probe.stderr.decode()[-200:])
        return None
    targets = [f"{out}/bulkhead-guest", f"{out}/bulkhead-monitor"]
    subprocess.run(
        ["make", "-s", "-C", str(NATIVE), f"OUT={out}", "SANITIZE=1", *targets], check=True
    )
    return str(out)


def memory_kb(pid: int) -> int:
    """The most memory the process has ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


def started(guest: HostileGuest) -> None:
    guest.greet()
    guest.expect(Type.RUN, MAIN)
    guest.say(Type.STARTED, MAIN, 2)
    assert guest.monitor.report().type == Type.STARTED


OUT_OF_PLACE: list[tuple[str, bytes]] = [
    ("output of nobody", frames.encode(Type.OUT, 77, 1, b"x")),
    ("output of no stream", frames.encode(Type.OUT, MAIN, 3, b"x")),
    ("empty output", frames.encode(Type.OUT, MAIN, 1)),
    ("a second start", frames.encode(Type.STARTED, MAIN, 2)),
    ("a late failure", frames.encode(Type.FAILED, MAIN, 2, bytes(12))),
    ("a short failure", frames.encode(Type.FAILED, MAIN, 2, bytes(3))),
    ("the end of nobody", frames.encode(Type.EXITED, 77, 0)),
    ("an end with a story", frames.encode(Type.EXITED, MAIN, 0, bytes(5))),
    ("no wait status", frames.encode(Type.EXITED, MAIN, 1 << 16)),
    ("an end of no stream", frames.encode(Type.EOF, MAIN, 3)),
    ("credit for nothing", frames.encode(Type.GUEST_CREDIT, MAIN, 1)),
    ("credit beyond all bounds", frames.encode(Type.GUEST_CREDIT, MAIN, 0xFFFFFFFF)),
    ("an answer to nothing", frames.encode(Type.DATA, 5, 0, b"x")),
    ("a set-up that was not asked for", frames.encode(Type.DONE, 5)),
    ("a request to no mount", frames.encode(Type.FUSE, 5, 0, b"x")),
    ("a new beginning", frames.encode(Type.GUEST_HELLO, 0, frames.VERSION, bytes(16))),
    ("a frame of the host's", frames.encode(Type.RUN, MAIN)),
    ("an unknown frame", frames.HEADER.pack(0, 200, 0, 0, 0, 0)),
    ("a fragment", frames.HEADER.pack(1, Type.OUT, 1, 0, MAIN, 1) + b"x"),
    ("a huge frame", frames.HEADER.pack(frames.FRAME_MAX + 1, Type.OUT, 0, 0, MAIN, 1)),
    ("the hugest frame", b"\xff" * 16),
    ("unknown flags", frames.HEADER.pack(0, Type.LOG, 2, 0, 0, 0)),
]


@pytest.mark.parametrize(("name", "data"), OUT_OF_PLACE, ids=[n for n, _ in OUT_OF_PLACE])
def test_a_frame_out_of_place_ends_the_guest(tmp_path: Path, name: str, data: bytes) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        started(guest)
        guest.send(data)
        code, _, err = guest.monitor.wait()
        assert code == 125, name
        assert BROKEN in err, err
        assert guest.monitor.detail()["reason"] == "failed"


def test_nothing_is_believed_before_the_greeting(tmp_path: Path) -> None:
    for number, data in enumerate(
        (frames.encode(Type.STARTED, MAIN, 2), b"GET / HTTP/1.1\r\n\r\n" * 9)
    ):
        with HostileGuest(tmp_path / str(number), SCRIPT) as guest:
            guest.send(data)
            with pytest.raises(BulkheadError, match="broke the protocol"):
                raise frames.failure(guest.monitor.report(), [])
            assert guest.monitor.wait()[0] == 125


def test_an_old_answer_is_no_greeting(tmp_path: Path) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        guest.say(Type.GUEST_HELLO, 0, frames.VERSION, bytes(16))
        hello = guest.expect(Type.HELLO)
        guest.say(Type.GUEST_HELLO, 0, frames.VERSION, b"another's nonce!")
        guest.say(Type.STARTED, MAIN, 2)
        guest.say(Type.GUEST_HELLO, 0, frames.VERSION, hello.payload[:16])
        guest.expect(Type.RUN, MAIN)


def test_another_version_is_refused(tmp_path: Path) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        guest.say(Type.GUEST_HELLO, 0, 99, bytes(16))
        with pytest.raises(BulkheadError, match="another version"):
            raise frames.failure(guest.monitor.report(), [])


def test_more_output_than_credit_ends_the_guest(tmp_path: Path) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        started(guest)
        flood = frames.encode(Type.OUT, MAIN, 1, bytes(frames.FRAME_MAX)) * 160
        guest.send(flood)
        process = guest.monitor.process
        assert process.wait(DEADLINE_S) == 125
        assert process.stderr is not None
        assert b"more output than it has credit for" in process.stderr.read()


def test_a_guest_that_does_not_read_is_given_no_more_credit(tmp_path: Path) -> None:
    """Output in single bytes, each of which would be answered with more than itself."""
    pipe = subprocess.PIPE
    streams = (pipe, subprocess.DEVNULL, pipe)
    with HostileGuest(tmp_path, SCRIPT, streams=streams) as guest:
        started(guest)
        guest.send(frames.encode(Type.OUT, MAIN, 1, b"x") * 1_000_000)
        process = guest.monitor.process
        assert process.wait(DEADLINE_S) == 125
        assert process.stderr is not None
        assert b"more output than it has credit for" in process.stderr.read()


@pytest.mark.parametrize(
    "frame",
    [
        frames.encode(Type.LOG, 0, 0, bytes(frames.FRAME_MAX)),
        frames.encode(Type.LOG, 0, 0, b"x"),
        frames.encode(Type.EOF, MAIN, 0),
        frames.encode(Type.TAKEN, 0, 0),
    ],
    ids=["long logs", "short logs", "ends", "nothing taken"],
)
def test_a_flood_takes_no_memory(tmp_path: Path, frame: bytes) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        started(guest)
        data = frame * ((1 << 20) // len(frame) + 1)
        for _ in range(40):
            if guest.send(data) < len(data):
                break
        if guest.monitor.process.poll() is None:
            with contextlib.suppress(FileNotFoundError, AssertionError):
                assert memory_kb(guest.monitor.process.pid) < MEMORY_KB


def test_requests_that_nobody_serves_are_held_back(tmp_path: Path) -> None:
    """A file server that does not read stops the reading of the guest, not the growth of it."""
    folder = tmp_path
    script = frames.fuse_mount(100, "/shares/100") + SCRIPT
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(folder / "files.sock"))
        server.listen()
        options = ["--files", str(folder / "files.sock")]
        with HostileGuest(folder, script, options=options) as guest:
            connection, _ = server.accept()
            with connection:
                started(guest)
                guest.say(Type.DONE, 100)
                data = frames.encode(Type.FUSE, 100, 0, bytes(frames.FRAME_MAX)) * 16
                sent = 0
                while sent < 64 << 20:
                    taken = guest.send(data, most_s=2.0)
                    sent += taken
                    if taken < len(data):
                        break
                assert sent < 32 << 20
                assert memory_kb(guest.monitor.process.pid) < MEMORY_KB


def test_a_guest_that_does_not_read_holds_up_the_input(tmp_path: Path) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        started(guest)
        stream = guest.monitor.process.stdin
        assert stream is not None
        os.set_blocking(stream.fileno(), False)
        written = 0
        quiet_since = time.monotonic()
        while written < 64 << 20 and time.monotonic() - quiet_since < 2.0:
            try:
                written += os.write(stream.fileno(), bytes(1 << 16))
                quiet_since = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        assert written < 4 << 20
        assert memory_kb(guest.monitor.process.pid) < MEMORY_KB


def test_input_stops_at_the_window(tmp_path: Path) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        started(guest)
        stream = guest.monitor.process.stdin
        assert stream is not None
        with open(tmp_path / "input", "wb") as file:
            file.truncate(4 << 20)
        with open(tmp_path / "input", "rb") as file:
            feeder = subprocess.Popen(["cat"], stdin=file, stdout=stream)
        try:
            came = 0
            while came < frames.WINDOW:
                came += len(guest.expect(Type.STDIN, MAIN).payload)
            assert came == frames.WINDOW
            guest.say(Type.GUEST_CREDIT, MAIN, 10)
            assert len(guest.expect(Type.STDIN, MAIN).payload) == 10
        finally:
            feeder.kill()
            feeder.wait()


def test_a_silent_guest_is_given_up(tmp_path: Path) -> None:
    with HostileGuest(tmp_path, SCRIPT, options=["--boot-seconds", "1"]) as guest:
        with pytest.raises(BulkheadError, match="did not answer within 1 s"):
            raise frames.failure(guest.monitor.report(), [])
        assert guest.monitor.wait()[0] == 125


def test_an_end_without_the_ends_of_streams_is_an_end(tmp_path: Path) -> None:
    with HostileGuest(
        tmp_path, main_frames(simple("true"))[: -len(frames.shutdown(0, []))]
    ) as guest:
        started(guest)
        guest.say(Type.OUT, MAIN, 1, b"last words")
        guest.say(Type.EXITED, MAIN, 5 << 8)
        code, out, _ = guest.monitor.wait()
        assert (code, out) == (5, b"last words")


def test_what_a_guest_prints_is_kept_bounded_and_escaped(tmp_path: Path) -> None:
    with HostileGuest(tmp_path, SCRIPT) as guest:
        started(guest)
        for _ in range(100):
            guest.say(Type.LOG, 0, 0, b'"\\\x1b[2J\xff\0' * 1000)
        guest.hang_up()
        guest.monitor.wait()
        console = guest.monitor.detail()["console"]
        assert len(console) == 16384
        assert '"\\\x1b[2J\xff\0' in console


def conversation() -> list[bytes]:
    """What an honest guest says after the greeting, with every kind of frame."""
    return [
        frames.encode(Type.DONE, 10),
        frames.encode(Type.DONE, 100),
        frames.encode(Type.STARTED, MAIN, 2),
        frames.encode(Type.LOG, 0, 0, b"text"),
        frames.encode(Type.OUT, MAIN, 1, b"out" * 100),
        frames.encode(Type.FUSE, 100, 0, bytes(100_000)),
        frames.encode(Type.OUT, MAIN, 2, b"err"),
        frames.encode(Type.EOF, MAIN, 0),
        frames.encode(Type.TAKEN, 0, 100),
        frames.encode(Type.EOF, MAIN, 1),
        frames.encode(Type.EOF, MAIN, 2),
        frames.encode(Type.EXITED, MAIN, 0),
    ]


def mutate(parts: list[bytes], rng: random.Random) -> bytes:
    """Frames dropped, doubled, moved, and changed in their bytes."""
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        kind = rng.randrange(6)
        if kind == 0:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif kind == 1 and len(parts) > 1:
            del parts[at]
        elif kind == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] = parts[at][: rng.randrange(len(parts[at]) + 1)]
        else:
            changed = bytearray(parts[at])
            if changed:
                where = rng.randrange(min(len(changed), 24))
                changed[where] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, changed[where] ^ 1))
            parts[at] = bytes(changed)
    return b"".join(parts)


def test_mutated_conversations_end_in_words(tmp_path: Path, checked: str | None) -> None:
    rng = random.Random(7)
    setup = Program()
    setup.call("fine", "getpid")
    script = (
        frames.run(10, setup.compile().data, Mode.SETUP) + frames.fuse_mount(100, "/x") + SCRIPT
    )
    for number in range(scaled(40)):
        said = mutate(conversation(), rng) if number else b"".join(conversation())
        with HostileGuest(tmp_path / str(number), script, native=checked) as guest:
            guest.greet()
            guest.send(said)
            guest.hang_up()
            code, _, err = guest.monitor.wait()
            assert 0 <= code <= 255, (number, code, err)
            assert b"ERROR" not in err and b"runtime error" not in err, err
            assert number or code == 0, err


def test_garbage_is_refused(tmp_path: Path, checked: str | None) -> None:
    rng = random.Random(8)
    for number in range(scaled(10)):
        with HostileGuest(tmp_path / str(number), SCRIPT, native=checked) as guest:
            if number % 2:
                guest.greet()
            guest.send(rng.randbytes(rng.choice((5, 16, 100, 100_000))))
            guest.hang_up()
            code, _, err = guest.monitor.wait()
            assert code == 125, err
            assert b"ERROR" not in err and b"runtime error" not in err, err


def packets(rng: random.Random) -> bytes:
    """Something a client of the monitor might send by mistake."""
    good = [
        frames.encode(Type.READ, 3, 0, b"/proc/version"),
        frames.encode(Type.SIGNAL, 3, 9),
        frames.encode(Type.RESIZE, 3, 9),
        frames.run(3, simple("true"), Mode.PIPES),
        frames.HEADER.pack(4, Type.RUN, 1, 0, 3, 0) + b"part",
        b"",
        b"x" * 70_000,
    ]
    return mutate([rng.choice(good)], rng)


def test_clients_that_talk_nonsense_lose_their_connection_only(
    tmp_path: Path, checked: str | None
) -> None:
    rng = random.Random(9)
    with Monitor(tmp_path, main_frames(simple("sleep", "1000")), native=checked) as monitor:
        monitor.report()
        for _ in range(scaled(150)):
            with monitor.client() as client, contextlib.suppress(OSError):
                for _ in range(3):
                    client.sock.send(packets(rng))
        with monitor.client() as client:
            client.send(Type.READ, 5, 0, b"/proc/sys/kernel/ostype")
            assert client.receive().payload == b"Linux\n"
        assert monitor.process.poll() is None


def test_many_clients_are_served_in_turn(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(monitor.client()) for _ in range(80)]
            for client in idle[:60]:
                client.send(Type.READ, 5, 0, b"/proc/sys/kernel/ostype")
                assert client.receive().payload == b"Linux\n"
        with monitor.client() as client:
            client.send(Type.READ, 5, 0, b"/proc/sys/kernel/ostype")
            assert client.receive().payload == b"Linux\n"


def test_the_init_survives_mutated_frames(checked: str | None) -> None:
    """The host is trusted; its frames are still bounded. Programs themselves are left whole."""
    rng = random.Random(10)
    setup = Program()
    setup.call("fine", "getpid")
    run = frames.run(10, setup.compile().data, Mode.SETUP)
    others = [
        frames.encode(Type.STDIN, 10, 0, b"text"),
        frames.encode(Type.STDIN_EOF, 10),
        frames.encode(Type.RESIZE, 10, 1),
        frames.encode(Type.SIGNAL, 10, 15),
        frames.credit(10, 1, 100),
        frames.encode(Type.READ, 5, 0, b"/proc/version"),
        frames.encode(Type.FUSE_REPLY, 5, 0, bytes(100)),
        frames.hello(b"n" * 16, 0, bytes(32)),
    ]
    for _ in range(scaled(15)):
        with Guest(checked) as guest:
            for _ in range(20):
                head = bytearray(run[:36])
                where = rng.choice((*range(6, 16), *range(16, 36)))
                head[where] = rng.choice((0, 1, 0x7F, 0xFF))
                data = rng.choice((bytes(head) + run[36:], mutate(others, rng)))
                try:
                    guest.send(data)
                except (OSError, GuestProtocolError):
                    break
                if guest.ended:
                    break
            guest.sock.close()
            code = guest.process.wait(DEADLINE_S)
            assert code in (0, 137), code  # shut down by a frame, or by the channel's end


@given(st.binary(max_size=200), st.lists(st.integers(1, 50), max_size=8))
def test_the_decoder_is_bounded(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder()
    rest = data
    with contextlib.suppress(GuestProtocolError):
        for cut in itertools.chain(cuts, [len(data)]):
            for frame in decoder.feed(rest[:cut]):
                assert len(frame.payload) <= frames.MESSAGE_MAX
            rest = rest[cut:]


@given(st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary())
def test_frames_come_back(kind: int, identity: int, arg: int, payload: bytes) -> None:
    (frame,) = Decoder().feed(frames.encode(kind, identity, arg, payload))
    assert frame == frames.Frame(kind, identity, arg, payload)


def test_long_messages_come_back_and_endless_ones_are_refused() -> None:
    payload = os.urandom(200_000)
    data = frames.encode(Type.FUSE, 1, 0, payload)
    decoder = Decoder()
    found = [f for at in range(0, len(data), 7777) for f in decoder.feed(data[at : at + 7777])]
    assert found == [frames.Frame(Type.FUSE, 1, 0, payload)]
    part = frames.HEADER.pack(frames.FRAME_MAX, Type.FUSE, 1, 0, 1, 0) + bytes(frames.FRAME_MAX)
    with pytest.raises(GuestProtocolError, match="too long"):
        for _ in range(100):
            decoder.feed(part)
    with pytest.raises(GuestProtocolError, match="too long"):
        for number in range(100):
            decoder.feed(frames.HEADER.pack(0, Type.FUSE, 1, 0, number, 0))


@pytest.mark.parametrize("payload", [b"", bytes(11), b"\xff" * 40])
def test_failures_that_make_no_sense_are_errors(payload: bytes) -> None:
    frame = frames.Frame(Type.FAILED, 1, 5, payload)
    with pytest.raises(GuestProtocolError):
        raise frames.failure(frame, ["one"])


@given(st.integers(0, 0xFFFF), st.integers(0, 4), st.integers(0, 2**32 - 1), st.binary(max_size=60))
def test_each_failure_is_some_error(arg: int, kind: int, step: int, text: bytes) -> None:
    payload = step.to_bytes(4, "little") + kind.to_bytes(4, "little") + bytes(4) + text
    assert isinstance(frames.failure(frames.Frame(Type.FAILED, 1, arg, payload), []), BulkheadError)
