"""The synchronous SDK: `from bulkhead import Client`.

    with Client() as client:
        print(client.run("debian:bookworm", ["echo", "hello"]).stdout)
        with client.start("nginx", ports={80: 8080}) as web:
            web.exec(["nginx", "-t"]).check()
            web.put("site.conf", b"…", "/etc/nginx/conf.d/")

Everything the engine answers is typed (`client.models`). A `Client` may be used by several threads:
each request has a connection of its own from a pool. Errors are those of `bulkhead.errors`.
"""

import io
import tarfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

from bulkhead.client import spec, start
from bulkhead.client.connection import Connection
from bulkhead.client.models import (
    ContainerInfo,
    ContainerSummary,
    Event,
    ImageInfo,
    ImageSummary,
    Moved,
    NetworkInfo,
    Outcome,
    VolumeInfo,
    typed,
)
from bulkhead.client.spec import Options
from bulkhead.errors import BulkheadError, NotFound
from bulkhead.home import Home, default

Command = str | Sequence[str]
Progress = Callable[[dict[str, Any]], None]
Names = list[str]


class Client:
    """A connection pool to one engine, which is started on demand; close it, or use `with`."""

    def __init__(
        self, *, root: str | None = None, run: str | None = None, start_engine: bool = True
    ) -> None:
        self.home: Home = default(root, run)
        self._start = start_engine
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self.containers = Containers(self)
        self.images = Images(self)
        self.networks = Networks(self)
        self.volumes = Volumes(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Close idle connections; those in use close when their request ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def connection(self) -> Generator[Connection]:
        """A connection for this thread alone, given back afterwards; closed after a failure."""
        connection = self._take()
        try:
            yield connection
        except BulkheadError:
            self._give(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._give(connection)

    def _take(self) -> Connection:
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                if connection.alive():
                    return connection
                connection.close()
        return start.connect(self.home, start=self._start)

    def _give(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed and not connection.busy:
                self._idle.append(connection)
                return
        connection.close()

    def call(
        self, method: str, params: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Any:
        """One request of the engine's own protocol; its result."""
        with self.connection() as connection:
            return connection.call(method, params, fds)

    def call_many(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
        """Many requests at once; results in their order, failures as exceptions among them."""
        with self.connection() as connection:
            return connection.call_many(requests)

    def stream(
        self, method: str, params: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Generator[Any, None, Any]:
        """One request's items; closing the generator cancels the request."""
        with self.connection() as connection:
            return (yield from connection.stream(method, params, fds))

    def _collect(
        self, method: str, params: Mapping[str, Any], fds: Sequence[int], progress: Progress | None
    ) -> Any:
        items = self.stream(method, params, fds)
        while True:
            try:
                item = next(items)
            except StopIteration as end:
                return end.value
            if progress is not None:
                progress(item)

    def ping(self) -> bool:
        """Whether the engine answers."""
        return bool(self.call("system.ping"))

    def version(self) -> dict[str, Any]:
        """The engine's version, in the Engine API's shape."""
        found: dict[str, Any] = self.call("system.version")
        return found

    def info(self) -> dict[str, Any]:
        """The engine and its host, in the Engine API's shape."""
        found: dict[str, Any] = self.call("system.info")
        return found

    def events(
        self,
        *,
        since: str = "",
        until: str = "",
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> Iterator[Event]:
        """What happens, from `since` (Unix seconds) to `until`, or for ever."""
        params: dict[str, Any] = {"filters": dict(filters or {})}
        if since:
            params["since"] = since
        if until:
            params["until"] = until
        for item in self.stream("system.events", params):
            yield typed(Event, item)

    def run(
        self,
        image: str,
        command: Command | None = None,
        *,
        stdin: bytes | None = None,
        pull: bool = True,
        **options: Unpack[Options],
    ) -> Outcome:
        """Run to the end and remove: exit code and output. Pulls a missing image if `pull`.

        The output is held in memory; `start` and `logs` are for what runs long or talks much.
        """
        params = spec.parameters(image, command, options, remove=True)
        if stdin is not None:
            params["body"].update(OpenStdin=True, StdinOnce=True, AttachStdin=True)
        params["body"].update(AttachStdout=True, AttachStderr=True)
        tty = bool(params["body"].get("Tty"))
        params["attach"] = [stdin is not None, True, not tty]
        params["tty"] = tty

        def once() -> Outcome:
            found, out, err = self._piped("workload.run", params, stdin, tty=tty)
            return Outcome(
                id=found["Id"], exit_code=found.get("StatusCode"), stdout=out, stderr=err
            )

        outcome: Outcome = self._with_image(image, pull, once)
        return outcome

    def _with_image(self, image: str, pull: bool, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except NotFound as error:
            if not pull or not error.message.lower().startswith("no such image"):
                raise
        self.images.pull(image)
        return act()

    def _piped(
        self, method: str, params: Mapping[str, Any], stdin: bytes | None, *, tty: bool
    ) -> tuple[dict[str, Any], bytes, bytes]:
        """A request whose streams are pipes: (result, stdout, stderr)."""
        from bulkhead.client.pipes import Pipes

        with self.connection() as connection, Pipes(stdin, stderr=not tty) as pipes:
            number = connection.send(method, params, pipes.lent)
            pipes.sent()
            found = pipes.pump(connection, number)
            return found, pipes.stdout, pipes.stderr

    def start(
        self, image: str, command: Command | None = None, *, pull: bool = True,
        remove: bool = False, **options: Unpack[Options],
    ) -> "Container":  # fmt: skip
        """Create and start in the background; `with` it to have it removed afterwards."""
        params = spec.parameters(image, command, options, remove=remove)
        params["detach"] = True

        def once() -> Container:
            identity = ""
            for item in self.stream("workload.run", params):
                if "Id" in item:
                    identity = item["Id"]
            return Container(self, identity)

        container: Container = self._with_image(image, pull, once)
        return container

    def prune(self) -> int:
        """Remove stopped containers, unused networks and dangling images; bytes freed."""
        freed = 0
        for method in ("workload.prune", "network.prune", "image.prune"):
            freed += (self.call(method, {"filters": {}}) or {}).get("SpaceReclaimed") or 0
        return freed


class Container:
    """One container by id; leaving a `with` block removes it, by force."""

    def __init__(self, client: Client, identity: str) -> None:
        self._client = client
        self.id = identity

    def __repr__(self) -> str:
        return f"Container({self.id[:12]})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            self.remove(force=True, volumes=True)
        except NotFound:
            return

    def _call(self, method: str, **params: Any) -> Any:
        return self._client.call(method, {"id": self.id, **params})

    def start(self) -> None:
        """Start it."""
        self._call("workload.start")

    def wait(self, condition: str = "not-running") -> int | None:
        """Block until it has ended (next-exit, removed: until that); its exit code."""
        code: int | None = self._call("workload.wait", condition=condition)["StatusCode"]
        return code

    def stop(self, *, timeout_s: float | None = None, signal: str | None = None) -> None:
        """Ask it to end, and kill it after `timeout_s`."""
        self._call("workload.stop", **_given(timeout_s=timeout_s, signal=signal))

    def restart(self, *, timeout_s: float | None = None) -> None:
        """Stop and start."""
        self._call("workload.restart", **_given(timeout_s=timeout_s))

    def kill(self, signal: str = "SIGKILL") -> None:
        """Send a signal to its first process."""
        self._call("workload.kill", signal=signal)

    def pause(self) -> None:
        """Freeze every process."""
        self._call("workload.pause")

    def unpause(self) -> None:
        """Thaw them."""
        self._call("workload.unpause")

    def rename(self, name: str) -> None:
        """Give it another name."""
        self._call("workload.rename", name=name)

    def move(
        self, to: str, *, kernel: str = "", timeout_s: float = 60.0, drain_s: float = 10.0,
        stop_first: bool = False,
    ) -> Moved:  # fmt: skip
        """Put it behind another boundary; it has another `id` then."""
        found = typed(Moved, self._call("workload.move", to=to, kernel=kernel, timeout_s=timeout_s,
                                        drain_s=drain_s, stop_first=stop_first))  # fmt: skip
        self.id = found.id
        return found

    def remove(self, *, force: bool = False, volumes: bool = False) -> None:
        """Remove it; a running one only by `force`; `volumes`: its anonymous ones too."""
        self._call("workload.remove", force=force, volumes=volumes)

    def inspect(self) -> ContainerInfo:
        """What the engine knows of it now."""
        return typed(ContainerInfo, self._call("workload.inspect"))

    def explain(self) -> dict[str, Any]:
        """What the kernel knows of it now."""
        found: dict[str, Any] = self._call("workload.explain")
        return found

    def stats(self) -> dict[str, Any]:
        """One sample of its usage, in the Engine API's shape."""
        sample: dict[str, Any] = {}
        params = {"id": self.id, "stream": False, "one_shot": False}
        for item in self._client.stream("workload.stats", params):
            sample = item
        return sample

    def logs(
        self, *, follow: bool = False, tail: int | None = None, stdout: bool = True,
        stderr: bool = True, timestamps: bool = False,
    ) -> Iterator[tuple[int, bytes]]:  # fmt: skip
        """Its output as (1 or 2, bytes); with `follow` until it ends."""
        params: dict[str, Any] = {
            "id": self.id, "follow": follow, "stdout": stdout, "stderr": stderr,
            "timestamps": timestamps, **_given(tail=tail),
        }  # fmt: skip
        yield from self._client.stream("workload.logs", params)

    def exec(
        self, command: Command, *, stdin: bytes | None = None, user: str = "",
        working_dir: str = "", environment: Mapping[str, str] | None = None,
        privileged: bool = False,
    ) -> Outcome:  # fmt: skip
        """Run one more process inside, to its end; exit code and output."""
        body: dict[str, Any] = {
            "Cmd": spec.words(command), "AttachStdin": stdin is not None, "AttachStdout": True,
            "AttachStderr": True, "User": user, "WorkingDir": working_dir,
            "Privileged": privileged,
            "Env": [f"{key}={value}" for key, value in (environment or {}).items()],
        }  # fmt: skip
        identity = self._call("exec.create", body=body)["Id"]
        params = {"id": identity, "detach": False, "tty": False}
        found, out, err = self._client._piped("exec.start", params, stdin, tty=False)
        code = found.get("ExitCode")
        if code is None:
            code = self._client.call("exec.inspect", {"id": identity}).get("ExitCode")
        return Outcome(id=identity, exit_code=code, stdout=out, stderr=err)

    def put(self, name: str, data: bytes, directory: str, *, mode: int = 0o644) -> None:
        """Write one file into a directory inside."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
        self.put_archive(buffer.getvalue(), directory)

    def get(self, path: str) -> bytes:
        """The content of one regular file inside; NotFound if there is none."""
        with tarfile.open(fileobj=io.BytesIO(self.get_archive(path))) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    return file.read()
        raise NotFound(f"{path} in container {self.id[:12]} is not a regular file")

    def put_archive(self, data: bytes, directory: str) -> None:
        """Unpack a tar archive into a directory inside."""
        from bulkhead.client.pipes import feed

        with self._client.connection() as connection:
            feed(connection, "workload.archive_put", {"id": self.id, "path": directory}, data)

    def get_archive(self, path: str) -> bytes:
        """A file, or a directory with all below it, as a tar archive."""
        from bulkhead.client.pipes import drain

        with self._client.connection() as connection:
            return drain(connection, "workload.archive_get", {"id": self.id, "path": path})

    def commit(self, repository: str = "", tag: str = "", *, message: str = "") -> str:
        """An image of its changes; the image's id."""
        found = self._call(
            "workload.commit", repo=repository, tag=tag, comment=message, author="", changes=[],
            pause=True,
        )  # fmt: skip
        return str(found["Id"])


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


class Containers:
    """`client.containers`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self, image: str, command: Command | None = None, **options: Unpack[Options]
    ) -> Container:
        """Create without starting; NotFound if the image is not here."""
        params = spec.parameters(image, command, options, remove=False)
        return Container(self._client, self._client.call("workload.create", params)["Id"])

    def get(self, name: str) -> Container:
        """The container called so, or with an id that begins so."""
        return Container(self._client, self._client.call("workload.inspect", {"id": name})["Id"])

    def list(
        self,
        *,
        everything: bool = False,
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> list[ContainerSummary]:
        """Running containers, or `everything`."""
        params = {"all": everything, "filters": dict(filters or {})}
        return [typed(ContainerSummary, s) for s in self._client.call("workload.list", params)]


class Images:
    """`client.images`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def pull(
        self, name: str, *, platform: str = "", auth: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Download; `auth` is {"username", "password"} or {"identitytoken"}."""
        params: dict[str, Any] = {"name": name}
        if platform:
            params["platform"] = platform
        if auth:
            params["auth"] = dict(auth)
        self._client._collect("image.pull", params, (), progress)
        return self.get(name)

    def push(
        self, name: str, *, auth: Mapping[str, str] | None = None, progress: Progress | None = None
    ) -> None:
        """Upload."""
        params: dict[str, Any] = {"name": name}
        if auth:
            params["auth"] = dict(auth)
        self._client._collect("image.push", params, (), progress)

    def get(self, name: str) -> ImageInfo:
        """The image called so; NotFound."""
        return typed(ImageInfo, self._client.call("image.inspect", {"name": name}))

    def list(self, *, filters: Mapping[str, Sequence[str]] | None = None) -> list[ImageSummary]:
        """The images that are here."""
        params = {"all": False, "filters": dict(filters or {})}
        return [typed(ImageSummary, s) for s in self._client.call("image.list", params)]

    def tag(self, source: str, target: str) -> None:
        """Give an image one more name."""
        self._client.call("image.tag", {"source": source, "target": target})

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a name, and the image with its last one."""
        self._client.call("image.remove", {"name": name, "force": force, "noprune": False})

    def load(self, path: str, *, progress: Progress | None = None) -> Names:
        """Load an archive; the names of what it held."""
        with open(path, "rb") as file:
            found = self._client._collect("image.load", {}, (file.fileno(),), progress)
        names: Names = found.get("Names") or [] if isinstance(found, dict) else found or []
        return names

    def save(self, names: Sequence[str], path: str) -> None:
        """Write images to a new archive."""
        with open(path, "xb") as file:
            self._client.call("image.save", {"names": [*names]}, (file.fileno(),))

    def bootstrap(
        self, name: str, *, include: Sequence[str] = (), mirror: str = "",
        progress: Progress | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Make a minimal image of a distribution's packages."""
        params: dict[str, Any] = {"name": name}
        if include:
            params["include"] = [*include]
        if mirror:
            params["mirror"] = mirror
        self._client._collect("image.bootstrap", params, (), progress)
        return self.get(name)


class Networks:
    """`client.networks`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self, name: str, *, driver: str = "bridge", internal: bool = False, subnet: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> NetworkInfo:  # fmt: skip
        """Create a network."""
        body: dict[str, Any] = {
            "Name": name, "Driver": driver, "Internal": internal, "Labels": dict(labels or {}),
        }  # fmt: skip
        if subnet:
            body["IPAM"] = {"Driver": "default", "Config": [{"Subnet": subnet}]}
        self._client.call("network.create", body)
        return self.get(name)

    def get(self, name: str) -> NetworkInfo:
        """The network called so; NotFound."""
        return typed(NetworkInfo, self._client.call("network.inspect", {"name": name}))

    def list(self) -> list[NetworkInfo]:
        """All networks."""
        found = self._client.call("network.list", {"filters": {}})
        return [typed(NetworkInfo, n) for n in found]

    def remove(self, name: str) -> None:
        """Remove it; Conflict while it is used."""
        self._client.call("network.remove", {"name": name})

    def connect(self, network: str, container: str, *, aliases: Sequence[str] = ()) -> None:
        """Connect a container, running or not."""
        endpoint = {"Aliases": [*aliases]} if aliases else {}
        self._client.call(
            "network.connect",
            {"network": network, "container": container, "endpoint": endpoint},
        )

    def disconnect(self, network: str, container: str, *, force: bool = False) -> None:
        """Disconnect it."""
        self._client.call(
            "network.disconnect", {"network": network, "container": container, "force": force}
        )


class Volumes:
    """`client.volumes`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, name: str = "", *, labels: Mapping[str, str] | None = None) -> VolumeInfo:
        """Create a volume; without a name an anonymous one."""
        body = {"Name": name, "Driver": "local", "Labels": dict(labels or {})}
        return typed(VolumeInfo, self._client.call("volume.create", body))

    def get(self, name: str) -> VolumeInfo:
        """The volume called so; NotFound."""
        return typed(VolumeInfo, self._client.call("volume.inspect", {"name": name}))

    def list(self) -> list[VolumeInfo]:
        """All volumes."""
        found = self._client.call("volume.list", {"filters": {}})
        volumes = found.get("Volumes") or [] if isinstance(found, dict) else found or []
        return [typed(VolumeInfo, volume) for volume in volumes]

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it; Conflict while it is used."""
        self._client.call("volume.remove", {"name": name, "force": force})
