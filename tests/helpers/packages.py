"""Debian's packages, also of other suites, unpacked into a folder: nothing is installed.

    root = packages.unpacked("xorriso", "libisoburn1")
    root = packages.unpacked("criu", suite="trixie", dependencies=True)

~/.cache/bulkhead-tests/packages-HASH/     the packages' files, below one folder
"""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.helpers.guest_kernel import CACHE

_TIMEOUT_S = 600
_FAILED = "cannot be had here"


class NoPackages(Exception):
    """They cannot be fetched; the text says why."""


@functools.cache
def unpacked(*names: str, suite: str = "", dependencies: bool = False) -> Path:
    """The folder with the files of packages `names`, of this system's suite or another.

    `dependencies`: with all packages that they depend on. Kept for ever under the names and the
    suite, whatever their versions. NoPackages if there is no mirror.
    """
    key = hashlib.sha256("\0".join((suite, *names, str(dependencies))).encode()).hexdigest()[:16]
    place = CACHE / f"packages-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as folder:
                _fetch(Path(folder), names, suite, dependencies)
                (Path(folder) / "tree").rename(place)
    return place


@functools.cache
def missing(*names: str, suite: str = "", dependencies: bool = False) -> str:
    """Why they cannot be used here, "" if they can; fetches them at the first call."""
    try:
        unpacked(*names, suite=suite, dependencies=dependencies)
    except NoPackages as error:
        return str(error)
    return ""


def libraries(root: Path) -> str:
    """LD_LIBRARY_PATH for programs of an unpacked tree."""
    return str(root / "usr/lib" / f"{os.uname().machine}-linux-gnu")


def _fetch(folder: Path, names: tuple[str, ...], suite: str, dependencies: bool) -> None:
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise NoPackages(f"{program} is missing")
    options = _private(folder, suite) if suite else []
    wanted = _closure(names, options) if dependencies else list(names)
    debs = folder / "debs"
    debs.mkdir()
    _run("apt-get", "-q", *options, "download", *wanted, cwd=debs)
    for deb in sorted(debs.glob("*.deb")):
        _run("dpkg-deb", "-x", str(deb), str(folder / "tree"), cwd=folder)


def _closure(names: tuple[str, ...], options: list[str]) -> list[str]:
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    words = [f"--no-{kind}" for kind in kinds]
    text = _run("apt-cache", *options, "depends", "--recurse", *words, *names)
    return sorted(set(re.findall(r"^[a-z0-9][a-z0-9+.-]*$", text, re.MULTILINE)))


def _private(folder: Path, suite: str) -> list[str]:
    """A configuration of apt's with one suite of this system's own mirror."""
    text = "\n".join(
        file.read_text()
        for file in (Path("/etc/apt/sources.list"), *Path("/etc/apt").glob("sources.list.d/*"))
        if file.is_file()
    )
    found = re.search(
        r"^(?:URIs: +|deb +(?:\[[^]]*\] +)?)(https?://\S+/debian/?)(?:\s|$)", text, re.M
    )
    if found is None:
        raise NoPackages(f"{suite}: no Debian mirror among this system's package sources")
    for name in ("lists/partial", "cache/archives/partial", "empty"):
        (folder / name).mkdir(parents=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={keyring}] {found[1]} {suite} main\n")
    values = {
        "Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": folder / "empty",
        "Dir::State::lists": folder / "lists", "Dir::Cache": folder / "cache",
        "Dir::State::status": os.devnull, "APT::Sandbox::User": "root",
        "Acquire::Languages": "none", "Dir::Etc::preferencesparts": folder / "empty",
    }  # fmt: skip
    options = [word for name, value in values.items() for word in ("-o", f"{name}={value}")]
    _run("apt-get", "-q", *options, "update")
    return options


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, errors="replace",
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoPackages(f"{command[0]}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NoPackages(f"{command[0]} {_FAILED}: {last}")
    return done.stdout
