"""The cases of guests: sandbox and microvm beside docker, runsc and plain QEMU."""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measure import interleaved, output, timed
from bench.peers import oci_bundle
from bulkhead.boundaries.guest import frames
from bulkhead.linux import syscall

if TYPE_CHECKING:
    from bench.cases import Result, Rig

IMAGE = "bench-busybox:latest"
GUESTS = ("sandbox", "microvm")
CLONES = 8
_KCMP_VM = 1
_GREETING = frames.HEADER.pack(16, frames.Type.GUEST_HELLO, 0, 0, 0, frames.VERSION)
WORK = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#define MIB (1 << 20)
static char block[MIB];
static double ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
static int compute(void) {
  volatile double x = 1.0; unsigned long n = 0;
  double start = ms();
  for (unsigned long i = 1; i < 60000000; i++) {
    n = n * 2862933555777941757ul + i;
    x += (double)(n >> 40) * 1e-9;
  }
  printf("%f\n", ms() - start);
  return x < 0;
}
int main(int argc, char **argv) {
  if (argc < 4) return compute();
  int writes = !strcmp(argv[1], "write"), count = atoi(argv[3]);
  int fd = open(argv[2], writes ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0644);
  if (fd < 0) return perror(argv[2]), 1;
  if (!writes) posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  double start = ms();
  for (int i = 0; i < count; i++)
    if ((writes ? write(fd, block, MIB) : read(fd, block, MIB)) != MIB) return perror(argv[2]), 1;
  if (writes && fsync(fd)) return perror("fsync"), 1;
  printf("%f\n", count * 1e3 / (ms() - start));
  return 0;
}
"""
"""A loop of numbers, in ms; or, with `write|read FILE MEBIBYTES`, MiB/s to and from a disk."""


def _guest(boundary: str, *words: str, image: str = IMAGE) -> list[str]:
    return ["run", "--rm", "--boundary", boundary, image, *words]


def ready(rig: "Rig") -> None:
    """Kernels for the guests, links to a cache where that is possible."""
    known = rig.ours("kernel", "ls", "-q").split()
    if "cloud" not in known:
        rig.ours("kernel", "pull", "cloud")


def guest_run(rig: "Rig") -> "Result":
    """`run --rm --boundary B IMAGE true` beside docker and runsc."""
    ready(rig)
    actions: dict[str, Callable[[], float]] = {
        "docker": lambda: timed(rig.docker.command("run", "--rm", IMAGE, "true")),
    }
    for name in GUESTS:
        command = [rig.ours.program, *_guest(name, "true")]
        actions[name] = lambda command=command: timed(command, rig.ours.env)  # type: ignore[misc]
    if shutil.which("runsc"):
        bundle = oci_bundle(rig.folder, rig.folder / "busybox", "runsc")
        root = f"--root={rig.folder}/runsc"
        words = ["runsc", root, "--network=none", "--ignore-cgroups", "run", "-bundle", str(bundle)]
        actions["runsc"] = lambda: timed([*words, "bench"])
    series = interleaved(actions, max(7, rig.rounds // 3))
    middle = {name: one.median for name, one in series.items()}
    rig.facts["start of `true` in a guest"] = " · ".join(
        f"{name} {one.median:.0f}±{one.spread:.0f} ms" for name, one in series.items()
    )
    found = {
        "sandbox.docker": middle["sandbox"] / middle["docker"],
        "microvm.docker": middle["microvm"] / middle["docker"],
    }
    if "runsc" in middle:
        found["sandbox.runsc"] = middle["sandbox"] / middle["runsc"]
    return found


def guest_memory(rig: "Rig") -> "Result":
    """Proportional memory of each further idle guest: a slope, kernel's PSS, monitor included."""
    ready(rig)
    found: Result = {}
    for name in GUESTS:
        ids: list[str] = []
        sums = []
        try:
            for count in (2, 2 + CLONES):
                while len(ids) < count:
                    words = ("run", "-d", "--boundary", name, IMAGE, "sleep", "3600")
                    ids.append(rig.ours(*words).strip())
                time.sleep(2)
                sums.append(sum(_pss_kib(rig, one) for one in ids))
        finally:
            rig.ours("rm", "-f", *ids)
        slope = (sums[1] - sums[0]) / CLONES / 1024
        found[f"{name}.pss"] = slope
        rig.facts[f"memory of each further {name}"] = (
            f"{slope:.1f} MiB; of the first two together {sums[0] / 1024:.0f} MiB"
        )
    return found


