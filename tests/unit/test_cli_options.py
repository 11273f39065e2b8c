"""The parser: pflag's rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.cli.options import (
    HelpWanted,
    Option,
    Table,
    UsageError,
    parse_bytes,
    parse_duration,
)

TABLE = Table(
    (
        Option("-i, --interactive", "bool", ""),
        Option("-t, --tty", "bool", ""),
        Option("-e, --env", "list", ""),
        Option("-m, --memory", "bytes", ""),
        Option("--name", "string", ""),
        Option("--sysctl", "map", ""),
        Option("--dns", "strings", ""),
        Option("--proxy", "bool", "", default=True),
        Option("--pull", "string", "", default="missing", choices=("always", "missing")),
    )
)


def parse(*argv: str, interspersed: bool = False) -> tuple[dict[str, object], list[str]]:
    parsed = TABLE.parse(argv, interspersed=interspersed)
    return parsed.values, parsed.args


def test_bundles_and_values() -> None:
    values, args = parse("-ite", "A=b", "-eC=d", "-e=E=f", "--name=x", "--name", "y", "img", "-i")
    assert values == {"interactive": True, "tty": True, "env": ["A=b", "C=d", "E=f"], "name": "y"}
    assert args == ["img", "-i"]


def test_interspersed() -> None:
    values, args = parse("a", "-i", "b", "--", "-t", interspersed=True)
    assert values == {"interactive": True}
    assert args == ["a", "b", "-t"]


def test_single_dash_is_an_argument() -> None:
    assert parse("-", "-i") == ({}, ["-", "-i"])


def test_bool_takes_values_only_by_equals() -> None:
    values, args = parse("--tty=false", "-i=0", "--proxy", "false")
    assert values == {"tty": False, "interactive": False, "proxy": True}
    assert args == ["false"]


def test_collected_kinds() -> None:
    values, _ = parse("--sysctl", "a=1", "--sysctl", "b=2=3", "--dns", "1.1.1.1,8.8.8.8")
    assert values == {"sysctl": {"a": "1", "b": "2=3"}, "dns": ["1.1.1.1", "8.8.8.8"]}


def test_defaults() -> None:
    parsed = TABLE.parse([], interspersed=False)
    assert parsed["proxy"] is True
    assert parsed["pull"] == "missing"
    assert parsed["env"] == ()
    assert parsed["memory"] == 0
    assert "pull" not in parsed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nope"], "unknown flag: --nope"),
        (["-x"], "unknown shorthand flag: 'x' in -x"),
        (["-itx"], "unknown shorthand flag: 'x' in -itx"),
        (["--name"], "flag needs an argument: --name"),
        (["-ie"], "flag needs an argument: 'e' in -ie"),
        (["--tty=maybe"], 'invalid argument "maybe" for "-t, --tty" flag'),
        (["-m", "1x"], 'invalid argument "1x" for "-m, --memory" flag: invalid size: \'1x\''),
        (["--pull", "often"], 'invalid argument "often" for "--pull" flag'),
        (["--sysctl", "a"], "must be formatted as key=value"),
    ],
)
def test_errors(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TABLE.parse(argv, interspersed=False)
    assert message in caught.value.message


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["-i", "--help", "x"]])
def test_help(argv: list[str]) -> None:
    with pytest.raises(HelpWanted):
        TABLE.parse(argv, interspersed=False)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=8))
def test_never_anything_but_usage_errors(argv: list[str]) -> None:
    try:
        TABLE.parse(argv, interspersed=True)
    except (UsageError, HelpWanted):
        return


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64m", 64 << 20), ("1g", 1 << 30), ("1.5g", 3 << 29), ("512KiB", 512 << 10), ("0", 0),
        ("100", 100), ("10kb", 10240), ("-1", -1), ("2T", 2 << 40), ("1 m", 1 << 20), ("5b", 5),
    ],
)  # fmt: skip
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "m", "1x", "1mm", "one", "1..5m", "0x10"])
def test_not_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="invalid size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [("1s", 10**9), ("1h30m", 5400 * 10**9), ("1.5s", 15 * 10**8), ("300ms", 3 * 10**8), ("0", 0),
     ("-2m", -120 * 10**9), ("10us", 10**4), ("7ns", 7)],
)  # fmt: skip
def test_duration(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize("text", ["", "1", "s", "1x", "1h30", "--1s"])
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="invalid duration"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "nano"), [("0.5", 500_000_000), ("2", 2 * 10**9)])
def test_cpus(text: str, nano: int) -> None:
    table = Table((Option("--cpus", "decimal", ""),))
    assert table.parse(["--cpus", text], interspersed=False)["cpus"] == nano
