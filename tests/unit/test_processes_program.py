"""Launch programs as data: layout, holes, bounds."""

import struct

import pytest

from bulkhead.linux.program import MAX_OPS, Blob, Fd, Len, Patched, Program

HEADER, OP = 32, 80


def ops(data: bytes) -> list[tuple[int, ...]]:
    count = struct.unpack_from("=I", data, 12)[0]
    return [struct.unpack_from("=4BI6BH8H6Q", data, HEADER + OP * i) for i in range(count)]


def text(data: bytes, offset: int) -> bytes:
    at = struct.unpack_from("=I", data, 16)[0] + offset
    return data[at : data.index(b"\0", at)]


def strings(data: bytes, offset: int, count: int) -> list[bytes]:
    at = struct.unpack_from("=I", data, 16)[0] + offset
    table = struct.unpack_from(f"={count + 1}Q", data, at)
    assert table[-1] == 0
    return [text(data, o) for o in table[:-1]]


def finished(program: Program) -> bytes:
    program.exec("exec", ["/bin/true"], ["true"], [])
    return program.compile().data


def test_arguments_of_every_kind() -> None:
    program = Program()
    first = program.call("first", "getpid")
    program.call("second", "openat", -100, "päth\udc80", first, Fd(2), None, b"raw", ok=(2, 17))
    data = finished(program)
    op = ops(data)[1]
    assert op[1:3] == (6, 2)
    assert op[5:11] == (0, 3, 1, 2, 0, 3)
    assert op[12:14] == (2, 17)
    assert op[20] == (1 << 64) - 100
    assert text(data, op[21]) == "päth".encode() + b"\x80"
    assert (op[22], op[23], op[24]) == (0, 2, 0)
    assert text(data, op[25]) == b"raw"
    size, _, _, fds = struct.unpack_from("=4I", data, 8)
    assert (size, fds) == (len(data), 3)
    assert data[-1] == 0


def test_holes_of_every_kind_are_filled_without_recompiling() -> None:
    program = Program()
    name = program.hole("name", "first")
    program.call("set", "sethostname", name, Len(name))
    program.call("again", "sethostname", name, program.number("uid", 7))
    program.write("write", -100, "/file", program.hole("content", b"abc"))
    program.exec(
        "exec",
        program.vector("candidates", ["/bin/a"]),
        program.vector("argv", ["a"]),
        program.vector("env", []),
    )
    compiled = program.compile()
    filled = compiled.fill(
        name="longer than before",
        uid=1000,
        content=b"\0\1\2\3",
        candidates=["/x/b", "/y/b"],
        argv=["b", "", "c"],
        env=["A=ö"],
    )
    assert filled.steps is compiled.steps
    found = ops(filled.data)
    assert text(filled.data, found[0][20]) == b"longer than before"
    assert found[0][21] == 18
    assert found[1][20] == found[0][20] and found[1][21] == 1000
    assert found[2][23] == 4
    where = found[3][20:26]
    assert strings(filled.data, where[0], where[1]) == [b"/x/b", b"/y/b"]
    assert strings(filled.data, where[2], where[3]) == [b"b", b"", b"c"]
    assert strings(filled.data, where[4], where[5]) == ["A=ö".encode()]
    assert struct.unpack_from("=I", filled.data, 8)[0] == len(filled.data)
    before = ops(compiled.data)
    assert text(compiled.data, before[0][20]) == b"first" and before[0][21] == 5
    with pytest.raises(KeyError):
        compiled.fill(unknown="x")
    with pytest.raises(TypeError):
        compiled.fill(name=["x"])
    with pytest.raises(TypeError):
        compiled.fill(uid="x")
    with pytest.raises(ValueError):
        compiled.fill(name="a\0b")


def test_patched_structures_come_as_stores_before_the_call_and_skips_count_them() -> None:
    program = Program()
    slot = program.call("may fail", "getpid", ok=(1,))
    filter_bytes = Blob(b"filter")
    with program.when(slot):
        program.call("seccomp", "seccomp", 1, 0, Patched(bytes(16), ((0, 2, 1), (8, 8, slot))))
        program.call("later", "getpid", filter_bytes)
    after = program.call("after", "getpid")
    program.call("use", "close", after)
    data = finished(program)
    found = ops(data)
    assert [op[0] for op in found] == [1, 11, 9, 9, 1, 1, 1, 1, 8]
    assert found[1][21] == 4
    assert found[7][20] == 6  # the slot of "after", renumbered
    steps = program.compile().steps
    assert steps[2:5] == ["seccomp"] * 3
    assert len(program.compile().listing) == len(steps)


def test_equal_strings_are_kept_once_and_blobs_are_shared() -> None:
    program = Program()
    blob = Blob(b"buffer")
    for _ in range(3):
        program.call("a", "chdir", "/same")
        program.call("b", "chdir", blob)
    found = ops(finished(program))
    assert len({op[20] for op in found[0:6:2]}) == 1
    assert len({op[20] for op in found[1:6:2]}) == 1


def test_what_is_out_of_bounds_is_refused() -> None:
    program = Program()
    with pytest.raises(ValueError, match="at most 6"):
        program.call("x", "getpid", *range(7))
    with pytest.raises(OSError, match="no_such_call"):
        program.call("x", "no_such_call")
    with pytest.raises(ValueError, match="errnos"):
        program.call("x", "getpid", ok=range(1, 20))
    with pytest.raises(ValueError, match="nothing to execute"):
        program.exec("x", [], ["a"], [])
    with pytest.raises(ValueError, match="outside"):
        program.store("x", Blob(b"1234"), 1, 4, 0)
    with pytest.raises(ValueError, match="fixed size"):
        program.load("x", program.hole("h", b"12345678"), 0, 4)
    with pytest.raises(ValueError, match="there already"):
        program.hole("h", b"")
    program.call("nul", "chdir", "a\0b")
    with pytest.raises(ValueError, match="NUL"):
        program.compile()
    many = Program()
    for _ in range(MAX_OPS):
        many.call("x", "getpid")
    with pytest.raises(ValueError, match="at most"):
        many.call("x", "getpid")


def test_more_than_six_descriptors_can_be_kept_if_they_follow_each_other() -> None:
    program = Program()
    program.close("close the rest", [Fd(n) for n in range(2, 12)])
    compiled = program.compile()
    assert struct.unpack_from("=8I", compiled.data)[5] == 12
    with pytest.raises(ValueError, match="cannot be kept together"):
        Program().close("close the rest", [Fd(n) for n in (0, 1, 2, 3, 4, 5, 7)])
    with pytest.raises(ValueError, match="cannot be kept together"):
        Program().close("close the rest", [Fd(n) for n in range(30)])
