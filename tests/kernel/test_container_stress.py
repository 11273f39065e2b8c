"""Many processes at once through one holder: every start is answered, every end is told, once."""

import asyncio
import errno
import random
from collections import Counter
from pathlib import Path

import pytest

from bulkhead.boundary.seam import Stdio
from bulkhead.errors import CommandNotFound, LaunchFailed
from bulkhead.keeper.holder import Exit
from bulkhead.oci.runtime import Process
from tests.helpers.container_lab import Lab, Running, cannot_run
from tests.helpers.residue import residue
from tests.helpers.scale import scaled
from tests.helpers.waiting import DEADLINE_S

SCRIPTS = ("", "true &", "sleep 0.01 & wait;", "read x;")
WHY_NOT = cannot_run()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no containers here: {WHY_NOT}")


async def _execs(running: Running, worker: int, count: int, codes: dict[str, int]) -> None:
    pick = random.Random(worker)
    base = running.container.bundle.spec.process
    assert base is not None
    with open("/dev/null", "r+") as null:
        stdio = Stdio(stdin=null.fileno(), stdout=null.fileno(), stderr=null.fileno())
        for n in range(count):
            name, code = f"w{worker}-{n}", pick.randrange(256)
            script = f"{pick.choice(SCRIPTS)} exit {code}"
            args = pick.choice([["sh", "-c", script], ["true"], ["no-such-program"]])
            codes[name] = code if args[0] == "sh" else 0
            process = Process(
                args=args,
                env=base.env,
                cwd=pick.choice(["/", "/tmp", "/no/such"]),
                capabilities=base.capabilities,
            )
            try:
                launched = await running.container.exec(name, process, stdio)
            except CommandNotFound:
                assert args == ["no-such-program"]
                del codes[name]
            except LaunchFailed as error:
                assert (error.errno, process.cwd) == (errno.ENOENT, "/no/such")
                del codes[name]
            else:
                if launched.pidfd is not None:
                    launched.pidfd.close()
            if not pick.randrange(3):
                await asyncio.sleep(pick.random() / 100)


def test_every_end_of_an_exec_is_told_once(tmp_path: Path) -> None:
    with residue(str(tmp_path)), Lab(tmp_path) as lab:
        running = lab.start(["sleep", "100000"])
        told: Counter[str] = Counter()
        ends: dict[str, int] = {}
        codes: dict[str, int] = {}
        prefix = f"{running.container.bundle.id}/"

        def ended(event: Exit) -> None:
            told[event.id] += 1
            ends[event.id.removeprefix(prefix)] = event.wait_status >> 8

        async def play() -> None:
            lab.holder.on_exit(ended)
            workers = [_execs(running, w, scaled(60), codes) for w in range(8)]
            await asyncio.gather(*workers)
            end = asyncio.get_running_loop().time() + DEADLINE_S
            while missing := codes.keys() - ends.keys():
                assert asyncio.get_running_loop().time() < end, await lab.describe(
                    [prefix + name for name in sorted(missing)]
                )
                await asyncio.sleep(0.01)
            assert {name: ends[name] for name in codes} == codes
            assert all(count == 1 for count in told.values())
            for name in codes:
                await lab.holder.forget(prefix + name)

        lab.do(play())
        running.kill()
