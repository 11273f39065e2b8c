"""What lies at a path: Compose files, manifests, domains, disks, folders of them."""

import os
from collections.abc import Mapping

from bulkhead.choosing import compose, domain, kubernetes
from bulkhead.choosing.documents import MOST_BYTES, yaml_documents
from bulkhead.choosing.items import Item
from bulkhead.errors import Invalid, NotFound

MOST_FILES = 2000
_YAML = (".yaml", ".yml", ".json")


def items(path: str, environ: Mapping[str, str]) -> list[Item]:
    """The items at a path, all of a folder's (and those below it) in the order of their names.

    In a folder, files that are none of the kinds are passed over; one that is named must be.
    """
    if os.path.isdir(path):
        found: list[Item] = []
        for one in _files(path):
            found += _file(one, environ, sure=False)
        return found
    if not os.path.lexists(path):
        raise NotFound(f"{path}: no such file or folder")
    return _file(path, environ, sure=True)


def _files(folder: str) -> list[str]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        found += [os.path.join(where, name) for name in names if not name.startswith(".")]
        if len(found) > MOST_FILES:
            raise Invalid(f"{folder}: more than {MOST_FILES} files: name what is meant")
    return sorted(found)


def _file(path: str, environ: Mapping[str, str], *, sure: bool) -> list[Item]:
    lower = path.lower()
    if lower.endswith(domain.DISKS):
        return [domain.disk(path)]
    if lower.endswith(".xml"):
        data = _read(path)
        if not sure and b"<domain" not in data:
            return []
        return domain.items(data, path)
    if lower.endswith(_YAML):
        return _yaml(path, environ, sure=sure)
    if sure:
        data = _read(path)
        if data.lstrip().startswith(b"<"):
            return domain.items(data, path)
        return _yaml(path, environ, sure=True)
    return []


def _yaml(path: str, environ: Mapping[str, str], *, sure: bool) -> list[Item]:
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"{path}: not text: {error.reason}") from error
    documents = yaml_documents(text, path)
    if any(compose.is_compose(one) for one in documents):
        return compose.items(text, path, environ)
    if any(kubernetes.is_manifest(one) for one in documents):
        return kubernetes.items(text, path)
    if sure:
        raise Invalid(f"{path}: neither a Compose file nor a manifest")
    return []


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise Invalid(f"{path}: larger than {MOST_BYTES >> 20} MiB")
    return data
