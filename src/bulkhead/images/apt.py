"""Asking apt, in a directory of its own, which packages a Debian root file system needs.

The host's package sources serve (their own keyrings included) when they have the wanted suite; its
/var/lib/dpkg is never read and nothing outside the given directory is written. apt verifies the
archive's signature and, when it downloads, each package's hash: apt-secure(8), sources.list(5).
"""

import email.utils
import glob
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from bulkhead.errors import Invalid, NotFound, Unavailable, Unsupported

_SUITE = re.compile(r"[a-z][a-z0-9.-]{1,40}\Z")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+)?\Z")
_URI = re.compile(r"'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})\Z")
_KEPT = ("Acquire::Check-", "Acquire::http", "Acquire::https", "Acquire::Retries")
_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution's defaults."""

    mirror: str
    components: str
    keyring: str


DISTRIBUTIONS = {
    "debian": Distribution(
        "http://deb.debian.org/debian", "main", "/usr/share/keyrings/debian-archive-keyring.gpg"
    ),
    "ubuntu": Distribution(
        "http://archive.ubuntu.com/ubuntu",
        "main universe",
        "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
    ),
}


class Source(msgspec.Struct, frozen=True):
    """One package source, what a line of sources.list(5) says."""

    uri: str
    suite: str
    components: str
    keyring: str = ""

    def line(self, *, signed: bool) -> str:
        """As a line; `signed`: with the path of the keyring on this host."""
        option = f"[signed-by={self.keyring}] " if signed and self.keyring else ""
        return f"deb {option}{self.uri} {self.suite} {self.components}"


class Package(msgspec.Struct, frozen=True):
    """One package to install: where its file is, and what it must be."""

    name: str
    version: str
    architecture: str
    uri: str
    size: int
    sha256: str


def need(*programs: str) -> None:
    """Unsupported, with the command that installs them, unless all `programs` are there."""
    missing = [name for name in programs if not _in_path(name)]
    if missing:
        packages = {"apt-get": "apt", "apt-config": "apt", "dpkg-deb": "dpkg"}
        wanted = sorted({packages.get(name, name) for name in missing})
        raise Unsupported(
            f"{', '.join(missing)} not found: bootstrapping an image needs it; "
            f"install it by: apt-get install {' '.join(wanted)}"
        )


def _in_path(program: str) -> bool:
    path = os.environ.get("PATH") or os.defpath
    return any(os.access(f"{place}/{program}", os.X_OK) for place in path.split(":"))


def check_words(suite: str, include: Iterable[str]) -> None:
    """Invalid unless these can be a suite and packages, and nothing that programs misread."""
    if not _SUITE.match(suite):
        raise Invalid(f"{suite!r} is not the name of a suite (bookworm, trixie, …)")
    for package in include:
        if not _PACKAGE.match(package):
            raise Invalid(f"{package!r} is not the name of a package")


def sources_for(
    distribution: str, suite: str, mirror: str | None, directory: str = "/etc/apt"
) -> list[Source]:
    """Where to take `suite` from: `mirror`, else the host's sources, else the default mirror."""
    known = DISTRIBUTIONS.get(distribution)
    if known is None:
        raise Unsupported(
            f"bootstrapping {distribution!r} is not supported; known are {', '.join(DISTRIBUTIONS)}"
        )
    if mirror is not None:
        if not re.match(r"(https?|file|copy)://?\S+\Z", mirror):
            raise Invalid(f"mirror {mirror!r} is not a URL")
        return [Source(mirror, suite, known.components, known.keyring)]
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    found = [s for s in host_sources(directory, known.keyring) if s.suite in wanted]
    if not any(source.suite == suite for source in found):
        return [Source(known.mirror, suite, known.components, known.keyring)]
    return list(dict.fromkeys(found))


def host_sources(directory: str, keyring: str) -> list[Source]:
    """The binary package sources in sources.list and sources.list.d, main components only."""
    found: list[Source] = []
    parts = sorted(glob.glob(f"{glob.escape(directory)}/sources.list.d/*"))
    for path in (f"{directory}/sources.list", *parts):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except (FileNotFoundError, PermissionError):
            continue
        if path.endswith(".list"):
            found.extend(_one_line(text, keyring))
        elif path.endswith(".sources"):
            found.extend(_deb822(text, keyring))
    return found


def _one_line(text: str, keyring: str) -> Iterable[Source]:
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line.strip())
        if match is None or "main" not in match[4].split():
            continue
        signed = re.search(r"signed-by=(\S+)", match[1] or "")
        yield Source(match[2], match[3], "main", signed[1] if signed else keyring)


def _deb822(text: str, keyring: str) -> Iterable[Source]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                fields[name] = fields.get(name, "") + "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if (
            "deb" not in fields.get("types", "").split()
            or fields.get("enabled", "").lower() == "no"
        ):
            continue
        if "main" not in fields.get("components", "").split():
            continue
        signed = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri, suite, "main", signed if signed.startswith("/") else keyring)


