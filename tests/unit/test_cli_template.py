"""The Go template subset behind --format."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.cli.template import Template
from bulkhead.errors import Invalid

DATA: dict[str, Any] = {
    "Name": "/web",
    "Names": ["a", "b"],
    "Count": 3,
    "Ratio": 1.5,
    "Whole": 2.0,
    "Up": True,
    "Nothing": None,
    "State": {"Running": True, "Pid": 42, "Health": {"Status": "healthy"}},
    "Labels": {"b": "2", "a": "1", "with.dot": "3"},
    "Mounts": [{"Source": "/x", "Dest": "/y"}, {"Source": "/p", "Dest": "/q"}],
    "Empty": [],
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("{{.Name}}", "/web"),
        ("{{ .State.Pid }}", "42"),
        ("{{.State.Health.Status}}", "healthy"),
        ("{{json .Labels}}", '{"b":"2","a":"1","with.dot":"3"}'),
        ("{{.Labels}}", "map[a:1 b:2 with.dot:3]"),
        ("{{.Names}}", "[a b]"),
        ("{{.Nothing}}", "<no value>"),
        ("{{.Ratio}} {{.Whole}} {{.Up}}", "1.5 2 true"),
        ('{{index .Labels "with.dot"}}', "3"),
        ('{{index .Labels "missing"}}', ""),
        ("{{index .Names 1}}", "b"),
        ("{{(index .Mounts 0).Source}}", "/x"),
        ("{{range .Mounts}}{{.Source}}:{{.Dest}} {{end}}", "/x:/y /p:/q "),
        ("{{range $i, $m := .Mounts}}{{$i}}={{$m.Dest}};{{end}}", "0=/y;1=/q;"),
        ("{{range $k, $v := .Labels}}{{$k}}{{$v}} {{end}}", "a1 b2 with.dot3 "),
        ("{{range .Empty}}x{{else}}none{{end}}", "none"),
        ("{{if .Up}}yes{{else}}no{{end}}", "yes"),
        ("{{if .Nothing}}1{{else if .Up}}2{{else}}3{{end}}", "2"),
        ("{{with .State}}{{.Pid}}{{end}}", "42"),
        ("{{with .Nothing}}x{{else}}{{.Name}}{{end}}", "/web"),
        ("{{with $x := .State.Pid}}{{$x}}{{end}}", "42"),
        ("{{$n := .Name}}{{$n}}{{$n}}", "/web/web"),
        ('{{$n := "a"}}{{if .Up}}{{$n = "b"}}{{end}}{{$n}}', "b"),
        ("{{.Name | upper}}", "/WEB"),
        ('{{join .Names ", "}}', "a, b"),
        ('{{split "a:b" ":" | len}}', "2"),
        ('{{printf "%-6s|%5d|%q|%.1f%%" .Name .Count .Name .Ratio}}', '/web  |    3|"/web"|1.5%'),
        ('{{.Count | printf "%03d"}}', "003"),
        ("{{println .Count}}", "3\n"),
        ("{{len .Names}} {{len .Labels}}", "2 3"),
        ('{{eq .Count 3}} {{ne .Name "x"}} {{lt 1 2}} {{ge 1 2}}', "true true true false"),
        ("{{and .Up .Count}} {{or .Nothing .Name}} {{not .Up}}", "3 /web false"),
        ("{{truncate .Name 2}}", "/w"),
        ("{{slice .Name 1}} {{slice .Name 0 2}}", "web /w"),
        ('{{title "abc"}} {{lower "ABC"}} {{trim "  x "}} {{pad "x" 1 2}}|', "Abc abc x  x  |"),
        ("a {{- .Count -}} b", "a3b"),
        ("{{/* nothing */}}x", "x"),
        ('{{"{{"}}', "{{"),
        ("{{`raw\\n`}}", "raw\\n"),
        ('{{"tab\\tnl\\n"}}', "tab\tnl\n"),
        ("{{$.Name}}{{range .Names}}{{$.Count}}{{end}}", "/web33"),
        ("{{.}}", None),
        ("{{true}} {{nil | not}}", "true true"),
        ('{{if and (eq .Count 3) (not (eq .Name "x"))}}ok{{end}}', "ok"),
        ("{{range 3}}{{.}}{{end}}", "012"),
    ],
)
def test_renders(text: str, shown: str | None) -> None:
    got = Template(text).render(DATA)
    if shown is not None:
        assert got == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{.Missing}}", 'map has no entry for key "Missing"'),
        ("{{.Name.Deep}}", "can't evaluate field Deep in type string"),
        ("{{nope .Name}}", 'function "nope" not defined'),
        ("{{.Name", "unclosed action"),
        ("{{if .Up}}x", "unexpected EOF"),
        ("{{end}}", "unexpected {{end}}"),
        ("{{}}", "missing value for command"),
        ("{{index .Names 9}}", "index out of range"),
        ("{{.Name .Count}}", "can't give argument to non-function"),
        ("{{$x}}", "undefined variable"),
        ("{{lt .Name 3}}", "incompatible types"),
        ("{{len}}", "error calling len"),
        ("{{range .Name}}{{end}}", "range can't iterate"),
        ("{{(.Name}}", "unclosed left paren"),
        ("{{|}}", "unexpected"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        Template(text).render(DATA)
    assert message in caught.value.message


@given(st.text(st.sampled_from('{}.$()|"`- NameStuirfdend=:0x%,'), max_size=40))
def test_any_text_is_a_template_or_invalid(text: str) -> None:
    try:
        Template(text).render(DATA)
    except Invalid:
        return
