"""The flags of `run` and `create`."""

from bulkhead.cli.options import DETACH_KEYS, SIG_PROXY, Option

_O = Option

RESOURCES: tuple[Option, ...] = (
    _O(
        "--blkio-weight", "uint", "Block IO (relative weight), between 10 and 1000, or 0 to disable"
    ),
    _O("--cpu-period", "int", "Limit CPU CFS (Completely Fair Scheduler) period, in microseconds"),
    _O("--cpu-quota", "int", "Limit CPU CFS (Completely Fair Scheduler) quota, in microseconds"),
    _O("--cpu-rt-period", "int", "Limit CPU real-time period in microseconds"),
    _O("--cpu-rt-runtime", "int", "Limit CPU real-time runtime in microseconds"),
    _O("-c, --cpu-shares", "int", "CPU shares (relative weight)"),
    _O("--cpus", "decimal", "Number of CPUs"),
    _O("--cpuset-cpus", "string", "CPUs in which to allow execution (0-3, 0,1)"),
    _O("--cpuset-mems", "string", "Memory nodes in which to allow execution (0-3, 0,1)"),
    _O("-m, --memory", "bytes", "Memory limit"),
    _O("--memory-reservation", "bytes", "Memory soft limit"),
    _O("--memory-swap", "bytes", "Swap limit equal to memory plus swap: -1 for unlimited swap"),
    _O("--pids-limit", "int", "Limit the number of processes (-1 for unlimited)"),
    _O("--reserve-cpus", "decimal", "CPUs guaranteed to it (whole ones are its own, if possible)"),
    _O("--reserve-io", "percent", "Guaranteed part of the disk's time, in percent"),
    _O("--reserve-memory", "bytes", "Memory guaranteed to it"),
    _O("--restart", "string", "Restart policy: no, always, unless-stopped, on-failure[:MAX]"),
)

_IDENTITY = (
    _O("--name", "string", "Assign a name to the container"),
    _O("-l, --label", "list", "Set meta data on a container"),
    _O("--label-file", "list", "Read in a line delimited file of labels", complete="file"),
    _O("--annotation", "map", "Add an annotation, passed through to the OCI configuration"),
    _O("--cidfile", "string", "Write the container ID to the file", complete="file"),
    _O("-h, --hostname", "string", "Container host name"),
    _O("--domainname", "string", "Container NIS domain name"),
    _O("--platform", "string", "Platform of the image, as OS[/ARCH[/VARIANT]]"),
    _O("--pull", "string", "Pull image before running", default="missing",
       choices=("always", "missing", "never")),
    _O("-q, --quiet", "bool", "Suppress the pull output"),
    _O("--boundary", "string", "What isolates it: container, sandbox, microvm, vm, vm:NAME, auto"),
    _O("--kernel", "string", "Guest kernel, for boundaries with a kernel of their own"),
    _O("--tenant", "string", "Whose it is: strangers share no guest, no machine, no namespaces"),
    _O("--runtime", "string", "Same as --boundary, for docker's sake"),
    _O("--isolation", "string", "Only \"default\", for docker's sake"),
    _O("--dry-run", "bool", "Print the steps of the launch, run nothing"),
    _O("--disable-content-trust", "bool", "No effect: content trust is not checked", hidden=True),
)  # fmt: skip

_STREAMS = (
    _O("-a, --attach", "list", "Attach to STDIN, STDOUT or STDERR"),
    _O("-i, --interactive", "bool", "Keep STDIN open even if not attached"),
    _O("-t, --tty", "bool", "Allocate a pseudo-TTY"),
    _O("--log-driver", "string", "Logging driver: json-file (also local) or none"),
    _O("--log-opt", "list", "Log driver options (max-size=10m, max-file=3)"),
)

_PROCESS = (
    _O("-e, --env", "list", "Set environment variables"),
    _O("--env-file", "list", "Read in a file of environment variables", complete="file"),
    _O("--entrypoint", "string", "Overwrite the default ENTRYPOINT of the image"),
    _O("-w, --workdir", "string", "Working directory inside the container"),
    _O("-u, --user", "string", "Username or UID (format: <name|uid>[:<group|gid>])"),
    _O("--group-add", "list", "Add additional groups to join"),
    _O("--init", "bool", "Run an init inside the container that forwards signals and reaps"),
    _O("--ulimit", "list", "Ulimit options (NAME=SOFT[:HARD])"),
    _O("--stop-signal", "string", "Signal to stop the container"),
    _O("--stop-timeout", "int", "Timeout (in seconds) to stop a container"),
    _O("--oom-kill-disable", "bool", "Disable OOM killer"),
    _O("--oom-score-adj", "int", "Tune the host's OOM preferences (-1000 to 1000)"),
)

