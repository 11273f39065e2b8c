"""Guest kernels: those that are installed, and those that were added or pulled.

    <root>/kernels/NAME/
        kernel          vmlinux, bzImage, or linux.uml
        modules/        as below /lib/modules/RELEASE, with modules.dep; may be missing
        kernel.json     {"kind", "release", "source"}

"uml" is special: it is the installed user-mode-linux package, used where it is.
"""

import contextlib
import functools
import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.boundaries.guest import depmod
from bulkhead.boundaries.vmm import bzimage
from bulkhead.boundary.registry import GVISOR
from bulkhead.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from bulkhead.home import Home

UML = "uml"
CLOUD = "cloud"
_CLOUD_PACKAGE = "linux-image-cloud-amd64"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_RESERVED = frozenset({UML, GVISOR, "initramfs", "disks", "trimmed"})
_UML_MODULES = "/usr/lib/uml/modules"
_DOWNLOAD_S = 600


@dataclass(frozen=True, slots=True)
class Kernel:
    """One guest kernel."""

    name: str
    kind: str
    """"uml" or "gvisor" (programs of the host) or "linux" (to be booted by a machine monitor)."""
    release: str
    path: str
    modules: str
    """The directory with modules.dep, "" if there is none."""
    source: str

    def describe(self) -> dict[str, str]:
        """For `kernel ls`."""
        return {
            "Name": self.name,
            "Kind": self.kind,
            "Release": self.release,
            "Path": self.path,
            "Source": self.source,
        }

    def module_files(self, names: Sequence[str]) -> list[str]:
        """The files of modules and of what they depend on, in load order.

        What is built into the kernel is left out; Unsupported names what the kernel does not have.
        """
        if not self.modules:
            raise Unsupported(f"the kernel {self.name} has no modules; it needs {', '.join(names)}")
        needs, by_name, builtin = _catalogue(
            self.modules, os.stat(f"{self.modules}/modules.dep").st_mtime_ns
        )
        order: list[str] = []

        def add(path: str) -> None:
            for other in needs[path]:
                add(other)
            if path not in order:
                order.append(path)

        for name in names:
            wanted = name.replace("-", "_")
            if wanted in by_name:
                add(by_name[wanted])
            elif wanted not in builtin:
                raise Unsupported(f"the kernel {self.name} ({self.release}) has no module {name}")
        return [f"{self.modules}/{path}" for path in order]


@functools.lru_cache(maxsize=4)
def _catalogue(
    modules: str, stamp: int
) -> tuple[dict[str, list[str]], dict[str, str], frozenset[str]]:
    """Of the modules in that directory, as it was at `stamp`: needs, files by name, built in."""
    needs = _dependencies(f"{modules}/modules.dep")
    by_name = {_module_name(path): path for path in needs}
    return needs, by_name, frozenset(_builtin(f"{modules}/modules.builtin"))


def _module_name(path: str) -> str:
    return os.path.basename(path).partition(".")[0].replace("-", "_")


