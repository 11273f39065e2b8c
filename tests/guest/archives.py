"""Archives of workloads, through an engine's RPC."""

import io
import os
import tarfile
import tempfile
import threading
from typing import Any

from tests.helpers.engine_rig import Rig


def fetch(rig: Rig, method: str, **params: Any) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """The members of the archive that a method writes."""
    reading, writing = os.pipe()
    out: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(reading, out))
    reader.start()
    try:
        rig.call(method, (writing,), **params)
    finally:
        os.close(writing)
        reader.join()
    found = {}
    with tarfile.open(fileobj=io.BytesIO(out[0])) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            found[member.name] = (member, file.read() if file is not None else b"")
    return found


def _read_all(fd: int, into: list[bytes]) -> None:
    with os.fdopen(fd, "rb") as file:
        into.append(file.read())


def send(rig: Rig, name: str, path: str, data: bytes, **params: Any) -> None:
    """Put an archive below a path of a workload."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        rig.call("workload.archive_put", (file.fileno(),), id=name, path=path, **params)
