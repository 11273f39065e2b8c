"""Modules without debugging information, kernels without helper programs."""

from pathlib import Path

import pytest

from bulkhead.boundaries.guest import trim
from bulkhead.home import Home
from bulkhead.linux.elf import ElfError
from tests.helpers.elf_files import HEADER, SECTION, relocatable


def contents(data: bytes) -> dict[str, tuple[int, bytes]]:
    """The sections of an ELF by name: type and contents."""
    fields = HEADER.unpack_from(data)
    found = [SECTION.unpack_from(data, fields[6] + 64 * i) for i in range(fields[12])]
    names = data[found[fields[13]][4] :]
    return {
        names[one[0] : names.index(b"\0", one[0])].decode(): (
            one[1],
            data[one[4] : one[4] + one[5]],
        )
        for one in found
    }


def test_debugging_sections_are_emptied_and_all_others_kept() -> None:
    given = relocatable(
        [
            (".text", 1, b"code" * 9),
            (".debug_info", 1, bytes(5000)),
            (".rela.debug_info", 4, bytes(2400)),
            (".modinfo", 1, b"license=GPL\0"),
            (".rela.text", 4, bytes(range(48))),
        ]
    )
    made = trim.module(given)
    before, after = contents(given), contents(made)
    assert list(before) == list(after)
    assert {name for name, one in after.items() if one == (8, b"")} == {
        ".debug_info",
        ".rela.debug_info",
    }
    kept = [name for name in before if ".debug_" not in name]
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
    assert len(made) < len(given) - 7000


def test_a_module_without_them_is_unchanged_with_its_signature() -> None:
    given = relocatable([(".text", 1, b"code")]) + b"~Module signature appended~\n"
    assert trim.module(given) == given


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02\x01", bytes(200), b"\x7fELF\x02\x01" * 40])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(ElfError):
        trim.module(data)


def test_damaged_modules_are_refused() -> None:
    given = bytearray(relocatable([(".debug_info", 1, bytes(64)), (".text", 1, b"code" * 9)]))
    assert trim.module(bytes(given))
    table = HEADER.unpack_from(given)[6]
    SECTION.pack_into(given, table + 2 * 64, 13, 1, 0, 0, 1 << 40, 10, 0, 0, 16, 0)
    with pytest.raises(ElfError):
        trim.module(bytes(given))
    with pytest.raises(ElfError):
        trim.module(bytes(given[: table + 10]))


def _kernel(*names: bytes) -> bytes:
    return b"\x7fELFcode /sbin/hotplug and /sbin/modprobe in texts." + b"".join(
        name.ljust(256, b"\0") for name in names
    )


def test_a_kernel_starts_no_helpers(tmp_path: Path) -> None:
    home = Home(str(tmp_path / "root"), str(tmp_path / "run"))
    program = tmp_path / "linux.uml"
    program.write_bytes(_kernel(b"/sbin/hotplug", b"other", b"/sbin/modprobe"))
    made = Path(trim.kernel(home, str(program)))
    assert made != program and made.stat().st_mode & 0o777 == 0o555
    expected = _kernel(b"\0sbin/hotplug", b"other", b"\0sbin/modprobe")
    assert made.read_bytes() == expected
    assert trim.kernel(home, str(program)) == str(made)
    assert [one.name for one in made.parent.iterdir()] == [made.name]


def test_a_changed_kernel_is_trimmed_anew(tmp_path: Path) -> None:
    home = Home(str(tmp_path / "root"), str(tmp_path / "run"))
    program = tmp_path / "linux.uml"
    program.write_bytes(_kernel(b"/sbin/hotplug"))
    first = trim.kernel(home, str(program))
    program.write_bytes(_kernel(b"newer", b"/sbin/hotplug"))
    assert trim.kernel(home, str(program)) != first


@pytest.mark.parametrize("names", [(), (b"/sbin/hotplug", b"/sbin/hotplug")])
def test_a_kernel_that_is_not_understood_is_used_as_it_is(
    tmp_path: Path, names: tuple[bytes, ...]
) -> None:
    home = Home(str(tmp_path / "root"), str(tmp_path / "run"))
    program = tmp_path / "linux.uml"
    program.write_bytes(_kernel(*names))
    assert trim.kernel(home, str(program)) == str(program)


def test_the_modules_of_the_installed_kernel_are_smaller(tmp_path: Path) -> None:
    found = sorted(Path("/usr/lib/uml/modules").glob("*/kernel/fs/overlayfs/overlay.ko"))
    if not found:
        pytest.skip("user-mode-linux is not installed: no module of it to look at")
    made = tmp_path / "overlay.ko"
    made.write_bytes(trim.module(found[-1].read_bytes()))
    assert (
        ".debug_info" not in contents(made.read_bytes())
        or not contents(made.read_bytes())[".debug_info"][1]
    )
    assert b"license=GPL" in made.read_bytes()