def _dependencies(path: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with open(path, encoding="ascii") as file:
        for line in file:
            name, _, others = line.partition(":")
            found[name] = others.split()
    return found


def _builtin(path: str) -> set[str]:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
        return {_module_name(line.strip()) for line in file}
    return set()


def uml() -> Kernel | None:
    """The installed user-mode-linux, if there is one."""
    program = shutil.which("linux.uml")
    if program is None:
        return None
    folders = sorted(glob.glob(f"{_UML_MODULES}/*/modules.dep"))
    modules = os.path.dirname(folders[-1]) if folders else ""
    release = os.path.basename(modules)
    return Kernel(UML, "uml", release, os.path.realpath(program), modules, "user-mode-linux")


@functools.cache
def _version(program: str, stamp: int) -> str:
    """What `runsc --version` says of the file that was written at `stamp`."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].removeprefix("runsc version ").strip()


def gvisor() -> Kernel | None:
    """The installed gVisor, if there is one."""
    program = shutil.which("runsc")
    if program is None:
        return None
    path = os.path.realpath(program)
    release = _version(path, os.stat(path).st_mtime_ns)
    return Kernel(GVISOR, "gvisor", release, path, "", "runsc")


def kernels(home: Home) -> list[Kernel]:
    """All kernels of this installation, by name."""
    found = [one for one in (uml(), gvisor()) if one is not None]
    for path in glob.glob(home.in_root("kernels", "*", "kernel.json")):
        found.append(_load(os.path.dirname(path)))
    return sorted(found, key=lambda one: one.name)


def _load(folder: str) -> Kernel:
    with open(f"{folder}/kernel.json", encoding="utf-8") as file:
        facts = json.load(file)
    modules = f"{folder}/modules"
    return Kernel(
        name=os.path.basename(folder),
        kind=facts["kind"],
        release=facts["release"],
        path=f"{folder}/kernel",
        modules=modules if os.path.isdir(modules) else "",
        source=facts["source"],
    )


def find(home: Home, name: str) -> Kernel:
    """The kernel called `name`; NotFound says which there are, and how to get this one."""
    found = _named(home, name)
    if found is not None:
        return found
    known = kernels(home)
    if name == UML:
        raise Unsupported("user-mode-linux is not installed: apt-get install user-mode-linux")
    if name == GVISOR:
        raise Unsupported("gVisor's runsc is not installed: apt-get install runsc")
    hint = "bulkhead kernel pull cloud" if name == CLOUD else "bulkhead kernel add NAME FILE"
    names = ", ".join(one.name for one in known) or "none"
    raise NotFound(f"No such kernel: {name} (there are: {names}); {hint}")


def _named(home: Home, name: str) -> Kernel | None:
    if name in (UML, GVISOR):
        return uml() if name == UML else gvisor()
    folder = home.in_root("kernels", name)
    known = _NAME.fullmatch(name) and os.path.exists(f"{folder}/kernel.json")
    return _load(folder) if known else None


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise Invalid(f"invalid kernel name {name!r}: letters, digits, _ . - and not {UML!r}")


def add(home: Home, name: str, file: str, modules: str = "", *, source: str = "") -> Kernel:
    """Copy a kernel image, and a directory with modules.dep, into the installation."""
    _check_name(name)
    folder = home.in_root("kernels", name)
    if os.path.exists(folder):
        raise Conflict(f"the kernel {name} is there already: bulkhead kernel rm {name}")
    if modules and not os.path.exists(f"{modules}/modules.dep"):
        raise Invalid(f"{modules} has no modules.dep: run depmod, or name lib/modules/RELEASE")
    try:
        release = os.path.basename(os.path.realpath(modules)) if modules else ""
        facts = {"kind": "linux", "release": release, "source": source or file}
        os.makedirs(home.in_root("kernels"), mode=0o711, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.in_root("kernels"), prefix=".new-") as scratch:
            shutil.copyfile(file, f"{scratch}/kernel")
            os.chmod(f"{scratch}/kernel", 0o444)
            if modules:
                shutil.copytree(modules, f"{scratch}/modules", symlinks=True)
            with open(f"{scratch}/kernel.json", "w", encoding="utf-8") as out:
                json.dump(facts, out)
            os.chmod(scratch, 0o755)
            os.rename(scratch, folder)
            os.mkdir(scratch)  # for TemporaryDirectory, which removes it
    except OSError as error:
        raise Invalid(f"cannot add the kernel {file}: {error}") from error
    return _load(folder)


def remove(home: Home, name: str) -> None:
    """Remove an added or pulled kernel; running guests keep theirs."""
    _check_name(name)
    folder = home.in_root("kernels", name)
    if not os.path.exists(f"{folder}/kernel.json"):
        raise NotFound(f"No such kernel: {name}")
    doomed = tempfile.mkdtemp(dir=home.in_root("kernels"), prefix=".old-")
    os.rename(folder, f"{doomed}/kernel")
    shutil.rmtree(doomed)


def pull(home: Home, name: str) -> Kernel:
    """Fetch the distribution's cloud kernel as "cloud", through apt; Unavailable says what failed.

    The package is unpacked, never installed.
    """
    if name != CLOUD:
        raise Invalid(f"only {CLOUD!r} can be pulled; other kernels: bulkhead kernel add NAME FILE")
    if os.path.exists(home.in_root("kernels", CLOUD)):
        raise Conflict(f"the kernel {CLOUD} is there already: bulkhead kernel rm {CLOUD}")
    with tempfile.TemporaryDirectory(prefix="bulkhead-kernel-") as scratch:
        package = _cloud_package()
        _run(["apt-get", "-q", "download", package], scratch)
        (archive,) = glob.glob(f"{scratch}/*.deb")
        _run(["dpkg-deb", "-x", archive, f"{scratch}/tree"], scratch)
        images = glob.glob(f"{scratch}/tree/boot/vmlinuz-*")
        if len(images) != 1:
            raise Unavailable(f"{package} has {len(images)} kernel images, not one")
        release = os.path.basename(images[0]).partition("-")[2]
        modules = f"{scratch}/tree/lib/modules/{release}"
        if not os.path.isdir(modules):
            modules = f"{scratch}/tree/usr/lib/modules/{release}"
        depmod.write(modules)
        with open(images[0], "rb") as packed, open(f"{scratch}/vmlinux", "wb") as plain:
            plain.write(bzimage.extract(packed.read()))
        return add(home, CLOUD, f"{scratch}/vmlinux", modules, source=package)


def _cloud_package() -> str:
    text = _run(["apt-cache", "depends", _CLOUD_PACKAGE], "/")
    match = re.search(r"Depends: (linux-image-\d\S*)", text)
    if match is None:
        raise Unavailable(f"apt knows no package {_CLOUD_PACKAGE}: apt-get update")
    return match[1]


def _run(command: list[str], folder: str) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DOWNLOAD_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{' '.join(command[:3])}: {last}")
    return done.stdout
