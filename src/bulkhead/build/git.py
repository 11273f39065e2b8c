"""Git repositories as sources of ADD and as contexts.

git itself fetches, as a process that sees none of the machine's configuration, asks nobody for a
password, and speaks no protocol that runs programs (gitremote-helpers(7), `ext::`) or reads local
files. What it checked out has the time of its commit, so that equal commits give equal layers.
"""

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bulkhead.errors import Invalid, NotFound, Unavailable, Unsupported

TOKEN = "GIT_AUTH_TOKEN"  # noqa: S105 - the name of one
"""The secret that BuildKit's users give for private repositories."""
_SCP = re.compile(r"[a-zA-Z0-9_.-]+@[a-zA-Z0-9_.-]+:(?!//)")
_USER = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://([^/?#\s]*)@")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_PROTOCOLS = "http:https:ssh:git"
_PROXIES = frozenset(
    word for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
    for word in (name, name.upper())
)  # fmt: skip
_SSH = "ssh -F /dev/null -o BatchMode=yes -o IdentityFile=none"
"""With the keys of the agent that was given, never with those of the engine's user."""
_SHOWN = 2000


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository, what of it is wanted ("": the default branch), and the directory in it."""

    url: str
    ref: str = ""
    folder: str = ""

    @property
    def name(self) -> str:
        """What the repository is called: the last part without .git."""
        path = self.url if _SCP.match(self.url) else urllib.parse.urlsplit(self.url).path
        return re.split(r"[/:]", path.rstrip("/"))[-1].removesuffix(".git")


def is_git(text: str) -> bool:
    """Whether a source is a git repository, as BuildKit tells them."""
    bare = text.partition("#")[0].partition("?")[0]
    if text.startswith(("git://", "ssh://")) or _SCP.match(bare):
        return True
    if text.startswith("github.com/"):
        return True
    return text.startswith(("http://", "https://")) and bare.endswith(".git")


def parse(text: str) -> Repository:
    """`URL#REF:FOLDER`, or `URL?ref=REF&subdir=FOLDER`. Invalid for what is neither."""
    url, _, fragment = text.partition("#")
    ref, _, folder = fragment.partition(":")
    if "?" in url and not fragment:
        url, _, query = url.partition("?")
        given = urllib.parse.parse_qs(query)
        if unknown := set(given) - {"ref", "branch", "tag", "commit", "subdir"}:
            raise Invalid(f"unexpected query {sorted(unknown)[0]!r} in git URL {redacted(text)}")
        folder = given.get("subdir", [""])[-1]
        named = [given[key][-1] for key in ("commit", "tag", "branch", "ref") if key in given]
        ref = named[0] if named else ""
    if url.startswith("github.com/"):
        url = f"https://{url}"
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Invalid(f"the directory {folder!r} leads out of the repository")
    for word in (url, ref):
        if word.startswith("-") or any(ord(letter) < 33 for letter in word):
            raise Invalid(f"malformed git URL {redacted(text)!r}")
    host = "" if _SCP.match(url) else urllib.parse.urlsplit(url).hostname or ""
    if host.startswith("-"):
        raise Invalid(f"malformed git URL {redacted(text)!r}")
    return Repository(url, ref, "/".join(parts))


def redacted(text: str) -> str:
    """A text without the passwords in its URLs; with HTTP the user's name may be a token, too."""
    return _USER.sub(_masked, text)


def _masked(found: re.Match[str]) -> str:
    scheme, (user, colon, _) = found[1], found[2].partition(":")
    if scheme.lower() in ("http", "https"):
        user = "xxxxx"
    return f"{scheme}://{user}{colon}{'xxxxx' if colon else ''}@"


