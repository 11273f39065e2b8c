"""A registry double over http.server that can be told to misbehave; and clocks that never wait."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead.home import Home
from bulkhead.images.service import ImageService
from bulkhead.registry.config import Registries
from bulkhead.registry.waiting import Cancel
from bulkhead.store.content import ContentStore
from tests.helpers.images import Blobs, BuiltImage


class FakeClock:
    """Time that passes only by sleeping; sleeps are recorded and take none."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, cancel: Cancel) -> None:
        cancel.check()
        self.slept.append(seconds)
        self.now += seconds
        self.on_sleep()

    def jitter(self) -> float:
        return 0.5


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


Route = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the registry's routes, else from its blobs and manifests."""

    protocol_version = "HTTP/1.1"
    registry: "FakeRegistry"
    request_body = b""

    def log_message(self, *_: object) -> None:
        return

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.request_body = self.rfile.read(length) if length else b""
        sent = {key.lower(): value for key, value in self.headers.items()}
        registry = self.registry
        registry.requests.append(Request(self.command, self.path, sent, self.request_body))
        path = self.path.partition("?")[0]
        route = registry.routes.get(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            (route or registry.serve)(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_any

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer; underscores in header names become dashes."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        """Break the connection."""
        self.close_connection = True


@dataclass
class FakeRegistry:
    """Serves repository "r" with the contents of `blobs` and `manifests` (by tag or digest)."""

    blobs: Blobs = field(default_factory=Blobs)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    routes: dict[str, Route] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    host: str = ""

    def publish(self, tag: str, image: BuiltImage) -> None:
        """Serve `image` as `tag` and by its digest."""
        self.put(tag, image.descriptor["mediaType"], image.manifest)
        self.manifests[image.digest] = (image.descriptor["mediaType"], image.manifest)

    def put(self, reference: str, media_type: str, data: bytes) -> None:
        """Serve `data` as a manifest."""
        self.manifests[reference] = (media_type, data)

    def serve(self, handler: Handler) -> None:
        """The well-behaved answer."""
        path = handler.path.partition("?")[0]
        kind, _, name = path.removeprefix("/v2/r/").partition("/")
        if path == "/v2/":
            handler.reply(200, b"{}")
        elif kind == "manifests" and name in self.manifests:
            media_type, data = self.manifests[name]
            handler.reply(200, data, Content_Type=media_type)
        elif kind == "blobs" and name in self.blobs.by_digest:
            self.serve_blob(handler, self.blobs.by_digest[name])
        else:
            error = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
            handler.reply(404, json.dumps(error).encode())

    @staticmethod
    def serve_blob(handler: Handler, data: bytes, most: int | None = None) -> None:
        """A blob, or the range asked for; after `most` bytes the connection breaks."""
        start = 0
        wanted = handler.headers.get("Range", "")
        if wanted:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        end = len(data) if most is None else min(len(data), start + most)
        handler.wfile.write(data[start:end])
        if end < len(data):
            handler.hang_up()

    def seen(self, method: str, part: str) -> list[Request]:
        """Requests so far, by method and a part of the path."""
        return [r for r in list(self.requests) if r.method == method and part in r.path]


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the play."""


@contextlib.contextmanager
def fake_registry() -> Iterator[FakeRegistry]:
    """Run one on a free loopback port."""
    registry = FakeRegistry()
    handler = type("BoundHandler", (Handler,), {"registry": registry})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    registry.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def service(
    directory: Path,
    *,
    clock: FakeClock | None = None,
    registries: Registries | None = None,
    **options: bool,
) -> ImageService:
    """An image service with a store of its own, which sees no configuration of the machine's."""
    directory.mkdir(parents=True, exist_ok=True)
    return ImageService(
        Home(str(directory), str(directory / "run")),
        ContentStore(str(directory / "store")),
        registries=registries or Registries(certificates=()),
        clock=clock,
        **options,
    )


def nothing_left(images: ImageService) -> None:
    """AssertionError unless the store holds no image, layer, blob or half-written thing."""
    store = images.store
    assert images.list() == []
    images.gc()
    assert store.layers() == []
    assert store.blobs() == []
    work = Path(store.root)
    assert list((work / "work").iterdir()) == []
    assert list((work / "leases").iterdir()) == []
