"""Credentials for registries, where Docker keeps them: config.json and credential helpers.

    $DOCKER_CONFIG/config.json, else ~/.docker/config.json
      auths        {HOST: {"auth": base64("user:password"), "identitytoken", "registrytoken"}}
      credHelpers  {HOST: NAME}   the program docker-credential-NAME knows about this host
      credsStore   NAME           … about every other host

Helpers speak the protocol of github.com/docker/docker-credential-helpers: a verb as argument, the
server on standard input, JSON on standard output.
"""

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bulkhead.errors import Denied, Invalid, Unavailable

HUB_KEY = "https://index.docker.io/v1/"
_HUB_NAMES = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HELPER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """What to show a registry; the token takes precedence. `registry_token` is sent as it is."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, …)"

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.password or self.identity_token or self.registry_token)


ANONYMOUS = Credentials()


def from_auth(auth: Mapping[str, Any] | None) -> Credentials | None:
    """Credentials of Docker's X-Registry-Auth object; None of None."""
    if auth is None:
        return None
    username, password = str(auth.get("username") or ""), str(auth.get("password") or "")
    if not password and auth.get("auth"):
        username, password = _basic(str(auth["auth"]), "the given credentials")
    return Credentials(
        username,
        password,
        str(auth.get("identitytoken") or ""),
        str(auth.get("registrytoken") or ""),
    )


def to_auth(credentials: Credentials) -> dict[str, str]:
    """The X-Registry-Auth object of `credentials`."""
    named = {
        "username": credentials.username,
        "password": credentials.password,
        "identitytoken": credentials.identity_token,
        "registrytoken": credentials.registry_token,
    }
    return {key: value for key, value in named.items() if value}


def config_path() -> str:
    """Docker's configuration file of this user."""
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    return f"{directory}/config.json"


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            config = json.load(opened)
    except FileNotFoundError:
        return {}
    except PermissionError as error:
        raise Denied(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Invalid(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise Invalid(f"{file} is not a JSON object")
    return config


def _section(config: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise Invalid(f"{file}: {name} is not an object")
    return section


def server_key(domain: str) -> str:
    """The key under which Docker files credentials for `domain`."""
    return HUB_KEY if domain in _HUB_NAMES else domain


def _hostname(key: str) -> str:
    """The host of a key, which old clients wrote as a URL."""
    for scheme in ("https://", "http://"):
        key = key.removeprefix(scheme)
    return key.partition("/")[0]


def lookup(domain: str, file: str | None = None) -> Credentials | None:
    """Credentials filed for `domain` (of a reference), or None; may run a helper."""
    file = file or config_path()
    config = _read(file)
    key = server_key(domain)
    helpers = _section(config, "credHelpers", file)
    helper = helpers.get(key) or helpers.get(domain) or config.get("credsStore")
    if helper:
        found = _ask_helper(str(helper), key)
        if found is not None or domain in helpers or key in helpers:
            return found
    auths = _section(config, "auths", file)
    wanted = _hostname(key)
    entry = auths.get(key) or auths.get(domain)
    if entry is None:
        entry = next((auths[other] for other in auths if _hostname(other) == wanted), None)
    if not isinstance(entry, dict):
        return None
    found = from_auth(entry)
    return None if found is None or found.empty else found


def _basic(encoded: str, where: str) -> tuple[str, str]:
    try:
        text = base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise Invalid(f"{where}: auth is not base64 of user:password") from error
    username, colon, password = text.partition(":")
    if not colon:
        raise Invalid(f"{where}: auth is not base64 of user:password")
    return username, password.rstrip("\0")


def _run_helper(name: str, verb: str, data: str) -> str:
    program = f"docker-credential-{name}"
    if "/" in name:
        raise Invalid(f"credential helper {name!r} is not a name")
    try:
        done = subprocess.run(
            [program, verb],
            input=data.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_HELPER_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise Unavailable(
            f"credential helper {program}, named in {config_path()}, is not in PATH"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{program} {verb} gave no answer within {_HELPER_TIMEOUT_S:g} s"
        ) from error
    output = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode != 0:
        if "credentials not found" in output.lower():
            return ""
        raise Unavailable(f"{program} {verb} failed: {output[:300] or done.returncode}")
    return output


def _ask_helper(name: str, key: str) -> Credentials | None:
    output = _run_helper(name, "get", key)
    if not output:
        return None
    try:
        answer = json.loads(output)
        username, secret = str(answer.get("Username", "")), str(answer["Secret"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Unavailable(f"docker-credential-{name} get gave no credentials as JSON") from error
    if username == "<token>":
        return Credentials(identity_token=secret)
    return Credentials(username, secret)


def save(domain: str, credentials: Credentials, file: str | None = None) -> str:
    """File `credentials` for `domain` as `login` does; returns where they went."""
    file = file or config_path()
    config = _read(file)
    key = server_key(domain)
    helper = _section(config, "credHelpers", file).get(key) or config.get("credsStore")
    if helper:
        username = "<token>" if credentials.identity_token else credentials.username
        secret = credentials.identity_token or credentials.password
        message = {"ServerURL": key, "Username": username, "Secret": secret}
        _run_helper(str(helper), "store", json.dumps(message))
        return f"docker-credential-{helper}"
    plain = f"{credentials.username}:{credentials.password}".encode()
    entry = {"auth": base64.b64encode(plain).decode()}
    if credentials.identity_token:
        entry["identitytoken"] = credentials.identity_token
    config.setdefault("auths", {})[key] = entry
    _write(file, config)
    return file


def erase(domain: str, file: str | None = None) -> bool:
    """Forget what is filed for `domain`, as `logout` does; whether there was something."""
    file = file or config_path()
    config = _read(file)
    key = server_key(domain)
    helper = _section(config, "credHelpers", file).get(key) or config.get("credsStore")
    had = False
    if helper:
        had = _ask_helper(str(helper), key) is not None
        _run_helper(str(helper), "erase", key)
    if _section(config, "auths", file).pop(key, None) is not None:
        had = True
        _write(file, config)
    return had


def _write(file: str, config: dict[str, Any]) -> None:
    os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
    temporary = f"{file}.{os.getpid()}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as opened:
        json.dump(config, opened, indent="\t")
        opened.flush()
        os.fsync(opened.fileno())
    os.rename(temporary, file)
