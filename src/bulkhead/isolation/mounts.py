"""The mounts of a configuration: options as data, and the steps that make each mount."""

from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.errors import Invalid
from bulkhead.linux import mounts as kernel
from bulkhead.linux.program import Argument, Fd, Program, Slot
from bulkhead.linux.tree import Tree
from bulkhead.oci.runtime import Mount

_SET: dict[str, int] = {
    "ro": kernel.ATTR_RDONLY,
    "nosuid": kernel.ATTR_NOSUID,
    "nodev": kernel.ATTR_NODEV,
    "noexec": kernel.ATTR_NOEXEC,
    "nodiratime": kernel.ATTR_NODIRATIME,
    "nosymfollow": kernel.ATTR_NOSYMFOLLOW,
}
_CLEAR: dict[str, int] = {
    "rw": kernel.ATTR_RDONLY,
    "suid": kernel.ATTR_NOSUID,
    "dev": kernel.ATTR_NODEV,
    "exec": kernel.ATTR_NOEXEC,
    "diratime": kernel.ATTR_NODIRATIME,
    "symfollow": kernel.ATTR_NOSYMFOLLOW,
}
_ATIME: dict[str, int] = {
    "relatime": kernel.ATTR_RELATIME,
    "atime": kernel.ATTR_RELATIME,
    "norelatime": kernel.ATTR_STRICTATIME,
    "noatime": kernel.ATTR_NOATIME,
    "strictatime": kernel.ATTR_STRICTATIME,
    "nostrictatime": kernel.ATTR_RELATIME,
}
_PROPAGATION: dict[str, int] = {
    "private": kernel.MS_PRIVATE,
    "shared": kernel.MS_SHARED,
    "slave": kernel.MS_SLAVE,
    "unbindable": kernel.MS_UNBINDABLE,
}
_IGNORED = frozenset({"defaults", "async", "nomand", "silent", "loud", "nolazytime", "noiversion"})
_FLAGS = frozenset({"sync", "dirsync", "lazytime", "mand", "iversion"})
"""Options of a file system without a value."""


@dataclass(frozen=True, slots=True)
class Options:
    """Parsed options of one mount."""

    bind: bool = False
    recursive_bind: bool = False
    attributes: int = 0
    clear: int = 0
    recursive_attributes: int = 0
    recursive_clear: int = 0
    propagation: int = 0
    recursive_propagation: bool = False
    idmap: str = ""
    """"idmap" or "ridmap"."""
    copy_up: bool = False
    data: tuple[str, ...] = ()
    """For the file system: "name" or "name=value"."""


def parse(options: Sequence[str]) -> Options:
    """The meaning of `options`; what is not known is for the file system itself."""
    found = Options()
    attributes = clear = recursive_attributes = recursive_clear = propagation = 0
    bind = recursive_bind = recursive_propagation = copy_up = False
    idmap = ""
    data: list[str] = []
    for option in options:
        recursive = option[:1] == "r" and option[1:] in _RECURSIVE
        name = option[1:] if recursive else option
        if name in _SET or name in _CLEAR or name in _ATIME:
            on, off = _bits(name)
            if recursive:
                recursive_attributes = recursive_attributes & ~off | on
                recursive_clear = recursive_clear & ~on | off
            else:
                attributes = attributes & ~off | on
                clear = clear & ~on | off
        elif name in _PROPAGATION:
            propagation, recursive_propagation = _PROPAGATION[name], recursive
        elif name == "bind":
            bind, recursive_bind = True, recursive_bind or recursive
        elif option in ("idmap", "ridmap"):
            idmap = option
        elif option == "tmpcopyup":
            copy_up = True
        elif option and option not in _IGNORED:
            data.append(option)
    return Options(
        bind,
        recursive_bind,
        attributes,
        clear,
        recursive_attributes,
        recursive_clear,
        propagation,
        recursive_propagation,
        idmap or found.idmap,
        copy_up,
        tuple(data),
    )


_RECURSIVE = frozenset({*_SET, *_CLEAR, *_ATIME, *_PROPAGATION, "bind"})


def _bits(name: str) -> tuple[int, int]:
    """(attributes to set, attributes to clear) of an option."""
    if name in _SET:
        return _SET[name], 0
    if name in _CLEAR:
        return 0, _CLEAR[name]
    return _ATIME[name], kernel.ATTR_ATIME


def option_names() -> list[str]:
    """Every option of a mount that is known here; others go to the file system."""
    plain = {*_SET, *_CLEAR, *_ATIME, *_PROPAGATION, *_IGNORED, *_FLAGS, "bind", "idmap"}
    return sorted(plain | {"ridmap", "tmpcopyup"} | {f"r{name}" for name in _RECURSIVE})


def is_bind(mount: Mount) -> bool:
    """Whether `mount` shows files that exist, rather than a new file system."""
    return mount.type_ == "bind" or "bind" in mount.options or "rbind" in mount.options


def plan_filesystem(
    program: Program,
    step: str,
    fstype: str,
    source: str = "",
    data: Sequence[str] = (),
    attributes: int = 0,
) -> Slot:
    """A new detached file system; the slot is its mount."""
    context = program.call(step, "fsopen", fstype, kernel.FSOPEN_CLOEXEC)
    if source:
        _string(program, step, context, "source", source)
    for option in data:
        name, equals, value = option.partition("=")
        if equals:
            _string(program, step, context, name, value)
        else:
            program.call(step, "fsconfig", context, kernel.FSCONFIG_SET_FLAG, name, None, 0)
    program.call(step, "fsconfig", context, kernel.FSCONFIG_CMD_CREATE, None, None, 0)
    return program.call(step, "fsmount", context, kernel.FSMOUNT_CLOEXEC, attributes)


