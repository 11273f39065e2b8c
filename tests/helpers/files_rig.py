"""A guest that is only a namespace, with directories of the host by way of the file server.

with Files(tmp_path, "echo hello > /…/a") as files:
    assert files.monitor.wait()[0] == 0
"""

import contextlib
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bulkhead.boundaries import files_syscalls
from bulkhead.boundaries.guest import frames
from bulkhead.isolation.seccomp.compile import compile_filter
from bulkhead.keeper.holder import program_path
from bulkhead.linux import seccomp
from tests.helpers.guest_rig import simple
from tests.helpers.monitor_rig import Monitor, main_frames

FIRST = 100
OPTIONS = "allow_other,default_permissions"


def server(
    sock: socket.socket, sources: Sequence[Path], *, valid: str, native: str | None = None
) -> "subprocess.Popen[bytes]":
    """`bulkhead-files` on `sock`: of its jail it has the filter, if it is the one that is used."""

    def confine() -> None:
        seccomp.install(program)

    program = compile_filter(files_syscalls.profile()).program
    shares = [f"{FIRST + n}={path}:{valid}" for n, path in enumerate(sources)]
    return subprocess.Popen(
        [program_path("bulkhead-files", native), str(sock.fileno()), "100000", *shares],
        pass_fds=[sock.fileno()],
        preexec_fn=confine if native is None else None,
    )


class Files:
    """`script` runs with the `sources` mounted at `places`, one after the other."""

    def __init__(
        self,
        folder: Path,
        script: str,
        sources: Sequence[Path],
        *,
        valid: str = "0",
        native: str | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.places = [folder / f"mount{n}" for n in range(len(sources))]
        mounts = b""
        for number, place in enumerate(self.places):
            place.mkdir(exist_ok=True)
            mounts += frames.fuse_mount(FIRST + number, str(place), OPTIONS)
        text = script.format(*self.places)
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.enter_context(ours)
            undo.enter_context(theirs)
            self.server = server(theirs, sources, valid=valid, native=native)
            self.monitor = Monitor(
                folder,
                mounts + main_frames(simple("sh", "-ec", text)),
                options=["--files-fd", str(ours.fileno())],
                pass_fds=[ours.fileno()],
                native=native,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.monitor.__exit__(kind, error, trace)
        self.server.kill()
        self.server.wait()
