"""Waiting for descriptors, and files that are made for few eyes, or to last."""

import fcntl
import os
import resource
from pathlib import Path

import pytest

from bulkhead.linux import sparse
from bulkhead.linux.fds import OwnedFd, readable
from bulkhead.runtime.records import Record, Records

_HIGH = 1500


def test_a_descriptor_beyond_those_of_select_can_be_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= _HIGH:
        pytest.skip(f"RLIMIT_NOFILE: at most {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, _HIGH + 100), hard))
    try:
        read, write = os.pipe()
        far = fcntl.fcntl(read, fcntl.F_DUPFD_CLOEXEC, _HIGH)
        with OwnedFd(read), OwnedFd(write), OwnedFd(far):
            assert far >= _HIGH and not readable(far, 0)
            os.write(write, b"x")
            assert readable(far, 0) and readable(far)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_copy_has_its_mode_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"text")
    sparse.copy_file(f"{tmp_path}/from", f"{tmp_path}/to", 0o600)
    made = tmp_path / "to"
    assert made.read_bytes() == b"text" and made.stat().st_mode & 0o777 == 0o600


def test_what_a_killed_restore_left_is_removed_with_its_container(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "root"))
    with records.made("one"):
        records.save(Record("one", "/b", "/r", "", "1.3.0", "/one"))
        os.mkdir(records.path("one", "root"))
    records.remove("one")
    assert os.listdir(records.root) == []
