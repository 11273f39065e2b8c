"""The OCI runtime specification's config.json as typed data (runtime-spec 1.3).

Attribute names are the JSON names in snake case; the JSON names are exact. Unknown members are
ignored, as the specification demands (extensibility). Members left at their default are not
written. `decode` refuses what is not well-formed with one line that names the place; `validate`
checks what types cannot say. Pure data: no I/O, no look at the host.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from bulkhead.errors import Invalid

VERSION = "1.3.0"

_JSON_NAMES = {
    "container_id": "containerID",
    "host_id": "hostID",
    "additional_gids": "additionalGids",
    "block_io": "blockIO",
    "throttle_read_iops_device": "throttleReadIOPSDevice",
    "throttle_write_iops_device": "throttleWriteIOPSDevice",
    "kernel_tcp": "kernelTCP",
    "disable_oom_killer": "disableOOMKiller",
    "class_id": "classID",
    "clos_id": "closID",
    "exec_cpu_affinity": "execCPUAffinity",
    "type_": "type",
    "class_": "class",
}


def _json_name(attribute: str) -> str:
    """The JSON name of a struct's attribute: camel case, acronyms by table."""
    known = _JSON_NAMES.get(attribute)
    if known is not None:
        return known
    head, *rest = attribute.split("_")
    return head + "".join(word.capitalize() for word in rest)


class _Part(Struct, omit_defaults=True, rename=_json_name):
    """Base of every member of the configuration."""


_UINT16_MAX, _UINT32_MAX, _UINT64_MAX = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
Uint16 = Annotated[int, Meta(ge=0, le=_UINT16_MAX)]
Uint32 = Annotated[int, Meta(ge=0, le=_UINT32_MAX)]
Uint64 = Annotated[int, Meta(ge=0)]
"""At most 2**64 - 1, which `validate` checks: msgspec's constraints are signed."""


class Root(_Part):
    """The root file system; `path` is relative to the bundle or absolute."""

    path: str
    readonly: bool = False


class IDMapping(_Part):
    """`size` ids from `container_id` inside are those from `host_id` outside."""

    container_id: Uint32
    host_id: Uint32
    size: Uint32


class Mount(_Part):
    """One mount; `options` are those of mount(8) plus the recursive forms ("rro", "rbind", …)."""

    destination: str
    source: str = ""
    type_: str = ""
    options: list[str] = []
    uid_mappings: list[IDMapping] = []
    gid_mappings: list[IDMapping] = []


class User(_Part):
    """Ids the process runs with. `umask` None leaves the runtime's 0022."""

    uid: Uint32 = 0
    gid: Uint32 = 0
    umask: Uint32 | None = None
    additional_gids: list[Uint32] = []
    username: str = ""


class Capabilities(_Part):
    """The five sets of capabilities(7), names as "CAP_CHOWN"."""

    bounding: list[str] = []
    permitted: list[str] = []
    effective: list[str] = []
    inheritable: list[str] = []
    ambient: list[str] = []


class Rlimit(_Part):
    """One limit of getrlimit(2); 2**64 - 1 is "unlimited"."""

    type_: Annotated[str, Meta(pattern="^RLIMIT_[A-Z]+$")]
    soft: Uint64
    hard: Uint64


class ConsoleSize(_Part):
    """A terminal's size in characters."""

    height: Uint64
    width: Uint64


class IOPriority(_Part):
    """ioprio_set(2)."""

    class_: Literal["IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"]
    priority: int = 0


class Scheduler(_Part):
    """sched_setattr(2); times in nanoseconds."""

    policy: Literal[
        "SCHED_OTHER",
        "SCHED_FIFO",
        "SCHED_RR",
        "SCHED_BATCH",
        "SCHED_ISO",
        "SCHED_IDLE",
        "SCHED_DEADLINE",
    ]
    nice: int = 0
    priority: int = 0
    flags: list[str] = []
    runtime: Uint64 = 0
    deadline: Uint64 = 0
    period: Uint64 = 0


class CPUAffinity(_Part):
    """CPU lists ("0-3,7") of an executed process, before and after it joins the cgroup."""

    initial: Annotated[str, Meta(pattern="^[0-9, -]*$")] = ""
    final: Annotated[str, Meta(pattern="^[0-9, -]*$")] = ""


