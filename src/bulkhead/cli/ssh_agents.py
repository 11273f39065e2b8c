"""`build --ssh`: agents that there are, and agents of our own for key files."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from bulkhead.cli.options import UsageError
from bulkhead.errors import Invalid, Unsupported

_READY_S = 30.0


@contextlib.contextmanager
def agents(given: Sequence[str], environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Sockets by name for `NAME`, `NAME=SOCKET` and `NAME=KEY[,KEY…]`; ours end with the block."""
    found = {}
    with contextlib.ExitStack() as undo:
        for text in given:
            name, _, rest = text.partition("=")
            paths = [os.path.expanduser(path) for path in rest.split(",") if path]
            if not paths:
                paths = [environ.get("SSH_AUTH_SOCK", "")]
                if not paths[0]:
                    raise UsageError(
                        f"--ssh {text}: SSH_AUTH_SOCK is not set; start ssh-agent, or name a key "
                        f"file: --ssh {name}=FILE"
                    )
            if all(os.path.isfile(path) for path in paths):
                found[name] = undo.enter_context(_holding(paths))
            elif len(paths) == 1 and os.path.exists(paths[0]):
                found[name] = os.path.abspath(paths[0])
            else:
                raise UsageError(f"--ssh {text}: neither an agent's socket nor key files")
        yield found


@contextlib.contextmanager
def _holding(keys: Sequence[str]) -> Iterator[str]:
    """The socket of an agent that holds these keys (ssh-agent(1), ssh-add(1))."""
    for program in ("ssh-agent", "ssh-add"):
        if shutil.which(program) is None:
            raise Unsupported(f"key files for --ssh need the program {program} (openssh-client)")
    folder = tempfile.mkdtemp(prefix="bulkhead-ssh-")
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        socket = f"{folder}/agent"
        # -D: it stays our child; it says where it listens once it does.
        process = undo.enter_context(
            subprocess.Popen(
                ["ssh-agent", "-D", "-a", socket],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
        undo.callback(process.terminate)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise Invalid("ssh-agent did not start")
        for key in keys:
            done = subprocess.run(
                ["ssh-add", "-q", key], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                env={**os.environ, "SSH_AUTH_SOCK": socket, "SSH_ASKPASS_REQUIRE": "never"},
                check=False, timeout=_READY_S,
            )  # fmt: skip
            if done.returncode:
                said = " ".join(done.stderr.split()) or "it needs a passphrase: use an agent"
                raise Invalid(f"--ssh: {key} cannot be used: {said}")
        yield socket
