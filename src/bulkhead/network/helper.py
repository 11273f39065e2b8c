"""The network's helper process: resolver and relay, alive while the engine restarts.

Supervised by the holder. The engine hands it sockets over `<run>/network/helper.sock` (SEQPACKET,
one JSON map a message with SCM_RIGHTS). Started again after a crash, it opens the same sockets
itself: it enters the namespaces of live workloads by what `<run>/network/workloads/` says
(network/attached.py draws it), ports it binds anew. A workload whose process ends is dropped, so
that no socket of ours keeps a dead network namespace alive.

Messages: {"op": "set", "id", "record", "roles": [...]} with one descriptor per role, which is
"udp", "tcp" or a port's `port_role`; {"op": "started", "id", "pid"}; {"op": "drop", "id"};
{"op": "sync"}, answered by {"ok": N} with the number of workloads served.

`<run>/network/helper.lock` is flock(2)ed by the living helper, whose pid is in it. If the holder is
killed, its helper serves on until the next one, which ends it, or until it serves nobody.
"""

import array
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from bulkhead.network.loop import READ, Loop
from bulkhead.network.names import Names
from bulkhead.network.relay import Door, Relay
from bulkhead.network.resolver import Asker, Resolver

_MESSAGE = 1 << 18
_DESCRIPTORS = 253


