"""The engine: one object that owns everything a daemon of one root needs, and its parts."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bulkhead.home import Home
from bulkhead.state.database import Database

_T = TypeVar("_T")

BOOT_ID = "/proc/sys/kernel/random/boot_id"
THREADS = 4


class Engine:
    """What handlers work with; `bootstrap` fills it, `close` ends it."""

    def __init__(self, home: Home, database: Database) -> None:
        self.home = home
        self.database = database
        self.loop = asyncio.get_running_loop()
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="engine")
        self.started_ns = time.time_ns()
        self.stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[object]] = set()
        with open(BOOT_ID, encoding="ascii") as file:
            self.boot_id = file.read().strip()
        self.pid = os.getpid()

    async def blocking(self, function: Callable[[], _T]) -> _T:
        """Run `function` in a thread: for files, hashing, registries."""
        return await self.loop.run_in_executor(self.pool, function)

    async def open(self) -> None:
        """Start the parts and repair what an earlier engine left."""

    async def close(self) -> None:
        """Stop the parts; workloads run on."""
        self.pool.shutdown(wait=True, cancel_futures=True)
