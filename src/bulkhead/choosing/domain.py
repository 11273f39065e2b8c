"""Items from what virtual machines are made of: libvirt's domain XML, and disks."""

import os
from xml.etree.ElementTree import Element

from bulkhead.choosing.documents import elements, xml_root
from bulkhead.choosing.facts import SAID, statement
from bulkhead.choosing.items import Item, memory
from bulkhead.choosing.words import read
from bulkhead.errors import Invalid
from bulkhead.machines import foreign

DISKS = (".qcow2", ".vmdk", ".vhd", ".vhdx", ".vdi", ".img", ".raw", ".ova")
_ARCHITECTURES = {"x86_64": "amd64", "i686": "386", "aarch64": "arm64", "ppc64le": "ppc64le",
                  "s390x": "s390x", "riscv64": "riscv64"}  # fmt: skip
_BSD = ("freebsd", "openbsd", "netbsd", "solaris", "illumos", "haiku")


def _texts(root: Element, path: str) -> list[str]:
    return [(one.text or "").strip() for one in elements(root, path)]


def _first(root: Element, path: str) -> str:
    return next(iter(_texts(root, path)), "")


def items(data: bytes, source: str) -> list[Item]:
    """The domains of a file: one domain, or several in an element around them."""
    root = xml_root(data, source)
    name = root.tag.rpartition("}")[2]
    domains = [root] if name == "domain" else list(elements(root, "domain"))
    if not domains:
        raise Invalid(f"{source}: <{name}> is no libvirt domain")
    return [_domain(one, source) for one in domains]


def _domain(root: Element, source: str) -> Item:
    name = _first(root, "name")
    item = Item(name=name or "unnamed", kind="domain", source=source)
    scale = next((one.get("unit") or "KiB" for one in elements(root, "memory")), "KiB")
    item.memory = memory(_first(root, "memory") + scale, f"{source}: memory")
    vcpus = _first(root, "vcpu")
    item.nano_cpus = int(vcpus) * 10**9 if vcpus.isdecimal() and len(vcpus) < 6 else 0
    kind = next(iter(elements(root, "os/type")), None)
    architecture = kind.get("arch", "") if kind is not None else ""
    item.architecture = _ARCHITECTURES.get(architecture, architecture)
    item.os = _system(root, name)
    item.stated.append(statement("form=disk", "a virtual machine's domain", SAID))
    for disk in elements(root, "devices/disk"):
        if disk.get("device", "disk") == "disk":
            for place in elements(disk, "source"):
                path = place.get("file") or place.get("dev") or place.get("name") or ""
                if path:
                    item.disks.append(path)
    item.disk_bytes = sum(os.stat(one).st_blocks * 512 for one in item.disks if _is_file(one))
    for network in elements(root, "devices/interface"):
        for place in elements(network, "source"):
            item.networks.append(place.get("network") or place.get("bridge") or "")
    item.networks = [one for one in item.networks if one not in ("", "default")]
    _demands(root, item)
    words = _first(root, "description")
    if words:
        item.stated += read(words)
    return item


def _is_file(path: str) -> bool:
    return path.startswith("/") and os.path.isfile(path)


def _system(root: Element, name: str) -> str:
    told = [
        one.get("id", "").lower()
        for one in root.iter()
        if one.tag.rpartition("}")[2] == "os" and one.get("id")
    ]
    for text in [*told, name.lower()]:
        if "microsoft" in text or "windows" in text:
            return "windows"
        if any(one in text for one in _BSD):
            return "other"
    return "linux" if told else ""


def _demands(root: Element, item: Item) -> None:
    if any(True for _ in elements(root, "cputune/vcpupin")):
        item.stated.append(statement("guarantee=reserved", "its processors are pinned", SAID))
    devices = [one.get("type", "") for one in elements(root, "devices/hostdev")]
    if devices:
        item.stated.append(
            statement("hardware=passthrough", f"host devices ({', '.join(devices)})", SAID)
        )
        item.notes.append("host devices cannot be passed through yet")
    if any(True for _ in elements(root, "devices/tpm")):
        item.notes.append("its TPM is not carried over")
    if any(one.get("secure") == "yes" for one in elements(root, "os/loader")):
        item.notes.append("Secure Boot is not supported yet")
    if any(one.get("type", "").startswith("pflash") for one in elements(root, "os/loader")):
        item.options.append("--firmware=uefi")
    if not item.disks:
        item.notes.append("it has no disk that is a file")
    for one in item.disks[1:]:
        item.notes.append(f"a further disk has to be attached by hand: {one}")


def disk(path: str) -> Item:
    """The item that a disk image is."""
    form = "ova" if path.lower().endswith(".ova") else foreign.detect(path)
    name = os.path.basename(path).rpartition(".")[0].lower() or "machine"
    name = "".join(one if one.isalnum() or one in "._-" else "-" for one in name).strip("-._")
    item = Item(name=name or "machine", kind="disk", source=path, disks=[os.path.abspath(path)])
    item.disk_bytes = os.stat(path).st_blocks * 512
    item.stated.append(statement("form=disk", f"a disk ({form})", SAID))
    if _system_in(name):
        item.os = _system_in(name)
    return item


def _system_in(name: str) -> str:
    if "windows" in name or name.startswith(("win10", "win11", "win2", "winsrv")):
        return "windows"
    return "other" if any(one in name for one in _BSD) else ""
