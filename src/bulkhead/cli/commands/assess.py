"""`assess`: a portfolio, where each of it belongs, and the way there."""

from bulkhead.cli.command import Command, Context
from bulkhead.cli.commands.advise import fact_options
from bulkhead.cli.options import JSON, Option, Parsed


def _run(context: Context, parsed: Parsed) -> int:
    from bulkhead.cli.assessing import run  # much that other commands do not need

    return run(context, parsed)


COMMANDS = {
    "assess": Command(
        "assess", "Say where everything in a portfolio belongs, and how it gets there", _run,
        arguments="[PATH...]",
        options=(
            Option("--docker", "list", "A Docker host to read: unix:///PATH or tcp://HOST:PORT"),
            Option("--kube", "list", "A file of Kubernetes manifests", complete="file"),
            Option("--image", "list", "An image that is here"),
            Option("--needs", "list", "What holds for all of it, in words"),
            Option("--questions", "bool", "Ask for every fact that holds for all of it"),
            Option("--html", "string", "Write a page to this file too", complete="file"),
            Option("--wave", "uint", "Print the commands of one wave, and nothing else"),
            Option("--undo", "bool", "With --wave: the commands that take it back"),
            JSON,
            *fact_options(),
        ),
        examples=(
            "bulkhead assess stacks/",
            "bulkhead assess --docker unix:///var/run/docker.sock --html plan.html",
            "bulkhead assess --tenancy departments --json stacks/ vms/erp.xml",
            "bulkhead assess --wave 1 stacks/ | sh -e",
        ),
        most=None,
        completes="file",
    ),
}  # fmt: skip