class Process(_Part):
    """What runs, and as whom."""

    cwd: str = "/"
    args: list[str] = []
    env: list[str] = []
    terminal: bool = False
    console_size: ConsoleSize | None = None
    user: User = msgspec.field(default_factory=User)
    capabilities: Capabilities | None = None
    rlimits: list[Rlimit] = []
    no_new_privileges: bool = False
    oom_score_adj: int | None = None
    apparmor_profile: str = ""
    selinux_label: str = ""
    io_priority: IOPriority | None = None
    scheduler: Scheduler | None = None
    exec_cpu_affinity: CPUAffinity | None = None


class Hook(_Part):
    """A program the runtime calls; `timeout` in seconds."""

    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: Annotated[int, Meta(ge=1)] | None = None


class Hooks(_Part):
    """Programs called at the points of the life cycle."""

    prestart: list[Hook] = []
    create_runtime: list[Hook] = []
    create_container: list[Hook] = []
    start_container: list[Hook] = []
    poststart: list[Hook] = []
    poststop: list[Hook] = []


NamespaceType = Literal["mount", "pid", "network", "uts", "ipc", "user", "cgroup", "time"]


class Namespace(_Part):
    """A namespace: new, or the one at `path`. One that is not listed is inherited."""

    type_: NamespaceType
    path: str = ""


class Device(_Part):
    """A device node to make in the container."""

    path: str
    type_: Annotated[str, Meta(pattern="^[cbup]$")]
    major: int = 0
    minor: int = 0
    file_mode: Uint32 | None = None
    uid: Uint32 | None = None
    gid: Uint32 | None = None


class DeviceCgroup(_Part):
    """A rule of the device controller; type "a", "b" or "c", numbers None for any."""

    allow: bool
    type_: str = "a"
    major: int | None = None
    minor: int | None = None
    access: str = ""


class Pids(_Part):
    """Number of tasks; -1 or 0 is unlimited."""

    limit: int


class WeightDevice(_Part):
    """A block device's share."""

    major: int
    minor: int
    weight: Uint16 | None = None
    leaf_weight: Uint16 | None = None


class ThrottleDevice(_Part):
    """A block device's limit, bytes or operations a second."""

    major: int
    minor: int
    rate: Uint64 = 0


class BlockIO(_Part):
    """Block I/O limits."""

    weight: Uint16 | None = None
    leaf_weight: Uint16 | None = None
    weight_device: list[WeightDevice] = []
    throttle_read_bps_device: list[ThrottleDevice] = []
    throttle_write_bps_device: list[ThrottleDevice] = []
    throttle_read_iops_device: list[ThrottleDevice] = []
    throttle_write_iops_device: list[ThrottleDevice] = []


class CPU(_Part):
    """CPU limits; `quota`, `period`, `burst`, realtime values in microseconds."""

    shares: Uint64 | None = None
    quota: int | None = None
    period: Uint64 | None = None
    burst: Uint64 | None = None
    realtime_runtime: int | None = None
    realtime_period: Uint64 | None = None
    cpus: str = ""
    mems: str = ""
    idle: int | None = None


class HugepageLimit(_Part):
    """Bytes of one huge page size ("2MB")."""

    page_size: Annotated[str, Meta(pattern="^[1-9][0-9]*[KMG]B$")]
    limit: Uint64


