"""A request's configuration completed by its image's and by the defaults: Docker's rules, pure."""

import posixpath

from bulkhead.engine import body
from bulkhead.engine.options import as_list
from bulkhead.errors import Invalid
from bulkhead.isolation.masks import MASKED_PATHS, READONLY_PATHS
from bulkhead.oci.image import ContainerConfig

SHM_SIZE = 64 << 20


def _env(own: list[str], image: list[str]) -> list[str]:
    """The request's variables, then the image's whose names it does not have."""
    names = {entry.partition("=")[0] for entry in own}
    return [*own, *(entry for entry in image if entry.partition("=")[0] not in names)]


def _health(own: body.Healthcheck | None, image: "ContainerConfig") -> body.Healthcheck | None:
    base = image.healthcheck
    if base is None:
        return own
    inherited = body.Healthcheck(
        test=list(base.test or []),
        interval=base.interval,
        timeout=base.timeout,
        retries=base.retries,
        start_period=base.start_period,
        start_interval=base.start_interval,
    )
    if own is None:
        return inherited
    return body.Healthcheck(
        test=own.test or inherited.test,
        interval=own.interval or inherited.interval,
        timeout=own.timeout or inherited.timeout,
        retries=own.retries or inherited.retries,
        start_period=own.start_period or inherited.start_period,
        start_interval=own.start_interval or inherited.start_interval,
    )


def config(own: body.CreateBody, image: ContainerConfig) -> body.Config:
    """The effective Config of a new workload."""
    cmd, entrypoint = as_list(own.cmd), as_list(own.entrypoint)
    if entrypoint is None:
        entrypoint = image.entrypoint
        if not cmd:
            cmd = image.cmd
    elif entrypoint == [""]:
        entrypoint = None
    if entrypoint is not None and not entrypoint:
        entrypoint = None
    workdir = own.working_dir or image.working_dir or ""
    return body.Config(
        hostname=own.hostname,
        domainname=own.domainname,
        user=own.user or image.user,
        attach_stdin=own.attach_stdin,
        attach_stdout=own.attach_stdout,
        attach_stderr=own.attach_stderr,
        exposed_ports={**(image.exposed_ports or {}), **(own.exposed_ports or {})} or None,
        tty=own.tty,
        open_stdin=own.open_stdin,
        stdin_once=own.stdin_once,
        env=_env(own.env or [], image.env or []),
        cmd=cmd,
        healthcheck=_health(own.healthcheck, image),
        image=own.image,
        volumes={**(image.volumes or {}), **(own.volumes or {})} or None,
        working_dir=posixpath.normpath("/" + workdir.lstrip("/")) if workdir else "",
        entrypoint=entrypoint,
        network_disabled=own.network_disabled,
        mac_address=own.mac_address,
        on_build=image.on_build,
        labels={**(image.labels or {}), **(own.labels or {})},
        stop_signal=own.stop_signal or image.stop_signal or None,
        stop_timeout=own.stop_timeout if own.stop_timeout is not None else image.stop_timeout,
        shell=own.shell or image.shell,
    )


def command(effective: body.Config) -> list[str]:
    """What is executed; Invalid if there is nothing."""
    words = [*(as_list(effective.entrypoint) or []), *(as_list(effective.cmd) or [])]
    if not words or not words[0]:
        raise Invalid("no command specified")
    return words


def complete_ports(host: body.HostConfig) -> None:
    """Write "80" as "80/tcp", and take ranges apart ("8000-8002/udp")."""
    if not host.port_bindings:
        return
    found: dict[str, list[body.PortBinding] | None] = {}
    for key, bindings in host.port_bindings.items():
        span, _, protocol = key.partition("/")
        first, _, last = span.partition("-")
        count = int(last or first) - int(first) + 1
        for offset in range(count):
            found.setdefault(f"{int(first) + offset}/{(protocol or 'tcp').lower()}", [])
            place = found[f"{int(first) + offset}/{(protocol or 'tcp').lower()}"]
            for binding in bindings or [body.PortBinding()]:
                text = _port_at(binding.host_port, offset, count, key)
                assert place is not None
                place.append(body.PortBinding(host_ip=binding.host_ip, host_port=text))
    host.port_bindings = found


def _port_at(text: str, offset: int, count: int, key: str) -> str:
    if not text or count == 1:
        return text
    low, _, high = text.partition("-")
    if int(high or low) - int(low) + 1 != count:
        raise Invalid(f"invalid ranges specified for container and host Ports: {key} and {text}")
    return str(int(low) + offset)


def host(own: body.HostConfig, boundary: str) -> None:
    """Fill in, in place, what Docker fills in."""
    own.network_mode = own.network_mode or "bridge"
    if own.network_mode == "default":
        own.network_mode = "bridge"
    own.ipc_mode = own.ipc_mode or "private"
    own.cgroupns_mode = own.cgroupns_mode or "private"
    own.shm_size = own.shm_size or SHM_SIZE
    own.runtime = boundary
    if own.log_config is None or not own.log_config.type_:
        options = own.log_config.config if own.log_config else None
        own.log_config = body.LogConfig(type_="json-file", config=options or {})
    if own.restart_policy is None or not own.restart_policy.name:
        own.restart_policy = body.RestartPolicy(name="no")
    if own.memory and not own.memory_swap:
        own.memory_swap = 2 * own.memory
    if own.memory_swappiness == -1:
        own.memory_swappiness = None
    if own.pids_limit is not None and own.pids_limit <= 0:
        own.pids_limit = None
    if own.oom_kill_disable is None:
        own.oom_kill_disable = False
    complete_ports(own)
    confined = not own.privileged
    for option in own.security_opt or ():
        if option in {"systempaths=unconfined", "unmask=ALL", "unmask=all"}:
            confined = False
    if own.masked_paths is None:
        own.masked_paths = list(MASKED_PATHS) if confined else []
    if own.readonly_paths is None:
        own.readonly_paths = list(READONLY_PATHS) if confined else []
