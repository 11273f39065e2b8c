"""Directories and files of the host in a guest: the file server and its jail.

    shares = Shares(bundle, taken)           # which binds, from where; pure but for a look at them
    socket = await shares.serve(inner, roots, …)  # `bulkhead-files` runs as long as it is open

Every guest with binds has one server, in a container of its own: its root is the program alone,
what it shows is mounted below /run, read-only what all binds show read-only. It is in the
workload's control group and ends with the monitor. What several binds show from one source is one
mount in the guest, so that they see each other's changes at once. A single file is shown in a
directory of its own.

    <workload_run>/files/shares/N[/file]    mount points of that jail
    <workload_run>/files/log                why it ended, if it did not end with the monitor
"""

import contextlib
import os
import resource
import socket
import stat
from collections.abc import Collection
from dataclasses import dataclass, field

from bulkhead.boundaries import files_syscalls
from bulkhead.boundaries.container import Container
from bulkhead.boundaries.guest import plan
from bulkhead.boundaries.jail import Roots, isolated
from bulkhead.boundary.seam import Bundle, Rootfs, Stdio
from bulkhead.errors import Invalid, Unsupported
from bulkhead.isolation import mounts
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Capabilities, Linux, Mount, Process, Rlimit, Root, Spec, User

PROGRAM = "/usr/bin/bulkhead-files"
NAME = "files"
"""The launcher knows a server as "ID/files-HEX"."""
MOST = 48
"""Sources of one guest; the server's own limit is higher."""
_SHARED = "250"
"""For how long, in ms, a guest may believe what it has seen of files that others may change."""
_OWN = "5000o"
"""Likewise of those that nobody else writes, whose locks are its own affair (files.c)."""
_LEAST_NODES = 1 << 17
_NODE_BYTES = 1024
"""Of a guest's own memory that it needs to know a file: so many it can know at most."""
_FILES = 20480
"""Descriptors of a server: for open files, locks, and some 2000 for what was looked up."""
_SOCKET_BYTES = 1 << 20
_FD = 10
_CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_SETFCAP"]
_FLAGS = ["nosuid", "nodev", "noexec"]
_PROC = Mount("/proc", "proc", "proc", [*_FLAGS, "ro", "subset=pid"])


@dataclass(slots=True)
class _Source:
    path: str
    directory: bool
    valid: str
    recursive: bool = False
    writable: bool = False


