"""prctl(2): the operations this project uses."""

from bulkhead.linux import syscall

SET_PDEATHSIG = 1
SET_DUMPABLE = 4
SET_KEEPCAPS = 8
SET_NAME = 15
CAPBSET_READ = 23
CAPBSET_DROP = 24
SET_SECUREBITS = 28
SET_CHILD_SUBREAPER = 36
SET_NO_NEW_PRIVS = 38
GET_NO_NEW_PRIVS = 39
CAP_AMBIENT = 47

CAP_AMBIENT_RAISE = 2
CAP_AMBIENT_CLEAR_ALL = 4

SECBIT_NO_SETUID_FIXUP = 1 << 2


def prctl(operation: int, *arguments: int) -> int:
    """prctl(2); OSError with the kernel's errno."""
    return syscall.call("prctl", operation, *arguments, *([0] * (4 - len(arguments))))
