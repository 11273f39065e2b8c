"""Floor 0: where an installation keeps its files.

    root  (state; survives reboot)          default /var/lib/bulkhead
      lock            held by the engine (flock): two engines on one root refuse each other
      state.db        SQLite records (state/)
      store/          content store (store/)
      workloads/ID/   upper/ work/ (overlay), log/ (keeper), files engine generates
      volumes/NAME/   named volumes (volumes/)
      networks/       nothing but what network/ draws in its own docstring
    run   (runtime; gone at reboot)         default /run/bulkhead
      engine.sock     RPC (rpc.wire), 0660 root:bulkhead if that group exists, else 0600
      command.sock    command server (cli/server.py), 0600
      holder.sock keeper.sock               see keeper/
      layers/         mounted EROFS layers, in the engine's private mount namespace
      points/         a lowest layer: the mount points of every container
      workloads/ID/   exit records, and other per-boot files

An ordinary user's defaults are $XDG_DATA_HOME/bulkhead and $XDG_RUNTIME_DIR/bulkhead.
BULKHEAD_ROOT and BULKHEAD_RUN override both (tests use them).
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Home:
    """The two directories of one installation, as absolute paths."""

    root: str
    run: str

    def in_root(self, *parts: str) -> str:
        """A path below `root`."""
        return "/".join((self.root, *parts))

    def in_run(self, *parts: str) -> str:
        """A path below `run`."""
        return "/".join((self.run, *parts))

    def workload(self, identity: str) -> str:
        """The state directory of workload `identity`."""
        return f"{self.root}/workloads/{identity}"

    def workload_run(self, identity: str) -> str:
        """The runtime directory of workload `identity`."""
        return f"{self.run}/workloads/{identity}"


def default(root: str | None = None, run: str | None = None) -> Home:
    """The installation named by the arguments, else by the environment, else the user's default.

    Creates nothing.
    """
    root = root or os.environ.get("BULKHEAD_ROOT")
    run = run or os.environ.get("BULKHEAD_RUN")
    uid = os.geteuid()
    if uid == 0:
        return Home(
            os.path.abspath(root or "/var/lib/bulkhead"), os.path.abspath(run or "/run/bulkhead")
        )
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}"
    return Home(
        os.path.abspath(root or f"{data}/bulkhead"), os.path.abspath(run or f"{runtime}/bulkhead")
    )
