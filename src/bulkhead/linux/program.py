"""Launch programs: what a child does between clone3(2) and execve(2), as data.

A `Program` is a list of named steps, most of them one system call each. `compile()` turns it into
bytes that `native/launch.c` interprets in the freshly cloned child, without allocating. Nothing is
decided there: a step fails, or it succeeds.

The format, in the byte order of the machine (`native/launch.h` is its other description):

    header   u32 magic, arch, size, ops, data offset, fds, 2 x 0
    ops      80 bytes each:
             u8 kind, args, oks, 0; u32 syscall; u8 tag[6], 0, 0; u16 ok[8]; u64 arg[6]
    data     8 zero bytes, then blobs aligned to 8; the last byte of all is NUL

An argument is an integer, the result of an earlier op (its slot is its index), a descriptor passed
along, or an address in the data. Strings are NUL-terminated because the data is.
"""

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bulkhead.linux import syscall

MAGIC = 0x31504842
"""The bytes "BHP1" on a little-endian machine."""
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h."""
MAX_OPS = 4096
MAX_SIZE = 8 << 20
MAX_FDS = 200
"""Below SCM_MAX_FD (253), so that kept descriptors fit beside them; unix(7)."""
MAX_OKS = 8

_HEADER = struct.Struct("=8I")
_OP = struct.Struct("=4BI6BH8H6Q")
_WORD = struct.Struct("=Q")
_MASK = (1 << 64) - 1
_ARGS_AT = _OP.size - 48

CALL, WRITE, SAME_INODE, FSTYPE, SEND_FD, FORK, GATE, EXEC, STORE, LOAD, SKIP, FAIL, CLOSE = range(
    1, 14
)
KEPT_FIRST = 10
"""The number of the first descriptor that `close` keeps; native/launch.h."""
_KEPT_MORE = 16
KIND_NAMES = (
    "",
    "call",
    "write",
    "same_inode",
    "fstype",
    "send_fd",
    "fork",
    "gate",
    "exec",
    "store",
    "load",
    "skip",
    "fail",
    "close",
)
_INT, _SLOT, _FD, _BLOB = range(4)


@dataclass(frozen=True, slots=True)
class Slot:
    """The result of the op with this index; -errno if it failed with an errno that was `ok`."""

    index: int


@dataclass(frozen=True, slots=True)
class Fd:
    """The descriptor at this place of `LaunchRequest.fds`."""

    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Blob:
    """Bytes passed by address. The same object is the same address wherever it is used."""

    data: bytes
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Number:
    """An integer that `Compiled.fill` may replace (made by `Program.number`)."""

    value: int
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """Strings that `Compiled.fill` may replace (made by `Program.vector`), for `Program.exec`."""

    values: tuple[str, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Len:
    """The length of a blob in bytes, following it when a hole is filled."""

    blob: Blob


@dataclass(frozen=True, slots=True)
class Patched:
    """Bytes into which values known only in the child are stored before the call.

    `stores` are (offset, size in bytes: 1, 2, 4 or 8, value). A Blob as value stores its address,
    so this is how structures with pointers are made (struct sock_fprog, union bpf_attr).
    """

    data: bytes
    stores: tuple[tuple[int, int, "int | Slot | Fd | Blob | Number | Len"], ...]


Argument = int | Slot | Fd | Blob | Number | Len | Patched | str | bytes | None


def encode(text: str) -> bytes:
    """`text` as the kernel takes it: UTF-8 with surrogateescape, ValueError on a NUL inside."""
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise ValueError(f"a NUL character in {text!r}")
    return data


@dataclass(slots=True)
class _Op:
    kind: int
    step: str
    number: int = 0
    name: str = ""
    args: tuple[Argument, ...] = ()
    vectors: tuple[Vector, ...] = ()
    ok: tuple[int, ...] = ()


@dataclass(slots=True)
class Compiled:
    """A program as bytes; `steps[i]` names op i. `fill` makes a variant without recompiling."""

    data: bytes
    steps: list[str]
    listing: list[str]
    """One line per op, for people (`--dry-run`, `--debug`)."""
    _data_at: int = 0
    _holes: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def fill(self, **values: str | bytes | int | Sequence[str]) -> "Compiled":
        """A copy with holes replaced: text or bytes for `hole`, int for `number`, strings for
        `vector`. KeyError for a name the program does not have, ValueError for a NUL in text.
        """
        return Compiled(self.filled(values), self.steps, self.listing, self._data_at, self._holes)

    def holes(self) -> frozenset[str]:
        """The names of the holes that steps use."""
        return frozenset(self._holes)

    def filled(self, values: Mapping[str, str | bytes | int | Sequence[str]]) -> bytes:
        """What `fill` does, giving only the bytes."""
        out = bytearray(self.data)
        base = self._data_at
        for name, value in values.items():
            patches = self._holes[name]
            if isinstance(value, int):
                for what, at in patches:
                    _expect(what == "number", name)
                    _WORD.pack_into(out, at, value & _MASK)
                continue
            if isinstance(value, (str, bytes)):
                raw = encode(value) if isinstance(value, str) else value
                where, length = len(out) - base, len(raw)
                out += raw
            else:
                where, length = _append_vector(out, base, value)
            out += b"\0" * (8 - len(out) % 8)
            for what, at in patches:
                _expect(what in _PATCHES[isinstance(value, (str, bytes))], name)
                _WORD.pack_into(out, at, where if what in ("address", "vector") else length)
        if len(out) > MAX_SIZE:
            raise ValueError(f"launch program of {len(out)} bytes is larger than {MAX_SIZE}")
        struct.pack_into("=I", out, 8, len(out))
        return bytes(out)


_PATCHES = {True: ("address", "length"), False: ("vector", "count")}


def _expect(fits: bool, name: str) -> None:
    if not fits:
        raise TypeError(f"hole {name!r} takes another kind of value")


def _append_vector(out: bytearray, base: int, values: Sequence[str]) -> tuple[int, int]:
    """Append strings and the NULL-terminated table of their offsets; (table offset, count)."""
    table: list[int] = []
    for value in values:
        table.append(len(out) - base)
        out += encode(value)
        out += b"\0"
    out += b"\0" * (-len(out) % 8)
    where = len(out) - base
    out += struct.pack(f"={len(table) + 1}Q", *table, 0)
    return where, len(table)


class Program:
    """Builds a launch program, step by step in the order of execution."""

    def __init__(self) -> None:
        self._ops: list[_Op] = []
        self._names: set[str] = set()

    def _add(self, op: _Op) -> Slot:
        if len(self._ops) >= MAX_OPS:
            raise ValueError(f"a launch program has at most {MAX_OPS} steps")
        self._ops.append(op)
        return Slot(len(self._ops) - 1)

    # --- steps -----------------------------------------------------------------------------

    def call(self, step: str, syscall_name: str, *args: Argument, ok: Collection[int] = ()) -> Slot:
        """One system call; an errno in `ok` is no failure (the slot is then -errno)."""
        if len(args) > 6:
            raise ValueError(f"{step}: a system call has at most 6 arguments")
        return self._add(
            _Op(CALL, step, syscall.number(syscall_name), syscall_name, args, ok=_oks(ok))
        )

    def write(
        self,
        step: str,
        dirfd: Argument,
        path: "str | Blob",
        data: "bytes | str | Blob",
        ok: Collection[int] = (),
    ) -> Slot:
        """openat(dirfd, path, O_WRONLY|O_CLOEXEC), write everything in one write(2), close.

        A `dirfd` of AT_FDCWD (-100) with an absolute path is usual. A short write fails with EIO.
        """
        blob = (
            data
            if isinstance(data, Blob)
            else Blob(data if isinstance(data, bytes) else encode(data))
        )
        return self._add(_Op(WRITE, step, args=(dirfd, path, blob, Len(blob)), ok=_oks(ok)))

    def same_inode(self, step: str, first: Argument, second: Argument) -> None:
        """Fail with ESTALE unless both descriptors are of the same inode of the same device."""
        self._add(_Op(SAME_INODE, step, args=(first, second)))

    def expect_fstype(self, step: str, fd: Argument, magic: int) -> None:
        """Fail with EXDEV unless statfs(2) of `fd` gives this f_type."""
        self._add(_Op(FSTYPE, step, args=(fd, magic)))

    def send_fd(self, step: str, name: str, fd: Argument) -> None:
        """Hand a copy of `fd` to the holder, which appends it to the entry's kept descriptors."""
        self._add(_Op(SEND_FD, step, args=(name, fd)))

    def fork(self, step: str) -> None:
        """Continue in a child whose parent is the holder too (CLONE_PARENT); this process ends.

        What follows a setns(2) into a PID namespace must run in such a child to be inside it.
        """
        self._add(_Op(FORK, step))

    def gate(self, step: str, fd: Argument) -> None:
        """Block until `fd` can give a byte or is at its end."""
        self._add(_Op(GATE, step, args=(fd,)))

    def exec(
        self,
        step: str,
        candidates: "Sequence[str] | Vector",
        argv: "Sequence[str] | Vector",
        env: "Sequence[str] | Vector",
    ) -> None:
        """Become a program: the first of `candidates` that execve(2) takes.

        ENOENT, ENOTDIR and EACCES lead to the next; EACCES is what is reported in the end if it
        was met. `env` holds NAME=VALUE strings.
        """
        vectors = tuple(
            v if isinstance(v, Vector) else Vector(tuple(v), "") for v in (candidates, argv, env)
        )
        if not vectors[0].values or not vectors[1].values:
            raise ValueError(f"{step}: nothing to execute")
        self._add(_Op(EXEC, step, vectors=vectors))

    def close(self, step: str, keep: "Sequence[Argument]" = ()) -> None:
        """Close all descriptors but 0, 1 and 2 (and the holder's own channel, until the exec).

        Before the exec it keeps a path like /proc/self/fd/9/.. from leading to the host. What is
        in `keep` is there as KEPT_FIRST and the numbers after it, inherited; those beyond the sixth
        must follow it in the request, and each other.
        """
        more = tuple(keep[6:])
        if more:
            last = keep[5]
            start = last.index + 1 if isinstance(last, Fd) else -1
            if len(more) > _KEPT_MORE or more != tuple(Fd(start + n) for n in range(len(more))):
                raise ValueError(f"{step}: these descriptors cannot be kept together")
        self._add(_Op(CLOSE, step, number=len(more), args=tuple(keep[:6])))

    def store(self, step: str, blob: Blob, offset: int, size: int, value: Argument) -> None:
        """Store `value` in `size` bytes (1, 2, 4, 8) at `offset` of `blob`."""
        _bounds(step, blob, offset, size)
        self._add(_Op(STORE, step, args=(blob, offset, size, value)))

    def load(self, step: str, blob: Blob, offset: int, size: int) -> Slot:
        """What a system call left in `blob`: the unsigned number of `size` bytes at `offset`."""
        _bounds(step, blob, offset, size)
        return self._add(_Op(LOAD, step, args=(blob, offset, size)))

    def fail(self, step: str, errno: int) -> None:
        """Fail here with `errno`; useful inside `when`."""
        if not 0 < errno < 4096:
            raise ValueError(f"{step}: errno {errno}")
        self._add(_Op(FAIL, step, args=(errno,)))

    @contextmanager
    def when(self, slot: Slot, *, failed: bool = False) -> Iterator[None]:
        """The steps of this block run only if `slot` is not negative (`failed`: only if it is).

        Slots of steps that did not run are -EBADF.
        """
        op = _Op(SKIP, f"when {self._ops[slot.index].step}", args=(slot, 0, int(failed)))
        at = self._add(op).index
        yield
        op.args = (slot, len(self._ops) - at - 1, int(failed))

    # --- holes -----------------------------------------------------------------------------

    def _name(self, name: str) -> str:
        if not name or name in self._names:
            raise ValueError(f"hole {name!r} is unnamed or there already")
        self._names.add(name)
        return name

    def hole(self, name: str, default: "str | bytes") -> Blob:
        """A blob that `Compiled.fill(name=…)` replaces; text is NUL-terminated either way."""
        return Blob(default if isinstance(default, bytes) else encode(default), self._name(name))

    def number(self, name: str, default: int) -> Number:
        """An integer argument that `Compiled.fill(name=…)` replaces."""
        return Number(default, self._name(name))

    def vector(self, name: str, default: Sequence[str]) -> Vector:
        """Strings (candidates, argv, env) that `Compiled.fill(name=…)` replaces."""
        return Vector(tuple(default), self._name(name))

    # --- result ----------------------------------------------------------------------------

    def compile(self) -> Compiled:
        """The program as bytes for this architecture; ValueError if it is out of bounds."""
        return _Compiler(self._ops).compile()


