"""The keeper: stdio, logs, attachments, terminals."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bulkhead.keeper import logs
from bulkhead.keeper.client import KeeperClient
from bulkhead.keeper.pump import ORPHAN_S
from tests.helpers.processes import DEADLINE_S, PYTHON, Rig, eventually, rig, within


class Drain:
    """The read end of a pipe, collected on the loop."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self.data = b""
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.read, self._more)

    def _more(self) -> None:
        try:
            data = os.read(self.read, 1 << 20)
        except BlockingIOError:
            return
        self.data += data
        if not data:
            asyncio.get_running_loop().remove_reader(self.read)
            self.ended.set()

    def close_write(self) -> None:
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def close(self) -> None:
        self.close_write()
        asyncio.get_running_loop().remove_reader(self.read)
        os.close(self.read)


@asynccontextmanager
async def attached(
    it: Rig, identity: str, *, stdin: int | None = None, keys: bytes = b"\x10\x11"
) -> AsyncIterator[tuple[Drain, Drain, "asyncio.Future[str]"]]:
    out, err = Drain(), Drain()
    try:
        async with it.keeper.attaching(
            identity, stdin=stdin, stdout=out.write, stderr=err.write, detach_keys=keys
        ) as ended:
            yield out, err, ended
    finally:
        out.close()
        err.close()


def test_output_is_logged_and_forwarded(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            rig(tmp_path, keeper=True) as it,
            attached(it, "a") as (out, err, ended),
        ):
            script = "echo one; echo two >&2; printf 'three\\n\\377\\001four'"
            await it.run_kept("a", ["/bin/sh", "-c", script])
            assert await within(ended) == "exited"
            out.close_write()
            err.close_write()
            await within(out.ended.wait())
            await within(err.ended.wait())
            assert (out.data, err.data) == (b"one\nthree\n\xff\x01four", b"two\n")
            await it.exited("a")
            await within(it.keeper.drained("a"))
            assert await it.logged("a", 1) == out.data
            assert await it.logged("a", 2) == err.data
            assert logs.partial(it.log("a")) == {}
            await it.keeper.release("a")
            assert await within(it.keeper.attach("a", stdout=err.read, wait=False)) == "gone"

    asyncio.run(main())


def test_short_processes_lose_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            for n in range(50):
                name = f"n{n}"
                await it.run_kept(name, ["/bin/echo", name])
                await it.exited(name)
                await within(it.keeper.drained(name))
                assert await it.logged(name) == f"{name}\n".encode()
                await it.keeper.release(name)
                await it.holder.forget(name)

    asyncio.run(main())


def test_stdin_reaches_the_process_and_ends(tmp_path: Path) -> None:
    data = os.urandom(300_000) + b"\x10\x11" + bytes(100)
    source = tmp_path / "source"
    source.write_bytes(data)

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            for name in ("file", "pipe"):
                if name == "file":
                    fd, writer = os.open(source, os.O_RDONLY), None
                else:
                    fd, write = os.pipe()

                    def feed(write: int = write) -> None:
                        with open(write, "wb") as file:
                            file.write(data)

                    writer = asyncio.get_running_loop().run_in_executor(None, feed)
                async with attached(it, name, stdin=fd) as (out, _, ended):
                    await it.run_kept(name, ["/bin/cat"], stdin_open=True, stdin_once=True)
                    os.close(fd)
                    assert await within(ended) == "exited"
                    out.close_write()
                    await within(out.ended.wait())
                    assert out.data == data
                if writer is not None:
                    await writer
                assert await it.logged(name) == data

    asyncio.run(main())


def test_a_terminal_resizes_and_detaches(tmp_path: Path) -> None:
    script = 'echo ready; while read -r line; do echo "<$line> $(stty size)"; done'

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            stdin, typed = os.pipe()
            async with attached(it, "t", stdin=stdin) as (out, _, ended):
                await it.run_kept("t", ["/bin/sh", "-c", script], tty=True, stdin_open=True)
                await eventually(lambda: b"ready" in out.data, "the shell is ready")
                await it.keeper.resize("t", 33, 77)
                os.write(typed, b"hello\n")
                await eventually(lambda: b"<hello>" in out.data, "an answer")
                await eventually(lambda: b"33 77" in out.data, "the new size")
                os.write(typed, b"\x10x\x10")
                os.write(typed, b"\x11never seen")
                assert await within(ended) == "detached"
            os.close(typed)
            os.close(stdin)
            stdin, typed = os.pipe()
            async with attached(it, "t", stdin=stdin, keys=b"") as (out, _, ended):
                os.write(typed, b"\n")
                # What had been typed before the detach keys has been passed on.
                await eventually(lambda: b"<" in out.data and b"x" in out.data, "the rest")
                os.write(typed, b"\x04")
                assert await within(ended) == "exited"
                assert b"never seen" not in out.data
            os.close(typed)
            os.close(stdin)
            assert b"ready" in await it.logged("t")

    asyncio.run(main())


def test_a_slow_client_holds_up_its_own_workload_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            read, write = os.pipe()
            async with it.keeper.attaching("slow", stdout=write) as ended:
                script = "i=0; while [ $i -lt 60000 ]; do echo 0123456789; i=$((i+1)); done"
                await it.run_kept("slow", ["/bin/sh", "-c", script])
                for n in range(5):
                    await it.run_kept(f"quick{n}", ["/bin/echo", "x"])
                    await it.exited(f"quick{n}")
                    await within(it.keeper.drained(f"quick{n}"))
                os.close(write)
                assert not ended.done()
                loop = asyncio.get_running_loop()

                def drain() -> int:
                    with open(read, "rb") as file:
                        return sum(len(block) for block in iter(lambda: file.read(65536), b""))

                assert await asyncio.wait_for(loop.run_in_executor(None, drain), 120) == 660_000
                assert await within(ended) == "exited"
            assert len(await it.logged("slow")) == 660_000

    asyncio.run(main())


