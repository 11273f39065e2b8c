"""`image bootstrap debian:bookworm`: an image straight from the distribution's packages.

    resolve  apt decides which packages (apt.py)       → or a lock file says it
    lock     packages, versions, hashes, epoch, tools
    fetch    every .deb, its hash verified
    build    mmdebstrap from a local repository of exactly these files, as a tar on standard output
    store    the tar streams into a layer; configuration and manifest depend on the lock alone

The build never sees the network, so the same lock gives the same bytes, wherever the packages came
from. mmdebstrap(1) sorts the tar and clamps times to SOURCE_DATE_EPOCH.
"""

import email.utils
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import msgspec

from bulkhead.errors import Conflict, Corrupt, Invalid, Unavailable, Unsupported
from bulkhead.images import apt, assemble
from bulkhead.images.catalog import Catalog, Image, host_platform
from bulkhead.images.progress import Progress, status
from bulkhead.images.timestamps import of_nanoseconds
from bulkhead.isolation import binfmt
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import ContainerConfig, History, ImageConfig, Platform, RootFS
from bulkhead.oci.reference import parse
from bulkhead.store import codecs

VARIANT = "minbase"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEBIAN = {"386": "i386", "arm": "armhf", "ppc64le": "ppc64el", "mips64le": "mips64el"}
_PIECE = 256 << 10


class Lock(msgspec.Struct, kw_only=True):
    """Everything that the image depends on; `image` and `layer` are what it gave."""

    version: int = 1
    reference: str
    distribution: str
    suite: str
    architecture: str
    include: list[str]
    sources: list[apt.Source]
    epoch: int
    variant: str = VARIANT
    mmdebstrap: str
    compressor: str
    packages: list[apt.Package]
    layer: str = ""
    image: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; `lock` is the lock file's path, `platform` "" this machine's."""

    name: str
    include: tuple[str, ...]
    mirror: str | None
    lock: str
    platform: str = ""


def bootstrap(catalog: Catalog, request: Request, progress: Progress) -> Image:
    """Make the image and name it; the lock file is used if it exists, else written.

    Unsupported if mmdebstrap or apt is missing; Conflict if the lock is for something else, or if
    what it promises did not come out.
    """
    apt.need("mmdebstrap", "apt-get", "apt-config", "dpkg-deb")
    reference = parse(request.name).tagged()
    if reference.tag is None or reference.digest is not None:
        raise Invalid(f"{request.name!r} needs a suite as its tag, such as debian:bookworm")
    distribution = reference.path.rpartition("/")[2]
    apt.check_words(reference.tag, request.include)
    with ExitStack() as undo:
        work = undo.enter_context(tempfile.TemporaryDirectory(prefix="bulkhead-bootstrap-"))
        os.chmod(work, 0o755)
        lock = _read_lock(request.lock)
        if lock is not None:
            _check_lock(lock, str(reference), request)
            sources = lock.sources
        else:
            sources = apt.sources_for(distribution, reference.tag, request.mirror)
        architecture = _architecture(request.platform)
        tool = apt.Apt(work, architecture, sources)
        if lock is None:
            progress(status(f"Reading package lists for {reference.tag}"))
            epoch = tool.update()
            lock = Lock(
                reference=str(reference),
                distribution=distribution,
                suite=reference.tag,
                architecture=architecture,
                include=sorted(request.include),
                sources=sources,
                epoch=epoch,
                mmdebstrap=_version(),
                compressor=codecs.DEFAULT_COMPRESSOR["gzip"],
                packages=tool.resolve(sorted(request.include)),
            )
        elif lock.architecture != architecture:
            raise Conflict(f"{request.lock} is for {lock.architecture}, not for {architecture}")
        size = sum(package.size for package in lock.packages)
        progress(status(f"Fetching {len(lock.packages)} packages, {size / 1e6:.1f} MB"))
        files = tool.download(lock.packages)
        repository(work, lock, files)
        progress(status("Installing packages"))
        image = _build(catalog, lock, work, progress)
        _write_lock(request.lock, lock)
    progress(status(f"Locked in {request.lock}"))
    progress(status(f"Bootstrapped {reference.familiar}: {image.id}"))
    return image


def _architecture(asked: str) -> str:
    """The distribution's word for the platform; Unsupported if its programs cannot be run here."""
    platform = platforms.parse(asked) if asked else host_platform()
    if platform.os != "linux":
        raise Unsupported(f"{platform} cannot be made of a distribution's packages: it is no Linux")
    if not platforms.suits(platform, host_platform()):
        apt.need("arch-test")
        binfmt.interpreter(platform.architecture)
        binfmt.check_kernel()
    return _DEBIAN.get(platform.architecture, platform.architecture)


