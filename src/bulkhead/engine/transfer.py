"""Workloads as files: what `export-workload` writes and `import-workload` reads.

A plain tar, in this order, each member but the first with its size and SHA-256 in the first:

    workload.json     version, name, boundary, configuration, networks, volumes, members
    image.tar         the image as `save` writes it, the writable layer as its last layer
    volumes/N.tar     one for each volume, its whole tree

Whoever reads it trusts nothing: members are copied and verified before anything is made of them;
the image comes in by the same way as any other, files of volumes by the same way as those of `cp`,
and the configuration is checked like any request. What would reach beyond the workload (host
folders, devices, namespaces of the host) is refused unless it was said to be trusted.
"""

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, BinaryIO, cast

import msgspec

from bulkhead.engine import body
from bulkhead.engine.records import MountPoint, Record
from bulkhead.errors import Corrupt, Denied, Invalid
from bulkhead.isolation.masks import MASKED_PATHS, READONLY_PATHS

if TYPE_CHECKING:
    from typing_extensions import Buffer

VERSION = 1
FIRST = "workload.json"
IMAGE = "image.tar"
_LARGEST_FIRST = 16 << 20
_MOST_MEMBERS = 4096
_PIECE = 1 << 20
_BLOCK = 512


class Member(msgspec.Struct, forbid_unknown_fields=True):
    """What a member must be."""

    name: str
    size: int
    sha256: str


class Volume(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A volume that goes with it."""

    destination: str
    member: str
    name: str = ""
    """"" for an anonymous one."""
    labels: dict[str, str] = {}
    options: dict[str, str] = {}


class Document(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The first member."""

    version: int
    name: str
    boundary: str
    image: str
    """Its id, the writable layer included."""
    reference: str
    """What it was called where it ran."""
    config: body.Config
    host: body.HostConfig
    networks: dict[str, body.EndpointSettings] = {}
    kernel: str = ""
    volumes: list[Volume] = []
    members: list[Member] = []


# --- what is written


def portable(record: Record) -> tuple[body.Config, body.HostConfig]:
    """The record's configuration as a request that means the same anywhere.

    Mounts are said one by one, as they were resolved; what belongs to this machine is left out.
    """
    plain = [p for p in record.mounts if p.type_ == "volume" and p.anonymous and p.rw]
    volumes: dict[str, object] | None = {point.destination: {} for point in plain} or None
    config = msgspec.structs.replace(record.config, volumes=volumes)
    if config.entrypoint is None:
        config.entrypoint = [""]  # none, whatever the image says
    if config.hostname == record.id[:12]:
        config.hostname = ""
    listed = [p for p in record.mounts if p.type_ != "tmpfs" and p not in plain]
    mounts = [mount(point) for point in listed]
    kept = [one for one in record.host.mounts or () if one.type_ == "tmpfs"]
    host = msgspec.structs.replace(
        record.host,
        binds=None,
        volumes_from=None,
        mounts=[*kept, *mounts] or None,
        container_id_file="",
        runtime="",
    )
    if record.host.userns_mode not in {"", "host"}:
        host.userns_mode = "auto"
    return config, host


def mount(point: MountPoint) -> body.Mount:
    """A mount as a request for the same."""
    made = body.Mount(target=point.destination, type_=point.type_, read_only=not point.rw)
    if point.type_ == "volume":
        made.source = "" if point.anonymous else point.name
        made.volume_options = body.VolumeOptions(no_copy=point.no_copy, subpath=point.subpath)
    else:
        made.source = point.source
        made.bind_options = body.BindOptions(
            propagation=point.propagation,
            non_recursive=not point.recursive,
            create_mountpoint=point.create,
        )
    return made


def networks(record: Record) -> dict[str, body.EndpointSettings]:
    """What was asked for of each network; what the engine filled in is left out."""
    kept = ("ipam_config", "links", "mac_address", "aliases", "driver_opts", "gw_priority")
    return {
        name: body.EndpointSettings(**{key: getattr(one, key) for key in kept})
        for name, one in record.networks.items()
    }


class Spool(io.RawIOBase):
    """A part on its way: an unnamed file beside the store, with its digest."""

    def __init__(self, name: str, directory: str) -> None:
        super().__init__()
        self.name = name
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: "Buffer") -> int:
        """Take `data` whole."""
        view = memoryview(data)
        self.file.write(view)
        self._hash.update(view)
        self.size += view.nbytes
        return view.nbytes

    def fill(self, chunks: Iterable[bytes]) -> None:
        """Take all of `chunks`."""
        for chunk in chunks:
            self.write(chunk)

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._hash.hexdigest()

    def begin(self) -> BinaryIO:
        """The file, to be read from its beginning."""
        self.file.flush()
        self.file.seek(0)
        return cast(BinaryIO, self.file)

    def close(self) -> None:
        """Forget it."""
        self.file.close()
        super().close()


