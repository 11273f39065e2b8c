"""Options as data, and the parser that reads them: the flags of Go's pflag, which docker uses.

A command's OPTIONS table feeds the parser, `--help`, the shell completion and docs. The rules:
`--flag value`, `--flag=value`, `-f value`, `-fvalue`, `-f=value`; bundles (`-itd`, `-ite A=b`); a
bool takes a value only by `=`; `--` ends options; a command that is not *interspersed* also ends
them at its first positional argument.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bulkhead.errors import BulkheadError


class UsageError(BulkheadError):
    """The command line itself is wrong; shown with "See 'bulkhead … --help'."

    Its exit code is 125, or the detail `code`.
    """

    category = "invalid"


class Option:
    """One flag: its spelling, kind, and how it is explained and completed.

    `kind` is a key of KINDS: bool, string, list (repeats), strings (repeats and splits at commas),
    int, uint, decimal, percent, bytes, duration, map (repeats, KEY=VALUE → dict).
    """

    __slots__ = (
        "choices",
        "complete",
        "default",
        "help",
        "hidden",
        "kind",
        "long",
        "name",
        "short",
    )

    def __init__(
        self,
        spelling: str,
        kind: str,
        text: str,
        *,
        default: Any = None,
        complete: str = "",
        choices: Sequence[str] = (),
        hidden: bool = False,
    ) -> None:
        short, _, long = spelling.rpartition(", ")
        self.short = short.removeprefix("-")
        self.name = long.removeprefix("--")
        self.long = long
        self.kind = kind
        self.help = text
        self.default = default
        self.complete = complete
        self.choices = tuple(choices)
        self.hidden = hidden

    @property
    def label(self) -> str:
        """How error messages name it: `-m, --memory`."""
        return f"-{self.short}, {self.long}" if self.short else self.long


class Parsed:
    """What a command line said: `values` holds given options only, by long name without dashes."""

    __slots__ = ("_options", "args", "values", "words")

    def __init__(self, options: dict[str, Option]) -> None:
        self._options = options
        self.values: dict[str, Any] = {}
        self.args: list[str] = []
        self.words: Sequence[str] = ()
        """The command line as it was given."""

    def __getitem__(self, name: str) -> Any:
        """The given value, else the option's default, else the kind's empty value."""
        try:
            return self.values[name]
        except KeyError:
            option = self._options[name]
            if option.default is not None:
                return option.default
            return EMPTY[option.kind]

    def __contains__(self, name: str) -> bool:
        return name in self.values


class Table:
    """An indexed OPTIONS table."""

    __slots__ = ("longs", "options", "shorts")

    def __init__(self, options: Iterable[Option]) -> None:
        self.options = tuple(options)
        self.longs = {option.name: option for option in self.options}
        self.shorts = {option.short: option for option in self.options if option.short}

    def parse(self, argv: Sequence[str], *, interspersed: bool) -> Parsed:
        """Read `argv`; UsageError in pflag's words."""
        parsed = Parsed(self.longs)
        parsed.words = argv
        args = parsed.args
        at, end = 0, len(argv)
        while at < end:
            word = argv[at]
            at += 1
            if len(word) < 2 or word[0] != "-":
                args.append(word)
                if not interspersed:
                    args.extend(argv[at:])
                    break
            elif word == "--":
                args.extend(argv[at:])
                break
            elif word[1] == "-":
                at = self._long(parsed, word, argv, at)
            else:
                at = self._shorts(parsed, word, argv, at)
        return parsed

    def _long(self, parsed: Parsed, word: str, argv: Sequence[str], at: int) -> int:
        name, equals, text = word[2:].partition("=")
        option = self.longs.get(name)
        if option is None:
            if name in ("help", ""):
                raise HelpWanted if name else UsageError(f"bad flag syntax: {word}")
            raise UsageError(f"unknown flag: --{name}")
        if not equals:
            if option.kind == "bool":
                parsed.values[option.name] = True
                return at
            if at >= len(argv):
                raise UsageError(f"flag needs an argument: --{name}")
            text = argv[at]
            at += 1
        _store(parsed, option, text)
        return at

    def _shorts(self, parsed: Parsed, word: str, argv: Sequence[str], at: int) -> int:
        rest = word[1:]
        while rest:
            letter, rest = rest[0], rest[1:]
            option = self.shorts.get(letter)
            if option is None:
                if letter == "h":
                    raise HelpWanted
                raise UsageError(f"unknown shorthand flag: '{letter}' in {word}")
            if rest.startswith("="):
                _store(parsed, option, rest[1:])
                return at
            if option.kind == "bool":
                parsed.values[option.name] = True
                continue
            if not rest:
                if at >= len(argv):
                    raise UsageError(f"flag needs an argument: '{letter}' in {word}")
                rest = argv[at]
                at += 1
            _store(parsed, option, rest)
            return at
        return at


class HelpWanted(Exception):
    """`--help` was given."""


