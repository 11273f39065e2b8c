"""A Debian guest under QEMU: systemd as process 1, cgroup v2 with every controller, AppArmor.

Emulated, never accelerated: a /dev/kvm that exists need not work, and results must not depend on
it. The base (a minimal Debian with a kernel, as an ext4 image) and the Python packages are built
once and kept under ~/.cache/bulkhead-tests, each named by the hash of what it is made from:

    debian-KEY/{root.ext4, vmlinuz, initrd}    site-KEY.ext4    lock

Every boot is a QEMU process of its own on a throw-away overlay of the base; `disk` keeps the
overlay's file for a second boot of the same machine.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.guest import job
from tests.helpers import criu, packages

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bulkhead-tests"
SUITE = "bookworm"
PYTHON = (3, 11)
KERNEL = "linux-image-cloud-amd64"
PACKAGES = [
    "systemd",
    "systemd-sysv",
    "udev",
    "kmod",
    "apparmor",
    "python3",
    "iproute2",
    "nftables",
    "procps",
]
MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
UNIT = """\
[Unit]
Description=bulkhead tests
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/bin/sh /usr/local/sbin/debian-run.sh
StandardOutput=journal+console
StandardError=journal+console
TimeoutStartSec=infinity
Delegate=yes
[Install]
WantedBy=multi-user.target
"""
DISKS = """\
[Unit]
Description=the disks with Python packages, checkout and job
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=oneshot
ExecStart=/bin/mkdir -p /run/site /run/host
ExecStart=/bin/mount -t ext4 -o ro /dev/vdb /run/site
ExecStart=/bin/mount -t ext4 -o ro /dev/vdc /run/host
[Install]
WantedBy=sysinit.target
"""
"""By a unit and not in fstab: udev need not be up, the devices are there since the initrd."""
MANAGER = "[Manager]\nDefaultTimeoutStopSec=5s\n"
"""Workloads that ignore SIGTERM do not hold up the end for long."""
MASKED = [
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-timesyncd.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "dpkg-db-backup.timer",
    "systemd-update-utmp.service",
    "systemd-random-seed.service",
    "systemd-networkd.service",
]
INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
for module in $($b cat /modules/order); do $b insmod /modules/$module; done
$b mount -t ext4 /dev/vda /root || { echo "no root"; $b poweroff -f; }
$b mount --move /dev /root/dev
$b umount /proc
exec $b switch_root /root /lib/systemd/systemd
"""
DOWNLOAD = f"""\
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
mkdir "$1/kernel" && cd "$1/kernel"
name=$(apt-cache depends {KERNEL} | sed -n 's/.*Depends: \\(linux-image-[0-9]\\)/\\1/p' | head -n 1)
apt-get -qq download "$name"
"""
"""Run by mmdebstrap: the kernel is unpacked, not installed, which would make an initrd."""
COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr audit=0 nowatchdog"
    " random.trust_cpu=on cryptomgr.notests no_timer_check tsc=reliable apparmor=1"
    " security=apparmor systemd.show_status=0 systemd.log_target=console systemd.log_level=warning"
)
NEEDED = ("qemu-system-x86_64", "mmdebstrap", "mkfs.ext4", "cpio", "busybox")


def missing() -> str:
    """Why it cannot run here, "" if it can."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "making the base needs root"
    if os.uname().machine != "x86_64":
        return "the guest is x86-64"
    return ""


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _building(target: Path) -> Iterator[Path | None]:
    """A folder to build `target` in, or None if it is there already; one builder at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as folder:
            yield Path(folder)


def base() -> Path:
    """The folder of the base, built if it is not there (about a minute)."""
    script = (job.ROOT / "tests/guest/inside/debian-run.sh").read_text()
    recipe = (
        SUITE,
        *PACKAGES,
        KERNEL,
        *MODULES,
        UNIT,
        DISKS,
        MANAGER,
        *MASKED,
        INIT,
        DOWNLOAD,
        script,
        "1",
    )
    target = CACHE / f"debian-{_key(*recipe)}"
    with _building(target) as folder:
        if folder is not None:
            _make_base(folder, script)
            (folder / "done").rename(target)
    return target


