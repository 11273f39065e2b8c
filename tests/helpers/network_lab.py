"""A host of its own for network tests: the test body runs in a network namespace made for it.

    @in_lab
    def test_x(tmp_path):
        with Lab(tmp_path) as lab:
            web = lab.run("web", ports={"80/tcp": [{"HostIp": "", "HostPort": "8080"}]})

The namespace has loopback up and an interface `up0` to an "outside" namespace (198.51.100.2), so
that the machine's own links, tables and settings are never touched. Workloads are `sleep`
processes; what they do is done by threads that enter their namespace.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from bulkhead.home import Home
from bulkhead.linux import netns
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.network.manager import NetworkManager
from bulkhead.network.model import (
    Attachment,
    AttachRequest,
    EndpointRequest,
    bindings_from_docker,
)
from tests.helpers.waiting import until

T = TypeVar("T")
HOST4, OUTSIDE4 = "198.51.100.1", "198.51.100.2"
HOST6, OUTSIDE6 = "2001:db8:1::1", "2001:db8:1::2"
PATIENCE_S = 30.0
SELDOM_S = 5.0


@functools.cache
def _why_not() -> str:
    """Why network namespaces cannot be made here, "" if they can."""
    try:
        netns.create().close()
    except OSError as error:
        return f"cannot make a network namespace: {error}"
    return ""


def in_lab(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a network namespace of its own; skips where that is not possible."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        if _why_not():
            pytest.skip(_why_not())

        def body() -> None:
            netns.unshare()
            test(*args, **kwargs)

        netns.in_thread(body)

    return wrapper


class Documents:
    """Networks in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        return self.kept.get(key)

    def put(self, key: str, text: str) -> None:
        self.kept[key] = text

    def delete(self, key: str) -> None:
        self.kept.pop(key, None)

    def items(self) -> list[tuple[str, str]]:
        return list(self.kept.items())


