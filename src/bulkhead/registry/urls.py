"""URLs that a registry names: read in one way only, or refused.

Two parsers that disagree about the host are how a check is passed and another place reached; so
user information, backslashes and anything unprintable are refused, and urllib3, which connects,
must see the same host as urllib.parse, which is checked.
"""

import urllib.parse

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from bulkhead.errors import Denied, Invalid


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host (without brackets) and port; Invalid unless it is a plain http(s) URL."""
    shown = repr(url[:200])
    if not url.isascii() or not url.isprintable() or "\\" in url or " " in url:
        raise Invalid(f"{shown} is not a URL")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
        connected = parse_url(url)
    except (ValueError, LocationParseError) as error:
        raise Invalid(f"{shown} is not a URL") from error
    if parts.scheme not in ("http", "https") or not host:
        raise Invalid(f"{shown} is not an http or https URL")
    if "@" in parts.netloc or (connected.host or "").strip("[]").lower() != host:
        raise Invalid(f"{shown} is not a URL to follow: its host is ambiguous")
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def follow(base: str, location: str, what: str) -> str:
    """The URL a Location header means; Denied if it would leave https for http."""
    try:
        target = urllib.parse.urljoin(base, location)
    except ValueError as error:
        raise Invalid(f"{what}: {location[:200]!r} is not a URL") from error
    scheme = origin(target)[0]
    if origin(base)[0] == "https" and scheme != "https":
        raise Denied(f"{what} points from https to {scheme}: {target[:200]}; refused")
    return target
