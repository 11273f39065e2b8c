"""What `assess` does: read, judge, and tell."""

import os

from bulkhead.choosing import costs, docker, policy, report, sources
from bulkhead.choosing.items import Item
from bulkhead.choosing.portfolio import assess
from bulkhead.cli.advising import stated, this_host
from bulkhead.cli.command import Context
from bulkhead.cli.options import Parsed, UsageError
from bulkhead.cli.output import dump, table
from bulkhead.errors import Invalid
from bulkhead.oci.platform import of_machine


def _items(context: Context, parsed: Parsed) -> list[Item]:
    found: list[Item] = []
    for path in [*parsed.args, *parsed["kube"]]:
        found += sources.items(path, context.environ)
    for host in parsed["docker"]:
        found += docker.inventory(host)
    for image in parsed["image"]:
        item = docker.from_request("", {"Image": image}, {}, "this engine")
        item.name, item.kind = image, "image"
        docker.add_image(item, context.call("image.inspect", {"name": image}))
        found.append(item)
    return found


def run(context: Context, parsed: Parsed) -> int:
    """`bulkhead assess`."""
    if not (parsed.args or parsed["kube"] or parsed["docker"] or parsed["image"]):
        raise UsageError(
            "name files or folders, --docker HOST, --kube FILE or --image IMAGE", code=1
        )
    items = _items(context, parsed)
    if not items:
        raise Invalid("nothing was found there: no Compose file, manifest, domain or disk")
    given = [*stated(parsed), this_host()]
    machine = of_machine(os.uname().machine).architecture
    found = assess(items, given, policy.load(context.home), costs.load(context.home), machine)
    if parsed["html"]:
        with open(parsed["html"], "w", encoding="utf-8") as file:
            file.write(report.as_html(found))
        context.err(f"written: {parsed['html']}")
    if context.json or parsed["json"]:
        context.out(dump(report.as_json(found)))
        return 0
    if parsed["wave"]:
        step = next((one for one in found.waves if one.number == parsed["wave"]), None)
        if step is None:
            raise Invalid(f"there is no wave {parsed['wave']}, only {len(found.waves)}")
        for line in step.undo if parsed["undo"] else step.commands:
            context.out(line)
        return 0
    laid = table(report.HEADER, report.rows(found)).splitlines()
    for line in report.as_text(found, laid):
        context.out(line)
    return 0