def _make_base(folder: Path, script: str) -> None:
    tree, done = folder / "tree", folder / "done"
    done.mkdir()
    # In a mount namespace of its own: whatever happens, nothing stays mounted.
    _run(
        "unshare", "--mount", "mmdebstrap", "--quiet", "--variant=minbase", "--mode=root",
        f"--include={','.join(PACKAGES)}", '--aptopt=Apt::Install-Recommends "false"',
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=force-unsafe-io",
        f"--customize-hook={DOWNLOAD}", SUITE, str(tree),
    )  # fmt: skip
    (tree / "usr/local/sbin/debian-run.sh").write_text(script)
    units = tree / "etc/systemd/system"
    for name, text, target in (
        ("bulkhead-tests.service", UNIT, "multi-user.target"),
        ("guest-disks.service", DISKS, "sysinit.target"),
    ):
        (units / name).write_text(text)
        (units / f"{target}.wants").mkdir(exist_ok=True)
        (units / f"{target}.wants" / name).symlink_to(f"/etc/systemd/system/{name}")
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    (tree / "etc/systemd/system.conf.d").mkdir(exist_ok=True)
    (tree / "etc/systemd/system.conf.d/fast.conf").write_text(MANAGER)
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (tree / "etc/fstab").write_text("")
    unpacked = folder / "kernel"
    (package,) = (tree / "kernel").glob("*.deb")
    _run("dpkg-deb", "-x", str(package), str(unpacked))
    shutil.rmtree(tree / "kernel")
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    release = kernel.name.partition("-")[2]
    shutil.move(unpacked / "lib/modules", tree / "usr/lib/modules")
    _run("chroot", str(tree), "/sbin/depmod", release)
    shutil.copy(kernel, done / "vmlinuz")
    _make_initrd(tree / "usr/lib/modules" / release, folder, done / "initrd")
    _image(tree, done / "root.ext4", mib=3072)


def _make_initrd(modules: Path, folder: Path, target: Path) -> None:
    """The few modules that the root file system needs, and busybox to load them."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        needs[name] = others.split()
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    order: list[str] = []

    def add(path: str) -> None:
        for other in needs[path]:
            add(other)
        if path not in order:
            order.append(path)

    for name in MODULES:
        if name in by_name:  # else it is built in
            add(by_name[name])
    stage = folder / "initrd"
    for directory in ("bin", "dev", "proc", "root", "modules"):
        (stage / directory).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, stage / "bin/busybox")
    for path in order:
        shutil.copy(modules / path, stage / "modules")
    (stage / "modules/order").write_text("\n".join(Path(path).name for path in order) + "\n")
    (stage / "init").write_text(INIT)
    (stage / "init").chmod(0o755)
    names = b"\0".join(str(p.relative_to(stage)).encode() for p in sorted(stage.rglob("*")))
    done = subprocess.run(
        ["cpio", "--quiet", "-0", "-o", "-H", "newc"],
        input=names, cwd=stage, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    target.write_bytes(done.stdout)


def _image(tree: Path, target: Path, mib: int) -> None:
    with target.open("wb") as file:
        file.truncate(mib << 20)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-d", str(tree), str(target))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{job.tail(done.stdout + done.stderr)}")


def site() -> Path:
    """An image with the Python packages that the tests need, for the guest's interpreter."""
    installed = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    version = ".".join(map(str, sys.version_info[:2]))
    target = CACHE / f"site-{_key(version, *installed)}.ext4"
    with _building(target) as folder:
        if folder is not None:
            stage = folder / "site"
            if sys.version_info[:2] == PYTHON:
                _copy_site(stage)
            else:
                _fetch_site(stage)
            _run(sys.executable, "-m", "compileall", "-q", str(stage))
            _image(stage, folder / "image", mib=384)
            (folder / "image").rename(target)
    return target