class Apt:
    """apt with all its files in `directory`."""

    def __init__(self, directory: str, architecture: str, sources: Sequence[Source]) -> None:
        self.directory = directory
        self._config = f"{directory}/apt.conf"
        for part in ("empty", "state/lists/partial", "cache/archives/partial", "debs"):
            os.makedirs(f"{directory}/{part}", exist_ok=True)
        _write(f"{directory}/status", "")
        _write(f"{directory}/sources.list", "".join(s.line(signed=True) + "\n" for s in sources))
        settings = {
            "Dir::Etc::SourceList": f"{directory}/sources.list",
            "Dir::Etc::SourceParts": f"{directory}/empty",
            "Dir::Etc::Parts": f"{directory}/empty",
            "Dir::Etc::Preferences": f"{directory}/none",
            "Dir::Etc::PreferencesParts": f"{directory}/empty",
            "Dir::State": f"{directory}/state",
            "Dir::State::status": f"{directory}/status",
            "Dir::Cache": f"{directory}/cache",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            **({"APT::Sandbox::User": "root"} if os.geteuid() == 0 else {}),
        }
        lines = [f'{key} "{value}";' for key, value in settings.items()]
        _write(self._config, "\n".join([*lines, *_host_settings()]) + "\n")

    def run(self, *command: str) -> str:
        """Run an apt program; its output, or Unavailable with what it complains about."""
        environment = {**os.environ, "APT_CONFIG": self._config, "LC_ALL": "C.UTF-8"}
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{command[0]} did not end within {_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            complaints = [
                line.removeprefix("E: ")
                for line in done.stderr.decode("utf-8", "replace").splitlines()
                if line.startswith("E: ")
            ]
            text = "; ".join(complaints)[:600] or f"exit code {done.returncode}"
            if "Unable to locate package" in text or "has no installation candidate" in text:
                raise NotFound(text)
            raise Unavailable(f"{command[0]} {command[1]}: {text}")
        return done.stdout.decode("utf-8", "replace")

    def update(self) -> int:
        """Fetch the package lists; the newest date of the sources, seconds since 1970."""
        self.run("apt-get", "update", "-q", "--error-on=any")
        dates = [
            _release_date(path) for path in glob.glob(f"{self.directory}/state/lists/*Release")
        ]
        if not any(dates):
            raise Unavailable("the package sources have no Release file with a date")
        return max(dates)

    def resolve(self, include: Sequence[str]) -> list[Package]:
        """Essential and required packages, apt and `include`, with all they depend on."""
        roots = ("apt", "?essential", "?priority(required)", *include)
        hashed = ("-o", "Acquire::ForceHash=SHA256")
        output = self.run("apt-get", "install", "-y", "-qq", "--print-uris", *hashed, *roots)
        packages = []
        for line in output.splitlines():
            match = _URI.match(line.strip())
            if match is None:
                raise Unavailable(f"apt-get printed a line that is no package: {line[:200]!r}")
            name, version, architecture = _file_name(match[2])
            packages.append(Package(name, version, architecture, match[1], int(match[3]), match[4]))
        return sorted(packages, key=lambda package: (package.name, package.architecture))

    def download(self, packages: Sequence[Package]) -> list[str]:
        """Fetch the files, hashes verified; their paths. Corrupt ones are never left there."""
        paths = [f"{self.directory}/debs/{package.sha256}.deb" for package in packages]
        command = ["/usr/lib/apt/apt-helper", "download-file"]
        for package, path in zip(packages, paths, strict=True):
            command += [package.uri, path, f"SHA256:{package.sha256}"]
        try:
            self.run(*command)
        except Unavailable as error:
            raise Unavailable(
                f"{error.message}. If a locked version left the mirror, take the lock's sources "
                "from a snapshot (--mirror http://snapshot.debian.org/archive/debian/DATE)"
            ) from error
        return paths


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _host_settings() -> list[str]:
    """What the host's configuration says about proxies, retries and clocks."""
    done = subprocess.run(["apt-config", "dump", "Acquire"], stdout=subprocess.PIPE, check=False)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.startswith(_KEPT) and '""' not in line]


def _release_date(path: str) -> int:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("Date:"):
                return int(email.utils.parsedate_to_datetime(line[5:].strip()).timestamp())
    return 0


def _file_name(text: str) -> tuple[str, str, str]:
    """Name, version and architecture of apt's file name ("a_1%3a2_amd64.deb")."""
    parts = text.removesuffix(".deb").split("_")
    if len(parts) != 3:
        raise Unavailable(f"apt-get names a package file {text!r}")
    return parts[0], parts[1].replace("%3a", ":").replace("%3A", ":"), parts[2]
