"""Checks of a create request that need no other state: pure, with Docker's wording.

Each `check_*` raises Invalid with one line; `validate` runs all and returns the warnings, things
that are ignored here and worth saying.
"""

import ipaddress
import os
import re

from bulkhead.engine import body, signals
from bulkhead.errors import Invalid, Unsupported

SMALLEST_MEMORY = 6 << 20
SMALLEST_INTERVAL_NS = 1_000_000
LOG_OPTIONS = frozenset(
    str.split(
        "max-size max-file labels labels-regex env env-regex tag compress mode max-buffer-size "
        "cache-disabled"
    )
)
LOG_DRIVERS = frozenset({"", "json-file", "none"})
ULIMITS = frozenset(
    str.split(
        "core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime "
        "sigpending stack"
    )
)
_HOSTNAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_PORT_KEY = re.compile(r"(\d+)(?:-(\d+))?(?:/([a-z]+))?", re.IGNORECASE)
_RANGE = re.compile(r"[1-9]\d{0,9}:[1-9]\d{0,9}")
_HOST_PORT = re.compile(r"(?:\d+(?:-\d+)?)?")
_CPUSET = re.compile(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*")


def size(text: str) -> int:
    """Bytes of "10m", "1.5g", "512"; Invalid otherwise."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise Invalid(f"invalid size: '{text}'")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def as_list(value: list[str] | str | None) -> list[str] | None:
    """A command that may have come as one string."""
    return [value] if isinstance(value, str) else value


def cpus_in(text: str) -> set[int]:
    """The numbers in a list like "0-2,7"; Invalid if it is none."""
    if not _CPUSET.fullmatch(text):
        raise Invalid(f"Invalid value {text} for cpuset cpus")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low or high > 8192:
            raise Invalid(f"Invalid value {text} for cpuset cpus")
        found.update(range(low, high + 1))
    return found


def _memory(r: body.Resources, warnings: list[str]) -> None:
    if r.memory < 0 or (r.memory and r.memory < SMALLEST_MEMORY):
        raise Invalid("Minimum memory limit allowed is 6MB")
    if r.memory_swap > 0 and not r.memory:
        raise Invalid(
            "You should always set the Memory limit when using Memoryswap limit, see usage"
        )
    if r.memory and 0 < r.memory_swap < r.memory:
        raise Invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
    if r.memory_swap < -1:
        raise Invalid(f"invalid memory-swap value {r.memory_swap}: -1 means unlimited")
    if r.memory_swappiness is not None and not -1 <= r.memory_swappiness <= 100:
        raise Invalid(
            f"Invalid value: {r.memory_swappiness}, valid memory swappiness range is 0-100"
        )
    if r.memory_reservation < 0 or (0 < r.memory_reservation < SMALLEST_MEMORY):
        raise Invalid("Minimum memory reservation allowed is 6MB")
    if r.memory and r.memory_reservation > r.memory:
        raise Invalid(
            "Minimum memory limit can not be less than memory reservation limit, see usage"
        )
    if r.kernel_memory > 0:
        warnings.append("Specifying a kernel memory limit is no longer supported; it is ignored.")
    if r.kernel_memory_tcp > 0:
        warnings.append("Specifying a kernel TCP memory limit is not supported; it is ignored.")
    if r.oom_kill_disable and not r.memory:
        warnings.append(
            "OOM killer is disabled for the container, but no memory limit is set, "
            "this can result in the system running out of resources."
        )


def _cpu(r: body.Resources) -> None:
    available = (os.cpu_count() or 1) if r.nano_cpus or r.cpuset_cpus else 1
    if r.nano_cpus:
        if r.cpu_period or r.cpu_quota:
            other = "Period" if r.cpu_period else "Quota"
            raise Invalid(f"Conflicting options: Nano CPUs and CPU {other} cannot both be set")
        if r.nano_cpus < 10_000_000 or r.nano_cpus > available * 1_000_000_000:
            raise Invalid(
                f"range of CPUs is from 0.01 to {available}.00, "
                f"as there are only {available} CPUs available"
            )
    if r.cpu_shares < 0:
        raise Invalid(f"invalid CPU shares ({r.cpu_shares}): value must be a positive integer")
    if r.cpu_period and not 1000 <= r.cpu_period <= 1_000_000:
        raise Invalid(
            "CPU cfs period cannot be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"
        )
    if 0 < r.cpu_quota < 1000:
        raise Invalid("CPU cfs quota cannot be less than 1ms (i.e. 1000)")
    if r.cpuset_cpus:
        wanted = cpus_in(r.cpuset_cpus)
        present = os.sched_getaffinity(0) | set(range(available))
        if not wanted <= present:
            raise Invalid(
                f"Requested CPUs are not available - requested {r.cpuset_cpus}, "
                f"available: 0-{available - 1}"
            )
    if r.cpuset_mems and not _CPUSET.fullmatch(r.cpuset_mems):
        raise Invalid(f"Invalid value {r.cpuset_mems} for cpuset mems")


def check_resources(r: body.Resources, warnings: list[str]) -> None:
    """Limits, of create and of update."""
    _memory(r, warnings)
    _cpu(r)
    if r.blkio_weight and not 10 <= r.blkio_weight <= 1000:
        raise Invalid("Range of blkio weight is from 10 to 1000")
    for weight in r.blkio_weight_device or ():
        if not 10 <= weight.weight <= 1000:
            raise Invalid(f"invalid weight {weight.weight} for device {weight.path}: 10 to 1000")
    for limit in r.ulimits or ():
        if limit.name not in ULIMITS:
            raise Invalid(f"invalid ulimit type: {limit.name}")
        soft, hard = (2**64 if value == -1 else value for value in (limit.soft, limit.hard))
        if soft > hard:
            raise Invalid(
                "ulimit soft limit must be less than or equal to hard limit: "
                f"{limit.soft} > {limit.hard}"
            )
    for rule in r.device_cgroup_rules or ():
        if not re.fullmatch(r"[acb] (?:\d+|\*):(?:\d+|\*) [rwm]{1,3}", rule):
            raise Invalid(f"invalid device cgroup rule format: '{rule}'")
    for device in r.devices or ():
        if re.fullmatch("[rwm]*", device.cgroup_permissions) is None:
            raise Invalid(f"bad mode specified for device: {device.cgroup_permissions}")
    for request in r.device_requests or ():
        raise Unsupported(
            f'could not select device driver "{request.driver}" with capabilities: '
            f"{request.capabilities or []}"
        )


def check_restart(policy: body.RestartPolicy | None, *, auto_remove: bool) -> None:
    """The restart policy."""
    if policy is None or policy.name in {"", "no"}:
        if policy is not None and policy.maximum_retry_count:
            raise Invalid(
                "invalid restart policy: maximum retry count can only be used with 'on-failure'"
            )
        return
    if policy.name not in {"always", "on-failure", "unless-stopped"}:
        raise Invalid(
            f"invalid restart policy: unknown policy '{policy.name}'; "
            "use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
        )
    if policy.maximum_retry_count < 0:
        raise Invalid("invalid restart policy: maximum retry count cannot be negative")
    if policy.maximum_retry_count and policy.name != "on-failure":
        raise Invalid(
            "invalid restart policy: maximum retry count can only be used with 'on-failure'"
        )
    if auto_remove:
        raise Invalid("can't create 'AutoRemove' container with restart policy")


def check_health(health: body.Healthcheck | None) -> None:
    """The health check."""
    if health is None:
        return
    test = health.test or []
    if test:
        kind = test[0]
        if kind not in {"NONE", "CMD", "CMD-SHELL", "HTTP", "TCP"}:
            raise Invalid(f'Unknown type "{kind}" in Healthcheck (try "CMD")')
        if kind != "NONE" and len(test) < 2:
            raise Invalid(f"Missing command after {kind} in Healthcheck")
    for label, value in (
        ("Interval", health.interval),
        ("Timeout", health.timeout),
        ("StartPeriod", health.start_period),
        ("StartInterval", health.start_interval),
    ):
        if value and value < SMALLEST_INTERVAL_NS:
            raise Invalid(f"{label} in Healthcheck cannot be less than 1ms")
    if health.retries < 0:
        raise Invalid("Retries in Healthcheck cannot be negative")


def _ports(host: body.HostConfig, exposed: body.Sets) -> None:
    for key in (*(exposed or {}), *(host.port_bindings or {})):
        match = _PORT_KEY.fullmatch(key)
        if match is None:
            raise Invalid(f'invalid port specification: "{key}"')
        low, high = int(match[1]), int(match[2] or match[1])
        if not 0 < low <= high < 65536:
            raise Invalid(f"invalid port range: {key}: ports are 1 to 65535")
        if (match[3] or "tcp").lower() not in {"tcp", "udp"}:
            raise Invalid(f"invalid proto: {match[3]}")
    for key, bindings in (host.port_bindings or {}).items():
        for binding in bindings or ():
            text = binding.host_port
            if not _HOST_PORT.fullmatch(text) or any(int(p) > 65535 for p in text.split("-") if p):
                raise Invalid(f'invalid port specification: "{text}" for {key}')


def _modes(host: body.HostConfig) -> None:
    def allowed(what: str, value: str, plain: tuple[str, ...], prefix: str = "") -> None:
        if value in plain or (prefix and value.startswith(prefix) and len(value) > len(prefix)):
            return
        raise Invalid(f"invalid {what}: {value}")

    allowed("IPC mode", host.ipc_mode, ("", "none", "private", "shareable", "host"), "container:")
    allowed("PID mode", host.pid_mode, ("", "private", "host"), "container:")
    allowed("UTS mode", host.uts_mode, ("", "host"))
    if not _RANGE.fullmatch(host.userns_mode):
        allowed("user namespace mode", host.userns_mode, ("", "host", "auto"))
    allowed("cgroup namespace mode", host.cgroupns_mode, ("", "host", "private"))
    if host.isolation not in {"", "default"}:
        raise Invalid(f'invalid isolation "{host.isolation}": only "default" exists on Linux')
    if host.volume_driver not in {"", "local"}:
        raise Invalid(f"error looking up volume plugin {host.volume_driver}: plugin not found")
    if host.console_size is not None and len(host.console_size) != 2:
        raise Invalid("ConsoleSize must be [height, width]")


def _network(config: body.CreateBody, host: body.HostConfig, warnings: list[str]) -> None:
    mode = host.network_mode
    if mode.startswith("container:"):
        if config.hostname:
            raise Invalid("conflicting options: hostname and the network mode")
        if host.port_bindings or host.publish_all_ports:
            raise Invalid(
                "conflicting options: port publishing and the container type network mode"
            )
        if config.exposed_ports:
            raise Invalid("conflicting options: port exposing and the container type network mode")
        if host.dns or host.extra_hosts:
            what = "dns" if host.dns else "custom host-to-IP mapping"
            raise Invalid(f"conflicting options: {what} and the network mode")
    elif mode == "host" and (host.port_bindings or host.publish_all_ports):
        warnings.append("Published ports are discarded when using host network mode")
    if host.uts_mode == "host" and (config.hostname or config.domainname):
        raise Invalid("conflicting options: hostname and the UTS mode")
    for server in host.dns or ():
        try:
            ipaddress.ip_address(server)
        except ValueError:
            raise Invalid(f"bad nameserver address: {server}") from None
    for entry in host.extra_hosts or ():
        name, separator, address = re.sub("=", ":", entry, count=1).partition(":")
        if not separator or not name or not address:
            raise Invalid(f'bad format for add-host: "{entry}"')


def _logging(log: body.LogConfig | None) -> None:
    if log is None:
        return
    if log.type_ not in LOG_DRIVERS:
        raise Invalid(
            f"logger: no log driver named '{log.type_}' is registered; "
            "there are 'json-file' and 'none'"
        )
    for key, value in (log.config or {}).items():
        if key not in LOG_OPTIONS:
            raise Invalid(f"unknown log opt '{key}' for json-file log driver")
        if key == "max-size" and value != "-1" and size(value) < 1:
            raise Invalid(f"invalid value for 'max-size': {value}")
        if key == "max-file" and (not value.isdecimal() or int(value) < 1):
            raise Invalid("'max-file' cannot be less than 1")
        if key == "mode" and value not in {"blocking", "non-blocking"}:
            raise Invalid(f"logger: logging mode not supported: {value}")
        if key == "compress" and value not in {"true", "false"}:
            raise Invalid(f"invalid value for 'compress': {value}")


def _config(config: body.Config) -> None:
    for entry in config.env or ():
        if not entry or entry.startswith("=") or "\0" in entry:
            raise Invalid(f"invalid environment variable: {entry!r}")
    if config.working_dir and not config.working_dir.startswith("/"):
        raise Invalid(
            f"the working directory '{config.working_dir}' is invalid, "
            "it needs to be an absolute path"
        )
    if config.hostname and (len(config.hostname) > 63 or not _HOSTNAME.fullmatch(config.hostname)):
        raise Invalid(f"invalid hostname format: {config.hostname}")
    if config.stop_signal:
        signals.number(config.stop_signal)
    for command in (as_list(config.cmd), as_list(config.entrypoint)):
        if any("\0" in word for word in command or ()):
            raise Invalid("invalid command: an argument contains a NUL byte")
    check_health(config.healthcheck)


def _host(host: body.HostConfig) -> None:
    if not -1000 <= host.oom_score_adj <= 1000:
        raise Invalid(
            f"Invalid value {host.oom_score_adj}, range for oom score adj is [-1000, 1000]"
        )
    if host.shm_size < 0:
        raise Invalid("SHM size can not be less than 0")
    if host.auto_remove:
        check_restart(host.restart_policy, auto_remove=True)
    for name, value in (host.sysctls or {}).items():
        if not re.fullmatch(r"[a-zA-Z0-9_./-]+", name) or ".." in name or "\0" in value:
            raise Invalid(f"invalid sysctl: {name}")
        if name.startswith("net.") and host.network_mode == "host":
            raise Invalid(f"sysctl '{name}' is not allowed in the host network namespace")


def validate(config: body.CreateBody, *, guest: bool = False) -> list[str]:
    """Check everything; Invalid for the first mistake; returns warnings.

    `guest`: it will have a kernel, and a disk, of its own.
    """
    warnings: list[str] = []
    host = config.host_config or body.HostConfig()
    _config(config)
    _host(host)
    if host.storage_opt and not guest:
        raise Unsupported(
            "--storage-opt is not supported: writable layers share the file system of the store"
        )
    check_resources(host, warnings)
    check_restart(host.restart_policy, auto_remove=host.auto_remove)
    _ports(host, config.exposed_ports)
    _modes(host)
    _network(config, host, warnings)
    _logging(host.log_config)
    return warnings
