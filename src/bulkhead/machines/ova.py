"""An OVA: a tar archive with a description (.ovf, XML) and the disk it names.

Read as hostile: one pass over the headers, plain members only, sizes bounded, no document type in
the XML (so no entities), names used as names and never as paths.
"""

import hashlib
import os
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

from bulkhead.errors import Corrupt, Invalid

_MOST_TEXT = 4 << 20
_MOST_MEMBERS = 64
_PIECE = 1 << 20
_MEMORY, _PROCESSORS = "4", "3"
"""CIM resource types."""


@dataclass(frozen=True, slots=True)
class Described:
    """What the description says; 0 or "" where it says nothing."""

    disk: str
    memory_bytes: int
    vcpus: int
    firmware: str


def is_ova(path: str) -> bool:
    """Whether it is a tar archive that begins with a description."""
    try:
        with tarfile.open(path, "r:") as archive:
            first = archive.next()
    except (tarfile.TarError, OSError, ValueError):
        return False
    return first is not None and first.name.lower().endswith(".ovf")


def unpack(path: str, target: str) -> Described:
    """Write the archive's only disk to `target`; Invalid for what it cannot be."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = _members(archive, path)
            texts = [name for name in members if name.lower().endswith(".ovf")]
            if len(texts) != 1:
                raise Invalid(f"{path} has {len(texts)} descriptions (.ovf), not one")
            said = describe(_text(archive, members[texts[0]]), path)
            if said.disk not in members:
                raise Invalid(f"{path} describes the disk {said.disk!r}, which is not in it")
            sums = _sums(archive, members)
            found = _copy(archive, members[said.disk], target)
            if sums.get(said.disk, found) != found:
                raise Corrupt(f"{path}: {said.disk} is not what the manifest says")
            return said
    except (tarfile.TarError, EOFError) as error:
        raise Invalid(f"{path} is a damaged OVA: {error}") from error


def _members(archive: tarfile.TarFile, path: str) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    while (member := archive.next()) is not None:
        if len(found) >= _MOST_MEMBERS:
            raise Invalid(f"{path} has more than {_MOST_MEMBERS} members")
        if not member.isreg() or member.issparse():
            raise Invalid(f"{path}: {member.name[:80]!r} is not a plain file")
        name = member.name.removeprefix("./")
        if name in found:
            raise Invalid(f"{path} has {name[:80]!r} twice")
        found[name] = member
    return found


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > _MOST_TEXT:
        raise Invalid(f"{member.name[:80]!r} has more than {_MOST_TEXT >> 20} MiB")
    file = archive.extractfile(member)
    assert file is not None
    with file:
        return file.read(_MOST_TEXT).decode("utf-8", "replace")


class _Builder(ElementTree.TreeBuilder):
    """Takes no document type; the parser tells of one before it reads what that declares."""

    def doctype(self, name: str, pubid: str, system: str) -> None:
        """Invalid."""
        raise Invalid("the description has a document type, which none needs")


def describe(text: str, path: str) -> Described:
    """What the .ovf `text` says."""
    try:
        parser = ElementTree.XMLParser(target=_Builder())  # noqa: S314 - so no entities
        root = ElementTree.fromstring(text, parser)  # noqa: S314
    except Invalid as error:
        raise Invalid(f"{path}: {error.message}") from None
    except ElementTree.ParseError as error:
        raise Invalid(f"{path}: the description is not XML: {error}") from error
    files = {_get(one, "id"): _get(one, "href") for one in _all(root, "File")}
    disks = [_get(one, "fileRef") for one in _all(root, "Disk") if _get(one, "fileRef")]
    if len(disks) != 1 or disks[0] not in files:
        raise Invalid(f"{path} has {len(disks)} disks; one is supported")
    memory = vcpus = 0
    for item in _all(root, "Item"):
        values = {one.tag.rpartition("}")[2]: (one.text or "").strip() for one in item}
        quantity = values.get("VirtualQuantity", "")
        if not quantity.isdecimal() or len(quantity) > 12:
            continue
        if values.get("ResourceType") == _MEMORY:
            memory = int(quantity) << 20
        elif values.get("ResourceType") == _PROCESSORS:
            vcpus = int(quantity)
    return Described(files[disks[0]], memory, vcpus, _firmware(root))


def _firmware(root: ElementTree.Element) -> str:
    for one in _all(root, "Config"):
        if _get(one, "key") == "firmware":
            return "uefi" if _get(one, "value") == "efi" else "bios"
    return ""


def _all(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [one for one in root.iter() if one.tag.rpartition("}")[2] == name]


def _get(element: ElementTree.Element, name: str) -> str:
    for key, value in element.attrib.items():
        if key.rpartition("}")[2] == name:
            return value
    return ""


def _sums(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, str]:
    """SHA256 sums of the manifest, by member; weaker ones are not worth comparing."""
    found: dict[str, str] = {}
    for name, member in members.items():
        if name.lower().endswith(".mf"):
            for match in re.finditer(r"SHA256\s?\(([^)]+)\)\s*=\s*([0-9a-fA-F]{64})",
                                     _text(archive, member)):  # fmt: skip
                found[match[1]] = match[2].lower()
    return found


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, target: str) -> str:
    """Copy a member, leaving holes where it has zeros; its SHA256."""
    source = archive.extractfile(member)
    assert source is not None
    found = hashlib.sha256()
    with source, open(target, "xb") as out:
        while piece := source.read(_PIECE):
            found.update(piece)
            if piece.count(0) == len(piece):
                out.seek(len(piece), os.SEEK_CUR)
            else:
                out.write(piece)
        out.truncate(member.size)
    return found.hexdigest()
