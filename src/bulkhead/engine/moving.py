"""`move`: the same workload behind another boundary.

A *twin* is made: the same configuration, image and volumes behind the other boundary. It takes over
the name, the addresses and the published ports (network/handover.py). Two ways:

ready first    without writable volumes and with a health check: the twin starts and becomes healthy
               on cables that hang on nothing yet; new connections are held, those there are may
               end, and the two change places.
stopped first  otherwise: new connections are held, the old one stops (one kernel at a time writes a
               volume), the twin starts, and takes its place once it answers.

Every step registers what undoes it: after a failure the old one runs as before. From the exchange
of the names on the twin is the workload, whatever happens; an engine that begins reads from the
records (`Record.moving`) which it was.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from bulkhead.boundary import registry
from bulkhead.engine import body, creation, guests, probes, transfer
from bulkhead.engine.launching import Start
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import MountPoint, Record, Workload
from bulkhead.errors import (
    BulkheadError,
    CommandNotFound,
    Conflict,
    Invalid,
    NotFound,
    Unavailable,
    Unsupported,
)
from bulkhead.images.catalog import Image
from bulkhead.network.model import AttachRequest, EndpointRequest
from bulkhead.store import diff

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine
    from bulkhead.network.handover import Handover

log = logging.getLogger("bulkhead.engine")
_QUIET_S = 0.5
_TRIAL_S = 180.0
_LOOK_S = 0.02
_PROBE_S, _PROBE_MOST_S = 0.1, 1.0
_PROBE_LIMIT_S = 30.0
_LISTEN = 10
_SIZE = ("memory", "nano_cpus", "cpu_quota", "cpu_period", "cpuset_cpus", "storage_opt")
"""Members of a HostConfig that decide how large a guest is."""
_OPEN = frozenset({1, 3, 4, 8, 9, 11})
"""States of a connection (net/tcp_states.h) in which either side may still send."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for; seconds."""

    to: str
    kernel: str
    timeout_s: float
    drain_s: float
    stop_first: bool


@dataclass(slots=True)
class Moved:
    """The outcome. `gap_s`: nobody answered; `held_s`: new connections waited."""

    workload: Workload
    way: str
    gap_s: float = 0.0
    held_s: float = 0.0
    cut: bool = False
    """Connections were open when the time for them to end was over."""


async def move(engine: "Engine", workload: Workload, wish: Wish, say: Say) -> Moved:
    """Do it; goes on when the caller is cancelled: a move is never half done."""
    _check(engine, workload, wish)
    before = workload.record.moving
    workload.record.moving = "to"
    task = engine.spawn(_Move(engine, workload, wish, say).run(before))
    return await engine.shielded(task)


def _check(engine: "Engine", workload: Workload, wish: Wish) -> None:
    record = workload.record
    if record.vm is not None or record.boundary == "vm" or wish.to == "vm":
        raise Unsupported(f"{record.name}: whole machines are not moved: bulkhead vm export")
    if record.boundary == wish.to and record.kernel == wish.kernel:
        raise Invalid(f"{record.name} is behind the boundary {wish.to} already")
    if record.moving:
        raise Conflict(f"{record.name} is being moved already")
    if record.building or record.removing:
        raise Conflict(f"{record.name} is being removed")
    if record.status in ("paused", "restarting"):
        raise Conflict(f"{record.name} is {record.status}: unpause or stop it, then move it")
    users = [
        other.record.name
        for other in engine.workloads
        for mode in ("network_mode", "pid_mode", "ipc_mode")
        if getattr(other.record.host, mode) == f"container:{record.id}"
    ]
    if users:
        raise Conflict(f"{record.name} shares namespaces with {users[0]}, which cannot move along")


def writes(record: Record) -> bool:
    """Whether it has a volume or folder that it can write to."""
    return any(point.rw for point in record.mounts if point.type_ in ("volume", "bind"))