def _pss_kib(rig: "Rig", identity: str) -> int:
    """Of all processes in the workload's control group.

    What several share as one address space (threads that are processes: user-mode-linux has three
    of them) is counted once; smaps says the same of each.
    """
    pid = rig.ours("inspect", "-f", "{{.State.Pid}}", identity).strip()
    group = next(
        line.rpartition(":")[2].strip()
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        if ":pids:" in line or line.startswith("0::/")
    )
    sizes: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f":{group}\n" in Path(f"/proc/{entry}/cgroup").read_text():
                text = Path(f"/proc/{entry}/smaps_rollup").read_text()
                found = re.search(r"^Pss:\s+(\d+)", text, re.M)
                if found and not any(_same_memory(int(entry), other) for other in sizes):
                    sizes[int(entry)] = int(found[1])
        except OSError:
            continue
    return sum(sizes.values())


def _same_memory(one: int, other: int) -> bool:
    """Whether two processes have one address space; kcmp(2)."""
    return syscall.call("kcmp", one, other, _KCMP_VM, 0, 0) == 0


def guest_rate(rig: "Rig") -> "Result":
    """Starts of microVMs per second with two clients at once."""
    ready(rig)
    count = 12
    timed([rig.ours.program, *_guest("microvm", "true")], rig.ours.env)
    start = time.perf_counter()

    def work() -> None:
        for _ in range(count):
            timed([rig.ours.program, *_guest("microvm", "true")], rig.ours.env)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = 2 * count / (time.perf_counter() - start)
    return {"microvm.rate": rate}