def _platform(architecture: str) -> Platform:
    """The platform that the distribution calls `architecture`."""
    names = {debian: name for name, debian in _DEBIAN.items()}
    return platforms.normalise(Platform(names.get(architecture, architecture), "linux"))


def _version() -> str:
    done = subprocess.run(["mmdebstrap", "--version"], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().split()[-1]


def _read_lock(path: str) -> Lock | None:
    try:
        with open(path, "rb") as file:
            lock = msgspec.json.decode(file.read(), type=Lock)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} is no lock file: {error}") from error
    if lock.version != 1 or lock.variant != VARIANT:
        raise Invalid(f"{path} is of another version ({lock.version}, {lock.variant})")
    apt.check_words(lock.suite, [*lock.include, *(package.name for package in lock.packages)])
    for package in lock.packages:
        if len(package.sha256) != 64 or not package.sha256.isalnum() or "\n" in package.uri:
            raise Invalid(f"{path}: the entry of {package.name} is damaged")
    return lock


def _check_lock(lock: Lock, reference: str, request: Request) -> None:
    if lock.reference != reference or (request.include and lock.include != sorted(request.include)):
        raise Conflict(
            f"{request.lock} locks {lock.reference} with {', '.join(lock.include) or 'no'} further "
            "packages; remove the file, or ask for the same"
        )
    if request.mirror is not None:
        new = request.mirror.rstrip("/") + "/"
        moved = [
            msgspec.structs.replace(p, uri=new + p.uri[p.uri.index("/pool/") + 1 :])
            if "/pool/" in p.uri
            else p
            for p in lock.packages
        ]
        lock.packages = moved


