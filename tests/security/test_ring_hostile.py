"""The monitor's side of the ring: what it writes, how much, and a guest that lies about it."""

import select
import struct
from pathlib import Path

import pytest

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Decoder, Frame, Mode, Type
from tests.helpers.guest_rig import simple
from tests.helpers.hostile_guest import HostileGuest
from tests.helpers.monitor_rig import MAIN, main_frames
from tests.helpers.waiting import DEADLINE_S

RING = 512 << 10
BELLS = 64


class Ring:
    """A guest that reads the ring as the init does."""

    def __init__(self, folder: Path, guest: HostileGuest) -> None:
        self.file, self.guest = folder / "ring", guest
        self.at = 0
        self.decoder = Decoder()
        self.frames: list[Frame] = []

    def listen(self) -> tuple[int, int]:
        """Wait for bells: how many, and how many bytes they announce; those are read."""
        words = b""
        while not words or len(words) % 4:
            assert select.select([self.guest.channel], [], [], DEADLINE_S)[0], "no bell"
            data = self.guest.channel.recv(4096)
            assert data, "the monitor hung up"
            words += data
        sizes = struct.unpack(f"<{len(words) // 4}I", words)
        total = sum(sizes)
        data = self.file.read_bytes() * 2
        self.frames += self.decoder.feed(data[self.at : self.at + total])
        self.at = (self.at + total) % RING
        return len(sizes), total

    def take(self, bells: int, size: int) -> None:
        """Say that they have been read."""
        self.guest.send(frames.encode(Type.TAKEN, bells, size))

    def until(self, kind: Type) -> Frame:
        """Read on until such a frame comes."""
        while not any(frame.type == kind for frame in self.frames):
            self.take(*self.listen())
        return next(frame for frame in self.frames if frame.type == kind)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return ["--ring", str(tmp_path / "ring")]


def _greeted(ring: Ring) -> None:
    ring.guest.say(Type.GUEST_HELLO, 0, frames.VERSION, bytes(16))
    hello = ring.until(Type.HELLO)
    ring.guest.say(Type.GUEST_HELLO, 0, frames.VERSION, hello.payload[:16] + b"6.1\0v\0m")


def test_a_script_longer_than_the_ring_goes_round(tmp_path: Path, options: list[str]) -> None:
    setups = b"".join(frames.run(10 + n, bytes([n]) * 200_000, Mode.SETUP) for n in range(8))
    script = setups + main_frames(simple("true"))
    assert len(setups) > 2 * RING
    with HostileGuest(tmp_path, script, options=options) as guest:
        ring = Ring(tmp_path, guest)
        _greeted(ring)
        while not any(f.type == Type.RUN and f.id == MAIN for f in ring.frames):
            ring.take(*ring.listen())
        runs = [f for f in ring.frames if f.type == Type.RUN]
        assert [f.payload[-1000:] for f in runs[:8]] == [bytes([n]) * 1000 for n in range(8)]


def test_what_is_not_taken_holds_it_up(tmp_path: Path, options: list[str]) -> None:
    setups = b"".join(frames.run(10 + n, bytes(200_000), Mode.SETUP) for n in range(8))
    with HostileGuest(tmp_path, setups + main_frames(simple("true")), options=options) as guest:
        ring = Ring(tmp_path, guest)
        _greeted(ring)
        total = bells = 0
        while total < RING:
            rung, size = ring.listen()
            bells, total = bells + rung, total + size
        assert (total, bells <= BELLS) == (RING, True)
        ring.take(bells, total)
        assert ring.listen()[1] > 0


@pytest.mark.parametrize(("bells", "size"), [(0, 1 << 20), (1000, 0), (1, 0xFFFFFFFF)])
def test_a_guest_that_took_what_was_not_sent_is_ended(
    tmp_path: Path, options: list[str], bells: int, size: int
) -> None:
    with HostileGuest(tmp_path, main_frames(simple("true")), options=options) as guest:
        ring = Ring(tmp_path, guest)
        _greeted(ring)
        ring.take(bells, size)
        assert guest.monitor.wait()[0] == 125
        assert "it took what was not sent" in guest.monitor.detail()["text"]