class Fetcher:
    """Checks repositories out for one build.

    `directory`: below it everything happens. `check` raises when the build is to end. `agent`: the
    socket of an SSH agent, "" for none; `token`: for HTTP, as the server's basic authentication.
    """

    def __init__(
        self, directory: str, check: Callable[[], None], *, agent: str = "", token: bytes = b""
    ) -> None:
        self._directory = directory
        self._check = check
        self._agent = agent
        self._token = token

    @contextlib.contextmanager
    def checkout(self, repository: Repository, *, keep: bool = False) -> Iterator[tuple[str, str]]:
        """The path of the wanted directory, and the commit. `keep`: with .git, at the top."""
        if shutil.which("git") is None:
            raise Unsupported("a git source needs the program git on the engine's machine")
        place = tempfile.mkdtemp(prefix="git-", dir=self._directory)
        try:
            commit = self._fetched(repository, place)
            self._git(repository, place, "-c", "advice.detachedHead=false", "checkout", "-q",
                      "--detach", commit)  # fmt: skip
            self._git(repository, place, "submodule", "-q", "update", "--init", "--recursive",
                      "--depth", "1")  # fmt: skip
            seconds = int(self._git(repository, place, "show", "-s", "--format=%ct", commit))
            self._tidied(repository, place, keep=keep)
            _dated(place, seconds * 10**9)
            found = f"{place}/{repository.folder}".rstrip("/")
            wanted = f"{os.path.realpath(place)}/{repository.folder}".rstrip("/")
            if os.path.realpath(found) != wanted or not os.path.isdir(found):
                raise NotFound(f"{redacted(repository.url)} has no directory {repository.folder!r}")
            yield found, commit
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _fetched(self, repository: Repository, place: str) -> str:
        """Get the wanted commit into a new repository; its name."""
        self._git(repository, place, "init", "-q", "--template=", place)
        wanted, url = repository.ref or "HEAD", repository.url
        fetch = ("fetch", "-q", "--no-tags", "--depth", "1", "--", url)
        failure = NotFound(f"{redacted(url)} has no branch, tag or commit {wanted!r}")
        try:
            self._git(repository, place, *fetch, wanted)
            return self._git(repository, place, "rev-parse", "FETCH_HEAD^{commit}")
        except NotFound as error:
            failure = error
        # A server without shallow fetches, or a commit that no branch ends with.
        try:
            self._git(repository, place, "fetch", "-q", "--", url, "+refs/heads/*:refs/remotes/o/*",
                      "+refs/tags/*:refs/tags/*")  # fmt: skip
            if not repository.ref:
                self._git(repository, place, "fetch", "-q", "--", url, "HEAD")
                return self._git(repository, place, "rev-parse", "FETCH_HEAD^{commit}")
            for ref in (f"refs/remotes/o/{wanted}", f"refs/tags/{wanted}", wanted):
                if ref != wanted or _COMMIT.fullmatch(wanted):
                    with contextlib.suppress(NotFound):
                        return self._git(repository, place, "rev-parse", f"{ref}^{{commit}}")
        except NotFound:
            raise failure from None
        raise failure

    def _tidied(self, repository: Repository, place: str, *, keep: bool) -> None:
        """Leave nothing in .git, or nothing that differs between two checkouts of one commit."""
        if not keep:
            for folder, folders, names in os.walk(place):
                if ".git" in folders:
                    folders.remove(".git")
                    shutil.rmtree(f"{folder}/.git")
                if ".git" in names:
                    os.unlink(f"{folder}/.git")
            return
        for name in ("index", "FETCH_HEAD", "ORIG_HEAD"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{place}/.git/{name}")
        self._git(repository, place, "read-tree", "HEAD")

    def _environment(self, repository: Repository) -> Mapping[str, str]:
        settings = {
            "core.logAllRefUpdates": "false",
            "core.symlinks": "true",
            "credential.helper": "",
            "core.hooksPath": "/dev/null",
            "init.defaultBranch": "main",
            "gc.auto": "0",
        }
        if self._token and repository.url.startswith(("http://", "https://")):
            parts = urllib.parse.urlsplit(repository.url)
            given = base64.b64encode(b"x-access-token:" + self._token.strip()).decode()
            server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"
            settings[f"http.{server}.extraHeader"] = f"Authorization: basic {given}"
        found = {name: value for name, value in os.environ.items() if name in _PROXIES}
        found |= {
            "PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C",
            "HOME": "/nonexistent",  # where there is no .netrc with somebody's passwords
            "GIT_ATTR_NOSYSTEM": "1", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "/bin/true",
            "GIT_ALLOW_PROTOCOL": _PROTOCOLS, "GIT_SSH_COMMAND": _SSH, "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_CONFIG_COUNT": str(len(settings)),
        }  # fmt: skip
        for number, (key, value) in enumerate(settings.items()):
            found |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        if self._agent:
            found["SSH_AUTH_SOCK"] = self._agent
        return found

    def _git(self, repository: Repository, place: str, *words: str) -> str:
        """Run git there; what it said. NotFound with git's own words if it fails."""
        self._check()
        with subprocess.Popen(
            ["git", *words], cwd=place, env=self._environment(repository),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                out, err = self._said(process)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode < 0:
            raise Unavailable(f"git was killed by signal {-process.returncode}")
        if process.returncode:
            said = " ".join(err.decode("utf-8", "replace").split())[-_SHOWN:]
            raise NotFound(f"cannot fetch {redacted(repository.url)}: {redacted(said)}")
        return out.decode("utf-8", "replace").strip()

    def _said(self, process: "subprocess.Popen[bytes]") -> tuple[bytes, bytes]:
        """What it writes to both of its streams, once it has ended."""
        while True:
            try:
                return process.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                self._check()


def _dated(place: str, when_ns: int) -> None:
    """Everything below gets the time, and git's two modes."""
    for folder, folders, names, fd in os.fwalk(place, follow_symlinks=False):
        del folder
        for name in names:
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            if mode & 0o170000 == 0o100000:
                os.chmod(name, 0o755 if mode & 0o100 else 0o644, dir_fd=fd)
            os.utime(name, ns=(when_ns, when_ns), dir_fd=fd, follow_symlinks=False)
        for name in folders:
            os.utime(name, ns=(when_ns, when_ns), dir_fd=fd, follow_symlinks=False)
        os.fchmod(fd, 0o755)
        os.utime(fd, ns=(when_ns, when_ns))
