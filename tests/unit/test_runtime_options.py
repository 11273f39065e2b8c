"""The command line of bulkhead-runtime, and what it says of itself."""

import io
import json
import re
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from bulkhead.errors import Invalid
from bulkhead.oci import runtime
from bulkhead.runtime import examples
from bulkhead.runtime.main import main
from bulkhead.runtime.options import COMMANDS, GLOBALS, parse
from bulkhead.runtime.records import Records

SCHEMAS = Path(__file__).resolve().parents[3] / "shared/spec/oci-runtime"
RUN = next(command for command in COMMANDS if command.name == "run").options
EXEC = next(command for command in COMMANDS if command.name == "exec").options


def test_options_come_in_each_of_gos_forms() -> None:
    for words in (["--bundle", "x"], ["--bundle=x"], ["-b", "x"], ["-b=x"], ["-bundle", "x"]):
        values, rest = parse(RUN, [*words, "--keep", "-detach=false", "one"])
        assert (values["bundle"], values["keep"], values["detach"]) == ("x", True, False)
        assert rest == ["one"]


def test_what_follows_an_argument_is_not_ours() -> None:
    values, rest = parse(EXEC, ["-t", "-e", "A=1", "--env=B=2", "one", "ls", "-t"])
    assert (values["tty"], values["env"], rest) == (True, ["A=1", "B=2"], ["one", "ls", "-t"])
    assert parse(EXEC, ["--", "-t"])[1] == ["-t"]


@pytest.mark.parametrize(
    "words", [["--nothing"], ["--bundle"], ["--preserve-fds", "x"], ["--keep=maybe"]]
)
def test_bad_options_are_refused(words: list[str]) -> None:
    with pytest.raises(Invalid):
        parse(RUN, words)


def test_errors_are_one_line() -> None:
    for words in (["nonsense"], ["--log-format", "xml", "list"], ["start"], ["--what"]):
        said, out = io.StringIO(), io.StringIO()
        with redirect_stderr(said), redirect_stdout(out):
            assert main(words) == 1
        assert re.fullmatch(r"bulkhead-runtime: [^\n]+\n", said.getvalue())
        assert out.getvalue() == ""


def test_every_option_is_in_the_help() -> None:
    for command in COMMANDS:
        out = io.StringIO()
        with redirect_stdout(out):
            assert main([command.name, "--help"]) == 0
        assert all(f"--{option.names[0]}" in out.getvalue() for option in command.options)
    assert len({option.names[0] for option in GLOBALS}) == len(GLOBALS)


def test_ids_stay_below_the_root() -> None:
    records = Records("/nowhere")
    assert records.path("a.b-c_d+1") == "/nowhere/a.b-c_d+1"
    for name in ("", ".", "..", "a/b", "a\0b", "é", "x" * 1025):
        with pytest.raises(Invalid):
            records.path(name)


def test_the_example_is_valid() -> None:
    runtime.decode(json.dumps(examples.example()))


def test_features_are_valid_by_the_schema() -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("the specification's schemas are not beside this checkout")
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["features"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jsonschema import Draft4Validator, RefResolver

        schema = json.loads((SCHEMAS / "features-schema.json").read_text())
        resolver = RefResolver(f"file://{SCHEMAS}/features-schema.json", schema)
        Draft4Validator(schema, resolver=resolver).validate(json.loads(out.getvalue()))
