"""What each instruction says, checked: flags, forms, counts. Variables are still in the words."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bulkhead.build.parser import KEYWORDS, Flag, Heredoc, Line, closest, openings, split, words
from bulkhead.build.text import DockerfileError, Spanned

_STAGE = re.compile(r"[a-z][a-z0-9-_.]*\Z")
_VARIABLE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+\Z")
_UNITS = {"ns": 1, "us": 1000, "µs": 1000, "ms": 10**6, "s": 10**9, "m": 60 * 10**9,
          "h": 3600 * 10**9}  # fmt: skip
MOUNT_TYPES = ("bind", "cache", "secret", "tmpfs", "ssh")
_MOUNT_KEYS: dict[str, frozenset[str]] = {
    "bind": frozenset(str.split("from source src target dst destination readonly ro rw readwrite")),
    "cache": frozenset(
        str.split(
            "id from source src target dst destination readonly ro rw readwrite sharing mode uid "
            "gid"
        )
    ),
    "secret": frozenset(
        str.split("id target dst destination required mode uid gid env src source")
    ),
    "tmpfs": frozenset(str.split("target dst destination size")),
    "ssh": frozenset(str.split("id target dst destination required mode uid gid")),
}  # fmt: skip
_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly",
            "rw": "readwrite"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Instruction:
    """Base: where it stands."""

    line: Line

    @property
    def keyword(self) -> str:
        """In capitals."""
        return self.line.keyword

    def error(self, message: str) -> DockerfileError:
        """An error that points at the whole of it."""
        return self.line.whole.error(message)


@dataclass(frozen=True, slots=True)
class From(Instruction):
    """FROM [--platform=P] IMAGE [AS NAME]."""

    image: Spanned
    name: str
    platform: Spanned | None


@dataclass(frozen=True, slots=True)
class Arg(Instruction):
    """ARG NAME[=DEFAULT]…"""

    pairs: tuple[tuple[str, Spanned | None], ...]


@dataclass(frozen=True, slots=True)
class Pairs(Instruction):
    """ENV or LABEL."""

    pairs: tuple[tuple[Spanned, Spanned], ...]


@dataclass(frozen=True, slots=True)
class Mount:
    """RUN --mount=…; `values` by their long names."""

    kind: str
    values: dict[str, Spanned]
    at: Spanned

    def text(self, name: str) -> str:
        """A value as it stands, "" if it was not given."""
        found = self.values.get(name)
        return found.text if found is not None else ""

    def flag(self, name: str) -> bool:
        """A yes-or-no value."""
        found = self.values.get(name)
        return found is not None and found.text.lower() in ("", "true", "1")


@dataclass(frozen=True, slots=True)
class Run(Instruction):
    """RUN: `exec_form`, or `script` for the shell; heredocs are in `line`."""

    script: str
    exec_form: tuple[str, ...] | None
    mounts: tuple[Mount, ...]
    network: str
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Copy(Instruction):
    """COPY or ADD. `documents` are sources that stand in the file."""

    sources: tuple[Spanned, ...]
    target: Spanned
    documents: tuple[Heredoc, ...] = ()
    origin: Spanned | None = None
    chown: Spanned | None = None
    chmod: Spanned | None = None
    link: bool = False
    parents: bool = False
    exclude: tuple[Spanned, ...] = ()
    checksum: Spanned | None = None
    unpack: bool | None = None
    keep_git: bool = False


@dataclass(frozen=True, slots=True)
class Command(Instruction):
    """CMD or ENTRYPOINT: `exec_form`, or `script` for the shell."""

    script: str
    exec_form: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Words(Instruction):
    """EXPOSE, VOLUME, SHELL, USER, WORKDIR, STOPSIGNAL, MAINTAINER."""

    values: tuple[Spanned, ...]


@dataclass(frozen=True, slots=True)
class Health(Instruction):
    """HEALTHCHECK; times in nanoseconds."""

    test: tuple[str, ...]
    times: dict[str, int] = field(default_factory=dict)
    retries: int = 0


@dataclass(frozen=True, slots=True)
class OnBuild(Instruction):
    """ONBUILD: the trigger's text."""

    trigger: str


