"""One repository of a registry: manifests and blobs by the distribution specification.

Mirrors are asked first; whatever goes wrong with one, the next server is asked. Pushing always goes
to the registry itself. Nothing here is trusted: sizes bound what is read, digests are compared by
whoever stores the bytes (manifests here).
"""

import json
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from bulkhead.errors import BulkheadError, Corrupt, Invalid, NotFound
from bulkhead.oci.digest import of as digest_of
from bulkhead.oci.distribution import content_range_start
from bulkhead.oci.image import INDEXES, LARGEST_MANIFEST, MANIFESTS
from bulkhead.oci.reference import Reference
from bulkhead.registry import config as configuration
from bulkhead.registry import urls
from bulkhead.registry.answer import Answer
from bulkhead.registry.credentials import Credentials, lookup
from bulkhead.registry.transport import Call, Limits, Transport
from bulkhead.registry.waiting import Cancel, Cancelled, Clock, Interrupted, RealClock, delay

ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
_PIECE = 256 << 10
_TAG_PAGES = 1000
"""Most pages of a list of tags; more are taken for a registry that never ends."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A manifest or index as it came: exact bytes, its digest and the declared media type."""

    data: bytes
    digest: str
    media_type: str


class Repository:
    """`reference`'s repository. Safe for threads; close it at the end.

    `credentials` are for the registry itself; None: what docker's configuration files say. Mirrors
    get what is filed for them.
    """

    def __init__(
        self,
        reference: Reference,
        credentials: Credentials | None = None,
        *,
        config: configuration.Registries | None = None,
        cancel: Cancel | None = None,
        clock: Clock | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.reference = reference
        self.config = configuration.load() if config is None else config
        self.cancel = cancel or Cancel()
        self.clock: Clock = clock or RealClock()
        self.transports: list[Transport] = []
        for endpoint in configuration.endpoints(reference.domain, self.config):
            known = credentials if not endpoint.mirror else None
            if known is None:
                known = lookup(endpoint.host if endpoint.mirror else reference.domain)
            self.transports.append(
                Transport(endpoint, known, cancel=self.cancel, clock=self.clock, limits=limits)
            )

    def close(self) -> None:
        """Close idle connections."""
        for transport in self.transports:
            transport.close()

    def __enter__(self) -> "Repository":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def home(self) -> Transport:
        """The registry itself."""
        return self.transports[-1]

    def path(self, rest: str) -> str:
        """The path of `rest` within this repository, on the registry and its mirrors alike."""
        return f"/v2/{self.reference.path}/{rest}"

    def scope(self, actions: str) -> str:
        """The token scope for `actions` here."""
        return f"repository:{self.reference.path}:{actions}"

    def _each(self, work: Callable[[Transport], _T]) -> _T:
        """`work` with the first server that does not fail."""
        for transport in self.transports[:-1]:
            try:
                return work(transport)
            except Cancelled:
                raise
            except BulkheadError:
                self.cancel.check()  # a mirror is a convenience: the registry itself decides
        return work(self.home)

    # --- manifests

    def manifest(self, reference: str, *, size: int | None = None) -> Fetched:
        """The manifest or index that a tag or digest names; its digest is verified.

        NotFound in Docker's words; Denied if it does not exist or is not for us.
        """
        return self._each(lambda transport: self._manifest(transport, reference, size))

    def _manifest(self, transport: Transport, reference: str, size: int | None) -> Fetched:
        is_digest = reference.startswith("sha256:")
        shown = f"{self.reference.familiar_name}{'@' if is_digest else ':'}{reference}"
        what = f"manifest for {shown}"
        call = Call(
            "GET",
            self.path(f"manifests/{reference}"),
            self.scope("pull"),
            what,
            headers={"Accept": ACCEPT},
        )
        with transport.send(call) as answer:
            data = answer.read_all(LARGEST_MANIFEST if size is None else size, what)
            media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            stated = answer.headers.get("Docker-Content-Digest", "")
        found = digest_of(data)
        wanted = reference if is_digest else stated
        if wanted.startswith("sha256:") and found != wanted:
            raise Corrupt(f"{what} has digest {found}, expected {wanted}")
        if size is not None and len(data) != size:
            raise Corrupt(f"{what} has {len(data)} bytes, expected {size}")
        return Fetched(data, found, media_type)

    def put_manifest(self, reference: str, data: bytes, media_type: str) -> None:
        """Push a manifest or index under a tag or digest; Corrupt if another digest resulted."""
        what = f"manifest for {self.reference.familiar_name}:{reference}"
        call = Call(
            "PUT",
            self.path(f"manifests/{reference}"),
            self.scope("pull,push"),
            what,
            headers={"Content-Type": media_type},
            body=data,
            accept=frozenset({201}),
        )
        with self.home.send(call) as answer:
            stated = answer.headers.get("Docker-Content-Digest", "")
        if stated.startswith("sha256:") and stated != digest_of(data):
            raise Corrupt(f"{what}: the registry stored {stated} instead of {digest_of(data)}")

    def has_manifest(self, digest: str) -> bool:
        """Whether the registry itself has the manifest."""
        return self._exists(f"manifests/{digest}", "pull,push", {"Accept": ACCEPT})

    def tags(self) -> list[str]:
        """Every tag of the repository, as the registry lists them; NotFound without any."""
        what = f"tags of {self.reference.familiar_name}"
        found: list[str] = []
        path = self.path("tags/list")
        for _ in range(_TAG_PAGES):
            with self.home.send(Call("GET", path, self.scope("pull"), what)) as answer:
                data = answer.read_all(LARGEST_MANIFEST, what)
                link, base = answer.headers.get("Link", ""), answer.url
            try:
                names = json.loads(data).get("tags") or []
            except (ValueError, AttributeError) as error:
                raise Corrupt(f"{what}: the registry's answer is no list of tags") from error
            found += [name for name in names if isinstance(name, str)]
            target, _, relation = link.partition(">")
            if not target.startswith("<") or 'rel="next"' not in relation:
                break
            path = urls.follow(base, target[1:], what)
        else:
            raise Invalid(f"{what}: more than {_TAG_PAGES} pages; refused")
        if not found:
            raise NotFound(f"{self.reference.familiar_name}: the repository has no tags")
        return found

    # --- blobs

    def has_blob(self, digest: str) -> bool:
        """Whether the registry itself has the blob in this repository."""
        return self._exists(f"blobs/{digest}", "pull,push", {})

    def _exists(self, rest: str, actions: str, headers: dict[str, str]) -> bool:
        call = Call(
            "HEAD",
            self.path(rest),
            self.scope(actions),
            f"{self.reference.familiar_name}: {rest}",
            headers=headers,
            accept=frozenset({200, 404}),
        )
        with self.home.send(call) as answer:
            return answer.status == 200

    def small_blob(self, digest: str, size: int) -> bytes:
        """A blob read whole; Corrupt if digest or size are wrong."""

        def fetch(transport: Transport) -> bytes:
            data = b"".join(_Download(self, [transport], digest, size).chunks(0))
            if digest_of(data) != digest:
                raise Corrupt(f"blob {digest} of {self.reference.familiar_name} has other bytes")
            return data

        return self._each(fetch)

    def blob(self, digest: str, size: int, offset: int = 0) -> Generator[bytes, None, None]:
        """The blob's bytes from `offset` on, exactly up to `size`; close it if you stop early.

        A broken connection is resumed where it broke, with back-off, as long as bytes keep coming;
        Unavailable after five attempts in vain, Corrupt for more or fewer bytes. Whoever stores
        them verifies the digest.
        """
        return _Download(self, self.transports, digest, size).chunks(offset)


class _Download:
    """One blob from the first of several servers that gives it."""

    def __init__(
        self, repository: Repository, transports: list[Transport], digest: str, size: int
    ) -> None:
        self._repository = repository
        self._transports = list(transports)
        self._digest = digest
        self._size = size
        self._what = f"blob {digest} of {repository.reference.familiar_name}"

    def chunks(self, offset: int) -> Generator[bytes, None, None]:
        """Bytes from `offset` to the end."""
        position, attempt = offset, 0
        while position < self._size or not self._size:
            transport = self._transports[0]
            failure: BulkheadError
            try:
                with closing(self._once(transport, position)) as pieces:
                    for piece in pieces:
                        position += len(piece)
                        attempt = 0
                        yield piece
                if position >= self._size:
                    return
                failure = Interrupted(f"{self._what} ended after {position} of {self._size} bytes")
            except Cancelled:
                raise
            except BulkheadError as error:
                failure = error
            attempt += 1
            patient = isinstance(failure, Interrupted) and not failure.final
            if not patient or attempt >= transport.limits.attempts:
                if len(self._transports) == 1:
                    raise failure
                self._transports.pop(0)
                attempt = 0
                continue
            clock = self._repository.clock
            clock.sleep(delay(attempt - 1, clock), self._repository.cancel)

    def _once(self, transport: Transport, position: int) -> Generator[bytes, None, None]:
        """What one request gives from `position` on; Corrupt for more than there should be."""
        repository = self._repository
        call = Call(
            "GET",
            repository.path(f"blobs/{self._digest}"),
            repository.scope("pull"),
            self._what,
            headers={"Range": f"bytes={position}-"} if position else {},
            accept=frozenset({200, 206}),
        )
        with transport.send(call) as answer:
            skip = self._start(answer, position)
            while piece := answer.read(_PIECE):
                if skip:
                    dropped = min(skip, len(piece))
                    skip -= dropped
                    piece = piece[dropped:]
                if position + len(piece) > self._size:
                    raise Corrupt(f"{self._what} is longer than the announced {self._size} bytes")
                position += len(piece)
                if piece:
                    yield piece

    def _start(self, answer: Answer, position: int) -> int:
        """How many bytes to skip; Corrupt when the answer's size or range cannot be right."""
        if answer.status == 206:
            found = content_range_start(answer.headers.get("Content-Range"))
            if found is None or found[0] != position or found[1] not in (None, self._size):
                raise Corrupt(f"{self._what}: the registry sent another range than asked for")
            return 0
        if answer.length is not None and answer.length != self._size:
            raise Corrupt(
                f"{self._what} has {answer.length} bytes at the registry, {self._size} announced"
            )
        return position


def login(
    domain: str,
    credentials: Credentials,
    *,
    config: configuration.Registries | None = None,
    clock: Clock | None = None,
) -> str:
    """Show `credentials` to the registry `domain`; Denied if it does not take them.

    Returns the identity token to be kept instead of the password, if its token service gives one.
    """
    config = configuration.load() if config is None else config
    endpoint = configuration.endpoint(domain, config)
    transport = Transport(endpoint, credentials, clock=clock, offline=True)
    try:
        call = Call("GET", "/v2/", "", f"login to {domain}", accept=frozenset({200}))
        with transport.send(call):
            return transport.identity_token or credentials.identity_token
    except NotFound as error:
        raise Invalid(f"{domain} is no OCI registry: /v2/ is not there") from error
    finally:
        transport.close()