def checked(record: Record) -> bool:
    """Whether it says itself when it is ready."""
    check = record.config.healthcheck
    return check is not None and bool(check.test) and (check.test or [""])[0] != "NONE"


class _Move:
    """One move."""

    def __init__(self, engine: "Engine", workload: Workload, wish: Wish, say: Say) -> None:
        self._engine = engine
        self._old = workload
        self._wish = wish
        self._say = say
        self._ports: list[str] = []
        """Where the old one listens."""
        self._stopped_ns = 0
        self._held_ns = 0
        self._cut = False

    async def run(self, before: str) -> Moved:
        """All of it."""
        old, engine = self._old, self._engine
        first = checked(old.record) and not writes(old.record) and not self._wish.stop_first
        handover: Handover | None = None
        async with contextlib.AsyncExitStack() as back:
            back.callback(self._marked, old, before)
            old.keep = True
            back.callback(setattr, old, "keep", False)
            if not old.running:
                way = "stopped"
                twin = await self._twin(back, await self._image(back))
                self._exchange_names(twin, back)
            else:
                handovers = engine.networks.handovers
                handover = handovers.begin(old.id)
                back.callback(handovers.end, handover)
                self._ports = await self._listening()
                way = "ready first" if first else "stopped first"
                twin = await (self._ready_first(back) if first else self._stopped_first(back))
            back.pop_all()
        now = time.monotonic_ns()
        moved = Moved(twin, way, cut=self._cut)
        if self._held_ns:
            moved.held_s = (now - self._held_ns) / 1e9
        if self._stopped_ns:
            moved.gap_s = (now - self._stopped_ns) / 1e9
        await self._finish(twin, handover)
        engine.events.emit("container", "move", twin.id, attributes(
            twin, moved=old.id, origin=old.record.boundary, boundary=twin.record.boundary,
        ))  # fmt: skip
        return moved

    def _marked(self, workload: Workload, how: str) -> None:
        workload.record.moving = how
        if not how:
            workload.record.places = {}
        self._engine.workloads.save(workload)

    # --- two ways

    async def _ready_first(self, back: contextlib.AsyncExitStack) -> Workload:
        old, engine = self._old, self._engine
        handovers = engine.networks.handovers
        twin = await self._twin(back, await self._image(back))
        self._say("starting behind the new boundary")
        await self._started(twin)
        self._held_ns = time.monotonic_ns()
        handovers.hold(old.id)
        back.callback(handovers.lift, old.id)
        self._say("waiting for open connections")
        self._cut = not await self._drained()
        if not twin.running:
            raise Unavailable(f"the new one has ended: {self._last_words(twin)}")
        self._switch(twin, back)
        return twin

    async def _stopped_first(self, back: contextlib.AsyncExitStack) -> Workload:
        old, engine = self._old, self._engine
        handovers = engine.networks.handovers
        inside = guests.has_disk(old.record)
        endpoints = handovers.inherited(engine.attach_request(old), old.id).endpoints
        old.record.places = dict(endpoints)
        back.push_async_callback(self._again)
        image = await self._image(back) if inside else None
        twin = await self._twin(back, image)
        if self._wish.to in registry.GUESTS:
            self._say("trying the new boundary")
            await self._rehearsed(twin)
        self._held_ns = time.monotonic_ns()
        handovers.hold(old.id)
        back.callback(handovers.lift, old.id)
        self._say("waiting for open connections")
        self._cut = not await self._drained()
        self._marked(old, f"to {twin.id}")
        handovers.detain(old.id)
        self._say("stopping")
        self._stopped_ns = time.monotonic_ns()
        await engine.control.stop(old, "", None)
        if not inside:
            self._takes(twin, await self._image(back))
        self._say("starting behind the new boundary")
        await self._started(twin)
        self._switch(twin, back)
        return twin

    async def _again(self) -> None:
        """The old one runs again."""
        old, engine = self._old, self._engine
        let_go = engine.networks.handovers.let_go(old.id)
        if old.running:  # it did not come to stopping it
            return
        if let_go:
            engine.networks.release(old.id)
        self._say("going back")
        old.attaching = _fixed(old.record.places)
        try:
            await engine.lifecycle.start(old, Start())
        except BulkheadError:
            log.exception("%s could not be started again after a failed move", old.record.name)
        finally:
            old.attaching = None

    # --- the twin

    async def _twin(self, back: contextlib.AsyncExitStack, image: Image | None) -> Workload:
        """The record of the twin; nothing runs yet."""
        engine, old = self._engine, self._old.record
        config, host = transfer.portable(old)
        config.volumes, config.hostname = None, old.config.hostname
        if config.labels and creation.BOUNDARY_LABEL in config.labels:
            config.labels = {**config.labels, creation.BOUNDARY_LABEL: self._wish.to}
        points = [point for point in old.mounts if point.type_ != "tmpfs"]
        listed = [transfer.mount(point) for point in points]
        for made, point in zip(listed, points, strict=True):
            made.source = point.name or point.source
        kept = [one for one in old.host.mounts or () if one.type_ == "tmpfs"]
        host.mounts = [*kept, *listed] or None
        request = body.CreateBody(
            **{name: getattr(config, name) for name in body.Config.__struct_fields__},
            host_config=host,
            networking_config=body.NetworkingConfig(endpoints_config={**transfer.networks(old)}),
        )
        request.image = image.id if image is not None else old.image_id
        name = f"{old.name[:100]}-moving-{os.urandom(4).hex()}"
        twin, _ = creation.create(engine, name, request, self._wish.to, self._wish.kernel)
        back.push_async_callback(self._dismiss, twin)
        record = twin.record
        record.image = old.image
        record.config.volumes = old.config.volumes
        record.mounts = [
            MountPoint(**{f: getattr(point, f) for f in MountPoint.__struct_fields__})
            for point in old.mounts
        ]
        record.restart_count = old.restart_count
        twin.keep = True
        twin.attaching = lambda request: engine.networks.handovers.inherited(request, self._old.id)
        self._marked(twin, f"from {old.id}")
        return twin

    async def _dismiss(self, twin: Workload) -> None:
        with contextlib.suppress(NotFound):
            await self._engine.removal.remove(twin, force=True, volumes=False)

    async def _rehearsed(self, twin: Workload) -> None:
        """Start something as large as the twin that ends at once, before anything is stopped.

        It shows that the boundary works here, and leaves ready what its first start has to make.
        """
        engine, record = self._engine, twin.record
        size = {name: getattr(record.host, name) for name in _SIZE}
        request = body.CreateBody(
            cmd=["true"], entrypoint=[""], host_config=body.HostConfig(network_mode="none", **size)
        )
        request.image = record.image_id
        name = f"{record.name}-trial"
        trial, _ = creation.create(engine, name, request, self._wish.to, self._wish.kernel)
        try:
            self._marked(trial, f"from {self._old.id}")
            try:
                await engine.lifecycle.start(trial, Start())
                await asyncio.wait_for(asyncio.shield(trial.ended), _TRIAL_S)
            except CommandNotFound:
                return  # an image without true(1); the boundary got as far as looking for it
            except TimeoutError:
                raise Unavailable(f"the boundary {self._wish.to} does not come up here") from None
        finally:
            await self._dismiss(trial)

    def _takes(self, twin: Workload, image: Image | None) -> None:
        """It begins with what the old one had written last."""
        if image is not None:
            twin.record.image_id, twin.record.diff_ids = image.id, list(image.diff_ids)
            self._engine.workloads.save(twin)

    async def _image(self, back: contextlib.AsyncExitStack) -> Image | None:
        """Its image with what it has written as one more layer; None if that is nothing."""
        made = await self._written()
        if made is not None:
            back.push_async_callback(self._forget, made)
        return made

    async def _forget(self, image: Image) -> None:
        with contextlib.suppress(BulkheadError):
            await self._engine.blocking(lambda: self._engine.images.remove(image.id, users={}))
        await self._engine.release_layers()

    async def _written(self) -> Image | None:
        engine, workload = self._engine, self._old
        record = workload.record
        parent = engine.images.resolve(record.image_id)
        settings = msgspec.to_builtins(record.config)

        def make(layer: Iterator[bytes]) -> Image:
            comment = f"moved {time.time_ns()}"  # so that nobody else has just this image
            return engine.images.commit(parent, layer, config=settings, comment=comment)

        if guests.has_disk(record):
            from bulkhead.engine import guest_files

            return await guest_files.commit(engine, workload, make, pause=workload.running)
        upper = f"{engine.home.workload(record.id)}/upper"
        if not os.path.isdir(upper) or not os.listdir(upper):
            return None
        freeze = workload.running
        if freeze:
            await engine.control.pause(workload, passing=True)
        try:
            return await engine.blocking(lambda: make(diff.tar_upper(upper)))
        finally:
            if freeze:
                await engine.control.unpause_if_paused(workload)

    async def _started(self, twin: Workload) -> None:
        """It runs, and answers."""
        await self._engine.lifecycle.start(twin, Start())
        deadline, pause_s = time.monotonic() + self._wish.timeout_s, _PROBE_S
        said = "nothing"
        while time.monotonic() < deadline:
            if not twin.running:
                raise Unavailable(f"the new one has ended: {self._last_words(twin)}")
            code, said = await self._probe(twin)
            if not code:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _PROBE_MOST_S)
        said = " ".join(said.split())[-300:]
        raise Unavailable(
            f"the new one is not ready after {self._wish.timeout_s:g} s; its check said: {said}"
        )

    @staticmethod
    def _last_words(twin: Workload) -> str:
        return twin.record.error or f"exit code {twin.record.exit_code}"

    async def _probe(self, workload: Workload) -> tuple[int, str]:
        """Its health check; without one, whether it listens where the old one did."""
        check = workload.record.config.healthcheck
        try:
            if check is not None and checked(workload.record):
                limit = check.timeout / 1e9 or _PROBE_LIMIT_S
                probe = probes.probe(self._engine, workload, list(check.test or ()))
                return await asyncio.wait_for(probe, limit)
            for port in self._ports:
                code, said = await asyncio.wait_for(probes.tcp(workload, port), _PROBE_LIMIT_S)
                if code:
                    return code, said
        except TimeoutError:
            return 1, "no answer in time"
        except (BulkheadError, OSError) as error:
            return 1, str(error)
        return 0, ""

    async def _listening(self) -> list[str]:
        """The published and exposed TCP ports at which the old one answers."""
        record = self._old.record
        known = {*(record.host.port_bindings or {}), *(record.config.exposed_ports or {})}
        found = []
        for text in sorted(known):
            port, _, protocol = text.partition("/")
            if protocol in ("", "tcp") and port.isdecimal():
                with contextlib.suppress(BulkheadError, OSError, TimeoutError):
                    probe = probes.tcp(self._old, port)
                    if not (await asyncio.wait_for(probe, _PROBE_LIMIT_S))[0]:
                        found.append(port)
        return found

    # --- connections

    async def _drained(self) -> bool:
        """Whether those that were open have ended, or nothing is said on them, in time."""
        workload, sent = self._old, self._engine.networks.handovers.sent
        now = time.monotonic()
        deadline, quiet = now + self._wish.drain_s, now
        before, empty = sent(workload.id), 0
        while time.monotonic() < deadline and workload.running:
            await asyncio.sleep(_LOOK_S)
            empty = empty + 1 if _open_connections(workload) == 0 else 0
            after = sent(workload.id)
            if after != before:
                before, quiet = after, time.monotonic()
            if empty > 1 or time.monotonic() - quiet >= _QUIET_S:
                return True
        return not workload.running

    def _switch(self, twin: Workload, back: contextlib.AsyncExitStack) -> None:
        """The twin takes the old one's place: names, ports, cables. No step of it waits."""
        engine, old = self._engine, self._old
        handovers = engine.networks.handovers
        bridged = bool(old.record.networks)
        if bridged:
            handovers.exchange(old.id, twin.id)
            back.callback(handovers.exchange, twin.id, old.id)
            handovers.succeed(old.id, twin.id)
            back.callback(handovers.succeed, twin.id, old.id)
        self._exchange_names(twin, back)

    def _exchange_names(self, twin: Workload, back: contextlib.AsyncExitStack) -> None:
        old, engine = self._old, self._engine
        marks = old.record.moving, twin.record.moving
        old.record.moving, twin.record.moving = "gone", ""
        try:
            engine.workloads.exchange(old, twin)
        except BaseException:
            old.record.moving, twin.record.moving = marks
            raise

    async def _finish(self, twin: Workload, handover: "Handover | None") -> None:
        """Nothing goes back any more: the old one goes, the twin is an ordinary workload."""
        engine, old = self._engine, self._old
        networks = engine.networks
        twin.attaching, twin.keep = None, False
        try:
            for one in (old, twin):
                networks.rename(one.id, one.record.name)
            if twin.running:
                twin.settings = networks.settings(twin.id)
            if old.running:
                await engine.control.stop(old, "", None)
            if networks.handovers.let_go(old.id):
                networks.release(old.id)
            old.keep = False
            await engine.removal.remove(old, force=True, volumes=False)
        except (BulkheadError, OSError) as error:
            log.warning("what is left of %s after its move: %s", twin.record.name, error)
        finally:
            if handover is not None:
                networks.handovers.end(handover)