def _store(parsed: Parsed, option: Option, text: str) -> None:
    try:
        value = KINDS[option.kind](text)
        if option.choices and value not in option.choices:
            raise ValueError(f"must be one of {', '.join(option.choices)}")
    except ValueError as error:
        raise UsageError(f'invalid argument "{text}" for "{option.label}" flag: {error}') from None
    values = parsed.values
    if option.kind == "list":
        values.setdefault(option.name, []).append(value)
    elif option.kind == "strings":
        values.setdefault(option.name, []).extend(value)
    elif option.kind == "map":
        values.setdefault(option.name, {}).update(value)
    else:
        values[option.name] = value


_TRUE = frozenset(("1", "t", "T", "true", "TRUE", "True"))
_FALSE = frozenset(("0", "f", "F", "false", "FALSE", "False"))


def _bool(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f'strconv.ParseBool: parsing "{text}": invalid syntax')


def _int(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise ValueError(f'strconv.ParseInt: parsing "{text}": invalid syntax') from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f'strconv.ParseInt: parsing "{text}": value out of range')
    return value


def _uint(text: str) -> int:
    value = _int(text)
    if value < 0:
        raise ValueError(f'strconv.ParseUint: parsing "{text}": invalid syntax')
    return value


def _decimal(text: str) -> int:
    """A number of CPUs, in billionths."""
    from fractions import Fraction

    try:
        nano = Fraction(text) * 1_000_000_000
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"failed to parse {text} as a rational number") from None
    if nano.denominator != 1:
        raise ValueError("value is too precise")
    return int(nano)


_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


def parse_bytes(text: str) -> int:
    """Bytes from docker's spelling: `64m`, `1.5g`, `512KiB`, `-1`; ValueError otherwise."""
    word = text.strip().lower()
    number = word.rstrip("bikmgtp ")
    unit = word[len(number) :].strip()
    if len(unit) > 1:
        unit = unit.removesuffix("b").removesuffix("i")
    try:
        if unit not in _UNITS:
            raise ValueError
        return int(float(number) * _UNITS[unit]) if "." in number else int(number) * _UNITS[unit]
    except ValueError:
        raise ValueError(f"invalid size: '{text}'") from None


_DURATION_UNITS = {
    "ns": 1, "us": 1000, "µs": 1000, "μs": 1000, "ms": 10**6,
    "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9,
}  # fmt: skip


def parse_duration(text: str) -> int:
    """Nanoseconds from Go's spelling: `1h30m`, `1.5s`, `300ms`, `0`; ValueError otherwise."""
    if text in ("0", "+0", "-0"):
        return 0
    rest = text[1:] if text.startswith(("+", "-")) else text
    total, sign = 0.0, -1 if text.startswith("-") else 1
    if not rest:
        raise ValueError(f'time: invalid duration "{text}"')
    while rest:
        digits = len(rest) - len(rest.lstrip("0123456789."))
        letters = rest[digits:]
        width = len(letters) - len(letters.lstrip("nuµμmsh"))
        unit = _DURATION_UNITS.get(letters[:width])
        try:
            if unit is None:
                raise ValueError
            total += float(rest[:digits]) * unit
        except ValueError:
            raise ValueError(f'time: invalid duration "{text}"') from None
        rest = letters[width:]
    return sign * round(total)


def _percent(text: str) -> int:
    return _uint(text.removesuffix("%"))


def _map(text: str) -> dict[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text} must be formatted as key=value")
    return {key: value}


KINDS: dict[str, Callable[[str], Any]] = {
    "bool": _bool,
    "string": str,
    "list": str,
    "strings": lambda text: text.split(","),
    "int": _int,
    "uint": _uint,
    "decimal": _decimal,
    "percent": _percent,
    "bytes": parse_bytes,
    "duration": parse_duration,
    "map": _map,
}

EMPTY: dict[str, Any] = {
    "bool": False,
    "string": "",
    "list": (),
    "strings": (),
    "int": 0,
    "uint": 0,
    "decimal": 0,
    "percent": 0,
    "bytes": 0,
    "duration": 0,
    "map": {},
}

FORMAT = Option("-f, --format", "string", 'Output by a Go template, or "json", or "table TEMPLATE"')
FORMAT_LONG = Option(
    "--format", "string", 'Output by a Go template, or "json", or "table TEMPLATE"'
)
JSON = Option("--json", "bool", "Same as --format json")
FILTER = Option("-f, --filter", "list", "Show only what matches (KEY=VALUE)")
QUIET_IDS = Option("-q, --quiet", "bool", "Only show ids")
NO_TRUNC = Option("--no-trunc", "bool", "Don't truncate output")
FORCE_PRUNE = Option("-f, --force", "bool", "Do not prompt for confirmation")
DETACH_KEYS = Option(
    "--detach-keys", "string", "Override the key sequence for detaching (default ctrl-p,ctrl-q)"
)
SIG_PROXY = Option("--sig-proxy", "bool", "Proxy received signals to the process", default=True)
