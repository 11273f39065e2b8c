"""seccomp profiles in Docker's format, the default one among them, resolved to OCI's.

Docker's format is OCI's `linux.seccomp` with conditions on each rule (`includes`, `excludes`:
capabilities, architectures, kernel) and a map of architectures; a profile in OCI's own format is
read by the same loader. The default profile is `default_profile.json` beside this module; each of
its rules says in `comment` why it is there.
"""

import os
import re
from functools import cache
from importlib import resources

import msgspec

from bulkhead.errors import Invalid, Unsupported
from bulkhead.oci.runtime import Seccomp, SeccompAction, Syscall, SyscallArg

UNCONFINED = "unconfined"
BUILTIN = ("builtin", "default", "")

NATIVE = {"x86_64": "amd64", "aarch64": "arm64"}
"""uname(2)'s machine → the profile format's name in `includes.arches`."""

NATIVE_SECCOMP = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


class _Part(msgspec.Struct, rename="camel", omit_defaults=True):
    """Base of the format's parts; unknown members are ignored."""


class Condition(_Part):
    """When a rule holds: every capability, one of the architectures, at least that kernel."""

    caps: list[str] | None = None
    arches: list[str] | None = None
    min_kernel: str | None = None


class Rule(_Part):
    """A rule on system calls, with what it depends on."""

    action: SeccompAction
    names: list[str] | None = None
    name: str = ""
    errno_ret: int | None = None
    args: list[SyscallArg] | None = None
    comment: str = ""
    includes: Condition | None = None
    excludes: Condition | None = None


class Architecture(_Part):
    """An architecture, and those whose programs it runs too."""

    architecture: str
    sub_architectures: list[str] | None = None


class Profile(_Part):
    """A whole profile."""

    default_action: SeccompAction
    default_errno_ret: int | None = None
    arch_map: list[Architecture] | None = None
    architectures: list[str] | None = None
    flags: list[str] | None = None
    listener_path: str = ""
    listener_metadata: str = ""
    syscalls: list[Rule] | None = None


def load(data: bytes | str) -> Profile:
    """The profile in `data` (JSON); Invalid says what is wrong with it."""
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except msgspec.ValidationError as error:
        raise Invalid(f"seccomp profile: {str(error).replace('`', '')}") from None
    except msgspec.DecodeError as error:
        raise Invalid(f"seccomp profile is not JSON: {error}") from None
    if profile.arch_map and profile.architectures:
        raise Invalid("seccomp profile: it has both 'architectures' and 'archMap'; use either")
    for position, rule in enumerate(profile.syscalls or ()):
        if bool(rule.name) == bool(rule.names):
            problem = "both 'name' and 'names'" if rule.name else "no 'names'"
            raise Invalid(f"seccomp profile: syscalls[{position}] has {problem}")
        for condition in (rule.includes, rule.excludes):
            if condition is not None and condition.min_kernel is not None:
                kernel_version(condition.min_kernel)
    return profile


@cache
def default() -> Profile:
    """The default profile."""
    data = resources.files("bulkhead.isolation.seccomp").joinpath("default_profile.json")
    return load(data.read_bytes())


def choose(option: str) -> Profile | None:
    """The profile that `--security-opt seccomp=OPTION` names; None for "unconfined".

    `option` is "unconfined", "builtin" or a profile's JSON text (clients send the file's text).
    """
    text = option.strip()
    if text == UNCONFINED:
        return None
    if text in BUILTIN:
        return default()
    if not text.startswith("{"):
        raise Invalid(
            f"seccomp profile {text!r} is neither 'unconfined', 'builtin' nor a profile in JSON"
        )
    return load(text)


def kernel_version(text: str) -> tuple[int, int]:
    """Major and minor of "4.8" or "6.18.44-x"; Invalid for anything else."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise Invalid(f"seccomp profile: minKernel {text!r} is not MAJOR.MINOR")
    return int(match[1]), int(match[2])


def resolve(
    profile: Profile,
    *,
    capabilities: frozenset[str],
    machine: str | None = None,
    kernel: tuple[int, int] | None = None,
) -> Seccomp:
    """The OCI filter that `profile` is for a workload with `capabilities` (its bounding set).

    `machine` and `kernel` are this host's unless given. Unsupported for a machine that the format
    has a name for but we have no system call table for.
    """
    if machine is None:
        machine = os.uname().machine
    if kernel is None:
        kernel = kernel_version(os.uname().release)
    native = NATIVE.get(machine)
    if native is None:
        raise Unsupported(f"seccomp: no system call table for {machine}; use seccomp=unconfined")
    syscalls = [
        Syscall(
            names=rule.names or [rule.name],
            action=rule.action,
            errno_ret=rule.errno_ret,
            args=rule.args or [],
        )
        for rule in profile.syscalls or ()
        if _included(rule.includes, capabilities, native, kernel)
        and not _excluded(rule.excludes, capabilities, native, kernel)
    ]
    return Seccomp(
        default_action=profile.default_action,
        default_errno_ret=profile.default_errno_ret,
        architectures=_architectures(profile, machine),
        flags=profile.flags or [],
        listener_path=profile.listener_path,
        listener_metadata=profile.listener_metadata,
        syscalls=syscalls,
    )


@cache
def default_for(capabilities: frozenset[str]) -> Seccomp:
    """The default profile resolved for this host, kept per set of capabilities; do not change."""
    return resolve(default(), capabilities=capabilities)


def _architectures(profile: Profile, machine: str) -> list[str]:
    if profile.architectures:
        return profile.architectures
    for entry in profile.arch_map or ():
        if entry.architecture == NATIVE_SECCOMP[machine]:
            return [entry.architecture, *(entry.sub_architectures or ())]
    return []


def _included(
    condition: Condition | None, capabilities: frozenset[str], native: str, kernel: tuple[int, int]
) -> bool:
    if condition is None:
        return True
    if condition.arches and native not in condition.arches:
        return False
    if condition.caps and not capabilities.issuperset(condition.caps):
        return False
    return condition.min_kernel is None or kernel >= kernel_version(condition.min_kernel)


def _excluded(
    condition: Condition | None, capabilities: frozenset[str], native: str, kernel: tuple[int, int]
) -> bool:
    if condition is None:
        return False
    if condition.arches and native in condition.arches:
        return True
    if condition.caps and not capabilities.isdisjoint(condition.caps):
        return True
    return condition.min_kernel is not None and kernel >= kernel_version(condition.min_kernel)
