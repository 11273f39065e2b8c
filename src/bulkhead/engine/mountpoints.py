"""From Docker's ways of asking for mounts to `MountPoint`s: -v, --mount, --tmpfs, VOLUME.

Pure, but for the look whether a bind's source exists. Docker's wording.
"""

import os
import posixpath
from collections.abc import Callable, Iterable

from bulkhead.engine import body
from bulkhead.engine.records import MountPoint
from bulkhead.errors import Invalid, Unsupported
from bulkhead.volumes.manager import check_name

PROPAGATIONS = frozenset({"private", "rprivate", "shared", "rshared", "slave", "rslave"})
_SELINUX = frozenset({"z", "Z"})
_IGNORED = frozenset({"", "consistent", "cached", "delegated"})
_TMPFS_DEFAULTS = ("noexec", "nosuid", "nodev")
_TMPFS_WORDS = frozenset(
    str.split(
        "rw ro suid nosuid dev nodev exec noexec sync async dirsync remount mand nomand atime "
        "noatime diratime nodiratime relatime norelatime strictatime nostrictatime "
        "private rprivate slave rslave shared rshared unbindable runbindable defaults swap noswap"
    )
)
_TMPFS_KEYS = frozenset({"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol", "huge"})


def clean_target(text: str) -> str:
    """A mount's place in the workload, normalised; Invalid if it is not absolute, or "/"."""
    if not text.startswith("/"):
        raise Invalid(f"invalid mount path: '{text}' mount path must be absolute")
    target = posixpath.normpath(text)
    target = "/" + target.lstrip("/")
    if target == "/":
        raise Invalid("invalid specification: destination can't be '/'")
    return target


def parse_bind(text: str) -> MountPoint:
    """One entry of HostConfig.Binds: SOURCE:TARGET[:MODES]."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 3 or not parts[0] or not parts[1]:
        raise Invalid(f"invalid volume specification: '{text}'")
    source, target, mode = parts[0], clean_target(parts[1]), parts[2] if len(parts) == 3 else ""
    bind = source.startswith("/")
    if not bind:
        check_name(source)
    point = MountPoint(
        type_="bind" if bind else "volume",
        destination=target,
        source=posixpath.normpath(source) if bind else "",
        name="" if bind else source,
        mode=mode,
        propagation="rprivate" if bind else "",
        create=bind,
    )
    access = [word for word in mode.split(",") if word in {"ro", "rw"}]
    for word in mode.split(","):
        _apply_mode(point, word, text, bind=bind)
    if len(access) > 1:
        raise Invalid(f"invalid mode: {mode}")
    return point


def _apply_mode(point: MountPoint, word: str, text: str, *, bind: bool) -> None:
    if word in _IGNORED or word in _SELINUX or word == "rw":
        return
    if word == "ro":
        point.rw = False
    elif word in PROPAGATIONS and bind:
        point.propagation = word
    elif word == "nocopy" and not bind:
        point.no_copy = True
    elif word == "bind-nonrecursive" and bind:
        point.recursive = False
    else:
        raise Invalid(f"invalid mode: {word} in volume specification '{text}'")


def _fail(kind: str, why: str) -> Invalid:
    return Invalid(f'invalid mount config for type "{kind}": {why}')


def parse_mount(mount: body.Mount) -> MountPoint:
    """One entry of HostConfig.Mounts; a bind's source must exist."""
    kind = mount.type_
    if not mount.target:
        raise _fail(kind, "field Target must not be empty")
    if not mount.target.startswith("/"):
        raise _fail(kind, f"invalid mount path: '{mount.target}' mount path must be absolute")
    maker = _KINDS.get(kind)
    if maker is None:
        if kind in {"image", "npipe", "cluster"}:
            raise Unsupported(f"mounts of type {kind} are not supported")
        raise Invalid(f'mount type unknown: "{kind}"')
    point = maker(mount)
    point.rw = not mount.read_only
    return point


def _from_bind(mount: body.Mount) -> MountPoint:
    if mount.volume_options or mount.tmpfs_options:
        raise _fail("bind", "only BindOptions may be given")
    if not mount.source:
        raise _fail("bind", "field Source must not be empty")
    if not mount.source.startswith("/"):
        raise _fail("bind", f"invalid mount path: '{mount.source}' mount path must be absolute")
    opts = mount.bind_options or body.BindOptions()
    if opts.propagation and opts.propagation not in PROPAGATIONS:
        raise _fail("bind", f"invalid propagation mode: {opts.propagation}")
    if not opts.create_mountpoint and not os.path.lexists(mount.source):
        raise _fail("bind", f"bind source path does not exist: {mount.source}")
    if opts.read_only_force_recursive and (opts.read_only_non_recursive or not mount.read_only):
        raise _fail("bind", "ReadOnlyForceRecursive needs a recursive read-only mount")
    return MountPoint(
        type_="bind",
        destination=clean_target(mount.target),
        source=posixpath.normpath(mount.source),
        propagation=opts.propagation or "rprivate",
        recursive=not opts.non_recursive,
        recursive_read_only=(
            "force"
            if opts.read_only_force_recursive
            else "off"
            if opts.read_only_non_recursive
            else ""
        ),
        create=opts.create_mountpoint,
    )


