"""The holder and its launch programs, for real."""

import asyncio
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bulkhead.boundary.seam import LaunchRequest
from bulkhead.errors import (
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    Invalid,
    LaunchFailed,
    NotFound,
    Unavailable,
)
from bulkhead.home import Home
from bulkhead.keeper.holder import Exit, ensure_holder, holder_pid
from bulkhead.linux.program import Blob, Fd, Len, Patched, Program, Slot
from tests.helpers.processes import (
    AT_FDCWD,
    ENV,
    Rig,
    calls,
    command,
    eventually,
    kill_and_wait,
    rig,
    stdio_steps,
    within,
)

TRUE = ["/bin/true"]
CLONE_NEWPID = 0x20000000
CLONE_NEWUSER = 0x10000000


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def output(it: Rig, identity: str, program: Program, **options: object) -> bytes:
    """What a program prints on descriptor 1, which the request's first descriptor becomes."""
    read, write = os.pipe()
    try:
        await it.launch(identity, program.compile(), [write], **options)  # type: ignore[arg-type]
    finally:
        os.close(write)
    loop = asyncio.get_running_loop()
    with open(read, "rb") as file:
        return await asyncio.wait_for(loop.run_in_executor(None, file.read), 60)


def to_stdout(argv: list[str], candidates: list[str] | None = None) -> Program:
    program = Program()
    program.call("stdout", "dup3", Fd(0), 1, 0)
    program.exec("exec", candidates or [argv[0]], argv, ENV)
    return program


