"""Workloads whose image is for another machine: run by QEMU's user mode, or refused in words.

The container gets a user namespace of its own, in which every id is what it is outside, and in it
a binfmt_misc with one entry (isolation/binfmt.py). So whatever it executes, at any depth, is
emulated, and nothing is registered for the host. If the host has a registration, it serves.
"""

from bulkhead.engine.records import Record
from bulkhead.errors import Unsupported
from bulkhead.images.catalog import Image, host_platform
from bulkhead.isolation import binfmt
from bulkhead.oci import platform as platforms
from bulkhead.oci import runtime as oci

IDS = 4294967295
"""All there are, but the last, which stands for none."""


def choose(record: Record, image: Image, *, asked: bool) -> list[str]:
    """Note in `record` that its programs are to be emulated; warnings.

    `asked`: the platform was named, so that what is missing is an error. Unsupported for what an
    emulated workload cannot have.
    """
    config = image.config
    offered = config.platform
    if not config.architecture or platforms.suits(offered, host_platform()):
        return []
    if record.boundary != "container":
        raise Unsupported(
            f"the image is for {offered}: the boundary {record.boundary} runs programs of this "
            "machine only; --boundary container emulates them"
        )
    if binfmt.registered(config.architecture):
        return []
    try:
        binfmt.interpreter(config.architecture)
        binfmt.check_kernel()
    except Unsupported as error:
        if asked:
            raise
        return [error.message]
    _check(record)
    record.emulated = config.architecture
    return []


def _check(record: Record) -> None:
    host = record.host
    for option, present in (
        ("--privileged", host.privileged),
        ("--userns host", host.userns_mode == "host"),
        (f"--pid {host.pid_mode}", host.pid_mode not in {"", "private"}),
        (f"--ipc {host.ipc_mode}", host.ipc_mode not in {"", "private", "none"}),
    ):
        if present:
            raise Unsupported(
                f"{option} is not possible with programs of another machine: these need a user "
                "namespace of their own"
            )


def mappings() -> list[oci.IDMapping]:
    """Every id is what it is outside."""
    return [oci.IDMapping(container_id=0, host_id=0, size=IDS)]


def mounts(record: Record) -> list[oci.Mount]:
    """What its user namespace needs."""
    return [binfmt.mount(record.emulated)] if record.emulated else []
