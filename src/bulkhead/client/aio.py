"""The asynchronous SDK: `from bulkhead import AsyncClient`, the surface of `client.sdk.Client`.

Requests run on threads of a small pool of their own, one each, since they are blocking exchanges on
Unix sockets; the loop never waits. Iterators (`logs`, `events`) become asynchronous ones. A
cancelled stream's request is cancelled in the engine.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from bulkhead.client.models import (
    ContainerInfo,
    ContainerSummary,
    Event,
    ImageInfo,
    ImageSummary,
    Moved,
    NetworkInfo,
    Outcome,
    VolumeInfo,
)
from bulkhead.client.sdk import Client, Command, Container, Names, Progress
from bulkhead.client.spec import Options
from bulkhead.errors import NotFound

T = TypeVar("T")
_END = object()


class AsyncClient:
    """`Client` with coroutines; use `async with`."""

    def __init__(
        self,
        *,
        root: str | None = None,
        run: str | None = None,
        start_engine: bool = True,
        concurrency: int = 32,
    ) -> None:
        self.sync = Client(root=root, run=run, start_engine=start_engine)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="bulkhead")
        self.containers = AsyncContainers(self)
        self.images = AsyncImages(self)
        self.networks = AsyncNetworks(self)
        self.volumes = AsyncVolumes(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        await self.close()

    async def close(self) -> None:
        """Wait for requests under way, then close."""
        await asyncio.to_thread(self._pool.shutdown)
        self.sync.close()

    async def do(self, act: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """`act` on a thread of the pool."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._pool, functools.partial(act, *arguments, **keywords)
        )

    async def iterate(self, make: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
        """The items of a blocking iterator."""
        items = make()
        try:
            while True:
                item = await self.do(next, items, _END)
                if item is _END:
                    return
                yield item
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                await asyncio.shield(self.do(close))

    async def ping(self) -> bool:
        """Whether the engine answers."""
        return await self.do(self.sync.ping)

    async def version(self) -> dict[str, Any]:
        """The engine's version, in the Engine API's shape."""
        return await self.do(self.sync.version)

    async def info(self) -> dict[str, Any]:
        """The engine and its host, in the Engine API's shape."""
        return await self.do(self.sync.info)

    def events(
        self,
        *,
        since: str = "",
        until: str = "",
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> AsyncIterator[Event]:
        """What happens, from `since` (Unix seconds) to `until`, or for ever."""
        return self.iterate(lambda: self.sync.events(since=since, until=until, filters=filters))

    async def run(
        self,
        image: str,
        command: Command | None = None,
        *,
        stdin: bytes | None = None,
        pull: bool = True,
        **options: Unpack[Options],
    ) -> Outcome:
        """Run to the end and remove: exit code and output."""
        return await self.do(self.sync.run, image, command, stdin=stdin, pull=pull, **options)

    async def start(
        self, image: str, command: Command | None = None, *, pull: bool = True,
        remove: bool = False, **options: Unpack[Options],
    ) -> "AsyncContainer":  # fmt: skip
        """Create and start in the background; `async with` it to have it removed afterwards."""
        made = await self.do(self.sync.start, image, command, pull=pull, remove=remove, **options)
        return AsyncContainer(self, made)

    async def prune(self) -> int:
        """Remove stopped containers, unused networks and dangling images; bytes freed."""
        return await self.do(self.sync.prune)


class AsyncContainer:
    """`Container` with coroutines; leaving an `async with` block removes it, by force."""

    def __init__(self, client: AsyncClient, container: Container) -> None:
        self._client = client
        self.sync = container
        self.id = container.id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            await self.remove(force=True, volumes=True)
        except NotFound:
            return

    async def start(self) -> None:
        """Start it."""
        await self._client.do(self.sync.start)

    async def wait(self, condition: str = "not-running") -> int | None:
        """Until it has ended; its exit code."""
        return await self._client.do(self.sync.wait, condition)

    async def stop(self, *, timeout_s: float | None = None, signal: str | None = None) -> None:
        """Ask it to end, and kill it after `timeout_s`."""
        await self._client.do(self.sync.stop, timeout_s=timeout_s, signal=signal)

    async def restart(self, *, timeout_s: float | None = None) -> None:
        """Stop and start."""
        await self._client.do(self.sync.restart, timeout_s=timeout_s)

    async def kill(self, signal: str = "SIGKILL") -> None:
        """Send a signal to its first process."""
        await self._client.do(self.sync.kill, signal)

    async def pause(self) -> None:
        """Freeze every process."""
        await self._client.do(self.sync.pause)

    async def unpause(self) -> None:
        """Thaw them."""
        await self._client.do(self.sync.unpause)

    async def rename(self, name: str) -> None:
        """Give it another name."""
        await self._client.do(self.sync.rename, name)

    async def move(
        self, to: str, *, kernel: str = "", timeout_s: float = 60.0, drain_s: float = 10.0,
        stop_first: bool = False,
    ) -> Moved:  # fmt: skip
        """Put it behind another boundary; it has another `id` then."""
        found = await self._client.do(
            self.sync.move, to, kernel=kernel, timeout_s=timeout_s, drain_s=drain_s,
            stop_first=stop_first,
        )  # fmt: skip
        self.id = found.id
        return found

    async def remove(self, *, force: bool = False, volumes: bool = False) -> None:
        """Remove it; a running one only by `force`."""
        await self._client.do(self.sync.remove, force=force, volumes=volumes)

    async def inspect(self) -> ContainerInfo:
        """What the engine knows of it now."""
        return await self._client.do(self.sync.inspect)

    async def explain(self) -> dict[str, Any]:
        """What the kernel knows of it now."""
        return await self._client.do(self.sync.explain)

    async def stats(self) -> dict[str, Any]:
        """One sample of its usage."""
        return await self._client.do(self.sync.stats)

    def logs(
        self, *, follow: bool = False, tail: int | None = None, stdout: bool = True,
        stderr: bool = True, timestamps: bool = False,
    ) -> AsyncIterator[tuple[int, bytes]]:  # fmt: skip
        """Its output as (1 or 2, bytes); with `follow` until it ends."""
        return self._client.iterate(
            lambda: self.sync.logs(
                follow=follow, tail=tail, stdout=stdout, stderr=stderr, timestamps=timestamps
            )
        )

    async def exec(
        self, command: Command, *, stdin: bytes | None = None, user: str = "",
        working_dir: str = "", environment: Mapping[str, str] | None = None,
        privileged: bool = False,
    ) -> Outcome:  # fmt: skip
        """Run one more process inside, to its end; exit code and output."""
        return await self._client.do(
            self.sync.exec, command, stdin=stdin, user=user, working_dir=working_dir,
            environment=environment, privileged=privileged,
        )  # fmt: skip

    async def put(self, name: str, data: bytes, directory: str, *, mode: int = 0o644) -> None:
        """Write one file into a directory inside."""
        await self._client.do(self.sync.put, name, data, directory, mode=mode)

    async def get(self, path: str) -> bytes:
        """The content of one regular file inside."""
        return await self._client.do(self.sync.get, path)

    async def put_archive(self, data: bytes, directory: str) -> None:
        """Unpack a tar archive into a directory inside."""
        await self._client.do(self.sync.put_archive, data, directory)

    async def get_archive(self, path: str) -> bytes:
        """A file, or a directory with all below it, as a tar archive."""
        return await self._client.do(self.sync.get_archive, path)

    async def commit(self, repository: str = "", tag: str = "", *, message: str = "") -> str:
        """An image of its changes; the image's id."""
        return await self._client.do(self.sync.commit, repository, tag, message=message)


class _Part:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client


class AsyncContainers(_Part):
    """`client.containers`."""

    async def create(
        self, image: str, command: Command | None = None, **options: Unpack[Options]
    ) -> AsyncContainer:
        """Create without starting."""
        part = self._client.sync.containers
        return AsyncContainer(
            self._client, await self._client.do(part.create, image, command, **options)
        )

    async def get(self, name: str) -> AsyncContainer:
        """The container called so, or with an id that begins so."""
        part = self._client.sync.containers
        return AsyncContainer(self._client, await self._client.do(part.get, name))

    async def list(
        self,
        *,
        everything: bool = False,
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> list[ContainerSummary]:
        """Running containers, or `everything`."""
        part = self._client.sync.containers
        return await self._client.do(part.list, everything=everything, filters=filters)


class AsyncImages(_Part):
    """`client.images`."""

    async def pull(
        self, name: str, *, platform: str = "", auth: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Download."""
        part = self._client.sync.images
        return await self._client.do(
            part.pull, name, platform=platform, auth=auth, progress=progress
        )

    async def push(
        self, name: str, *, auth: Mapping[str, str] | None = None, progress: Progress | None = None
    ) -> None:
        """Upload."""
        await self._client.do(self._client.sync.images.push, name, auth=auth, progress=progress)

    async def get(self, name: str) -> ImageInfo:
        """The image called so."""
        return await self._client.do(self._client.sync.images.get, name)

    async def list(
        self, *, filters: Mapping[str, Sequence[str]] | None = None
    ) -> list[ImageSummary]:
        """The images that are here."""
        return await self._client.do(self._client.sync.images.list, filters=filters)

    async def tag(self, source: str, target: str) -> None:
        """Give an image one more name."""
        await self._client.do(self._client.sync.images.tag, source, target)

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a name, and the image with its last one."""
        await self._client.do(self._client.sync.images.remove, name, force=force)

    async def load(self, path: str, *, progress: Progress | None = None) -> Names:
        """Load an archive; the names of what it held."""
        return await self._client.do(self._client.sync.images.load, path, progress=progress)

    async def save(self, names: Sequence[str], path: str) -> None:
        """Write images to a new archive."""
        await self._client.do(self._client.sync.images.save, names, path)

    async def bootstrap(
        self, name: str, *, include: Sequence[str] = (), mirror: str = "",
        progress: Progress | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Make a minimal image of a distribution's packages."""
        part = self._client.sync.images
        return await self._client.do(
            part.bootstrap, name, include=include, mirror=mirror, progress=progress
        )


class AsyncNetworks(_Part):
    """`client.networks`."""

    async def create(
        self, name: str, *, driver: str = "bridge", internal: bool = False, subnet: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> NetworkInfo:  # fmt: skip
        """Create a network."""
        part = self._client.sync.networks
        return await self._client.do(
            part.create, name, driver=driver, internal=internal, subnet=subnet, labels=labels
        )

    async def get(self, name: str) -> NetworkInfo:
        """The network called so."""
        return await self._client.do(self._client.sync.networks.get, name)

    async def list(self) -> list[NetworkInfo]:
        """All networks."""
        return await self._client.do(self._client.sync.networks.list)

    async def remove(self, name: str) -> None:
        """Remove it."""
        await self._client.do(self._client.sync.networks.remove, name)

    async def connect(self, network: str, container: str, *, aliases: Sequence[str] = ()) -> None:
        """Connect a container, running or not."""
        part = self._client.sync.networks
        await self._client.do(part.connect, network, container, aliases=aliases)

    async def disconnect(self, network: str, container: str, *, force: bool = False) -> None:
        """Disconnect it."""
        part = self._client.sync.networks
        await self._client.do(part.disconnect, network, container, force=force)


class AsyncVolumes(_Part):
    """`client.volumes`."""

    async def create(
        self, name: str = "", *, labels: Mapping[str, str] | None = None
    ) -> VolumeInfo:
        """Create a volume."""
        return await self._client.do(self._client.sync.volumes.create, name, labels=labels)

    async def get(self, name: str) -> VolumeInfo:
        """The volume called so."""
        return await self._client.do(self._client.sync.volumes.get, name)

    async def list(self) -> list[VolumeInfo]:
        """All volumes."""
        return await self._client.do(self._client.sync.volumes.list)

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it."""
        await self._client.do(self._client.sync.volumes.remove, name, force=force)
