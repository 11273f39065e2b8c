"""The registry's HTTP where it meets broken requests and broken blobs."""

import functools
import io
import re
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from bulkhead.depot.http import Server
from bulkhead.depot.patience import HEAD_S, IDLE_S, SLOWEST, Patient
from bulkhead.depot.uploads import Uploads
from bulkhead.errors import Corrupt
from tests.helpers.waiting import until

_DIGEST = "sha256:" + "a" * 64


class _Rotten(io.BytesIO):
    """A blob that turns out to be corrupt after its first piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise Corrupt("the rest is not what it should be")
        return super().read(4)


class _Writer:
    offset = 0
    closed = False

    def write(self, data: bytes) -> None:
        self.offset += len(data)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def registry() -> Any:
    store: Any = SimpleNamespace(writer=_Writer)
    return SimpleNamespace(
        repository=lambda name: SimpleNamespace(name=name),
        blob=lambda repository, digest: (_Rotten(b"0123456789"), 10),
        check_push=lambda: None,
        protect=lambda: None,
        digest=lambda text: text,
        uploads=Uploads(store),
    )


@pytest.fixture
def port(registry: Any) -> Iterator[int]:
    with Server(("127.0.0.1", 0), registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def _ask(port: int, data: bytes) -> bytes:
    """Everything that comes back until the server closes the connection."""
    found = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(data)
        while piece := sock.recv(1 << 16):
            found += piece
    return bytes(found)


def test_an_error_within_a_blob_cuts_it_off(port: int) -> None:
    answer = _ask(port, f"GET /v2/a/blobs/{_DIGEST} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == b"0123"


@pytest.mark.parametrize("headers", [
    "Content-Length: 0\r\nContent-Length: 5", "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Content-Length : 5",
    "Content-Length: +5", "Transfer-Encoding: gzip",
])  # fmt: skip
def test_bodies_that_others_may_read_otherwise_are_refused(port: int, headers: str) -> None:
    answer = _ask(port, f"GET /v2/ HTTP/1.1\r\nHost: h\r\n{headers}\r\n\r\n".encode())
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"400"]


def test_an_upload_whose_name_nobody_knows_is_ended(port: int, registry: Any) -> None:
    made: list[Any] = []
    begin = registry.uploads.begin

    def remembered(name: str) -> Any:
        made.append(begin(name))
        return made[-1]

    registry.uploads.begin = remembered
    head = f"POST /v2/a/blobs/uploads/?digest={_DIGEST} HTTP/1.1\r\nHost: h\r\n"
    assert not _ask(port, f"{head}Transfer-Encoding: chunked\r\n\r\nno size\r\n".encode())
    assert len(made) == 1
    assert made[0].writer.closed


def test_slow_clients_are_not_waited_for() -> None:
    now = [0.0]
    near, far = socket.socketpair()
    with near, far:
        patient = Patient(near, lambda: now[0])
        with io.BufferedReader(patient, 1 << 16) as reader:
            for _ in range(3):  # of its own accord
                assert patient.waiting
                now[0] += IDLE_S - 1
                far.sendall(b"G")
                assert reader.read1(1) == b"G"
                now[0] += HEAD_S - 1
                far.sendall(b"E")
                assert reader.read1(1) == b"E"
                patient.body()
                far.sendall(bytes(SLOWEST * 10))
                assert len(reader.read(SLOWEST * 10)) == SLOWEST * 10
                now[0] += IDLE_S + 9
                far.sendall(b"x")
                assert reader.read1(1) == b"x"
                patient.idle()
            far.sendall(b"G")
            assert reader.read1(1) == b"G"
            now[0] += HEAD_S + 1
            far.sendall(b"E")
            with pytest.raises(TimeoutError):
                reader.read1(1)


def _served(server: Server, count: int) -> bool:
    return len(server.live) == count


def test_one_that_waits_makes_room(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bulkhead.depot.http._MOST_CONNECTIONS", 2)
    with Server(("127.0.0.1", 0), registry) as server:
        address = ("127.0.0.1", int(server.server_address[1]))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            held = []
            for count in (1, 2):
                held.append(socket.create_connection(address))
                until(functools.partial(_served, server, count), "it is served")
            with socket.create_connection(address, timeout=60) as third:
                third.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert b"200 OK" in third.recv(1000)
            assert held[0].recv(1) == b""
            for one in held:
                one.close()
            until(lambda: not server.live, "all are gone")
        finally:
            server.shutdown()
            thread.join()
