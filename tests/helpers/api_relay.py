"""A Unix socket within reach of programs that speak TCP only: both directions, half-closes too."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def relay(path: Path) -> Iterator[int]:
    """A loopback port behind which is the socket at `path`; at the end every connection is cut."""
    open_: set[socket.socket] = set()
    guard = threading.Lock()
    threads: list[threading.Thread] = []

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as engine:
            with guard:
                open_.update((client, engine))
            with contextlib.suppress(OSError):
                engine.connect(str(path))
                back = threading.Thread(target=carry, args=(engine, client))
                back.start()
                carry(client, engine)
                back.join()
            with guard:
                open_.difference_update((client, engine))

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=serve, args=(client,))
            thread.start()
            threads.append(thread)

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            with guard:
                for sock in open_:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
