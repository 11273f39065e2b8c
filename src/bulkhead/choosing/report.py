"""An assessment as data, as text, and as a page that needs nothing but itself."""

import html
from collections.abc import Sequence
from typing import Any

from bulkhead.choosing.portfolio import Assessment, Placed, Step


def size(count: float) -> str:
    """Bytes in words."""
    if not count:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def as_json(found: Assessment) -> dict[str, Any]:
    """The assessment as data."""
    density = found.density
    return {
        "Rules": found.edition,
        "Inventory": [_placed(one) for one in found.placed],
        "Machines": [
            {"Name": one.name, "Tenants": one.tenants, "Inside": one.members, "Memory": one.memory,
             "Why": one.why}
            for one in found.machines
        ],
        "Density": {
            "Before": {"Machines": density.before_machines, "Memory": density.before_memory},
            "After": {"Machines": len(found.machines) + _whole(found),
                      "Memory": density.after_memory, "Boundaries": density.overhead},
            "WithoutSize": density.uncounted, "Fits": density.fits, "Disk": density.disk,
            "Notes": density.told,
        },
        "Waves": [
            {"Wave": step.number, "Title": step.title,
             "Members": [one.item.name for one in step.members],
             "Commands": step.commands, "Undo": step.undo,
             "Risks": sorted({f"{one.item.name}: {risk}" for one in step.members
                              for risk in one.risks})}
            for step in found.waves
        ],
        "Staying": [
            {"Name": one.item.name, "Source": one.item.source, "Blockers": one.blockers}
            for one in found.staying
        ],
    }  # fmt: skip


def _whole(found: Assessment) -> int:
    return sum(one.advice.boundary == "vm" and not one.machine for one in found.placed)


def _placed(one: Placed) -> dict[str, Any]:
    return {
        "Name": one.item.name, "Kind": one.item.kind, "Source": one.item.source,
        "Image": one.item.image, "Tenant": one.item.tenant, "Replicas": one.item.replicas,
        "Memory": one.item.memory, "Boundary": one.advice.boundary, "Machine": one.machine,
        "Wave": one.wave, "Blockers": one.blockers, "Risks": one.risks,
        "Facts": {k: {"Value": v.value, "Source": v.source}
                  for k, v in one.advice.facts.values.items()},
        "Reasons": [{"Rule": why.rule, "Reason": why.reason, "Source": why.source}
                    for why in one.advice.why],
        "Alternative": one.advice.alternative,
    }  # fmt: skip


HEADER = ("NAME", "KIND", "SOURCE", "TENANT", "MEMORY", "BOUNDARY", "WAVE", "WHY")


def rows(found: Assessment) -> list[list[str]]:
    """The inventory's rows, in HEADER's columns."""
    made = []
    for one in found.placed:
        why = ", ".join(dict.fromkeys(fact for why in one.advice.why for fact in why.facts))
        made.append(
            [one.item.name, one.item.kind, one.item.source.rpartition("/")[2],
             one.item.tenant or "-", size(one.item.memory), one.behind or "contradiction",
             str(_step(found, one) or "stays"), why or (one.advice.why and one.advice.why[0].rule)
             or "-"]
        )  # fmt: skip
    return made


def _step(found: Assessment, one: Placed) -> int:
    for step in found.waves:
        if any(one is member for member in step.members):
            return step.number
    return 0


def sums(found: Assessment) -> list[str]:
    """Density and cost, before and after, in lines."""
    density = found.density
    lines = [
        f"before: {density.before_machines} virtual machine(s), {size(density.before_memory)} of "
        f"memory stated in all, {size(density.disk)} on disk",
        f"after: {len(found.machines) + _whole(found)} machine(s), {size(density.after_memory)} of "
        f"memory, of which {size(density.overhead)} for boundaries",
    ]
    if density.uncounted:
        lines.append(f"{density.uncounted} without a stated size are not counted")
    if density.fits:
        lines.append(f"this host's memory holds {density.fits} of the average one")
    return lines + density.told


