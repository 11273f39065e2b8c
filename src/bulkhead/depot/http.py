"""The registry's HTTP: one thread per connection, bodies streamed, everything bounded."""

import base64
import contextlib
import hmac
import io
import json
import logging
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from email.errors import FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

from bulkhead.depot.patience import IDLE_S, Patient
from bulkhead.depot.registry import Problem, Registry
from bulkhead.depot.uploads import Upload, check_range
from bulkhead.errors import BulkheadError, Corrupt, Invalid, NotFound, Unavailable
from bulkhead.oci.image import LARGEST_MANIFEST, OCI_INDEX

log = logging.getLogger("bulkhead.registry")
_PIECE = 1 << 20
_BUFFER = 64 << 10
_MOST_CONNECTIONS = 256
_ROOM_S = 5.0
"""How long a new connection waits for one that was ended for it."""
_MOST_LISTED = 1000
_DRAINED = 16 << 20
_CUT_SHORT = MissingHeaderBodySeparatorDefect, FirstHeaderLineIsContinuationDefect
"""The headers have a malformed line, and what follows it was not read."""
_ROUTE = re.compile(
    r"/v2/(?P<name>.+?)/(?:(?P<upload>blobs/uploads)/(?P<session>[^/]*)|"
    r"(?P<kind>blobs|manifests|referrers)/(?P<reference>[^/]+)|(?P<tags>tags/list))\Z"
)


