"""`advise`: which boundary a workload needs, and why."""

from bulkhead.choosing import facts
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import JSON, Option, Parsed

FACTS = tuple(name for name in facts.keys() if name != "kvm")  # noqa: SIM118 - a function


def _run(context: Context, parsed: Parsed) -> int:
    from bulkhead.cli.advising import run  # much that other commands do not need

    return run(context, parsed)


def fact_options() -> tuple[Option, ...]:
    """A flag for every fact."""
    known = facts.keys()
    return tuple(
        Option(f"--{name}", "string", known[name].question, choices=tuple(known[name].values))
        for name in FACTS
    )


COMMANDS = {
    "advise": Command(
        "advise", "Say which boundary a workload needs, and why", _run,
        arguments="[IMAGE|CONTAINER|FILE...]",
        options=(
            Option("--needs", "list", "What it needs, in words (- reads them from stdin)"),
            Option("--questions", "bool", "Ask for every fact"),
            Option("--all", "bool", "Show everything that would change the answer"),
            JSON,
            *fact_options(),
        ),
        examples=(
            "bulkhead advise nginx",
            "bulkhead advise --needs 'Customers upload the code. It only computes.'",
            "bulkhead advise --trust own --state database compose.yaml",
            "bulkhead advise --questions",
        ),
        most=None,
        completes="file",
    ),
}  # fmt: skip