def as_text(found: Assessment, table: Sequence[str]) -> list[str]:
    """The assessment in lines; `table` is the inventory, laid out."""
    lines = [*table, ""]
    for machine in found.machines:
        lines.append(
            f"Machine {machine.name} ({size(machine.memory)}): {machine.why}; tenants "
            f"{', '.join(machine.tenants)}; inside {', '.join(machine.members)}"
        )
    lines += ["Density and cost", *(f"  {text}" for text in sums(found))]
    for step in found.waves:
        lines += ["", f"Wave {step.number}: {step.title}"]
        lines += [f"  {text}" for text in step.commands]
        risks = sorted({f"{one.item.name}: {risk}" for one in step.members for risk in one.risks})
        lines += [f"  risk: {text}" for text in risks]
        lines += [f"  back: {text}" for text in step.undo]
    if found.staying:
        lines += ["", "Stays where it is"]
        for one in found.staying:
            lines += [f"  {one.item.name}: {text}" for text in one.blockers]
    return lines


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;
color:#1b1f24;background:#fff}table{border-collapse:collapse;width:100%}th,td{text-align:left;
padding:.35rem .6rem;border-bottom:1px solid #d0d7de;vertical-align:top}th{background:#f6f8fa}
pre{background:#f6f8fa;padding:.8rem;overflow-x:auto}.container{color:#116329}
.sandbox{color:#7d4e00}.microvm{color:#0550ae}.vm{color:#6639ba}.bar{height:1.1rem;background:#0969da}
.none{color:#cf222e}details{margin:.2rem 0}
@media(prefers-color-scheme:dark){body{background:#0d1117;
color:#e6edf3}th,pre{background:#161b22}td,th{border-color:#30363d}.container{color:#3fb950}
.sandbox{color:#d29922}.microvm{color:#58a6ff}.vm{color:#bc8cff}}"""


def as_html(found: Assessment) -> str:
    """One page without scripts, pictures or anything from elsewhere."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "style-src 'unsafe-inline'\">",
        "<meta name=viewport content='width=device-width'>",
        f"<title>Assessment</title><style>{_STYLE}</style><h1>Assessment</h1>",
        f"<p>{len(found.placed)} workloads, rules of edition {found.edition}. Nothing was changed "
        "or measured for it.</p>",
        "<h2>Inventory</h2>",
        _table(found),
        "<h2>Placement</h2>",
        _placement(found),
        "<h2>Density and cost</h2><ul>",
        *(f"<li>{_e(text)}</li>" for text in sums(found)),
        "</ul>",
        _bars(found),
        "<h2>Waves</h2>",
        *(_wave(step) for step in found.waves),
    ]
    if found.staying:
        parts.append("<h2>Stays where it is</h2><ul>")
        parts += [
            f"<li><b>{_e(one.item.name)}</b>: {_e('; '.join(one.blockers))}</li>"
            for one in found.staying
        ]
        parts.append("</ul>")
    return "\n".join([*parts, "</html>", ""])


def _e(text: object) -> str:
    return html.escape(str(text))


def _table(found: Assessment) -> str:
    head = "".join(f"<th scope=col>{_e(one.capitalize())}</th>" for one in HEADER)
    body = []
    for row, one in zip(rows(found), found.placed, strict=True):
        cells = [f"<td>{_e(cell)}</td>" for cell in row[:5]]
        cells.append(f"<td class={one.advice.boundary or 'none'}>{_e(row[5])}</td>")
        cells.append(f"<td>{_e(row[6])}</td>")
        reasons = "".join(
            f"<li>{_e(', '.join(why.facts))}: {_e(why.reason)} <i>({_e(why.source)})</i></li>"
            for why in one.advice.why
        )
        cells.append(
            f"<td><details><summary>{_e(row[7])}</summary><ul>{reasons}</ul></details></td>"
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _placement(found: Assessment) -> str:
    lines = [
        f"<li>machine <b>{_e(one.name)}</b> ({_e(size(one.memory))}), {_e(one.why)}: tenants "
        f"{_e(', '.join(one.tenants))}; inside {_e(', '.join(one.members))}</li>"
        for one in found.machines
    ]
    for kind in ("container", "sandbox", "microvm", "vm"):
        names = [
            one.item.name for one in found.placed if one.advice.boundary == kind and not one.machine
        ]
        if names:
            lines.append(
                f"<li>on the host, <b class={kind}>{kind}</b>: {_e(', '.join(names))}</li>"
            )
    return f"<ul>{''.join(lines)}</ul>"


def _bars(found: Assessment) -> str:
    density = found.density
    most = max(density.before_memory, density.after_memory, 1)
    return "".join(
        f"<p>{word}: {_e(size(count))}<div class=bar style='width:{100 * count / most:.1f}%'></div>"
        for word, count in (("before", density.before_memory), ("after", density.after_memory))
    )


def _wave(step: Step) -> str:
    risks = sorted({f"{one.item.name}: {risk}" for one in step.members for risk in one.risks})
    listed = "".join(f"<li>{_e(text)}</li>" for text in risks)
    return (
        f"<h3>Wave {step.number}: {_e(step.title)}</h3><pre>{_e(chr(10).join(step.commands))}</pre>"
        f"<details><summary>{len(risks)} risks, and the way back</summary><ul>{listed}</ul>"
        f"<pre>{_e(chr(10).join(step.undo))}</pre></details>"
    )
