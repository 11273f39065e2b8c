"""systemd's scopes by name, limits as properties, and D-Bus's wire format."""

import contextlib
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Invalid
from bulkhead.linux import dbus
from bulkhead.oci.runtime import CPU, Memory, Pids, Resources
from bulkhead.runtime import scopes


@pytest.mark.parametrize(
    ("path", "unit", "group"),
    [
        ("", "bulkhead-c1.scope", "/system.slice/bulkhead-c1.scope"),
        ("machine.slice:libpod:abc", "libpod-abc.scope", "/machine.slice/libpod-abc.scope"),
        ("user-1000.slice::x", "x.scope", "/user.slice/user-1000.slice/x.scope"),
        ("-.slice:docker:x", "docker-x.scope", "/docker-x.scope"),
        (":cri-containerd:x", "cri-containerd-x.scope", "/system.slice/cri-containerd-x.scope"),
    ],
)
def test_a_path_names_a_scope(path: str, unit: str, group: str) -> None:
    found = scopes.parse(path, "c1")
    assert (found.unit, found.path) == (unit, group)


@pytest.mark.parametrize(
    "path",
    ["/a/b", "a.slice:b", "a:b:c", "a--b.slice:p:x", "a.slice:p:x/y", "a.slice:p:", ".slice:p:x"],
)
def test_other_forms_are_refused(path: str) -> None:
    with pytest.raises(Invalid):
        scopes.parse(path, "c1")


def test_limits_are_properties() -> None:
    resources = Resources(
        memory=Memory(limit=1 << 20, swap=3 << 20),
        cpu=CPU(shares=1024, quota=25_000, period=50_000, cpus="0,2-3,9"),
        pids=Pids(-1),
    )
    assert dict(scopes.limits(resources)) == {
        "MemoryMax": ("t", 1 << 20),
        "MemorySwapMax": ("t", 2 << 20),
        "CPUWeight": ("t", 100),
        "CPUQuotaPeriodUSec": ("t", 50_000),
        "CPUQuotaPerSecUSec": ("t", 500_000),
        "AllowedCPUs": ("ay", [0b1101, 0b10]),
        "TasksMax": ("t", (1 << 64) - 1),
    }
    assert scopes.limits(Resources()) == []


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
_VARIANT = st.one_of(
    st.tuples(st.just("s"), _TEXT),
    st.tuples(st.just("t"), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("b"), st.booleans()),
    st.tuples(st.just("au"), st.lists(st.integers(0, (1 << 32) - 1), max_size=5)),
    st.tuples(st.just("ay"), st.lists(st.integers(0, 255), max_size=5)),
)
_PROPERTIES = st.lists(st.tuples(_TEXT, _VARIANT), max_size=6)


@given(_TEXT, _PROPERTIES)
def test_what_is_written_is_read(name: str, properties: list[object]) -> None:
    signature = "ssa(sv)a(sa(sv))"
    values = (name, "replace", properties, [(name, properties)])
    assert dbus.unmarshal(signature, dbus.marshal(signature, values)) == values


def test_the_wire_format() -> None:
    """An example by hand: alignment, lengths, a variant in a structure in an array."""
    body = dbus.marshal("ya(sv)", (7, [("n", ("u", 5))]))
    assert body.hex(" ", 4) == "07000000 10000000 01000000 6e000175 00000000 05000000"
    assert dbus.unmarshal("ya(sv)", body) == (7, [("n", ("u", 5))])


@given(st.binary(max_size=60))
def test_garbage_is_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        dbus.unmarshal("a(sv)", data)


def test_signatures_are_split() -> None:
    assert dbus.split("sa{sv}(ii)aau") == ["s", "a{sv}", "(ii)", "aau"]


def _message(kind: int, fields: list[object], signature: str, *values: object) -> bytes:
    body = dbus.marshal(signature, values)
    head = (ord("l"), kind, 0, 1, len(body), 1, [*fields, (8, ("g", signature))])
    data = dbus.marshal("yyyyuua(yv)", head)
    return data + bytes(-len(data) % 8) + body


def test_calls_and_signals(tmp_path: Path) -> None:
    """Against a server by hand: a signal comes before the answer; the second call fails."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "bus"))
        server.listen()

        def hear(client: socket.socket, word: bytes) -> None:
            while word not in b"".join(heard):
                piece = client.recv(4096)
                if not piece:
                    raise EOFError(f"it left without {word!r}")
                heard.append(piece)

        def serve() -> None:
            client, _ = server.accept()
            with client:
                hear(client, b"\r\n")
                client.sendall(b"OK 0123\r\n")
                hear(client, b"Start")
                told = _message(4, [(3, ("s", "JobRemoved"))], "uoss", 7, "/job/7", "u", "done")
                client.sendall(told + _message(2, [(5, ("u", 1))], "o", "/job/7"))
                hear(client, b"Stop")
                fields: list[object] = [(4, ("s", "a.b.NoSuchUnit")), (5, ("u", 2))]
                client.sendall(_message(3, fields, "s", "not there"))

        thread = threading.Thread(target=serve)
        thread.start()
        with dbus.Connection(str(tmp_path / "bus")) as bus:
            assert bus.call("a.b", "/a", "a.b.C", "Start", "s", "u") == ("/job/7",)
            assert bus.signal().body == (7, "/job/7", "u", "done")
            with pytest.raises(dbus.CallFailed, match="not there") as failed:
                bus.call("a.b", "/a", "a.b.C", "Stop", "s", "u")
            assert failed.value.name == "a.b.NoSuchUnit"
        thread.join()
    assert b"".join(heard).startswith(b"\0AUTH EXTERNAL ")