class Server(ThreadingHTTPServer):
    """Listens at `address`; `users` maps names to passwords, {} for everybody."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], registry: Registry, users: dict[str, str] | None = None
    ) -> None:
        self.registry = registry
        self.users = users or {}
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self.live: dict[Patient, socket.socket] = {}
        """Connections, the oldest first."""
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for it; if there are too many, instead of one that waits for a request."""
        if not self._room.acquire(blocking=False):
            self._end_one()
            if not self._room.acquire(timeout=_ROOM_S):
                self.shutdown_request(request)
                return
        super().process_request(request, client_address)

    def _end_one(self) -> None:
        for patient, connection in list(self.live.items()):
            if patient.waiting:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                return

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no event."""
        log.debug("connection from %s broke", client_address, exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "bulkhead"
    sys_version = ""
    timeout = IDLE_S
    server: Server
    disable_nagle_algorithm = True

    # --- requests

    def setup(self) -> None:
        """Read with patience, which ends."""
        super().setup()
        self.rfile.close()
        self._patient = Patient(self.connection)
        self.rfile = io.BufferedReader(self._patient, _BUFFER)
        self.server.live[self._patient] = self.connection

    def finish(self) -> None:
        """The connection is over."""
        self.server.live.pop(self._patient, None)
        super().finish()

    def handle_one_request(self) -> None:
        """One request, once it comes."""
        self._patient.idle()
        super().handle_one_request()

    def do_GET(self) -> None:
        """Read something."""
        self._serve()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        """To our log."""
        log.info("%s %s", self.address_string(), args[0] % args[1:])

    def _serve(self) -> None:
        self._patient.body()
        self._began = False
        self._left = self._length()
        try:
            if self._left == -2:
                raise Problem(400, "UNSUPPORTED", "the request's length is malformed")
            self._authorize()
            self._route()
        except Problem as error:
            self._fail(error.status, error.code, error.message)
        except NotFound as error:
            self._fail(404, "BLOB_UPLOAD_UNKNOWN", error.message)
        except (Invalid, Corrupt) as error:
            self._fail(400, "UNSUPPORTED", error.message)
        except Unavailable as error:
            self._fail(503, "TOOMANYREQUESTS", error.message)
        except BulkheadError as error:
            log.warning("%s: %s", self.path, error)
            self._fail(500, "UNKNOWN", error.message)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:
            log.exception("%s %s", self.command, self.path)
            self._fail(500, "UNKNOWN", "an unexpected error, which the log explains")

    def _route(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self._query = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query).items()}
        path = urllib.parse.unquote(url.path)
        if path in ("/v2/", "/v2"):
            self._only("GET", "HEAD")
            self._json(200, {})
            return
        if path == "/v2/_catalog":
            self._only("GET")
            self._catalog()
            return
        match = _ROUTE.match(path)
        if match is None:
            raise Problem(404, "NAME_UNKNOWN", "there is nothing at this path")
        repository = self.server.registry.repository(match["name"])
        if match["upload"]:
            self._upload(repository, match["session"])
        elif match["tags"]:
            self._only("GET")
            self._tags(repository)
        elif match["kind"] == "referrers":
            self._only("GET")
            self._referrers(repository, match["reference"])
        elif match["kind"] == "blobs":
            self._blob(repository, match["reference"])
        else:
            self._manifest(repository, match["reference"])

    def _only(self, *methods: str) -> None:
        if self.command not in methods:
            raise Problem(405, "UNSUPPORTED", f"{self.command} is not possible here")

    def _authorize(self) -> None:
        users = self.server.users
        if not users:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        name = password = ""
        if scheme.lower() == "basic":
            try:
                text = base64.b64decode(given, validate=True).decode()
            except ValueError:
                text = ""
            name, _, password = text.partition(":")
        wanted = users.get(name)
        if wanted is None or not hmac.compare_digest(wanted.encode(), password.encode()):
            raise Problem(401, "UNAUTHORIZED", "authentication is required")

    # --- bodies

    def _length(self) -> int:
        """Bytes of the body; -1 for chunks, -2 for nonsense or what others may read otherwise."""
        encodings = self.headers.get_all("Transfer-Encoding", [])
        lengths = self.headers.get_all("Content-Length", [])
        broken = any(isinstance(one, _CUT_SHORT) for one in self.headers.defects)
        if broken or len(encodings) + len(lengths) > 1:
            return -2
        if encodings:
            return -1 if encodings[0].lower() == "chunked" else -2
        if not lengths:
            return 0
        return int(lengths[0]) if lengths[0].isdecimal() and len(lengths[0]) < 16 else -2

    def _body(self) -> Iterator[bytes]:
        """The request's body."""
        while self._left > 0:
            piece = self.rfile.read(min(self._left, _PIECE))
            if not piece:
                raise ConnectionError("the body ended early")
            self._left -= len(piece)
            yield piece
        if self._left == -1:
            yield from self._chunks()
            self._left = 0

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self.rfile.readline(64)
            text = line.strip().partition(b";")[0]
            if not line.endswith(b"\n") or not re.fullmatch(rb"[0-9a-fA-F]{1,12}", text):
                raise ConnectionError("a chunk is malformed")
            size = int(text, 16)
            if not size:
                while (line := self.rfile.readline(1024)) not in (b"\r\n", b"\n", b""):
                    pass
                return
            while size:
                piece = self.rfile.read(min(size, _PIECE))
                if not piece:
                    raise ConnectionError("the body ended early")
                size -= len(piece)
                yield piece
            if self.rfile.readline(8) not in (b"\r\n", b"\n"):
                raise ConnectionError("a chunk is malformed")

    def _small_body(self, largest: int) -> bytes:
        found = bytearray()
        for piece in self._body():
            found += piece
            if len(found) > largest:
                raise Problem(413, "MANIFEST_INVALID", f"more than {largest} bytes")
        return bytes(found)

    # --- answers

    def _head(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        self._began = True
        if self._left:  # what was not read would be taken for the next request
            self.close_connection = True
        self.send_response(status)
        self.send_header("Docker-Distribution-API-Version", "registry/2.0")
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, status: int, data: bytes = b"", **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._head(status, len(data) if status != 204 else None, named)
        if self.command != "HEAD" and data:
            self.wfile.write(data)

    def _json(self, status: int, document: Any, **headers: str) -> None:
        headers.setdefault("Content_Type", "application/json")
        self._send(status, json.dumps(document).encode(), **headers)

    def _fail(self, status: int, code: str, message: str) -> None:
        if self._began:  # a second head would be read as the first one's body
            self.close_connection = True
            return
        self._drain()
        error = {"code": code, "message": message, "detail": {}}
        challenge = 'Basic realm="bulkhead registry"' if status == 401 else ""
        self._json(status, {"errors": [error]}, WWW_Authenticate=challenge)

    def _drain(self) -> None:
        """Read a small rest of the body, so that the client reads the answer."""
        if self._left in (-1, -2) or self._left > _DRAINED:
            return
        for _ in self._body():
            pass

    # --- blobs

    def _blob(self, repository: Any, digest: str) -> None:
        self._only("GET", "HEAD", "DELETE")
        registry = self.server.registry
        if self.command == "DELETE":
            registry.delete_blob(repository, digest)
            self._send(202)
            return
        stream, size = registry.blob(repository, digest)
        with stream:
            first, last = self._range(size)
            headers = {
                "Content-Type": "application/octet-stream",
                "Docker-Content-Digest": digest,
                "Accept-Ranges": "bytes",
                "ETag": f'"{digest}"',
            }
            status = 200
            if (first, last) != (0, size - 1):
                status = 206
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            self._head(status, last - first + 1, headers)
            if self.command == "GET":
                self._copy(stream, first, last - first + 1)

    def _range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", self.headers.get("Range", ""))
        if match is None:
            return 0, size - 1
        first = int(match[1])
        last = min(int(match[2]) if match[2] else size - 1, size - 1)
        if first > last:
            raise Problem(416, "SIZE_INVALID", f"the blob has {size} bytes")
        return first, last

    def _copy(self, stream: BinaryIO, first: int, count: int) -> None:
        if stream.seekable():
            stream.seek(first)
        else:
            while first:
                first -= len(stream.read(min(first, _PIECE)))
        while count:
            piece = stream.read(min(count, _PIECE))
            if not piece:
                raise ConnectionError("the blob ended early")
            count -= len(piece)
            self.wfile.write(piece)

    # --- uploads

    def _upload(self, repository: Any, session: str) -> None:
        registry = self.server.registry
        registry.check_push()
        registry.protect()
        if not session:
            self._only("POST")
            self._begin(repository)
            return
        self._only("GET", "PATCH", "PUT", "DELETE")
        upload = registry.uploads.find(repository.name, session)
        if not upload.lock.acquire(timeout=IDLE_S):
            raise Problem(409, "BLOB_UPLOAD_INVALID", "another request writes to this upload")
        try:
            registry.uploads.find(repository.name, session)  # who had the lock may have ended it
            self._go_on(repository, upload)
        finally:
            upload.lock.release()

    def _begin(self, repository: Any) -> None:
        registry, query = self.server.registry, self._query
        if query.get("mount") and query.get("from"):
            digest = query["mount"]
            if registry.mount(repository, digest, query["from"]):
                self._created(repository, digest)
                return
        if query.get("digest"):
            registry.digest(query["digest"])
        upload = registry.uploads.begin(repository.name)
        if query.get("digest"):
            with upload.lock:
                try:
                    self._write(upload)
                    registry.finish(repository, upload, query["digest"])
                except BaseException:
                    registry.uploads.end(upload)  # nobody knows its name
                    raise
            self._created(repository, query["digest"])
            return
        self._stands(repository, upload, 202)

    def _go_on(self, repository: Any, upload: Upload) -> None:
        registry = self.server.registry
        if self.command == "GET":
            self._stands(repository, upload, 204)
        elif self.command == "DELETE":
            registry.uploads.end(upload)
            self._send(204)
        elif self.command == "PATCH":
            self._write(upload)
            self._stands(repository, upload, 202)
        else:
            digest = registry.digest(self._query.get("digest", ""))
            self._write(upload)
            registry.finish(repository, upload, digest)
            self._created(repository, digest)

    def _write(self, upload: Upload) -> None:
        given = self.headers.get("Content-Range")
        if given:
            try:
                check_range(given, upload.writer.offset)
            except Invalid as error:
                raise Problem(416, "BLOB_UPLOAD_INVALID", error.message) from None
        try:
            for piece in self._body():
                upload.writer.write(piece)
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            raise Unavailable(f"cannot store the upload: {error.strerror}") from error

    def _stands(self, repository: Any, upload: Upload, status: int) -> None:
        last = max(upload.writer.offset - 1, 0)
        self._send(
            status,
            Location=f"/v2/{repository.name}/blobs/uploads/{upload.name}",
            Range=f"0-{last}",
            Docker_Upload_UUID=upload.name,
        )

    def _created(self, repository: Any, digest: str) -> None:
        location = f"/v2/{repository.name}/blobs/{digest}"
        self._send(201, Location=location, Docker_Content_Digest=digest)

    # --- manifests and lists

    def _manifest(self, repository: Any, reference: str) -> None:
        self._only("GET", "HEAD", "PUT", "DELETE")
        registry = self.server.registry
        if self.command == "DELETE":
            registry.delete_manifest(repository, reference)
            self._send(202)
        elif self.command == "PUT":
            data = self._small_body(LARGEST_MANIFEST)
            kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
            digest, subject = registry.put_manifest(repository, reference, data, kind)
            location = f"/v2/{repository.name}/manifests/{digest}"
            self._send(201, Location=location, Docker_Content_Digest=digest, OCI_Subject=subject)
        else:
            data, kind, digest = registry.manifest(repository, reference)
            self._send(
                200, data, Content_Type=kind, Docker_Content_Digest=digest, ETag=f'"{digest}"'
            )

    def _referrers(self, repository: Any, digest: str) -> None:
        kind = self._query.get("artifactType", "")
        found = self.server.registry.referrers(repository, digest, kind)
        headers = {"OCI_Filters_Applied": "artifactType"} if kind else {}
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
        self._json(200, index, Content_Type=OCI_INDEX, **headers)

    def _page(self, names: list[str], path: str) -> tuple[list[str], dict[str, str]]:
        """The part of a list that was asked for, and the Link to the next."""
        last, text = self._query.get("last", ""), self._query.get("n", "")
        if text and not text.isdecimal():
            raise Problem(400, "PAGINATION_NUMBER_INVALID", f"n is not a number: {text[:20]!r}")
        count = min(int(text), _MOST_LISTED) if text and len(text) < 10 else _MOST_LISTED
        rest = [name for name in names if not last or name > last]
        page = rest[:count]
        if len(rest) <= count or not page:
            return page, {}
        query = urllib.parse.urlencode({"n": count, "last": page[-1]})
        return page, {"Link": f'<{path}?{query}>; rel="next"'}

    def _tags(self, repository: Any) -> None:
        path = f"/v2/{repository.name}/tags/list"
        page, headers = self._page(self.server.registry.tags(repository), path)
        self._json(200, {"name": repository.name, "tags": page}, **headers)

    def _catalog(self) -> None:
        from bulkhead.depot.links import repositories

        names = sorted(repositories(self.server.registry.root))
        page, headers = self._page(names, "/v2/_catalog")
        self._json(200, {"repositories": page}, **headers)
