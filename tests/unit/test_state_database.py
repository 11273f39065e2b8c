"""The engine's database and the table of workloads."""

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from bulkhead.engine.body import Config, HostConfig
from bulkhead.engine.records import Record, Workload, Workloads
from bulkhead.errors import Conflict, Corrupt, Invalid, NotFound, Unsupported
from bulkhead.state.database import Database


def test_documents_survive_a_reopening(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    database = Database(path)
    documents = database.documents("volume")
    documents.put("b", '{"n":2}')
    documents.put("a", '{"n":1}')
    documents.put("b", '{"n":3}')
    database.documents("network").put("a", "{}")
    database.close()
    database = Database(path)
    assert database.documents("volume").items() == [("a", '{"n":1}'), ("b", '{"n":3}')]
    database.documents("volume").delete("a")
    assert database.documents("volume").get("a") is None
    assert database.documents("network").get("a") == "{}"
    database.close()


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "state.db"))
    documents = database.documents("x")
    with pytest.raises(ZeroDivisionError), database.transaction():
        documents.put("a", "{}")
        raise ZeroDivisionError
    assert documents.items() == []
    with pytest.raises(Invalid), database.transaction(durable=False):
        documents.put("a", "{}")  # which is durable by itself
    assert documents.items() == []
    with database.transaction(durable=False):
        database.execute("INSERT INTO documents VALUES ('x','b','{}')")
    assert documents.items() == [("b", "{}")]
    database.close()


def test_a_durable_commit_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(str(tmp_path / "state.db"))
    flushed: list[str] = []
    flush = os.fdatasync

    def watched(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        flush(fd)

    monkeypatch.setattr(os, "fdatasync", watched)
    with database.transaction(durable=False):
        database.execute("INSERT INTO documents VALUES ('x','b','{}')")
    assert flushed == []
    database.documents("x").put("c", "{}")
    assert flushed == [str(tmp_path / "state.db-wal")]
    with pytest.raises(ZeroDivisionError), database.transaction():
        raise ZeroDivisionError
    assert len(flushed) == 1, "nothing was committed"
    database.close()


def test_what_is_saved_later_is_written_with_the_next_commit(tmp_path: Path) -> None:
    async def work() -> None:
        database = Database(str(tmp_path / "state.db"))
        workloads = Workloads(database)
        first, second, third = (
            Workload(_record(f"{number:064}", f"w{number}")) for number in range(3)
        )
        workloads.add(first)
        workloads.add(third)
        first.record.status = third.record.status = "running"
        workloads.save_later(first)
        workloads.save_later(third)
        workloads.discard(third)
        statuses = dict(database.execute("SELECT name, status FROM workloads").fetchall())
        assert statuses == {"w0": "running"}, "with the commit that deletes another one"
        first.record.status = "exited"
        workloads.save_later(first)
        workloads.add(second)
        first.record.exit_code = 3
        workloads.save_later(first)
        workloads.flush()
        again = Workloads(database)
        again.load()
        assert {one.record.name: one.record.exit_code for one in again} == {"w0": 3, "w1": 0}
        assert {one.record.status for one in again} == {"exited", "created"}
        database.close()

    asyncio.run(work())


def test_names_are_exchanged_whatever_was_put_off(tmp_path: Path) -> None:
    async def work() -> None:
        database = Database(str(tmp_path / "state.db"))
        workloads = Workloads(database)
        old, twin = (Workload(_record(f"{number:064}", f"w{number}")) for number in range(2))
        for one in (old, twin):
            workloads.add(one)
        workloads.save_later(twin)
        workloads.exchange(old, twin)
        assert (old.record.name, twin.record.name) == ("w1", "w0")
        assert workloads.find("w0") is twin
        rows = dict(database.execute("SELECT id, name FROM workloads").fetchall())
        assert rows == {old.id: "w1", twin.id: "w0"}
        workloads.discard(old)
        with pytest.raises(NotFound):
            workloads.exchange(old, twin)
        assert (old.record.name, twin.record.name) == ("w1", "w0")
        database.close()

    asyncio.run(work())


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    Database(path).close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version=999")
    raw.close()
    with pytest.raises(Unsupported, match="newer version"):
        Database(path)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database, " * 1000)
    with pytest.raises(Corrupt, match=r"state\.db"):
        Database(str(path))


def _record(identity: str, name: str) -> Record:
    return Record(
        id=identity, name=name, created_ns=1, boundary="container", image="i", image_id="x",
        config=Config(), host=HostConfig(),
    )  # fmt: skip


def test_workloads_are_found_by_id_name_and_prefix(tmp_path: Path) -> None:
    async def scenario() -> None:
        database = Database(str(tmp_path / "state.db"))
        table = Workloads(database)
        for identity, name in (("ab" * 32, "one"), ("ac" * 32, "two")):
            table.add(Workload(_record(identity, name)))
        assert table.find("one").id == table.find("/one").id == table.find("ab").id == "ab" * 32
        with pytest.raises(Invalid, match="Multiple IDs"):
            table.find("a")
        for missing in ("three", "", "/"):
            with pytest.raises(NotFound, match="No such container"):
                table.find(missing)
        with pytest.raises(Conflict, match='name "/one" is already in use by container "abab'):
            table.add(Workload(_record("ad" * 32, "one")))
        table.rename(table.find("one"), "uno")
        table.discard(table.find("two"))
        again = Workloads(database)
        again.load()
        assert [workload.record.name for workload in again] == ["uno"]
        assert again.find("uno").record == table.find("uno").record
        database.close()

    asyncio.run(scenario())