def exec_form(rest: Spanned) -> tuple[str, ...] | None:
    """The words of a JSON list of strings, None for anything else (which is the shell form)."""
    if not rest.text.startswith("["):
        return None
    try:
        found = json.loads(rest.text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        return None
    return tuple(found)


class _Flags:
    """The flags of one instruction; what is not asked for is an error."""

    def __init__(self, line: Line, known: Sequence[str]) -> None:
        self._found: dict[str, list[Flag]] = {}
        for flag in line.flags:
            if flag.name not in known:
                meant = closest(flag.name, known)
                hint = f" (did you mean --{meant}?)" if meant else ""
                raise flag.at.error(f"unknown flag: {line.keyword} --{flag.name}{hint}")
            self._found.setdefault(flag.name, []).append(flag)

    def one(self, name: str) -> Spanned | None:
        """A flag that is given at most once, with a value."""
        found = self._found.get(name, [])
        if len(found) > 1:
            raise found[1].at.error(f"flag --{name} can only be specified once")
        if not found:
            return None
        if found[0].value is None:
            raise found[0].at.error(f"missing a value on flag: --{name}")
        return found[0].value

    def many(self, name: str) -> tuple[Spanned, ...]:
        """A flag that may be repeated."""
        for flag in self._found.get(name, ()):
            if flag.value is None:
                raise flag.at.error(f"missing a value on flag: --{name}")
        return tuple(f.value for f in self._found.get(name, ()) if f.value is not None)

    def switch(self, name: str) -> bool | None:
        """A yes-or-no flag; None if it was not given."""
        found = self._found.get(name, [])
        if len(found) > 1:
            raise found[1].at.error(f"flag --{name} can only be specified once")
        if not found:
            return None
        text = found[0].text.lower() if found[0].value is not None else "true"
        if text not in ("true", "false"):
            raise found[0].at.error(f"expecting boolean value for flag --{name}, not: {text}")
        return text == "true"


def _needs(line: Line, what: str = "at least one argument") -> None:
    if not line.rest.text:
        raise line.whole.error(f"{line.keyword} requires {what}")


def _from(line: Line) -> Instruction:
    platform = _Flags(line, ("platform",)).one("platform")
    found = line.rest.split()
    if len(found) == 3 and found[1].text.lower() == "as":
        name = found[2].text.lower()
        if not _STAGE.match(name):
            raise found[2].error(
                f"invalid name for build stage: {found[2].text!r}, name can't start with a number "
                "or contain symbols"
            )
        if name in ("scratch", "context"):
            raise found[2].error(f"invalid name for build stage: {name!r} is reserved")
        return From(line, found[0], name, platform)
    if len(found) != 1:
        at = found[1] if len(found) > 1 else line.whole
        raise at.error("FROM requires either one or three arguments: IMAGE [AS NAME]")
    return From(line, found[0], "", platform)


def _arg(line: Line) -> Instruction:
    _Flags(line, ())
    _needs(line)
    pairs: list[tuple[str, Spanned | None]] = []
    for word in words(line.rest):
        name, equals, _ = word.text.partition("=")
        if not _VARIABLE.match(name):
            raise word.error(f"invalid ARG name {name!r}")
        pairs.append((name, word.cut(len(name) + 1) if equals else None))
    return Arg(line, tuple(pairs))


def _pairs(line: Line) -> Instruction:
    _Flags(line, ())
    _needs(line)
    found = words(line.rest)
    if "=" not in found[0].text:
        value = line.rest.cut(len(found[0].text)).stripped()
        if not value.text:
            raise line.whole.error(f"{line.keyword} must have two arguments")
        return Pairs(line, ((found[0], value),))
    pairs = []
    for word in found:
        key, equals, _ = word.text.partition("=")
        if not equals:
            raise word.error(
                f"Syntax error - can't find = in {word.text!r}. Must be of the form: name=value"
            )
        if not key:
            raise word.error(f"{line.keyword} names can not be blank")
        pairs.append((word.cut(0, len(key)), word.cut(len(key) + 1)))
    return Pairs(line, tuple(pairs))


def _mount(value: Spanned) -> Mount:
    try:
        fields = next(csv.reader([value.text]), [])
    except csv.Error as error:
        raise value.error(f"invalid mount: {error}") from None
    pairs: dict[str, Spanned] = {}
    kind, at = "bind", 0
    for one in fields:
        name, equals, text = one.partition("=")
        first = max(value.text.find(one, at), 0)
        at = first + len(one)
        place = value.cut(first, at)
        name = name.strip().lower()
        if name == "type":
            kind = text.lower()
            if kind not in MOUNT_TYPES:
                meant = closest(kind, MOUNT_TYPES)
                hint = f" (did you mean {meant}?)" if meant else ""
                raise place.error(f"unsupported mount type {text!r}{hint}")
            continue
        if name in pairs:
            raise place.error(f"{name} is given twice")
        spanned = place.cut(len(one) - len(text)) if equals else place.cut(0, 0)
        pairs[name] = Spanned(spanned.source, text, spanned.starts, spanned.places)
    for name, text_ in pairs.items():
        if name not in _MOUNT_KEYS[kind]:
            known = sorted(_MOUNT_KEYS[kind])
            meant = closest(name, known)
            hint = f" (did you mean {meant}?)" if meant else ""
            raise text_.error(f"unexpected key {name!r} for mount type {kind!r}{hint}")
    values = {_ALIASES.get(name, name): text_ for name, text_ in pairs.items()}
    if kind in ("bind", "cache", "tmpfs") and not values.get("target"):
        raise value.error(f"mount of type {kind!r} needs a target")
    sharing = values.get("sharing")
    if sharing is not None and sharing.text not in ("", "shared", "private", "locked"):
        raise sharing.error(f"unsupported sharing {sharing.text!r}: shared, private or locked")
    return Mount(kind, values, value)


def _run(line: Line) -> Instruction:
    flags = _Flags(line, ("mount", "network", "security"))
    mounts = tuple(_mount(value) for value in flags.many("mount"))
    network = flags.one("network")
    if network is not None and network.text not in ("default", "none", "host"):
        raise network.error(f"unsupported network mode {network.text!r}: default, none or host")
    security = flags.one("security")
    if security is not None and security.text not in ("sandbox", "insecure"):
        raise security.error(f"security {security.text!r} is not valid: sandbox or insecure")
    _needs(line)
    listed = exec_form(line.rest)
    if listed is not None and not listed:
        raise line.rest.error("RUN requires at least one argument")
    return Run(
        line,
        line.rest.text,
        listed,
        mounts,
        network=network.text if network else "",
        insecure=security is not None and security.text == "insecure",
    )


def _copy(line: Line) -> Instruction:
    adds = line.keyword == "ADD"
    known = ["chown", "chmod", "link", "exclude"]
    known += ["checksum", "keep-git-dir", "unpack"] if adds else ["from", "parents"]
    flags = _Flags(line, known)
    listed = exec_form(line.rest)
    if listed is not None:
        found = [Spanned(line.rest.source, w, line.rest.starts, line.rest.places) for w in listed]
    else:
        found = words(line.rest)
    documents: list[Heredoc] = []
    if line.heredocs:
        opened = {at for _, at in openings(line.rest)}
        documents = list(line.heredocs)
        found = [word for word in found if word.at(0) not in opened]
    if len(found) + len(documents) < 2 or not found:
        raise line.whole.error(f"{line.keyword} requires at least two arguments: sources, target")
    return Copy(
        line,
        sources=tuple(found[:-1]),
        target=found[-1],
        documents=tuple(documents),
        origin=None if adds else flags.one("from"),
        chown=flags.one("chown"),
        chmod=flags.one("chmod"),
        link=bool(flags.switch("link")),
        parents=False if adds else bool(flags.switch("parents")),
        exclude=flags.many("exclude"),
        checksum=flags.one("checksum") if adds else None,
        unpack=flags.switch("unpack") if adds else None,
        keep_git=adds and bool(flags.switch("keep-git-dir")),
    )


def _command(line: Line) -> Instruction:
    _Flags(line, ())
    return Command(line, line.rest.text, exec_form(line.rest))


def _words(line: Line) -> Instruction:
    _Flags(line, ())
    _needs(line)
    if line.keyword in ("EXPOSE",):
        return Words(line, tuple(words(line.rest)))
    if line.keyword in ("VOLUME", "SHELL"):
        listed = exec_form(line.rest)
        if listed is not None:
            if not listed or (line.keyword == "VOLUME" and not all(w.strip() for w in listed)):
                raise line.rest.error(f"{line.keyword} requires at least one argument")
            rest = line.rest
            found = (Spanned(rest.source, w, rest.starts, rest.places) for w in listed)
            return Words(line, tuple(found))
        if line.keyword == "SHELL":
            raise line.rest.error('SHELL requires the arguments to be in JSON form: ["/bin/sh"]')
        return Words(line, tuple(line.rest.split()))
    return Words(line, (line.rest,))


def nanoseconds(value: Spanned) -> int:
    """A duration in Go's words: 1m30s."""
    if not _DURATION.match(value.text):
        raise value.error(f"invalid duration {value.text!r}: write 30s or 1m30s")
    total = 0.0
    for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", value.text):
        total += float(number) * _UNITS[unit]
    return int(total)


def _health(line: Line) -> Instruction:
    names = ("interval", "timeout", "start-period", "start-interval")
    flags = _Flags(line, (*names, "retries"))
    _needs(line)
    kind = line.rest.text.split(None, 1)[0].upper()
    rest = line.rest.cut(len(kind)).stripped()
    if kind == "NONE":
        if rest.text:
            raise rest.error("HEALTHCHECK NONE takes no arguments")
        return Health(line, ("NONE",))
    if kind != "CMD":
        raise line.rest.error(
            f"Unknown type {kind!r} in HEALTHCHECK (try CMD)", 0, len(line.rest.text.split()[0])
        )
    if not rest.text:
        raise line.whole.error("Missing command after HEALTHCHECK CMD")
    listed = exec_form(rest)
    test = ("CMD", *listed) if listed is not None else ("CMD-SHELL", rest.text)
    times = {}
    for name in names:
        given = flags.one(name)
        if given is not None:
            times[name.replace("-", "_")] = nanoseconds(given)
    retries = flags.one("retries")
    if retries is not None and not (retries.text.isdecimal() and int(retries.text) < 1 << 31):
        raise retries.error(f"--retries must be a number, not {retries.text!r}")
    return Health(line, test, times, int(retries.text) if retries else 0)


def _on_build(line: Line) -> Instruction:
    _Flags(line, ())
    _needs(line)
    inner = split(line.rest, "\\")
    if inner.keyword in ("ONBUILD", "FROM", "MAINTAINER"):
        raise line.rest.error(f"{inner.keyword} isn't allowed as an ONBUILD trigger")
    parse(Line(inner.keyword, inner.flags, inner.rest, inner.whole, line.heredocs))
    text = line.rest.text
    for document in line.heredocs:
        text += f"\n{document.body}{document.name}"
    return OnBuild(line, text)


_PARSERS: dict[str, Callable[[Line], Instruction]] = {
    "ADD": _copy,
    "ARG": _arg,
    "CMD": _command,
    "COPY": _copy,
    "ENTRYPOINT": _command,
    "ENV": _pairs,
    "EXPOSE": _words,
    "FROM": _from,
    "HEALTHCHECK": _health,
    "LABEL": _pairs,
    "MAINTAINER": _words,
    "ONBUILD": _on_build,
    "RUN": _run,
    "SHELL": _words,
    "STOPSIGNAL": _words,
    "USER": _words,
    "VOLUME": _words,
    "WORKDIR": _words,
}


def parse(line: Line) -> Instruction:
    """What a line says; DockerfileError with its place."""
    parser = _PARSERS.get(line.keyword)
    if parser is None:
        meant = closest(line.keyword, sorted(KEYWORDS))
        hint = f" (did you mean {meant}?)" if meant else ""
        raise line.whole.error(
            f"unknown instruction: {line.keyword}{hint}", 0, max(1, len(line.keyword))
        )
    return parser(line)
