"""The peers: docker, runc, crun and bwrap from the distribution's packages, on their own roots."""

import compileall
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bulkhead
from bench.measure import output

BUSYBOX = "/bin/busybox"


def busybox_root(folder: Path) -> Path:
    """A root file system with busybox-static and `true`, `sleep`, `sh`."""
    root = folder / "busybox"
    (root / "bin").mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    for name in ("true", "sleep", "sh", "cat"):
        (root / "bin" / name).symlink_to("busybox")
    for name in ("proc", "sys", "dev", "etc", "tmp", "usr", "var"):
        (root / name).mkdir()
    return root


@dataclass
class Ours:
    """bulkhead on a root and run directory of its own."""

    env: dict[str, str]
    program: str
    home: Path

    def __call__(self, *arguments: str) -> str:
        return output([self.program, *arguments], env=self.env)

    def pids(self) -> list[int]:
        """Engine, keeper, holder, resolver, command server: all that names our run directory."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{entry}/cmdline").read_bytes()
                    environment = Path(f"/proc/{entry}/environ").read_bytes()
                    if str(self.home).encode() in text + environment and int(entry) != os.getpid():
                        found.append(int(entry))
        return found


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[Ours]:
    """An installation that is shut down at the end; its modules compiled, as pip leaves them."""
    home = folder / "bulkhead"
    compileall.compile_dir(Path(bulkhead.__file__).parent, quiet=1)
    env = {
        **os.environ,
        "BULKHEAD_ROOT": str(home / "root"),
        "BULKHEAD_RUN": str(home / "run"),
        "BULKHEAD_PYTHON": sys.executable,
    }
    with in_memory(home / "run"):
        yield from _ours(env, home)


@contextlib.contextmanager
def crun_hierarchies() -> Iterator[None]:
    """Mount, for this mount namespace, what crun misses on a host with both versions of cgroups."""
    made = []
    if Path("/sys/fs/cgroup/unified").exists():
        known = Path("/proc/cgroups").read_text()
        for name in ("hugetlb", "perf_event"):
            place = Path("/sys/fs/cgroup") / name
            if name in known and not place.exists():
                place.mkdir()
                made.append(place)
                subprocess.run(["mount", "-t", "cgroup", "-o", name, name, str(place)], check=True)
    try:
        yield
    finally:
        for place in made:
            subprocess.run(["umount", "-l", str(place)], check=True)
            place.rmdir()


@contextlib.contextmanager
def in_memory(place: Path) -> Iterator[None]:
    """A tmpfs at `place`: where installed systems have /run."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _ours(env: dict[str, str], home: Path) -> Iterator[Ours]:
    program = str(Path(sys.executable).parent / "bulkhead")
    native = Path(__file__).parent.parent / "src/bulkhead/_native/bulkhead-client"
    peer = Ours(env, str(native if native.exists() else program), home)
    try:
        yield peer
    finally:
        subprocess.run([program, "system", "shutdown", "--force"], env=env, check=False)


@dataclass
class Docker:
    """dockerd with its own data, exec root and socket."""

    socket: str
    root: Path
    daemon: subprocess.Popen[bytes]

    def command(self, *arguments: str) -> list[str]:
        return ["docker", "-H", f"unix://{self.socket}", *arguments]

    def __call__(self, *arguments: str, data: str = "") -> str:
        return output(self.command(*arguments), data=data)

    def pids(self) -> list[int]:
        """dockerd and the containerd that it started."""
        children = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children").read_text()
        own = [int(pid) for pid in children.split()]
        return [self.daemon.pid, *own]


@contextlib.contextmanager
def docker(folder: Path, registry: str = "") -> Iterator[Docker]:
    """A dockerd of our own; ended by its pid, its folders removed with `folder`."""
    base = folder / "docker"
    base.mkdir()
    config = base / "daemon.json"
    config.write_text(json.dumps({"insecure-registries": [registry]} if registry else {}))
    socket = str(base / "docker.sock")
    command = ["dockerd", "--config-file", str(config), "--data-root", str(base / "data")]
    command += ["--exec-root", str(base / "exec"), "--pidfile", str(base / "pid")]
    command += ["-H", f"unix://{socket}"]
    memory = contextlib.ExitStack()
    memory.enter_context(in_memory(base / "exec"))
    with (base / "log").open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    peer = Docker(socket, base, daemon)
    try:
        for _ in range(600):
            if subprocess.run(peer.command("version"), capture_output=True).returncode == 0:
                break
            if daemon.poll() is not None:
                raise RuntimeError(f"dockerd ended: {(base / 'log').read_text()[-500:]}")
            time.sleep(0.1)
        yield peer
    finally:
        with contextlib.suppress(Exception):
            ids = peer("ps", "-aq").split()
            if ids:
                peer("rm", "-f", *ids)
        daemon.terminate()
        daemon.wait(60)
        memory.close()


def oci_bundle(folder: Path, root: Path, runtime: str) -> Path:
    """A prepared bundle that runs `true` with the runtime's own default configuration."""
    bundle = folder / f"bundle-{runtime}"
    bundle.mkdir()
    subprocess.run([runtime, "spec"], cwd=bundle, check=True)
    path = bundle / "config.json"
    spec = json.loads(path.read_text())
    spec["process"]["terminal"] = False
    spec["process"]["args"] = ["/bin/true"]
    spec["process"].pop("rlimits", None)
    spec["root"] = {"path": str(root), "readonly": True}
    path.write_text(json.dumps(spec))
    return bundle


def bwrap_command(root: Path) -> list[str]:
    """bwrap with all namespaces, a fresh /proc and /dev, running `true`."""
    return [
        "bwrap", "--unshare-all", "--ro-bind", str(root), "/", "--proc", "/proc", "--dev", "/dev",
        "--tmpfs", "/tmp", "--cap-drop", "ALL", "--die-with-parent", "/bin/true",
    ]  # fmt: skip
