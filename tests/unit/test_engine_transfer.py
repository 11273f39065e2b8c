"""Workloads as files: what must not come in without trust."""

from typing import Any

import msgspec
import pytest

from bulkhead.engine import transfer
from bulkhead.errors import Denied
from bulkhead.isolation.masks import MASKED_PATHS, READONLY_PATHS

_USUAL = {"MaskedPaths": list(MASKED_PATHS), "ReadonlyPaths": list(READONLY_PATHS)}


def _document(host: dict[str, Any], volumes: list[dict[str, Any]] | None = None) -> Any:
    given = {
        "version": 1, "name": "w", "boundary": "container", "image": "sha256:0", "reference": "i",
        "config": {}, "host": host, "volumes": volumes or [],
    }  # fmt: skip
    return msgspec.convert(given, transfer.Document)


@pytest.mark.parametrize(("host", "words"), [
    ({"MaskedPaths": []}, "unmasked"),
    ({"MaskedPaths": ["/nowhere"]}, "unmasked"),
    ({"ReadonlyPaths": []}, "writable"),
    ({"ReadonlyPaths": ["/proc/bus"]}, "writable"),
    ({"VolumesFrom": ["other"]}, "--volumes-from"),
    ({"Mounts": [{"Type": "volume", "Source": "others", "Target": "/x"}]}, "volume others"),
    ({"Mounts": [{"Type": "volume", "Target": "/x", "VolumeOptions": {
        "DriverConfig": {"Options": {"type": "none", "o": "bind", "device": "/"}}}}]}, "driver"),
])  # fmt: skip
def test_what_reaches_beyond_the_workload_needs_trust(host: dict[str, Any], words: str) -> None:
    with pytest.raises(Denied, match=words):
        transfer.check_trust(_document(host))


def test_what_is_usual_needs_none() -> None:
    mount = {"Type": "volume", "Source": "mine", "Target": "/x", "VolumeOptions": {}}
    mine = {"destination": "/x", "member": "volumes/0.tar", "name": "mine"}
    transfer.check_trust(_document({}))
    transfer.check_trust(_document({**_USUAL, "Mounts": [mount]}, [mine]))