_HEALTH = (
    _O("--health-cmd", "string", "Command to run to check health; also http://… or tcp://:PORT"),
    _O("--health-interval", "duration", "Time between running the check (ms|s|m|h)"),
    _O("--health-retries", "int", "Consecutive failures needed to report unhealthy"),
    _O("--health-start-interval", "duration", "Time between checks during the start period"),
    _O("--health-start-period", "duration", "Time to initialize before failures count"),
    _O("--health-timeout", "duration", "Maximum time to allow one check to run (ms|s|m|h)"),
    _O("--no-healthcheck", "bool", "Disable any container-specified HEALTHCHECK"),
)

_FILES = (
    _O("-v, --volume", "list", "Bind mount a volume ([SOURCE:]TARGET[:OPTIONS])", complete="file"),
    _O("--mount", "list", "Attach a filesystem mount (type=bind|volume|tmpfs,source=…,target=…)"),
    _O("--tmpfs", "list", "Mount a tmpfs directory (TARGET[:OPTIONS])"),
    _O("--volumes-from", "list", "Mount volumes from the specified container(s)",
       complete="container"),
    _O("--volume-driver", "string", "Volume driver for anonymous and named volumes"),
    _O("--read-only", "bool", "Mount the container's root filesystem as read only"),
    _O("--shm-size", "bytes", "Size of /dev/shm"),
    _O("--storage-opt", "list", "Storage options for the container (size=…)"),
)  # fmt: skip

_NETWORK = (
    _O("--add-host", "list", "Add a custom host-to-IP mapping (host:ip)"),
    _O("--dns", "list", "Set custom DNS servers"),
    _O("--dns-option", "list", "Set DNS options"),
    _O("--dns-opt", "list", "Set DNS options", hidden=True),
    _O("--dns-search", "list", "Set custom DNS search domains"),
    _O("--expose", "list", "Expose a port or a range of ports"),
    _O("--ip", "string", "IPv4 address (e.g., 172.30.100.104)"),
    _O("--ip6", "string", "IPv6 address (e.g., 2001:db8::33)"),
    _O("--link", "list", "Refused: legacy links; use --network with --network-alias"),
    _O("--link-local-ip", "list", "Container IPv4/IPv6 link-local addresses"),
    _O("--mac-address", "string", "Container MAC address (e.g., 92:d0:c6:0a:29:33)"),
    _O("--network", "list", "Connect a container to a network", complete="network"),
    _O("--net", "list", "Connect a container to a network", hidden=True, complete="network"),
    _O("--network-alias", "list", "Add network-scoped alias for the container"),
    _O("--net-alias", "list", "Add network-scoped alias for the container", hidden=True),
    _O("-p, --publish", "list", "Publish a container's port(s) to the host"),
    _O("-P, --publish-all", "bool", "Publish all exposed ports to random ports"),
)

_ISOLATION = (
    _O("--cap-add", "list", "Add Linux capabilities"),
    _O("--cap-drop", "list", "Drop Linux capabilities"),
    _O("--privileged", "bool", "Give extended privileges to this container"),
    _O("--security-opt", "list", "Security options (seccomp=FILE, no-new-privileges, label=…)"),
    _O("--device", "list", "Add a host device (HOST[:CONTAINER][:rwm])", complete="file"),
    _O("--device-cgroup-rule", "list", "Add a rule to the cgroup allowed devices list"),
    _O("--gpus", "string", "Refused: GPUs are not supported"),
    _O("--ipc", "string", "IPC mode: private, shareable, host, none, container:NAME"),
    _O("--pid", "string", "PID namespace: host or container:NAME"),
    _O("--uts", "string", "UTS namespace: host"),
    _O("--userns", "string", "User namespace: host, auto, or FIRST:COUNT"),
    _O("--cgroupns", "string", "Cgroup namespace: private or host"),
    _O("--cgroup-parent", "string", "Optional parent cgroup for the container"),
    _O("--sysctl", "map", "Sysctl options"),
)

_LIMITS = (
    *RESOURCES,
    _O("--blkio-weight-device", "list", "Block IO weight (DEVICE:WEIGHT)"),
    _O("--device-read-bps", "list", "Limit read rate from a device (DEVICE:BYTES per second)"),
    _O("--device-read-iops", "list", "Limit read rate from a device (DEVICE:IO per second)"),
    _O("--device-write-bps", "list", "Limit write rate to a device (DEVICE:BYTES per second)"),
    _O("--device-write-iops", "list", "Limit write rate to a device (DEVICE:IO per second)"),
    _O("--memory-swappiness", "int", "Tune container memory swappiness (0 to 100)"),
    _O("--kernel-memory", "bytes", "Refused by kernels since 5.11; no effect", hidden=True),
)

CREATE: tuple[Option, ...] = (
    *_IDENTITY, *_STREAMS, *_PROCESS, *_HEALTH, *_FILES, *_NETWORK, *_ISOLATION, *_LIMITS,
    _O("--rm", "bool", "Automatically remove the container and its anonymous volumes on exit"),
)  # fmt: skip

RUN: tuple[Option, ...] = (
    *CREATE,
    _O("-d, --detach", "bool", "Run container in background and print container ID"),
    DETACH_KEYS,
    SIG_PROXY,
)
