"""The API under hostile and heavy use: no status 500, no hang, nothing left over."""

import itertools
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.helpers import api_fuzz
from tests.helpers.api_rig import Api, api, archive
from tests.helpers.images import has_busybox
from tests.helpers.residue import residue
from tests.helpers.scale import SCALE
from tests.helpers.waiting import until

ROUNDS = max(1, int(10 * SCALE))
"""Each asks every operation once: some 100 requests."""
PATIENCE_S = 120.0
REFUSALS = frozenset({501, 503})
"""Refused with words: swarm and BuildKit, which are not there."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    if os.geteuid() != 0:
        pytest.skip("engines want root")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    folder = tmp_path_factory.mktemp("fuzz")
    with residue(str(folder)), api(folder) as made:
        yield made


def _emptied(here: Api) -> None:
    """As at the beginning: what was drawn may have removed the image, too."""
    with here.client() as client, archive(here.folder).open("rb") as file:
        client.images.load(file)
        for left in client.containers.list(all=True, ignore_removed=True):
            left.remove(force=True, v=True)


def test_requests_drawn_from_the_specification(here: Api) -> None:
    if not api_fuzz.SWAGGER.exists():
        pytest.skip(f"{api_fuzz.SWAGGER} is not here")
    document = yaml.load(api_fuzz.SWAGGER.read_text(), Loader=yaml.CSafeLoader)
    names = ["busybox:latest", "fuzzed", "net", "vol"]
    with here.client() as client:
        client.containers.create("busybox", ["true"], name="fuzzed")
        client.networks.create("net")
        client.volumes.create("vol")
    maker = api_fuzz.Maker(document, random.Random(4), names)
    seen: Counter[int] = Counter()
    wrong = []
    try:
        for request in itertools.chain.from_iterable(maker.each() for _ in range(ROUNDS)):
            try:
                status = api_fuzz.status_of(here.path, request, PATIENCE_S)
            except TimeoutError:
                status = 0
            seen[status] += 1
            if status <= 0 or (status >= 500 and status not in REFUSALS):
                wrong.append(f"{status} {request.label}")
    finally:
        _emptied(here)
    assert not wrong, "\n".join([*wrong[:20], here.rig.log.read_text()[-3000:]])
    assert seen[400] and seen[404] and seen[200]


BROKEN = (
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\n\n", b"get / HTTP/1.1\r\n\r\n",
    b"GET /_ping HTTP/1.1\r\n folded: x\r\n\r\n", b"GET /_ping HTTP/1.1\r\nA : b\r\n\r\n",
    b"GET /%00 HTTP/1.1\r\n\r\n", b"GET x HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"POST /containers/create HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"POST /auth HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /auth HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /auth HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /auth HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /auth HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxxxx\r\n0\r\n\r\n",
    b"GET /_ping HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    b"GET /" + b"a" * (80 << 10) + b" HTTP/1.1\r\n\r\n",
    b"POST /auth HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + b" " * (5 << 20),
)  # fmt: skip


def _answer(here: Api, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(here.path))
        answer = b""
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                answer += piece
        except (BrokenPipeError, ConnectionResetError):
            pass
    return answer


@pytest.mark.parametrize("at", range(len(BROKEN)))
def test_broken_requests(here: Api, at: int) -> None:
    answer = _answer(here, BROKEN[at])
    assert not answer or answer.split()[1] in {b"400", b"404", b"408", b"413", b"431", b"501"}
    assert b"200 OK" in _answer(here, b"GET /_ping HTTP/1.0\r\n\r\n")


def test_requests_in_pieces_and_in_a_row(here: Api) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(here.path))
        for byte in b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n":
            sock.sendall(bytes((byte,)))
        assert b"200 OK" in sock.recv(1 << 16)
        sock.sendall(b"GET /_ping HTTP/1.1\r\n\r\n" * 50)
        data = b""
        while data.count(b"200 OK") < 50:
            piece = sock.recv(1 << 16)
            assert piece
            data += piece
        body = b'4\r\n{"Im\r\n10\r\nage": "missing"}\r\n0\r\n\r\n'
        head = b"POST /containers/create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head + body)
        assert b"No such image: missing" in sock.recv(1 << 16)


def _attach(here: Api, name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE_S)
    sock.connect(str(here.path))
    sock.sendall(
        f"POST /containers/{name}/attach?stream=1&stdout=1&stderr=1 HTTP/1.1\r\n"
        "Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(1)
    assert b" 101 " in head
    return sock


def test_many_attached_clients_of_which_half_are_killed(here: Api) -> None:
    with here.client() as client:
        made = client.containers.create(
            "busybox", ["sh", "-c", "read x; seq 2000"], stdin_open=True
        )
        made.start()
        before = here.descriptors()
        socks = [_attach(here, made.id) for _ in range(50)]
        for sock in socks[::2]:
            sock.close()
        typing = made.attach_socket(params={"stdin": 1, "stream": 1})
        typing._sock.sendall(b"go\n")
        seen = []
        for sock in socks[1::2]:
            data = b""
            while piece := sock.recv(1 << 16):
                data += piece
            sock.close()
            seen.append(_unframed(data))
        typing.close()
        made.wait()
        expected = b"".join(b"%d\n" % number for number in range(1, 2001))
        assert seen == [expected] * 25
        made.remove(force=True)
    until(lambda: here.descriptors() <= before + 3, "descriptors are closed")


def _unframed(data: bytes) -> bytes:
    found = b""
    while data:
        size = int.from_bytes(data[4:8], "big")
        found += data[8 : 8 + size]
        data = data[8 + size :]
    return found


def test_clients_that_leave_streams(here: Api) -> None:
    with here.client() as client:
        made = client.containers.run("busybox", ["sleep", "1000"], detach=True)
        before = here.descriptors()
        for path in ("/events", f"/containers/{made.id}/stats",
                     f"/containers/{made.id}/logs?follow=1&stdout=1"):  # fmt: skip
            for _ in range(10):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(PATIENCE_S)
                    sock.connect(str(here.path))
                    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    assert b"200" in sock.recv(100)
        until(lambda: here.descriptors() <= before + 2, "descriptors are closed")
        made.remove(force=True)


def test_two_hundred_creates_at_once(here: Api) -> None:
    def create(number: int) -> bytes:
        body = b'{"Image": "busybox", "Cmd": ["true"]}'
        head = f"POST /containers/create?name=many{number} HTTP/1.1\r\nConnection: close\r\n"
        answer = _answer(here, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b" 201 " in answer.splitlines()[0], answer
        return answer.partition(b'"Id":')[2]

    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(create, range(200)))
    assert len(set(made)) == 200
    with here.client() as client:
        assert len(client.containers.list(all=True, sparse=True)) == 200
        assert len(client.containers.prune()["ContainersDeleted"]) == 200
        assert client.containers.list(all=True) == []
