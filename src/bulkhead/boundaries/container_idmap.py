"""User namespaces made ahead, and mounts seen through their id maps.

A container with a user namespace enters one that a short-lived helper process was born in: the maps
are written from outside before anything depends on them, the layers can be id-mapped with it, and a
network namespace that the host owns can be joined before it is entered.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable

from bulkhead.boundary.seam import Bundle, Launcher, LaunchRequest, Rootfs
from bulkhead.errors import Invalid, LaunchFailed
from bulkhead.isolation import idmap, mounts
from bulkhead.isolation import rootfs as root_plan
from bulkhead.linux import mounts as kernel
from bulkhead.linux import namespaces, prctl, syscall
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.program import Blob, Fd, Patched, Program
from bulkhead.oci.runtime import IDMapping

_ECANCELED = 125
_OPEN = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def _helper_program() -> tuple[bytes, list[str]]:
    """Send the namespace one was born in over a socket, and end; unix(7), cmsg(3)."""
    program = Program()
    step = "open the user namespace"
    flags = os.O_RDONLY | os.O_CLOEXEC
    opened = program.call(step, "openat", kernel.AT_FDCWD, "/proc/self/ns/user", flags, 0)
    step = "send the user namespace"
    control = Blob(struct.pack("=QiiiI", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, 0, 0))
    program.store(step, control, 16, 4, opened)
    vector = Blob(struct.pack("=QQ", 0, 1))
    program.store(step, vector, 0, 8, Blob(b"u"))
    # struct msghdr: name, its length, vector, its length, control, its length, flags.
    header = Patched(
        struct.pack("=QQQQQQQ", 0, 0, 0, 1, 0, len(control.data), 0),
        ((16, 8, vector), (32, 8, control)),
    )
    program.call(step, "sendmsg", Fd(0), header, 0)
    program.fail("end", _ECANCELED)
    compiled = program.compile()
    return compiled.data, compiled.steps


async def make_user_namespace(
    launcher: Launcher, identity: str, uids: list[IDMapping], gids: list[IDMapping]
) -> OwnedFd:
    """A user namespace with these maps; it lives as long as somebody uses or holds it.

    `identity` names the helper to the launcher. LaunchFailed if the kernel refuses the maps.
    """
    data, steps = _helper_program()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = LaunchRequest(
            id=f"{identity}/userns",
            program=data,
            clone_flags=namespaces.NEWUSER,
            fds=[theirs.fileno()],
            steps=steps,
            uid_map=idmap.to_text(uids),
            gid_map=idmap.to_text(gids),
        )
        try:
            await launcher.launch(request)
        except LaunchFailed as error:
            if error.errno != _ECANCELED or error.step != "end":
                raise
        _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_DONTWAIT)
        return OwnedFd(fds[0])


async def prepare(
    launcher: Launcher, bundle: Bundle, undo: contextlib.ExitStack
) -> dict[str, OwnedFd]:
    """Binds with id maps of their own, by the names that a plan has for them, closed by `undo`.

    The maps are from the ids of the files to the host's ids (config.md, "mounts"). LaunchFailed for
    a file system that cannot be mapped.
    """
    made: dict[str, OwnedFd] = {}
    for position, mount in enumerate(bundle.spec.mounts):
        if not mount.uid_mappings:
            continue
        if not mounts.is_bind(mount):
            raise Invalid(f"mount {mount.destination}: only binds can have id maps of their own")
        options = mounts.parse(mount.options)
        maps = mount.uid_mappings, mount.gid_mappings
        with await make_user_namespace(launcher, f"{bundle.id}/mount{position}", *maps) as userns:
            recursive = options.idmap == "ridmap"
            try:
                clone = kernel.clone_tree(mount.source, recursive=options.recursive_bind)
                undo.callback(clone.close)
                kernel.set_attributes(
                    int(clone), set_=kernel.ATTR_IDMAP, userns_fd=int(userns), recursive=recursive
                )
            except OSError as error:
                step = f"map the ids of {mount.source}"
                number = error.errno or 0
                text = f"{step}: {os.strerror(number)}"
                raise LaunchFailed(text, step=step, errno=number) from error
        if not options.propagation:
            private = kernel.MS_PRIVATE
            kernel.set_attributes(int(clone), propagation=private, recursive=True)
        made[f"mount{position}"] = clone
    return made


def mapped_tree(path: str, userns: OwnedFd, *, recursive: bool = False) -> OwnedFd:
    """A detached bind mount of `path` whose owners are seen through the namespace's maps."""
    with contextlib.ExitStack() as undo:
        clone = undo.enter_context(kernel.clone_tree(path, recursive=recursive))
        kernel.set_attributes(
            int(clone), set_=kernel.ATTR_IDMAP, userns_fd=int(userns), recursive=recursive
        )
        undo.pop_all()
        return clone


