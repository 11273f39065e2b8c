"""From the flags of `run` and `create` to docker's ContainerCreate body."""

from collections.abc import Mapping
from typing import Any

from bulkhead.cli.options import Parsed, UsageError, parse_bytes
from bulkhead.errors import Invalid, Unsupported

Body = dict[str, Any]

# flag → HostConfig member, values as they are
HOST_PLAIN = {
    "cgroup-parent": "CgroupParent", "cgroupns": "CgroupnsMode", "cpu-period": "CpuPeriod",
    "cpu-quota": "CpuQuota", "cpu-rt-period": "CpuRealtimePeriod", "blkio-weight": "BlkioWeight",
    "cpu-rt-runtime": "CpuRealtimeRuntime", "cpu-shares": "CpuShares", "cpus": "NanoCpus",
    "cpuset-cpus": "CpusetCpus", "cpuset-mems": "CpusetMems", "device-cgroup-rule":
    "DeviceCgroupRules", "dns": "Dns", "dns-search": "DnsSearch", "group-add": "GroupAdd",
    "init": "Init", "ipc": "IpcMode", "memory": "Memory", "memory-reservation": "MemoryReservation",
    "memory-swap": "MemorySwap", "memory-swappiness": "MemorySwappiness", "oom-kill-disable":
    "OomKillDisable", "oom-score-adj": "OomScoreAdj", "pid": "PidMode", "pids-limit": "PidsLimit",
    "reserve-cpus": "ReserveCpus", "reserve-io": "ReserveIo", "reserve-memory": "ReserveMemory",
    "privileged": "Privileged", "publish-all": "PublishAllPorts", "read-only": "ReadonlyRootfs",
    "rm": "AutoRemove", "shm-size": "ShmSize", "sysctl": "Sysctls", "userns": "UsernsMode",
    "uts": "UTSMode", "volume-driver": "VolumeDriver", "volumes-from": "VolumesFrom",
    "annotation": "Annotations", "cap-add": "CapAdd", "cap-drop": "CapDrop",
}  # fmt: skip

_CONFIG_PLAIN = {
    "hostname": "Hostname", "domainname": "Domainname", "user": "User", "workdir": "WorkingDir",
    "tty": "Tty", "interactive": "OpenStdin", "stop-signal": "StopSignal",
    "stop-timeout": "StopTimeout",
}  # fmt: skip

_REFUSED = {
    "link": "legacy links are not supported; use a network of your own with --network and "
    "--network-alias",
    "gpus": "--gpus is not supported; pass the device files with --device",
}


def create_body(parsed: Parsed, environ: Mapping[str, str]) -> Body:
    """The body for IMAGE [COMMAND…] and every flag given; absent members mean the default.

    Reads what flags name (env files, seccomp profiles, label files) from the file system.
    """
    given = parsed.values
    for flag, reason in _REFUSED.items():
        if flag in given:
            raise Unsupported(reason)
    host: Body = {name: given[flag] for flag, name in HOST_PLAIN.items() if flag in given}
    body: Body = {name: given[flag] for flag, name in _CONFIG_PLAIN.items() if flag in given}
    body["Image"] = parsed.args[0]
    if len(parsed.args) > 1:
        body["Cmd"] = parsed.args[1:]
    for flag, build in _BUILDERS:
        if flag in given:
            build(given[flag], body, host)
    _environment(parsed, environ, body)
    _labels(parsed, body)
    _health(parsed, body)
    _networks(parsed, body, host)
    if given.get("isolation", "default") not in ("", "default"):
        raise Unsupported(f"--isolation {given['isolation']}: only default exists on Linux")
    body["HostConfig"] = host
    return body


def _environment(parsed: Parsed, environ: Mapping[str, str], body: Body) -> None:
    values = parsed.values
    if "env" in values or "env-file" in values:
        lines = environment(values.get("env-file", ()), values.get("env", ()), environ)
        if lines:
            body["Env"] = lines


def environment(files: Any, assignments: Any, environ: Mapping[str, str]) -> list[str]:
    """KEY=VALUE lines from --env-file and --env; a bare KEY takes the caller's value, if any."""
    from bulkhead.cli.files import key_value_lines

    lines: list[str] = []
    for path in files:
        lines.extend(key_value_lines(path, environ))
    for text in assignments:
        if text.startswith("=") or not text:
            raise UsageError(f'invalid argument "{text}" for "-e, --env" flag: '
                             f"invalid environment variable: {text}")  # fmt: skip
        if "=" in text:
            lines.append(text)
        elif text in environ:
            lines.append(f"{text}={environ[text]}")
    return lines


