"""What is remembered of a workload, and the table of all of them.

A `Record` is what the database holds. `Workload` is the record with what belongs to this engine's
life only: the instance behind the boundary, waiters, health, execs. All changes happen on the
loop; `Workload.lock` orders the operations of one workload.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.engine import body
from bulkhead.errors import Conflict, Invalid, NotFound
from bulkhead.machines import spec as machine_spec
from bulkhead.network.model import AttachRequest, EndpointRequest
from bulkhead.state.database import Database

if TYPE_CHECKING:
    from bulkhead.boundary.seam import Bundle, Instance
    from bulkhead.engine.health import Prober

UNKNOWN_EXIT = 255
RUNNING = frozenset({"running", "paused", "restarting"})


class MountPoint(msgspec.Struct, omit_defaults=True):
    """A resolved mount of a workload: as `inspect` shows it, and what makes it."""

    type_: str
    destination: str
    source: str = ""
    name: str = ""
    rw: bool = True
    mode: str = ""
    propagation: str = ""
    recursive: bool = True
    recursive_read_only: str = ""
    """"" (when the kernel can), "off" or "force"."""
    no_copy: bool = False
    subpath: str = ""
    anonymous: bool = False
    options: list[str] = []
    create: bool = False
    """Make a missing source directory at start, as `-v` does."""


class Record(msgspec.Struct, omit_defaults=True):
    """One workload. Times are nanoseconds since the epoch, 0 for never."""

    id: str
    name: str
    created_ns: int
    boundary: str
    image: str
    image_id: str
    config: body.Config
    host: body.HostConfig
    diff_ids: list[str] = []
    networks: dict[str, body.EndpointSettings] = {}
    mounts: list[MountPoint] = []
    args: list[str] = []
    platform: str = "linux"
    status: str = "created"
    pid: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    exit_code: int = 0
    exit_known: bool = True
    error: str = ""
    oom_killed: bool = False
    oom_text: str = ""
    restart_count: int = 0
    stopped_by_hand: bool = False
    removing: bool = False
    passing: bool = False
    """It is paused only for the length of an operation: an engine that finds it so thaws it."""
    boot_id: str = ""
    parent_made: str = ""
    """The topmost group above its own that we made for `--cgroup-parent`."""
    kernel: str = ""
    """The guest kernel that was asked for."""
    chosen: dict[str, Any] | None = None
    """Why the boundary is what it is, if the rules chose it (`--boundary auto`)."""
    vm: machine_spec.Spec | None = None
    """A whole machine's hardware; it has no image."""
    saved: str = ""
    """The snapshot that its first start goes on with."""
    building: bool = False
    """A step of a build: read when it has ended, then removed."""
    pinned: str = ""
    """Processors of its own, by a reservation of whole ones."""
    moving: str = ""
    """A move that is under way (engine/moving.py): "from ID", "to ID", or "gone"."""
    places: dict[str, EndpointRequest] = {}
    """By network: the addresses to start again with if the move fails."""
    emulated: str = ""
    """The architecture of its programs, if it is another machine's."""

    @property
    def durable(self) -> bool:
        """Whether this record is to survive a loss of power: not when a reboot deletes it."""
        return not (self.host.auto_remove or self.building)

    @property
    def mapped(self) -> bool:
        """Whether it has a user namespace of its own."""
        return bool(self.emulated) or self.host.userns_mode not in {"", "host"}

    @property
    def policy(self) -> str:
        """The restart policy's name, "no" when there is none."""
        policy = self.host.restart_policy
        return (policy.name if policy else "") or "no"


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


class Workload:
    """A record and what this engine knows besides."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.lock = asyncio.Lock()
        self.instance: Instance | None = None
        self.bundle: Bundle | None = None
        self.launch_number = 0
        """Counts launches, so that news of an earlier one is told from the present one's."""
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Done when the present (or next) run has ended and its output is complete."""
        self.gone: asyncio.Event = asyncio.Event()
        self.stopping = False
        self.keep = False
        """Not removed at its end though `--rm` says so: it is being restarted."""
        self.restart_timer: asyncio.Task[None] | None = None
        self.restart_delay_s = 0.0
        self.prober: Prober | None = None
        self.health: dict[str, Any] | None = None
        self.execs: dict[str, Any] = {}
        self.settings: dict[str, Any] | None = None
        self.attaching: Callable[[AttachRequest], AttachRequest] | None = None
        """What a move makes of its next request to the network."""
        self.private: Sequence[str] = ()
        """Variables of its program that no record may have: secrets of a build."""
        self.attached = 0
        self.attachment: asyncio.Future[str] | None = None
        """The keeper's answer to the attachment that this run began with."""
        self.cleaned: asyncio.Event = asyncio.Event()
        self.cleaned.set()

    @property
    def id(self) -> str:
        """The full id."""
        return self.record.id

    @property
    def running(self) -> bool:
        """Whether its first process lives, frozen or not."""
        return self.record.status in {"running", "paused"}

    def begin_run(self) -> None:
        """A fresh future for the run that starts now."""
        if self.ended.done():
            self.ended = asyncio.get_running_loop().create_future()


