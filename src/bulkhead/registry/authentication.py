"""Answers to a registry's challenges: basic credentials, and bearer tokens from its token service.

The token protocol is distribution's docs/spec/auth/token.md and oauth.md. The token service may be
another host than the registry (Docker Hub's is), but it must be reached by https; plain http is
allowed only if the registry itself was reached so, and the service is the same host or loopback.
"""

import base64
import threading
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.errors import Denied, Invalid, Unavailable
from bulkhead.oci.distribution import Challenge, challenges
from bulkhead.registry.config import is_loopback_name
from bulkhead.registry.credentials import ANONYMOUS, Credentials
from bulkhead.registry.urls import origin

if TYPE_CHECKING:
    from bulkhead.registry.transport import Transport

_LARGEST_ANSWER = 1 << 20
_SHORTEST_LIFE_S = 60.0
_MARGIN_S = 10.0


class Authenticator:
    """Remembers what one registry asked for and the tokens it gave. Safe for threads."""

    def __init__(
        self, transport: "Transport", credentials: Credentials | None, *, offline: bool = False
    ) -> None:
        self._transport = transport
        self._offline = offline
        self.identity_token = ""
        """With `offline`: what the token service gave to be shown instead of the password."""
        self._credentials = credentials or ANONYMOUS
        self._lock = threading.Lock()
        self._basic = False
        self._service: Challenge | None = None
        self._tokens: dict[str, tuple[str, float]] = {}

    def header(self, scope: str) -> str | None:
        """The Authorization to send for `scope`, as far as the registry has asked for one."""
        if self._credentials.registry_token:
            return f"Bearer {self._credentials.registry_token}"
        with self._lock:
            if self._basic:
                return self._basic_header()
            if self._service is None:
                return None
            token, until = self._tokens.get(scope, ("", 0.0))
            if not token or until <= self._transport.clock.monotonic():
                token = self._fetch(self._service, scope, self._transport.endpoint.host)
            return f"Bearer {token}"

    def answer(self, headers: Sequence[str], scope: str, what: str, sent: str) -> bool:
        """Take the challenges of a 401 in; whether another try with `header` may succeed.

        `sent` is the Authorization that was refused, "" if none: another thread may have got a
        better one meanwhile.

        Denied when the token service refuses, or must not be asked.
        """
        offered = [challenge for header in headers for challenge in challenges(header)]
        bearer = next(
            (c for c in offered if c.scheme == "bearer" and "realm" in c.parameters), None
        )
        with self._lock:
            if bearer is not None and not self._credentials.registry_token:
                known, until = self._tokens.get(scope, ("", 0.0))
                fresh = known and until > self._transport.clock.monotonic()
                if not fresh or f"Bearer {known}" == sent:
                    self._fetch(bearer, scope, what)
                self._service = bearer
                return True
            basic = any(challenge.scheme == "basic" for challenge in offered)
            refused = sent == self._basic_header()
            if not basic or refused or not self._credentials.password:
                return False
            self._basic = True
            return True

    def _basic_header(self) -> str:
        plain = f"{self._credentials.username}:{self._credentials.password}".encode()
        return "Basic " + base64.b64encode(plain).decode()

    def _fetch(self, service: Challenge, scope: str, what: str) -> str:
        """A token for `scope`, which is remembered while it lasts."""
        realm = service.parameters["realm"]
        self._check_realm(realm, what)
        scopes = list(dict.fromkeys([*scope.split(), *service.parameters.get("scope", "").split()]))
        parameters = [("service", service.parameters.get("service", ""))]
        answer = self._ask(realm, [p for p in parameters if p[1]], scopes, what)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not token or not _is_visible(token):
            raise Denied(f"{what}: the token service {realm[:200]} gave no usable token")
        lasting = answer.get("refresh_token")
        if self._offline and isinstance(lasting, str) and _is_visible(lasting):
            self.identity_token = lasting
        life = answer.get("expires_in")
        life_s = float(life) if isinstance(life, int | float) else _SHORTEST_LIFE_S
        until = self._transport.clock.monotonic() + max(life_s, _SHORTEST_LIFE_S) - _MARGIN_S
        self._tokens[scope] = (token, until)
        return token

    def _check_realm(self, realm: str, what: str) -> None:
        try:
            scheme, host, _ = origin(realm)
        except Invalid:
            scheme, host = "", ""
        base_scheme, base_host, _ = origin(self._transport.base_so_far())
        plain = base_scheme == "http" and (host == base_host or is_loopback_name(host))
        if scheme != "https" and not (scheme == "http" and plain):
            raise Denied(
                f"{what}: the registry sends credentials to {realm[:200]!r}, which is not https; "
                "refused"
            )

    def _ask(
        self, realm: str, parameters: list[tuple[str, str]], scopes: list[str], what: str
    ) -> dict[str, Any]:
        credentials = self._credentials
        headers: dict[str, str] = {}
        if credentials.identity_token:
            form = [
                *parameters,
                ("grant_type", "refresh_token"),
                ("refresh_token", credentials.identity_token),
                ("client_id", "bulkhead"),
                ("scope", " ".join(scopes)),
            ]
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            return self._send("POST", realm, headers, urllib.parse.urlencode(form).encode(), what)
        query = [*parameters, *(("scope", scope) for scope in scopes)]
        if credentials.password:
            query.append(("account", credentials.username))
            headers["Authorization"] = self._basic_header()
            if self._offline:
                query += [("offline_token", "true"), ("client_id", "bulkhead")]
        separator = "&" if urllib.parse.urlsplit(realm).query else "?"
        url = realm + separator + urllib.parse.urlencode(query)
        return self._send("GET", url, headers, None, what)

    def _send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None, what: str
    ) -> dict[str, Any]:
        with self._transport.once(method, url, headers, body) as answer:
            if answer.status in (401, 403):
                raise Denied(
                    f"{what}: the token service refuses the credentials for "
                    f"{self._transport.endpoint.host} (wrong user name or password?)"
                )
            if answer.status != 200:
                raise Unavailable(f"{what}: the token service answers {answer.status}")
            data = answer.read_all(_LARGEST_ANSWER, "the token service's answer")
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Denied(f"{what}: the token service's answer is not JSON") from error


def _is_visible(token: str) -> bool:
    """Whether `token` can stand in a header: printable ASCII without blanks."""
    return token.isascii() and token.isprintable() and " " not in token
