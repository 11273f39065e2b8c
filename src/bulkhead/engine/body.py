"""Docker's request bodies as typed data: what `workload.create`, `update` and `exec.create` take.

Member names are the API's. A member that no version of the API knows is refused with its path;
null means absent, since clients send both. What types cannot say is checked in `options`.
"""

from typing import Any

import msgspec

Strings = list[str] | None
Texts = dict[str, str] | None
Sets = dict[str, Any] | None

_NAMES = {
    "blkio_device_read_iops": "BlkioDeviceReadIOps",
    "blkio_device_write_iops": "BlkioDeviceWriteIOps",
    "container_id_file": "ContainerIDFile",
    "device_ids": "DeviceIDs",
    "endpoint_id": "EndpointID",
    "gateway6": "IPv6Gateway",
    "global_ipv6_address": "GlobalIPv6Address",
    "global_ipv6_prefix_len": "GlobalIPv6PrefixLen",
    "io_maximum_bandwidth": "IOMaximumBandwidth",
    "io_maximum_iops": "IOMaximumIOps",
    "ip_address": "IPAddress",
    "ip_prefix_len": "IPPrefixLen",
    "ipam_config": "IPAMConfig",
    "ipv4_address": "IPv4Address",
    "ipv6_address": "IPv6Address",
    "kernel_memory_tcp": "KernelMemoryTCP",
    "link_local_ips": "LinkLocalIPs",
    "network_id": "NetworkID",
    "dns_names": "DNSNames",
    "uts_mode": "UTSMode",
}


def _name(attribute: str) -> str:
    known = _NAMES.get(attribute)
    return known or "".join(part.capitalize() for part in attribute.rstrip("_").split("_"))


class Part(msgspec.Struct, rename=_name, forbid_unknown_fields=True):
    """Base of every member."""


class Healthcheck(Part):
    """How health is probed; times in nanoseconds, 0 inherits.

    `test` is [] (the image's), ["NONE"], ["CMD", …], ["CMD-SHELL", line], and, probed by the engine
    in the workload's network namespace, ["HTTP", url, (status…)] or ["TCP", port or host:port].
    """

    test: Strings = None
    interval: int = 0
    timeout: int = 0
    retries: int = 0
    start_period: int = 0
    start_interval: int = 0


class Config(Part):
    """What does not depend on the host."""

    hostname: str = ""
    domainname: str = ""
    user: str = ""
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    exposed_ports: Sets = None
    tty: bool = False
    open_stdin: bool = False
    stdin_once: bool = False
    env: Strings = None
    cmd: list[str] | str | None = None
    healthcheck: Healthcheck | None = None
    args_escaped: bool | None = None
    image: str = ""
    volumes: Sets = None
    working_dir: str = ""
    entrypoint: list[str] | str | None = None
    network_disabled: bool | None = None
    mac_address: str | None = None
    on_build: Strings = None
    labels: Texts = None
    stop_signal: str | None = None
    stop_timeout: int | None = None
    shell: Strings = None


class Throttle(Part):
    """A block device's limit a second."""

    path: str = ""
    rate: int = 0


class Weight(Part):
    """A block device's share."""

    path: str = ""
    weight: int = 0


class DeviceMapping(Part):
    """A device of the host."""

    path_on_host: str = ""
    path_in_container: str = ""
    cgroup_permissions: str = ""


class DeviceRequest(Part):
    """Devices by driver, count and capability."""

    driver: str = ""
    count: int = 0
    device_ids: Strings = None
    capabilities: list[list[str]] | None = None
    options: Texts = None


class Ulimit(Part):
    """One resource limit."""

    name: str = ""
    soft: int = 0
    hard: int = 0


class Resources(Part):
    """Limits; shared by create and update."""

    cpu_shares: int = 0
    memory: int = 0
    cgroup_parent: str = ""
    blkio_weight: int = 0
    blkio_weight_device: list[Weight] | None = None
    blkio_device_read_bps: list[Throttle] | None = None
    blkio_device_write_bps: list[Throttle] | None = None
    blkio_device_read_iops: list[Throttle] | None = None
    blkio_device_write_iops: list[Throttle] | None = None
    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_realtime_period: int = 0
    cpu_realtime_runtime: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    devices: list[DeviceMapping] | None = None
    device_cgroup_rules: Strings = None
    device_requests: list[DeviceRequest] | None = None
    kernel_memory: int = 0
    kernel_memory_tcp: int = 0
    memory_reservation: int = 0
    memory_swap: int = 0
    memory_swappiness: int | None = None
    nano_cpus: int = 0
    oom_kill_disable: bool | None = None
    init: bool | None = None
    pids_limit: int | None = None
    ulimits: list[Ulimit] | None = None
    cpu_count: int = 0
    cpu_percent: int = 0
    io_maximum_iops: int = 0
    io_maximum_bandwidth: int = 0
    reserve_cpus: int = 0
    """Ours: billionths of a processor that it is to have whenever it wants them."""
    reserve_memory: int = 0
    """Ours: bytes."""
    reserve_io: int = 0
    """Ours: percent of the time of the disk that the store is on."""


