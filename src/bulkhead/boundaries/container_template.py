"""Launch programs by the shape of their configuration: a repeated launch compiles nothing.

What differs between two containers of one kind (host name, arguments, environment, paths) are holes
of the compiled program; everything else is the shape, by which programs are kept.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from bulkhead.boundaries.container_plan import Ground, Template, plan_launch
from bulkhead.boundaries.container_process import Filter, candidates
from bulkhead.boundary.seam import Rootfs, Stdio
from bulkhead.errors import Invalid
from bulkhead.isolation import mounts
from bulkhead.isolation.seccomp.cache import FilterCache
from bulkhead.linux.terminals import window_size
from bulkhead.oci.runtime import Process, Seccomp, Spec

_KEPT = 128
_encode = msgspec.msgpack.Encoder().encode
_replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class Cached:
    """A template and which of its holes a launch fills."""

    template: Template
    binds: tuple[int, ...]
    """Positions of mounts whose source is a hole."""
    seccomp: Seccomp | None
    """Kept alive, for its identity is part of the key."""

    def fill(self, spec: Spec, rootfs: Rootfs, views: Mapping[str, str], stdio: Stdio) -> bytes:
        """The program for one container."""
        process = _process(spec)
        values: dict[str, Any] = {
            "candidates": candidates(process),
            "argv": process.args,
            "env": process.env,
        }
        if spec.hostname:
            values["hostname"] = spec.hostname
        if rootfs.directory is not None:
            values["directory"] = rootfs.directory
        else:
            for position, lower in enumerate(rootfs.lowers):
                values[f"lower{position}"] = lower
            if rootfs.upper is not None:
                values["upper"], values["work"] = rootfs.upper, rootfs.work or ""
        for position in self.binds:
            values[f"mount{position}"] = spec.mounts[position].source
        for name, path in views.items():
            values[f"view-{name}"] = path
        if stdio.terminal:
            values["window"] = window_size(stdio.rows, stdio.columns)
        return self.template.compiled.filled(
            {name: value for name, value in values.items() if name in self.template.holes}
        )


def _process(spec: Spec) -> Process:
    if spec.process is None:
        raise Invalid("config.json has no process: nothing to run")
    return spec.process


class Templates:
    """The programs and filters of one engine. A Seccomp object must not be changed once used."""

    def __init__(self, filters: str | None) -> None:
        self._filters = FilterCache(filters)
        self._kept: OrderedDict[Any, Cached] = OrderedDict()

    def filter(self, spec: Spec) -> Filter | None:
        """The compiled system call filter of `spec`."""
        if spec.linux.seccomp is None:
            return None
        compiled = self._filters.get(spec.linux.seccomp)
        return Filter(compiled.program, compiled.flags)

    def launch(self, spec: Spec, rootfs: Rootfs, ground: Ground, *, terminal: bool) -> Cached:
        """The program for configurations shaped like `spec`."""
        key = shape(spec, rootfs, ground, terminal=terminal)
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found
        values = {f"view-{name}": "/" for name in ground.views}
        template = plan_launch(
            spec, rootfs, ground, self.filter(spec), terminal=terminal, hole_values=values
        )
        binds = tuple(
            position
            for position, mount in enumerate(spec.mounts)
            if mounts.is_bind(mount) and f"mount{position}" not in ground.prepared
        )
        made = self._kept[key] = Cached(template, binds, spec.linux.seccomp)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return made


def shape(spec: Spec, rootfs: Rootfs, ground: Ground, *, terminal: bool) -> tuple[Any, ...]:
    """What two configurations must share to share a program."""
    process, linux = _process(spec), spec.linux
    process_shape = _encode(_replace(process, args=[], env=[], console_size=None))
    linux_shape = _encode(
        _replace(
            linux,
            seccomp=None,
            resources=None,
            cgroups_path="",
            namespaces=[_replace(n, path="/" if n.path else "") for n in linux.namespaces],
        )
    )
    mount_shapes = tuple(
        (m.destination, m.type_, "" if mounts.is_bind(m) else m.source, *m.options)
        for m in spec.mounts
    )
    root = spec.root is not None and spec.root.readonly
    return (
        process_shape,
        linux_shape,
        mount_shapes,
        id(linux.seccomp) if linux.seccomp is not None else 0,
        root,
        bool(spec.hostname),
        spec.domainname,
        spec.hooks is not None,
        rootfs.directory is not None,
        len(rootfs.lowers),
        rootfs.upper is not None,
        ground,
        terminal,
    )
