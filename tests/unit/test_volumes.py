"""Volumes: names, options, references, removal."""

from pathlib import Path

import pytest

from bulkhead.errors import Conflict, Invalid, NotFound
from bulkhead.state.database import Database
from bulkhead.volumes import leases, options
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


def _holder(name: str, kernel: str = leases.HOST, *, writes: bool = True) -> leases.Holder:
    boundary = "sandbox" if kernel else "container"
    return leases.Holder(f"id-{name}", name, kernel, boundary, writes)


def test_one_kernel_writes_at_a_time() -> None:
    table = leases.Leases()
    table.take("v", _holder("a"), disk=False)
    table.take("v", _holder("b"), disk=False)
    table.take("v", _holder("reader", "k1", writes=False), disk=False)
    with pytest.raises(Conflict, match=r"volume v is written by a \(boundary container\)"):
        table.take("v", _holder("guest", "k2"), disk=False)
    table.take("v", _holder("guest", "k2"), disk=False, known=True)
    for name in ("a", "b", "guest"):
        table.release(f"id-{name}")
    table.take("v", _holder("guest", "k2"), disk=False)
    with pytest.raises(Conflict, match=r"stop guest, or mount it read-only \(:ro\)"):
        table.take("v", _holder("a"), disk=False)
    assert [one.name for one in table.holders("v")] == ["reader", "guest"]


def test_a_disk_that_is_written_is_seen_by_one_kernel() -> None:
    table = leases.Leases()
    table.take("v", _holder("one", "k1", writes=False), disk=True)
    table.take("v", _holder("two", "k2", writes=False), disk=True)
    with pytest.raises(Conflict, match="volume v is a disk that one"):
        table.take("v", _holder("three", "k3"), disk=True)
    table.release("id-one")
    table.release("id-two")
    table.take("v", _holder("three", "k3"), disk=True)
    with pytest.raises(Conflict, match=r"read-only \(:ro\) in both"):
        table.take("v", _holder("two", "k2", writes=False), disk=True)


def test_the_host_does_not_mount_a_disk_that_a_guest_reads(manager: VolumeManager) -> None:
    manager.create("sized", driver_opts={"size": "64m"})
    reader = _holder("guest", "k1", writes=False)
    manager.hold("sized", "id-guest", reader, mounted=False)
    with pytest.raises(Conflict, match="stop guest first"):
        manager.hold("sized", "id-a", _holder("a", writes=False))


def test_sizes_are_checked(manager: VolumeManager) -> None:
    for size in ("1k", "x", "-5m", "100000t"):
        with pytest.raises(Invalid, match="size"):
            manager.create("x1", driver_opts={"size": size})
    with pytest.raises(Invalid, match="goes with no other option"):
        manager.create("x1", driver_opts={"size": "1g", "type": "tmpfs", "device": "tmpfs"})
    assert options.disk_size({"size": "1.5g"}) == 3 << 29
    volume = manager.create("x2", driver_opts={"size": "64m"})
    assert manager.is_disk(volume.name)
    assert manager.inspect("x2")["Options"] == {"size": "64m"}