def _write_lock(path: str, lock: Lock) -> None:
    if _same(path, lock):
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.new"
    with open(temporary, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(lock), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def _same(path: str, lock: Lock) -> bool:
    """Whether the lock file stays as it is; another mirror does not change it."""
    known = _read_lock(path)
    return known is not None and known.image == lock.image


class Locked(Protocol):
    """What a repository is made of: a lock file's contents, whatever they are for."""

    suite: str
    architecture: str
    epoch: int
    packages: list[apt.Package]


def repository(work: str, lock: Locked, files: Sequence[str]) -> None:
    """A flat repository in work/debs with just the lock's packages, their hashes verified.

    mmdebstrap selects what is essential by the suite's name, so there is a Release file with it.
    """
    stanzas: list[str] = []
    for package, path in zip(lock.packages, files, strict=True):
        os.chmod(path, 0o644)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise Corrupt(f"{package.name} {package.version} has hash {found}, not the locked one")
        done = subprocess.run(["dpkg-deb", "-f", path], stdout=subprocess.PIPE, check=True)
        control = done.stdout.decode("utf-8", "surrogateescape").strip()
        stanzas.append(
            f"{control}\nFilename: ./{os.path.basename(path)}\n"
            f"Size: {os.path.getsize(path)}\nSHA256: {package.sha256}\n"
        )
    index = "\n".join(stanzas).encode("utf-8", "surrogateescape")
    release = (
        f"Suite: {lock.suite}\nCodename: {lock.suite}\nArchitectures: {lock.architecture}\n"
        f"Date: {email.utils.formatdate(lock.epoch, usegmt=True)}\n"
        f"SHA256:\n {hashlib.sha256(index).hexdigest()} {len(index)} Packages\n"
    )
    for name, data in (("Packages", index), ("Release", release.encode())):
        with open(f"{work}/debs/{name}", "wb") as out:
            out.write(data)


def _command(lock: Lock, work: str) -> list[str]:
    lines = "".join(source.line(signed=False) + "\n" for source in lock.sources)
    with open(f"{work}/image-sources.list", "w", encoding="utf-8") as file:
        file.write(lines)
    names = ",".join(package.name for package in lock.packages)
    platform, prefix = _platform(lock.architecture), []
    if not platforms.suits(platform, host_platform()):
        # Their programs run while they are installed: where nothing is registered for the host.
        prefix = [sys.executable, "-m", "bulkhead.images.emulated", platform.architecture]
    remove = 'rm -f "$1/etc/resolv.conf" "$1/etc/hostname" "$1/etc/apt/apt.conf.d/99mmdebstrap"'
    return [
        *prefix,
        "mmdebstrap",
        "--variant=minbase",
        "--format=tar",
        f"--architectures={lock.architecture}",
        "--skip=output/dev",
        f"--include={names}",
        '--aptopt=APT::Sandbox::User "root"',
        "--aptopt=APT::Install-Recommends false",
        f"--customize-hook=upload {work}/image-sources.list /etc/apt/sources.list",
        f"--customize-hook={remove}",
        lock.suite,
        "-",
        f"deb [trusted=yes] copy:{work}/debs ./",
    ]


def _build(catalog: Catalog, lock: Lock, work: str, progress: Progress) -> Image:
    created = of_nanoseconds(lock.epoch * 10**9)
    with catalog.store.lease():
        chunks = tar(_command(lock, work), lock.epoch, work, progress)
        layer = catalog.store.ingest(chunks, compression="", keep_blob=False)
        platform = _platform(lock.architecture)
        config = ImageConfig(
            architecture=platform.architecture,
            os=platform.os,
            variant=platform.variant,
            config=ContainerConfig(env=[_PATH], cmd=["bash"]),
            rootfs=RootFS(diff_ids=[layer.diff_id]),
            history=[History(created, f"bulkhead image bootstrap {lock.reference}")],
            created=created,
        )
        stored = assemble.put_config(
            catalog, config, [assemble.tar_layer(layer.diff_id, layer.size)]
        )
        if lock.image and lock.image != stored.image:
            raise Conflict(
                f"the lock promises image {lock.image}, but {stored.image} came out; it was made "
                f"with mmdebstrap {lock.mmdebstrap}, here is {_version()}"
            )
        lock.image, lock.layer = stored.image, layer.diff_id
        assemble.name(catalog, stored, [parse(lock.reference)])
    return catalog.image(stored.image)


def tar(command: list[str], epoch: int, work: str, progress: Progress) -> Iterator[bytes]:
    """What `command` writes to standard output; Unavailable, with its last words, if it fails."""
    environment = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "HOME": work,
        "TMPDIR": work,
        "LC_ALL": "C.UTF-8",
        "SOURCE_DATE_EPOCH": str(epoch),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    last: deque[str] = deque(maxlen=8)
    with ExitStack() as undo:
        process = undo.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
            )
        )
        reader = threading.Thread(target=_report, args=(process, last, progress))
        undo.callback(reader.join)
        undo.callback(_end, process)
        reader.start()
        assert process.stdout is not None
        while chunk := process.stdout.read(_PIECE):
            yield chunk
        if process.wait() != 0:
            raise Unavailable(f"mmdebstrap failed: {' | '.join(last)[-800:]}")


def _report(process: "subprocess.Popen[bytes]", last: deque[str], progress: Progress) -> None:
    """Pass on what mmdebstrap says; lines of its progress bar are dropped."""
    assert process.stderr is not None
    for raw in process.stderr:
        line = raw.decode("utf-8", "replace").rpartition("\r")[2].strip()
        if line and "[" not in line[:1]:
            last.append(line)
            if line.startswith(("I: ", "W: ")):
                progress(status(line[3:]))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Have mmdebstrap clean up, should it still run."""
    if process.poll() is None:
        process.terminate()
