"""The image with the probe in it, everywhere where it is needed, and the subjects that are there.

All that is made is called `bulkhead-compare:HEX`, or lies in one temporary folder, and is gone at
the block's end.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from bulkhead import _native
from bulkhead.comparing import bundles
from bulkhead.comparing.spawn import LIMIT_S, FailedError, complain, quietly, said
from bulkhead.comparing.subjects import PROBE, Bare, Engine, Subject
from bulkhead.errors import BulkheadError, Invalid, Unsupported
from bulkhead.home import Home

BOUNDARIES = ("container", "sandbox", "microvm", "vm")
DEFAULT = ("container", "sandbox", "microvm")
ENGINES = ("docker", "podman")


@dataclass
class Stage:
    """What a comparison is played on."""

    home: Home
    folder: str
    """Temporary, for everybody."""
    probe: str
    """The probe's path on the host."""
    tag: str
    words: list[str]
    """Our own command line."""
    env: dict[str, str]
    subjects: list[Subject] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Subject → why it cannot take part."""

    def layers_on_the_wire(self) -> int:
        """Bytes of the image's layers as gzip makes them, which is how registries are sent them."""
        path = f"{self.folder}/wire.tar"
        said([*self.words, "save", "-o", path, self.tag], self.env)
        total = 0
        with tarfile.open(path) as archive:
            manifest = archive.extractfile("manifest.json")
            assert manifest is not None
            for name in json.load(manifest)[0]["Layers"]:
                layer = archive.extractfile(name)
                assert layer is not None
                packer = zlib.compressobj(6, wbits=31)
                while piece := layer.read(1 << 20):
                    total += len(packer.compress(piece))
                total += len(packer.flush())
        os.unlink(path)
        return total


def native(name: str) -> str:
    """The path of one of our native programs; Unsupported if it was not built."""
    path = f"{os.path.dirname(os.path.abspath(str(_native.__file__)))}/{name}"
    if not os.access(path, os.X_OK):
        raise Unsupported(f"{path} is not there: build it with `make -C native`")
    return path


def boundaries(names: Sequence[str]) -> list[str]:
    """The boundaries that were asked for; Invalid for a word that is none."""
    for name in names:
        if name not in BOUNDARIES:
            raise Invalid(f"no such boundary: {name} (there are: {', '.join(BOUNDARIES)})")
    return list(dict.fromkeys(names))


def _own_words() -> list[str]:
    """Our command line as installed: the fast client where it was built."""
    try:
        return [native("bulkhead-client")]
    except Unsupported:
        return [sys.executable, "-m", "bulkhead"]


@contextlib.contextmanager
def stage(home: Home, image: str, names: Sequence[str], *, peers: bool) -> Generator[Stage]:
    """Image and subjects, made and removed. FailedError if our own image cannot be made."""
    env = {**os.environ, "BULKHEAD_ROOT": home.root, "BULKHEAD_RUN": home.run}
    env["BULKHEAD_PYTHON"] = sys.executable
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="bulkhead-compare."))
        made = Stage(
            home, folder, native("bulkhead-probe"), f"bulkhead-compare:{uuid.uuid4().hex[:12]}",
            _own_words(), env,
        )  # fmt: skip
        undo.callback(_clear, made.words, made.tag, env)
        _make_image(made, image)
        made.subjects.append(Bare(made.probe))
        for name in boundaries(names):
            kind = f"bulkhead run --boundary {name}"
            options = ("--boundary", name)
            made.subjects.append(Engine(name, kind, made.words, made.tag, options, env))
        if peers:
            _add_peers(made, undo)
        yield made


def _make_image(made: Stage, image: str) -> None:
    if not image:
        path = f"{made.folder}/image.tar"
        with tarfile.open(path, "w") as archive:
            for name in ("tmp", "proc", "sys", "dev", "etc"):
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            _add_probe(archive, made.probe, PROBE.lstrip("/"))
        said([*made.words, "import", path, made.tag], made.env)
        return
    with _created(made, image) as identity:
        copied = io.BytesIO()
        with tarfile.open(fileobj=copied, mode="w") as archive:
            _add_probe(archive, made.probe, PROBE.lstrip("/"))
        _feed([*made.words, "cp", "-", f"{identity}:/"], made.env, copied.getvalue())
        said([*made.words, "commit", identity, made.tag], made.env)