def _fixed(
    places: Mapping[str, EndpointRequest],
) -> Callable[[AttachRequest], AttachRequest]:
    """What lets a workload start with these addresses."""
    return lambda request: replace(request, endpoints=places) if places else request


def _open_connections(workload: Workload) -> int | None:
    """How many connections from elsewhere are open; None if nobody here can say."""
    record = workload.record
    if guests.is_guest(record) or not record.pid:
        return None
    entries: list[tuple[str, str, int]] = []
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{record.pid}/net/{name}", encoding="ascii") as file:
                for line in file.readlines()[1:]:
                    words = line.split()
                    entries.append((words[1], words[2], int(words[3], 16)))
        except OSError:
            return None
    listening = {local.rpartition(":")[2] for local, _, state in entries if state == _LISTEN}
    return sum(
        state in _OPEN
        and local.rpartition(":")[2] in listening
        and not local.startswith(("0100007F", "00000000000000000000000001000000"))
        for local, _, state in entries
    )


async def recover(engine: "Engine") -> None:
    """Moves that an earlier engine did not bring to an end."""
    for workload in list(engine.workloads):
        record = workload.record
        if record.moving == "gone":
            with contextlib.suppress(BulkheadError):
                await engine.removal.remove(workload, force=True, volumes=False)
        elif record.moving.startswith("from "):
            old = engine.workloads.by_id(record.moving.removeprefix("from "))
            with contextlib.suppress(BulkheadError):
                await engine.removal.remove(workload, force=True, volumes=False)
            if old is not None:
                await _returned(engine, old)
    for workload in engine.workloads:
        if workload.record.moving:
            await _returned(engine, workload)


async def _returned(engine: "Engine", old: Workload) -> None:
    """The old one runs as before."""
    stopped = old.record.moving.startswith("to ") and not old.running
    old.attaching = _fixed(old.record.places)
    old.record.moving, old.record.places = "", {}
    engine.workloads.save(old)
    try:
        if stopped:
            with contextlib.suppress(BulkheadError):  # its last run, as the holder remembers it
                await engine.processes.forget(old.id)
            await engine.lifecycle.start(old, Start())
        elif old.running:
            engine.networks.handovers.lift(old.id)
            engine.networks.handovers.plug(old.id)
    except BulkheadError:
        log.exception("%s does not run as before its move", old.record.name)
    finally:
        old.attaching = None