def detach_from_peers(root: OwnedFd) -> None:
    """A clone of a shared mount is shared, and pivot_root(2) refuses such a root."""
    kernel.set_attributes(int(root), propagation=kernel.MS_PRIVATE, recursive=True)


def mapped_root(rootfs: Rootfs, userns: OwnedFd, owner: tuple[int, int]) -> OwnedFd:
    """The root file system, detached, every layer and the upper directory id-mapped.

    `owner` are the host's ids of the namespace's root. An overlay cannot be id-mapped as a whole.
    OSError as from mount(2).
    """
    if rootfs.directory is not None:
        root = mapped_tree(rootfs.directory, userns)
        detach_from_peers(root)
        return root
    with contextlib.ExitStack() as undo:
        layers = [undo.enter_context(mapped_tree(path, userns)) for path in rootfs.lowers]
        options: list[str | tuple[str, str | int]] = [("source", "overlay")]
        options += [("lowerdir+", int(layer)) for layer in layers]
        if rootfs.upper is not None and rootfs.work is not None:
            folder = os.path.commonpath([rootfs.upper, rootfs.work])
            writable = undo.enter_context(mapped_tree(folder, userns))
            for name, path in (("upperdir", rootfs.upper), ("workdir", rootfs.work)):
                fd = os.open(os.path.relpath(path, folder), _OPEN, dir_fd=int(writable))
                undo.callback(os.close, fd)
                options.append((name, fd))
        options += root_plan.OVERLAY_OPTIONS
        return _in_thread(lambda: _mount_as(owner, options))


def _mount_as(owner: tuple[int, int], options: list[str | tuple[str, str | int]]) -> OwnedFd:
    """Mount an overlay as (uid, gid) with this thread's capabilities; for a thread that ends then.

    The overlay writes its upper layer with the credentials of who mounted it, and root of the host
    has no id in a mapped upper. Credentials are a thread's own as long as libc is not asked.
    """
    prctl.prctl(prctl.SET_SECUREBITS, prctl.SECBIT_NO_SETUID_FIXUP)
    uid, gid = owner
    syscall.call("setresgid", gid, gid, gid)
    syscall.call("setresuid", uid, uid, uid)
    return kernel.new_filesystem("overlay", options)


def sysfs_of(network_namespace: int, attributes: int) -> OwnedFd:
    """A detached sysfs that shows the given network namespace (a descriptor).

    Only the owner of a network namespace may mount its sysfs, so this process does it, in a
    thread that ends with the work.
    """

    def work() -> OwnedFd:
        namespaces.setns(network_namespace, namespaces.NEWNET)
        return kernel.new_filesystem("sysfs", [("source", "sysfs")], attributes)

    return _in_thread(work)


def _in_thread(work: Callable[[], OwnedFd]) -> OwnedFd:
    results: list[OwnedFd] = []
    errors: list[OSError] = []

    def run() -> None:
        try:
            results.append(work())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="sysfs")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
