"""What `advise` and `assess` do: gather facts, ask, and tell."""

import os
import sys
from typing import Any

from bulkhead.choosing import costs, docker, facts, policy, runs, sources
from bulkhead.choosing.advice import Advice, advise_here, flag
from bulkhead.choosing.facts import HINT, Statement, statement
from bulkhead.choosing.items import Item, statements
from bulkhead.choosing.words import read
from bulkhead.cli.command import Context
from bulkhead.cli.commands.advise import FACTS
from bulkhead.cli.options import Parsed, UsageError
from bulkhead.cli.output import dump
from bulkhead.errors import NotFound
from bulkhead.oci.platform import of_machine


def this_host() -> Statement:
    """Whether this host has KVM, found out by trying."""
    from bulkhead.boundaries.vmm.acceleration import acceleration

    found = acceleration()
    why = f"this host: {found.reason}" if found.reason else "this host"
    return Statement("kvm", "yes" if found.name == "kvm" else "no", HINT, why)


def stated(parsed: Parsed) -> list[Statement]:
    """What flags and words say."""
    found = [flag(name, parsed[name]) for name in FACTS if name in parsed]
    for text in parsed["needs"]:
        words = sys.stdin.read() if text == "-" else text
        told = read(words)
        if not told:
            raise UsageError(f"--needs {text!r}: no word of it says anything about the choice; "
                             "docs/choosing.md has the vocabulary")  # fmt: skip
        found += told
    if parsed["questions"]:
        found += questions()
    return found


def questions() -> list[Statement]:
    """Ask for every fact; an empty answer leaves it open."""
    found = []
    for name in FACTS:
        key = facts.keys()[name]
        sys.stderr.write(f"{key.question}\n")
        values = list(key.values)
        for number, value in enumerate(values, 1):
            sys.stderr.write(f"  {number}  {value}: {key.values[value]}\n")
        while True:
            sys.stderr.write("? ")
            sys.stderr.flush()
            line = sys.stdin.readline()
            answer = line.strip().lower()
            if answer.isdecimal() and 0 < int(answer) <= len(values):
                answer = values[int(answer) - 1]
            if not answer or answer in values:
                break
            sys.stderr.write(f"one of {', '.join(values)}, or nothing\n")
        if answer:
            found.append(statement(f"{name}={answer}", "answered"))
        elif not line:
            break
    return found


def find(context: Context, what: str) -> list[Item]:
    """The items that a word on the command line means: a path, a workload or an image."""
    if os.path.exists(what) or ("/" in what and what.startswith((".", "/"))):
        return sources.items(what, context.environ)
    try:
        shown = context.call("workload.inspect", {"id": what, "size": False})
    except NotFound:
        shown = None
    if shown is not None:
        host = {**shown["HostConfig"], "Runtime": ""}
        item = docker.from_container({**shown, "HostConfig": host}, "this engine")
        reference = shown["Image"]
    else:
        item = docker.from_request("", {"Image": what}, {}, "this engine")
        item.kind, reference = "image", what
    if reference:
        try:
            docker.add_image(item, context.call("image.inspect", {"name": reference}))
        except NotFound:
            if shown is None:
                raise NotFound(
                    f"{what}: neither a file, nor a workload, nor an image here (bulkhead pull)"
                ) from None
    return [item]


def run(context: Context, parsed: Parsed) -> int:
    """`bulkhead advise`: 1 if the needs contradict each other."""
    given = stated(parsed)
    items = [one for what in parsed.args for one in find(context, what)]
    if not items and not given:
        raise UsageError("name what it is about, or say what it needs: --needs TEXT, --questions, "
                         "or a fact such as --trust untrusted", code=1)  # fmt: skip
    rules = policy.load(context.home)
    measured = costs.load(context.home)
    answers = []
    for item in items or [Item("", "need", "")]:
        found = [*statements(item, of_machine(os.uname().machine).architecture), *given]
        answers.append((item, advise_here(found, rules.of(item.tenant), this_host)))
    if context.json or parsed["json"]:
        context.out(dump([as_json(item, one, measured) for item, one in answers]))
    else:
        for number, (item, one) in enumerate(answers):
            if number:
                context.out("")
            for line in as_text(item, one, measured, everything=parsed["all"]):
                context.out(line)
    return 0 if all(one.boundary for _, one in answers) else 1


