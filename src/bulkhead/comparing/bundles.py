"""Peers that are no engines: OCI runtimes with a bundle, and plain QEMU."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from bulkhead.boundaries.guest import initramfs, kernels
from bulkhead.boundaries.vmm.acceleration import acceleration
from bulkhead.comparing import processes
from bulkhead.comparing.spawn import FailedError, quietly, said, spoken
from bulkhead.comparing.subjects import PROBE, Child, Running, end
from bulkhead.home import Home

_ENDS_S = 30.0


@dataclass
class Runtime:
    """runc, crun or runsc: one bundle for each command, all with the same root file system."""

    name: str
    kind: str
    words: Sequence[str]
    """The program with its global options."""
    folder: str
    root: str
    env: Mapping[str, str] | None = None
    console: bool = False
    lasting: bool = True
    _bundles: dict[tuple[str, ...], str] = field(default_factory=dict)

    def _bundle(self, probe: tuple[str, ...]) -> str:
        if probe not in self._bundles:
            place = f"{self.folder}/{self.name}-{len(self._bundles)}"
            os.mkdir(place)
            said([self.words[0], "spec", "--bundle", place])
            with open(f"{place}/config.json", "r+", encoding="utf-8") as file:
                spec = json.load(file)
                spec["process"] |= {"terminal": False, "args": [PROBE, *probe], "cwd": "/"}
                spec["process"].pop("rlimits", None)
                spec["root"] = {"path": self.root, "readonly": False}
                file.seek(0)
                file.truncate()
                json.dump(spec, file)
            self._bundles[probe] = place
        return self._bundles[probe]

    def run(self, *probe: str) -> list[str]:
        """`run`."""
        return [*self.words, "run", "--bundle", self._bundle(probe), f"compare-{uuid.uuid4().hex}"]

    @contextlib.contextmanager
    def start(self, *probe: str) -> Generator[Running]:
        """`run -d`, and `delete -f` in the end."""
        identity = f"compare-{uuid.uuid4().hex}"
        bundle = self._bundle(probe)
        try:
            status = quietly([*self.words, "run", "--detach", "--bundle", bundle, identity])
            if status:
                raise FailedError(f"{self.name} run --detach: exit status {status}")
            yield Bundled(self, identity)
        finally:
            quietly([*self.words, "delete", "--force", identity])

    def clear(self) -> None:
        """Take away what a command that was cut off has left."""
        try:
            left = json.loads(said([*self.words, "list", "--format", "json"])) or []
            names = [str(one["id"]) for one in left]
        except (FailedError, ValueError, TypeError, KeyError):
            return
        for name in names:
            quietly([*self.words, "delete", "--force", name])


@dataclass
class Bundled:
    """A container of a runtime: it has no network of its own."""

    runtime: Runtime
    identity: str
    address: str = ""

    def _state(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(said([*self.runtime.words, "state", self.identity]))
        return found

    def exec(self, *probe: str) -> list[str]:
        """`exec`."""
        return [*self.runtime.words, "exec", self.identity, PROBE, *probe]

    def processes(self) -> list[int]:
        """All of its control group, or what descends from its first process."""
        return processes.of_group(int(str(self._state()["pid"])))

    def stop(self) -> None:
        """`kill`, and no longer running."""
        said([*self.runtime.words, "kill", self.identity, "TERM"])
        deadline = time.monotonic() + _ENDS_S
        while self._state()["status"] != "stopped":
            if time.monotonic() > deadline:
                raise FailedError(f"{self.runtime.name}: still running after a SIGTERM")
            time.sleep(0.002)


@dataclass
class Qemu:
    """QEMU as its manual has it: a PC, a kernel of ours, an initramfs that holds just the probe."""

    kind: str
    kernel: str
    ramdisk: str
    name: str = "qemu"
    env: Mapping[str, str] | None = None
    console: bool = True
    lasting: bool = False

    def run(self, *probe: str) -> list[str]:
        """A boot, the probe as init, and the kernel's end."""
        return [
            "qemu-system-x86_64", "-accel", acceleration().name, "-m", "256",
            "-nographic", "-no-reboot",
            "-kernel", self.kernel, "-initrd", self.ramdisk,
            "-append", f"console=ttyS0 quiet loglevel=0 panic=-1 -- {' '.join(probe)}",
        ]  # fmt: skip

    @contextlib.contextmanager
    def start(self, *probe: str) -> Generator[Running]:
        """Booted, the probe running."""
        process = subprocess.Popen(
            self.run(*probe), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            spoken(process)
            yield Child(process)
        finally:
            end(process)


def runtimes(folder: str, root: str) -> list[Runtime]:
    """The OCI runtimes that are installed; `root` is theirs, `folder` for what they need."""
    found = []
    for name in ("runc", "crun", "runsc"):
        if shutil.which(name):
            options = ("--network=none", "--ignore-cgroups") if name == "runsc" else ()
            version = said([name, "--version"]).partition("\n")[0]
            state = f"{folder}/{name}-state"
            os.mkdir(state)
            words = [name, "--root", state, *options]
            found.append(Runtime(name, f"{version}, a bundle", words, folder, root))
    return found


def qemu(home: Home, folder: str, probe: str) -> Qemu:
    """Plain QEMU; NotFound without a guest kernel, FailedError without QEMU."""
    if not shutil.which("qemu-system-x86_64"):
        raise FailedError("not installed: apt-get install qemu-system-x86")
    version = said(["qemu-system-x86_64", "--version"]).partition("\n")[0]
    kernel = kernels.find(home, "cloud")
    with open(probe, "rb") as file:
        data = initramfs.with_init(file.read())
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".cpio", delete=False) as ramdisk:
        ramdisk.write(data)
    return Qemu(f"{version}, machine pc", kernel.path, ramdisk.name)