class LogConfig(Part):
    """Where output goes."""

    type_: str = ""
    config: Texts = None


class RestartPolicy(Part):
    """When to start again."""

    name: str = ""
    maximum_retry_count: int = 0


class BindOptions(Part):
    """Of a bind mount."""

    propagation: str = ""
    non_recursive: bool = False
    create_mountpoint: bool = False
    read_only_non_recursive: bool = False
    read_only_force_recursive: bool = False


class DriverConfig(Part):
    """A volume's driver."""

    name: str = ""
    options: Texts = None


class VolumeOptions(Part):
    """Of a volume mount."""

    no_copy: bool = False
    labels: Texts = None
    driver_config: DriverConfig | None = None
    subpath: str = ""


class TmpfsOptions(Part):
    """Of a tmpfs mount."""

    size_bytes: int = 0
    mode: int = 0
    options: list[list[str]] | None = None


class ImageOptions(Part):
    """Of an image mount."""

    subpath: str = ""


class Mount(Part):
    """One mount, in full."""

    target: str = ""
    source: str = ""
    type_: str = ""
    read_only: bool = False
    consistency: str = ""
    bind_options: BindOptions | None = None
    volume_options: VolumeOptions | None = None
    image_options: ImageOptions | None = None
    tmpfs_options: TmpfsOptions | None = None


class PortBinding(Part):
    """Where a port is published."""

    host_ip: str = msgspec.field(default="", name="HostIp")
    host_port: str = ""


class HostConfig(Resources):
    """What depends on the host."""

    binds: Strings = None
    container_id_file: str = ""
    log_config: LogConfig | None = None
    network_mode: str = ""
    port_bindings: dict[str, list[PortBinding] | None] | None = None
    restart_policy: RestartPolicy | None = None
    auto_remove: bool = False
    volume_driver: str = ""
    volumes_from: Strings = None
    mounts: list[Mount] | None = None
    console_size: list[int] | None = None
    annotations: Texts = None
    cap_add: Strings = None
    cap_drop: Strings = None
    capabilities: Strings = None
    cgroupns_mode: str = ""
    dns: Strings = None
    dns_options: Strings = None
    dns_search: Strings = None
    extra_hosts: Strings = None
    group_add: Strings = None
    ipc_mode: str = ""
    cgroup: str = ""
    links: Strings = None
    oom_score_adj: int = 0
    pid_mode: str = ""
    privileged: bool = False
    publish_all_ports: bool = False
    readonly_rootfs: bool = False
    security_opt: Strings = None
    storage_opt: Texts = None
    tmpfs: Texts = None
    uts_mode: str = ""
    userns_mode: str = ""
    shm_size: int = 0
    sysctls: Texts = None
    runtime: str = ""
    isolation: str = ""
    masked_paths: Strings = None
    readonly_paths: Strings = None


class EndpointIpam(Part):
    """Addresses asked for."""

    ipv4_address: str = ""
    ipv6_address: str = ""
    link_local_ips: Strings = None


class EndpointSettings(Part):
    """A workload's place in one network; what the engine fills in is accepted and ignored."""

    ipam_config: EndpointIpam | None = None
    links: Strings = None
    mac_address: str = ""
    aliases: Strings = None
    driver_opts: Texts = None
    gw_priority: int = 0
    network_id: str = ""
    endpoint_id: str = ""
    gateway: str = ""
    ip_address: str = ""
    ip_prefix_len: int = 0
    gateway6: str = ""
    global_ipv6_address: str = ""
    global_ipv6_prefix_len: int = 0
    dns_names: Strings = None


class NetworkingConfig(Part):
    """Networks to join."""

    endpoints_config: dict[str, EndpointSettings | None] | None = None


class CreateBody(Config):
    """The body of POST /containers/create."""

    host_config: HostConfig | None = None
    networking_config: NetworkingConfig | None = None
    platform: str | None = None


class UpdateBody(Resources):
    """The body of POST /containers/{id}/update, plus published ports."""

    restart_policy: RestartPolicy | None = None
    port_bindings: dict[str, list[PortBinding] | None] | None = None


class ExecBody(Part):
    """The body of POST /containers/{id}/exec."""

    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    console_size: list[int] | None = None
    detach_keys: str = ""
    tty: bool = False
    env: Strings = None
    cmd: list[str] | str | None = None
    privileged: bool = False
    user: str = ""
    working_dir: str = ""
    detach: bool = False
