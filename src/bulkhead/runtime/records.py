"""What a runtime remembers between two of its commands.

<root>/ID/                0711, made exclusively: the id is taken by it
    state.json            `Record`, replaced as a whole
    config.json           the configuration as it was when the container was made
    start.fifo            while the container waits for `start`
    progress, steps.json  what `start` needs to say what has failed
    lock                  flock'd by every command that changes something
<root>/.planner/          see planner.py
"""

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator

import msgspec

from bulkhead.errors import Conflict, Corrupt, Invalid, NotFound
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.linux import procfs
from bulkhead.oci.runtime import Spec, decode, encode

_BESIDE = ".new-"
PLANNER = ".planner"
"""What is in the root beside containers."""
_ID = re.compile(r"[\w+.-]{1,1024}", re.ASCII)


class Record(msgspec.Struct, omit_defaults=True):
    """One container. `start_time` in clock ticks since boot makes `pid` unique for ever."""

    id: str
    bundle: str
    rootfs: str
    created: str
    oci_version: str
    cgroup: str
    owner: str = ""
    pid: int = 0
    start_time: int = 0
    annotations: dict[str, str] = {}
    unit: str = ""
    """systemd's scope around it, if it has one."""


class Records:
    """The containers below one root directory."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, identity: str, *parts: str) -> str:
        """A path in the container's directory; Invalid for what is no id."""
        if not _ID.fullmatch(identity) or identity in (".", "..", PLANNER):
            raise Invalid(f"invalid container ID {identity!r}: letters, digits and _+.- only")
        return "/".join((self.root, identity, *parts))

    @contextlib.contextmanager
    def made(self, identity: str) -> Iterator[str]:
        """Take the id: its directory, locked meanwhile; Conflict if it is taken.

        The directory appears with its lock held, so that nobody removes half a container.
        """
        path = self.path(identity)
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        beside = f"{self.root}/{_BESIDE}{identity}.{os.getpid()}"
        os.mkdir(beside, 0o711)
        with contextlib.ExitStack() as undo:
            undo.callback(_discard, beside)
            undo.enter_context(_lock(f"{beside}/lock"))
            try:
                os.rename(beside, path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                raise Conflict(f"container with given ID already exists: {identity}") from None
            yield path

    @contextlib.contextmanager
    def locked(self, identity: str) -> Iterator[None]:
        """Nobody else changes the container meanwhile; NotFound if there is none."""
        try:
            with _lock(self.path(identity, "lock")):
                if not os.path.exists(self.path(identity, "lock")):
                    raise _missing(identity)
                yield
        except FileNotFoundError:
            raise _missing(identity) from None

    def save(self, record: Record) -> None:
        """Replace what is remembered."""
        path = self.path(record.id, "state.json")
        with open(f"{path}.new", "wb") as file:
            file.write(msgspec.json.encode(record))
        os.replace(f"{path}.new", path)

    def load(self, identity: str) -> Record:
        """NotFound if there is no such container, Corrupt if its record cannot be read."""
        try:
            with open(self.path(identity, "state.json"), "rb") as file:
                return msgspec.json.decode(file.read(), type=Record)
        except FileNotFoundError:
            raise _missing(identity) from None
        except msgspec.MsgspecError as error:
            raise Corrupt(f"state of container {identity}: {error}") from None

    def save_spec(self, identity: str, spec: Spec, steps: list[str]) -> None:
        """Keep the configuration, and the names of the launch's steps."""
        with open(self.path(identity, "config.json"), "wb") as file:
            file.write(encode(spec))
        with open(self.path(identity, "steps.json"), "w", encoding="utf-8") as names:
            json.dump(steps, names)

    def spec(self, identity: str) -> Spec:
        """The configuration of a container."""
        with open(self.path(identity, "config.json"), "rb") as file:
            return decode(file.read())

    def steps(self, identity: str) -> list[str]:
        """The names of its launch's steps."""
        with open(self.path(identity, "steps.json"), encoding="utf-8") as file:
            names: list[str] = json.load(file)
            return names

    def remove(self, identity: str) -> None:
        """Forget the container: at once for everybody, then its files."""
        beside = f"{self.root}/{_BESIDE}{identity}.{os.getpid()}"
        os.rename(self.path(identity), beside)
        _discard(beside)

    def ids(self) -> list[str]:
        """Every id that is taken, in order."""
        try:
            names = os.listdir(self.root)
            return sorted(n for n in names if n != PLANNER and not n.startswith(_BESIDE))
        except FileNotFoundError:
            return []

    def status(self, record: Record) -> str:
        """ "creating", "created", "running", "paused" or "stopped", by what the kernel says."""
        if not record.pid:
            return "creating"
        if not alive(record):
            return "stopped"
        if os.path.exists(self.path(record.id, "start.fifo")):
            return "created"
        frozen = cgroups.detect().open(record.cgroup).frozen()
        return "paused" if frozen else "running"


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _discard(directory: str) -> None:
    """Remove a directory that did not become a container's."""
    if os.path.exists(directory):
        for name in os.listdir(directory):  # shutil would cost a command 5 ms of import
            try:
                os.unlink(f"{directory}/{name}")
            except IsADirectoryError:  # a restore was killed: its mount went with it
                os.rmdir(f"{directory}/{name}")
        os.rmdir(directory)


def alive(record: Record) -> bool:
    """Whether its first process is there and no zombie."""
    try:
        return procfs.start_time(record.pid) == record.start_time and procfs.state(
            record.pid
        ) not in ("Z", "X")
    except ProcessLookupError:
        return False


def _missing(identity: str) -> NotFound:
    return NotFound(f"container {identity!r} does not exist: container does not exist")


def state(record: Record, status: str) -> dict[str, object]:
    """The state of the runtime specification, as `state` prints it and hooks read it."""
    shown: dict[str, object] = {
        "ociVersion": record.oci_version,
        "id": record.id,
        "pid": 0 if status == "stopped" else record.pid,
        "status": status,
        "bundle": record.bundle,
    }
    if record.annotations:
        shown["annotations"] = record.annotations
    return shown