def _add_probe(archive: tarfile.TarFile, path: str, name: str) -> None:
    with open(path, "rb") as file:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = os.fstat(file.fileno()).st_size, 0o755
        archive.addfile(entry, file)


@contextlib.contextmanager
def _created(made: Stage, image: str) -> Generator[str]:
    words = [*made.words, "create", "--network", "none", image, PROBE]
    identity = said(words, made.env).strip().rpartition("\n")[2]
    try:
        yield identity
    finally:
        said([*made.words, "rm", "-f", identity], made.env)


def _feed(words: Sequence[str], env: dict[str, str] | None, data: bytes) -> None:
    try:
        done = subprocess.run(
            words, env=env, input=data, capture_output=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise FailedError(f"{words[0]}: no end after {LIMIT_S:.0f} s") from None
    if done.returncode:
        raise complain(words, done.returncode, done.stderr)


def _clear(words: Sequence[str], tag: str, env: dict[str, str] | None) -> None:
    """Remove the image, and the workloads of it that a command which was cut off has left."""
    with contextlib.suppress(FailedError):
        left = said([*words, "ps", "-aq", "--filter", f"ancestor={tag}"], env).split()
        if left:
            quietly([*words, "rm", "-f", *left], env)
    quietly([*words, "rmi", "-f", tag], env)


def _add_peers(made: Stage, undo: contextlib.ExitStack) -> None:
    for name in ENGINES:
        try:
            made.subjects.append(_engine(made, name, undo))
        except (FailedError, OSError) as error:
            made.missing[name] = str(error)
    root = f"{made.folder}/root"
    try:
        _unpack(made, root)
        found = bundles.runtimes(made.folder, root)
    except (FailedError, OSError) as error:
        made.missing["runc, crun, runsc"] = str(error)
    else:
        for one in found:
            undo.callback(one.clear)
        made.subjects += found
        there = {one.name for one in found}
        made.missing |= {
            name: f"not installed: apt-get install {name}"
            for name in ("runc", "crun", "runsc")
            if name not in there
        }
    try:
        made.subjects.append(bundles.qemu(made.home, made.folder, made.probe))
    except (FailedError, BulkheadError, OSError) as error:
        made.missing["qemu"] = str(error)


def _engine(made: Stage, name: str, undo: contextlib.ExitStack) -> Engine:
    """docker or podman with our image loaded; FailedError says why not."""
    program = shutil.which(name)
    if program is None:
        raise FailedError(f"not installed: apt-get install {name}{'.io' * (name == 'docker')}")
    if name == "docker":
        server = said([program, "version", "--format", "{{json .Server}}"])
        if "bulkhead" in server.lower():
            raise FailedError("the docker client here speaks to bulkhead")
        version = said([program, "version", "--format", "{{.Server.Version}}"]).strip()
    else:
        version = said([program, "version", "--format", "{{.Client.Version}}"]).strip()
    path = f"{made.folder}/image.{name}.tar"
    said([*made.words, "save", "-o", path, made.tag], made.env)
    undo.callback(_clear, [program], made.tag, None)
    said([program, "load", "-i", path])
    os.unlink(path)
    tag = (
        f"localhost/{made.tag}" if name == "podman" and not _knows(program, made.tag) else made.tag
    )
    return Engine(name, f"{name} {version}", [program], tag, ("--pull", "never"))


def _knows(program: str, tag: str) -> bool:
    return quietly([program, "image", "inspect", tag]) == 0


def _unpack(made: Stage, root: str) -> None:
    """The image's root file system, for runtimes that take a folder."""
    os.mkdir(root)
    with _created(made, made.tag) as identity:
        path = f"{made.folder}/root.tar"
        said([*made.words, "export", "-o", path, identity], made.env)
    # It writes nothing outside of the root: no "..", and links are made last. tar(1)
    said(["tar", "--extract", "--numeric-owner", "--directory", root, "--file", path])
    os.unlink(path)
