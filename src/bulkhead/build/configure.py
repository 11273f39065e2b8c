"""Instructions that only change the image's configuration. Pure."""

import posixpath
import re
import signal
from collections.abc import Iterable, Mapping

import msgspec

from bulkhead.build.instructions import Command, Health
from bulkhead.build.text import Spanned
from bulkhead.oci.image import ContainerConfig, Healthcheck

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_SHELL = ("/bin/sh", "-c")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?\Z", re.IGNORECASE)


def copied(config: ContainerConfig) -> ContainerConfig:
    """An independent copy."""
    return msgspec.convert(msgspec.to_builtins(config), ContainerConfig)


def with_path(config: ContainerConfig) -> None:
    """Every image has a PATH."""
    if not any(entry.startswith("PATH=") for entry in config.env or ()):
        config.env = [*(config.env or ()), f"PATH={DEFAULT_PATH}"]


def set_env(config: ContainerConfig, pairs: Iterable[tuple[str, str]]) -> None:
    """ENV: in place, or at the end."""
    environment = list(config.env or ())
    for name, value in pairs:
        entry = f"{name}={value}"
        for place, known in enumerate(environment):
            if known.partition("=")[0] == name:
                environment[place] = entry
                break
        else:
            environment.append(entry)
    config.env = environment


def set_labels(config: ContainerConfig, pairs: Mapping[str, str]) -> None:
    """LABEL."""
    if pairs:
        config.labels = {**(config.labels or {}), **pairs}


def shell(config: ContainerConfig) -> list[str]:
    """What the shell form is run by."""
    return list(config.shell or DEFAULT_SHELL)


def command(config: ContainerConfig, given: Command) -> list[str]:
    """The words of CMD or ENTRYPOINT."""
    if given.exec_form is not None:
        return list(given.exec_form)
    return [*shell(config), given.script] if given.script else []


def expose(config: ContainerConfig, word: str, at: Spanned) -> None:
    """EXPOSE of one word, which may be a range."""
    match = _PORT.match(word)
    if match is None:
        raise at.error(f"invalid containerPort: {word}")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 0 < first <= last < 65536:
        raise at.error(f"invalid containerPort: {word}")
    ports = dict(config.exposed_ports or {})
    for port in range(first, last + 1):
        ports[f"{port}/{(match[3] or 'tcp').lower()}"] = {}
    config.exposed_ports = ports


def workdir(config: ContainerConfig, path: str) -> str:
    """The directory that WORKDIR names; set."""
    joined = posixpath.normpath(posixpath.join("/", config.working_dir or "/", path))
    config.working_dir = "/" + joined.lstrip("/")
    return config.working_dir


def stop_signal(text: str, at: Spanned) -> str:
    """STOPSIGNAL's name or number, checked."""
    name = text.upper().removeprefix("SIG")
    known = (text.isdecimal() and 0 < int(text) < 65) or (
        f"SIG{name}" in signal.Signals.__members__ or name.startswith(("RTMIN", "RTMAX"))
    )
    if not known:
        raise at.error(f"Invalid signal: {text}")
    return text


def healthcheck(given: Health) -> Healthcheck:
    """HEALTHCHECK."""
    return Healthcheck(test=list(given.test), retries=given.retries, **given.times)