def _from_volume(mount: body.Mount) -> MountPoint:
    if mount.bind_options or mount.tmpfs_options:
        raise _fail("volume", "only VolumeOptions may be given")
    if mount.source:
        check_name(mount.source)
    opts = mount.volume_options or body.VolumeOptions()
    subpath = opts.subpath
    if subpath and (subpath.startswith("/") or ".." in subpath.split("/")):
        raise _fail("volume", f"subpath must be a relative path within the volume: {subpath}")
    return MountPoint(
        type_="volume",
        destination=clean_target(mount.target),
        name=mount.source,
        no_copy=opts.no_copy,
        subpath=subpath,
        anonymous=not mount.source,
        mode="z",
    )


def _from_tmpfs(mount: body.Mount) -> MountPoint:
    if mount.bind_options or mount.volume_options:
        raise _fail("tmpfs", "only TmpfsOptions may be given")
    if mount.source:
        raise _fail("tmpfs", "field Source must not be specified")
    opts = mount.tmpfs_options or body.TmpfsOptions()
    words = list(_TMPFS_DEFAULTS)
    if opts.size_bytes < 0:
        raise _fail("tmpfs", "size must be positive")
    if opts.size_bytes:
        words.append(f"size={opts.size_bytes}")
    words.append(f"mode={opts.mode or 0o1777:o}")
    for pair in opts.options or ():
        words.append("=".join(pair))
    return MountPoint(
        type_="tmpfs", destination=clean_target(mount.target), options=_override(words)
    )


_KINDS: dict[str, Callable[[body.Mount], MountPoint]] = {
    "bind": _from_bind,
    "volume": _from_volume,
    "tmpfs": _from_tmpfs,
}


def _override(words: Iterable[str]) -> list[str]:
    """Later words win over their opposites."""
    chosen: dict[str, str] = {}
    for word in words:
        key = word.partition("=")[0]
        if key in {"exec", "suid", "dev"}:
            chosen.pop(f"no{key}", None)
        elif key.removeprefix("no") in {"exec", "suid", "dev"}:
            chosen.pop(key.removeprefix("no"), None)
        elif key in {"ro", "rw"}:
            chosen.pop("ro" if key == "rw" else "rw", None)
        chosen[key] = word
    return list(chosen.values())


def parse_tmpfs(target: str, text: str) -> MountPoint:
    """One entry of HostConfig.Tmpfs; Docker's defaults are noexec, nosuid, nodev."""
    words = [word for word in text.split(",") if word]
    for word in words:
        key, separator, _ = word.partition("=")
        if separator and key not in _TMPFS_KEYS:
            raise Invalid(f'invalid tmpfs option "{word}"')
        if not separator and key not in _TMPFS_WORDS:
            raise Invalid(f'invalid tmpfs option ["{word}"]')
    options = _override([*_TMPFS_DEFAULTS, *words])
    return MountPoint(
        type_="tmpfs", destination=clean_target(target), options=options, rw="ro" not in options
    )


def parse_volumes_from(text: str) -> tuple[str, str]:
    """(workload, "ro" | "rw" | "") of one entry of VolumesFrom."""
    name, _, mode = text.partition(":")
    if not name:
        raise Invalid(f"malformed volumes-from specification: {text}")
    words = [word for word in mode.split(",") if word and word not in _SELINUX]
    if any(word not in {"ro", "rw", "nocopy"} for word in words):
        raise Invalid(f'invalid mode "{mode}" in volumes-from specification')
    return name, "ro" if "ro" in words else "rw" if "rw" in words else ""


def resolve(
    host: body.HostConfig,
    volumes: Iterable[str],
    inherited: Callable[[str], list[MountPoint]],
) -> list[MountPoint]:
    """Every mount of a workload, in the order they are made (parents first).

    `volumes` are the image's and request's VOLUME targets; `inherited` gives the mounts of the
    workload that VolumesFrom names. Names of anonymous volumes are still empty.
    """
    found: dict[str, MountPoint] = {}
    for entry in host.volumes_from or ():
        name, mode = parse_volumes_from(entry)
        for point in inherited(name):
            point.anonymous = False
            if mode == "ro":
                point.rw = False
            found[point.destination] = point
    explicit: dict[str, MountPoint] = {}
    for point in (
        *(parse_bind(text) for text in host.binds or ()),
        *(parse_mount(mount) for mount in host.mounts or ()),
        *(parse_tmpfs(target, text) for target, text in (host.tmpfs or {}).items()),
    ):
        if point.destination in explicit:
            raise Invalid(f"Duplicate mount point: {point.destination}")
        explicit[point.destination] = point
    found.update(explicit)
    for target in volumes:
        place = clean_target(target)
        if place not in found:
            found[place] = MountPoint(type_="volume", destination=place, anonymous=True)
    return sorted(found.values(), key=lambda point: point.destination.count("/"))
