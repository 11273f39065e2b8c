"""The build cache: results of steps by key, and the directories of cache mounts.

    ROOT/build/
      steps/KEY.json    {"key", "diff_id" ("" for none), "size", "created", "what", "kind"}; its
                        modification time is when it was last used; replaced by rename
      mounts/HEX/       HEX: SHA-256 of the mount's id
        meta.json       {"id", "created"}
        data/           what RUN --mount=type=cache sees; data.1, … further private copies

The layers themselves lie in the content store; `held` names them for its garbage collection. Only
the engine writes here. A record that cannot be read is as good as none.
"""

import contextlib
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from bulkhead.errors import Invalid
from bulkhead.store import files

DEFAULT_KEEP = 20 << 30
"""Bytes of layers and cache mounts that are kept without being asked."""


@dataclass(slots=True)
class Step:
    """One remembered result."""

    key: str
    diff_id: str
    size: int
    created: str
    what: str
    kind: str
    used: float = 0.0
    hits: int = 0


@dataclass(slots=True)
class Mount:
    """One cache mount."""

    name: str
    path: str
    size: int
    used: float


class Cache:
    """Of one installation; safe for threads."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._lock = threading.RLock()
        self._steps: dict[str, Step] | None = None
        self._busy: dict[str, int] = {}
        self._locks: dict[str, threading.RLock] = {}

    # --- steps

    def _load(self) -> dict[str, Step]:
        if self._steps is None:
            self._steps = {}
            for folder in ("steps", "mounts"):
                os.makedirs(f"{self.root}/{folder}", mode=0o700, exist_ok=True)
            for name in os.listdir(f"{self.root}/steps"):
                if not name.endswith(".json"):
                    with contextlib.suppress(OSError):
                        os.unlink(f"{self.root}/steps/{name}")
                    continue
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    path = f"{self.root}/steps/{name}"
                    with open(path, "rb") as file:
                        step = Step(**json.load(file))
                        step.used = os.fstat(file.fileno()).st_mtime
                    self._steps[step.key] = step
        return self._steps

    def get(self, key: str) -> Step | None:
        """What is remembered for `key`."""
        with self._lock:
            step = self._load().get(key)
            if step is not None:
                step.used = time.time()
                step.hits += 1
                with contextlib.suppress(OSError):
                    os.utime(self._path(key))
            return step

    def put(self, step: Step) -> None:
        """Remember it."""
        with self._lock:
            steps = self._load()
            step.used = time.time()
            steps[step.key] = step
            fresh = f"{self.root}/steps/{secrets.token_hex(8)}"
            with open(fresh, "w", encoding="utf-8") as file:
                json.dump(asdict(step), file)
            os.rename(fresh, self._path(step.key))

    def forget(self, key: str) -> None:
        """Drop one."""
        with self._lock:
            self._load().pop(key, None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.root}/steps/{key}.json"

    def steps(self) -> list[Step]:
        """All of them, the least recently used first."""
        with self._lock:
            return sorted(self._load().values(), key=lambda step: step.used)

    def held(self) -> set[str]:
        """Digests of the layers that results need."""
        with self._lock:
            return {step.diff_id for step in self._load().values() if step.diff_id}

    # --- mounts

    def _folder(self, name: str) -> str:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        return f"{self.root}/mounts/{digest}"

    @contextlib.contextmanager
    def mount(
        self, name: str, sharing: str, check: Callable[[], None] = lambda: None
    ) -> Iterator[str]:
        """The directory of the cache mount `name`, for one step.

        `shared`: at the same time as others; `locked`: after them; `private`: one of its own. Who
        takes several locked ones takes them by name. `check` may end the wait by raising.
        """
        folder = self._folder(name)
        with contextlib.ExitStack() as undo:
            if sharing == "locked":
                with self._lock:
                    lock = self._locks.setdefault(folder, threading.RLock())
                while not lock.acquire(timeout=0.2):
                    check()
                undo.callback(lock.release)
            with self._lock:
                self._load()
                path = self._claim(folder, name, private=sharing == "private")
                self._busy[path] = self._busy.get(path, 0) + 1
            undo.callback(self._give_back, path)
            yield path

    def _claim(self, folder: str, name: str, *, private: bool) -> str:
        if not os.path.exists(f"{folder}/meta.json"):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with open(f"{folder}/meta.json", "w", encoding="utf-8") as file:
                json.dump({"id": name, "created": time.time()}, file)
        number = 0
        while True:
            path = f"{folder}/data" + (f".{number}" if number else "")
            if not private or not self._busy.get(path):
                break
            number += 1
        if not os.path.isdir(path):
            os.mkdir(path, 0o755)
        os.utime(folder)
        return path

    def _give_back(self, path: str) -> None:
        with self._lock:
            self._busy[path] -= 1
            if not self._busy[path]:
                del self._busy[path]

    def mounts(self) -> list[Mount]:
        """All of them, the least recently used first."""
        found = []
        with self._lock:
            self._load()
            names = os.listdir(f"{self.root}/mounts")
        for name in names:
            folder = f"{self.root}/mounts/{name}"
            with contextlib.suppress(OSError, ValueError, KeyError):
                with open(f"{folder}/meta.json", "rb") as file:
                    meta = json.load(file)
                used = os.stat(folder).st_mtime
                found.append(Mount(meta["id"], folder, files.disk_bytes(folder), used))
        return sorted(found, key=lambda mount: mount.used)

    def find_mount(self, name: str) -> str:
        """The data directory of the cache mount `name`; Invalid if there is none."""
        path = f"{self._folder(name)}/data"
        if not os.path.isdir(path):
            raise Invalid(f"there is no cache mount {name!r}")
        return path

    def remove_mount(self, mount: Mount) -> bool:
        """Delete it unless a step uses it."""
        with self._lock:
            if any(path.startswith(f"{mount.path}/") for path in self._busy):
                return False
            gone = f"{self.root}/mounts/.{secrets.token_hex(8)}"
            os.rename(mount.path, gone)
        files.remove_tree(gone)
        return True
