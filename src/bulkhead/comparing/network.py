"""The host's end of the probe's server: readiness, round trips, throughput."""

import contextlib
import socket
import struct
import time
from collections.abc import Generator

from bulkhead.comparing.spawn import FailedError

PORT = 7007
_READY_S = 60.0
_TRIPS = 300
_BYTES = 64 << 20
_WAIT_S = 30.0


@contextlib.contextmanager
def _connected(address: str, limit_s: float = _WAIT_S) -> Generator[socket.socket]:
    try:
        with socket.create_connection((address, PORT), timeout=limit_s) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection
    except OSError as error:
        raise FailedError(f"{address}:{PORT}: {error.strerror or error}") from None


def ready(address: str) -> None:
    """Wait until the server answers a byte; FailedError after a minute."""
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            with _connected(address, 2.0) as connection:
                connection.sendall(b"ex")
                if connection.recv(1) == b"x":
                    return
        except FailedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.001)


def trip_us(address: str) -> float:
    """The median of many round trips of a byte, in microseconds."""
    times = []
    with _connected(address) as connection:
        connection.sendall(b"e")
        for _ in range(_TRIPS):
            start = time.perf_counter()
            connection.sendall(b"x")
            if connection.recv(1) != b"x":
                raise FailedError("the workload closed the connection")
            times.append(time.perf_counter() - start)
    return sorted(times)[_TRIPS // 2] * 1e6


def into_mbps(address: str, size: int = _BYTES) -> float:
    """MB/s of a stream into the workload, until it says that it has all."""
    piece = bytes(1 << 18)
    with _connected(address) as connection:
        start = time.perf_counter()
        connection.sendall(b"s")
        for _ in range(size // len(piece)):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1) != b"k":
            raise FailedError("the workload closed the connection")
        return size / (time.perf_counter() - start) / 1e6


def out_mbps(address: str, size: int = _BYTES) -> float:
    """MB/s of a stream out of the workload."""
    buffer = bytearray(1 << 18)
    with _connected(address) as connection:
        start = time.perf_counter()
        connection.sendall(b"r" + struct.pack("=Q", size))
        left = size
        while left > 0:
            got = connection.recv_into(buffer)
            if not got:
                raise FailedError("the workload closed the connection")
            left -= got
        return size / (time.perf_counter() - start) / 1e6
