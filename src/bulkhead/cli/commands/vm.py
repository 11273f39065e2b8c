"""`vm create ls inspect images rmi import export bootstrap snapshot resize update …`."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from bulkhead.cli import run_options
from bulkhead.cli.command import Command, Context
from bulkhead.cli.commands.inspect import inspect_objects
from bulkhead.cli.options import FORMAT, FORMAT_LONG, JSON, Option, Parsed, UsageError
from bulkhead.cli.output import Listing
from bulkhead.cli.progress import Progress
from bulkhead.cli.pulling import follow
from bulkhead.cli.units import human_size
from bulkhead.errors import Invalid, Unavailable

MACHINES = Listing(
    {
        "ID": "VM ID", "Name": "NAME", "State": "STATE", "Image": "DISK IMAGE", "Cpus": "CPUS",
        "Memory": "MEMORY", "Disk": "DISK", "Firmware": "FIRMWARE", "Address": "ADDRESS",
        "Autostart": "AUTOSTART",
    },
    ("ID", "Name", "State", "Image", "Cpus", "Memory", "Disk", "Address"),
)  # fmt: skip
IMAGES = Listing(
    {
        "Name": "NAME", "Size": "SIZE", "Stored": "STORED", "Firmware": "FIRMWARE",
        "Origin": "ORIGIN", "Created": "CREATED", "UsedBy": "USED BY",
    },
    ("Name", "Size", "Stored", "Firmware", "Origin", "UsedBy"),
    quiet="Name",
)  # fmt: skip
SNAPSHOTS = Listing(
    {"Name": "NAME", "Created": "CREATED", "Memory": "MEMORY"}, ("Name", "Created", "Memory"),
    quiet="Name",
)  # fmt: skip
_SHARED = frozenset(
    str.split(
        "cpus cpuset-cpus cpu-shares memory restart reserve-cpus reserve-memory reserve-io "
        "blkio-weight label label-file annotation hostname stop-timeout log-driver log-opt dns "
        "dns-search expose ip ip6 mac-address network network-alias publish publish-all "
        "device-read-bps device-write-bps device-read-iops device-write-iops"
    )
)
"""Options of `run` that a machine takes as well, with the same meaning."""


def create(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm create NAME`."""
    make(context, parsed)


def make(context: Context, parsed: Parsed, *, engine: bool = False) -> None:
    """Create a machine, with the engine inside if asked for, and print its id."""
    from bulkhead.cli.body import create_body

    body = create_body(parsed, context.environ)
    del body["Image"]
    params: dict[str, Any] = {"name": parsed.args[0], "body": body}
    for flag, name in (
        ("image", "image"), ("size", "size"), ("disk", "more"), ("firmware", "firmware"),
        ("iops", "iops"), ("bps", "bytes_per_second"), ("user", "user"), ("password", "password"),
        ("sata", "sata"), ("screen", "screen"), ("autostart", "autostart"),
    ):  # fmt: skip
        if parsed[flag]:
            params[name] = parsed[flag]
    if parsed["disk"]:
        params["more"] = [_size(text) for text in parsed["disk"]]
    if engine:
        params["engine"] = True
    if parsed["iso"]:
        params["iso"] = os.path.abspath(parsed["iso"])
    if parsed["no-seed"]:
        params["seeded"] = False
    if parsed["ssh-key"]:
        params["keys"] = [key for path in parsed["ssh-key"] for key in _keys(path)]
    if parsed["user-data"]:
        params["user_data"] = _text(parsed["user-data"])
    made = context.call("vm.create", params)
    for warning in made["Warnings"]:
        context.err(f"WARNING: {warning}")
    if parsed["start"]:
        context.call("workload.start", {"id": made["Id"]})
    context.out(made["Id"])


def _size(text: str) -> int:
    from bulkhead.cli.options import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError:
        raise UsageError(f"invalid size: {text!r}") from None


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"cannot read {path}: {error}") from error


