"""What the measurements are held to; each is a ratio or a bound against a peer of the same run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One line of the results: `limit` is the most it may be, or the least if `at_least`."""

    key: str
    what: str
    limit: float
    at_least: bool = False
    unit: str = "×"

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


TARGETS: tuple[Target, ...] = (
    Target("run.docker", "`run --rm IMAGE true`, native client / docker run", 1 / 60),
    Target("run.crun", "the same / `crun run` on a prepared bundle", 1.0),
    Target("run.bwrap", "the same / bwrap", 1.5),
    Target("run.python.docker", "pure-Python client / docker run", 1 / 20),
    Target("run.python.runc", "pure-Python client / `runc run`", 0.6),
    Target("cycle.docker", "create+start+wait+remove per second, SDK / docker-py", 50, True),
    Target("live500", "start cost with 500 live containers / with none", 1.3),
    Target("memory.docker", "memory per idle container / docker's", 1 / 6),
    Target("daemons.docker", "engine+keeper+holder+command server / dockerd+containerd", 0.5),
    Target("load.docker", "load of a gzip Debian image / docker load", 0.4),
    Target("pull.docker", "pull from a local registry / docker pull", 0.5),
    Target("disk.docker", "disk used by the Debian image / docker's", 1.0),
    Target("port.direct", "published-port throughput / direct to the container", 0.85, True),
    Target("getppid.native", "getppid in a container / native", 1.1),
    Target("open.native", "open+close in a container / native", 1.1),
    Target("getppid.docker", "getppid in a container / in docker's", 1.0),
    Target("open.docker", "open+close in a container / in docker's", 1.0),
    Target("api.run", "docker's CLI, `run --rm IMAGE true` / against dockerd", 1 / 5),
    Target("api.cycle", "docker-py create+start+wait+remove, times as fast", 20, True),
    Target("api.ps", "list of 500 containers / dockerd's", 1.0),
    Target("api.inspect", "inspect among 500 / dockerd's", 1.0),
    Target("api.images", "list of images / dockerd's", 1.0),
    Target("api.logs", "lines a second through `docker run` / through dockerd", 1.0, True),
    Target("api.load", "docker load / into dockerd", 0.5),
    Target("build.cold", "ten Dockerfiles cold, times as fast as docker's builder", 1.5, True),
    Target("sandbox.docker", "`run --rm --boundary sandbox IMAGE true` / docker run", 0.5),
    Target("sandbox.runsc", "the same / runsc run on a prepared bundle", 1.0),
    Target("sandbox.pss", "proportional memory of each further sandbox", 50, unit="MiB"),
    Target("sandbox.work", "CPU-bound work in a sandbox / native", 1.05),
    Target("microvm.docker", "`run --rm --boundary microvm IMAGE true` / docker run", 0.8),
    Target("microvm.pss", "proportional memory of each further microVM", 20, unit="MiB"),
    Target("microvm.rate", "starts of microVMs a second, two clients", 8, True, unit="/s"),
    Target("microvm.boot", "cold boot of a microVM to its init / stock QEMU's", 0.5),
    Target("microvm.kvm", "run of `true` in a microVM with KVM", 125, unit="ms"),
    Target("build.again", "the same unchanged, times as fast", 5, True),
    Target("runtime.run.warm", "bulkhead-runtime `run` of `true`, planner warm / runc", 1.0),
    Target("runtime.run.cold", "the same as cold Python / runc", 2.0),
    Target("runtime.run.crun", "the same, warm / crun", 1.0),
    Target("runtime.cycle.warm", "bulkhead-runtime create+start+delete, warm / runc", 1.0),
    Target("runtime.cycle.cold", "the same as cold Python / runc", 2.0),
    Target("runtime.cycle.crun", "the same, warm / crun", 1.0),
    Target("runtime.exec.warm", "bulkhead-runtime `exec` of `true`, warm / runc", 1.0),
    Target("runtime.exec.cold", "the same as cold Python / runc", 2.0),
    Target("runtime.memory", "peak memory of the runtime's process in `create` / runc", 1.0),
)
