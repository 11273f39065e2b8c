"""Merged images: found again by name, gone with their layers."""

import json
from pathlib import Path

from bulkhead.store import merged


def test_release_removes_what_lost_a_layer(tmp_path: Path) -> None:
    for name, layers in (("kept", ["a", "b"]), ("lost", ["a", "c"])):
        (tmp_path / f"{name}.erofs").write_bytes(b"")
        (tmp_path / f"{name}.json").write_text(json.dumps(layers))
    merged.release(str(tmp_path), {"a", "b"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.erofs", "kept.json"]
    merged.release(str(tmp_path / "nosuch"), set())