def test_a_dead_client_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            read, write = os.pipe()
            async with it.keeper.attaching("a", stdout=write) as ended:
                script = "while :; do echo 0123456789; done"
                await it.run_kept("a", ["/bin/sh", "-c", script], max_size=100_000, max_file=2)
                os.close(write)
                await eventually(lambda: os.path.exists(it.log("a")), "a log")
                os.close(read)
                assert await within(ended) == "gone"
            seen: set[int] = set()

            def sizes() -> int:
                with contextlib.suppress(FileNotFoundError):  # in the midst of a rotation
                    seen.add(os.path.getsize(it.log("a")))
                return len(seen)

            await eventually(lambda: sizes() > 3, "it goes on")
            await it.holder.signal("a", signal.SIGKILL)
            await it.exited("a")
            await within(it.keeper.drained("a"))

    asyncio.run(main())


def test_output_waits_only_for_clients_that_outlive_their_engine(tmp_path: Path) -> None:
    script = "echo ready; read x; echo $x; read y"

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            inputs = {name: os.pipe() for name in ("leaves", "returns")}
            engine = KeeperClient(it.home)
            try:
                async with contextlib.AsyncExitStack() as stack:
                    outs = []
                    for name, (read, _) in inputs.items():
                        await it.run_kept(name, ["/bin/sh", "-c", script], stdin_open=True)
                        await _logged(it, name, b"ready\n")  # the keeper has it
                        out = Drain()
                        stack.callback(out.close)
                        # The input comes by another client, which stays.
                        await stack.enter_async_context(it.keeper.attaching(name, stdin=read))
                        await stack.enter_async_context(
                            engine.attaching(name, stdout=out.write, returns=name == "returns")
                        )
                        out.close_write()
                        outs.append(out)
                    begun = time.monotonic()
                    await engine.close()
                    for out in outs:
                        await within(out.ended.wait())
                    for name, (_, write) in inputs.items():
                        os.write(write, f"{name}\n".encode())
                    await _logged(it, "leaves", b"ready\nleaves\n")
                    if time.monotonic() - begun < ORPHAN_S / 2:
                        assert await it.logged("returns") == b"ready\n"
                    async with attached(it, "returns") as (back, _, _):
                        await eventually(lambda: back.data == b"returns\n", "it comes back")
                    await _logged(it, "returns", b"ready\nreturns\n")
            finally:
                for pair in inputs.values():
                    for fd in pair:
                        os.close(fd)

    asyncio.run(main())


async def _logged(it: Rig, name: str, expected: bytes) -> None:
    end = time.monotonic() + DEADLINE_S
    while await it.logged(name) != expected:
        assert time.monotonic() < end, f"{name} is not logged"
        await asyncio.sleep(0.005)


def test_rotation_bounds_the_log_and_a_follower_sees_everything(tmp_path: Path) -> None:
    program = "import sys\nfor n in range(20000): sys.stdout.write(f'line {n}\\n')"
    expected = b"".join(b"line %d\n" % n for n in range(20000))

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            stop = asyncio.Event()
            path = it.log("a")

            async def follow() -> bytes:
                return b"".join([r.data async for r in logs.read(path, follow=True, stop=stop)])

            follower = asyncio.create_task(follow())
            await asyncio.sleep(0)
            # More files than are needed, so that nothing is dropped before it is read.
            await it.run_kept("a", [PYTHON, "-c", program], max_size=100_000, max_file=50)
            await it.exited("a")
            await within(it.keeper.drained("a"))
            stop.set()
            assert await asyncio.wait_for(follower, 60) == expected
            assert await it.logged("a") == expected
            assert os.path.exists(path + ".2")

            await it.run_kept("b", [PYTHON, "-c", program], max_size=100_000, max_file=3)
            await it.exited("b")
            await within(it.keeper.drained("b"))
            left = await it.logged("b")
            assert expected.endswith(left) and 0 < len(left) < len(expected)
            # A portion may exceed the limit by its own 64 KiB of output, encoded.
            assert logs.size_on_disk(it.log("b")) < 3 * (100_000 + 600_000)
            assert not os.path.exists(it.log("b") + ".3")
            last = [r.data async for r in logs.read(it.log("b"), tail=2)]
            assert last == [b"line 19998\n", b"line 19999\n"]

    asyncio.run(main())


def test_output_held_open_by_others_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            rig(tmp_path, keeper=True) as it,
            attached(it, "a") as (out, _, ended),
        ):
            await it.run_kept("a", ["/bin/sh", "-c", "sleep 1000 & echo $!"])
            assert await within(ended) == "exited"
            await within(it.keeper.drained("a"))
            pid = int(await it.logged("a"))
            assert out.data.split() == [str(pid).encode()]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    asyncio.run(main())


def test_no_log_is_kept_when_none_is_wanted(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            rig(tmp_path, keeper=True) as it,
            attached(it, "a") as (out, _, ended),
        ):
            await it.run_kept("a", ["/bin/echo", "x"], driver="none")
            assert await within(ended) == "exited"
            out.close_write()
            await within(out.ended.wait())
            assert out.data == b"x\n"
            assert not os.path.exists(it.log("a"))

    asyncio.run(main())


def test_an_attachment_that_waits_for_a_failed_launch_is_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            task = asyncio.create_task(it.keeper.attach("never", stdout=2))
            await asyncio.sleep(0)
            await it.keeper.drained("other")
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            await within(it.keeper.drained("never"))

    asyncio.run(main())
