"""Listening sockets: who comes is served; without descriptors the loop rests."""

import asyncio
import errno
import socket
from pathlib import Path

import pytest

from bulkhead.engine import listening


class Poor(socket.socket):
    """Has no descriptors for clients, for a while."""

    tries = 0
    fail = 3

    def accept(self) -> tuple[socket.socket, object]:
        self.tries += 1
        if self.tries <= self.fail:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def _listen(path: Path) -> Poor:
    sock = Poor(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(8)
    return sock


def test_it_rests_while_there_are_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "REST_S", 0.01)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[socket.socket] = asyncio.Queue()
        listeners = listening.Listeners(loop)
        sock = _listen(tmp_path / "sock")
        listeners.add(sock, came.put_nowait)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "sock"))
            (await asyncio.wait_for(came.get(), 60)).close()
            # One try a rest, however often the loop went round.
            assert sock.tries <= sock.fail + 2
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "sock"))
            (await asyncio.wait_for(came.get(), 60)).close()
        listeners.close()
        assert sock.fileno() < 0

    asyncio.run(main())


def test_it_is_closed_while_it_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "REST_S", 3600.0)

    async def main() -> None:
        listeners = listening.Listeners(asyncio.get_running_loop())
        sock = _listen(tmp_path / "sock")
        listeners.add(sock, lambda sock: sock.close())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "sock"))
            while not sock.tries:
                await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0)
            assert sock.tries == 1
            listeners.close()

    asyncio.run(main())