def _labels(parsed: Parsed, body: Body) -> None:
    values = parsed.values
    if "label" not in values and "label-file" not in values:
        return
    from bulkhead.cli.files import key_value_lines

    lines = [line for path in values.get("label-file", ()) for line in key_value_lines(path, {})]
    body["Labels"] = dict(text.partition("=")[::2] for text in [*lines, *values.get("label", ())])


_HEALTH_TIMES = (
    ("health-interval", "Interval"), ("health-timeout", "Timeout"),
    ("health-start-period", "StartPeriod"), ("health-start-interval", "StartInterval"),
    ("health-retries", "Retries"),
)  # fmt: skip


def health_test(command: str) -> list[str]:
    """The Test member for --health-cmd: a shell line, or an http(s):// or tcp:// probe of ours."""
    if command.startswith(("http://", "https://")) and " " not in command:
        return ["HTTP", command]
    if command.startswith("tcp://") and " " not in command:
        return ["TCP", command.removeprefix("tcp://").removeprefix(":")]
    return ["CMD-SHELL", command]


def _health(parsed: Parsed, body: Body) -> None:
    given = parsed.values
    if given.get("no-healthcheck"):
        if any(flag.startswith("health-") for flag in given):
            raise Invalid("--no-healthcheck conflicts with --health-* options")
        body["Healthcheck"] = {"Test": ["NONE"]}
        return
    check: Body = {name: given[flag] for flag, name in _HEALTH_TIMES if flag in given}
    for name, value in check.items():
        if value < 0:
            raise Invalid(f"--health-{name.lower()} cannot be negative")
    if given.get("health-cmd"):
        check["Test"] = health_test(given["health-cmd"])
    if check:
        body["Healthcheck"] = check


def _entrypoint(value: str, body: Body, host: Body) -> None:
    body["Entrypoint"] = [value]  # [""] clears the image's, as in docker


def _volumes(specs: list[str], body: Body, host: Body) -> None:
    from bulkhead.cli.mounts import volume_flag

    binds: list[str] = []
    anonymous: Body = {}
    for spec in specs:
        bind, target = volume_flag(spec)
        if bind is None:
            anonymous[target] = {}
        else:
            binds.append(bind)
    if binds:
        host["Binds"] = binds
    if anonymous:
        body["Volumes"] = anonymous


def _mounts(specs: list[str], body: Body, host: Body) -> None:
    from bulkhead.cli.mounts import mount_flag

    host["Mounts"] = [mount_flag(spec) for spec in specs]


def _tmpfs(specs: list[str], body: Body, host: Body) -> None:
    host["Tmpfs"] = dict(spec.partition(":")[::2] for spec in specs)


def _publish(specs: list[str], body: Body, host: Body) -> None:
    from bulkhead.cli.ports import publish

    exposed, bindings = publish(specs)
    body.setdefault("ExposedPorts", {}).update(exposed)
    host["PortBindings"] = bindings


def _expose(specs: list[str], body: Body, host: Body) -> None:
    from bulkhead.cli.ports import expose

    body.setdefault("ExposedPorts", {}).update(expose(specs))


def _restart(text: str, body: Body, host: Body) -> None:
    host["RestartPolicy"] = restart_policy(text)
    if host.get("AutoRemove") and host["RestartPolicy"]["Name"] not in ("", "no"):
        raise UsageError("conflicting options: cannot specify both --restart and --rm")


def restart_policy(text: str) -> Body:
    """docker's RestartPolicy of `no`, `always`, `unless-stopped` or `on-failure[:MAX]`."""
    name, colon, count = text.partition(":")
    if name not in ("", "no", "always", "unless-stopped", "on-failure"):
        raise UsageError(f"invalid restart policy: unknown policy '{name}'; use one of 'no', "
                         "'always', 'on-failure', or 'unless-stopped'")  # fmt: skip
    policy: Body = {"Name": name or "no"}
    if colon:
        if name != "on-failure":
            raise UsageError(f"invalid restart policy: maximum retry count can only be used with "
                             f"'on-failure', not with '{name}'")  # fmt: skip
        if not count.isdecimal():
            raise UsageError(
                "invalid restart policy format: maximum retry count must be an integer"
            )
        policy["MaximumRetryCount"] = int(count)
    return policy