class Workload:
    """A running workload of the lab."""

    def __init__(self, lab: "Lab", request: AttachRequest) -> None:
        self.lab = lab
        self.request = request
        self.id = request.workload_id
        self.attachment: Attachment = lab.manager.prepare(request)
        path = self.attachment.netns_path
        try:
            fd = os.open(path or "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self.netns = OwnedFd(fd)
            self.process = netns.inside(
                self.netns.fileno(), lambda: subprocess.Popen(["sleep", "3600"])
            )
        except BaseException:
            lab.manager.release(self.id)
            raise
        lab.manager.started(self.id, self.process.pid)

    @property
    def settings(self) -> dict[str, Any]:
        return self.lab.manager.settings(self.id)

    def address(self, network: str = "bridge") -> str:
        return str(self.settings["Networks"][network]["IPAddress"])

    def address6(self, network: str) -> str:
        return str(self.settings["Networks"][network]["GlobalIPv6Address"])

    def inside(self, work: Callable[[], T]) -> T:
        """Run something in the workload's network namespace."""
        return netns.inside(self.netns.fileno(), work)

    def serve(self, port: int = 80, text: str = "", family: int = socket.AF_INET) -> None:
        """Answer TCP connections with `text` (default: its name) and the peer's address."""
        answer = text or self.request.name
        listener = self.inside(lambda: listen_on(port, family))
        self.lab.serve(listener, answer)

    def ask(self, address: str, port: int, timeout_s: float = PATIENCE_S) -> str:
        return self.inside(lambda: ask(address, port, timeout_s))

    def cannot_reach(self, address: str, port: int) -> bool:
        return self.inside(lambda: cannot_reach(address, port))

    def stop(self) -> None:
        """End it as the engine would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.netns.close()
        self.lab.manager.release(self.id)


def listen_on(port: int, family: int = socket.AF_INET) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("", port))
    made.listen(16)
    return made


def ask(address: str, port: int, timeout_s: float = PATIENCE_S) -> str:
    """What a server of the lab answers."""
    with socket.create_connection((address, port), timeout=timeout_s) as peer:
        peer.settimeout(timeout_s)
        data = b""
        while chunk := peer.recv(4096):
            data += chunk
    return data.decode()


def cannot_reach(address: str, port: int, seconds: float = 1.5) -> bool:
    """Whether a connection fails, for as long as a lost first packet would need to be resent."""
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return False
    except OSError:
        return True


class Lab:
    """The manager, its helper process, the outside and the workloads."""

    def __init__(self, folder: Path, *, root: str = "root") -> None:
        self._undo = contextlib.ExitStack()
        self.home = Home(str(folder / root), str(folder / "run"))
        os.makedirs(self.home.root, exist_ok=True)
        os.makedirs(self.home.run, exist_ok=True)
        self.documents = Documents()
        self.workloads: list[Workload] = []
        self.helper: subprocess.Popen[bytes] | None = None
        self._count = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            with rt.connect() as route:
                route.transact([rt.set_link(1, up=True)])
            self.outside = netns.create()
            undo.callback(self.outside.close)
            self._uplink()
            self.manager = NetworkManager(self.home, self.documents)
            undo.callback(self._close)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def _uplink(self) -> None:
        with rt.connect() as route, netns.inside(self.outside.fileno(), rt.connect) as far:
            route.transact(
                rt.add_veth(
                    "up0",
                    master=0,
                    mtu=1500,
                    peer_name="out0",
                    peer_netns_fd=self.outside.fileno(),
                    peer_mac=rt.mac_bytes("02:00:00:00:00:02"),
                )
            )
            near_index, far_index = rt.link(route, "up0").index, rt.link(far, "out0").index
            far.transact(
                [
                    rt.set_link(1, up=True),
                    rt.set_link(far_index, up=True),
                    rt.add_address(far_index, IPv4Interface(f"{OUTSIDE4}/24")),
                    rt.add_address(far_index, IPv6Interface(f"{OUTSIDE6}/64")),
                ]
            )
            route.transact(
                [
                    rt.add_address(near_index, IPv4Interface(f"{HOST4}/24")),
                    rt.add_address(near_index, IPv6Interface(f"{HOST6}/64")),
                    rt.add_route(index=near_index, gateway=OUTSIDE4),
                    rt.add_route(index=near_index, gateway=OUTSIDE6),
                ]
            )

    def _close(self) -> None:
        for one in self.workloads:
            one.stop()
        self.stop_helper()
        self.manager.close()

    # -- workloads

    def request(self, name: str, mode: str = "bridge", **more: Any) -> AttachRequest:
        self._count += 1
        more["ports"] = bindings_from_docker(more.get("ports"))
        return AttachRequest(
            workload_id=f"{self._count:012x}" + "0" * 52, name=name, mode=mode, **more
        )

    def run(self, name: str, mode: str = "bridge", **more: Any) -> Workload:
        """Start a workload; `more` are members of AttachRequest."""
        made = Workload(self, self.request(name, mode, **more))
        self.workloads.append(made)
        return made

    def stop(self, workload: Workload) -> None:
        workload.stop()
        self.workloads.remove(workload)

    def network(self, name: str, **more: Any) -> str:
        """Create a network; `more` are members of NetworkCreate."""
        return self.manager.create({"Name": name, **more})

    # -- helper process

    def start_helper(self) -> None:
        """Run what the manager wants supervised, until it serves."""
        ((_, argv, environment),) = self.manager.helpers()
        self.helper = subprocess.Popen(argv, env=environment)
        until(self._answers, "the helper answers")

    def _answers(self) -> bool:
        try:
            return self.sync() >= 0 and self.manager._link.flush() and self.sync() >= 0
        except (ConnectionError, FileNotFoundError):
            return False

    def sync(self) -> int:
        """How many workloads the helper serves, once it has seen all that was sent."""
        self.manager._link.flush()
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with peer:
            peer.settimeout(PATIENCE_S)
            peer.connect(self.home.in_run("network", "helper.sock"))
            peer.send(b'{"op": "sync"}')
            return int(json.loads(peer.recv(4096))["ok"])

    def stop_helper(self) -> None:
        if self.helper is not None:
            self.helper.kill()
            self.helper.wait()
            self.helper = None

    # -- the outside and servers

    def inside_outside(self, work: Callable[[], T]) -> T:
        return netns.inside(self.outside.fileno(), work)

    def serve_outside(self, port: int, text: str = "outside") -> None:
        self.serve(self.inside_outside(lambda: listen_on(port)), text)

    def serve(self, listener: socket.socket, text: str) -> None:
        """Answer every connection with `text` and the peer's address until the lab closes."""
        ending = threading.Event()
        listener.settimeout(0.1)

        def loop() -> None:
            while not ending.is_set():
                try:
                    peer, source = listener.accept()
                except TimeoutError:
                    continue
                with peer, contextlib.suppress(OSError):
                    peer.settimeout(PATIENCE_S)
                    peer.sendall(f"{text} {source[0]}".encode())

        thread = threading.Thread(target=loop)
        thread.start()

        def end() -> None:
            ending.set()
            thread.join()
            listener.close()

        self._undo.callback(end)

    def settle(self) -> None:
        """Let the manager do what can wait until nothing is left to do soon."""
        deadline = time.monotonic() + 60
        while (self.manager.refill() or SELDOM_S) < SELDOM_S or self.manager._lobby.filling:
            assert time.monotonic() < deadline, "the manager does not come to rest"
            time.sleep(0.01)


@contextlib.contextmanager
def udp_echo(workload: Workload, port: int, text: str = "echo") -> Iterator[None]:
    """A workload's UDP service that answers with `text` and what it got."""
    held = workload.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with held:
        held.bind(("", port))
        held.settimeout(0.1)
        ending = threading.Event()

        def loop() -> None:
            while not ending.is_set():
                with contextlib.suppress(TimeoutError):
                    data, source = held.recvfrom(2048)
                    held.sendto(text.encode() + b" " + data, source)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()


def udp_insist(client: socket.socket) -> str:
    """Send datagrams from a connected socket until one is answered; the answer's first word."""
    client.settimeout(1.0)
    question = os.urandom(8).hex()
    for _ in range(30):
        with contextlib.suppress(TimeoutError, ConnectionRefusedError):
            client.send(question.encode())
            while True:
                text, _, echoed = client.recv(2048).decode().partition(" ")
                if echoed == question:
                    return text
    raise AssertionError(f"no answer from {client.getpeername()}")


def udp_ask(address: str, port: int, text: str) -> str:
    """Send a datagram until it is answered."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as peer:
        peer.settimeout(1.0)
        for _ in range(30):
            peer.sendto(text.encode(), (address, port))
            with contextlib.suppress(TimeoutError):
                return peer.recv(2048).decode()
    raise AssertionError(f"no answer from {address} port {port}")


__all__ = ["EndpointRequest", "Lab", "Workload", "ask", "cannot_reach", "in_lab", "listen_on"]