@dataclass(slots=True)
class Shares:
    """What of `bundle`'s binds the file server shows; not those at the positions `taken`.

    Invalid for a source that is not there, Unsupported for one that is neither file nor directory.
    """

    bundle: Bundle
    taken: Collection[int]
    sources: dict[int, plan.Share] = field(default_factory=dict)
    """By the position of the mount in the configuration."""
    _found: dict[str, _Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for position, mount in enumerate(self.bundle.spec.mounts):
            if mounts.is_bind(mount) and position not in self.taken:
                self.sources[position] = self._share(mount)
        if len(self._found) > MOST:
            raise Unsupported(f"a guest can have binds from at most {MOST} places of the host")

    def _share(self, mount: Mount) -> plan.Share:
        options = mounts.parse(mount.options)
        writable = "ro" not in mount.options and "rro" not in mount.options
        found = self._found.get(mount.source)
        if found is None:
            own = mount.source in self.bundle.exclusive
            found = self._found[mount.source] = _Source(
                mount.source, _is_directory(mount.source), _OWN if own else _SHARED
            )
        found.recursive |= options.recursive_bind
        found.writable |= writable
        number = plan.FIRST_SHARE + list(self._found).index(mount.source)
        return plan.Share(number, "" if found.directory else "file", found.directory)

    def __bool__(self) -> bool:
        return bool(self.sources)

    def places(self) -> dict[str, tuple[str, bool]]:
        """Where in the guest each source is, and whether it can be written there."""
        return {
            path: (
                f"/shares/{plan.FIRST_SHARE + number}{'' if one.directory else '/file'}",
                one.writable,
            )
            for number, (path, one) in enumerate(self._found.items())
        }

    def mounts(self) -> dict[int, plan.Share]:
        """What is to be mounted in the guest, by its number."""
        first = {one.number: one for one in reversed(self.sources.values())}
        return dict(sorted(first.items()))

    async def serve(
        self, inner: Container, roots: Roots, program: str, memory_bytes: int
    ) -> OwnedFd:
        """Start the server, in the control group of `inner`: the socket for the monitor.

        It ends when that is closed. `memory_bytes` is the guest's size.
        """
        directory = f"{self.bundle.directory}/files"
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo, theirs:
            monitor = OwnedFd(ours.detach())
            undo.callback(monitor.close)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            self._skeleton(f"{directory}/shares")
            root = roots.make(NAME, {PROGRAM: program})
            nodes = max(_LEAST_NODES, memory_bytes // _NODE_BYTES)
            bundle = Bundle(
                # Another one each time: the last one's end may not have been noticed yet.
                id=f"{self.bundle.id}/{NAME}-{os.urandom(4).hex()}",
                spec=self._spec(f"{directory}/shares", nodes),
                rootfs=Rootfs(directory=root.directory),
                directory=directory,
                fds=(theirs.fileno(),),
            )
            container = Container(inner.boundary, bundle, inner.group)
            with open(f"{directory}/log", "wb") as log:
                launched = await container.start(Stdio(stderr=log.fileno()))
            if launched.pidfd is not None:
                launched.pidfd.close()
            undo.pop_all()
        return monitor

    def _skeleton(self, directory: str) -> None:
        """The mount points."""
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for number, source in enumerate(self._found.values()):
            os.makedirs(f"{directory}/{number}", mode=0o755, exist_ok=True)
            if not source.directory:
                os.close(os.open(f"{directory}/{number}/file", os.O_CREAT | os.O_CLOEXEC, 0o444))

    def _spec(self, skeleton: str, nodes: int) -> Spec:
        shares = [
            f"{plan.FIRST_SHARE + number}=/run/{number}:{source.valid}"
            for number, source in enumerate(self._found.values())
        ]
        found = [_PROC, Mount("/run", skeleton, "bind", ["bind", "ro", *_FLAGS])]
        for number, source in enumerate(self._found.values()):
            place = f"/run/{number}" if source.directory else f"/run/{number}/file"
            options = ["rbind" if source.recursive else "bind", "rprivate", *_FLAGS]
            options.append("rw" if source.writable else "rro" if source.recursive else "ro")
            found.append(Mount(place, source.path, "bind", options))
        given = self.bundle.spec.process
        files = min(_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        return Spec(
            root=Root(path="rootfs", readonly=True),
            hostname="files",
            process=Process(
                args=[PROGRAM, str(_FD), str(nodes), *shares],
                env=[],
                user=User(uid=0, gid=0),
                capabilities=Capabilities(
                    bounding=list(_CAPABILITIES),
                    effective=list(_CAPABILITIES),
                    inheritable=[],
                    permitted=list(_CAPABILITIES),
                    ambient=[],
                ),
                rlimits=[Rlimit("RLIMIT_CORE", 0, 0), Rlimit("RLIMIT_NOFILE", files, files)],
                no_new_privileges=True,
                oom_score_adj=given.oom_score_adj if given is not None else None,
            ),
            mounts=found,
            linux=Linux(
                namespaces=isolated(self.bundle.spec.linux),
                cgroups_path=self.bundle.spec.linux.cgroups_path,
                seccomp=files_syscalls.profile(),
            ),
        )


def _is_directory(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise Invalid(f"bind source {path}: {error.strerror}") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise Unsupported(
            f"bind source {path}: a guest can have directories and files of the host, not sockets "
            "or devices"
        )
    return stat.S_ISDIR(mode)
