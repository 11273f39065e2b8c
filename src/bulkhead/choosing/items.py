"""One thing that runs or is to run, whatever it was found in; and the facts that it states itself.

Readers of Compose files, manifests, domains, disks and Docker's API make `Item`s of what they find;
`statements` says what those mean for the choice.
"""

import posixpath
import re
from dataclasses import dataclass, field
from typing import Protocol

from bulkhead.choosing.facts import FIRM, HINT, SAID, Statement, statement
from bulkhead.choosing.words import read
from bulkhead.errors import Invalid

NEEDS = "bulkhead.needs"
"""The label whose value is a description in words; NEEDS.KEY is one fact."""
MOST_BYTES = 1 << 60
MOST_NANO_CPUS = 10**15
MOST_REPLICAS = 10_000
TENANT = "bulkhead.tenant"
OURS = "bulkhead."
_NOT_BY_IMAGES = frozenset({"trust", "tenancy", "virtualisation", "kvm"})
"""Facts that an image cannot know of itself, or should not be believed."""

DATABASES = frozenset(
    str.split(
        "postgres postgresql timescaledb postgis mysql mariadb percona mongo mongodb cassandra "
        "scylla cockroach cockroachdb couchdb couchbase neo4j influxdb clickhouse-server oracle "
        "elasticsearch opensearch mssql server etcd rethinkdb arangodb"
    )
)
_OFFICIAL = re.compile(r"(docker\.io/)?(library/)?[a-z0-9._-]+(:[^/]*)?(@sha256:[0-9a-f]+)?")
_ENGINES = frozenset({"dind", "docker-in-docker", "kind", "k3s", "podman"})
_INITS = frozenset({"init", "systemd", "runit-init", "openrc-init"})
_SUPERVISORS = frozenset({"supervisord", "s6-svscan", "runsvdir", "my_init", "monit"})
_SANDBOXES = {"runsc": "trust=untrusted", "gvisor": "trust=untrusted",
              "kata": "separation=hardware", "kata-runtime": "separation=hardware",
              "kata-qemu": "separation=hardware", "firecracker": "separation=hardware"}  # fmt: skip
_STRONG = frozenset(
    str.split(
        "SYS_ADMIN SYS_PTRACE SYS_RAWIO SYS_BOOT SYS_TIME NET_ADMIN BPF PERFMON DAC_READ_SEARCH "
        "MAC_ADMIN MAC_OVERRIDE SYSLOG LINUX_IMMUTABLE SYS_MODULE ALL"
    )
)
_HOST_PATHS = ("/", "/proc", "/sys", "/boot", "/etc", "/run", "/var/run", "/var/lib/docker",
               "/var/lib/kubelet", "/var/log", "/lib/modules", "/usr", "/root")  # fmt: skip
_SOCKETS = ("docker.sock", "containerd.sock", "crio.sock", "podman.sock", "engine.sock")


class _Add(Protocol):
    """How a fact is added."""

    def __call__(self, text: str, source: str, strength: int = HINT) -> None:
        """One fact."""


@dataclass(slots=True)
class Mount:
    """Something mounted: `kind` is volume, bind or tmpfs."""

    kind: str
    source: str
    target: str
    read_only: bool = False


@dataclass(slots=True)
class Item:
    """One workload of an inventory."""

    name: str
    kind: str
    """service, pod, container, image, domain or disk."""
    source: str
    """The file or host it was found in."""
    image: str = ""
    called: str = ""
    """What it is called here, if not as its name and group have it."""
    tenant: str = ""
    """Who it belongs to: a label, a namespace or a project."""
    group: str = ""
    """What it is deployed with: a project, a namespace."""
    os: str = ""
    architecture: str = ""
    replicas: int = 1
    memory: int = 0
    """Its limit or request in bytes, 0 for none."""
    nano_cpus: int = 0
    argv: list[str] = field(default_factory=list)
    """What runs, as far as the source says."""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    user: str = ""
    ports: list[str] = field(default_factory=list)
    """As `-p` takes them."""
    mounts: list[Mount] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    depends: list[str] = field(default_factory=list)
    privileged: bool = False
    capabilities: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    host_namespaces: list[str] = field(default_factory=list)
    """network, pid, ipc, uts or user, where it has the host's."""
    read_only: bool = False
    restart: str = ""
    runtime: str = ""
    cpuset: str = ""
    health: bool = False
    options: list[str] = field(default_factory=list)
    """Further words for `run`."""
    disks: list[str] = field(default_factory=list)
    disk_bytes: int = 0
    stated: list[Statement] = field(default_factory=list)
    """What its source says in so many words."""
    notes: list[str] = field(default_factory=list)
    """What was found and cannot be carried over as it is."""