def test_a_process_is_launched_and_its_end_recorded(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            record = str(tmp_path / "record")
            launched = await it.launch("a", command(sh("exit 7")), record=record, meta=b"mm")
            assert launched.pid > 0 and launched.started_ns > 0 and launched.pidfd is not None
            launched.pidfd.close()
            event = await it.exited("a")
            assert event.pid == launched.pid
            assert os.waitstatus_to_exitcode(event.wait_status) == 7
            await eventually(lambda: os.path.exists(record), "the record")
            assert '"wait_status":1792' in Path(record).read_text()
            (entry,) = await it.holder.entries()
            assert (entry.id, entry.running, entry.meta) == ("a", False, b"mm")
            with pytest.raises(Conflict):
                await it.launch("a", command(TRUE))
            await it.holder.forget("a")
            await it.holder.forget("a")  # nothing to forget is fine
            assert await it.holder.entries() == []

    asyncio.run(main())


def test_ends_are_told_to_a_client_that_comes_later(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            await it.launch("a", command(sh("exit 3")))
            await it.exited("a")
            other = await ensure_holder(it.home)
            seen: list[Exit] = []
            other.on_exit(seen.append)
            await eventually(lambda: seen, "the end is told")
            assert os.waitstatus_to_exitcode(seen[0].wait_status) == 3
            assert other.pid == it.holder.pid == holder_pid(it.home)
            await other.close()

    asyncio.run(main())


def test_path_search_and_docker_wording(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x01\x02")
    garbage.chmod(0o755)
    cases = (
        (["/no/foo", "/bin/foo"], "foo", CommandNotFound, '"foo": executable file not found in $P'),
        (["/no/foo"], "/no/foo", CommandNotFound, '"/no/foo": stat /no/foo: no such file or dir'),
        (["/etc/passwd/x"], "/etc/passwd/x", CommandNotFound, "not a directory"),
        (["/etc/passwd"], "/etc/passwd", CommandNotExecutable, '"/etc/passwd": permission denied'),
        (["/etc/passwd", "/no/x"], "x", CommandNotExecutable, "permission denied"),
        (["/etc"], "/etc", CommandNotExecutable, "permission denied"),
        ([str(script)], str(script), CommandNotFound, "interpreter"),
        ([str(garbage)], str(garbage), CommandNotExecutable, "exec format error"),
    )

    async def main() -> None:
        async with rig(tmp_path) as it:
            found = to_stdout(["echo", "hi"], ["/no/echo", "/etc/passwd/echo", "/bin/echo"])
            assert await output(it, "ok", found) == b"hi\n"
            for candidates, name, kind, text in cases:
                program = Program()
                program.exec("exec", candidates, [name], ENV)
                with pytest.raises(kind) as caught:
                    await it.launch("x", program.compile())
                assert text in str(caught.value)
                assert caught.value.step == "exec"

    asyncio.run(main())


def test_a_failing_step_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            program = Program()
            program.call("fine", "getpid")
            program.call("enter nowhere", "chdir", "/no/such/folder")
            program.exec("exec", TRUE, TRUE, ENV)
            with pytest.raises(LaunchFailed) as caught:
                await it.launch("x", program.compile())
            assert (caught.value.step, caught.value.errno) == ("enter nowhere", errno.ENOENT)
            killed = Program()
            pid = killed.call("who", "getpid")
            killed.call("die", "kill", pid, signal.SIGKILL)
            killed.exec("exec", TRUE, TRUE, ENV)
            with pytest.raises(LaunchFailed, match="SIGKILL") as caught:
                await it.launch("x", killed.compile())
            assert caught.value.step in ("die", "exec")
            assert await it.holder.entries() == []

    asyncio.run(main())


def test_steps_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").write_text("")
    folder = str(tmp_path)

    async def main() -> None:
        async with rig(tmp_path) as it:
            program = Program()
            program.write("write", AT_FDCWD, f"{folder}/file", "written")
            one = program.call("one", "openat", AT_FDCWD, f"{folder}/file", os.O_CLOEXEC, 0)
            two = program.call("two", "openat", AT_FDCWD, f"{folder}/file", os.O_CLOEXEC, 0)
            program.same_inode("same", one, two)
            missing = program.call("maybe", "openat", AT_FDCWD, "/no", 0, 0, ok=(errno.ENOENT,))
            with program.when(missing, failed=True):
                program.write("if failed", AT_FDCWD, f"{folder}/other", b"missing")
            with program.when(missing):
                program.fail("never", errno.EPERM)
            # A structure with a pointer and a length: writev's iovec.
            text = Blob(b"by address\n")
            iovec = Patched(bytes(16), ((0, 8, text), (8, 8, Len(text))))
            program.call("stdout", "dup3", Fd(0), 1, 0)
            program.call("writev", "write", 1, text, Len(text))
            box = Blob(bytes(8))
            program.store("store", box, 0, 4, 0x41424344)
            value = program.load("load", box, 1, 1)
            program.store("store back", box, 4, 1, value)
            program.call("show", "write", 1, box, 5)
            assert iovec.stores[1][2] == Len(text)
            program.exec("exec", TRUE, TRUE, ENV)
            assert await output(it, "x", program) == b"by address\nDCBAC"
            assert (tmp_path / "file").read_text() == "written"
            assert (tmp_path / "other").read_text() == "missing"

            kinds: tuple[tuple[str, Callable[[Program, Slot, Slot], None]], ...] = (
                ("differ", lambda p, a, b: p.same_inode("differ", a, b)),
                ("fstype", lambda p, a, b: p.expect_fstype("fstype", a, 0x9FA0)),
                ("fail", lambda p, a, b: p.fail("fail", errno.EXDEV)),
            )
            for step, build in kinds:
                program = Program()
                one = program.call("1", "openat", AT_FDCWD, f"{folder}/file", os.O_CLOEXEC, 0)
                two = program.call("2", "openat", AT_FDCWD, f"{folder}/other", os.O_CLOEXEC, 0)
                build(program, one, two)
                program.exec("exec", TRUE, TRUE, ENV)
                with pytest.raises(LaunchFailed) as caught:
                    await it.launch("y", program.compile())
                assert caught.value.step == step

    asyncio.run(main())


def test_the_child_starts_clean(tmp_path: Path) -> None:
    """Default signals, empty mask, the original limits, no foreign descriptor."""

    async def main() -> None:
        async with rig(tmp_path) as it:
            script = "grep ^Sig /proc/self/status; ulimit -n; ls -l /proc/self/fd"
            text = (await output(it, "x", to_stdout(sh(script)))).decode()
            fields = dict(line.split(":\t") for line in text.splitlines() if line.startswith("Sig"))
            assert int(fields["SigBlk"], 16) == 0
            assert int(fields["SigIgn"], 16) == 0
            assert f"\n{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}\n" in text
            names = [
                line.split(" -> ")[0].split()[-1] for line in text.splitlines() if "->" in line
            ]
            # stdin is none, 3 is ls's own folder; the pipe's other number is close-on-exec.
            assert set(names) <= {"0", "1", "2", "3"}

    asyncio.run(main())


def test_namespaces_maps_and_fork(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            inside = to_stdout(sh("echo $$ $(cat /proc/self/uid_map)"))
            try:
                got = await output(
                    it, "x", inside, flags=CLONE_NEWUSER | CLONE_NEWPID, maps="0 100000 65536\n"
                )
            except LaunchFailed as error:
                pytest.skip(f"this kernel gives no user namespaces: {error}")
            assert got.split() == [b"1", b"0", b"100000", b"65536"]

            sleeper = await it.launch("ns", command(["/bin/sleep", "1000"]), flags=CLONE_NEWPID)
            ns = os.open(f"/proc/{sleeper.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            program = Program()
            program.call("stdout", "dup3", Fd(1), 1, 0)
            program.call("join", "setns", Fd(0), CLONE_NEWPID)
            program.fork("enter")
            program.exec("exec", ["/bin/sh"], sh("echo $$; exit 5"), ENV)
            read, write = os.pipe()
            joined = await it.launch("ns/exec", program.compile(), [ns, write])
            os.close(ns)
            os.close(write)
            event = await it.exited("ns/exec")
            assert event.pid == joined.pid
            assert os.waitstatus_to_exitcode(event.wait_status) == 5
            assert os.read(read, 100) not in (b"", b"1\n", f"{joined.pid}\n".encode())
            os.close(read)

            failing = Program()
            failing.fork("fork")
            failing.call("after", "chdir", "/no")
            failing.exec("exec", TRUE, TRUE, ENV)
            with pytest.raises(LaunchFailed) as caught:
                await it.launch("f", failing.compile())
            assert caught.value.step == "after"
            with pytest.raises(Invalid):
                await it.launch("f", failing.compile(), flags=CLONE_NEWPID)

    asyncio.run(main())


def test_a_gate_holds_one_launch_and_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            gate, opener = os.pipe()
            program = Program()
            program.gate("gate", Fd(0))
            program.exec("exec", TRUE, TRUE, ENV)
            waiting = asyncio.create_task(it.launch("gated", program.compile(), [gate]))
            for n in range(10):
                await it.launch(f"other{n}", command(TRUE))
                await it.exited(f"other{n}")
            assert not waiting.done()
            os.close(opener)
            await within(waiting)
            await it.exited("gated")
            os.close(gate)

            gate, opener = os.pipe()
            waiting = asyncio.create_task(it.launch("killed", program.compile(), [gate]))

            async def kill() -> None:
                while not waiting.done():
                    try:
                        await it.holder.signal("killed", signal.SIGKILL)
                    except NotFound:
                        await asyncio.sleep(0.005)

            await asyncio.gather(kill(), asyncio.wait({waiting}))
            with pytest.raises(LaunchFailed, match="SIGKILL"):
                await waiting
            os.close(gate)
            os.close(opener)

    asyncio.run(main())


def test_long_programs_go_by_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            argv = ["/bin/sh", "-c", "echo ${#1}", "sh", "x" * 100_000]
            assert await output(it, "x", to_stdout(argv)) == b"100000\n"

    asyncio.run(main())


def test_signals_reach_the_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            await it.launch("x", command(["/bin/sleep", "1000"]))
            with pytest.raises(Conflict):
                await it.holder.forget("x")
            with pytest.raises(Conflict):
                await it.holder.shutdown()
            await it.holder.signal("x", signal.SIGTERM)
            event = await it.exited("x")
            assert os.WTERMSIG(event.wait_status) == signal.SIGTERM
            for name in ("x", "unknown"):
                with pytest.raises(NotFound):
                    await it.holder.signal(name, signal.SIGTERM)

    asyncio.run(main())


def test_a_helper_is_started_again_until_dismissed(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            trace = tmp_path / "trace"
            extra = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            argv = ["/bin/sh", "-c", 'echo "$$ $WORD" >&3; exec sleep 1000']
            await it.holder.supervise("h", argv, {"WORD": "up", "PATH": "/bin"}, [extra])
            os.close(extra)
            with pytest.raises(Conflict):
                await it.holder.supervise("h", argv, {})
            for n in range(1, 4):
                await eventually(lambda n=n: trace.read_text().count("up\n") == n, f"start {n}")  # type: ignore[misc]
                pid = int(trace.read_text().split()[-2])
                os.kill(pid, signal.SIGKILL)
            await eventually(lambda: trace.read_text().count("up\n") == 4, "start 4")
            pid = int(trace.read_text().split()[-2])
            await it.holder.dismiss("h")
            await eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the helper ends")
            assert trace.read_text().count("up\n") == 4
            with pytest.raises(NotFound):
                await it.holder.dismiss("h")

    asyncio.run(main())


def test_a_holder_that_nobody_needs_ends(tmp_path: Path) -> None:
    async def main() -> None:
        home = Home(f"{tmp_path}/root", f"{tmp_path}/run")
        client = await ensure_holder(home, idle_s=1)
        pid = client.pid
        await client.close()
        # It is this process's child, and nobody reaps it any more: a zombie is an end.
        await within(asyncio.get_running_loop().run_in_executor(None, os.waitpid, pid, 0))
        assert not os.path.exists(home.in_run("holder.sock"))
        assert holder_pid(home) is None

    asyncio.run(main())


def test_a_killed_holder_is_replaced_and_workloads_live_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            restarts: list[int] = []
            it.holder.on_restart(lambda: restarts.append(it.holder.pid))
            sleeper = await it.launch("sleeper", command(["/bin/sleep", "1000"]))
            first = it.holder.pid
            kill_and_wait(first)
            # The client need not have noticed: what cannot have run is asked of the next holder.
            launched = await it.launch("next", command(sh("exit 4")))
            event = await it.exited("next")
            assert (event.pid, os.waitstatus_to_exitcode(event.wait_status)) == (launched.pid, 4)
            await eventually(lambda: restarts, "the restart is told")
            assert restarts == [it.holder.pid] != [first]
            os.kill(sleeper.pid, 0)
            assert sleeper.pidfd is not None

    asyncio.run(main())


def test_a_holder_killed_under_a_launch_fails_it_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            gate, opener = os.pipe()
            program = Program()
            program.call("mark", "dup3", Fd(1), 1, 0)
            program.call("say", "write", 1, b"here\n", 5)
            program.gate("gate", Fd(0))
            program.exec("exec", TRUE, TRUE, ENV)
            read, write = os.pipe()
            waiting = asyncio.create_task(it.launch("x", program.compile(), [gate, write]))
            await asyncio.sleep(0)
            os.close(write)
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, os.read, read, 10) == b"here\n"
            kill_and_wait(it.holder.pid)
            with pytest.raises(Unavailable):
                await within(waiting)
            # The child that had not come to its exec has died with the holder.
            assert await loop.run_in_executor(None, os.read, read, 10) == b""
            for fd in (gate, opener, read):
                os.close(fd)

    asyncio.run(main())


def test_peers_that_die_or_talk_nonsense_harm_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            compiled = command(TRUE)
            path = it.home.in_run("holder.sock")
            folder = os.open(it.home.run, os.O_PATH)
            path = f"/proc/self/fd/{folder}/holder.sock"
            for n in range(50):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                    sock.connect(path)
                    if n % 2:
                        sock.send(b"x" * n)
                    else:  # a launch whose asker is gone before the answer
                        from bulkhead.keeper.launching import encode_request

                        request = LaunchRequest(
                            id=f"orphan{n}",
                            program=compiled.data,
                            clone_flags=0,
                            fds=(),
                            steps=compiled.steps,
                        )
                        parts, fds, close = encode_request(request)
                        assert not fds and not close
                        head = (2).to_bytes(4, "little") + bytes(12)
                        sock.send(b"".join((head, *parts)))
            os.close(folder)
            # Whether a dead peer's request still runs is open; if so, it runs to its end.
            for entry in await it.holder.entries():
                await it.exited(entry.id)
            await it.launch("x", compiled)
            await it.exited("x")

    asyncio.run(main())


def test_many_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            compiled = command(sh("exit 9"))
            await asyncio.gather(*(it.launch(f"n{n}", compiled) for n in range(100)))
            for n in range(100):
                event = await it.exited(f"n{n}")
                assert os.waitstatus_to_exitcode(event.wait_status) == 9
            assert len(await it.holder.entries()) == 100

    asyncio.run(main())


def test_stdio_and_calls_helpers(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as it:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            await it.launch("a", command(sh("echo x"), stdio_steps), [null, null, null])
            os.close(null)
            event = await it.exited("a")
            assert event.wait_status == 0
            await it.launch("b", command(TRUE, calls(("umask", "umask", (0o22,)))))
            await it.exited("b")

    asyncio.run(main())
