"""A terminal for a process: a pair in the container's own devpts, its master sent out.

The slave is got from the master (TIOCGPTPEER), never opened by a path; see ioctl_tty(2).
"""

import os
import stat

from bulkhead.linux import mounts as kernel
from bulkhead.linux import terminals
from bulkhead.linux.openat2 import HOW_SIZE, IN_ROOT, NO_MAGICLINKS, open_how
from bulkhead.linux.program import Argument, Program, Slot

MASTER_NAME = "pty"
_OPEN_MASTER = open_how(os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC, IN_ROOT | NO_MAGICLINKS)


def plan_open(program: Program, devpts: Slot) -> Slot:
    """A master in `devpts`, a devpts of our own making; its slave is number 0."""
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    return program.call("open a terminal", "openat", devpts, "ptmx", flags, 0)


def plan_open_inside(program: Program, root: Argument) -> Slot:
    """A master in a running container, whose /dev is not to be trusted: verified to be devpts."""
    step = "open a terminal"
    master = program.call(step, "openat2", root, "dev/pts/ptmx", _OPEN_MASTER, HOW_SIZE)
    program.expect_fstype("verify the terminal's file system", master, kernel.DEVPTS_MAGIC)
    return master


def plan_use(program: Program, master: Slot, *, uid: int, size: Argument | None) -> Slot:
    """Unlock the pair, size it, give the slave to `uid`, send the master out; the slave's slot.

    `size` is a struct winsize (terminals.window_size), None to leave it 0 by 0.
    """
    program.call("unlock the terminal", "ioctl", master, terminals.TIOCSPTLCK, terminals.UNLOCKED)
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    slave = program.call("open the terminal's slave", "ioctl", master, terminals.TIOCGPTPEER, flags)
    if size is not None:
        program.call("size the terminal", "ioctl", master, terminals.TIOCSWINSZ, size)
    if uid:
        program.call("give the terminal to the user", "fchown", slave, uid, -1)
    program.send_fd("send the terminal's master", MASTER_NAME, master)
    return slave


def plan_console(program: Program, dev: Slot, devpts: Slot) -> None:
    """Bind the slave of the first pair of `devpts` on /dev/console."""
    step = "bind the terminal on /dev/console"
    flags = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC
    clone = program.call(step, "open_tree", devpts, "0", flags)
    program.call(step, "mknodat", dev, "console", stat.S_IFREG | 0o600, 0)
    program.call(step, "move_mount", clone, "", dev, "console", kernel.MOVE_MOUNT_F_EMPTY_PATH)


def plan_control(program: Program, slave: Slot) -> None:
    """Make it the controlling terminal of the session (after setsid) and the standard streams."""
    program.call("take the terminal", "ioctl", slave, terminals.TIOCSCTTY, 0)
    plan_streams(program, (slave, slave, slave))


def plan_streams(program: Program, streams: "tuple[Argument, Argument, Argument]") -> None:
    """Standard input, output and error."""
    for number, (name, stream) in enumerate(
        zip(("input", "output", "error"), streams, strict=True)
    ):
        program.call(f"set standard {name}", "dup3", stream, number, 0)
