"""The part of the runtime configuration that mounts. Pure."""

from bulkhead.engine import body
from bulkhead.engine.records import MountPoint
from bulkhead.oci import runtime as oci

INIT = "/dev/init"
"""Where `--init`'s program is bound: on our own /dev, so nothing is left in the writable layer."""
_FLAGS = ["nosuid", "noexec", "nodev"]


def defaults(host: body.HostConfig, *, host_network: bool) -> list[oci.Mount]:
    """The file systems every container has."""
    write = "rw" if host.privileged else "ro"
    mounts = [
        oci.Mount(destination="/proc", type_="proc", source="proc", options=list(_FLAGS)),
        oci.Mount(
            destination="/dev",
            type_="tmpfs",
            source="tmpfs",
            options=["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        oci.Mount(
            destination="/dev/pts",
            type_="devpts",
            source="devpts",
            options=["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _sysfs(write, host_network=host_network),
        oci.Mount(
            destination="/sys/fs/cgroup",
            type_="cgroup",
            source="cgroup",
            options=[*_FLAGS, "relatime", write],
        ),
    ]
    if host.ipc_mode == "host":
        for path in ("/dev/mqueue", "/dev/shm"):
            mounts.append(oci.Mount(destination=path, type_="bind", source=path, options=["rbind"]))
    else:
        mounts.append(
            oci.Mount(destination="/dev/mqueue", type_="mqueue", source="mqueue", options=_FLAGS)
        )
    return mounts


def _sysfs(write: str, *, host_network: bool) -> oci.Mount:
    if host_network:
        # sysfs shows its mounter's network namespace and may only be mounted by its owner.
        return oci.Mount(
            destination="/sys", type_="bind", source="/sys", options=["rbind", *_FLAGS, write]
        )
    return oci.Mount(destination="/sys", type_="sysfs", source="sysfs", options=[*_FLAGS, write])


def shm(host: body.HostConfig, shared: str | None) -> list[oci.Mount]:
    """/dev/shm: its own, another workload's (`shared` is its path), or none."""
    if host.ipc_mode in {"host", "none"}:
        return []
    if shared is not None:
        return [
            oci.Mount(destination="/dev/shm", type_="bind", source=shared, options=["rbind", "rw"])
        ]
    return [
        oci.Mount(
            destination="/dev/shm",
            type_="tmpfs",
            source="shm",
            options=[*_FLAGS, "mode=1777", f"size={host.shm_size}"],
        )
    ]


def point(mount: MountPoint, source: str, *, mapped: bool = False) -> oci.Mount:
    """One mount that was asked for; `source` is its directory on the host ("" for tmpfs).

    `mapped`: its owners are seen through the user namespace's maps (mount_setattr(2)).
    """
    if mount.type_ == "tmpfs":
        return oci.Mount(
            destination=mount.destination,
            type_="tmpfs",
            source="tmpfs",
            options=[*mount.options, *([] if mount.rw else ["ro"])],
        )
    options = ["rbind" if mount.recursive else "bind", mount.propagation or "rprivate"]
    if not mount.rw:
        recursive = mount.recursive and mount.recursive_read_only != "off"
        options.append("rro" if recursive else "ro")
    if mapped:
        options.append("idmap")
    return oci.Mount(destination=mount.destination, type_="bind", source=source, options=options)


def overlay(base: list[oci.Mount], own: list[oci.Mount]) -> list[oci.Mount]:
    """`base` without what `own` replaces, then `own`; parents before children."""
    places = {mount.destination for mount in own}
    kept = [mount for mount in base if mount.destination not in places]
    for place in ("/dev", "/sys", "/proc"):
        if place in places:
            kept = [mount for mount in kept if not mount.destination.startswith(f"{place}/")]
    return sorted([*kept, *own], key=lambda mount: mount.destination.rstrip("/").count("/"))
