"""--security-opt: what its words mean; Docker's spelling and wording. Pure."""

import msgspec

from bulkhead.errors import Invalid
from bulkhead.isolation.seccomp import profile


class Security(msgspec.Struct, frozen=True):
    """The parsed options."""

    no_new_privileges: bool = False
    seccomp: str = ""
    """"" for the default profile, "unconfined", or a profile's JSON."""
    apparmor: str = ""
    selinux: tuple[str, ...] = ()
    unmask_all: bool = False
    unmask: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()


def parse(options: list[str]) -> Security:
    """What `options` ask for; Invalid for an unknown one or a malformed profile."""
    nnp, seccomp, apparmor, unmask_all = False, "", "", False
    selinux: list[str] = []
    unmask: list[str] = []
    mask: list[str] = []
    for option in options:
        if option == "no-new-privileges":
            nnp = True
            continue
        key, separator, value = _split(option)
        if not separator:
            raise Invalid(f'invalid --security-opt 1: "{option}"')
        if key == "no-new-privileges":
            if value.lower() not in {"true", "false", "1", "0"}:
                raise Invalid(f'invalid --security-opt 2: "{option}"')
            nnp = value.lower() in {"true", "1"}
        elif key == "seccomp":
            profile.choose(value)
            seccomp = value
        elif key == "apparmor":
            apparmor = value
        elif key == "label":
            selinux.append(value)
        elif key == "systempaths" and value == "unconfined":
            unmask_all = True
        elif key == "unmask":
            unmask_all = unmask_all or value.lower() == "all"
            unmask.extend(value.split(":"))
        elif key == "mask":
            mask.extend(value.split(":"))
        elif key == "writable-cgroups":
            raise Invalid("--security-opt writable-cgroups is not supported; use --privileged")
        else:
            raise Invalid(f'invalid --security-opt 2: "{option}"')
    return Security(
        no_new_privileges=nnp,
        seccomp=seccomp,
        apparmor=apparmor,
        selinux=tuple(selinux),
        unmask_all=unmask_all,
        unmask=tuple(unmask),
        mask=tuple(mask),
    )


def _split(option: str) -> tuple[str, str, str]:
    """KEY=VALUE, or the older KEY:VALUE."""
    if "=" in option and (":" not in option or option.index("=") < option.index(":")):
        return option.partition("=")
    return option.partition(":")
