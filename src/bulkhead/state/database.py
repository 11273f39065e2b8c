"""The engine's records, in SQLite.

    ROOT/state.db   WAL; written by the one engine that holds ROOT/lock, from its loop's thread

What is acknowledged survives power loss: each commit is flushed, except those asked for with
`durable=False`, which survive the death of every process, but that of the machine only from
the next `sync` or flushed commit on; they are for records that a reboot deletes anyway (workloads
run with --rm, times of start), and for how a run ended, which is flushed soon.

Migrations are numbered files `migrations/NNNN_name.sql`, each applied once, in one transaction with
`PRAGMA user_version`. A database written by a newer version is refused, not guessed at.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from importlib import resources

from bulkhead.errors import Corrupt, Invalid, Unavailable, Unsupported


def _migrations() -> list[tuple[int, str]]:
    found = []
    for entry in resources.files("bulkhead.state").joinpath("migrations").iterdir():
        if entry.name.endswith(".sql"):
            found.append((int(entry.name.split("_", 1)[0]), entry.read_text("utf-8")))
    found.sort()
    return found


class Database:
    """One open database; not for use by several threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._depth = 0
        self._durable = True
        try:
            self._connection = sqlite3.connect(
                path, isolation_level=None, cached_statements=256, timeout=5.0
            )
        except sqlite3.Error as error:
            raise Unavailable(f"cannot open the database {path}: {error}") from error
        try:
            os.chmod(path, 0o600)
            self._configure()
            self._migrate()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise Corrupt(
                f"the database {path} cannot be read ({error}); restore it from a backup, "
                "or move it away to begin with empty records"
            ) from error
        except BaseException:
            self._connection.close()
            raise

    def _configure(self) -> None:
        (mode,) = self._connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise Unsupported(
                f"the database {self.path} cannot have a write-ahead log there ({mode}); "
                "put the root directory onto a local file system"
            )
        # Of a log SQLite flushes what keeps it in order; what makes a commit last is `sync`.
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute("PRAGMA foreign_keys=ON")
        self._connection.execute("PRAGMA wal_autocheckpoint=2000")

    def _migrate(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        migrations = _migrations()
        newest = migrations[-1][0]
        if version > newest:
            raise Unsupported(
                f"the database {self.path} was written by a newer version (schema {version}, "
                f"this one knows {newest}); use that version again"
            )
        for number, text in migrations:
            if number > version:
                # executescript commits what is open first, so BEGIN belongs into the script.
                self._connection.executescript(
                    f"BEGIN IMMEDIATE;\n{text}\nPRAGMA user_version={number};\nCOMMIT;"
                )

    @property
    def schema(self) -> int:
        """The number of the last applied migration."""
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        return int(version)

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        """Run one statement; what writes belongs into a `transaction`."""
        return self._connection.execute(sql, values)

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """All or nothing, one commit; nested ones join the outer.

        `durable=False` skips the flush to the disk; nothing durable may be nested in it.
        """
        if self._depth:
            if durable and not self._durable:
                raise Invalid("a durable transaction cannot be inside one that is not")
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        self._connection.execute("BEGIN IMMEDIATE")
        self._depth, self._durable = 1, durable
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        else:
            self._connection.execute("COMMIT")
            if durable:
                self.sync()
        finally:
            self._depth = 0

    def sync(self) -> None:
        """Flush what was committed with `durable=False`; for any thread."""
        # A reader takes every whole transaction of the log, so that its bytes are all there is to
        # flush; what has left the log was flushed by the checkpoint (sqlite.org/wal.html).
        # SQLite's locks are not on this file: closing it lets go of none (fcntl(2)).
        fd = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def documents(self, kind: str) -> "Documents":
        """The documents of one kind."""
        return Documents(self, kind)

    def close(self) -> None:
        """Close it; a second call does nothing."""
        self._connection.close()


class Documents:
    """JSON texts by key; each `put` and `delete` is durable when it returns."""

    def __init__(self, database: Database, kind: str) -> None:
        if not kind:
            raise Invalid("documents need a kind")
        self._database = database
        self._kind = kind

    def get(self, key: str) -> str | None:
        """The document, or None."""
        row = self._database.execute(
            "SELECT document FROM documents WHERE kind=? AND key=?", self._kind, key
        ).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, text: str) -> None:
        """Write or replace it."""
        with self._database.transaction():
            self._database.execute(
                "INSERT INTO documents VALUES (?,?,?) "
                "ON CONFLICT(kind,key) DO UPDATE SET document=excluded.document",
                self._kind,
                key,
                text,
            )

    def delete(self, key: str) -> None:
        """Remove it; nothing happens if it is not there."""
        with self._database.transaction():
            self._database.execute("DELETE FROM documents WHERE kind=? AND key=?", self._kind, key)

    def items(self) -> list[tuple[str, str]]:
        """All of them, ordered by key."""
        return self._database.execute(
            "SELECT key, document FROM documents WHERE kind=? ORDER BY key", self._kind
        ).fetchall()
