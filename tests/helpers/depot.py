"""Our registry in a thread, and plain requests to it."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bulkhead.depot.http import Server
from bulkhead.depot.proxy import Proxy
from bulkhead.depot.registry import Registry
from bulkhead.store.content import ContentStore


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The first error's code."""
        return str(self.json["errors"][0]["code"])


@dataclass
class Depot:
    """A running registry."""

    port: int
    store: ContentStore
    registry: Registry

    @property
    def host(self) -> str:
        """As image names begin."""
        return f"127.0.0.1:{self.port}"

    def __call__(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()},
                          answer.read())  # fmt: skip
        finally:
            connection.close()

    def push(self, repository: str, data: bytes, digest: str) -> Answer:
        """A blob in two requests."""
        begun = self("POST", f"/v2/{repository}/blobs/uploads/")
        return self("PUT", f"{begun.headers['location']}?digest={digest}", data)


@contextlib.contextmanager
def depot(
    folder: Path, *, upstream: str = "", users: dict[str, str] | None = None,
    readonly: bool = False, fresh_s: float = 0.0,
) -> Iterator[Depot]:  # fmt: skip
    """A registry in `folder`; `upstream`: a cache of that one."""
    store = ContentStore(str(folder / "store"))
    proxy = Proxy(store, upstream, fresh_s=fresh_s) if upstream else None
    registry = Registry(str(folder / "registry"), store, proxy=proxy, readonly=readonly)
    with Server(("127.0.0.1", 0), registry, users) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Depot(server.server_address[1], store, registry)
        finally:
            server.shutdown()
            thread.join()
            registry.close()
