"""Files and processes of workloads with a kernel of their own: copying, diff, export, commit, top.

Only its own kernel sees into a workload there. One that runs is asked through its monitor; for one
that does not, a guest is booted that shows its files (boundaries/guest/shown.py). The answers are
hostile: names are checked, nothing is written to the host by name, memory is bounded.
"""

import asyncio
import contextlib
import functools
import os
import posixpath
import shutil
import socket
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from bulkhead.boundaries.guest import shown, tree
from bulkhead.boundaries.guest.instance import Guest, GuestBoundary
from bulkhead.boundaries.guest.interior import Interior, Sink, chunks
from bulkhead.boundaries.guest.tree import Entry
from bulkhead.boundary.seam import Bundle, Rootfs
from bulkhead.engine import archive, copyup, guests, launching, table, views
from bulkhead.engine.health import moment
from bulkhead.engine.records import MountPoint, Workload
from bulkhead.errors import Conflict, Denied, Invalid, NotFound, Unavailable, Unsupported
from bulkhead.images.catalog import Image
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Linux, Spec
from bulkhead.store import diff, tar_write

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_T = TypeVar("_T")
MOST = 1 << 20
"""Files with several names, and files in a list of changes, that are remembered."""
_GENERATED = frozenset({b"etc/hosts", b"etc/hostname", b"etc/resolv.conf"})
_MOUNTED = frozenset({"/dev", "/proc", "/sys", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"})
_CHUNK = 1 << 20
_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.LNKTYPE: stat.S_IFREG,
}


async def with_interior(
    engine: "Engine", workload: Workload, action: Callable[[Interior], _T]
) -> _T:
    """`action`, in a thread, with the inside of the workload; it cannot be started meanwhile."""
    if workload.running:
        instance: object = workload.instance
        if instance is not None and not isinstance(instance, Guest):
            raise Unsupported(
                f"the kernel of {workload.record.name} shows nobody its files and processes: "
                f"bulkhead exec {workload.record.name} looks at them from inside"
            )
        if instance is None:
            raise Unavailable(f"container {workload.record.name} is just ending; try again")
        interior = instance.interior()
        return await views.in_thread(lambda: action(interior), private=False)
    async with workload.lock:
        if workload.running:
            raise Conflict(f"container {workload.record.name} has just been started; try again")
        if workload.record.removing:
            raise Conflict(f"container {workload.record.name} is being removed")
        await workload.cleaned.wait()
        return await _shown(engine, workload, action)


async def _shown(engine: "Engine", workload: Workload, action: Callable[[Interior], _T]) -> _T:
    record = workload.record
    boundary = engine.boundary(record.boundary)
    if not isinstance(boundary, GuestBoundary):
        raise Unsupported(f"the boundary {record.boundary} does not show files: start it first")
    launching.make_directories(engine.home, record.id)
    name = f"{shown.PREFIX}{os.urandom(8).hex()}"
    directory = engine.home.in_run("looks", name)
    bundle = Bundle(
        id=name,
        spec=Spec(linux=Linux(cgroups_path=f"{engine.cgroup_parent}/{name}")),
        rootfs=await guests.rootfs(engine, record, Rootfs()),
        directory=directory,
        kernel=record.kernel,
    )
    try:
        async with shown.shown(boundary, bundle) as interior:
            return await views.in_thread(lambda: action(interior), private=False)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# --- volumes of one that does not run ------------------------------------------------------------


def volume_of(workload: Workload, path: str) -> tuple[MountPoint, str] | None:
    """The bind or volume that `path` of a workload that does not run lies in, and the rest."""
    clean = posixpath.normpath("/" + path).replace("//", "/")
    best: tuple[MountPoint, str] | None = None
    for point in workload.record.mounts:
        place = point.destination.rstrip("/")
        inside = clean == place or clean.startswith(f"{place}/")
        deeper = best is None or len(best[0].destination) < len(place)
        if inside and deeper and point.type_ in {"bind", "volume"}:
            best = point, clean[len(place) :] or "/"
    if best is None or workload.running:
        return None
    return best[0], best[1] + ("/" if path.endswith("/") else "")


async def _in_volume(
    engine: "Engine", workload: Workload, point: MountPoint, action: Callable[[int], _T]
) -> _T:
    """`action` with a descriptor of the directory behind a mount, of one that does not run."""
    async with workload.lock:
        if workload.running:
            raise Conflict(f"container {workload.record.name} has just been started; try again")
        source = point.source
        if point.type_ == "volume":
            if point.name not in engine.volumes:
                raise NotFound(f"get {point.name}: no such volume")
            settle = functools.partial(engine.volumes.settle, point.name, workload.id)
            await engine.blocking(settle)
            source = engine.volumes.hold(point.name, workload.id)
        try:
            if point.type_ == "volume" and point.subpath:
                source = copyup.subdirectory(source, point.subpath)
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            try:
                root = OwnedFd(os.open(source, flags))
            except NotADirectoryError:
                raise Unsupported(
                    f"{point.destination} is a single file of the host: copy it there"
                ) from None
            with root:
                return await views.in_thread(lambda: action(int(root)), private=False)
        finally:
            engine.volumes.release(workload.id)


# --- cp ------------------------------------------------------------------------------------------


async def describe(engine: "Engine", workload: Workload, path: str) -> dict[str, Any]:
    """Docker's ContainerPathStat of `path`."""
    name = workload.record.name
    volume = volume_of(workload, path)
    if volume is not None:
        point, rest = volume
        found = await _in_volume(
            engine, workload, point, lambda root: archive.describe(root, rest, name)
        )
        if rest.strip("/") == "":
            found["name"] = posixpath.basename(point.destination)
        return found
    directory, last = archive.split(path)
    with _explained(name, path):
        entry = await with_interior(engine, workload, lambda inside: inside.stat(directory, last))
    return _described(entry, directory, last)


def _described(entry: Entry, directory: str, name: str) -> dict[str, Any]:
    link = ""
    if stat.S_ISLNK(entry.mode):
        link = posixpath.normpath(posixpath.join(directory, os.fsdecode(entry.link)))
    return {
        "name": name or posixpath.basename(directory) or "/",
        "size": entry.size,
        "mode": archive.go_mode(entry.mode),
        "mtime": moment(entry.mtime_ns),
        "linkTarget": link,
    }


@contextlib.contextmanager
def _explained(name: str, path: str, what: str = "read") -> Iterator[None]:
    try:
        yield
    except NotFound:
        raise archive.missing(name, path) from None
    except BrokenPipeError:
        return  # the client has seen enough
    except tree.Failure as error:
        raise Invalid(f"cannot {what} {path} in container {name}: {error.message}") from error


async def get(
    engine: "Engine", workload: Workload, path: str, take: Callable[[], OwnedFd]
) -> dict[str, Any]:
    """Write the tar of `path` to the descriptor; its ContainerPathStat."""
    name = workload.record.name
    volume = volume_of(workload, path)
    if volume is not None:
        described = await describe(engine, workload, path)
        point, rest = volume

        def work(root: int) -> None:
            with os.fdopen(take().take(), "wb") as out:
                archive.write(root, rest, out, name)

        await _in_volume(engine, workload, point, work)
        return described
    directory, last = archive.split(path)
    found: dict[str, Any] = {}

    def handle(reader: tree.Reader) -> None:
        entries = iter(reader)
        first = next(entries)
        found.update(_described(first, directory, last))
        top = os.fsencode(last or posixpath.basename(directory))
        with take() as out:
            chunks(tar(reader, renamed(first, entries, top)), int(out))

    with _explained(name, path):
        await with_interior(engine, workload, lambda inside: inside.get(directory, last, handle))
    if not found:
        raise archive.missing(name, path)
    return found


def renamed(first: Entry, rest: Iterator[Entry], top: bytes) -> Iterator[Entry]:
    """Entries below `top`, the first being that itself; b"" for the root: a place without name."""
    first.path = top or b"."
    yield first
    for entry in rest:
        tree.check(entry.path)
        if not entry.path:
            raise Unavailable("the guest sent a file without a name")
        if top:
            entry.path = top + b"/" + entry.path
        yield entry


def tar(reader: tree.Reader, entries: Iterable[Entry], *, layer: bool = False) -> Iterator[bytes]:
    """The entries as a tar; `layer`: as an OCI layer, whiteouts as names."""
    links: dict[tuple[int, int], bytes] = {}
    for entry in entries:
        if layer and entry.is_whiteout:
            parent, _, name = entry.path.rpartition(b"/")
            place = parent + b"/" if parent else b""
            yield from tar_write.member(place + b".wh." + name, b"")
            continue
        if stat.S_ISSOCK(entry.mode):
            continue  # a socket without its process means nothing
        link, hard = b"", False
        if not entry.is_directory and entry.nlink > 1:
            if len(links) >= MOST:
                raise Invalid(f"more than {MOST} files have several names")
            link = links.setdefault(entry.inode, entry.path)
            hard = link != entry.path
        if not hard:
            link = entry.link if stat.S_ISLNK(entry.mode) else b""
        size = 0 if hard else entry.size
        yield tar_write.header(
            entry.path + (b"/" if entry.is_directory else b""),
            entry.mode, entry.uid, entry.gid, size, entry.mtime_ns,
            link=link, hard=hard, device=entry.device, xattrs={} if hard else dict(entry.xattrs),
        )  # fmt: skip
        if size:
            yield from reader.contents()
            yield tar_write.padding(size)
        if layer and entry.opaque and entry.is_directory:
            yield from tar_write.member(entry.path + b"/.wh..wh..opq", b"")
    yield tar_write.END


async def put(
    engine: "Engine",
    workload: Workload,
    path: str,
    take: Callable[[], OwnedFd],
    options: archive.Options,
) -> None:
    """Write the members of the tar from the descriptor below the directory `path`."""
    name = workload.record.name
    if options.readonly:
        raise Denied("container rootfs is marked read-only")
    volume = volume_of(workload, path)
    if volume is not None:
        point, rest = volume
        if not point.rw:
            raise Denied(f"mount {point.destination} is read-only")

        def work(root: int) -> None:
            with os.fdopen(take().take(), "rb") as stream:
                archive.extract(root, rest, stream, options, name)

        await _in_volume(engine, workload, point, work)
        return
    directory = posixpath.normpath("/" + path)

    def send(inside: Interior) -> None:
        with os.fdopen(take().take(), "rb") as stream:
            inside.put(
                directory, lambda sink: _send(sink, stream, options), keep_kinds=options.keep_kinds
            )

    with _explained(name, path, "write to"):
        await with_interior(engine, workload, send)


def _send(sink: Sink, stream: BinaryIO, options: archive.Options) -> None:
    """The members of an archive as entries."""
    try:
        for member, archive_ in archive.members(stream):
            entry = _entry(member, options)
            if entry is None:
                continue
            sink(tree.encode(entry, hard=member.islnk()))
            if member.isreg():
                source = archive_.extractfile(member)
                assert source is not None
                while data := source.read(_CHUNK):
                    sink(data)
    except tarfile.TarError as error:
        raise Invalid(f"the archive cannot be read: {error}") from error
    sink(tree.END)


def _entry(member: tarfile.TarInfo, options: archive.Options) -> Entry | None:
    parts = [part for part in member.name.split("/") if part not in {"", "."}]
    if ".." in parts or "\0" in member.name:
        raise Invalid(f"the archive's member {member.name!r} leads out of its place")
    if not parts:
        return None
    kind = stat.S_IFREG if member.isreg() else _KINDS.get(member.type)
    if kind is None:
        raise Invalid(f"the archive's member {member.name!r} is of a kind that cannot be written")
    link = b""
    if member.islnk():
        there = [part for part in member.linkname.split("/") if part not in {"", "."}]
        if ".." in there or not there:
            raise Invalid(f"the archive's link {member.name!r} leads out of its place")
        link = os.fsencode("/".join(there))
    elif member.issym():
        link = os.fsencode(member.linkname)
    uid, gid = options.owner if options.owner is not None else (member.uid, member.gid)
    return Entry(
        path=os.fsencode("/".join(parts)),
        mode=kind | (member.mode & 0o7777),
        uid=uid,
        gid=gid,
        size=member.size if member.isreg() else 0,
        mtime_ns=int(float(member.mtime) * 10**9),
        link=link,
        device=(member.devmajor, member.devminor) if member.isdev() else (0, 0),
        xattrs=archive.attributes(member),
    )


# --- diff, export, commit ------------------------------------------------------------------------


async def changes(engine: "Engine", workload: Workload) -> list[dict[str, Any]]:
    """Docker's `diff`: what the writable layer changes, without what only mounts made."""
    lowers = await engine.lowers(workload.record.diff_ids)

    def collect(reader: tree.Reader) -> list[Entry]:
        found = []
        for entry in _layer(reader):
            found.append(entry)
            if len(found) > MOST:
                raise Invalid(f"more than {MOST} files have changed")
        return found

    with _explained(workload.record.name, "/"):
        entries = await with_interior(
            engine, workload, lambda inside: inside.upper(collect, contents=False)
        )
    found = await engine.blocking(lambda: diff.changes_of(entries, lowers))
    ours = _ours(workload, entries)
    around = {parent for path in ours for parent in _parents(path)}
    theirs = [(kind, path) for kind, path in found if path not in ours]
    kept = {parent for _, path in theirs if path not in around for parent in _parents(path)}
    return [
        {"Path": path, "Kind": kind} for kind, path in theirs if path not in around or path in kept
    ]


def _ours(workload: Workload, entries: list[Entry]) -> set[str]:
    """Paths of empty files and directories that are only places of mounts."""
    places = _MOUNTED | {point.destination for point in workload.record.mounts}
    full = {entry.path.rpartition(b"/")[0] for entry in entries}
    return {
        path
        for entry in entries
        if (path := "/" + os.fsdecode(entry.path)) in places
        and not (entry.size if stat.S_ISREG(entry.mode) else entry.path in full)
    }


def _parents(path: str) -> Iterator[str]:
    while (path := posixpath.dirname(path)) != "/":
        yield path


def _layer(reader: tree.Reader) -> Iterator[Entry]:
    """The entries of a writable layer, without its root."""
    for entry in reader:
        tree.check(entry.path)
        if entry.path:
            yield entry


def committed(reader: tree.Reader) -> Iterator[Entry]:
    """The entries of a writable layer, without the empty places of the engine's files."""
    for entry in _layer(reader):
        empty = stat.S_ISREG(entry.mode) and not entry.size
        if not (entry.path in _GENERATED and empty):
            yield entry


async def commit(
    engine: "Engine", workload: Workload, make: Callable[[Iterator[bytes]], Image], *, pause: bool
) -> Image:
    """The image that `make` makes of the writable layer's archive; `pause`: it stands still."""
    handle: Callable[[tree.Reader], Image] = lambda reader: make(  # noqa: E731
        tar(reader, committed(reader), layer=True)
    )
    freeze = pause and workload.running
    with _explained(workload.record.name, "/"):
        return await with_interior(
            engine, workload, lambda inside: inside.upper(handle, contents=True, freeze=freeze)
        )


async def export(engine: "Engine", workload: Workload, out: OwnedFd) -> None:
    """The tar of the whole root, without volumes, to the descriptor."""
    layers = len((await guests.rootfs(engine, workload.record, Rootfs())).layer_files)

    def handle(reader: tree.Reader) -> None:
        with out:
            chunks(tar(reader, _layer(reader)), int(out))

    with _explained(workload.record.name, "/"):
        await with_interior(engine, workload, lambda inside: inside.export(layers, handle))


# --- processes -----------------------------------------------------------------------------------


async def top(engine: "Engine", workload: Workload, ps_args: str) -> dict[str, Any]:
    """Docker's ContainerTop, with the process ids of the guest."""
    instance: object = workload.instance
    memory = instance.memory() if isinstance(instance, Guest) else 0

    def ask(inside: Interior) -> dict[str, Any]:
        wanted = table.columns(ps_args)
        uptime_s = inside.uptime_s()
        found = [
            process
            for line, command, uid, gid in inside.processes()
            if (process := table.parse(line, command, uid, gid)) is not None
        ]
        return table.shown(found, wanted, now=time.time(), uptime_s=uptime_s, memory=memory or 1)

    return await with_interior(engine, workload, ask)


async def usage(engine: "Engine", workload: Workload) -> dict[str, Any]:
    """What the workload uses in its guest, in the shape of Docker's statistics."""
    found = await with_interior(engine, workload, lambda inside: inside.usage())
    instance: object = workload.instance
    if isinstance(instance, Guest) and (given := await asyncio.to_thread(instance.given_back)):
        found["memory_stats"]["given_back"] = given
    return found


async def connect(workload: Workload, address: str, port: int) -> socket.socket:
    """A TCP connection from inside the guest, where localhost is its own; OSError.

    It is handed on through the monitor, and ends with the socket.
    """
    instance: object = workload.instance
    if not isinstance(instance, Guest):
        raise Unsupported(f"{workload.record.name} has nothing to connect from")
    inside = instance.interior()
    return await views.in_thread(lambda: inside.connect(address, port), private=False)
