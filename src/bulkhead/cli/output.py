"""Tables, templates and JSON: what list-like commands print."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bulkhead.cli.template import Template, to_json

if TYPE_CHECKING:
    from bulkhead.cli.command import Context
    from bulkhead.cli.options import Parsed

Row = dict[str, Any]


def dump(value: Any) -> str:
    """Indented JSON, as `inspect` prints it."""
    return json.dumps(value, indent=4, ensure_ascii=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns three spaces apart and at least ten wide, as Go's tabwriter makes docker's tables."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join(
        "".join(
            cell if at == len(line) - 1 else cell.ljust(max(widths[at], 7) + 3)
            for at, cell in enumerate(line)
        )
        for line in lines
    )


class Listing:
    """How one kind of thing is listed: its columns by name, and the default table."""

    def __init__(
        self, headers: Mapping[str, str], columns: Sequence[str], quiet: str = "ID"
    ) -> None:
        self.headers = headers
        self.columns = tuple(columns)
        self.quiet = quiet

    def show(
        self,
        context: "Context",
        parsed: "Parsed",
        rows: Sequence[Row],
        *,
        columns: Sequence[str] | None = None,
    ) -> None:
        """Print `rows` by -q, --format, --json, or as the default table."""
        wanted = (
            "json" if context.json or parsed.values.get("json") else parsed.values.get("format", "")
        )
        if parsed.values.get("quiet") and not wanted:
            for row in rows:
                context.out(str(row[self.quiet]))
            return
        text = self.text(wanted, rows, columns or self.columns)
        if text:
            context.out(text)

    def text(self, wanted: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
        """What `show` prints, without the last newline."""
        if not wanted or wanted == "table":
            return table(
                [self.headers[c] for c in columns], [[row[c] for c in columns] for row in rows]
            )
        if wanted == "json":
            return "\n".join(to_json(_public(row)) for row in rows)
        if wanted.startswith("table "):
            return self._template_table(wanted.removeprefix("table ").strip(), rows)
        template = Template(unescape(wanted))
        return "\n".join(template.render(row) for row in rows)

    def _template_table(self, wanted: str, rows: Sequence[Row]) -> str:
        template = Template(unescape(wanted))
        header = template.render(_Headers(self.headers))
        lines = [header, *(template.render(row) for row in rows)]
        cells = [line.split("\t") for line in lines]
        count = max(len(line) for line in cells)
        padded = [line + [""] * (count - len(line)) for line in cells]
        return table(padded[0], padded[1:])


class _Headers(dict[str, Any]):
    """The header row: a field's column title; unknown ones in capitals."""

    lenient = True

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__(headers)

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return name.upper()


def _public(row: Row) -> Row:
    return {key: value for key, value in row.items() if not key.startswith("_")}


def unescape(text: str) -> str:
    """`\\t` and `\\n` outside of actions, as the shell leaves them in --format."""
    return text.replace("\\t", "\t").replace("\\n", "\n")


def one(context: "Context", parsed: "Parsed", value: Any) -> bool:
    """Print a single object by --format or --json; False if neither was given."""
    wanted = (
        "json" if context.json or parsed.values.get("json") else parsed.values.get("format", "")
    )
    if not wanted:
        return False
    if wanted == "json":
        context.out(to_json(value))
    else:
        context.out(Template(unescape(wanted)).render(value))
    return True


def filters(parsed: "Parsed") -> dict[str, list[str]]:
    """--filter values as the API's map; UsageError for one without `=`."""
    from bulkhead.cli.options import UsageError

    found: dict[str, list[str]] = {}
    for text in parsed["filter"]:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"invalid argument \"{text}\" for \"-f, --filter\" flag: "
                             "bad format of filter (expected name=value)")  # fmt: skip
        found.setdefault(key.strip().lower(), []).append(value.strip())
    return found


def coloured() -> bool:
    """Whether output may move the cursor: a terminal."""
    return sys.stdout.isatty()
