"""Go's text/template, as much of it as `--format` needs.

Actions: fields and chains (`.A.B`), variables (`$x := …`), pipelines, parentheses, literals,
if/else if/else/end, range with else and `$i, $e :=`, with, comments, `{{-` and `-}}`. Functions:
those of Go (and or not len index slice print printf println eq ne lt le gt ge html js urlquery) and
docker's (json lower upper title split join truncate pad trim). Data are JSON values.
"""

import json as json_module
import re
from collections.abc import Callable, Iterator
from typing import Any

from bulkhead.errors import Invalid

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:\\.|[^"\\])*"|`[^`]*`) | (?P<char>'(?:\\.|[^'\\])') |
      (?P<number>[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?) |
      (?P<declare>:=) | (?P<assign>=) | (?P<mark>[|(),]) |
      (?P<variable>\$[A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*) |
      (?P<field>(?:\.[A-Za-z0-9_]+)+|\.) | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    )""",
    re.VERBOSE,
)

Scope = dict[str, Any]
Expression = Callable[[Any, Scope], Any]
Node = Callable[[Any, Scope, list[str]], None]


def _wrong(text: str) -> Invalid:
    return Invalid(f"template parsing error: {text}")


class _Tokens:
    """The tokens of one action."""

    def __init__(self, text: str) -> None:
        self.items: list[tuple[str, str, bool]] = []
        at = 0
        while at < len(text.rstrip()):
            match = _TOKEN.match(text, at)
            if match is None:
                raise _wrong(f"unexpected {text[at:].strip()[:10]!r} in {{{{{text}}}}}")
            kind = match.lastgroup or ""
            spaced = match.group().startswith((" ", "\t", "\n")) or at == 0
            self.items.append((kind, match.group(kind), spaced))
            at = match.end()
        self.at = 0

    def peek(self) -> tuple[str, str, bool]:
        return self.items[self.at] if self.at < len(self.items) else ("end", "", True)

    def take(self) -> tuple[str, str, bool]:
        token = self.peek()
        self.at += 1
        return token


class Missing(Exception):
    """A field that the data does not have."""


def lookup(value: Any, name: str) -> Any:
    """`.name` of a JSON object; Missing if it has none or is no object."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        if getattr(value, "lenient", False):
            return None
        raise Missing(f'map has no entry for key "{name}"')
    if value is None:
        raise Missing(f'nil data; no entry for key "{name}"')
    raise Missing(f"can't evaluate field {name} in type {_type_name(value)}")


def _type_name(value: Any) -> str:
    names = {str: "string", int: "int", float: "float64", bool: "bool", list: "[]interface {}"}
    return names.get(type(value), "interface {}")


def _chain(names: list[str]) -> Callable[[Any], Any]:
    def get(value: Any) -> Any:
        for name in names:
            value = lookup(value, name)
        return value

    return get


def go_text(value: Any) -> str:
    """How Go's fmt prints a JSON value with %v."""
    if value is None:
        return "<no value>"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e21 else repr(value)
    if isinstance(value, dict):
        shown = " ".join(f"{k}:{_inner(value[k])}" for k in sorted(value))
        return f"map[{shown}]"
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(_inner(v) for v in value)}]"
    return str(value)


def _inner(value: Any) -> str:
    return "<nil>" if value is None else go_text(value)


def truth(value: Any) -> bool:
    """Go's notion of an empty value."""
    return bool(value)


_VERB = re.compile(
    r"%(?P<flags>[-+# 0]*)(?P<width>\d*)(?:\.(?P<precision>\d+))?(?P<verb>[a-zA-Z%])"
)


def _printf(pattern: str, *values: Any) -> str:
    rest = list(values)

    def one(match: "re.Match[str]") -> str:
        verb = match["verb"]
        if verb == "%":
            return "%"
        if not rest:
            return f"%!{verb}(MISSING)"
        value = rest.pop(0)
        spec = f"%{match['flags']}{match['width']}"
        precision = f".{match['precision']}" if match["precision"] else ""
        if verb in "vs":
            return f"{spec}{precision}s" % go_text(value)
        if verb == "q":
            return f"{spec}s" % json_module.dumps(go_text(value), ensure_ascii=False)
        if verb == "t":
            return f"{spec}s" % go_text(value)
        if verb in "dxXobc" and isinstance(value, int):
            return f"{spec}s" % format(value, "b") if verb == "b" else f"{spec}{verb}" % value
        if verb in "eEfFgG" and isinstance(value, (int, float)):
            return f"{spec}{precision}{verb}" % value
        if verb in "xX" and isinstance(value, str):
            return f"{spec}s" % value.encode().hex()
        return f"%!{verb}({_type_name(value)}={go_text(value)})"

    text = _VERB.sub(one, pattern)
    if rest:
        text += "%!(EXTRA " + ", ".join(f"{_type_name(v)}={go_text(v)}" for v in rest) + ")"
    return text


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key, "")
        elif isinstance(value, (list, tuple, str)):
            if not isinstance(key, int) or not 0 <= key < len(value):
                raise Missing(f"error calling index: index out of range: {key}")
            value = value[key]
        elif value is None:
            raise Missing("error calling index: index of untyped nil")
        else:
            raise Missing(f"error calling index: can't index item of type {_type_name(value)}")
    return value


def _print(*values: Any) -> str:
    parts: list[str] = []
    for at, value in enumerate(values):
        if at and not isinstance(value, str) and not isinstance(values[at - 1], str):
            parts.append(" ")
        parts.append(go_text(value))
    return "".join(parts)


def _truncate(text: Any, width: int) -> str:
    """Docker's: `truncate STRING N`."""
    return str(text)[: max(width, 0)]


def _pad(text: str, before: int, after: int) -> str:
    return f"{' ' * before}{text}{' ' * after}" if text else text


def _join(values: Any, separator: str) -> str:
    return separator.join(go_text(value) for value in values or ())


def to_json(value: Any) -> str:
    """Docker's json function: compact, not escaping non-ASCII."""
    return json_module.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _compare(operation: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def compare(left: Any, right: Any) -> bool:
        try:
            return operation(left, right)
        except TypeError:
            raise Missing("error calling comparison: incompatible types for comparison") from None

    return compare


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": to_json,
    "lower": lambda text: str(text).lower(),
    "upper": lambda text: str(text).upper(),
    "title": lambda text: str(text).title(),
    "split": lambda text, separator: str(text).split(separator),
    "join": _join,
    "truncate": _truncate,
    "pad": _pad,
    "trim": lambda text: str(text).strip(),
    "len": lambda value: len(value) if value is not None else 0,
    "index": _index,
    "slice": lambda value, *ends: value[slice(*ends)] if len(ends) > 1 else value[ends[0] :],
    "print": _print,
    "println": lambda *values: " ".join(go_text(v) for v in values) + "\n",
    "printf": _printf,
    "not": lambda value: not truth(value),
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda left, right: left != right,
    "lt": _compare(lambda a, b: a < b),
    "le": _compare(lambda a, b: a <= b),
    "gt": _compare(lambda a, b: a > b),
    "ge": _compare(lambda a, b: a >= b),
    "html": lambda text: str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    "js": lambda text: json_module.dumps(str(text))[1:-1],
    "urlquery": lambda text: __import__("urllib.parse", fromlist=["x"]).quote_plus(str(text)),
}
_LAZY = frozenset(("and", "or"))
_CONSTANTS = {"true": True, "false": False, "nil": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "'": "'", "a": "\a", "b": "\b"}


def _unquote(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1]
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), text[1:-1])


class _Parser:
    """Text to nodes."""

    def __init__(self, text: str) -> None:
        self.parts = list(_cut(text))
        self.at = 0

    def block(self, ends: tuple[str, ...]) -> tuple[list[Node], str, _Tokens]:
        """Nodes up to one of the keywords `ends`; that keyword, and the rest of its action."""
        nodes: list[Node] = []
        while self.at < len(self.parts):
            literal, text = self.parts[self.at]
            self.at += 1
            if literal:
                nodes.append(_literal(text))
                continue
            tokens = _Tokens(text)
            kind, word, _ = tokens.peek()
            if kind == "word" and word in ("end", "else"):
                tokens.take()
                if word not in ends:
                    raise _wrong(f"unexpected {{{{{word}}}}}")
                return nodes, word, tokens
            if kind == "word" and word in ("if", "range", "with"):
                tokens.take()
                nodes.append(self._control(word, tokens))
            elif kind == "end":
                raise _wrong("missing value for command")
            else:
                nodes.append(self._action(tokens))
        if ends:
            raise _wrong("unexpected EOF")
        return nodes, "", _Tokens("")

    def _control(self, word: str, tokens: _Tokens) -> Node:
        names = _declared(tokens, 2 if word == "range" else 1)
        condition = self.pipeline(tokens)
        body, ended, rest = self.block(("else", "end"))
        other: list[Node] = []
        if ended == "else":
            kind, following, _ = rest.peek()
            if kind == "word" and following in ("if", "with"):
                rest.take()
                other = [self._control(following, rest)]
            else:
                other, _, _ = self.block(("end",))
        make = {"if": _if, "with": _with, "range": _range}[word]
        return make(names, condition, body, other)

    def _action(self, tokens: _Tokens) -> Node:
        names = _declared(tokens, 1)
        assigned = ""
        kind, word, _ = tokens.peek()
        if (
            kind == "variable"
            and tokens.items[tokens.at + 1 : tokens.at + 2]
            and (tokens.items[tokens.at + 1][0] == "assign")
        ):
            assigned = word
            tokens.take()
            tokens.take()
        expression = self.pipeline(tokens)

        def node(dot: Any, scope: Scope, out: list[str]) -> None:
            value = expression(dot, scope)
            if names or assigned:
                scope[names[0] if names else assigned] = value
            else:
                out.append(go_text(value))

        return node

    def pipeline(self, tokens: _Tokens, closing: str = "") -> Expression:
        stages = [self._command(tokens)]
        while tokens.peek()[1] == "|" and tokens.peek()[0] == "mark":
            tokens.take()
            stages.append(self._command(tokens))
        kind, word, _ = tokens.take()
        if (word != closing) if closing else (kind != "end"):
            raise _wrong(f"unexpected <{word}>" if word else "unclosed left paren")

        def run(dot: Any, scope: Scope) -> Any:
            value = stages[0](dot, scope, ())
            for stage in stages[1:]:
                value = stage(dot, scope, (value,))
            return value

        return run

    def _command(self, tokens: _Tokens) -> Callable[[Any, Scope, tuple[Any, ...]], Any]:
        kind, word, _ = tokens.peek()
        if kind == "word" and word not in _CONSTANTS:
            tokens.take()
            if word not in FUNCTIONS and word not in _LAZY:
                raise _wrong(f'function "{word}" not defined')
            arguments = []
            while tokens.peek()[0] != "end" and tokens.peek()[1] not in ("|", ")"):
                arguments.append(self._operand(tokens))
            return _call(word, arguments)
        operand = self._operand(tokens)
        after = tokens.peek()
        if after[0] != "end" and after[1] not in ("|", ")"):
            raise _wrong(f"can't give argument to non-function {word}")

        def plain(dot: Any, scope: Scope, piped: tuple[Any, ...]) -> Any:
            if piped:
                raise Missing(f"can't give argument to non-function {word}")
            return operand(dot, scope)

        return plain

    def _operand(self, tokens: _Tokens) -> Expression:
        kind, word, _ = tokens.take()
        if kind == "string":
            text = _unquote(word)
            return lambda dot, scope: text
        if kind == "char":
            code = ord(_unquote(word))
            return lambda dot, scope: code
        if kind == "number":
            number = float(word) if any(c in word for c in ".eE") else int(word)
            return lambda dot, scope: number
        if kind == "field":
            chain = _chain([name for name in word.split(".") if name])
            return lambda dot, scope: chain(dot)
        if kind == "variable":
            return _variable(word)
        if kind == "word" and word in _CONSTANTS:
            constant = _CONSTANTS[word]
            return lambda dot, scope: constant
        if kind == "word" and word in FUNCTIONS:
            function = FUNCTIONS[word]
            return lambda dot, scope: function()
        if word == "(":
            inner = self.pipeline(tokens, ")")
            following = tokens.peek()
            if following[0] == "field" and not following[2] and following[1] != ".":
                tokens.take()
                chain = _chain([name for name in following[1].split(".") if name])
                return lambda dot, scope: chain(inner(dot, scope))
            return inner
        raise _wrong(f"unexpected {word!r} in operand" if word else "missing value for command")


def _variable(word: str) -> Expression:
    name, *fields = word.split(".")
    chain = _chain(fields)

    def get(dot: Any, scope: Scope) -> Any:
        if name not in scope:
            raise Missing(f"undefined variable {name!r}")
        return chain(scope[name])

    return get


def _call(word: str, arguments: list[Expression]) -> Callable[[Any, Scope, tuple[Any, ...]], Any]:
    def lazy(dot: Any, scope: Scope, piped: tuple[Any, ...]) -> Any:
        value: Any = None
        for argument in [*arguments, *((lambda d, s, v=v: v) for v in piped)]:
            value = argument(dot, scope)
            if truth(value) == (word == "or"):
                return value
        return value

    def eager(dot: Any, scope: Scope, piped: tuple[Any, ...]) -> Any:
        values = [argument(dot, scope) for argument in arguments]
        try:
            return FUNCTIONS[word](*values, *piped)
        except (TypeError, ValueError) as error:
            raise Missing(f"error calling {word}: {error}") from None

    return lazy if word in _LAZY else eager


def _declared(tokens: _Tokens, most: int) -> list[str]:
    """Names before `:=`, if the action begins so."""
    items = tokens.items[tokens.at :]
    for count in range(1, most + 1):
        width = 2 * count
        if len(items) >= width and items[width - 1][0] == "declare":
            names = [items[at][1] for at in range(0, width - 1, 2)]
            if all(name.startswith("$") for name in names):
                tokens.at += width
                return names
    return []


def _literal(text: str) -> Node:
    return lambda dot, scope, out: out.append(text)


def _run(nodes: list[Node], dot: Any, scope: Scope, out: list[str]) -> None:
    for node in nodes:
        node(dot, scope, out)


def _if(names: list[str], condition: Expression, body: list[Node], other: list[Node]) -> Node:
    def node(dot: Any, scope: Scope, out: list[str]) -> None:
        value = condition(dot, scope)
        inner = {**scope, names[0]: value} if names else scope
        _run(body if truth(value) else other, dot, inner, out)

    return node


def _with(names: list[str], condition: Expression, body: list[Node], other: list[Node]) -> Node:
    def node(dot: Any, scope: Scope, out: list[str]) -> None:
        value = condition(dot, scope)
        inner = {**scope, names[0]: value} if names else scope
        if truth(value):
            _run(body, value, inner, out)
        else:
            _run(other, dot, inner, out)

    return node


def _range(names: list[str], condition: Expression, body: list[Node], other: list[Node]) -> Node:
    def node(dot: Any, scope: Scope, out: list[str]) -> None:
        value = condition(dot, scope)
        if isinstance(value, dict):
            pairs: list[tuple[Any, Any]] = [(key, value[key]) for key in sorted(value)]
        elif isinstance(value, int) and not isinstance(value, bool):
            pairs = [(n, n) for n in range(value)]
        elif isinstance(value, (list, tuple)) or value is None:
            pairs = list(enumerate(value or ()))
        else:
            raise Missing(f"range can't iterate over {go_text(value)}")
        if not pairs:
            _run(other, dot, scope, out)
        for key, item in pairs:
            inner = dict(scope)
            if len(names) == 2:
                inner[names[0]], inner[names[1]] = key, item
            elif names:
                inner[names[0]] = item
            _run(body, item, inner, out)

    return node


def _cut(text: str) -> Iterator[tuple[bool, str]]:
    """(is literal, text) parts, trim marks applied, comments dropped."""
    at, trim = 0, False
    while True:
        begin = text.find("{{", at)
        literal = text[at:] if begin < 0 else text[at:begin]
        if trim:
            literal = literal.lstrip()
        if begin < 0:
            yield True, literal
            return
        end = _closing(text, begin + 2)
        action = text[begin + 2 : end]
        if action.startswith("-") and action[1:2].isspace():
            literal, action = literal.rstrip(), action[1:]
        trim = action.endswith("-") and action[-2:-1].isspace()
        if trim:
            action = action[:-1]
        yield True, literal
        if not (action.strip().startswith("/*") and action.strip().endswith("*/")):
            yield False, action.strip()
        at = end + 2


def _closing(text: str, at: int) -> int:
    """Where the `}}` of an action is; quotes hide it."""
    quote = ""
    while at < len(text):
        letter = text[at]
        if quote:
            if letter == "\\" and quote == '"':
                at += 1
            elif letter == quote:
                quote = ""
        elif letter in '"`':
            quote = letter
        elif text.startswith("}}", at):
            return at
        at += 1
    raise _wrong("unclosed action")


class Template:
    """A parsed template; `render(data)` as often as wanted."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._nodes, _, _ = _Parser(text).block(())

    def render(self, data: Any) -> str:
        """The text for `data`; Invalid when the template names what the data lacks."""
        out: list[str] = []
        try:
            _run(self._nodes, data, {"$": data}, out)
        except Missing as error:
            raise Invalid(f'template: :1: executing "" at <{self.text}>: {error}') from None
        return "".join(out)
