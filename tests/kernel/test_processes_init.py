"""`--init`: signals, orphans, exit codes, the terminal."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from bulkhead.keeper.holder import program_path
from tests.helpers.processes import DEADLINE_S, PYTHON, command, eventually, rig, stdio_steps

CLONE_NEWPID = 0x20000000

# Leaves an orphan that ends at once, tells when that was reaped (by process 1), then waits.
ORPHANS = """
import os, signal, sys, time
def ended(*_):
    os.write(1, b'got it\\n')
    os._exit(9)
signal.signal(signal.SIGUSR1, ended)
read, write = os.pipe()
if not os.fork():
    if not os.fork():
        os.write(write, str(os.getpid()).encode())
        os._exit(0)
    os._exit(0)
os.wait()
orphan = int(os.read(read, 20))
while True:
    try:
        os.kill(orphan, 0)
    except ProcessLookupError:
        break
    time.sleep(0.01)
os.write(1, b'reaped %d\\n' % os.getppid())  # print is not reentrant: the signal may come in it
while True:
    signal.pause()
"""


@pytest.mark.parametrize("tty", [False, True])
def test_signals_are_forwarded_and_orphans_reaped(tmp_path: Path, tty: bool) -> None:
    init = program_path("bulkhead-init")

    async def main() -> None:
        async with rig(tmp_path, keeper=True) as it:
            argv = [init, PYTHON, "-I", "-S", "-c", ORPHANS]
            read, write = os.pipe()
            if tty:
                await it.run_kept("a", argv, tty=True)
            else:
                null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
                compiled = command(argv, stdio_steps)
                await it.launch("a", compiled, [null, write, write], flags=CLONE_NEWPID)
                os.close(null)
                loop = asyncio.get_running_loop()
                assert await loop.run_in_executor(None, os.read, read, 100) == b"reaped 1\n"
            if tty:
                # Without a PID namespace the orphan falls to the holder, which reaps as well.
                async with asyncio.timeout(DEADLINE_S):
                    while b"reaped" not in await it.logged("a"):
                        await asyncio.sleep(0.01)
            await it.holder.signal("a", signal.SIGUSR1)
            event = await it.exited("a")
            assert os.waitstatus_to_exitcode(event.wait_status) == 9
            os.close(read)
            os.close(write)

    asyncio.run(main())


def test_exit_codes(tmp_path: Path) -> None:
    init = program_path("bulkhead-init")
    cases = (
        ([init, "/bin/sh", "-c", "exit 5"], 5),
        ([init, "/bin/sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        ([init, "/no/such/program"], 127),
        ([init, "/etc/passwd"], 126),
        ([init], 2),
    )

    async def main() -> None:
        async with rig(tmp_path) as it:
            for n, (argv, code) in enumerate(cases):
                await it.launch(f"n{n}", command(argv))
                event = await it.exited(f"n{n}")
                assert os.waitstatus_to_exitcode(event.wait_status) == code, argv
            await eventually(lambda: len(it.exits) == len(cases), "all ends")

    asyncio.run(main())
