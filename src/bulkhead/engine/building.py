"""Builds in the engine: RUN steps are workloads, roots are overlays of layers.

    RUN/build/        a file system in memory, mounted at the first build: secrets, scripts, and
                      the mount points of bind mounts from stages and images
    ROOT/build/       the cache (build/cache.py)
    ROOT/build/tmp/   writable bind mounts, mount points of steps; emptied at start

A step's workload is marked in its record (`building`): it need not survive a loss of power, is not
taken over by a later engine, and its writable layer is read before it is removed. Builder threads
call this; what belongs to the loop is done there.
"""

import asyncio
import contextlib
import functools
import os
import secrets
import selectors
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.build.cache import Cache
from bulkhead.engine import body, guests, views
from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError, NotFound, Unavailable
from bulkhead.images.catalog import Image
from bulkhead.linux import mounts
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import ContainerConfig, ImageConfig
from bulkhead.store import diff

if TYPE_CHECKING:
    from bulkhead.build.builder import Built
    from bulkhead.build.host import Job, Output
    from bulkhead.build.options import Options
    from bulkhead.build.trees import Digests
    from bulkhead.engine.core import Engine

LABEL = "dev.bulkhead.build"
_HOSTNAME = "build"
_PIECE = 64 << 10


class Building:
    """The engine as builders see it (`build.host.Host`), and the builds that run."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.store = engine.store
        self.images = engine.images
        self.cache = Cache(engine.home.in_root("build"))
        self._digests: Digests | None = None
        self._points: dict[str, str] = {}
        """Lowest layers of steps, by workload."""
        self._mutex = threading.Lock()
        self._memory = engine.home.in_run("build")
        self._disk = engine.home.in_root("build", "tmp")

    # --- life

    async def open(self) -> None:
        """Remove what builds of an earlier engine left."""
        engine = self._engine
        for workload in list(engine.workloads):
            if workload.record.building:
                with contextlib.suppress(BulkheadError):  # nobody comes back for its output
                    await engine.processes.keeper.release(workload.id)
                engine.spawn(self._remove(workload))
        await engine.blocking(self._sweep)

    def _sweep(self) -> None:
        shutil.rmtree(self._disk, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._memory):
                path = f"{self._memory}/{name}"
                with contextlib.suppress(OSError):
                    mounts.unmount(path, mounts.MNT_DETACH)
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Take the file system in memory away."""
        self._sweep()
        with contextlib.suppress(OSError):
            mounts.unmount(self._memory, mounts.MNT_DETACH)
        with contextlib.suppress(OSError):
            os.rmdir(self._memory)

    def held(self) -> set[str]:
        """Digests that garbage collection must keep for the cache."""
        return self.cache.held()

    def build(
        self,
        options: "Options",
        context: int | None,
        sink: Callable[[dict[str, Any]], None],
        begun: Callable[[threading.Event], None],
        outputs: Sequence[int] = (),
    ) -> "Built":
        """Run a build in this thread. `begun` is given what stops it."""
        # Imported now: an engine that never builds does without.
        from bulkhead.build.builder import Builder
        from bulkhead.build.trees import Digests

        if self._digests is None:
            self._digests = Digests()
        os.makedirs(self._disk, mode=0o700, exist_ok=True)
        builder = Builder(self, self.cache, self._digests, options, self._disk, sink)
        begun(builder.stop)
        return builder.run(context, outputs)

    # --- roots

    @contextlib.contextmanager
    def root(self, layers: Sequence[str]) -> Iterator[int]:
        """See `Host`."""
        with views.overlay(self._engine.layers.lowers(layers), None, None) as root:
            yield int(root)

    @contextlib.contextmanager
    def place(self, layers: Sequence[str], *, writable: bool) -> Iterator[str]:
        """See `Host`."""
        lowers = self._engine.layers.lowers(layers)
        if not lowers:
            with self.scratch() as folder:
                yield folder
            return
        if len(lowers) == 1 and not writable:
            yield lowers[0]
            return
        with contextlib.ExitStack() as undo:
            upper = work = None
            if writable:
                folder = self._fresh(self._disk)
                undo.callback(shutil.rmtree, folder, ignore_errors=True)
                upper, work = f"{folder}/upper", f"{folder}/work"
                os.mkdir(upper)
                os.mkdir(work)
            place = self._fresh(self._in_memory())
            undo.callback(os.rmdir, place)
            with views.overlay(lowers, upper, work) as root:
                mounts.attach(int(root), place)
            undo.callback(mounts.unmount, place, mounts.MNT_DETACH)
            yield place

    @contextlib.contextmanager
    def scratch(self) -> Iterator[str]:
        """See `Host`."""
        folder = self._fresh(self._in_memory())
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _fresh(parent: str) -> str:
        folder = f"{parent}/{secrets.token_hex(8)}"
        os.makedirs(folder, mode=0o755)
        return folder

    def _in_memory(self) -> str:
        with self._mutex:
            os.makedirs(self._memory, mode=0o700, exist_ok=True)
            if not os.path.ismount(self._memory):
                attributes = mounts.ATTR_NOSUID | mounts.ATTR_NODEV
                with mounts.new_filesystem("tmpfs", [("mode", "0700")], attributes) as mounted:
                    mounts.attach(int(mounted), self._memory)
        return self._memory

    # --- steps

    def points(self, identity: str) -> tuple[str, ...]:
        """The lowest layer of a step's root: its mount points, so that none is left behind."""
        found = self._points.get(identity)
        return (found,) if found is not None else ()

    def run(
        self,
        job: "Job",
        output: "Output",
        stop: threading.Event,
        keep: Callable[[Iterator[bytes]], None],
    ) -> int:
        """See `Host`."""
        engine = self._engine
        with contextlib.ExitStack() as undo:
            points = self._fresh(self._disk)
            undo.callback(shutil.rmtree, points, ignore_errors=True)
            for bind in job.binds:
                _stub(points, bind.target, directory=not bind.source or os.path.isdir(bind.source))
            out, err = _Pipe(), _Pipe()
            undo.callback(out.close)
            undo.callback(err.close)
            holder: list[Workload] = []
            undo.callback(self._discard, holder)
            running = asyncio.run_coroutine_threadsafe(
                self._start(job, points, out, err, holder, stop), engine.loop
            )
            self._pump(out, err, output, stop, holder)
            try:
                code = running.result()
            except CancelledError as error:
                raise Unavailable("the engine is going down") from error
            if stop.is_set():
                raise Unavailable("the build was canceled")
            if not code:
                self._keep(job, holder[0], keep)
            return code

    async def _start(
        self,
        job: "Job",
        points: str,
        out: "_Pipe",
        err: "_Pipe",
        holder: list[Workload],
        stop: threading.Event,
    ) -> int:
        from bulkhead.engine import creation

        engine = self._engine
        try:
            workload, _ = creation.create(
                engine, "", _body(job), job.boundary, started_at_once=True, step_of=_image(job)
            )
            holder.append(workload)
            workload.private = job.private
            if job.binds:
                self._points[workload.id] = points
            async with engine.processes.keeper.attaching(
                workload.id, stdout=out.write, stderr=err.write, returns=False
            ) as attached:
                workload.attachment = attached
                await engine.lifecycle.start(workload)
                if stop.is_set():  # set while there was nothing to kill yet
                    self._kill(workload)
                out.shut()
                err.shut()
                await attached
            await asyncio.shield(workload.ended)
            await workload.cleaned.wait()
            return workload.record.exit_code
        finally:
            out.shut()
            err.shut()
            engine.tend_networks()

    def _pump(
        self,
        out: "_Pipe",
        err: "_Pipe",
        output: "Output",
        stop: threading.Event,
        holder: list[Workload],
    ) -> None:
        """Hand on what the step writes until it has ended."""
        killed = False
        with selectors.DefaultSelector() as selector:
            for number, pipe in ((1, out), (2, err)):
                selector.register(pipe.read, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select(0.2):
                    data = os.read(key.fd, _PIECE)
                    if not data:
                        selector.unregister(key.fd)
                    elif not stop.is_set():
                        try:
                            output(key.data, data)
                        except BulkheadError:
                            stop.set()
                if stop.is_set() and not killed and holder:
                    killed = True
                    self._engine.loop.call_soon_threadsafe(self._kill, holder[0])

    def _kill(self, workload: Workload) -> None:
        async def kill() -> None:
            with contextlib.suppress(BulkheadError):
                await self._engine.control.kill(workload, "KILL")

        self._engine.spawn(kill())

    def _keep(
        self, job: "Job", workload: Workload, keep: Callable[[Iterator[bytes]], None]
    ) -> None:
        """Hand its writable layer over."""
        engine, record = self._engine, workload.record
        if guests.has_disk(record):
            from bulkhead.build import squash
            from bulkhead.engine import guest_files

            targets = [bind.target for bind in job.binds]

            def make(layer: Iterator[bytes]) -> Any:
                keep(squash.tidied(layer, self._disk, targets, job.latest_ns))

            asyncio.run_coroutine_threadsafe(
                guest_files.commit(engine, workload, make, pause=False), engine.loop
            ).result()
            return
        upper = f"{engine.home.workload(record.id)}/upper"
        _unstub(upper, [bind.target for bind in job.binds])
        if job.latest_ns is not None:
            _clamp(upper, job.latest_ns)
        keep(diff.tar_upper(upper))

    def _discard(self, holder: list[Workload]) -> None:
        for workload in holder:
            remove = functools.partial(self._begin_removal, workload)
            self._engine.loop.call_soon_threadsafe(remove)

    def _begin_removal(self, workload: Workload) -> None:
        self._points.pop(workload.id, None)
        if not self._engine.closing:
            self._engine.spawn(self._remove(workload))

    async def _remove(self, workload: Workload) -> None:
        with contextlib.suppress(NotFound):
            await self._engine.removal.remove(workload, force=True, volumes=True)


class _Pipe:
    """Both ends of a pipe."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_CLOEXEC)

    def shut(self) -> None:
        """Close the writing end; the keeper has its own."""
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def close(self) -> None:
        """Close both."""
        self.shut()
        os.close(self.read)


def _image(job: "Job") -> Image:
    """The image that a step's workload is made of; nobody else ever sees it."""
    config = ImageConfig(config=ContainerConfig())
    if job.platform:
        platform = platforms.parse(job.platform)
        config.architecture, config.os = platform.architecture, platform.os
        config.variant = platform.variant
    return Image(job.image, config, tuple(job.layers), (), "", 0, "")


def _body(job: "Job") -> body.CreateBody:
    """The request for a step's workload."""
    host: dict[str, Any] = {
        **job.limits,
        "LogConfig": {"Type": "none"},
        "NetworkMode": job.network or "default",
        "Privileged": job.privileged,
        "Mounts": [
            {"Type": "bind", "Source": bind.source, "Target": bind.target,
             "ReadOnly": bind.readonly}
            for bind in job.binds
            if bind.source
        ],
        "Tmpfs": {bind.target: bind.tmpfs for bind in job.binds if not bind.source},
    }  # fmt: skip
    found: body.CreateBody = msgspec.convert(
        {
            "Image": job.image or "scratch",
            "Hostname": "" if job.network.startswith(("host", "container:")) else _HOSTNAME,
            "Entrypoint": [],
            "Cmd": list(job.args),
            "Env": list(job.env),
            "User": job.user,
            "WorkingDir": job.directory,
            "Labels": {LABEL: "1"},
            "HostConfig": host,
        },
        body.CreateBody,
    )
    return found


def _stub(root: str, target: str, *, directory: bool) -> None:
    """An empty file or directory at `target` below `root`."""
    path = f"{root}{target}"
    os.makedirs(path if directory else os.path.dirname(path), mode=0o755, exist_ok=True)
    if not directory and not os.path.lexists(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


def _unstub(upper: str, targets: Sequence[str]) -> None:
    """Remove mount points that had to be made in the writable layer itself.

    That is so where the image hides our lowest layer: below a link, or an opaque directory. What
    is mounted on is empty; a directory of the image's that was only copied up stays.
    """
    for target in targets:
        path = os.path.realpath(f"{upper}{target}")
        if path != f"{os.path.realpath(upper)}{target}":
            continue
        with contextlib.suppress(OSError):
            if os.path.isdir(path):
                os.rmdir(path)
            elif not os.lstat(path).st_size:
                os.unlink(path)


def _clamp(upper: str, latest_ns: int) -> None:
    """No time below `upper` is later than `latest_ns`."""
    for folder, folders, names, fd in os.fwalk(upper, follow_symlinks=False):
        del folder
        for name in (*folders, *names):
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if info.st_mtime_ns > latest_ns:
                os.utime(name, ns=(latest_ns, latest_ns), dir_fd=fd, follow_symlinks=False)