def _copy_site(stage: Path) -> None:
    ignored = shutil.ignore_patterns("mypy*", "*__mypyc*", "pip*", "ruff*", "setuptools*", "*.pth")
    pytest_file = importlib.metadata.distribution("pytest").locate_file("pytest")
    shutil.copytree(Path(str(pytest_file)).parent, stage, ignore=ignored)


def _fetch_site(stage: Path) -> None:
    """Another interpreter runs the tests here: fetch the packages for the guest's."""
    project = tomllib.loads((job.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    wanted = [w.partition(";")[0] for w in wanted if not w.startswith(("mypy", "ruff", "types-"))]
    _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--target", str(stage),
        "--python-version", ".".join(map(str, PYTHON)), "--only-binary=:all:", *wanted,
    )  # fmt: skip


def _checkout(tests: Sequence[str], folder: Path, timeout_s: int, before: str) -> Path:
    """An image of the checkout and the job."""
    stage = folder / "stage"
    checkout = stage / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests"):
        shutil.copytree(job.ROOT / name, checkout / name, ignore=ignored, symlinks=True)
    shutil.copy(job.ROOT / "pyproject.toml", checkout)
    if sys.version_info[:2] == PYTHON:
        mode = "--invalidation-mode=unchecked-hash"
        _run(sys.executable, "-m", "compileall", "-q", mode, str(checkout / "src"))
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, stage / "busybox")  # the container tests' whole image
    with contextlib.suppress(packages.NoPackages):
        shutil.copytree(criu.tree() / "usr", stage / "criu/usr", symlinks=True)
    before = f"ln -sf /run/host/busybox /usr/bin/busybox\n{before}"
    text = job.script(tests, "/usr/bin/python3", "/run/exchange", timeout_s)
    (stage / "job.sh").write_text(before + text)
    _image(stage, folder / "checkout.ext4", mib=160)
    return folder / "checkout.ext4"


def run(
    tests: Sequence[str],
    folder: Path,
    *,
    before: str = "",
    disk: Path | None = None,
    memory_mib: int = 1536,
    timeout_s: int = 400,
) -> str:
    """Boot, run `tests`, power off; returns the console's log. Results are in `folder`/exchange.

    `before` is shell text run first. `disk` keeps what the guest writes to its root, for a later
    boot; by default it is thrown away. `timeout_s` bounds the whole; QEMU is killed then.
    """
    root, packages = base(), site()
    folder.mkdir(exist_ok=True)
    checkout = _checkout(tests, folder, max(timeout_s - 60, 10), before)
    output, console = folder / "output.raw", folder / "console"
    with output.open("wb") as file:
        file.truncate(64 << 20)
    if disk is None:
        drive = f"file={root}/root.ext4,format=raw,snapshot=on"
    else:
        if not disk.exists():
            backing = f"{root}/root.ext4"
            _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", "raw", str(disk))
        drive = f"file={disk},format=qcow2"
    command = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "qemu64",
        "-smp", "2", "-m", f"{memory_mib}M", "-serial", f"file:{console}",
        "-kernel", f"{root}/vmlinuz", "-initrd", f"{root}/initrd", "-append", COMMAND_LINE,
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
        "-drive", f"{drive},if=virtio,cache=unsafe",
        "-drive", f"file={packages},format=raw,if=virtio,readonly=on",
        "-drive", f"file={checkout},format=raw,if=virtio,readonly=on",
        "-drive", f"file={output},format=raw,if=virtio,cache=unsafe",
    ]  # fmt: skip
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(folder)},
        )
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            log.write(b"--- killed: over its time\n")
        finally:
            process.kill()
            process.wait()
    exchange = folder / "exchange"
    with contextlib.suppress(tarfile.ReadError), tarfile.open(output) as archive:
        archive.extractall(exchange, filter="data")
    exchange.mkdir(exist_ok=True)
    serial = console.read_text(errors="replace") if console.exists() else ""
    return serial + (folder / "qemu.log").read_text(errors="replace")
