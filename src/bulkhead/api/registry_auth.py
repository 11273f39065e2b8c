"""Credentials in headers: `X-Registry-Auth` and `X-Registry-Config`, base64url of JSON."""

import base64
import binascii
from typing import Any

import msgspec

from bulkhead.api.exchange import Exchange
from bulkhead.errors import Invalid

_MEMBERS = ("username", "password", "auth", "serveraddress", "identitytoken", "registrytoken")


def _decoded(x: Exchange, name: str) -> dict[str, Any]:
    text = x.header(name).strip()
    if not text:
        return {}
    try:
        # Both alphabets, with padding or without: clients differ.
        plain = text.replace("+", "-").replace("/", "_").rstrip("=")
        data = base64.urlsafe_b64decode(plain + "=" * (-len(plain) % 4))
        found = msgspec.json.decode(data) if data else {}
    except (binascii.Error, ValueError, msgspec.DecodeError):
        raise Invalid(f"invalid {name} header: it is not base64 of JSON") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Invalid(f"invalid {name} header: it is not an object")
    return found


def credentials(given: dict[str, Any]) -> dict[str, Any] | None:
    """One registry's credentials in the engine's names; None if there are none."""
    lower = {name.lower(): value for name, value in given.items()}
    found = {n: lower[n] for n in _MEMBERS if isinstance(lower.get(n), str) and lower[n]}
    return found if set(found) - {"serveraddress"} else None


def registry_auth(x: Exchange) -> dict[str, Any] | None:
    """`X-Registry-Auth`: the credentials for this request's registry."""
    return credentials(_decoded(x, "x-registry-auth"))


def registry_config(x: Exchange) -> dict[str, dict[str, Any]]:
    """`X-Registry-Config`: credentials by registry, for builds."""
    found = {}
    for host, given in _decoded(x, "x-registry-config").items():
        known = credentials(given) if isinstance(given, dict) else None
        if known is not None:
            found[host] = known
    return found
