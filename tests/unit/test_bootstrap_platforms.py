"""`image bootstrap --platform`: words for architectures, and where foreign programs are run."""

import sys
from pathlib import Path

import pytest

from bulkhead.errors import Unsupported
from bulkhead.images import apt, bootstrap
from bulkhead.isolation import binfmt
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import Platform


def _host(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(bootstrap, "host_platform", lambda: platforms.of_machine(machine))


def _lock(architecture: str) -> bootstrap.Lock:
    return bootstrap.Lock(
        reference="debian:bookworm", distribution="debian", suite="bookworm",
        architecture=architecture, include=[], sources=[], epoch=0, mmdebstrap="1",
        compressor="", packages=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("debian", "platform"),
    [
        ("amd64", Platform("amd64", "linux")),
        ("arm64", Platform("arm64", "linux")),
        ("armhf", Platform("arm", "linux", "v7")),
        ("i386", Platform("386", "linux")),
        ("ppc64el", Platform("ppc64le", "linux")),
    ],
)
def test_debians_words_and_ours(debian: str, platform: Platform) -> None:
    assert bootstrap._platform(debian) == platform


def test_foreign_programs_run_where_nothing_is_registered_for_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _host(monkeypatch, "x86_64")
    own = bootstrap._command(_lock("amd64"), str(tmp_path))
    assert own[0] == "mmdebstrap"
    foreign = bootstrap._command(_lock("arm64"), str(tmp_path))
    assert foreign[:5] == [sys.executable, "-m", "bulkhead.images.emulated", "arm64", "mmdebstrap"]
    assert "--architectures=arm64" in foreign


def test_what_is_missing_for_another_platform_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _host(monkeypatch, "x86_64")
    monkeypatch.setattr(binfmt, "check_kernel", lambda: None)
    monkeypatch.setattr(binfmt, "interpreter", lambda _: "/usr/bin/qemu")
    monkeypatch.setattr(apt, "_in_path", lambda program: program != "arch-test")
    assert bootstrap._architecture("") == "amd64"
    assert bootstrap._architecture("linux/386") == "i386"
    with pytest.raises(Unsupported, match="apt-get install arch-test"):
        bootstrap._architecture("linux/arm64")
    monkeypatch.setattr(apt, "_in_path", lambda program: True)
    assert bootstrap._architecture("linux/arm64") == "arm64"
    with pytest.raises(Unsupported, match="no Linux"):
        bootstrap._architecture("windows/amd64")
