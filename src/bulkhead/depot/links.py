"""Which repository has which content: small files beside the content store.

    ROOT/registry/NAME/
      _blobs/HEX              empty: the repository has the blob
      _manifests/HEX          the manifest's media type
      _tags/TAG               the digest it points to
      _referrers/HEX/HEX      (subject / manifest) the referrer's descriptor as JSON

The components of a repository's name never begin with "_". Files are replaced by rename, so a
reader sees the old or the new. The bytes are blobs of the content store; `held` names them for its
garbage collection.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from bulkhead.errors import Invalid

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_LONGEST_NAME = 255
_MOST_TAGS = 100_000


def hexadecimal(digest: str) -> str:
    """The HEX of "sha256:HEX"; Invalid for anything else."""
    algorithm, _, text = digest.partition(":")
    if algorithm != "sha256" or not _HEX.match(text):
        raise Invalid(f"{digest!r} is not a sha256 digest")
    return text


def check_name(name: str) -> str:
    """The name; Invalid if it is none."""
    if len(name) > _LONGEST_NAME or not NAME.match(name):
        raise Invalid(f"invalid repository name {name!r}")
    return name


def _write(path: str, text: str) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    fresh = f"{folder}/.{secrets.token_hex(8)}"
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(fresh, path)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _names(path: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


class Repository:
    """One repository; `name` was checked."""

    def __init__(self, root: str, name: str) -> None:
        self.name = name
        self._path = f"{root}/{name}"

    @property
    def exists(self) -> bool:
        """Whether anything was pushed to it."""
        return os.path.isdir(f"{self._path}/_manifests") or os.path.isdir(f"{self._path}/_blobs")

    # --- blobs

    def has_blob(self, digest: str) -> bool:
        """Whether it has the blob."""
        return os.path.exists(f"{self._path}/_blobs/{hexadecimal(digest)}")

    def link_blob(self, digest: str) -> None:
        """It has it now."""
        _write(f"{self._path}/_blobs/{hexadecimal(digest)}", "")

    def unlink_blob(self, digest: str) -> bool:
        """It has it no longer; whether it had."""
        return _unlink(f"{self._path}/_blobs/{hexadecimal(digest)}")

    # --- manifests

    def manifest(self, digest: str) -> str | None:
        """The media type of a manifest it has."""
        return _read(f"{self._path}/_manifests/{hexadecimal(digest)}")

    def manifests(self) -> list[str]:
        """Digests of all of them."""
        return [f"sha256:{name}" for name in _names(f"{self._path}/_manifests")]

    def link_manifest(self, digest: str, media_type: str) -> None:
        """It has it now."""
        _write(f"{self._path}/_manifests/{hexadecimal(digest)}", media_type)

    def unlink_manifest(self, digest: str) -> bool:
        """It has it no longer, nor tags of it; whether it had."""
        for tag in self.tags():
            if self.tag(tag) == digest:
                self.untag(tag)
        gone = _unlink(f"{self._path}/_manifests/{hexadecimal(digest)}")
        for subject in _names(f"{self._path}/_referrers"):
            _unlink(f"{self._path}/_referrers/{subject}/{hexadecimal(digest)}")
        return gone

    # --- tags

    def tags(self) -> list[str]:
        """All tags, sorted."""
        return _names(f"{self._path}/_tags")[:_MOST_TAGS]

    def tag(self, tag: str) -> str | None:
        """The digest a tag points to."""
        if not TAG.match(tag):
            raise Invalid(f"invalid tag {tag!r}")
        return _read(f"{self._path}/_tags/{tag}")

    def give_tag(self, tag: str, digest: str) -> None:
        """Let it point there."""
        if not TAG.match(tag):
            raise Invalid(f"invalid tag {tag!r}")
        _write(f"{self._path}/_tags/{tag}", digest)

    def untag(self, tag: str) -> bool:
        """Drop it; whether there was one."""
        return bool(TAG.match(tag)) and _unlink(f"{self._path}/_tags/{tag}")

    def tagged_at(self, tag: str) -> float:
        """When it was given, seconds since 1970."""
        try:
            return os.stat(f"{self._path}/_tags/{tag}").st_mtime
        except FileNotFoundError:
            return 0.0

    # --- referrers

    def refer(self, subject: str, digest: str, descriptor: dict[str, Any]) -> None:
        """`digest` is about `subject`, which need not exist."""
        path = f"{self._path}/_referrers/{hexadecimal(subject)}/{hexadecimal(digest)}"
        _write(path, json.dumps(descriptor))

    def referrers(self, subject: str) -> list[dict[str, Any]]:
        """Descriptors of what is about `subject`."""
        folder = f"{self._path}/_referrers/{hexadecimal(subject)}"
        found = []
        for name in _names(folder):
            text = _read(f"{folder}/{name}")
            if text is not None:
                found.append(json.loads(text))
        return found


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def repositories(root: str) -> Iterator[str]:
    """Names of all repositories, sorted within each level."""

    def walk(prefix: str) -> Iterator[str]:
        folder = f"{root}/{prefix}" if prefix else root
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(folder))
            if "_manifests" in names:
                yield prefix
            for name in names:
                if not name.startswith(("_", ".")) and os.path.isdir(f"{folder}/{name}"):
                    yield from walk(f"{prefix}/{name}".lstrip("/"))

    yield from walk("")


def held(root: str, layer_of: Callable[[str], dict[str, object] | None]) -> set[str]:
    """Every digest that some repository has, with the layers that blobs are made of.

    `layer_of` is the store's `provenance`.
    """
    found: set[str] = set()
    for folder, _, names in os.walk(root):
        if os.path.basename(folder) in ("_blobs", "_manifests"):
            found.update(f"sha256:{name}" for name in names if _HEX.match(name))
    made = [record for digest in found if (record := layer_of(digest)) is not None]
    return found | {str(record["diff_id"]) for record in made}
