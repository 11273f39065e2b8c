"""Completion scripts, generated from the option tables."""

from bulkhead.cli.command import Command
from bulkhead.cli.options import Option
from bulkhead.cli.registry import ALIASES, COMMANDS, GROUPS

SHELLS = ("bash", "zsh", "fish")

_LISTERS = {
    "container": "bulkhead ps -a --format '{{.Names}}'",
    "image": "bulkhead images --format '{{.Repository}}:{{.Tag}}'",
    "network": "bulkhead network ls --format '{{.Name}}'",
    "volume": "bulkhead volume ls -q",
}


def _all() -> dict[str, Command]:
    """Every spelling of every command, aliases too."""
    from bulkhead.cli.dispatch import load

    commands = {words: load(words) for words in COMMANDS}
    return {**commands, **{alias: commands[target] for alias, target in ALIASES.items()}}


def _shown(command: Command) -> list[Option]:
    return [option for option in command.table.options if not option.hidden]


def script(shell: str) -> str:
    """The script for one of SHELLS."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _words_of_group(group: str, commands: dict[str, Command]) -> list[str]:
    return sorted(w.partition(" ")[2] for w in commands if w.startswith(f"{group} "))


def _bash() -> str:
    commands = _all()
    flags, values, kinds = [], [], []
    for words, command in sorted(commands.items()):
        spelled = []
        for option in _shown(command):
            spelled += [f"-{option.short}"] * bool(option.short) + [option.long]
            names = f'"{words}|{option.long}"'
            if option.short:
                names += f'|"{words}|-{option.short}"'
            if option.choices:
                values.append(f'    {names}) _bh_words "{" ".join(option.choices)}" ;;')
            elif option.complete == "file":
                values.append(f"    {names}) _bh_files ;;")
            elif option.complete:
                values.append(f"    {names}) _bh_list {option.complete} ;;")
            elif option.kind != "bool":
                values.append(f"    {names}) ;;")
        flags.append(f'    "{words}") _bh_words "{" ".join([*spelled, "--help"])}" ;;')
        if command.completes:
            act = "_bh_files" if command.completes == "file" else f"_bh_list {command.completes}"
            kinds.append(f'    "{words}") {act} ;;')
    tops = " ".join(sorted({w.partition(" ")[0] for w in commands}))
    groups = "\n".join(
        f'    "{group}") _bh_words "{" ".join(_words_of_group(group, commands))}" ;;'
        for group in GROUPS
    )
    return _bash_script(tops, groups, "\n".join(values), "\n".join(flags), "\n".join(kinds))


def _bash_script(tops: str, groups: str, values: str, flags: str, kinds: str) -> str:
    listers = "\n".join(f"    {kind}) {line} 2>/dev/null ;;" for kind, line in _LISTERS.items())
    return f"""# bash completion for bulkhead; load with: source <(bulkhead completion bash)
_bh_words() {{ mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur"); }}
_bh_files() {{ mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; }}
_bh_list() {{
  local names
  names=$(case "$1" in
{listers}
  esac)
  _bh_words "$names"
  __ltrim_colon_completions "$cur" 2>/dev/null
}}
_bulkhead() {{
  local cur prev words cword command="" group="" at
  if declare -F _get_comp_words_by_ref >/dev/null; then
    _get_comp_words_by_ref -n : cur prev words cword
  else
    words=("${{COMP_WORDS[@]}}"); cword=$COMP_CWORD; cur=${{words[cword]}}; prev=${{words[cword-1]}}
  fi
  for ((at = 1; at < cword; at++)); do
    case "${{words[at]}}" in
      --root|--run-root|--config|--host|-H) ((at++)) ;;
      -*) ;;
      *)
        if [[ -z $group && " {" ".join(GROUPS)} " == *" ${{words[at]}} "* ]]; then
          group=${{words[at]}}
        else
          command="${{group:+$group }}${{words[at]}}"; break
        fi ;;
    esac
  done
  if [[ -z $command ]]; then
    case "$group" in
    "") _bh_words "{tops}" ;;
{groups}
    esac
    return
  fi
  case "$command|$prev" in
{values}
    *)
      if [[ $cur == -* ]]; then
        case "$command" in
{flags}
        esac
      else
        case "$command" in
{kinds}
        esac
      fi ;;
  esac
}}
complete -F _bulkhead bulkhead"""


def _zsh() -> str:
    return "#compdef bulkhead\nautoload -U +X bashcompinit && bashcompinit\n" + _bash().replace(
        "mapfile -t COMPREPLY < <(compgen", "COMPREPLY=($(compgen"
    ).replace('-- "$cur");', '-- "$cur"));')


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish() -> str:
    commands = _all()
    lines = [
        "# fish completion for bulkhead",
        "function __bh_is",
        "    set -l found (commandline -opc)[2..]",
        "    set -l plain",
        "    for word in $found",
        "        string match -q -- '-*' $word; or set -a plain $word",
        "    end",
        '    test "$plain[1..(count $argv)]" = "$argv"',
        "end",
        "complete -c bulkhead -f",
    ]
    tops = sorted({w for w in commands if " " not in w})
    for word in tops:
        lines.append(
            f"complete -c bulkhead -n __fish_use_subcommand -a {word} "
            f"-d {_quoted(commands[word].summary)}"
        )
    for group, summary in GROUPS.items():
        lines.append(
            f"complete -c bulkhead -n __fish_use_subcommand -a {group} -d {_quoted(summary)}"
        )
        inner = _words_of_group(group, commands)
        test = f"__bh_is {group}; and not __fish_seen_subcommand_from {' '.join(inner)}"
        for word in inner:
            lines.append(
                f"complete -c bulkhead -n {_quoted(test)} -a {word} "
                f"-d {_quoted(commands[f'{group} {word}'].summary)}"
            )
    for words, command in sorted(commands.items()):
        test = _quoted(f"__bh_is {words}")
        for option in _shown(command):
            line = f"complete -c bulkhead -n {test} -l {option.name}"
            if option.short:
                line += f" -s {option.short}"
            if option.kind != "bool":
                line += " -r"
            if option.choices:
                line += f" -a {_quoted(' '.join(option.choices))}"
            elif option.complete == "file":
                line += " -F"
            elif option.complete:
                line += f" -a {_quoted(f'({_LISTERS[option.complete]} 2>/dev/null)')}"
            lines.append(f"{line} -d {_quoted(option.help)}")
        if command.completes == "file":
            lines.append(f"complete -c bulkhead -n {test} -F")
        elif command.completes:
            lister = f"({_LISTERS[command.completes]} 2>/dev/null)"
            lines.append(f"complete -c bulkhead -n {test} -a {_quoted(lister)}")
    return "\n".join(lines)
