"""Live bytes of containers: attach, logs, stats. Execs' streams are made by the same `Session`.

Without a terminal, output is multiplexed: each piece has a header of eight bytes, the stream (1
standard output, 2 standard error, 3 an error of ours) and the length. With one it is raw.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from bulkhead.api.answers import Reply
from bulkhead.api.connection import Gone
from bulkhead.api.exchange import Exchange, Stream, feed, pieces, pipe
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.engine.attach import detach_keys
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError, Conflict, Invalid
from bulkhead.linux.fds import OwnedFd

RAW = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"
_HEADERS = {number: bytes((number, 0, 0, 0)) for number in (0, 1, 2, 3)}


def framed(number: int, data: bytes) -> bytes:
    """A piece of a multiplexed stream."""
    return _HEADERS[number] + len(data).to_bytes(4, "big") + data


def kind_of(x: Exchange, *, terminal: bool) -> str:
    """The content type of a stream: since 1.42 it says whether it is multiplexed."""
    return RAW if terminal or x.version < (1, 42) else MULTIPLEXED


class Session:
    """Pipes between a hijacked connection and a process's streams."""

    def __init__(
        self,
        x: Exchange,
        *,
        raw: bool,
        stdin: bool,
        stdout: bool,
        stderr: bool,
        source: AsyncIterator[bytes] | None = None,
    ) -> None:
        """`raw`: output is not multiplexed; `source`: of the input, instead of the connection."""
        self._x = x
        self._raw = raw
        self._source = source or self._received()
        self._lent: list[OwnedFd | None] = [None, None, None]
        self._input: OwnedFd | None = None
        self._outputs: list[tuple[int, OwnedFd]] = []
        self._tasks: list[asyncio.Task[None]] = []
        if stdin:
            self._lent[0], self._input = pipe(64 << 10)
        if stdout:
            self._add(1)
        if stderr:
            self._add(2)

    def _add(self, number: int) -> None:
        reading, self._lent[number] = pipe(256 << 10)
        self._outputs.append((number, reading))

    @property
    def idle(self) -> bool:
        """Whether it connects nothing."""
        return self._input is None and not self._outputs

    def lend(self) -> list[int | None]:
        """The process's ends of stdin, stdout, stderr; kept open until `finish`."""
        return [None if fd is None else int(fd) for fd in self._lent]

    def give(self) -> list[OwnedFd]:
        """The process's ends; the caller owns them."""
        given = [fd for fd in self._lent if fd is not None]
        self._lent = [None, None, None]
        return given

    def start(self, stream: Stream) -> None:
        """Carry bytes both ways from now on."""
        loop = asyncio.get_running_loop()
        for number, fd in self._outputs:
            self._tasks.append(loop.create_task(self._out(stream, number, fd)))
        if self._input is not None:
            self._tasks.append(loop.create_task(feed(self._source, self._input)))
        elif self.idle:
            self._tasks.append(loop.create_task(self._discard()))

    async def _received(self) -> AsyncIterator[bytes]:
        while data := await self._x.connection.received():
            yield data

    async def _discard(self) -> None:
        while await self._x.connection.received():
            pass

    async def _out(self, stream: Stream, number: int, fd: OwnedFd) -> None:
        raw = self._raw
        await self._x.connection.head_taken()
        async with contextlib.aclosing(pieces(fd, 32 << 10)) as found:  # type: ignore[type-var]
            async for data in found:
                stream.write(data if raw else framed(number, data))
                await stream.drained()

    def close_lent(self) -> None:
        """Close the process's ends here: the outputs end when the process's copies are closed."""
        for fd in self._lent:
            if fd is not None:
                fd.close()
        self._lent = [None, None, None]

    async def finish(self, *, complete: bool) -> None:
        """Wait until all output is sent (if `complete`), then end everything."""
        self.close_lent()
        try:
            if complete:
                outputs = self._tasks[: len(self._outputs)]
                if outputs:
                    await asyncio.wait(outputs)
        finally:
            for task in self._tasks:
                task.cancel()
            for task in self._tasks:
                with contextlib.suppress(asyncio.CancelledError, Gone, OSError, ValueError):
                    await task
            for _, fd in self._outputs:
                fd.close()
            if self._input is not None:
                self._input.close()


def _wanted(x: Exchange) -> dict[str, bool]:
    return {name: x.flag(name) for name in ("stdin", "stdout", "stderr")}


@ROUTES.add("POST", "/containers/{id}/attach")
async def attach(x: Exchange) -> object:
    """Connect to its streams, of this run or the next; a hijack."""
    workload, keys = attachable(x)
    record = workload.record
    wanted = _wanted(x)
    terminal = record.config.tty
    if x.flag("logs"):
        return await _logs_then_attach(x, workload, wanted, keys)
    if not x.flag("stream"):
        x.hijack(kind_of(x, terminal=terminal))
        return SENT
    session = _session(x, workload, wanted)
    await connected(x, workload, session, keys, lambda: x.hijack(kind_of(x, terminal=terminal)))
    return SENT


