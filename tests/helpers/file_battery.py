"""What programs do with files, as a program: it prints what it saw, without what must differ.

Run on a plain directory and on the file server's mount, the two outputs are to be equal.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path


def attempt(action: Callable[[], object]) -> object:
    """The result, or the error's name."""
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def facts(path: str) -> tuple[object, ...]:
    """What stat(2) says that does not depend on the file system or the clock."""
    found = os.lstat(path)
    kind = stat.S_IFMT(found.st_mode)
    size = found.st_size if kind != stat.S_IFDIR else 0
    return (oct(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, size)


def names(top: str) -> None:
    os.mkdir(f"{top}/d", 0o750)
    with open(f"{top}/d/f", "w") as file:
        file.write("hello")
    os.link(f"{top}/d/f", f"{top}/l")
    os.symlink("d/f", f"{top}/s")
    os.symlink("/etc/passwd", f"{top}/out")
    print(facts(f"{top}/d/f"), facts(f"{top}/l"), facts(f"{top}/s"), facts(f"{top}/d"))
    print(os.readlink(f"{top}/out"), os.path.samefile(f"{top}/d/f", f"{top}/l"))
    print(attempt(lambda: os.rmdir(f"{top}/d")), attempt(lambda: os.mkdir(f"{top}/d")))
    print(attempt(lambda: os.open(f"{top}/none", os.O_RDONLY)))
    print(attempt(lambda: os.unlink(f"{top}/d")), attempt(lambda: os.open(f"{top}/{'n' * 300}", 0)))
    os.rename(f"{top}/d/f", f"{top}/d/g")
    print(sorted(os.listdir(f"{top}/d")), Path(f"{top}/l").read_text())
    os.mkfifo(f"{top}/fifo", 0o640)
    print(facts(f"{top}/fifo"))
    os.unlink(f"{top}/l")
    print(facts(f"{top}/d/g"))


def rename_flags(top: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def rename(old: str, new: str, flags: int) -> object:
        done = libc.renameat2(-100, f"{top}/{old}".encode(), -100, f"{top}/{new}".encode(), flags)
        return "ok" if done == 0 else errno.errorcode[ctypes.get_errno()]

    for name in ("a", "b"):
        with open(f"{top}/{name}", "w") as file:
            file.write(name)
    print(rename("a", "b", 1), rename("a", "c", 1))
    print(rename("b", "c", 2), Path(f"{top}/b").read_text(), Path(f"{top}/c").read_text())


def contents(top: str) -> None:
    path = f"{top}/big"
    with open(path, "wb") as file:
        file.write(b"x" * 3_000_000)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"middle", 1_500_000)
    print(os.pread(fd, 8, 1_499_999), os.fstat(fd).st_size)
    os.ftruncate(fd, 1_000_000)
    print(os.fstat(fd).st_size, os.pread(fd, 10, 999_995))
    os.close(fd)
    first = os.open(path, os.O_WRONLY | os.O_APPEND)
    second = os.open(path, os.O_WRONLY | os.O_APPEND)
    for n in range(5):
        os.write(first, b"1%d" % n)
        os.write(second, b"2%d" % n)
    os.fsync(first)
    os.fdatasync(second)
    os.close(first)
    os.close(second)
    print(Path(path).read_bytes()[-20:])
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    print(os.stat(path).st_size)
    fd = os.open(f"{top}/gone", os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink(f"{top}/gone")
    os.write(fd, b"still here")
    os.ftruncate(fd, 5)
    os.fchmod(fd, 0o640)
    print(os.pread(fd, 20, 0), oct(os.fstat(fd).st_mode), os.fstat(fd).st_nlink)
    os.close(fd)


def holes(top: str) -> None:
    fd = os.open(f"{top}/sparse", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, 8 << 20)
    os.pwrite(fd, b"data", 4 << 20)
    print(os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 4 << 20, os.SEEK_HOLE))
    os.posix_fallocate(fd, 8 << 20, 1 << 20)
    print(os.fstat(fd).st_size)
    out = os.open(f"{top}/copy", os.O_RDWR | os.O_CREAT, 0o644)
    print(os.copy_file_range(fd, out, 1000, 4 << 20, 0), os.pread(out, 6, 0))
    os.close(out)
    os.close(fd)


def maps(top: str) -> None:
    fd = os.open(f"{top}/map", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, 1 << 20)
    with mmap.mmap(fd, 1 << 20) as area:
        area[500_000:500_005] = b"hello"
        area.flush()
        print(os.pread(fd, 5, 500_000))
        area[0:4] = b"late"
    os.close(fd)
    print(Path(f"{top}/map").read_bytes()[:4])


def modes(top: str) -> None:
    path = f"{top}/mode"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o4751))
    print(facts(path))
    os.chown(path, 1234, 4321)
    os.chmod(path, 0o6755)
    print(facts(path))
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    print(os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns)
    os.mkdir(f"{top}/sgid")
    os.chown(f"{top}/sgid", 0, 777)
    os.chmod(f"{top}/sgid", 0o2775)
    os.mkdir(f"{top}/sgid/inner")
    os.close(os.open(f"{top}/sgid/file", os.O_CREAT, 0o644))
    print(facts(f"{top}/sgid/inner"), facts(f"{top}/sgid/file"))
    os.chmod(top, 0o777)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(1000)
        os.setuid(1000)
        os.close(os.open(f"{top}/theirs", os.O_CREAT | os.O_RDWR, 0o600))
        print(facts(f"{top}/theirs"), attempt(lambda: os.open(path, os.O_WRONLY)))
        print(attempt(lambda: os.chown(f"{top}/theirs", 0, 0)))
        # What somebody else writes loses the bits that give privileges.
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    os.chmod(path, 0o4777)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(1000)
        os.setuid(1000)
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"x")
        os._exit(0)
    os.waitpid(child, 0)
    print(facts(path))


