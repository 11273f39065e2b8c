"""What registries say without anything being pulled: an image's descriptor, and searches."""

import json
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bulkhead.errors import Corrupt, Invalid
from bulkhead.oci import image as oci
from bulkhead.oci.reference import DEFAULT_DOMAIN, Reference
from bulkhead.registry import config as configuration
from bulkhead.registry.client import Fetched, Repository
from bulkhead.registry.credentials import Credentials
from bulkhead.registry.transport import Call, Transport

_INDEX = "index.docker.io"
"""Docker Hub's host for searches."""
MOST_FOUND = 100
_LARGEST = 4 << 20


def distribution(repository: Repository, reference: Reference) -> dict[str, Any]:
    """Docker's DistributionInspect: the descriptor of a tag or digest, and its platforms."""
    fetched = repository.manifest(reference.digest or reference.tag or "latest")
    descriptor = {
        "mediaType": fetched.media_type,
        "digest": fetched.digest,
        "size": len(fetched.data),
    }
    return {"Descriptor": descriptor, "Platforms": _platforms(repository, fetched)}


def _platforms(repository: Repository, fetched: Fetched) -> list[dict[str, Any]]:
    if fetched.media_type in oci.INDEXES:
        index = oci.decode_index(fetched.data, fetched.media_type)
        found = [one.platform for one in index.manifests if one.platform is not None]
        return [msgspec.to_builtins(platform) for platform in found]
    manifest = oci.decode_manifest(fetched.data, fetched.media_type)
    config = repository.small_blob(manifest.config.digest, manifest.config.size)
    known = oci.decode_config(config)
    platform = oci.Platform(known.architecture, known.os, known.variant)
    return [msgspec.to_builtins(platform)]


def search(
    term: str,
    limit: int,
    filters: Mapping[str, Sequence[str]],
    credentials: Credentials | None,
    registries: configuration.Registries | None,
) -> list[dict[str, Any]]:
    """Docker's ImageSearch: what a registry's index finds for "[host/]term"."""
    if not 1 <= limit <= MOST_FOUND:
        raise Invalid(f"limit {limit} is outside the range of [1, {MOST_FOUND}]")
    host, separator, rest = term.partition("/")
    own = bool(separator) and ("." in host or ":" in host or host == "localhost")
    domain, words = (host, rest) if own else (DEFAULT_DOMAIN, term)
    config = configuration.load() if registries is None else registries
    where = configuration.endpoint(_INDEX if domain == DEFAULT_DOMAIN else domain, config)
    transport = Transport(where, credentials)
    query = urllib.parse.urlencode({"q": words, "n": limit})
    try:
        what = f"search for {term}"
        with transport.send(Call("GET", f"/v1/search?{query}", "", what)) as answer:
            data = answer.read_all(_LARGEST, what)
    finally:
        transport.close()
    return [one for one in _results(data, domain) if _passes(one, filters)][:limit]


def _results(data: bytes, domain: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(data)["results"]
        return [
            {
                "name": str(one["name"]) if domain == DEFAULT_DOMAIN else f"{domain}/{one['name']}",
                "description": str(one.get("description") or ""),
                "star_count": int(one.get("star_count") or 0),
                "is_official": bool(one.get("is_official")),
                "is_automated": False,
            }
            for one in found
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{domain}: the answer to the search is not understood") from error


def _passes(one: Mapping[str, Any], filters: Mapping[str, Sequence[str]]) -> bool:
    for key, values in filters.items():
        if key == "stars":
            if not all(value.isdigit() for value in values):
                raise Invalid("invalid filter 'stars'")
            if one["star_count"] < max(int(value) for value in values):
                return False
        elif key in {"is-official", "is-automated"}:
            wanted = "true" in values
            if one[key.replace("-", "_")] != wanted:
                return False
        else:
            raise Invalid(f"invalid filter '{key}'")
    return True
