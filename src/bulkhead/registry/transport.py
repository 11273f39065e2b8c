"""HTTP to one registry endpoint: authentication, redirects, retries.

Rules that keep secrets: Authorization goes to the endpoint's own origin only, never along a
redirect to another; an answer that came by https never leads to http. Every answer is bounded.
"""

import ssl
import threading
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, NewConnectionError, SSLError

from bulkhead.errors import BulkheadError, Denied, Invalid, NotFound, Unavailable
from bulkhead.oci.distribution import error_text
from bulkhead.registry.answer import Answer, unreachable
from bulkhead.registry.authentication import Authenticator
from bulkhead.registry.certificates import context_for
from bulkhead.registry.config import Endpoint
from bulkhead.registry.credentials import Credentials
from bulkhead.registry.urls import follow, origin
from bulkhead.registry.waiting import Cancel, Clock, Interrupted, RealClock, delay

MOST_REDIRECTS = 5
LARGEST_ERROR = 64 << 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_AGAIN = frozenset({429, 500, 502, 503, 504})

Body = bytes | Iterable[bytes] | None


@dataclass(frozen=True, slots=True)
class Limits:
    """Patience: seconds for connecting and for each read, and attempts per request."""

    connect_s: float = 20.0
    read_s: float = 60.0
    attempts: int = 5


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a registry.

    `path` is below the endpoint, or a full URL that the endpoint gave. `what` names it in errors.
    A status not in `accept` is an error. `retry` False: it is tried once.
    """

    method: str
    path: str
    scope: str
    what: str
    headers: Mapping[str, str] | None = None
    body: Body = None
    accept: frozenset[int] = frozenset({200})
    retry: bool = True


class Transport:
    """Requests to one endpoint, and to where it redirects. Safe for threads."""

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: Credentials | None,
        *,
        cancel: Cancel | None = None,
        clock: Clock | None = None,
        limits: Limits | None = None,
        offline: bool = False,
    ) -> None:
        """`offline`: ask for a token that outlasts this, `identity_token`."""
        self.endpoint = endpoint
        self.cancel = cancel or Cancel()
        self.clock: Clock = clock or RealClock()
        self.limits = limits or Limits()
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._tls: ssl.SSLContext | None = None
        self._auth = Authenticator(self, credentials, offline=offline)
        self._base: str | None = None
        self._setup = threading.RLock()  # pools and the base URL are made once

    @property
    def identity_token(self) -> str:
        """What the token service gave to be shown instead of the password, "" if nothing."""
        return self._auth.identity_token

    def close(self) -> None:
        """Close idle connections."""
        for pool in self._pools.values():
            pool.clear()

    def _pool(self, url: str) -> urllib3.PoolManager:
        """The connections for `url`: direct ones, or those of the environment's proxy."""
        scheme, host, _ = origin(url)
        proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
        proxy = proxies.get(scheme) or proxies.get("all") or ""
        with self._setup:
            if proxy not in self._pools:
                self._pools[proxy] = self._new_pool(proxy)
            return self._pools[proxy]

    def _new_pool(self, proxy: str) -> urllib3.PoolManager:
        if self._tls is None:
            self._tls = context_for(self.endpoint)
        if not self.endpoint.verify:  # the user said so, in writing
            urllib3.disable_warnings(InsecureRequestWarning)
        timeout = urllib3.Timeout(connect=self.limits.connect_s, read=self.limits.read_s)
        if proxy:
            return urllib3.ProxyManager(proxy, ssl_context=self._tls, timeout=timeout, maxsize=8)
        return urllib3.PoolManager(ssl_context=self._tls, timeout=timeout, maxsize=8)

    def base(self) -> str:
        """The endpoint's URL, found by asking /v2/ over its schemes in order."""
        with self._setup:
            if self._base is None:
                self._base = self._probe()
            return self._base

    def base_so_far(self) -> str:
        """`base()`; while it is still being looked for, the endpoint by its first scheme."""
        return self._base or f"{self.endpoint.schemes[0]}://{self.endpoint.host}"

    def _probe(self) -> str:
        schemes = self.endpoint.schemes
        for scheme in schemes[:-1]:
            base = f"{scheme}://{self.endpoint.host}"
            try:
                with self.once("GET", f"{base}/v2/", {}, None):
                    return base
            except Interrupted as error:
                if not _speaks_plain(error):
                    raise
        return f"{schemes[-1]}://{self.endpoint.host}"

    def once(self, method: str, url: str, headers: Mapping[str, str], body: Body) -> Answer:
        """One request: no redirect followed, no retry; the answer is the caller's to close.

        Interrupted when the connection cannot be made or breaks.
        """
        self.cancel.check()
        sent = {"User-Agent": "bulkhead", "Accept-Encoding": "identity", **headers}
        try:
            response = self._pool(url).request(
                method,
                url,
                body=body,
                headers=sent,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except (HTTPError, OSError) as error:
            self.cancel.check()
            raise unreachable(url, error) from error
        return Answer(url, response, self.cancel)

    def send(self, call: Call) -> Answer:
        """`call` with authentication, redirects and, unless its body is a stream, retries.

        NotFound (404), Denied (401, 403), Unavailable (429, 5xx, no connection), else Invalid.
        """
        url = call.path if "://" in call.path else self.base() + call.path
        attempts = self.limits.attempts if call.retry and not _is_stream(call.body) else 1
        attempt = 0
        while True:
            asked = 0.0
            try:
                answer = self._authorized(call, url)
                if answer.status in call.accept:
                    return answer
                with answer:
                    asked = _retry_after(answer)
                    raise self._failure(answer, call.what)
            except Unavailable as error:
                self.cancel.check()
                attempt += 1
                if attempt >= attempts or not _worth_retrying(error):
                    raise
            self.clock.sleep(delay(attempt - 1, self.clock, asked), self.cancel)

    def _authorized(self, call: Call, url: str) -> Answer:
        """Follow redirects; answer a challenge of the endpoint's own origin once."""
        home = origin(self.base())
        challenged = False
        for _ in range(MOST_REDIRECTS + 2):
            sent = dict(call.headers or {})
            at_home = origin(url) == home
            if at_home and (authorization := self._auth.header(call.scope)):
                sent["Authorization"] = authorization
            answer = self.once(call.method, url, sent, call.body)
            redirected = answer.status in _REDIRECTS and call.method in ("GET", "HEAD")
            unknown = answer.status == 401 and at_home and not challenged
            if not redirected and not unknown:
                return answer
            if redirected:
                with answer:
                    location = answer.headers.get("Location") or ""
                    url = follow(url, location, f"the redirect of {call.what}")
                continue
            challenged = True
            asked = answer.headers.getlist("WWW-Authenticate")
            try:
                refused = sent.get("Authorization", "")
                again = self._auth.answer(asked, call.scope, call.what, refused)
            except BaseException:
                answer.close()
                raise
            if not again:
                return answer
            answer.close()
            if _is_stream(call.body):
                raise Interrupted(f"{call.what}: the token expired before the transfer")
        raise Denied(f"{call.what}: more than {MOST_REDIRECTS} redirects")

    def _failure(self, answer: Answer, what: str) -> BulkheadError:
        """The error that an unwelcome answer means."""
        code, message = error_text(answer.read_all(LARGEST_ERROR, what, cut=True))
        words = code.lower().replace("_", " ")
        said = message if message.lower().startswith(words) else f"{words}: {message}"
        said = said.strip(": ")
        status, host = answer.status, self.endpoint.host
        if status == 404:
            return NotFound(f"{what} not found" + (f": {said}" if said else ""), status=status)
        if status in (401, 403):
            said = said or ("access denied" if status == 403 else "authentication required")
            return Denied(
                f"{what}: {said}; it does not exist, or {host} wants a login", status=status
            )
        text = f"{what}: {host} answers {status}" + (f" ({said})" if said else "")
        kind = Unavailable if status in _AGAIN else Invalid
        return kind(text, status=status)


def _worth_retrying(error: Unavailable) -> bool:
    if isinstance(error, Interrupted):
        return not error.final
    return error.details.get("status") in _AGAIN


def _is_stream(body: Body) -> bool:
    return body is not None and not isinstance(body, bytes)


def _retry_after(answer: Answer) -> float:
    value = answer.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 6 else 0.0


def _speaks_plain(error: Interrupted) -> bool:
    """Whether the failure of an https probe means that plain HTTP is worth a try."""
    cause = error.__cause__
    if isinstance(cause, SSLError):
        return "CERTIFICATE" not in str(cause)
    return isinstance(cause, NewConnectionError | HTTPError | OSError)