def commands(item: Item, boundary: str) -> list[str]:
    """What to type."""
    if item.kind == "need":
        item = Item("", "need", "", image="IMAGE")
        if boundary == "vm":
            return ["bulkhead vm create --image DISK --start NAME",
                    "bulkhead run --boundary vm IMAGE"]  # fmt: skip
    if item.kind in ("need", "image"):
        return [runs.line(["bulkhead", "run", "--boundary", boundary, item.image])]
    return [runs.line(words) for words in runs.commands(item, boundary)]


def as_json(item: Item, one: Advice, measured: costs.Comparison | None) -> dict[str, Any]:
    """One answer as data."""
    return {
        "Name": item.name,
        "Kind": item.kind,
        "Source": item.source,
        "Image": item.image,
        "Boundary": one.boundary,
        "Conflicts": one.conflicts,
        "Rules": one.edition,
        "Facts": {
            name: {"Value": told.value, "Source": told.source}
            for name, told in one.facts.values.items()
        },
        "Assumed": {
            name: key.assumed for name, key in facts.keys().items() if name not in one.facts.values
        },
        "Reasons": [
            {
                "Rule": why.rule,
                "Facts": list(why.facts),
                "Excludes": list(why.excludes),
                "Points": why.points,
                "Reason": why.reason,
                "Source": why.source,
            }
            for why in one.reasons
        ],
        "Points": one.points,
        "Alternative": one.alternative,
        "Against": one.against,
        "Changes": [
            {"Fact": change.fact, "Boundary": change.boundary, "Stated": change.stated}
            for change in one.changes
        ],
        "Warnings": [*one.warnings, *item.notes],
        "Costs": costs.shown(measured, one.boundary, one.alternative) if one.boundary else [],
        "Commands": commands(item, one.boundary) if one.boundary else [],
    }


_MOST_CHANGES = 8


def as_text(
    item: Item, one: Advice, measured: costs.Comparison | None, *, everything: bool
) -> list[str]:
    """One answer as people read it."""
    about = " ".join(part for part in (item.kind if item.name else "", item.name) if part)
    about = about or item.image
    head = f" for {about}" if about else ""
    if not one.boundary:
        lines = [f"The needs contradict each other{head}:"]
        return lines + [f"  {text}" for text in one.conflicts] + _told(one)
    lines = [f"{one.boundary}{head}", "", "Because"]
    for why in one.why:
        lines += [f"  {', '.join(why.facts) or why.rule}: {why.reason}",
                  f"      rule {why.rule}; {why.source}"]  # fmt: skip
    if not one.why:
        lines.append("  nothing asks for more than the lightest")
    lines += _told(one)
    lines += ["", f"Strongest alternative: {one.alternative} ({one.against})"]
    lines += _changes(one, everything=everything)
    lines += ["", "What it costs here"]
    lines += [f"  {text}" for text in costs.shown(measured, one.boundary, one.alternative)]
    for text in [*one.warnings, *item.notes]:
        lines += ["", f"Mind: {text}"]
    typed = commands(item, one.boundary)
    if typed:
        lines += ["", "Run"]
        lines += [f"  {text}" for text in typed]
    return lines


def _told(one: Advice) -> list[str]:
    told = [f"  {name}={said.value}  from {said.source}" for name, said in one.facts.values.items()]
    return ["", "Facts", *told] if told else []


def _changes(one: Advice, *, everything: bool) -> list[str]:
    lines = ["", "What would change the answer"]
    shown = one.changes if everything else one.changes[:_MOST_CHANGES]
    for change in shown:
        was = "" if change.stated else " (not stated)"
        lines.append(f"  {change.fact}{was}: {change.boundary or 'a contradiction'}")
    if not shown:
        lines.append("  no single fact")
    if len(one.changes) > len(shown):
        lines.append(f"  and {len(one.changes) - len(shown)} more: --all")
    return lines
