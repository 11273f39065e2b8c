"""`completion`."""

from bulkhead.cli.command import Command, Context
from bulkhead.cli.completion import SHELLS, script
from bulkhead.cli.options import Parsed, UsageError


def completion(context: Context, parsed: Parsed) -> None:
    """`bulkhead completion bash|zsh|fish`."""
    shell = parsed.args[0]
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell}: one of {', '.join(SHELLS)}")
    context.out(script(shell))


COMMANDS = {
    "completion": Command(
        "completion", "Print the completion script for bash, zsh or fish", completion,
        arguments="bash|zsh|fish", least=1, most=1,
        examples=("source <(bulkhead completion bash)",
                  "bulkhead completion fish > ~/.config/fish/completions/bulkhead.fish"),
    )
}  # fmt: skip