def _ulimits(specs: list[str], body: Body, host: Body) -> None:
    found = []
    for spec in specs:
        name, equals, limits = spec.partition("=")
        soft, _, hard = limits.partition(":")
        try:
            if not equals:
                raise ValueError
            low = _limit(soft)
            high = _limit(hard) if hard else low
        except ValueError:
            raise UsageError(f'invalid argument "{spec}" for "--ulimit" flag: '
                             f"invalid ulimit argument: {spec}") from None  # fmt: skip
        if high != -1 and (low == -1 or low > high):
            raise UsageError(
                f'invalid argument "{spec}" for "--ulimit" flag: ulimit soft limit '
                f"must be less than or equal to hard limit: {low} > {high}"
            )
        found.append({"Name": name, "Soft": low, "Hard": high})
    host["Ulimits"] = found


def _limit(text: str) -> int:
    return -1 if text in ("-1", "unlimited") else int(text)


def _devices(specs: list[str], body: Body, host: Body) -> None:
    found = []
    for spec in specs:
        parts = spec.split(":")
        source, target, rights = parts[0], parts[0], "rwm"
        if len(parts) == 2 and set(parts[1]) <= set("rwm"):
            rights = parts[1]
        elif len(parts) >= 2:
            target = parts[1]
            rights = parts[2] if len(parts) == 3 else "rwm"
        if len(parts) > 3 or not source or not rights or not set(rights) <= set("rwm"):
            raise UsageError(f"invalid device specification: {spec}")
        found.append({"PathOnHost": source, "PathInContainer": target, "CgroupPermissions": rights})
    host["Devices"] = found


def _security(specs: list[str], body: Body, host: Body) -> None:
    """--security-opt; a seccomp profile's file is read here, since the engine may not see it."""
    found = []
    for spec in specs:
        key, separator, value = spec.partition("=")
        if not separator:
            key, separator, value = spec.partition(":")
        if key == "seccomp" and value not in ("", "unconfined", "builtin"):
            import json

            from bulkhead.cli.files import read_text

            try:
                profile = json.loads(read_text(value, "seccomp profile"))
            except ValueError as error:
                raise Invalid(
                    f"compacting json for seccomp profile ({value}) failed: {error}"
                ) from None
            found.append("seccomp=" + json.dumps(profile, separators=(",", ":")))
        else:
            found.append(spec)
    host["SecurityOpt"] = found


def _throttle(flag: str, name: str, *, size: bool) -> Any:
    def build(specs: list[str], body: Body, host: Body) -> None:
        found = []
        for spec in specs:
            path, colon, rate = spec.rpartition(":")
            try:
                if not colon or not path.startswith("/dev/"):
                    raise ValueError
                number = parse_bytes(rate) if size else int(rate)
            except ValueError:
                raise UsageError(
                    f'invalid argument "{spec}" for "--{flag}" flag: '
                    "the format is <device-path>:<number>[<unit>]"
                ) from None
            found.append({"Path": path, "Weight" if "weight" in flag else "Rate": number})
        host[name] = found

    return build


def _log_driver(value: str, body: Body, host: Body) -> None:
    host.setdefault("LogConfig", {})["Type"] = value


def _log_options(specs: list[str], body: Body, host: Body) -> None:
    config = host.setdefault("LogConfig", {})
    config["Config"] = dict(text.partition("=")[::2] for text in specs)


def _storage(specs: list[str], body: Body, host: Body) -> None:
    host["StorageOpt"] = dict(text.partition("=")[::2] for text in specs)


def _add_host(specs: list[str], body: Body, host: Body) -> None:
    found = []
    for spec in specs:
        name, separator, address = spec.partition("=")
        if not separator:
            name, separator, address = spec.partition(":")
        if not name or not separator or not address:
            raise UsageError(f'invalid argument "{spec}" for "--add-host" flag: '
                             f'bad format for add-host: "{spec}"')  # fmt: skip
        found.append(f"{name}:{address.strip('[]')}")
    host["ExtraHosts"] = found


