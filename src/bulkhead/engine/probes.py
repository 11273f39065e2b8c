"""One probe of a workload's health: a command inside, or a connection from its network namespace.

The engine connects itself, so the image needs neither curl nor a shell: a socket made in a thread
that has entered the workload's network namespace stays there (setns(2), network_namespaces(7)).
"""

import asyncio
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bulkhead.engine import body, guests
from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError
from bulkhead.linux import namespaces

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

OUTPUT = 4096
"""Bytes of a probe's output that are kept, as Docker does."""


async def command(engine: "Engine", workload: Workload, argv: list[str]) -> tuple[int, str]:
    """Run `argv` inside; its exit code and output."""
    request = body.ExecBody(cmd=argv, attach_stdout=True, attach_stderr=True)
    execution = engine.execs.create(workload, request)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    output = bytearray()
    done: asyncio.Future[None] = engine.loop.create_future()

    def readable() -> None:
        data = os.read(reading, 65536)
        if not data:
            engine.loop.remove_reader(reading)
            if not done.done():
                done.set_result(None)
            return
        output.extend(data[: max(0, OUTPUT - len(output))])

    engine.loop.add_reader(reading, readable)
    attached = engine.spawn(
        engine.processes.keeper.attach(
            execution.identity, stdin=None, stdout=writing, stderr=writing, returns=False
        )
    )
    try:
        await engine.execs.start(execution)
        code = await asyncio.shield(execution.ended)
        await attached
        os.close(writing)
        writing = -1
        await done
    except asyncio.CancelledError:
        await kill(engine, execution.pid)
        raise
    finally:
        attached.cancel()
        if writing >= 0:
            os.close(writing)
        engine.loop.remove_reader(reading)
        os.close(reading)
    return code, output.decode("utf-8", "replace")


async def kill(engine: "Engine", pid: int) -> None:
    """End a probe that takes too long."""
    if pid:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            return


def socket_inside(pid: int, family: int) -> socket.socket:
    """A TCP socket in the network namespace of process `pid`."""
    result: list[socket.socket | BaseException] = []

    def make() -> None:
        try:
            with namespaces.open_namespace(f"/proc/{pid}/ns/net") as fd:
                namespaces.setns(int(fd), namespaces.NEWNET)
            result.append(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=make, name="probe")
    thread.start()
    thread.join()
    made = result[0]
    if isinstance(made, BaseException):
        raise made
    return made


async def _connect(workload: Workload, host: str, port: int) -> socket.socket:
    """A connection from inside; `host` is an address, "localhost" or "" for the loopbacks."""
    if host in {"", "localhost"}:
        # gVisor's loopback is its own; what listens everywhere is reached by the address.
        addresses = guests.own_addresses(workload) or ["127.0.0.1", "::1"]
    else:
        addresses = [host]
    failure: OSError | None = None
    if guests.has_disk(workload.record):
        return await _connect_guest(workload, addresses, port)
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket_inside(workload.record.pid, family)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except OSError as error:
            sock.close()
            failure = failure or error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    assert failure is not None
    raise failure


async def _connect_guest(workload: Workload, addresses: list[str], port: int) -> socket.socket:
    """Likewise through the monitor of a workload with a kernel of its own."""
    from bulkhead.engine import guest_files

    failure: OSError | None = None
    for address in addresses:
        try:
            return await guest_files.connect(workload, address, port)
        except OSError as error:
            failure = failure or error
    assert failure is not None
    raise failure


async def tcp(workload: Workload, target: str) -> tuple[int, str]:
    """Whether something listens at "PORT" or "HOST:PORT"."""
    host, _, port = target.rpartition(":")
    try:
        sock = await _connect(workload, host.strip("[]"), int(port))
    except (OSError, ValueError) as error:
        return 1, f"{target}: {error}"
    sock.close()
    return 0, f"{target}: connected"


async def http(workload: Workload, url: str, statuses: list[str]) -> tuple[int, str]:
    """Whether GET `url` answers with one of `statuses` (any from 200 to 399 if none are given)."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    try:
        sock = await _connect(workload, parts.hostname or "", port)
    except (OSError, ValueError) as error:
        return 1, f"{url}: {error}"
    context = None
    if secure:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # it is asked whether it lives, not who it is
    try:
        reader, writer = await asyncio.open_connection(
            sock=sock,
            ssl=context,
            server_hostname=(parts.hostname or "localhost") if secure else None,
        )
    except (OSError, ssl.SSLError) as error:
        sock.close()
        return 1, f"{url}: {error}"
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: bulkhead-health\r\n"
            "Connection: close\r\nAccept: */*\r\n\r\n".encode()
        )
        await writer.drain()
        data = await reader.read(OUTPUT)
    except (OSError, ssl.SSLError) as error:
        return 1, f"{url}: {error}"
    finally:
        writer.close()
    return _judge(url, data, statuses)


def _judge(url: str, data: bytes, statuses: list[str]) -> tuple[int, str]:
    line = data.split(b"\r\n", 1)[0].decode("latin-1")
    words = line.split(" ")
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdecimal():
        return 1, f"{url}: not an HTTP answer: {line[:80]!r}"
    good = words[1] in statuses if statuses else 200 <= int(words[1]) < 400
    return (0 if good else 1), f"{url}: {line}"


async def probe(engine: "Engine", workload: Workload, test: list[str]) -> tuple[int, str]:
    """Run one test of `Healthcheck.test`; code 0 is healthy."""
    kind, words = test[0], test[1:]
    try:
        if kind == "CMD":
            return await command(engine, workload, words)
        if kind == "CMD-SHELL":
            shell = workload.record.config.shell or ["/bin/sh", "-c"]
            return await command(engine, workload, [*shell, " ".join(words)])
        if kind == "TCP":
            return await tcp(workload, words[0])
        return await http(workload, words[0], words[1:])
    except (BulkheadError, OSError) as error:
        return -1, str(error)
