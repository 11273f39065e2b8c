"""QMP, and what a clone is given."""

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.vmm import images, qemu, qmp, templates, training
from bulkhead.errors import Internal, Unavailable, Unsupported
from bulkhead.linux.fds import OwnedFd

GREETING = b'{"QMP": {"version": {}}}\r\n'


def converse(said: bytes, use: Callable[[qmp.Qmp], "asyncio.Future[object]"]) -> object:
    """What `use` gets from a QEMU that says `said` and ends."""

    async def run() -> object:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)
            async with qmp.Qmp(ours, timeout_s=60) as control:
                return await use(control)

    return asyncio.run(run())


def status(control: qmp.Qmp) -> "asyncio.Future[object]":
    return asyncio.ensure_future(control.execute("query-status"))


def test_events_are_passed_over() -> None:
    said = GREETING + b'{"return": {}}\n{"event": "RESUME"}\n{"return": {"running": true}}\n'
    assert converse(said, status) == {"running": True}


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", Unavailable),
        (b"hello\n", Unavailable),
        (b"[]\n", Unavailable),
        (b"{}\n", Unavailable),
        (b"[" * 5000 + b"\n", Unavailable),
        (GREETING + b'{"return": {}}\n', Unavailable),
        (GREETING + b'{"return": {}}\n{"error": {"desc": "no"}}\n', Internal),
        (GREETING + b'{"return": {}}\n{"error": 7}\n', Internal),
    ],
)
def test_nonsense_ends_the_conversation(said: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        converse(said, status)


def test_a_clone_finds_its_orders_in_its_socket() -> None:
    files = [OwnedFd(os.memfd_create(name)) for name in ("memory", "state")]
    os.write(int(files[1]), b"state")
    template = templates.Template(files[0], files[1])
    first, second = templates.clone(template, 11), templates.clone(template, 12)
    try:
        assert (first.memory_file, first.control_fd) == ("/proc/self/fd/11", 13)
        _, state, control, _ = first.fds
        orders = [json.loads(line) for line in os.read(int(control), 4096).splitlines()]
        assert [one["execute"] for one in orders] == [
            "qmp_capabilities",
            "migrate-set-capabilities",
            "migrate-incoming",
        ]
        assert orders[-1]["arguments"] == {"uri": "fd:12"}
        assert os.read(int(state), 10) == b"state"
        assert os.read(int(second.fds[1]), 10) == b"state", "each has an offset of its own"
        with pytest.raises(OSError, match="Bad file"):
            os.write(int(state), b"x")
    finally:
        template.close()
        for fd in (*first.fds, *second.fds):
            fd.close()


def test_a_clone_has_the_layout_of_its_template() -> None:
    """Everything but files and descriptors is equal, or the state does not fit."""
    cards = [qemu.Card(-1, "02:00:00:00:00:00")]
    found = [qemu.Disk("/disks/0", True), qemu.Disk("/disks/1", False)]
    disks: list[qemu.Disk | None] = [None] * 8
    for place, disk in zip(qemu.places(found, 1), found, strict=True):
        disks[place] = disk
    template = qemu.Machine(
        "/k", "/i", 10, cards=cards, disks=[None] * 8, memory_file="/m", memory_shared=True
    )
    clone = qemu.Machine(
        "/k", "/i", 9, disks, memory_file="/n", incoming=True, control_fd=14,
        cards=[qemu.Card(11, "02:42:0a:00:00:02")],
    )  # fmt: skip
    assert layout(template) == layout(clone)
    assert "-kernel" in qemu.argv(template)
    assert "-kernel" not in qemu.argv(clone)


def test_disks_have_places_by_whether_they_can_be_written() -> None:
    layers = [qemu.Disk(f"/disks/{number}", True) for number in range(2)]
    upper = qemu.Disk("/disks/2", False)
    assert qemu.places([*layers, upper], 1) == [qemu.WRITABLE, qemu.WRITABLE + 1, 0]
    with pytest.raises(Unsupported, match=f"{qemu.WRITABLE} disks"):
        qemu.places([upper] * (qemu.WRITABLE + 1), 1)


def test_a_clone_of_an_image_gets_its_disks_before_it_goes_on() -> None:
    said = images.orders({4: qemu.Disk("/disks/0", True), 0: qemu.Disk("/disks/1", False)})
    orders = [json.loads(line) for line in said.splitlines()]
    assert [one["execute"] for one in orders] == ["blockdev-add", "qom-set"] * 2 + ["cont"]
    assert orders[0]["arguments"]["read-only"] is True
    assert orders[1]["arguments"] == {
        "path": "/machine/peripheral/blk4", "property": "drive", "value": "disk4",
    }  # fmt: skip
    assert orders[2]["arguments"]["discard"] == "unmap"


def test_the_command_line_of_a_clone_says_what_is_where() -> None:
    assert images.argv(12, {10: 9, 11: 13})[1:] == ["qemu-system-x86_64", "12", "10=9", "11=13"]


def test_old_images_go() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for age, name in enumerate(("b1-new", "b1-old", "b1-kept", "b0-other")):
            path = Path(folder, name)
            path.touch()
            os.utime(path, (1000 - age, 1000 - age))
        images.forget_others(folder, "b1", ["b1-kept"], 2)
        assert sorted(os.listdir(folder)) == ["b1-kept", "b1-new"]


def answer(kind: frames.Type, identity: int, arg: int = 0) -> frames.Frame:
    (found,) = frames.Decoder().feed(frames.encode(kind, identity, arg, b""))
    return found


def test_a_lesson_is_taught_stage_by_stage() -> None:
    stages = [training.Stage(b"one", {}, {1, 2}), training.Stage(b"two", {}, {3})]
    lesson = training.Lesson(stages)
    assert lesson.heard(answer(frames.Type.DONE, 1)) == b""
    assert lesson.heard(answer(frames.Type.EXITED, 2)) == b"two"
    assert lesson.heard(answer(frames.Type.DONE, 3)) is None
    with pytest.raises(Unavailable, match="status 256"):
        training.Lesson(stages).heard(answer(frames.Type.EXITED, 2, 256))


def test_a_layer_for_the_lesson_is_a_file_system() -> None:
    made = training.layer(b"\x7fELF" + bytes(5000))
    assert len(made) == 4 * 4096
    assert made[1024:1028] == (0xE0F5E1E2).to_bytes(4, "little")
    assert made[2 * 4096 :][:4] == b"\x7fELF"


def layout(machine: qemu.Machine) -> list[tuple[str, str]]:
    words = qemu.argv(machine)
    found = [words[words.index("-M") + 1]]
    found += [words[at + 1] for at, word in enumerate(words) if word == "-device"]
    return [(one.partition(",")[0], one.partition("bus.")[2].partition(",")[0]) for one in found]