def _oks(ok: Collection[int]) -> tuple[int, ...]:
    if len(ok) > MAX_OKS or not all(0 < errno < 4096 for errno in ok):
        raise ValueError(f"at most {MAX_OKS} errnos can be ok, got {ok}")
    return tuple(sorted(ok))


def _bounds(step: str, blob: Blob, offset: int, size: int) -> None:
    if blob.name:
        raise ValueError(f"{step}: a hole has no fixed size to store to or load from")
    if size not in (1, 2, 4, 8) or offset < 0 or offset + size > len(blob.data):
        raise ValueError(f"{step}: {size} bytes at {offset} are outside {len(blob.data)}")


class _Compiler:
    def __init__(self, ops: Sequence[_Op]) -> None:
        self.source = ops
        self.ops: list[_Op] = []
        self.data = bytearray(8)
        self.interned: dict[bytes, int] = {}
        self.blobs: dict[int, int] = {}
        self.vectors: dict[int, int] = {}
        self.holes: dict[str, list[tuple[str, int]]] = {}
        self.fds = 0

    def compile(self) -> Compiled:
        new_index = self._expand()
        table = bytearray()
        for op in self.ops:
            table += self._op(op, len(table), new_index)
        if len(self.ops) > MAX_OPS:
            raise ValueError(f"a launch program has at most {MAX_OPS} steps")
        if self.fds > MAX_FDS:
            raise ValueError(f"a launch program takes at most {MAX_FDS} descriptors")
        self.data += b"\0" * (8 - len(self.data) % 8)
        data_at = _HEADER.size + len(table)
        size = data_at + len(self.data)
        if size > MAX_SIZE:
            raise ValueError(f"launch program of {size} bytes is larger than {MAX_SIZE}")
        header = _HEADER.pack(
            MAGIC, ARCHES[syscall.machine()], size, len(self.ops), data_at, self.fds, 0, 0
        )
        return Compiled(
            header + bytes(table) + bytes(self.data),
            [op.step for op in self.ops],
            [_describe(op) for op in self.ops],
            data_at,
            self.holes,
        )

    def _expand(self) -> list[int]:
        """Put STORE ops before ops with Patched arguments; the new index of every old op."""
        new_index: list[int] = []
        skips: list[tuple[_Op, int]] = []
        for old, op in enumerate(self.source):
            args: list[Argument] = []
            for arg in op.args:
                if isinstance(arg, Patched):
                    blob = Blob(arg.data)
                    for offset, size, value in arg.stores:
                        _bounds(op.step, blob, offset, size)
                        self.ops.append(_Op(STORE, op.step, args=(blob, offset, size, value)))
                    self.blobs[id(blob)] = self._append(arg.data)
                    arg = blob
                args.append(arg)
            new_index.append(len(self.ops))
            copy = _Op(op.kind, op.step, op.number, op.name, tuple(args), op.vectors, op.ok)
            self.ops.append(copy)
            if op.kind == SKIP:
                skips.append((copy, old))
        new_index.append(len(self.ops))
        self._aim_skips(skips, new_index)
        return new_index

    def _aim_skips(self, skips: list[tuple[_Op, int]], new_index: list[int]) -> None:
        for copy, old in skips:
            slot, count, failed = copy.args
            assert isinstance(count, int)
            # The STOREs of the op after the block come before it and are harmless to skip to:
            # the block ends where the last op of the block ends.
            end = new_index[old + count] + 1
            copy.args = (slot, end - new_index[old] - 1, failed)

    def _append(self, data: bytes) -> int:
        at = len(self.data)
        self.data += data
        # At least one NUL, so that what follows is never part of a string.
        self.data += b"\0" * (8 - len(self.data) % 8)
        return at

    def _text(self, data: bytes) -> int:
        at = self.interned.get(data)
        if at is None:
            at = self.interned[data] = self._append(data)
        return at

    def _blob(self, blob: Blob) -> int:
        at = self.blobs.get(id(blob))
        if at is None:
            at = self.blobs[id(blob)] = self._append(blob.data)
        return at

    def _hole(self, name: str, what: str, at: int) -> None:
        if name:
            self.holes.setdefault(name, []).append((what, at))

    def _op(self, op: _Op, offset: int, new_index: list[int]) -> bytes:
        where = _HEADER.size + offset + _ARGS_AT
        tags = [0] * 6
        values = [0] * 6
        for i, arg in enumerate(op.args):
            tags[i], values[i] = self._argument(arg, where + 8 * i, new_index, len(self.ops))
        for i, vector in enumerate(op.vectors):
            tags[2 * i], values[2 * i] = _BLOB, self._vector(vector)
            values[2 * i + 1] = len(vector.values)
            self._hole(vector.name, "vector", where + 16 * i)
            self._hole(vector.name, "count", where + 16 * i + 8)
        if op.kind == CLOSE and op.number:
            self.fds = max(self.fds, values[5] + op.number + 1)
        count = len(op.args) or 2 * len(op.vectors)
        oks = list(op.ok) + [0] * (MAX_OKS - len(op.ok))
        return _OP.pack(op.kind, count, len(op.ok), 0, op.number, *tags, 0, *oks, *values)

    def _vector(self, vector: Vector) -> int:
        at = self.vectors.get(id(vector))
        if at is None:
            at, _ = _append_vector(self.data, 0, vector.values)
            self.data += b"\0" * (8 - len(self.data) % 8)
            self.vectors[id(vector)] = at
        return at

    def _argument(
        self, arg: Argument, where: int, new_index: list[int], ops: int
    ) -> tuple[int, int]:
        match arg:
            case None:
                return _INT, 0
            case int():
                return _INT, arg & _MASK
            case str():
                return _BLOB, self._text(encode(arg))
            case bytes():
                return _BLOB, self._append(arg)
            case Blob():
                self._hole(arg.name, "address", where)
                return _BLOB, self._blob(arg)
            case Len():
                self._hole(arg.blob.name, "length", where)
                return _INT, len(arg.blob.data)
            case Number():
                self._hole(arg.name, "number", where)
                return _INT, arg.value & _MASK
            case Fd():
                self.fds = max(self.fds, arg.index + 1)
                return _FD, arg.index
            case Slot():
                if not 0 <= arg.index < len(new_index) - 1:
                    raise ValueError(f"slot {arg.index} is not of this program")
                return _SLOT, new_index[arg.index]
            case _:
                raise TypeError(f"not an argument of a launch step: {arg!r}")


def _describe(op: _Op) -> str:
    shown = [_show(a) for a in op.args] + [
        f"[{', '.join(map(repr, v.values))}]" for v in op.vectors
    ]
    ok = f" (errno {', '.join(map(str, op.ok))} is fine)" if op.ok else ""
    return f"{op.step}: {op.name or KIND_NAMES[op.kind]}({', '.join(shown)}){ok}"


def _show(arg: Argument) -> str:
    match arg:
        case None:
            return "NULL"
        case Slot():
            return f"${arg.index}"
        case Fd():
            return f"fd#{arg.index}"
        case Blob():
            text = repr(arg.data) if len(arg.data) <= 60 else f"<{len(arg.data)} bytes>"
            return f"{{{arg.name}: {text}}}" if arg.name else text
        case Len():
            return str(len(arg.blob.data))
        case Number():
            return f"{{{arg.name}: {arg.value}}}"
        case int():
            return str(arg) if -4096 < arg < 4096 else hex(arg)
        case _:
            return repr(arg)
