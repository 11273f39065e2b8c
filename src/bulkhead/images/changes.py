"""Instructions in Dockerfile words that change an image's configuration (`commit --change`).

CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR, as
Docker's commit and import accept.
"""

import posixpath
import re
import shlex
import signal
from collections.abc import Callable, Sequence

import msgspec

from bulkhead.errors import Invalid
from bulkhead.oci.image import ContainerConfig, Healthcheck

_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?\Z")
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?\Z")
_NANOSECONDS = (3600 * 10**9, 60 * 10**9, 10**9, 10**6)


def apply(config: ContainerConfig, instructions: Sequence[str]) -> ContainerConfig:
    """A copy of `config` changed by `instructions`; Invalid names the one that is wrong."""
    changed = msgspec.convert(msgspec.to_builtins(config), ContainerConfig)
    for text in instructions:
        for line in _lines(text):
            word, _, rest = line.partition(" ")
            handler = _HANDLERS.get(word.upper())
            if handler is None:
                raise Invalid(f"{word} is not a valid change command")
            try:
                handler(changed, rest.strip())
            except ValueError as error:
                raise Invalid(f"change {line!r}: {error}") from error
    return changed


def _lines(text: str) -> list[str]:
    joined = re.sub(r"\\\r?\n", " ", text)
    stripped = (line.strip() for line in joined.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def _json_list(text: str) -> list[str] | None:
    if not text.startswith("["):
        return None
    try:
        return msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError:
        return None


def _command(config: ContainerConfig, text: str) -> list[str]:
    """The exec form as it is, the shell form by the image's shell."""
    listed = _json_list(text)
    return listed if listed is not None else [*(config.shell or ["/bin/sh", "-c"]), text]


def _pairs(text: str) -> list[tuple[str, str]]:
    """KEY=VALUE words, or the old form "KEY rest of the line"."""
    if not text:
        raise ValueError("a name is needed")
    words = shlex.split(text)
    if "=" not in words[0]:
        key, _, value = text.partition(" ")
        if not value:
            raise ValueError("must have two arguments, a name and a value")
        return [(key, value.strip())]
    pairs = [word.partition("=") for word in words]
    for key, equals, _ in pairs:
        if not equals or not key:
            raise ValueError(f"{key!r} is not of the form KEY=VALUE")
    return [(key, value) for key, _, value in pairs]


def _cmd(config: ContainerConfig, text: str) -> None:
    config.cmd = _command(config, text) if text else []


def _entrypoint(config: ContainerConfig, text: str) -> None:
    config.entrypoint = _command(config, text) if text else []


def _env(config: ContainerConfig, text: str) -> None:
    environment = list(config.env or ())
    for key, value in _pairs(text):
        kept = [entry for entry in environment if entry.partition("=")[0] != key]
        place = next(
            (n for n, entry in enumerate(environment) if entry.partition("=")[0] == key),
            len(kept),
        )
        kept.insert(place, f"{key}={value}")
        environment = kept
    config.env = environment


def _label(config: ContainerConfig, text: str) -> None:
    config.labels = {**(config.labels or {}), **dict(_pairs(text))}


def _expose(config: ContainerConfig, text: str) -> None:
    ports = dict(config.exposed_ports or {})
    if not text:
        raise ValueError("a port is needed")
    for word in text.split():
        match = _PORT.match(word)
        if match is None:
            raise ValueError(f"{word!r} is not a port")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 < first <= last < 65536:
            raise ValueError(f"{word!r} is not a port")
        for port in range(first, last + 1):
            ports[f"{port}/{match[3] or 'tcp'}"] = {}
    config.exposed_ports = ports


def _volume(config: ContainerConfig, text: str) -> None:
    listed = _json_list(text)
    places = listed if listed is not None else text.split()
    if not places or not all(places):
        raise ValueError("a path is needed")
    config.volumes = {**(config.volumes or {}), **{place: {} for place in places}}


def _workdir(config: ContainerConfig, text: str) -> None:
    if not text:
        raise ValueError("a path is needed")
    config.working_dir = posixpath.normpath(posixpath.join(config.working_dir or "/", text))


def _user(config: ContainerConfig, text: str) -> None:
    if not text or " " in text:
        raise ValueError("one user is needed")
    config.user = text


def _stop_signal(config: ContainerConfig, text: str) -> None:
    name = text.upper().removeprefix("SIG")
    known = (text.isdigit() and 0 < int(text) < 65) or (
        f"SIG{name}" in signal.Signals.__members__ or name.startswith(("RTMIN", "RTMAX"))
    )
    if not known:
        raise ValueError(f"invalid signal: {text}")
    config.stop_signal = text


def _on_build(config: ContainerConfig, text: str) -> None:
    word = text.partition(" ")[0].upper()
    if word in ("ONBUILD", "FROM", "MAINTAINER", ""):
        raise ValueError(f"{word or 'nothing'} is not allowed as an ONBUILD trigger")
    config.on_build = [*(config.on_build or ()), text]


def _nanoseconds(text: str) -> int:
    match = _DURATION.match(text)
    if not text or match is None:
        raise ValueError(f"{text!r} is not a duration")
    parts = zip(match.groups(), _NANOSECONDS, strict=True)
    return sum(int(float(number) * unit) for number, unit in parts if number)


def _healthcheck(config: ContainerConfig, text: str) -> None:
    check = Healthcheck()
    while text.startswith("--"):
        option, _, text = text.partition(" ")
        name, _, value = option[2:].partition("=")
        text = text.strip()
        if name == "retries":
            check.retries = int(value)
        elif name in ("interval", "timeout", "start-period", "start-interval"):
            setattr(check, name.replace("-", "_"), _nanoseconds(value))
        else:
            raise ValueError(f"unknown option --{name}")
    kind, _, rest = text.partition(" ")
    if kind.upper() == "NONE" and not rest:
        check.test = ["NONE"]
    elif kind.upper() == "CMD" and rest.strip():
        listed = _json_list(rest.strip())
        check.test = ["CMD", *listed] if listed is not None else ["CMD-SHELL", rest.strip()]
    else:
        raise ValueError("NONE, or CMD and a command, is needed")
    config.healthcheck = check


_HANDLERS: dict[str, Callable[[ContainerConfig, str], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _on_build,
    "STOPSIGNAL": _stop_signal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
