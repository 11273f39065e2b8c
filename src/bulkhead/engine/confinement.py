"""Whether a workload is alone with itself: nothing it holds can reach, or outlive it in, others."""

from bulkhead.engine.records import Record


def confined(record: Record) -> bool:
    """Whether it has no file, namespace or power beyond every container's own.

    Then no descriptor can leave it (unix(7) needs a socket file or a network namespace that two
    share), and with the default capabilities it cannot change its network. What happens to it
    later, an exec or somebody who joins a namespace, is the caller's to notice.
    """
    host = record.host
    return (
        record.boundary == "container"
        and not record.mounts
        and not host.privileged
        and not host.cap_add
        and not host.security_opt
        and not host.sysctls
        and not host.devices
        and not host.userns_mode
        and not host.pid_mode
        and not host.uts_mode
        and host.ipc_mode in {"", "private"}
        and "/proc/sys" in (host.readonly_paths or ())
    )