class Workloads:
    """All workloads, by id, name and unique prefix of an id; writes go to the database at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._by_id: dict[str, Workload] = {}
        self._names: dict[str, str] = {}
        self._discarded: list[str] = []
        """Forgotten, but still in the database."""
        self._unwritten: set[str] = set()
        """Known, but not yet in the database."""
        self._late: dict[str, Workload] = {}
        """Changed since they were written: the next transaction takes them along."""

    def load(self) -> None:
        """Read every record."""
        for (document,) in self._database.execute("SELECT document FROM workloads").fetchall():
            record = _decoder.decode(document)
            self._by_id[record.id] = Workload(record)
            self._names[record.name] = record.id

    def __iter__(self) -> Iterator[Workload]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def by_id(self, identity: str) -> Workload | None:
        """The workload with exactly this id."""
        return self._by_id.get(identity)

    def find(self, reference: str) -> Workload:
        """By id, name or unique id prefix; NotFound, or Invalid if several match."""
        text = reference.removeprefix("/")
        found = self._by_id.get(text)
        if found is not None:
            return found
        named = self._names.get(text)
        if named is not None:
            return self._by_id[named]
        matches = [one for key, one in self._by_id.items() if text and key.startswith(text)]
        if not matches:
            raise NotFound(f"No such container: {reference}")
        if len(matches) > 1:
            raise Invalid(f"Multiple IDs found with provided prefix: {reference}")
        return matches[0]

    def name_taken(self, name: str) -> str | None:
        """The id of the workload called so."""
        return self._names.get(name)

    def check_name(self, name: str) -> None:
        """Conflict if the name is taken."""
        owner = self._names.get(name)
        if owner is not None:
            raise Conflict(
                f'Conflict. The container name "/{name}" is already in use by container "{owner}". '
                "You have to remove (or rename) that container to be able to reuse that name."
            )

    def add(self, workload: Workload, *, later: bool = False) -> None:
        """Take in a new one; one commit, unless it is to be written by the first `save`."""
        record = workload.record
        self.check_name(record.name)
        if later:
            self._unwritten.add(record.id)
        else:
            self._write(record, durable=record.durable)
        self._by_id[record.id] = workload
        self._names[record.name] = record.id

    def save(self, workload: Workload, *, durable: bool | None = None) -> None:
        """Write its record; one commit, flushed to the disk unless it need not survive that."""
        record = workload.record
        if record.id in self._by_id:
            self._late.pop(record.id, None)
            self._write(record, durable=record.durable if durable is None else durable)
            self._unwritten.discard(record.id)

    def save_later(self, workload: Workload) -> None:
        """Have its record written with the next commit, or by `flush`; it is forgotten with it.

        For what a next engine finds out by itself from holder and kernel, a little while at least.
        """
        if workload.id in self._by_id:
            self._late[workload.id] = workload

    def written(self, workload: Workload) -> bool:
        """Whether the database knows of it."""
        return workload.id not in self._unwritten

    def _write(self, record: Record, *, durable: bool) -> None:
        with self._writing(durable):
            self._put(record)

    def _put(self, record: Record) -> None:
        self._database.execute(
            "INSERT INTO workloads VALUES (?,?,?,?) ON CONFLICT(id) DO UPDATE "
            "SET name=excluded.name, status=excluded.status, document=excluded.document",
            record.id,
            record.name,
            record.status,
            _encoder.encode(record).decode(),
        )

    def rename(self, workload: Workload, name: str) -> None:
        """Give it another name; Conflict if taken."""
        self.check_name(name)
        del self._names[workload.record.name]
        workload.record.name = name
        self._names[name] = workload.id
        self.save(workload)

    def exchange(self, one: Workload, other: Workload) -> None:
        """Let each have the other's name; one commit. NotFound if one is gone."""
        for workload in (one, other):
            if self._by_id.get(workload.id) is not workload:
                raise NotFound(f"No such container: {workload.record.name}")
        self.flush()  # with their names as they are: put off, one could meet the other's
        first, second = one.record, other.record
        before = first.name, second.name
        free, first.name, second.name = second.name, f"{second.name}.", first.name
        try:
            with self._writing(durable=True):
                for record in (first, second):  # at no time have two one name
                    self._put(record)
                first.name = free
                self._put(first)
        except BaseException:
            first.name, second.name = before
            raise
        for record in (first, second):
            self._names[record.name] = record.id

    def discard(self, workload: Workload) -> None:
        """Forget it; the last step of its removal.

        A record that need not survive a loss of power stays in the database until `flush`: an
        engine that finds it there removes it as if its workload had just ended.
        """
        record = workload.record
        self._late.pop(record.id, None)
        if record.id in self._unwritten:
            self._unwritten.discard(record.id)
        else:
            self._discarded.append(record.id)
        if record.durable:
            self.flush(durable=True)
        self._by_id.pop(record.id, None)
        if self._names.get(record.name) == record.id:
            del self._names[record.name]

    def flush(self, *, durable: bool = False) -> None:
        """Write what was to be written later, delete from the database what was discarded."""
        if self._discarded or self._late:
            with self._writing(durable):
                pass

    @contextlib.contextmanager
    def _writing(self, durable: bool) -> Iterator[None]:
        """A transaction, in which what was put off is done first."""
        with self._database.transaction(durable=durable):
            for identity in self._discarded:
                self._database.execute("DELETE FROM workloads WHERE id=?", identity)
            for workload in self._late.values():
                self._put(workload.record)
            yield
        self._discarded.clear()
        self._unwritten.difference_update(self._late)
        self._late.clear()

    def names(self) -> dict[str, str]:
        """Ids by name; not to be changed."""
        return self._names