class Memory(_Part):
    """Memory limits in bytes, -1 for none; `swap` is memory plus swap."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    kernel: int | None = None
    kernel_tcp: int | None = None
    swappiness: Uint64 | None = None
    disable_oom_killer: bool | None = None
    use_hierarchy: bool | None = None
    check_before_update: bool | None = None


class InterfacePriority(_Part):
    """net_prio of one interface."""

    name: str
    priority: Uint32


class NetworkResources(_Part):
    """net_cls and net_prio."""

    class_id: Uint32 | None = None
    priorities: list[InterfacePriority] = []


class Rdma(_Part):
    """RDMA limits of one device."""

    hca_handles: Uint32 | None = None
    hca_objects: Uint32 | None = None


class Resources(_Part):
    """Control group limits. `unified` are cgroup v2 files and what to write to them."""

    devices: list[DeviceCgroup] = []
    memory: Memory | None = None
    cpu: CPU | None = None
    pids: Pids | None = None
    block_io: BlockIO | None = None
    hugepage_limits: list[HugepageLimit] = []
    network: NetworkResources | None = None
    rdma: dict[str, Rdma] = {}
    unified: dict[str, str] = {}


SeccompAction = Literal[
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
]
SeccompOperator = Literal[
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
]


class SyscallArg(_Part):
    """A condition on one argument of a system call."""

    index: Uint32
    value: Uint64
    op: SeccompOperator
    value_two: Uint64 = 0


class Syscall(_Part):
    """A rule: what to do on these calls when every condition holds."""

    names: Annotated[list[str], Meta(min_length=1)]
    action: SeccompAction
    errno_ret: Uint32 | None = None
    args: list[SyscallArg] = []


class Seccomp(_Part):
    """A filter of system calls; seccomp(2)."""

    default_action: SeccompAction
    default_errno_ret: Uint32 | None = None
    architectures: list[str] = []
    flags: list[str] = []
    listener_path: str = ""
    listener_metadata: str = ""
    syscalls: list[Syscall] = []


class Personality(_Part):
    """personality(2)."""

    domain: Literal["LINUX", "LINUX32"] = "LINUX"
    flags: list[str] = []


class TimeOffset(_Part):
    """An offset of a clock in a time namespace."""

    secs: int = 0
    nanosecs: Uint32 = 0


class NetDevice(_Part):
    """A host network device to move in, under `name` if given."""

    name: str = ""


class IntelRdt(_Part):
    """Cache and memory bandwidth allocation."""

    clos_id: str = ""
    schemata: list[str] = []
    l3_cache_schema: str = ""
    mem_bw_schema: str = ""
    enable_monitoring: bool = False


class MemoryPolicy(_Part):
    """set_mempolicy(2)."""

    mode: str
    nodes: str = ""
    flags: list[str] = []


class Linux(_Part):
    """What only Linux has."""

    namespaces: list[Namespace] = []
    uid_mappings: list[IDMapping] = []
    gid_mappings: list[IDMapping] = []
    devices: list[Device] = []
    net_devices: dict[str, NetDevice] = {}
    cgroups_path: str = ""
    resources: Resources | None = None
    rootfs_propagation: Literal["", "private", "shared", "slave", "unbindable"] = ""
    seccomp: Seccomp | None = None
    sysctl: dict[str, str] = {}
    masked_paths: list[str] = []
    readonly_paths: list[str] = []
    mount_label: str = ""
    intel_rdt: IntelRdt | None = None
    memory_policy: MemoryPolicy | None = None
    personality: Personality | None = None
    time_offsets: dict[Literal["boottime", "monotonic"], TimeOffset] = {}

    def namespace(self, kind: NamespaceType) -> Namespace | None:
        """The namespace of that kind, None if it is inherited."""
        for namespace in self.namespaces:
            if namespace.type_ == kind:
                return namespace
        return None


class Spec(_Part):
    """A whole config.json."""

    oci_version: str = VERSION
    root: Root | None = None
    process: Process | None = None
    hostname: str = ""
    domainname: str = ""
    mounts: list[Mount] = []
    hooks: Hooks | None = None
    annotations: dict[str, str] = {}
    linux: Linux = msgspec.field(default_factory=Linux)


_decode = msgspec.json.Decoder(Spec).decode


def decode(data: bytes | str) -> Spec:
    """The configuration in `data` (JSON), validated; Invalid names the member that is wrong."""
    try:
        spec = _decode(data)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "").replace("Object missing required field", "missing")
        raise Invalid(f"config.json: {reason}") from None
    except msgspec.DecodeError as error:
        raise Invalid(f"config.json is not JSON: {error}") from None
    validate(spec)
    return spec


def encode(spec: Spec) -> bytes:
    """`spec` as JSON; what the specification requires is written though it is the default."""
    members = msgspec.to_builtins(spec)
    if spec.process is not None:
        members["process"]["cwd"] = spec.process.cwd
    return msgspec.json.encode({"ociVersion": spec.oci_version, **members})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Invalid(message)


def validate(spec: Spec) -> None:
    """Refuse, with Invalid, what is well-formed but makes no sense; see config.md of the spec."""
    version = spec.oci_version.split(".")
    _require(
        len(version) == 3 and version[0] == "1",
        f"ociVersion {spec.oci_version!r} is not supported; use 1.x.y",
    )
    if spec.root is not None:
        _text("root.path", spec.root.path)
    _text("hostname", spec.hostname)
    _text("domainname", spec.domainname)
    if spec.process is not None:
        validate_process(spec.process)
    for position, mount in enumerate(spec.mounts):
        _validate_mount(f"mounts[{position}]", mount)
    _validate_linux(spec)


def _text(where: str, value: str) -> None:
    _require("\0" not in value, f"{where} contains a NUL byte")


def validate_process(process: Process) -> None:
    """Refuse, with Invalid, a process that cannot be run (also one of exec)."""
    _require(process.cwd.startswith("/"), f"process.cwd {process.cwd!r} is not an absolute path")
    _text("process.cwd", process.cwd)
    _require(bool(process.args), "process.args is empty: nothing to run")
    for position, argument in enumerate(process.args):
        _text(f"process.args[{position}]", argument)
    for position, variable in enumerate(process.env):
        _text(f"process.env[{position}]", variable)
        _require(variable.find("=") > 0, f"process.env[{position}] {variable!r} is not NAME=VALUE")
    if process.oom_score_adj is not None:
        _require(
            -1000 <= process.oom_score_adj <= 1000,
            f"process.oomScoreAdj {process.oom_score_adj} is not within -1000..1000",
        )
    seen: set[str] = set()
    for limit in process.rlimits:
        _require(limit.type_ not in seen, f"process.rlimits has {limit.type_} twice")
        seen.add(limit.type_)
        _uint64(f"process.rlimits {limit.type_}", limit.hard)
        _require(
            limit.soft <= limit.hard, f"process.rlimits {limit.type_}: soft is above the hard limit"
        )
    if process.user.umask is not None:
        _require(
            process.user.umask <= 0o777, f"process.user.umask {process.user.umask:#o} is wrong"
        )


def _uint64(where: str, value: int) -> None:
    _require(value <= _UINT64_MAX, f"{where}: {value} is more than 64 bits")


def _validate_mount(where: str, mount: Mount) -> None:
    _require(
        mount.destination.startswith("/"),
        f"{where}.destination {mount.destination!r} is not an absolute path",
    )
    _text(f"{where}.destination", mount.destination)
    _text(f"{where}.source", mount.source)
    _require(
        bool(mount.uid_mappings) == bool(mount.gid_mappings),
        f"{where}: uidMappings and gidMappings go together",
    )


def _validate_linux(spec: Spec) -> None:
    linux = spec.linux
    kinds: set[str] = set()
    for namespace in linux.namespaces:
        _require(namespace.type_ not in kinds, f"linux.namespaces has {namespace.type_} twice")
        kinds.add(namespace.type_)
        _require(
            not namespace.path or namespace.path.startswith("/"),
            f"linux.namespaces: path {namespace.path!r} is not absolute",
        )
    _require("uts" in kinds or not spec.hostname, "hostname needs a uts namespace")
    _require("uts" in kinds or not spec.domainname, "domainname needs a uts namespace")
    _require("time" in kinds or not linux.time_offsets, "linux.timeOffsets needs a time namespace")
    mapped = bool(linux.uid_mappings or linux.gid_mappings)
    _require("user" in kinds or not mapped, "linux.uidMappings need a user namespace")
    for where, mappings in (("uid", linux.uid_mappings), ("gid", linux.gid_mappings)):
        _validate_mappings(f"linux.{where}Mappings", mappings)
    for device in linux.devices:
        _require(
            device.path.startswith("/"), f"linux.devices: {device.path!r} is not an absolute path"
        )
    for path in (*linux.masked_paths, *linux.readonly_paths):
        _require(path.startswith("/"), f"linux.maskedPaths/readonlyPaths: {path!r} is not absolute")
        _text("linux.maskedPaths/readonlyPaths", path)
    for name in linux.sysctl:
        _require(
            bool(name) and ".." not in name and "\0" not in name,
            f"linux.sysctl: {name!r} is not a setting's name",
        )


def _validate_mappings(where: str, mappings: list[IDMapping]) -> None:
    """At most 340 lines, as user_namespaces(7) has it; no range empty, wrapping or overlapping."""
    _require(len(mappings) <= 340, f"{where}: more than 340 ranges")
    side: Callable[[IDMapping], int]
    for name, side in (("containerID", lambda m: m.container_id), ("hostID", lambda m: m.host_id)):
        end = 0
        for mapping in sorted(mappings, key=side):
            start = side(mapping)
            _require(mapping.size > 0, f"{where}: a range is empty")
            _require(start >= end, f"{where}: {name} ranges overlap at {start}")
            end = start + mapping.size
            _require(end <= _UINT32_MAX + 1, f"{where}: {name} {start} goes beyond 32 bits")