def attributes(top: str) -> None:
    path = f"{top}/attrs"
    os.close(os.open(path, os.O_CREAT, 0o644))
    if attempt(lambda: os.setxattr(path, "user.one", b"1")) == "EOPNOTSUPP":
        print("none here")
        return
    os.setxattr(path, "user.two", b"2" * 200)
    print(sorted(os.listxattr(path)), os.getxattr(path, "user.two")[:3])
    os.removexattr(path, "user.one")
    print(os.listxattr(path), attempt(lambda: os.getxattr(path, "user.one")))
    print(attempt(lambda: os.setxattr(path, "user.two", b"", os.XATTR_CREATE)))
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    os.setxattr(path, "security.capability", capability)
    print(os.getxattr(path, "security.capability") == capability)
    with open(path, "w") as file:
        file.write("x")
    print(attempt(lambda: os.getxattr(path, "security.capability")))


def locks(top: str) -> None:
    path = f"{top}/lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    flocked = os.open(path, os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
    fcntl.flock(flocked, fcntl.LOCK_SH)
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        mine = os.open(path, os.O_RDWR)
        for kind, length, start in ((fcntl.LOCK_EX, 5, 5), (fcntl.LOCK_EX, 5, 10)):
            print(attempt(lambda k=kind, n=length, s=start: fcntl.lockf(mine, k | 4, n, s)))  # type: ignore[misc]
        print(attempt(lambda: fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)))
        print(attempt(lambda: fcntl.flock(mine, fcntl.LOCK_SH | fcntl.LOCK_NB)))
        found = fcntl.fcntl(mine, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
        print(struct.unpack("hhqqi4x", found)[:4])
        sys.stdout.flush()
        os.write(writing, b"x")
        fcntl.lockf(mine, fcntl.LOCK_EX, 10, 0)
        os._exit(7)
    os.read(reading, 1)
    fcntl.lockf(fd, fcntl.LOCK_UN, 10, 0)
    print(os.waitpid(child, 0)[1])
    os.close(fd)
    os.close(flocked)


def many(top: str) -> None:
    os.mkdir(f"{top}/many")
    for n in range(150):
        os.close(os.open(f"{top}/many/file-{n}", os.O_CREAT | os.O_WRONLY, 0o644))
    found = sorted(os.listdir(f"{top}/many"))
    print(len(found), found[0], found[-1])
    print(sum(entry.stat().st_size == 0 for entry in os.scandir(f"{top}/many")))
    deep = f"{top}/deep"
    for n in range(30):
        deep = f"{deep}/{n}"
    os.makedirs(deep)
    with open(f"{deep}/end", "w") as file:
        file.write("deep")
    os.rename(f"{top}/deep/0", f"{top}/moved")
    print(Path(f"{top}/moved{deep.removeprefix(f'{top}/deep/0')}/end").read_text())
    with open(f"{top}/many/file-0", "w") as file:
        file.write("again")
    print(facts(f"{top}/many/file-0"))


def main() -> None:
    os.umask(0o022)
    top = sys.argv[1]
    for part in (names, rename_flags, contents, holes, maps, modes, attributes, locks, many):
        os.mkdir(f"{top}/{part.__name__}")
        print("---", part.__name__)
        sys.stdout.flush()
        part(f"{top}/{part.__name__}")


if __name__ == "__main__":
    main()