class Served:
    """What the helper holds for one workload."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.asker: Asker | None = None
        self.doors: dict[str, Door] = {}
        self.pidfd = -1


class Helper:
    """All of it, on one loop."""

    def __init__(self, run: str) -> None:
        self._directory = f"{run}/network"
        self.loop = Loop()
        self._names = Names()
        self._resolver = Resolver(self.loop, self._names)
        self._relay = Relay(self.loop)
        self._served: dict[str, Served] = {}
        self._orphan = False

    # -- workloads

    def set(self, identity: str, record: dict[str, Any], sockets: dict[str, socket.socket]) -> None:
        """Serve a workload by its record with these sockets; those it had and lacks now stay."""
        served = self._served.get(identity)
        if served is None:
            served = self._served[identity] = Served(record)
        served.record = record
        self._names.put(identity, record["endpoints"])
        if "udp" in sockets or "tcp" in sockets:
            if served.asker is not None:
                self._resolver.close(served.asker)
            served.asker = Asker(identity, sockets.pop("udp", None), sockets.pop("tcp", None))
            self._resolver.open(served.asker)
        if served.asker is not None:
            served.asker.servers = tuple(record.get("servers") or ())
            served.asker.forward = bool(record.get("forward", True))
            served.asker.gateway = str(record.get("gateway") or "")
        self._set_doors(served, sockets)

    def _set_doors(self, served: Served, sockets: dict[str, socket.socket]) -> None:
        """Doors for the record's ports; those no longer in it are closed."""
        ports = served.record.get("ports") or []
        identity = served.record["request"]["workload_id"]
        wanted = {port_role(port): port for port in ports}
        for key, door in list(served.doors.items()):
            if key not in wanted:
                self._relay.close(door)
                del served.doors[key]
        for role, held in sockets.items():
            port = wanted.get(role)
            if port is None:
                held.close()
                continue
            old = served.doors.pop(role, None)
            if old is not None:
                self._relay.close(old)
            door = Door(identity, port["protocol"], held, None)
            served.doors[role] = door
            self._relay.open(door)
        for key, door in served.doors.items():
            door.target = _target(served.record, wanted[key])

    def started(self, identity: str, pid: int) -> None:
        """The workload runs as that process: when it ends, all of it is dropped."""
        served = self._served.get(identity)
        if served is None:
            # Its sockets were given to a helper that has died since.
            self._recover(identity)
            return
        self._unwatch(served)
        try:
            served.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.drop(identity)
            return
        self.loop.watch(served.pidfd, READ, lambda _: self.drop(identity))

    def _unwatch(self, served: Served) -> None:
        if served.pidfd >= 0:
            self.loop.forget(served.pidfd)
            os.close(served.pidfd)
            served.pidfd = -1

    def drop(self, identity: str) -> None:
        """Serve a workload no more."""
        served = self._served.pop(identity, None)
        if served is None:
            return
        self._names.drop(identity)
        self._unwatch(served)
        if served.asker is not None:
            self._resolver.close(served.asker)
        for door in served.doors.values():
            self._relay.close(door)
        self._end_if_useless()

    # -- the holder

    def follow(self, parent: int) -> None:
        """Once the parent process has ended, end as soon as nobody is served."""
        try:
            pidfd = os.pidfd_open(parent)
        except ProcessLookupError:
            self.loop.later(0.0, self._orphaned)
            return

        def ended(_: int) -> None:
            self.loop.forget(pidfd)
            os.close(pidfd)
            self._orphaned()

        self.loop.watch(pidfd, READ, ended)

    def _orphaned(self) -> None:
        self._orphan = True
        self._end_if_useless()

    def _end_if_useless(self) -> None:
        if self._orphan and not self._served:
            self.loop.stop()

    def replace(self) -> None:
        """Be the only one: end the helper that a killed holder left."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        lock = os.open(f"{self._directory}/helper.lock", flags, 0o600)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                with contextlib.suppress(OSError, ValueError):
                    _end(int(os.pread(lock, 32, 0)), self._directory.removesuffix("/network"))
                time.sleep(0.01)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    # -- after a crash

    def recover(self) -> None:
        """Serve again what the files say is alive."""
        workloads = f"{self._directory}/workloads"
        try:
            listed = os.listdir(workloads)
        except FileNotFoundError:
            return
        for name in listed:
            if name.endswith(".pid"):
                self._recover(name[:-4])

    def _recover(self, identity: str) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._recover_one(f"{self._directory}/workloads", identity)

    def _recover_one(self, workloads: str, identity: str) -> None:
        with open(f"{workloads}/{identity}.pid", encoding="ascii") as file:
            pid, start = (int(word) for word in file.read().split())
        with open(f"{workloads}/{identity}.json", "rb") as file:
            record = json.load(file)
        pidfd = os.pidfd_open(pid)
        try:
            if _start_time(pid) != start:
                return
            sockets: dict[str, socket.socket] = {}
            if record.get("resolver_ports"):
                sockets.update(_open_inside(pid, record))
        finally:
            os.close(pidfd)
        for port in record.get("ports") or ():
            held = _bind(port)
            if held is not None:
                sockets[port_role(port)] = held
        self.set(identity, record, sockets)
        self.started(identity, pid)

    # -- the engine

    def listen(self) -> None:
        """Serve `helper.sock`; an old socket's file is replaced."""
        path = f"{self._directory}/helper.sock"
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        old = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(old)
        listener.listen(8)
        listener.setblocking(False)
        self.loop.watch(listener.fileno(), READ, lambda _: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        peer.setblocking(False)
        self.loop.watch(peer.fileno(), READ, lambda _: self._message(peer))

    def _message(self, peer: socket.socket) -> None:
        try:
            data, descriptors = _receive(peer)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self.loop.forget(peer.fileno())
            peer.close()
            return
        message = json.loads(data)
        operation = message["op"]
        if operation == "set":
            sockets = {
                str(role): socket.socket(fileno=fd)
                for role, fd in zip(message["roles"], descriptors, strict=True)
            }
            self.set(message["id"], message["record"], sockets)
        elif operation == "started":
            self.started(message["id"], message["pid"])
        elif operation == "drop":
            self.drop(message["id"])
        elif operation == "sync":
            with contextlib.suppress(OSError):
                peer.send(json.dumps({"ok": len(self._served)}).encode())


def _receive(peer: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors."""
    space = socket.CMSG_LEN(_DESCRIPTORS * 4)
    data, ancillary, _flags, _ = peer.recvmsg(_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(value[: len(value) - len(value) % 4])
    return data, found.tolist()


def port_role(port: dict[str, Any]) -> str:
    """What names one published port of a workload, e.g. "tcp 0.0.0.0 8080"."""
    return f"{port['protocol']} {port['address']} {port['host_port']}"


def _target(record: dict[str, Any], port: dict[str, Any]) -> tuple[str, int] | None:
    """Where a port leads: the workload's address of the host side's family, else of the other."""
    six = ":" in port["address"]
    publishing = record.get("publishing") or {}
    for version in ("6", "4") if six else ("4", "6"):
        address = publishing.get(version)
        if address:
            return address, int(port["port"])
    return None


def _start_time(pid: int) -> int:
    """In clock ticks since boot; proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[19])


def _open_inside(pid: int, record: dict[str, Any]) -> dict[str, socket.socket]:
    """The resolver's sockets in the namespace of a process, on the ports its redirection names."""
    from bulkhead.linux import netns
    from bulkhead.network.inner import ADDRESS, GUEST_ADDRESS, resolver_sockets

    ports = record["resolver_ports"]
    address = GUEST_ADDRESS if record["request"].get("guest") else ADDRESS

    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        udp, tcp = netns.inside(fd, lambda: resolver_sockets(*ports, address=address))
    finally:
        os.close(fd)
    return {"udp": udp, "tcp": tcp}


def _bind(port: dict[str, Any]) -> socket.socket | None:
    """The socket of a published port; None if it is taken (by the engine, who will send it)."""
    six = ":" in port["address"]
    kind = socket.SOCK_STREAM if port["protocol"] == "tcp" else socket.SOCK_DGRAM
    made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind)
    try:
        if six:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if port["protocol"] == "tcp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((port["address"], port["host_port"]))
        if port["protocol"] == "tcp":
            made.listen(512)
    except OSError:
        made.close()
        return None
    return made


def _end(pid: int, run: str) -> None:
    """SIGTERM, if that process is a helper of this run directory."""
    pidfd = os.pidfd_open(pid)
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        if run.encode() in words and any(b"bulkhead.network.helper" in word for word in words):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    finally:
        os.close(pidfd)


def main(run: str) -> None:
    """Serve until SIGTERM."""
    parent = os.getppid()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    helper = Helper(run)
    helper.replace()
    helper.recover()
    helper.listen()
    helper.follow(parent)
    helper.loop.run()


if __name__ == "__main__":
    main(sys.argv[1])