def attachable(x: Exchange) -> tuple[Workload, bytes]:
    """The container to attach to, and the keys that detach."""
    workload = x.engine.workloads.find(x.at["id"])
    if workload.record.status == "paused":
        raise Conflict(f"container {x.at['id']} is paused, unpause the container before attach")
    if workload.record.status == "restarting":
        raise Conflict(f"container {x.at['id']} is restarting, wait until the container is running")
    return workload, detach_keys(x.text("detachKeys"))


async def connected(
    x: Exchange, workload: Workload, session: Session, keys: bytes, begin: Callable[[], Stream]
) -> None:
    """Connect `session` until the run ends, the client detaches or leaves; `begin` answers."""
    engine, record = x.engine, workload.record
    complete = False
    try:
        if session.idle:
            session.start(begin())
            await asyncio.shield(workload.ended)
            return
        stdin, stdout, stderr = session.lend()
        async with engine.processes.keeper.attaching(
            record.id, stdin=stdin, stdout=stdout, stderr=stderr, detach_keys=keys, returns=False
        ) as attached:
            engine.events.emit("container", "attach", record.id, attributes(workload))
            session.start(begin())
            reason = await attached
        if reason == "detached":
            engine.events.emit("container", "detach", record.id, attributes(workload))
        complete = True
    finally:
        await session.finish(complete=complete)


def _session(x: Exchange, workload: Workload, wanted: dict[str, bool]) -> Session:
    config = workload.record.config
    return Session(
        x, raw=config.tty, stdin=wanted["stdin"] and config.open_stdin, stdout=wanted["stdout"],
        stderr=wanted["stderr"] and not config.tty,
    )  # fmt: skip


async def _logs_then_attach(
    x: Exchange, workload: Workload, wanted: dict[str, bool], keys: bytes
) -> object:
    """`logs=1`: what was said before, then, with `stream=1`, what is said."""
    terminal = workload.record.config.tty
    stream = x.hijack(kind_of(x, terminal=terminal))
    if wanted["stdout"] or wanted["stderr"]:
        await x.connection.head_taken()

        def item(record: Any) -> None:
            stream.write(record[1] if terminal else framed(record[0], record[1]))

        params = {"id": workload.id, "stdout": wanted["stdout"], "stderr": wanted["stderr"]}
        with contextlib.suppress(Invalid):  # a driver that keeps no log
            await x.call("workload.logs", params, item=item)
    if x.flag("stream"):
        await connected(x, workload, _session(x, workload, wanted), keys, lambda: stream)
    return SENT


@ROUTES.add("GET", "/containers/{id}/logs")
async def logs(x: Exchange) -> object:
    """Its log, and with `follow` what is added to it."""
    workload = x.engine.workloads.find(x.at["id"])
    terminal = workload.record.config.tty
    params = {
        "id": workload.id, "follow": x.flag("follow"), "stdout": x.flag("stdout"),
        "stderr": x.flag("stderr"), "since": x.text("since") or None,
        "until": x.text("until") or None, "timestamps": x.flag("timestamps"),
        "tail": x.text("tail") or None, "details": x.flag("details"),
    }  # fmt: skip
    for name in ("since", "until"):
        if params[name] == "0":
            params[name] = None  # older clients mean "not given" by it
    _check_tail(params)
    stream: Stream | None = None

    def begin() -> Stream:
        nonlocal stream
        if stream is None:
            stream = x.begin(kind_of(x, terminal=terminal))
        return stream

    def item(record: Any) -> None:
        begin().write(record[1] if terminal else framed(record[0], record[1]))

    if params["follow"] and (params["stdout"] or params["stderr"]):
        config = workload.record.host.log_config
        if config is None or config.type_ != "none":
            begin()
    await x.call("workload.logs", params, item=item)
    begin().end()
    return SENT


def _check_tail(params: dict[str, Any]) -> None:
    from bulkhead.engine import filters

    for name in ("since", "until"):
        filters.moment_ns(params[name])
    tail = params["tail"]
    if tail is not None and not tail.lstrip("-").isdigit():
        params["tail"] = None  # as dockerd: what is no number means all


@ROUTES.add("GET", "/containers/{id}/stats")
async def stats(x: Exchange) -> object:
    """Its usage, once a second or once."""
    workload = x.engine.workloads.find(x.at["id"])
    streaming = x.flag("stream", default=True)
    if streaming and x.flag("one-shot"):
        raise Invalid("cannot have stream=true and one-shot=true")
    params = {"id": workload.id, "stream": streaming, "one_shot": x.flag("one-shot")}
    if not streaming:
        return await x.call("workload.stats", params)
    stream = x.begin()
    await x.call("workload.stats", params, item=lambda one: stream.write(Reply(200, one).body))
    stream.end()
    return SENT


def report_failure(stream: Stream, error: BulkheadError, *, terminal: bool) -> None:
    """An error after the head was sent: a line of the output."""
    text = f"{error.message}\r\n".encode()
    stream.write(text if terminal else framed(1, text))
