"""From a record to the OCI runtime configuration of one start. Pure: all facts come in `Facts`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bulkhead.boundary import registry
from bulkhead.engine import body, emulation, specgen_limits, specgen_mounts
from bulkhead.engine.records import Record
from bulkhead.engine.security import Security, parse
from bulkhead.engine.users import Identity
from bulkhead.errors import Invalid
from bulkhead.isolation import capabilities
from bulkhead.isolation.seccomp import profile
from bulkhead.oci import runtime as oci

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a start adds to the record."""

    identity: Identity
    cgroup: str
    netns: str | None = None
    """None: the host's network."""
    hostname: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    """Generated files by their place inside, e.g. "/etc/hosts"."""
    sources: Sequence[str] = ()
    """For each of the record's mounts, the directory or file on the host."""
    namespaces: Mapping[str, str] = field(default_factory=dict)
    """Namespaces of others to join, by kind ("ipc", "pid", "user")."""
    shared_shm: str | None = None
    api: str = ""
    """The socket of Docker's API: bound into a user namespace, root there may open it."""
    private: Sequence[str] = ()
    """Variables of the environment that no record may have."""
    init: str = ""
    """The path of our init on the host, if `--init` was given."""
    rows: int = 0
    columns: int = 0


def environment(
    config: body.Config, identity: Identity, hostname: str, private: Sequence[str] = ()
) -> list[str]:
    """PATH, HOSTNAME, TERM and HOME where nobody sets them; a name without "=" is left out."""
    own: dict[str, str] = {}
    for entry in (*(config.env or ()), *private):
        name, separator, _ = entry.partition("=")
        if separator:
            own[name] = entry
        else:
            own.pop(name, None)
    base = {"PATH": PATH, "HOSTNAME": f"HOSTNAME={hostname}"}
    if config.tty:
        base["TERM"] = "TERM=xterm"
    merged = {**base, **own}
    merged.setdefault("HOME", f"HOME={identity.home}")
    return list(merged.values())


def _capabilities(host: body.HostConfig) -> oci.Capabilities:
    chosen = list(
        capabilities.select(host.cap_add or (), host.cap_drop or (), privileged=host.privileged)
    )
    return oci.Capabilities(bounding=chosen, permitted=chosen, effective=chosen)


def _process(record: Record, facts: Facts, security: Security) -> oci.Process:
    config, host = record.config, record.host
    size = None
    if config.tty and facts.rows and facts.columns:
        size = oci.ConsoleSize(height=facts.rows, width=facts.columns)
    args = record.args
    if facts.init:
        args = [specgen_mounts.INIT, *args]
    return oci.Process(
        cwd=config.working_dir or "/",
        args=args,
        env=environment(config, facts.identity, facts.hostname, facts.private),
        terminal=config.tty,
        console_size=size,
        user=oci.User(
            uid=facts.identity.uid,
            gid=facts.identity.gid,
            additional_gids=list(facts.identity.groups),
        ),
        capabilities=_capabilities(host),
        rlimits=specgen_limits.rlimits(host.ulimits),
        no_new_privileges=security.no_new_privileges,
        oom_score_adj=host.oom_score_adj or None,
        apparmor_profile=security.apparmor,
        selinux_label=_selinux(security.selinux),
    )


def _selinux(parts: Sequence[str]) -> str:
    """A whole label from "user:U", "role:R", "type:T", "level:L"; "" when none or disabled."""
    if not parts or "disable" in parts:
        return ""
    values = {"user": "system_u", "role": "system_r", "type": "container_t", "level": "s0"}
    for part in parts:
        key, separator, value = part.partition(":")
        if not separator or key not in values:
            raise Invalid(f'invalid --security-opt 2: "label={part}"')
        values[key] = value
    return ":".join((values["user"], values["role"], values["type"], values["level"]))


def id_mappings(mode: str) -> list[oci.IDMapping]:
    """The map that "FIRST:COUNT" asks for; [] for the host's user namespace."""
    if mode in {"", "host"}:
        return []
    first, _, count = mode.partition(":")
    return [oci.IDMapping(container_id=0, host_id=int(first), size=int(count))]


