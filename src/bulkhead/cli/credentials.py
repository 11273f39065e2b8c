"""Registry credentials, where docker keeps them: $DOCKER_CONFIG or ~/.docker, config.json.

`auths` holds base64 `user:password`, or an identity token; `credsStore` and `credHelpers` name
programs `docker-credential-NAME` that speak JSON on their standard streams.
"""

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bulkhead.errors import Invalid, NotFound, Unavailable

if TYPE_CHECKING:
    from bulkhead.cli.command import Context

HUB = "https://index.docker.io/v1/"
_HUB_NAMES = frozenset(("docker.io", "index.docker.io", "registry-1.docker.io"))


def registry_of(image: str) -> str:
    """The registry's host (and port) that an image name means; docker.io when it names none."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first
    return "docker.io"


def key_of(server: str) -> str:
    """The key docker's config.json uses for a server."""
    host = server.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return HUB if host in _HUB_NAMES or not host else host


def directory(context: "Context") -> str:
    """Where config.json is."""
    environ = context.environ
    if context.config or environ.get("DOCKER_CONFIG"):
        return os.path.abspath(context.config or environ["DOCKER_CONFIG"])
    return os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".docker")


def load(context: "Context") -> dict[str, Any]:
    """config.json's content; {} if there is none; Invalid if it is no JSON object."""
    path = f"{directory(context)}/config.json"
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise Invalid(f"{path}: {error}; mend or remove it") from None
    if not isinstance(found, dict):
        raise Invalid(f"{path}: not a JSON object; mend or remove it")
    return found


def store(context: "Context", config: dict[str, Any]) -> str:
    """Write config.json whole (0600, by rename); its path."""
    folder = directory(context)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path, fresh = f"{folder}/config.json", f"{folder}/.config.json.{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(config, file, indent="\t")
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        raise
    return path


def helper_for(config: dict[str, Any], key: str) -> str:
    """The credential helper responsible for `key`, or ""."""
    helpers = config.get("credHelpers") or {}
    host = "docker.io" if key == HUB else key
    return str(helpers.get(key) or helpers.get(host) or config.get("credsStore") or "")


def ask_helper(helper: str, verb: str, text: str) -> str:
    """What `docker-credential-HELPER VERB` answers to `text`; NotFound if it knows nothing."""
    import subprocess

    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run([program, verb], input=text, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"credential helper {program}: {error.strerror}; install it, or change "
                          "credsStore in docker's config.json") from None  # fmt: skip
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        if "credentials not found" in said:
            raise NotFound(said)
        raise Unavailable(f"credential helper {program} {verb}: {said or 'failed'}")
    return done.stdout


def find(context: "Context", image: str) -> dict[str, str]:
    """Credentials for `image`'s registry as an AuthConfig; {} when there are none."""
    return for_server(context, registry_of(image))


def for_server(context: "Context", server: str) -> dict[str, str]:
    """Credentials for one registry: {"username", "password"} or {"identitytoken"}, + address."""
    config = load(context)
    key = key_of(server)
    helper = helper_for(config, key)
    if helper:
        try:
            found = json.loads(ask_helper(helper, "get", key))
        except NotFound:
            return {}
        if found.get("Username") == "<token>":
            return {"identitytoken": found.get("Secret", ""), "serveraddress": key}
        return {"username": found.get("Username", ""), "password": found.get("Secret", ""),
                "serveraddress": key}  # fmt: skip
    for name in _spellings(key):
        entry = (config.get("auths") or {}).get(name)
        if entry:
            return _decode(entry, key)
    return {}


def _spellings(key: str) -> Iterator[str]:
    yield key
    if key == HUB:
        yield from ("docker.io", "index.docker.io", "https://index.docker.io/v1")
    else:
        yield from (f"https://{key}", f"http://{key}", f"https://{key}/", f"https://{key}/v1/",
                    f"https://{key}/v2/")  # fmt: skip


def _decode(entry: dict[str, str], key: str) -> dict[str, str]:
    if entry.get("identitytoken"):
        return {"identitytoken": entry["identitytoken"], "serveraddress": key}
    user, password = entry.get("username", ""), entry.get("password", "")
    if entry.get("auth"):
        try:
            user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        except ValueError:
            raise Invalid(f"docker's config.json: the auth entry of {key} is not base64") from None
    return {"username": user, "password": password.rstrip("\0"), "serveraddress": key}