def _string(program: Program, step: str, context: Slot, name: str, value: Argument) -> None:
    program.call(step, "fsconfig", context, kernel.FSCONFIG_SET_STRING, name, value, 0)


def plan_attributes(
    program: Program,
    step: str,
    mount: Argument,
    *,
    set_: int = 0,
    clear: int = 0,
    propagation: int = 0,
    recursive: bool = False,
) -> None:
    """mount_setattr(2) on the mount of a descriptor."""
    flags = kernel.AT_EMPTY_PATH | (kernel.AT_RECURSIVE if recursive else 0)
    data = kernel.mount_attr(set_, clear, propagation)
    program.call(step, "mount_setattr", mount, "", flags, data, kernel.ATTR_SIZE)


def plan_new(tree: Tree, mount: Mount, *, attributes: int | None = None) -> Slot:
    """A file system of `mount`'s type at its destination; the slot is its mount."""
    options = parse(mount.options)
    if options.copy_up:
        raise Invalid(f"mount {mount.destination}: tmpcopyup goes with a tmpfs made before")
    step = f"mount {mount.type_} on {mount.destination}"
    wanted = options.attributes | options.recursive_attributes
    created = plan_filesystem(
        tree.program,
        step,
        mount.type_,
        mount.source or mount.type_,
        options.data,
        wanted if attributes is None else attributes,
    )
    tree.attach(step, created, mount.destination, directory=True)
    tree.made(mount.destination, created)
    if options.propagation:
        _propagate(tree.program, step, created, options)
    return created


def _propagate(program: Program, step: str, mount: Slot, options: Options) -> None:
    plan_attributes(
        program,
        step,
        mount,
        propagation=options.propagation,
        recursive=options.recursive_propagation,
    )


def plan_bind(
    tree: Tree, mount: Mount, source: Argument, *, directory: bool, slave_start: bool
) -> None:
    """Show `source`, a path of the host, or a prepared detached mount (an Fd), at the destination.

    `directory`: what the source is. `slave_start`: the child's mounts are slaves of the host's
    rather than private, so that a bind that did not ask for it must be made private.
    """
    program, options = tree.program, parse(mount.options)
    step = f"bind a host path on {mount.destination}"
    if isinstance(source, Fd):
        clone: Argument = source
    else:
        flags = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC
        flags |= kernel.AT_RECURSIVE if options.recursive_bind else 0
        clone = program.call(step, "open_tree", kernel.AT_FDCWD, source, flags)
    propagation = options.propagation
    recursive_propagation = options.recursive_propagation
    if slave_start and not propagation:
        propagation, recursive_propagation = kernel.MS_PRIVATE, True
    _attributes(program, step, clone, options, propagation, recursive_propagation)
    tree.attach(step, clone, mount.destination, directory=directory)
    tree.covered(mount.destination)


def _attributes(
    program: Program,
    step: str,
    clone: Argument,
    options: Options,
    propagation: int,
    recursive_propagation: bool,
) -> None:
    """As few mount_setattr(2) as the options allow: what is recursive, then what is not."""
    set_, clear = options.attributes, options.clear
    if propagation == kernel.MS_PRIVATE and not recursive_propagation and not _deep(options):
        recursive_propagation = False
    if _deep(options) or recursive_propagation:
        plan_attributes(
            program,
            step,
            clone,
            set_=options.recursive_attributes,
            clear=options.recursive_clear,
            propagation=propagation if recursive_propagation else 0,
            recursive=True,
        )
    shallow = 0 if recursive_propagation else propagation
    if set_ or clear & ~kernel.ATTR_RDONLY or shallow:
        plan_attributes(program, step, clone, set_=set_, clear=clear, propagation=shallow)


def _deep(options: Options) -> bool:
    return bool(options.recursive_attributes or options.recursive_clear)


def plan_cgroup_v2(tree: Tree, mount: Mount) -> None:
    """The unified hierarchy as the child's cgroup namespace shows it."""
    options = parse(mount.options)
    step = f"mount cgroup2 on {mount.destination}"
    created = plan_filesystem(
        tree.program, step, "cgroup2", "cgroup", options.data, options.attributes
    )
    tree.attach(step, created, mount.destination, directory=True)


def plan_cgroup_v1(tree: Tree, mount: Mount, views: Sequence[tuple[str, Argument]]) -> None:
    """The container's own directory of every hierarchy, side by side, as Docker shows them.

    `views` are (name below the destination, path on the host). One attribute change at the end
    covers them all.
    """
    program, options = tree.program, parse(mount.options)
    step = f"mount cgroups on {mount.destination}"
    base = plan_filesystem(program, step, "tmpfs", "tmpfs", ("mode=755",))
    tree.attach(step, base, mount.destination, directory=True)
    flags = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC
    for name, path in views:
        shown = f"mount cgroup {name} on {mount.destination}/{name}"
        program.call(shown, "mkdirat", base, name, 0o755)
        view = program.call(shown, "open_tree", kernel.AT_FDCWD, path, flags)
        program.call(shown, "move_mount", view, "", base, name, kernel.MOVE_MOUNT_F_EMPTY_PATH)
    for alias, target in sorted(aliases([name for name, _ in views]).items()):
        program.call(f"name cgroup {alias}", "symlinkat", target, base, alias)
    if options.attributes:
        plan_attributes(
            program, f"restrict {mount.destination}", base, set_=options.attributes, recursive=True
        )
    tree.covered(mount.destination)


def aliases(names: Sequence[str]) -> dict[str, str]:
    """Single names of hierarchies that hold several controllers ("cpu" of "cpu,cpuacct")."""
    return {part: name for name in names if "," in name for part in name.split(",")}
