"""A workload moves to another installation with all that it has, and hostile archives do not."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.errors import BulkheadError, Conflict, Corrupt, Denied, Invalid, NotFound
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import IMAGE, Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until
from tests.kernel.test_engine_run import REASON

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")

SCRIPT = "cat /made; cat /data/kept; cat /anon/file; ls /etc/group; echo $WORD; id -u"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The folders of two engines, neither of which is the other's residue."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    with residue(str(here), str(there)):
        yield here, there


@pytest.fixture(scope="module")
def here(both: tuple[Path, Path]) -> Iterator[Rig]:
    with rigs.engine(both[0]) as made:
        rigs.load_busybox(made)
        yield made


@pytest.fixture(scope="module")
def there(both: tuple[Path, Path]) -> Iterator[Rig]:
    with rigs.engine(both[1]) as made:
        yield made


def pack(rig: Rig, name: str, path: Path) -> Any:
    with path.open("wb") as file:
        return rig.call("workload.pack", (file.fileno(),), id=name)


def unpack(rig: Rig, path: Path, **params: Any) -> Any:
    with path.open("rb") as file:
        return rig.call("workload.unpack", (file.fileno(),), **params)


def _prepare(rig: Rig, name: str) -> None:
    """A workload that has written to its layer, a named and an anonymous volume, and ended."""
    write = "echo made > /made; rm /etc/group; echo kept > /data/kept; echo anon > /anon/file"
    body = {
        "Image": IMAGE, "Cmd": ["sh", "-c", f"test -e /made || {{ {write}; }}; {SCRIPT}"],
        "Env": ["WORD=moved"], "Labels": {"kind": "test"}, "Volumes": {"/anon": {}},
        "HostConfig": {"Binds": [f"{name}-data:/data"], "Memory": 64 << 20},
    }  # fmt: skip
    rig.call("workload.create", name=name, body=body)
    rig.call("workload.start", id=name)
    rig.call("workload.wait", id=name)
    assert b"moved\n0\n" in rigs.logs(rig, name)


@pytest.fixture(scope="module")
def archive(here: Rig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "moving.workload"
    _prepare(here, "moving")
    assert pack(here, "moving", path) == {"Left": [], "Volumes": 2}
    return path


@pytest.fixture
def clean(there: Rig) -> Iterator[None]:
    yield
    for found in there.call("workload.list", all=True):
        there.call("workload.remove", id=found["Id"], force=True, volumes=True)
    there.call("volume.prune", filters={"all": ["true"]})


def test_it_runs_on_elsewhere_with_its_files_and_volumes(
    there: Rig, archive: Path, clean: None
) -> None:
    made = unpack(there, archive)
    shown = there.call("workload.inspect", id="moving")
    assert shown["Id"] == made["Id"]
    assert shown["Config"]["Labels"] == {"kind": "test"}
    assert shown["HostConfig"]["Memory"] == 64 << 20
    assert shown["Config"]["Image"] == shown["Image"] or shown["Config"]["Image"] == IMAGE
    assert {m["Destination"] for m in shown["Mounts"]} == {"/data", "/anon"}
    there.call("workload.start", id="moving")
    there.call("workload.wait", id="moving")
    # Two streams: their lines have no order.
    assert sorted(rigs.logs(there, "moving").decode().splitlines()) == sorted([
        "made", "kept", "anon",
        "ls: /etc/group: No such file or directory", "moved", "0",
    ])  # fmt: skip


def test_packing_leaves_no_image_behind(here: Rig, archive: Path) -> None:
    before = {one["Id"] for one in here.call("image.list", all=True)}
    pack(here, "moving", archive.with_suffix(".again"))

    def gone() -> bool:
        return {one["Id"] for one in here.call("image.list", all=True)} <= before

    until(gone, "what was made for the archive is gone")


def test_one_that_runs_is_refused(here: Rig, tmp_path: Path) -> None:
    rigs.start(here, "busy", "sleep 1000")
    with pytest.raises(Conflict, match="bulkhead stop busy"):
        pack(here, "busy", tmp_path / "busy")
    here.call("workload.remove", id="busy", force=True)


def test_what_is_there_already_is_not_overwritten(there: Rig, archive: Path, clean: None) -> None:
    unpack(there, archive)
    with pytest.raises(Conflict, match="volume moving-data already"):
        unpack(there, archive, name="second")
    there.call("workload.remove", id="moving", volumes=True)
    there.call("volume.remove", name="moving-data")
    rigs_body = {"Image": there.call("image.list", all=True)[0]["Id"], "Cmd": ["true"]}
    there.call("workload.create", name="moving", body=rigs_body)
    with pytest.raises(Conflict, match='name "/moving" is already in use'):
        unpack(there, archive)
    names = [one["Name"] for one in there.call("volume.list")["Volumes"]]
    assert "moving-data" not in names


Change = Callable[[dict[str, bytes]], None]


def _changed(archive: Path, path: Path, change: Change, *, sign: bool = True) -> Path:
    """The archive with other members; `sign`: with the digests they then have."""
    members: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            members[info.name] = file.read()
    change(members)
    if sign:
        document = json.loads(members["workload.json"])
        document["members"] = [
            {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
            if name != "workload.json"
        ]
        members["workload.json"] = json.dumps(document).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _document(members: dict[str, bytes], **values: Any) -> None:
    document = json.loads(members["workload.json"])
    for key, value in values.items():
        if isinstance(value, dict):
            document[key] |= value
        else:
            document[key] = value
    members["workload.json"] = json.dumps(document).encode()


def _escaping(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if target:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, 4
        tar.addfile(info, io.BytesIO(b"evil"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "sign", "kind", "words"),
    [
        (lambda m: m.update({"image.tar": m["image.tar"][:-1] + b"x"}), False, Corrupt, "digest"),
        (lambda m: m.update({"image.tar": m["image.tar"][:99]}), False, Corrupt, "bytes"),
        (lambda m: m.pop("volumes/0.tar"), False, Corrupt, "ends before"),
        (lambda m: m.update({"more": b"x"}), False, Invalid, "is not one of a workload's"),
        (lambda m: m.update({"more": b"x"}), True, Invalid, "do not fit"),
        (lambda m: _document(m, image="sha256:" + "0" * 64), True, Corrupt, "does not have"),
        (lambda m: _document(m, version=2), True, Invalid, "version 2"),
        (lambda m: _document(m, host={"Nonsense": 1}), True, Invalid, "Nonsense"),
        (lambda m: m.update({"image.tar": b"\0" * 10240}), True, BulkheadError, "archive"),
        (lambda m: m.update({"volumes/0.tar": _escaping("../evil")}), True, Invalid, "leads out"),
        (lambda m: m.update({"volumes/0.tar": b"not a tar" * 200}), True, Invalid, "be read"),
        (lambda m: _document(m, boundary="nonsense"), True, Invalid, "unknown"),
        (lambda m: _document(m, networks={"nowhere": {}}, host={"NetworkMode": "nowhere"}), True,
         NotFound, "nowhere"),
    ],
)  # fmt: skip
def test_hostile_archives_leave_nothing(
    there: Rig, archive: Path, tmp_path: Path, clean: None, change: Change, sign: bool,
    kind: type[BulkheadError], words: str,
) -> None:  # fmt: skip
    hostile = _changed(archive, tmp_path / "hostile", change, sign=sign)
    with pytest.raises(kind, match=words):
        unpack(there, hostile)
    assert there.call("workload.list", all=True) == []
    assert there.call("volume.list")["Volumes"] in (None, [])
    assert not os.path.exists(there.root / "volumes" / "evil")


def test_links_in_volumes_lead_nowhere(
    there: Rig, archive: Path, tmp_path: Path, clean: None
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    data = _escaping("link/evil", target=str(victim))
    hostile = _changed(archive, tmp_path / "h", lambda m: m.update({"volumes/0.tar": data}))
    try:
        unpack(there, hostile)
    except BulkheadError:
        assert there.call("workload.list", all=True) == []
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ({"Privileged": True}, "--privileged"),
        ({"Binds": ["/etc:/x"]}, "the host's /etc:/x"),
        ({"PidMode": "host"}, "--pid host"),
        ({"CapAdd": ["SYS_ADMIN"]}, "--cap-add"),
        ({"Mounts": [{"Type": "bind", "Source": "/root", "Target": "/x"}]}, "the host's /root"),
        ({"SecurityOpt": ["seccomp=unconfined"]}, "--security-opt"),
        ({"MaskedPaths": []}, "unmasked"),
    ],
)
def test_what_reaches_the_host_needs_trust(
    there: Rig, archive: Path, tmp_path: Path, clean: None, host: dict[str, Any], words: str
) -> None:
    hostile = _changed(archive, tmp_path / "h", lambda m: _document(m, host=host))
    with pytest.raises(Denied, match=words):
        unpack(there, hostile)
    assert there.call("workload.list", all=True) == []


def test_something_else_is_no_workload(there: Rig, tmp_path: Path) -> None:
    for data in (b"", b"garbage" * 1000, _escaping("a")):
        path = tmp_path / "other"
        path.write_bytes(data)
        with pytest.raises(Invalid, match="no archive of a workload"):
            unpack(there, path)