def guest_boot(rig: "Rig") -> "Result":
    """A microVM's cold boot to its init beside stock QEMU's with the same kernel.

    Stock is what one types without thinking: QEMU's own machine, the distribution's packed kernel.
    What our unpacked kernel would be there is told beside it.
    """
    ready(rig)
    from bulkhead.boundaries.guest import initramfs, kernels
    from bulkhead.boundaries.microvm import EARLY
    from bulkhead.boundaries.vmm import qemu
    from bulkhead.boundaries.vmm.acceleration import acceleration, tsc_khz
    from bulkhead.home import Home

    home = Home(str(rig.ours.home / "root"), str(rig.ours.home / "run"))
    kernel = kernels.find(home, "cloud")
    native = Path(rig.ours.program).parent / "bulkhead-guest"
    early = kernel.module_files(EARLY)
    made = initramfs.build(home, str(native), early, early=early)
    accelerator = acceleration().name
    machine = qemu.Machine(
        kernel.path,
        made.path,
        0,
        accelerator=accelerator,
        tsc_khz=tsc_khz() if accelerator == "tcg" else 0,
    )
    ours = qemu.argv(machine)
    # Without modules, so that its init speaks on the serial line: stock has no port for it.
    bare = initramfs.build(home, str(native), ())
    stock = [qemu.BINARY, "-nographic", "-no-reboot", "-m", "256", "-initrd", bare.path]
    stock += ["-append", "console=ttyS0 panic=-1", "-kernel"]
    packed = _packed(rig, kernel.source)
    actions = {
        "ours": lambda: _booted(ours, 0),
        "stock": lambda: _booted([*stock, packed], -1),
        "stock with our unpacked kernel": lambda: _booted([*stock, kernel.path], -1),
    }
    series = interleaved(actions, max(3, min(7, rig.rounds // 3)), warm=1)
    rig.facts["cold boot to the init"] = (
        " · ".join(f"{name} {one.median:.0f} ms" for name, one in series.items())
        + f" ({accelerator})"
    )
    return {"microvm.boot": series["ours"].median / series["stock"].median}


def _packed(rig: "Rig", package: str) -> str:
    """The kernel as the distribution's package has it."""
    folder = rig.folder / "package"
    if not folder.exists():
        folder.mkdir()
        subprocess.run(
            ["apt-get", "-q", "download", package],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    (image,) = folder.glob("boot/vmlinuz-*")
    return str(image)


def _booted(command: Sequence[str], channel: int) -> float:
    """Milliseconds until the guest's init has greeted: on its port, or on the console."""
    ours, theirs = socket.socketpair()
    words = [
        word.replace("id=channel,fd=0", f"id=channel,fd={theirs.fileno()}") for word in command
    ]
    start = time.perf_counter()
    with ours, theirs, tempfile.TemporaryFile() as null:
        process = subprocess.Popen(
            words, stdin=null, stdout=subprocess.PIPE, stderr=null, pass_fds=(theirs.fileno(),)
        )
        try:
            assert process.stdout is not None
            if channel == 0:
                ours.settimeout(120)
                ours.recv(64)
            else:
                text = b""
                while _GREETING not in text:
                    piece = os.read(process.stdout.fileno(), 4096)
                    if not piece:
                        raise RuntimeError(f"QEMU ended: {text[-300:]!r}")
                    text += piece
            return (time.perf_counter() - start) * 1e3
        finally:
            process.kill()
            process.communicate()


def guest_work(rig: "Rig") -> "Result":
    """CPU-bound work, disk and network throughput in each boundary."""
    ready(rig)
    source = rig.folder / "work.c"
    source.write_text(WORK)
    root = rig.folder / "work-root"
    shutil.copytree(rig.folder / "busybox", root, symlinks=True)
    subprocess.run(["gcc", "-O2", "-static", "-o", str(root / "bin/work"), str(source)], check=True)
    archive = rig.folder / "work.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    rig.ours("import", str(archive), "work:latest")
    native: list[float] = []
    sandbox: list[float] = []
    for _ in range(5):
        native.append(float(output([str(root / "bin/work")])))
        sandbox.append(float(rig.ours(*_guest("sandbox", "/bin/work", image="work:latest"))))
    microvm = float(rig.ours(*_guest("microvm", "/bin/work", image="work:latest")))
    rig.facts["CPU-bound work"] = (
        f"native {min(native):.0f} ms · sandbox {min(sandbox):.0f} · microvm {microvm:.0f}"
    )
    for name in ("container", *GUESTS):
        rig.facts[f"throughput, {name}"] = _throughputs(rig, name)
    return {"sandbox.work": min(sandbox) / min(native)}


def _throughputs(rig: "Rig", boundary: str) -> str:
    """Disk, a shared directory, and network."""
    script = "/bin/work write /f 64; /bin/work read /f 64"
    image = "work:latest"
    said = rig.ours(*_guest(boundary, "sh", "-c", script, image=image)).split()
    write, read = (float(word) for word in said)
    shared = _shared(rig, boundary)
    serve = "nc -l -p 5001 -e /bin/busybox dd if=/dev/zero bs=64k count=2048"
    words = ("run", "-d", "--boundary", boundary, image, "/bin/busybox", "sh", "-c", serve)
    identity = rig.ours(*words).strip()
    try:
        shape = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        address = rig.ours("inspect", "-f", shape, identity).strip()
        network = _receive(address)
    finally:
        rig.ours("rm", "-f", identity)
    disk = f"disk write {write:.0f}, read {read:.0f} MiB/s"
    return f"{disk} · {shared} · network {network:.0f} MB/s"


def _shared(rig: "Rig", boundary: str) -> str:
    """A directory of the host: what is written there, what is read from there, small files."""
    folder = rig.folder / "shared"
    folder.mkdir(exist_ok=True)
    with (folder / "in").open("wb") as file:
        file.truncate(64 << 20)
    script = (
        "/bin/work write /data/out 64; /bin/work read /data/in 64; "
        "t() { read now x < /proc/uptime; echo $now; }; "
        "t; for i in $(seq 500); do : > /data/$i; done; t"
    )
    bind = f"{folder}:/data"
    command = ("run", "--rm", "--network", "none", "--boundary", boundary, "-v", bind)
    said = rig.ours(*command, "work:latest", "/bin/busybox", "sh", "-c", script).split()
    shutil.rmtree(folder)
    write, read, begin, end = (float(word) for word in said)
    made = 500 / max(end - begin, 0.01)
    return f"bind write {write:.0f}, read {read:.0f} MiB/s, {made:.0f} files/s"


def _receive(address: str) -> float:
    deadline = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection((address, 5001), timeout=120) as connection:
                buffer, total, start = bytearray(1 << 20), 0, time.perf_counter()
                while size := connection.recv_into(buffer):
                    total += size
                return total / (time.perf_counter() - start) / 1e6
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def guest_kvm(rig: "Rig") -> "Result":
    """With KVM only: QEMU's start to the init of a clone, in ms; else why not."""
    ready(rig)
    doctor = json.loads(rig.ours("doctor", "--json"))
    told = [one for one in doctor if "microvm" in json.dumps(one)]
    text = json.dumps(told)
    if "kvm" not in text or "tcg" in text:
        rig.facts["KVM"] = "not measured: " + (told[0].get("detail", "") if told else "no microvm")
        return {}
    series = interleaved(
        {"ours": lambda: timed([rig.ours.program, *_guest("microvm", "true")], rig.ours.env)}, 20
    )
    rig.facts["KVM"] = f"run of `true` {series['ours'].median:.0f} ms"
    return {"microvm.kvm": series["ours"].median}


CASES: dict[str, Callable[["Rig"], "Result"]] = {
    "guest-run": guest_run,
    "guest-memory": guest_memory,
    "guest-rate": guest_rate,
    "guest-boot": guest_boot,
    "guest-work": guest_work,
    "guest-kvm": guest_kvm,
}
