"""Volumes: names, options, references, removal."""

from pathlib import Path

import pytest

from bulkhead.errors import Conflict, Invalid, NotFound
from bulkhead.state.database import Database
from bulkhead.volumes import options
from bulkhead.volumes.manager import VolumeManager


@pytest.fixture
def manager(tmp_path: Path):  # type: ignore[no-untyped-def]
    database = Database(str(tmp_path / "state.db"))
    yield VolumeManager(str(tmp_path), database)
    database.close()


def test_create_is_idempotent_and_remembered(manager: VolumeManager, tmp_path: Path) -> None:
    volume = manager.create("cache", labels={"a": "b"})
    assert manager.create("cache") == volume
    assert Path(manager.data("cache")).is_dir()
    database = Database(str(tmp_path / "state.db"))
    again = VolumeManager(str(tmp_path), database)
    assert again.inspect("cache")["Labels"] == {"a": "b"}
    database.close()


def test_mistakes_are_named(manager: VolumeManager) -> None:
    with pytest.raises(Invalid, match="includes invalid characters for a local volume name"):
        manager.create("a/b")
    with pytest.raises(NotFound, match="volume plugin"):
        manager.create("x1", driver="nope")
    with pytest.raises(Invalid, match='invalid option: "colour"'):
        manager.create("x1", driver_opts={"colour": "red"})
    with pytest.raises(Invalid, match="missing required option"):
        manager.create("x1", driver_opts={"type": "tmpfs"})
    with pytest.raises(NotFound, match="no such volume"):
        manager.get("x1")
    manager.create("x2", driver_opts={"type": "tmpfs", "device": "tmpfs"})
    with pytest.raises(Conflict, match="other driver options"):
        manager.create("x2", driver_opts={"type": "nfs", "device": ":/x"})


def test_used_volumes_stay(manager: VolumeManager) -> None:
    manager.create("v1")
    with pytest.raises(Conflict, match="volume is in use"):
        manager.remove("v1", ["abc"])
    left = manager.remove("v1", [])
    assert left is not None
    manager.remove_tree(left)
    assert not Path(left).exists()
    assert manager.remove("v1", [], force=True) is None


def test_leftovers_are_found(manager: VolumeManager) -> None:
    manager.create("v1")
    Path(manager.data("stray")).mkdir(parents=True)
    left = manager.remove("v1", [])
    found = manager.sweep()
    assert left in found
    assert len(found) == 2


def test_only_anonymous_volumes_are_pruned_unless_all(manager: VolumeManager) -> None:
    named, anonymous, used = (manager.create(n).name for n in ("named", "", ""))
    users = {used: 1}
    count = lambda name: users.get(name, 0)  # noqa: E731
    assert manager.prunable({}, count) == [anonymous]
    assert sorted(manager.prunable({"all": ["true"]}, count)) == sorted([named, anonymous])
    assert [v["Name"] for v in manager.summaries({"dangling": ["false"]}, count)] == [used]


def test_mount_options_are_split() -> None:
    assert options.split("ro,nosuid,size=1m,uid=5,defaults") == (3, "size=1m,uid=5")
    assert options.split("rbind")[0] == 4096 | 16384
