"""QMP, and what a clone is given."""

import asyncio
import json
import os
import socket
from collections.abc import Callable

import pytest

from bulkhead.boundaries.vmm import qemu, qmp, templates
from bulkhead.errors import Internal, Unavailable
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
    template = templates.Template(*files)
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
    disks = [qemu.Disk("/disks/0", True), qemu.Disk("/disks/1", False)]
    cards = [qemu.Card(-1, "02:00:00:00:00:00")]
    template = qemu.Machine(
        "/k", "/i", 10, cards=cards, placeholders=8, memory_file="/m", memory_shared=True
    )
    clone = qemu.Machine(
        "/k", "/i", 9, disks, placeholders=8, memory_file="/n", incoming=True, control_fd=14,
        cards=[qemu.Card(11, "02:42:0a:00:00:02")],
    )  # fmt: skip
    assert layout(template) == layout(clone)
    assert "-kernel" in qemu.argv(template)
    assert "-kernel" not in qemu.argv(clone)


def layout(machine: qemu.Machine) -> list[tuple[str, str]]:
    words = qemu.argv(machine)
    found = [words[words.index("-M") + 1]]
    found += [words[at + 1] for at, word in enumerate(words) if word == "-device"]
    return [(one.partition(",")[0], one.partition("bus.")[2].partition(",")[0]) for one in found]