def _keys(path: str) -> list[str]:
    if path.startswith(("ssh-", "ecdsa-", "sk-")):
        return [path]
    lines = _text(path).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def rows(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Machines as they are listed."""
    return [
        {
            **one, "ID": one["Id"][:12], "Memory": human_size(one["Memory"]),
            "Disk": human_size(one["Disk"]), "Address": ", ".join(one["Addresses"]),
        }
        for one in found
    ]  # fmt: skip


def ls(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm ls`."""
    MACHINES.show(context, parsed, rows(context.call("vm.list")))


def inspect(context: Context, parsed: Parsed) -> int:
    """`bulkhead vm inspect`."""
    return inspect_objects(context, parsed, ("vm",))


def images(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm images`."""
    found = [
        {
            **one, "Size": human_size(one["Size"]), "Stored": human_size(one["Stored"]),
            "UsedBy": ", ".join(one["UsedBy"]),
        }
        for one in context.call("vm.images")
    ]  # fmt: skip
    IMAGES.show(context, parsed, found)


def rmi(context: Context, parsed: Parsed) -> int:
    """`bulkhead vm rmi`."""

    def act(name: str) -> str:
        context.call("vm.rmi", {"name": name})
        return name

    return context.each(parsed.args, act)


def import_(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm import FILE NAME`."""
    file, name = parsed.args
    params = {"file": os.path.abspath(file), "name": name}
    for flag in ("format", "firmware"):
        if parsed[flag]:
            params[flag] = parsed[flag]
    made = context.call("vm.import", params)
    context.out(f"{made['Name']}: {human_size(made['Size'])}, {made['Origin']}")


def export(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm export VM FILE`."""
    name, file = parsed.args
    kind = parsed["format"] or os.path.splitext(file)[1].lstrip(".").replace("img", "raw")
    made = context.call(
        "vm.export", {"id": name, "file": os.path.abspath(file), "format": kind or "qcow2"}
    )
    context.out(f"{made['File']}: {human_size(made['Size'])}")


def bootstrap(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm bootstrap debian:bookworm`."""
    params: dict[str, Any] = {"name": parsed.args[0]}
    if parsed["include"]:
        params["include"] = [package for package in parsed["include"] if package]
    for flag, name in (("mirror", "mirror"), ("name", "disk"), ("size", "size")):
        if parsed[flag]:
            params[name] = parsed[flag]
    if parsed["lock"]:
        params["lock"] = os.path.abspath(parsed["lock"])
    made = follow(context, "vm.bootstrap", params, Progress(sys.stderr, quiet=parsed["quiet"]))
    context.out(made["Name"])


def snapshot(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm snapshot VM [NAME]`."""
    machine = parsed.args[0]
    if len(parsed.args) == 1:
        if parsed["restore"] or parsed["rm"]:
            raise UsageError("which snapshot? vm snapshot lists them when only the VM is named")
        found = context.call("vm.snapshots", {"id": machine})
        memory = [{**one, "Memory": human_size(one["Memory"])} for one in found]
        SNAPSHOTS.show(context, parsed, memory)
        return
    if parsed["restore"] and parsed["rm"]:
        raise UsageError("--restore and --rm exclude each other")
    act = "restore" if parsed["restore"] else "remove" if parsed["rm"] else "make"
    context.call("vm.snapshot", {"id": machine, "name": parsed.args[1], "act": act})
    context.out(parsed.args[1])


def resize(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm resize VM SIZE`."""
    name, text = parsed.args
    params = {"id": name, "size": _size(text), "disk": parsed["disk"] or 0}
    context.call("vm.resize", params)
    context.out(name)


def update(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm update VM`."""
    params = {"id": parsed.args[0], "memory": parsed["memory"] or 0}
    if parsed["cpus"]:
        params["cpus"] = parsed["cpus"] / 1e9
    context.call("vm.update", params)
    context.out(parsed.args[0])


def autostart(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm autostart VM [on|off]`."""
    word = parsed.args[1] if len(parsed.args) > 1 else "on"
    if word not in ("on", "off"):
        raise UsageError(f"{word!r} is neither on nor off")
    context.call("vm.autostart", {"id": parsed.args[0], "wanted": word == "on"})
    context.out(parsed.args[0])


def reset(context: Context, parsed: Parsed) -> int:
    """`bulkhead vm reset`."""

    def act(name: str) -> str:
        context.call("vm.reset", {"id": name})
        return name

    return context.each(parsed.args, act)


def firmware(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm firmware`."""
    context.out(context.call("vm.firmware")["Code"])


def screen(context: Context, parsed: Parsed) -> None:
    """`bulkhead vm screen VM`: the socket, or a port of the loopback interface that leads to it."""
    path = context.call("vm.inspect", {"id": parsed.args[0]})["Machine"]["Screen"]
    if not path:
        raise Unavailable(f"{parsed.args[0]} has no screen: vm create --screen")
    if not parsed["listen"]:
        context.out(f"unix:{path}")
        return
    from bulkhead.cli.forward import forward

    forward(context, parsed["listen"], path)


def create_options() -> tuple[Option, ...]:
    """Of `vm create` and `machine create`."""
    shared = [one for one in run_options.CREATE if one.name in _SHARED]
    return (
        Option("--image", "string", "Disk image that its first disk lies on (vm images)"),
        Option("--size", "bytes", "Size of the first disk; without --image it is empty"),
        Option("--disk", "list", "Size of a further, empty disk"),
        Option("--iso", "string", "Installation disc, copied into its CD drive", complete="file"),
        Option("--firmware", "string", "uefi or bios; default: what the disk image says",
               choices=("uefi", "bios")),
        Option("--sata", "bool", "SATA disks, for systems without virtio drivers"),
        Option("--screen", "bool", "Graphics card, keyboard and pointer, shown by VNC"),
        Option("--iops", "int", "Limit reads and writes a second of each disk"),
        Option("--bps", "bytes", "Limit bytes a second of each disk"),
        Option("--autostart", "bool", "Start it whenever the engine begins"),
        Option("--start", "bool", "Start it now"),
        Option("--user", "string", "Whom cloud-init makes; default: the disk image's"),
        Option("--ssh-key", "list", "Public key of that user, or a file of such", complete="file"),
        Option("--password", "string", "Password of that user, for the console"),
        Option("--user-data", "string", "cloud-init's user-data, instead of those three",
               complete="file"),
        Option("--no-seed", "bool", "No disk with data for cloud-init"),
        *shared,
    )  # fmt: skip


_FIRMWARE = Option("--firmware", "string", "What boots it: uefi or bios", choices=("uefi", "bios"))
_QUIET = Option("-q, --quiet", "bool", "Only display names")

COMMANDS = {
    "vm create": Command(
        "vm create", "Create a machine with disks of its own", create, arguments="NAME",
        options=create_options(),
        examples=(
            "bulkhead vm create --image debian:bookworm --ssh-key id.pub --start web",
            "bulkhead vm create --iso installer.iso --size 20g --screen --start desktop",
        ),
        least=1, most=1,
    ),
    "vm ls": Command(
        "vm ls", "List machines", ls,
        options=(FORMAT_LONG, JSON, Option("-q, --quiet", "bool", "Only display ids")),
        examples=("bulkhead vm ls",),
    ),
    "vm inspect": Command(
        "vm inspect", "Display detailed information on one or more machines", inspect,
        arguments="VM [VM...]", options=(FORMAT, JSON), examples=("bulkhead vm inspect web",),
        least=1, most=None, completes="container",
    ),
    "vm images": Command(
        "vm images", "List disk images", images, options=(FORMAT_LONG, JSON, _QUIET),
        examples=("bulkhead vm images",),
    ),
    "vm rmi": Command(
        "vm rmi", "Remove one or more disk images", rmi, arguments="IMAGE [IMAGE...]",
        examples=("bulkhead vm rmi debian:bookworm",), least=1, most=None,
    ),
    "vm import": Command(
        "vm import", "Make a disk image from a file", import_, arguments="FILE NAME",
        options=(
            Option("--format", "string",
                   "qcow2, raw, vmdk, vhdx, vhd or vdi; default: what the file is"),
            _FIRMWARE,
        ),
        examples=("bulkhead vm import appliance.ova appliance",), least=2, most=2,
        completes="file",
    ),
    "vm export": Command(
        "vm export", "Write a machine's first disk as a file", export, arguments="VM FILE",
        options=(
            Option("--format", "string", "qcow2, raw, vmdk, vhdx, vhd, vdi; default: by the name"),
        ),
        examples=("bulkhead vm export web web.vmdk",), least=2, most=2, completes="container",
    ),
    "vm bootstrap": Command(
        "vm bootstrap", "Make a bootable disk image from a distribution's packages", bootstrap,
        arguments="debian:SUITE",
        options=(
            Option("--include", "strings", "More packages, by commas"),
            Option("--mirror", "string", "Where the packages come from, as URL"),
            Option("--name", "string", "Name of the disk image; default: debian:SUITE"),
            Option("--size", "bytes", "Size of the disk", default=4 << 30),
            Option("--lock", "string", "Lock file: written, or followed if it exists",
                   complete="file"),
            Option("-q, --quiet", "bool", "Suppress verbose output"),
        ),
        examples=("bulkhead vm bootstrap debian:bookworm",), least=1, most=1,
    ),
    "vm snapshot": Command(
        "vm snapshot", "Save a machine, go back, or list what was saved", snapshot,
        arguments="VM [SNAPSHOT]",
        options=(
            Option("--restore", "bool", "Go back to the snapshot"),
            Option("--rm", "bool", "Forget the snapshot"),
            FORMAT_LONG, JSON, _QUIET,
        ),
        examples=("bulkhead vm snapshot web before", "bulkhead vm snapshot --restore web before"),
        least=1, most=2, completes="container",
    ),
    "vm resize": Command(
        "vm resize", "Make a machine's disk larger", resize, arguments="VM SIZE",
        options=(Option("--disk", "int", "Which disk, from 0", default=0),),
        examples=("bulkhead vm resize web 20g",), least=2, most=2, completes="container",
    ),
    "vm update": Command(
        "vm update", "Change the hardware of a machine that does not run", update, arguments="VM",
        options=(
            Option("--cpus", "decimal", "Number of processors"),
            Option("-m, --memory", "bytes", "Memory"),
        ),
        examples=("bulkhead vm update --memory 2g --cpus 2 web",), least=1, most=1,
        completes="container",
    ),
    "vm autostart": Command(
        "vm autostart", "Start a machine whenever the engine begins, or not", autostart,
        arguments="VM [on|off]", examples=("bulkhead vm autostart web on",), least=1, most=2,
        completes="container",
    ),
    "vm reset": Command(
        "vm reset", "Press the reset button of one or more machines", reset,
        arguments="VM [VM...]", examples=("bulkhead vm reset web",), least=1, most=None,
        completes="container",
    ),
    "vm firmware": Command(
        "vm firmware", "Fetch the UEFI firmware from the distribution, if there is none", firmware,
        examples=("bulkhead vm firmware",),
    ),
    "vm screen": Command(
        "vm screen", "Show where a machine's screen is (VNC)", screen, arguments="VM",
        options=(
            Option("--listen", "string", "Lead there from a port, as [ADDRESS:]PORT, until ^C"),
        ),
        examples=("bulkhead vm screen --listen 5900 desktop",), least=1, most=1,
        completes="container",
    ),
}  # fmt: skip
