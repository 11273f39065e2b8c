"""SIGKILL for keeper, holder and the engine's connection, in any order, under load."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from bulkhead.keeper.client import KeeperClient, supervise_keeper
from bulkhead.keeper.holder import ensure_holder
from tests.helpers.processes import PYTHON, Rig, eventually, kill_and_wait, mine, rig, within
from tests.helpers.scale import scaled

# Writes portions of random sizes, cut anywhere, until told by a file to end; then says how many.
CHATTY = """
import os, random, sys, time
rng = random.Random(int(sys.argv[1])); stop = sys.argv[2]
n = 0; out = b''
while True:
    out += b'%d ' % n + b'x' * rng.choice((0, 10, 300, 20000)) + b'\\n'; n += 1
    cut = rng.randrange(len(out) + 1)
    view = out[:cut]
    while view:
        view = view[os.write(1, view):]
    out = out[cut:]
    if n % 20 == 0:
        if os.path.exists(stop): break
        time.sleep(0.001)
while out:
    out = out[os.write(1, out):]
sys.exit(42)
"""


def expected(seed: int, lines: int, newline: bytes) -> bytes:
    rng = random.Random(seed)
    out = []
    length = 0
    for n in range(lines):
        line = b"%d " % n + b"x" * rng.choice((0, 10, 300, 20000)) + b"\n"
        length += len(line)
        cut = rng.randrange(length + 1)
        length -= cut
        out.append(line.replace(b"\n", newline))
    return b"".join(out)


def keepers(it: Rig) -> list[int]:
    return [p for p in mine(f"{it.directory}/run") if p in mine("keeper/main.py")]


async def check(it: Rig, name: str, seed: int, newline: bytes) -> None:
    await within(it.keeper.drained(name))
    got = await it.logged(name)
    lines = int(got.rpartition(newline)[0].rpartition(newline)[2].split(b" ")[0]) + 1
    want = expected(seed, lines, newline)
    if got != want:
        at = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
        raise AssertionError(f"{name} differs at {at} of {len(want)}: {got[at - 50 : at + 50]!r}")


@pytest.mark.parametrize("seed", range(scaled(3)))
def test_keepers_and_connections_die_and_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    stop = str(tmp_path / "stop")

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            for name, tty in (("pipe", False), ("tty", True)):
                argv = [PYTHON, "-I", "-S", "-c", CHATTY, str(seed), stop]
                await it.run_kept(name, argv, tty=tty)
            for _ in range(scaled(8)):
                await asyncio.sleep(rng.random() * 0.2)
                if rng.random() < 0.7:
                    for pid in keepers(it):
                        kill_and_wait(pid)
                if rng.random() < 0.4:  # the engine's side goes away and comes back
                    await it.keeper.close()
                    await it.holder.close()
                    await asyncio.sleep(rng.random() * 0.05)
                    it.holder = await ensure_holder(it.home)
                    it.holder.on_exit(lambda event: it.exits.__setitem__(event.id, event))
                    it.keeper = KeeperClient(it.home)
            Path(stop).touch()
            for name, newline in (("pipe", b"\n"), ("tty", b"\r\n")):
                event = await it.exited(name)
                assert os.waitstatus_to_exitcode(event.wait_status) == 42
                await check(it, name, seed, newline)

    asyncio.run(main())


def test_an_attachment_survives_keepers(tmp_path: Path) -> None:
    stop = str(tmp_path / "stop")

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            read, write = os.pipe()
            chunks: list[bytes] = []

            def collect() -> None:
                with open(read, "rb", buffering=0) as file:
                    for chunk in iter(lambda: file.read(65536), b""):
                        chunks.append(chunk)

            reader = asyncio.get_running_loop().run_in_executor(None, collect)
            async with it.keeper.attaching("a", stdout=write) as ended:
                await it.run_kept("a", [PYTHON, "-I", "-S", "-c", CHATTY, "7", stop])
                for _ in range(3):
                    size = len(chunks)
                    await eventually(lambda size=size: len(chunks) > size + 3, "output comes")  # type: ignore[misc]
                    for pid in keepers(it):
                        kill_and_wait(pid)
                Path(stop).touch()
                assert await within(ended) == "exited"
            os.close(write)
            await reader
            await check(it, "a", 7, b"\n")
            # What a killed keeper held for a client that did not read just then is in the log
            # only; the attachment itself goes on to the end.
            last = (await it.logged("a")).splitlines()[-1]
            assert b"".join(chunks).splitlines()[-1] == last

    asyncio.run(main())


def test_output_goes_on_without_holder(tmp_path: Path) -> None:
    stop = str(tmp_path / "stop")

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            restarted = asyncio.Event()
            it.holder.on_restart(restarted.set)
            await it.run_kept("a", [PYTHON, "-I", "-S", "-c", CHATTY, "3", stop])
            # Until a keeper has the descriptors, too, only the holder does.
            await eventually(lambda: os.path.exists(it.log("a")), "the keeper has taken over")
            (old,) = keepers(it)
            kill_and_wait(it.holder.pid)
            await within(restarted.wait())
            await supervise_keeper(it.holder)
            # The keeper of before lives on and works for the new holder; the new one waits.
            await it.run_kept("b", ["/bin/echo", "b"])
            await it.exited("b")
            await within(it.keeper.drained("b"))
            assert await it.logged("b") == b"b\n"
            Path(stop).touch()
            await check(it, "a", 3, b"\n")
            # When it dies, the one that waited takes over.
            os.kill(old, signal.SIGKILL)
            await it.run_kept("c", ["/bin/echo", "c"])
            await it.exited("c")
            await within(it.keeper.drained("c"))
            assert await it.logged("c") == b"c\n"

    asyncio.run(main())
