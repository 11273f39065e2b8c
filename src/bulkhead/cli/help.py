"""`--help`, written from the tables."""

import textwrap

from bulkhead.cli.options import Option
from bulkhead.cli.registry import ALIASES, COMMANDS, GROUPS

_COMMON = ("run", "exec", "ps", "pull", "push", "images", "login", "logout", "version", "info")

_METAVAR = {
    "bool": "", "string": "string", "list": "list", "strings": "strings", "int": "int",
    "uint": "uint", "decimal": "decimal", "percent": "percent", "bytes": "bytes",
    "duration": "duration", "map": "map",
}  # fmt: skip


def _columns(rows: list[tuple[str, str]], indent: int = 2) -> list[str]:
    width = max((len(left) for left, _ in rows), default=0)
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, max(100 - width - indent - 3, 30)) or [""]
        lines.append(f"{' ' * indent}{left.ljust(width)}   {wrapped[0]}".rstrip())
        lines.extend(f"{' ' * (indent + width + 3)}{more}" for more in wrapped[1:])
    return lines


def option_rows(options: tuple[Option, ...] | list[Option]) -> list[tuple[str, str]]:
    """(spelling, explanation) of each option that is shown, by name."""
    rows = []
    for option in sorted(options, key=lambda o: o.name):
        if option.hidden:
            continue
        lead = f"-{option.short}, " if option.short else "    "
        text = option.help
        if option.choices:
            text += f" ({'|'.join(option.choices)})"
        if option.default is not None:
            shown = str(option.default).lower() if option.kind == "bool" else option.default
            text += f" (default {shown})"
        rows.append((f"{lead}{option.long} {_METAVAR[option.kind]}".rstrip(), text))
    return rows


def command_help(words: str) -> str:
    """The help of one command."""
    from bulkhead.cli.dispatch import load

    command = load(words)
    lines = [f"Usage:  {command.usage}", "", command.summary]
    others = [alias for alias, target in ALIASES.items() if target == words]
    if others:
        names = ", ".join(f"bulkhead {name}" for name in [*others, words])
        lines += ["", "Aliases:", f"  {names}"]
    if command.options:
        lines += ["", "Options:", *_columns(option_rows(command.table.options))]
    if command.examples:
        lines += ["", "Examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines)


def overview(group: str) -> str:
    """The help of a group of commands, or of the whole program for ""."""
    if group:
        rows = {
            words.partition(" ")[2]: COMMANDS[target][1]
            for words, target in [*((w, w) for w in COMMANDS), *ALIASES.items()]
            if words.startswith(group + " ")
        }
        lines = [f"Usage:  bulkhead {group} COMMAND", "", GROUPS[group], "", "Commands:"]
        lines += _columns(sorted(rows.items()))
        return "\n".join([*lines, "", f"Run 'bulkhead {group} COMMAND --help' for more."])
    from bulkhead.cli.dispatch import GLOBAL

    lines = [
        "Usage:  bulkhead [OPTIONS] COMMAND", "",
        "Run any OCI image behind the isolation boundary its workload needs", "",
        "Common Commands:", *_columns([(w, COMMANDS[w][1]) for w in _COMMON]), "",
        "Management Commands:", *_columns(list(GROUPS.items())), "",
        "Commands:",
        *_columns([(w, s) for w, (_, s) in COMMANDS.items() if w not in _COMMON and " " not in w]),
        "", "Global Options:", *_columns(option_rows(GLOBAL.options)), "",
        "Run 'bulkhead COMMAND --help' for more information on a command.", "",
        "Examples:",
        "  bulkhead image bootstrap debian:bookworm        make an image without a registry",
        "  bulkhead run --rm -it debian:bookworm bash      a shell in it",
        "  bulkhead run -d --name web -p 8080:80 nginx     a service, published",
        "  alias docker=bulkhead                           for the fingers",
    ]  # fmt: skip
    return "\n".join(lines)