def _namespaces(record: Record, facts: Facts) -> list[oci.Namespace]:
    host = record.host
    found = [oci.Namespace(type_="mount")]
    if record.mapped:
        found.append(oci.Namespace(type_="user"))
    if facts.netns is not None:
        found.append(oci.Namespace(type_="network", path=facts.netns))
    for kind, mode in (("pid", host.pid_mode), ("ipc", host.ipc_mode), ("uts", host.uts_mode)):
        if mode == "host":
            continue
        found.append(oci.Namespace(type_=kind, path=facts.namespaces.get(kind, "")))  # type: ignore[arg-type]
    if host.cgroupns_mode != "host":
        found.append(oci.Namespace(type_="cgroup"))
    return found


def _linux(record: Record, facts: Facts, security: Security, granted: list[str]) -> oci.Linux:
    host = record.host
    nodes, rules = specgen_limits.devices(host, guest=record.boundary in registry.GUESTS)
    unmask = set(security.unmask)
    filter_ = None
    if not host.privileged or security.seccomp:
        chosen = profile.choose(security.seccomp)
        if chosen is profile.default():
            filter_ = profile.default_for(frozenset(granted))
        elif chosen is not None:
            filter_ = profile.resolve(chosen, capabilities=frozenset(granted))
    mapping = id_mappings(host.userns_mode)
    if record.emulated and not mapping:
        mapping = emulation.mappings()
    sysctls = dict(host.sysctls or {})
    if facts.netns is not None and not host.network_mode.startswith("container:"):
        # Docker's: ports below 1024 and ping need no privilege inside a network of one's own.
        sysctls.setdefault("net.ipv4.ip_unprivileged_port_start", "0")
        if not mapping:
            sysctls.setdefault("net.ipv4.ping_group_range", "0 2147483647")
    return oci.Linux(
        namespaces=_namespaces(record, facts),
        uid_mappings=mapping,
        gid_mappings=mapping,
        devices=nodes,
        cgroups_path=facts.cgroup,
        resources=specgen_limits.resources(host, rules),
        seccomp=filter_,
        sysctl=sysctls,
        masked_paths=[
            *(path for path in host.masked_paths or () if path not in unmask),
            *security.mask,
        ],
        readonly_paths=[path for path in host.readonly_paths or () if path not in unmask],
        rootfs_propagation=_propagation(record),  # type: ignore[arg-type]
    )


def _propagation(record: Record) -> str:
    words = {mount.propagation for mount in record.mounts}
    if words & {"shared", "rshared"}:
        return "shared"
    if words & {"slave", "rslave"}:
        return "slave"
    return ""


def _mounts(record: Record, facts: Facts) -> list[oci.Mount]:
    host = record.host
    base = specgen_mounts.defaults(host, host_network=facts.netns is None)
    base += specgen_mounts.shm(host, facts.shared_shm)
    base += emulation.mounts(record)
    mode = "ro" if host.readonly_rootfs else "rw"
    for place, source in facts.files.items():
        base.append(
            oci.Mount(
                destination=place, type_="bind", source=source, options=["rbind", "rprivate", mode]
            )
        )
    if facts.init:
        base.append(
            oci.Mount(
                destination=specgen_mounts.INIT,
                type_="bind",
                source=facts.init,
                options=["bind", "ro"],
            )
        )
    mapped = record.host.userns_mode not in {"", "host"}
    own = [
        specgen_mounts.point(mount, source, mapped=mapped and source == facts.api)
        for mount, source in zip(record.mounts, facts.sources, strict=True)
    ]
    return specgen_mounts.overlay(base, own)


def generate(record: Record, facts: Facts) -> oci.Spec:
    """The configuration; Invalid for what this host cannot give (devices, capabilities)."""
    security = parse(record.host.security_opt or [])
    process = _process(record, facts, security)
    assert process.capabilities is not None
    return oci.Spec(
        root=oci.Root(path="rootfs", readonly=record.host.readonly_rootfs),
        process=process,
        hostname="" if record.host.uts_mode == "host" else facts.hostname,
        domainname="" if record.host.uts_mode == "host" else record.config.domainname,
        mounts=_mounts(record, facts),
        annotations=dict(record.host.annotations or {}),
        linux=_linux(record, facts, security, process.capabilities.bounding),
    )
