"""The Dockerfile language: nothing crashes, errors have places, words expand as in BuildKit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.build import expand
from bulkhead.build.instructions import Arg, Copy, Run, parse
from bulkhead.build.parser import parse as parse_text
from bulkhead.build.stages import Plan, Scope, plan, unknown
from bulkhead.build.text import DockerfileError, Position, Source, Spanned
from bulkhead.errors import BulkheadError, Invalid
from bulkhead.oci.image import Platform

HOST = Platform("amd64", "linux")


def planned(text: str, target: str = "", **arguments: str) -> Plan:
    document = parse_text("Dockerfile", text.encode())
    return plan(document, arguments=arguments, target=target, build=HOST, platform=HOST)


def spanned(text: str) -> Spanned:
    return Spanned(Source("Dockerfile", (text,)), text)


PIECES = st.sampled_from(
    ["FROM a", "from b AS c", "RUN ", "x", " ", "\n", "\\\n", "\\", "#", "# escape=`\n", "<<EOF",
     "EOF\n", "--mount=", "type=cache,target=", "$", "${", "}", ":-", "'", '"', "[", "]", '["a"]',
     "COPY ", "ADD ", "--from=c ", "--chmod=", "ENV ", "A=b", "ARG ", "LABEL ", "ONBUILD ",
     "HEALTHCHECK ", "CMD ", "VOLUME ", "EXPOSE ", "80", "\t", "\0", "é", "SHELL ", "=", ",", "--",
     "USER ", "WORKDIR ", "STOPSIGNAL ", "MAINTAINER ", "ENTRYPOINT ", "\ufeff", "\r\n"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=40).map("".join))
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        planned(text)
    except DockerfileError as error:
        line, column = error.details["line"], error.details["column"]
        assert isinstance(line, int) and isinstance(column, int)
        assert 1 <= line <= text.count("\n") + 1
        assert column >= 1
        assert "^" in error.message.splitlines()[-1]
    except BulkheadError as error:
        assert isinstance(error, Invalid)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    try:
        document = parse_text("Dockerfile", b"FROM a\n" + data)
        for line in document.lines:
            parse(line)
    except DockerfileError as error:
        assert error.details["file"] == "Dockerfile"


@given(st.text(alphabet="$${}A:-+?#%/*'\"\\ ab", max_size=30))
def test_no_word_crashes_the_expansion(text: str) -> None:
    try:
        assert isinstance(expand.word(spanned(text), {"A": "a/b.a", "b": ""}), str)
    except DockerfileError as error:
        assert error.details["line"] == 1


@given(st.text(alphabet="abc \t/.-_=", max_size=40))
def test_plain_words_stay_as_they_are(text: str) -> None:
    assert expand.word(spanned(text), {}) == text


WORDS = [
    ("$A", "a.b.c"), ("${A}x", "a.b.cx"), ("$Ax", ""), ("'$A'", "$A"), ('"$A"', "a.b.c"),
    (r"\$A", "$A"), (r'"\$A"', "$A"), ('"a\\b"', "a\\b"), ("${N:-d}", "d"), ("${E:-d}", "d"),
    ("${E-d}", ""), ("${N-d}", "d"), ("${A:+y}", "y"), ("${E:+y}", ""), ("${E+y}", "y"),
    ("${N+y}", ""), ("${N:-${A}}", "a.b.c"), ("${A#*.}", "b.c"), ("${A##*.}", "c"),
    ("${A%.*}", "a.b"), ("${A%%.*}", "a"), ("${A/./-}", "a-b.c"), ("${A//./-}", "a-b-c"),
    ("$", "$"), ("a$", "a$"), ("$ x", "$ x"), ("$1", ""), ("x'y'\"z\"", "xyz"),
    ("${N:-'a b'}", "a b"), ("${A##*.*}", ""), ("${A%?c}", "a.b"), ("${A/*./x}", "xc"),
    ("${A//?./x}", "xxc"), ("${A#*.*.}", "c"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "wanted"), WORDS, ids=[w for w, _ in WORDS])
def test_expansion(word: str, wanted: str) -> None:
    assert expand.word(spanned(word), {"A": "a.b.c", "E": ""}) == wanted


@pytest.mark.parametrize("word", ["${", "${A", "${A:", "${A:-", "${A^}", "'a", '"a', "${N:?gone}"])
def test_words_that_are_wrong(word: str) -> None:
    with pytest.raises(DockerfileError, match="Dockerfile:1:"):
        expand.word(spanned(word), {"A": "a"})


def test_hostile_substitutions_take_no_time() -> None:
    value = {"A": "a" * 4096}
    stars = "*a" * 40
    for text in (f"${{A##{stars}b}}", f"${{A%{stars}b}}", f"${{A//{stars}b/x}}"):
        assert expand.word(spanned(text), value) == value["A"]
    with pytest.raises(DockerfileError, match="4096"):
        expand.word(spanned("${A#*b}"), {"A": "a" * 5000})


@pytest.mark.parametrize("text", ["$A" * 30, '"' + "$A" * 30 + '"', "${B//x/$A}"])
def test_words_do_not_grow_without_end(text: str) -> None:
    with pytest.raises(DockerfileError, match="too long"):
        expand.word(spanned(text), {"A": "a" * 100_000, "B": "x" * 4000})


def test_continuation_comments_and_directives() -> None:
    text = "# escape=`\n\nfrom a`\n  # in between\n AS x\nRUN echo `\n\n  b\n"
    document = parse_text("Dockerfile", text.encode())
    assert document.escape == "`"
    assert [line.keyword for line in document.lines] == ["FROM", "RUN"]
    assert document.lines[0].whole.text == "from a AS x"
    assert document.lines[1].rest.text == "echo   b"
    assert document.lines[1].rest.at(7) == Position(8, 3)


def test_a_directive_after_a_comment_is_a_comment() -> None:
    assert parse_text("f", b"# x\n# escape=`\nFROM a").escape == "\\"
    with pytest.raises(DockerfileError, match="only one escape"):
        parse_text("f", b"# escape=`\n# escape=`\nFROM a")


def test_heredocs() -> None:
    text = b"FROM a\nRUN <<A && cat <<-'B'\none\nA\n\ttwo\n\tB\nCOPY <<X /x\n$V\nX\n"
    run, copy = (parse(line) for line in parse_text("f", text).lines[1:])
    assert isinstance(run, Run) and isinstance(copy, Copy)
    assert [(d.name, d.body, d.expand) for d in run.line.heredocs] == [
        ("A", "one\n", True), ("B", "two\n", False),
    ]  # fmt: skip
    assert copy.documents[0].body == "$V\n" and copy.target.text == "/x"
    with pytest.raises(DockerfileError, match="f:2:5: unterminated heredoc"):
        parse_text("f", b"FROM a\nRUN <<A\nb\n")


WRONG = [
    ("RUN x", "1:1", "first FROM"),
    ("FROM a\nRNU x", "2:1", "did you mean RUN?"),
    ("FROM a\nCOPY --form=b x y", "2:6", "did you mean --from?"),
    ("FROM a\nCOPY x", "2:1", "two arguments"),
    ("FROM a\nRUN --mount=type=cahce,target=/x y", "2:13", "did you mean cache?"),
    ("FROM a\nRUN --mount=type=cache y", "2:13", "needs a target"),
    ("FROM a\nRUN --security=secure x", "2:16", "not valid"),
    ("FROM a\nRUN --network=lan x", "2:15", "default, none or host"),
    ("FROM a\nENV a", "2:1", "two arguments"),
    ("FROM a\nENV a=b c", "2:9", "can't find ="),
    ("FROM a b", "1:8", "one or three"),
    ("FROM a AS 1x", "1:11", "invalid name"),
    ("FROM a AS b\nFROM c AS b", "2:1", "duplicate name"),
    ("FROM $X", "1:6", "should not be blank"),
    ("FROM a\nONBUILD FROM b", "2:9", "isn't allowed"),
    ("FROM a\nHEALTHCHECK --interval=x CMD y", "2:24", "invalid duration"),
    ("FROM a\nHEALTHCHECK FOO", "2:13", "Unknown type"),
    ("FROM a\nSHELL x", "2:7", "JSON form"),
    ("FROM a\nCOPY --from=b x y\nFROM c AS b", "2:13", "not available"),
    ("FROM a\nARG 1=2", "2:5", "invalid ARG name"),
    ("FROM a\nFOO\\\n  bar", "2:1", "unknown instruction"),
]


@pytest.mark.parametrize(("text", "place", "words"), WRONG, ids=[w[0][-25:] for w in WRONG])
def test_errors_have_their_place(text: str, place: str, words: str) -> None:
    with pytest.raises(DockerfileError) as caught:
        planned(text)
    assert caught.value.message.startswith(f"Dockerfile:{place}: ")
    assert words in caught.value.message
    shown, caret = caught.value.message.splitlines()[-2:]
    assert shown.split(" | ", 1)[1] == text.splitlines()[int(place[0]) - 1]
    assert caret.index("^") - caret.index("|") - 1 == int(place.split(":")[1])


def test_stages_that_nobody_needs_are_left_out() -> None:
    text = (
        "FROM a AS one\nFROM b AS two\nFROM c AS three\nCOPY --from=one /x /\n"
        "FROM two AS four\nFROM three\nRUN --mount=type=bind,from=0,target=/m x\n"
    )
    assert [stage.index for stage in planned(text).needed()] == [0, 2, 4]
    assert [stage.label for stage in planned(text, "four").needed()] == ["two", "four"]
    assert [stage.index for stage in planned(text, "1").needed()] == [1]
    with pytest.raises(Invalid, match="could not be found"):
        planned(text, "five")


def test_arguments() -> None:
    text = "ARG V=1\nARG W=$V.0\nFROM --platform=$BUILDPLATFORM a:$W\nARG V\nARG X=x$V\nRUN y\n"
    made = planned(text)
    assert made.stages[0].base == "a:1.0"
    assert made.stages[0].platform == "linux/amd64"
    given = planned(text, V="2")
    assert given.stages[0].base == "a:2.0"
    scope = Scope(given.globals_, {"V": "2", "http_proxy": "p"}, ["V=env"])
    for instruction in given.stages[0].instructions[:2]:
        assert isinstance(instruction, Arg)
        scope.declare(instruction, "\\")
    assert scope.names["V"] == "env"  # ENV wins
    assert scope.run_arguments() == {"X": "xenv"}
    assert scope.proxies() == {"http_proxy": "p"}
    assert unknown(given, {"V": "2", "Z": "", "HTTP_PROXY": "p"}) == ["Z"]


def test_predefined_arguments_must_be_declared() -> None:
    made = planned("FROM a\nARG TARGETARCH\nARG NOTHING\n")
    scope = Scope(made.globals_, {}, [])
    assert "TARGETARCH" not in scope.names
    for instruction in made.stages[0].instructions:
        assert isinstance(instruction, Arg)
        scope.declare(instruction, "\\")
    assert scope.names == {"TARGETARCH": "amd64"}