def _dns_options(specs: list[str], body: Body, host: Body) -> None:
    host.setdefault("DnsOptions", []).extend(specs)


def _cidfile(path: str, body: Body, host: Body) -> None:
    host["ContainerIDFile"] = path


_BUILDERS: tuple[tuple[str, Any], ...] = (
    ("entrypoint", _entrypoint), ("volume", _volumes), ("mount", _mounts), ("tmpfs", _tmpfs),
    ("publish", _publish), ("expose", _expose), ("restart", _restart), ("ulimit", _ulimits),
    ("device", _devices), ("security-opt", _security), ("log-driver", _log_driver),
    ("log-opt", _log_options), ("storage-opt", _storage), ("add-host", _add_host),
    ("dns-option", _dns_options), ("dns-opt", _dns_options), ("cidfile", _cidfile),
    ("blkio-weight-device", _throttle("blkio-weight-device", "BlkioWeightDevice", size=False)),
    ("device-read-bps", _throttle("device-read-bps", "BlkioDeviceReadBps", size=True)),
    ("device-write-bps", _throttle("device-write-bps", "BlkioDeviceWriteBps", size=True)),
    ("device-read-iops", _throttle("device-read-iops", "BlkioDeviceReadIOps", size=False)),
    ("device-write-iops", _throttle("device-write-iops", "BlkioDeviceWriteIOps", size=False)),
)  # fmt: skip


def _networks(parsed: Parsed, body: Body, host: Body) -> None:
    """--network (plain or key=value), --ip, --ip6, aliases, MAC: NetworkMode and endpoints."""
    given = parsed.values
    named = [*given.get("network", ()), *given.get("net", ())]
    aliases = [*given.get("network-alias", ()), *given.get("net-alias", ())]
    endpoints: dict[str, Body] = {}
    for spec in named:
        name, endpoint = network_flag(spec)
        if name in endpoints:
            raise Invalid(f'network "{name}" is specified multiple times')
        endpoints[name] = endpoint
    first = next(iter(endpoints), "default")
    endpoint = endpoints.setdefault(first, {})
    addresses = endpoint.setdefault("IPAMConfig", {})
    for flag, name in (("ip", "IPv4Address"), ("ip6", "IPv6Address")):
        if given.get(flag):
            addresses[name] = given[flag]
    if given.get("link-local-ip"):
        addresses["LinkLocalIPs"] = given["link-local-ip"]
    if not addresses:
        del endpoint["IPAMConfig"]
    if aliases:
        endpoint["Aliases"] = [*endpoint.get("Aliases", ()), *aliases]
    if given.get("mac-address"):
        endpoint["MacAddress"] = given["mac-address"]
        body["MacAddress"] = given["mac-address"]
    if named:
        host["NetworkMode"] = first
    if any(endpoints.values()) or len(endpoints) > 1:
        body["NetworkingConfig"] = {"EndpointsConfig": endpoints}


_ENDPOINT_KEYS = {"ip": "IPv4Address", "ip6": "IPv6Address"}


def network_flag(spec: str) -> tuple[str, Body]:
    """(name, endpoint settings) of one --network value: `NAME` or `name=NAME,alias=A,ip=…`."""
    if "=" not in spec:
        return spec, {}
    name = ""
    endpoint: Body = {}
    for part in spec.split(","):
        key, _, value = part.partition("=")
        key = key.strip().lower()
        if key == "name":
            name = value
        elif key in ("alias", "aliases"):
            endpoint.setdefault("Aliases", []).append(value)
        elif key in _ENDPOINT_KEYS:
            endpoint.setdefault("IPAMConfig", {})[_ENDPOINT_KEYS[key]] = value
        elif key == "link-local-ip":
            endpoint.setdefault("IPAMConfig", {}).setdefault("LinkLocalIPs", []).append(value)
        elif key == "mac-address":
            endpoint["MacAddress"] = value
        elif key == "driver-opt":
            option, _, setting = value.partition("=")
            endpoint.setdefault("DriverOpts", {})[option] = setting
        elif key == "gw-priority":
            endpoint["GwPriority"] = int(value)
        else:
            raise UsageError(f'invalid argument "{spec}" for "--network" flag: invalid field {key}')
    if not name:
        raise UsageError(f'invalid argument "{spec}" for "--network" flag: network name is missing')
    return name, endpoint