def write(out: BinaryIO, document: Document, parts: list[Spool]) -> None:
    """The archive."""
    document.members = [Member(part.name, part.size, part.sha256) for part in parts]
    data = msgspec.json.format(msgspec.json.encode(document), indent=1)
    _member(out, FIRST, len(data), [data])
    for part in parts:
        _member(out, part.name, part.size, _pieces(part.begin()))
    _all(out, bytes(2 * _BLOCK))
    out.flush()


def _member(out: BinaryIO, name: str, size: int, pieces: Iterable[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    _all(out, info.tobuf(tarfile.GNU_FORMAT))
    for piece in pieces:
        _all(out, piece)
    _all(out, bytes(-size % _BLOCK))


def _all(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


# --- what is read


def read(stream: BinaryIO, directory: str, keep: Callable[[Spool], object]) -> Document:
    """The document; every other member, verified, is handed to `keep`. Invalid, Corrupt."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as tar:
            document = _first(tar)
            expected = {one.name: one for one in document.members}
            while (info := tar.next()) is not None:
                member = expected.pop(info.name, None)
                if member is None or not info.isreg():
                    raise Invalid(f"the archive's member {info.name!r} is not one of a workload's")
                _copy(tar, info, member, directory, keep)
    except tarfile.TarError as error:
        raise Invalid(f"this is no archive of a workload: {error}") from error
    if expected:
        raise Corrupt(f"the archive ends before its member {next(iter(expected))!r}")
    return document


def _first(tar: tarfile.TarFile) -> Document:
    info = tar.next()
    file = tar.extractfile(info) if info is not None and info.isreg() else None
    if info is None or file is None or info.name != FIRST or info.size > _LARGEST_FIRST:
        raise Invalid(f"this is no archive of a workload: {FIRST} does not come first")
    try:
        document = msgspec.json.decode(file.read(), type=Document)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{FIRST}: {error}") from error
    if document.version != VERSION:
        raise Invalid(f"{FIRST} is of version {document.version}; this engine reads {VERSION}")
    names = [one.name for one in document.members]
    wanted = [IMAGE, *(one.member for one in document.volumes)]
    if len(names) > _MOST_MEMBERS or sorted(names) != sorted(wanted) or FIRST in names:
        raise Invalid(f"{FIRST}: the members do not fit the image and the volumes")
    return document


def _copy(
    tar: tarfile.TarFile,
    info: tarfile.TarInfo,
    member: Member,
    directory: str,
    keep: Callable[[Spool], object],
) -> None:
    if info.size != member.size:
        raise Corrupt(f"{info.name} has {info.size} bytes, {FIRST} says {member.size}")
    file = tar.extractfile(info)
    assert file is not None
    part = Spool(info.name, directory)
    keep(part)
    part.fill(iter(lambda: file.read(_PIECE), b""))
    if part.sha256 != member.sha256:
        raise Corrupt(f"{info.name} does not have the digest that {FIRST} says")


def _harmless(option: str) -> bool:
    return option.startswith("no-new-privileges") or option == "seccomp=builtin"


def _lacks(paths: list[str] | None, usual: Iterable[str]) -> bool:
    """Whether a list leaves out some of the usual paths; None stands for all of them."""
    return paths is not None and not set(usual) <= set(paths)


def check_trust(document: Document) -> None:
    """Denied, with everything in it that reaches beyond the workload."""
    host = document.host
    reaching = [
        name
        for name, present in (
            ("--privileged", host.privileged),
            ("--device", bool(host.devices or host.device_cgroup_rules or host.device_requests)),
            ("--cap-add", bool(host.cap_add)),
            ("--security-opt", any(not _harmless(one) for one in host.security_opt or ())),
            ("--cgroup-parent", bool(host.cgroup_parent)),
            ("--volumes-from", bool(host.volumes_from)),
            ("unmasked paths", _lacks(host.masked_paths, MASKED_PATHS)),
            ("writable paths of /proc", _lacks(host.readonly_paths, READONLY_PATHS)),
            *(
                (f"--{word} {mode}", mode == "host" or mode.startswith("container:"))
                for word, mode in (
                    ("network", host.network_mode), ("pid", host.pid_mode),
                    ("ipc", host.ipc_mode), ("uts", host.uts_mode),
                    ("userns", host.userns_mode), ("cgroupns", host.cgroupns_mode),
                )
            ),
        )
        if present
    ]  # fmt: skip
    reaching += [
        f"the host's {mount.source}"
        for mount in host.mounts or ()
        if mount.type_ not in {"volume", "tmpfs"}
    ]
    reaching += [f"the host's {bind}" for bind in host.binds or ()]
    brought = {one.name for one in document.volumes}
    for mount in host.mounts or ():
        if mount.type_ == "volume" and mount.source and mount.source not in brought:
            reaching.append(f"the volume {mount.source}, which is not its own")
        if mount.volume_options and mount.volume_options.driver_config:
            reaching.append(f"a volume made with a driver's options at {mount.target}")
    reaching += [
        f"a volume that mounts {one.options.get('device', 'something')}"
        for one in document.volumes
        if one.options.keys() - {"size"}
    ]
    if reaching:
        raise Denied(
            f"this workload reaches beyond itself: {', '.join(reaching)}; "
            "if its maker is trusted: --trust"
        )