def base_name(image: str) -> str:
    """The last word of an image's name: postgres of docker.io/library/postgres:16."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]


def statements(item: Item, machine: str = "") -> list[Statement]:
    """What the item itself says; `machine` is the host's architecture in OCI's words."""
    found = list(item.stated)

    def add(text: str, source: str, strength: int = HINT) -> None:
        found.append(statement(text, source, strength))

    _labels(item, found)
    if item.os and item.os != "linux":
        add("os=windows" if item.os == "windows" else "os=other", f"for {item.os}", SAID)
    if machine and item.architecture and item.architecture != machine:
        add("arch=foreign", f"for {item.architecture}", SAID)
    if item.runtime.rpartition(".")[2] in _SANDBOXES:
        add(_SANDBOXES[item.runtime.rpartition(".")[2]], f"runtime {item.runtime}")
    if item.cpuset:
        add("guarantee=reserved", f"processors {item.cpuset} of its own")
    _program(item, add)
    _rights(item, add)
    _state(item, add)
    return found


def hints(labels: dict[str, str]) -> list[Statement]:
    """What an image's own labels say: hints, and nothing on whether to trust it."""
    found: list[Statement] = []
    for key, value in labels.items():
        if key == NEEDS:
            told = read(value)
        elif key.startswith(f"{NEEDS}."):
            try:
                told = [statement(f"{key[len(NEEDS) + 1 :]}={value}", "")]
            except Invalid:
                continue  # somebody else's words: no reason to refuse the workload
        else:
            continue
        found += [
            Statement(one.key, one.value, HINT, f"the image's label {key}")
            for one in told
            if one.key not in _NOT_BY_IMAGES
        ]
    return found


def _labels(item: Item, found: list[Statement]) -> None:
    for key, value in item.labels.items():
        where = f"label {key}"
        if key == NEEDS:
            found += read(value)
        elif key.startswith(f"{NEEDS}."):
            found.append(statement(f"{key[len(NEEDS) + 1 :]}={value}", where, FIRM))


def _program(item: Item, add: _Add) -> None:
    name = base_name(item.image)
    tag = item.image.rpartition(":")[2] if ":" in item.image else ""
    if name in DATABASES:
        add("state=database", f"image {item.image}")
    if name in _ENGINES or (name == "docker" and "dind" in tag):
        add("engine=yes", f"image {item.image}", SAID)
    if item.image and _OFFICIAL.fullmatch(item.image):
        add("trust=vetted", f"official image {item.image}")
    words = [*item.entrypoint, *item.command] or item.argv
    program = posixpath.basename(words[0]) if words else ""
    if program in _INITS:
        add("init=system", f"it starts {words[0]}", SAID)
    elif program in _SUPERVISORS:
        add("init=services", f"it starts {words[0]}", SAID)


def _rights(item: Item, add: _Add) -> None:
    if item.privileged:
        add("rights=all", "privileged", SAID)
    strong = sorted({one.removeprefix("CAP_") for one in item.capabilities} & _STRONG)
    if "SYS_MODULE" in strong:
        add("modules=yes", "capability SYS_MODULE", SAID)
    if strong:
        add("rights=more", f"capabilities {', '.join(strong)}", SAID)
    for one in item.host_namespaces:
        add("host=reach", f"the host's {one} namespace", SAID)
    for mount in item.mounts:
        if mount.kind == "bind" and _of_the_host(mount.source):
            add("host=reach", f"it mounts {mount.source} of the host", SAID)
    devices = [one for one in item.devices if not one.startswith("/dev/net/tun")]
    if devices:
        add("hardware=device", f"device {', '.join(devices)}", SAID)


def _of_the_host(path: str) -> bool:
    clean = posixpath.normpath(path) if path.startswith("/") else path
    if posixpath.basename(clean) in _SOCKETS:
        return True
    return clean in _HOST_PATHS or clean.startswith(
        ("/proc/", "/sys/", "/dev/", "/var/lib/docker/")
    )


def _state(item: Item, add: _Add) -> None:
    kept = [one for one in item.mounts if one.kind != "tmpfs" and not one.read_only]
    kept = [one for one in kept if not (one.kind == "bind" and _of_the_host(one.source))]
    if kept:
        add("state=volumes", f"it writes {', '.join(one.target for one in kept)}")
    elif item.read_only:
        add("state=none", "its root is read-only, and it has no volume")


def memory(value: object, where: str, *, decimal: bool = True) -> int:
    """Bytes of a size as Kubernetes, libvirt or a number write it; Invalid otherwise.

    Without `decimal` M and G mean 1024 * 1024 and so on, as Compose has it.
    """
    if isinstance(value, bool) or value is None:
        return 0
    if isinstance(value, int | float):
        return within(value, MOST_BYTES, where)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    unit = (match[2] if decimal else match[2].lower()) if match else ""
    scale = _SCALES.get(unit) if match else None
    if match is None or scale is None:
        raise Invalid(f"{where}: {value!r} is no size")
    return within(float(match[1]) * scale, MOST_BYTES, where)


def within(value: float, most: int, where: str) -> int:
    """The whole number that `value` is; Invalid if it is not from 0 to `most`."""
    if not 0 <= value <= most:
        raise Invalid(f"{where}: a number is not between 0 and {most}")
    return int(value)


_SCALES = {
    "": 1, "b": 1, "B": 1, "bytes": 1,
    "k": 1 << 10, "K": 1 << 10, "kb": 1 << 10, "KB": 1 << 10, "Ki": 1 << 10, "KiB": 1 << 10,
    "m": 1 << 20, "M": 10**6, "mb": 1 << 20, "MB": 1 << 20, "Mi": 1 << 20, "MiB": 1 << 20,
    "g": 1 << 30, "G": 10**9, "gb": 1 << 30, "GB": 1 << 30, "Gi": 1 << 30, "GiB": 1 << 30,
    "t": 1 << 40, "T": 10**12, "Ti": 1 << 40, "TiB": 1 << 40,
}  # fmt: skip
