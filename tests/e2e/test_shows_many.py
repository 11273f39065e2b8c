"""Many idle containers at once, then all removed: 100 here, more with a larger scale."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead import AsyncClient
from tests.helpers.culling import PARTS, pids
from tests.helpers.images import has_busybox
from tests.helpers.installation import Installation, installation
from tests.helpers.residue import residue
from tests.helpers.scale import scaled

COUNT = min(scaled(100), 500)
AT_ONCE = 8


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    with residue(str(tmp_path)), installation(tmp_path) as here:
        here.load_busybox(tmp_path)
        yield here


def available_kib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise AssertionError("no MemAvailable")


def proportional_kib(here: Installation) -> dict[str, int]:
    """What each of our background processes holds, shared pages divided."""
    found: dict[str, int] = {}
    for part in PARTS:
        for pid in pids(here, part):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    found[part] = found.get(part, 0) + int(line.split()[1])
    return found


def test_many_idle_containers(here: Installation) -> None:
    async def main() -> None:
        async with AsyncClient(root=str(here.root), run=str(here.run)) as client:
            gate = asyncio.Semaphore(AT_ONCE)

            async def start(number: int) -> None:
                async with gate:
                    made = await client.containers.create(
                        "busybox", ["sleep", "100000"], name=f"idle-{number}"
                    )
                    await made.start()

            async def remove(number: int) -> None:
                async with gate:
                    found = await client.containers.get(f"idle-{number}")
                    await found.remove(force=True)

            free, begin = available_kib(), time.monotonic()
            await asyncio.gather(*(start(number) for number in range(COUNT)))
            took = time.monotonic() - begin
            used = (free - available_kib()) / COUNT
            print(f"{COUNT} containers in {took:.1f} s: {COUNT / took:.0f} a second")
            print(f"{used:.0f} KiB less memory each; ours, in KiB: {proportional_kib(here)}")
            listed = await client.containers.list()
            assert {name for one in listed for name in one.names} == {
                f"/idle-{number}" for number in range(COUNT)
            }
            for number in range(0, COUNT, max(1, COUNT // 7)):
                found = await client.containers.get(f"idle-{number}")
                done = await found.exec(["hostname"])
                assert done.stdout.decode().strip() == found.id[:12]
            begin = time.monotonic()
            await asyncio.gather(*(remove(number) for number in range(COUNT)))
            took = time.monotonic() - begin
            print(f"all removed in {took:.1f} s: {COUNT / took:.0f} a second")
            assert await client.containers.list(everything=True) == []

    asyncio.run(main())
