"""Pushing blobs: skip what is there, mount from a neighbour, else upload.

Blobs go in one PUT (a monolithic upload), or above `CHUNK` in PATCHes of that size: a broken one is
resumed where the registry says it got to (distribution-spec, "Pushing a blob in chunks").
"""

import urllib.parse
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

from bulkhead.errors import Corrupt, Invalid, NotFound, Unavailable
from bulkhead.oci.distribution import upload_offset
from bulkhead.registry.answer import Answer
from bulkhead.registry.client import Repository
from bulkhead.registry.transport import Call
from bulkhead.registry.urls import follow
from bulkhead.registry.waiting import Cancelled, delay

CHUNK = 8 << 20
_LARGEST_CHUNK = 64 << 20
_ATTEMPTS = 5

Source = Callable[[], Generator[bytes, None, None]]
"""Gives the blob's bytes from the start, each time it is called."""


class Upload:
    """One blob on its way into a repository."""

    def __init__(
        self,
        repository: Repository,
        digest: str,
        size: int,
        source: Source,
        sent: Callable[[int], None],
    ) -> None:
        self._repository = repository
        self._transport = repository.home
        self._digest = digest
        self._size = size
        self._source = source
        self._sent = sent
        self._chunk = CHUNK
        self._scope = repository.scope("pull,push")
        self._what = f"upload of blob {digest} to {repository.reference.familiar_name}"

    def run(self, neighbours: Sequence[str] = ()) -> str:
        """Bring the blob there: "exists", "mounted from PATH" or "pushed".

        `neighbours`: repositories on the same registry that are known to have it.
        """
        if self._repository.has_blob(self._digest):
            return "exists"
        location = ""
        for neighbour in neighbours:
            location = self._mount(neighbour)
            if not location:
                return f"mounted from {neighbour}"
        for attempt in range(_ATTEMPTS):
            try:
                self._transfer(location or self._begin())
            except Cancelled:
                raise
            except (Unavailable, NotFound):  # a broken connection, or a session that is gone
                self._repository.cancel.check()
                if attempt + 1 == _ATTEMPTS:
                    raise
                location = ""
                clock = self._repository.clock
                clock.sleep(delay(attempt, clock), self._repository.cancel)
            else:
                return "pushed"
        raise Unavailable(self._what)

    def _mount(self, neighbour: str) -> str:
        """Ask for the neighbour's blob: "" if mounted, else the session that was opened instead."""
        query = urllib.parse.urlencode({"mount": self._digest, "from": neighbour})
        call = Call(
            "POST",
            self._repository.path(f"blobs/uploads/?{query}"),
            f"{self._scope} repository:{neighbour}:pull",
            self._what,
            body=b"",
            accept=frozenset({201, 202}),
        )
        with self._transport.send(call) as answer:
            return "" if answer.status == 201 else self._location(answer)

    def _begin(self) -> str:
        path = self._repository.path("blobs/uploads/")
        with self._send("POST", path, b"", {202}) as answer:
            self._chunk = self._chunk_size(answer)
            return self._location(answer)

    @staticmethod
    def _chunk_size(answer: Answer) -> int:
        """What to send at once, not less than the registry's OCI-Chunk-Min-Length."""
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        if least.isascii() and least.isdigit() and len(least) < 12:
            return max(CHUNK, min(int(least), _LARGEST_CHUNK))
        return CHUNK

    def _send(
        self,
        method: str,
        url: str,
        body: bytes | Iterator[bytes],
        accept: set[int],
        headers: dict[str, str] | None = None,
    ) -> Answer:
        call = Call(
            method,
            url,
            self._scope,
            self._what,
            headers={"Content-Type": "application/octet-stream", **(headers or {})},
            body=body,
            accept=frozenset(accept),
            retry=False,
        )
        return self._transport.send(call)

    def _location(self, answer: Answer) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise Invalid(f"{self._what}: the registry named no place to upload to")
        return follow(answer.url, location, self._what)

    def _final(self, location: str) -> str:
        separator = "&" if urllib.parse.urlsplit(location).query else "?"
        return f"{location}{separator}{urllib.parse.urlencode({'digest': self._digest})}"

    def _transfer(self, location: str) -> None:
        self._sent(0)
        if self._size <= self._chunk:
            with closing(self._source()) as pieces:
                data = b"".join(pieces)
            if len(data) != self._size:
                raise Corrupt(f"{self._what}: {len(data)} bytes to send, {self._size} expected")
            with self._send("PUT", self._final(location), data, {201, 202, 204}) as answer:
                self._check(answer)
        else:
            location = self._chunks(location)
            with self._send("PUT", self._final(location), b"", {201, 202, 204}) as answer:
                self._check(answer)
        self._sent(self._size)

    def _check(self, answer: Answer) -> None:
        stated = answer.headers.get("Docker-Content-Digest", "")
        if stated.startswith("sha256:") and stated != self._digest:
            raise Corrupt(f"{self._what}: the registry stored {stated}")

    def _chunks(self, location: str) -> str:
        """PATCH after PATCH; the location for the final PUT."""
        offset = 0
        with closing(self._source()) as pieces:
            for data in gathered(pieces, self._chunk):
                location = self._patch(location, data, offset)
                offset += len(data)
                self._sent(offset)
        if offset != self._size:
            raise Corrupt(f"{self._what}: {offset} bytes to send, {self._size} expected")
        return location

    def _patch(self, location: str, data: bytes, offset: int) -> str:
        """Send one chunk, of which a broken connection may have brought a part already."""
        start = 0
        attempt = 0
        while True:
            part = data[start:]
            first = offset + start
            headers = {"Content-Range": f"{first}-{first + len(part) - 1}"}
            try:
                with self._send("PATCH", location, part, {202, 204}, headers) as answer:
                    return self._location(answer)
            except Cancelled:
                raise
            except Unavailable:
                self._repository.cancel.check()
                attempt += 1
                if attempt >= _ATTEMPTS:
                    raise
                clock = self._repository.clock
                clock.sleep(delay(attempt - 1, clock), self._repository.cancel)
                reached, location = self._status(location)
                if reached == offset + len(data):
                    return location
                if not offset <= reached < offset + len(data):
                    raise
                start = reached - offset

    def _status(self, location: str) -> tuple[int, str]:
        """How far the session got, and where it goes on."""
        with self._send("GET", location, b"", {204, 200}) as answer:
            place = answer.headers.get("Location")
            where = follow(answer.url, place, self._what) if place else location
            return upload_offset(answer.headers.get("Range")), where


def gathered(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of exactly `size`, but for the last."""
    pending: list[bytes] = []
    held = 0
    for piece in pieces:
        pending.append(piece)
        held += len(piece)
        while held >= size:
            whole = b"".join(pending)
            yield whole[:size]
            pending, held = [whole[size:]], held - size
    if held:
        yield b"".join(pending)
