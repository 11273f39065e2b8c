"""Which manifest of an index fits a platform.

Architectures and variants carry Go's names, normalised as containerd's platforms package does
("x86_64" is amd64, "aarch64" arm64 without variant, "armhf" arm/v7).
"""

from collections.abc import Sequence

from bulkhead.errors import Invalid, NotFound
from bulkhead.oci.image import Descriptor, Platform

_ARCHITECTURES: dict[str, tuple[str, str]] = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv5l": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
    "loongarch64": ("loong64", ""),
}
_DEFAULT_VARIANT = {"arm": "v7", "arm64": "v8"}
_RUNS_ALSO: dict[str, tuple[tuple[str, str], ...]] = {
    "amd64": (("386", ""),),
    "arm64": (("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")),
}


def normalise(platform: Platform) -> Platform:
    """With Go's names, and without a variant that is the architecture's default."""
    architecture, variant = _ARCHITECTURES.get(
        platform.architecture.lower(), (platform.architecture.lower(), "")
    )
    variant = platform.variant.lower() or variant
    if variant and variant[0].isdigit():
        variant = "v" + variant
    if (architecture, variant) in (("arm64", "v8"), ("amd64", "v1")):
        variant = ""
    if (architecture, variant) == ("arm", ""):
        variant = "v7"
    return Platform(architecture, platform.os.lower(), variant, platform.os_version)


def parse(text: str) -> Platform:
    """A platform as the command line writes it: "os/arch[/variant]", "arch" or "os"."""
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise Invalid(f"{text!r} is not a platform; write os/architecture[/variant]")
    if len(parts) == 1:
        if parts[0].lower() in ("linux", "windows", "freebsd", "darwin"):
            raise Invalid(f"platform {text!r} has no architecture; write {text}/amd64 or the like")
        return normalise(Platform(parts[0], "linux"))
    return normalise(Platform(parts[1], parts[0], parts[2] if len(parts) == 3 else ""))


def of_machine(machine: str) -> Platform:
    """The platform of uname(2)'s `machine` under Linux."""
    return normalise(Platform(machine, "linux"))


def _rank(offered: Platform, wanted: Platform, *, exact: bool) -> int | None:
    """How well `offered` serves `wanted`; 0 is best, None not at all."""
    offered = normalise(offered)
    if offered.os != wanted.os:
        return None
    if (offered.architecture, offered.variant) == (wanted.architecture, wanted.variant):
        return 0
    if offered.architecture == wanted.architecture:
        theirs = offered.variant or _DEFAULT_VARIANT.get(offered.architecture, "")
        ours = wanted.variant or _DEFAULT_VARIANT.get(wanted.architecture, "v1")
        if not theirs:
            return 1
        if len(theirs) == len(ours) == 2 and theirs < ours:
            return 1 + ord(ours[1]) - ord(theirs[1])
        return None
    if not exact:
        for position, other in enumerate(_RUNS_ALSO.get(wanted.architecture, ())):
            if other == (offered.architecture, offered.variant):
                return 100 + position
    return None


def suits(offered: Platform, wanted: Platform, *, exact: bool = False) -> bool:
    """Whether what is for `offered` runs where `wanted` is; `exact` as in `choose`."""
    return _rank(offered, normalise(wanted), exact=exact) is not None


def choose(
    manifests: Sequence[Descriptor], wanted: Platform, what: str, *, exact: bool = False
) -> Descriptor:
    """The manifest that serves `wanted` best, the first of equals; NotFound names what there is.

    `exact` (the user named the platform) excludes another architecture the machine could also run.
    Attestations ("unknown/unknown") never serve.
    """
    wanted = normalise(wanted)
    best: tuple[int, Descriptor] | None = None
    for entry in manifests:
        if entry.platform is None:
            continue
        rank = _rank(entry.platform, wanted, exact=exact)
        if rank is not None and (best is None or rank < best[0]):
            best = (rank, entry)
    if best is None and len(manifests) == 1 and manifests[0].platform is None:
        return manifests[0]
    if best is None:
        offered = sorted({str(m.platform) for m in manifests if m.platform} - {"unknown/unknown"})
        raise NotFound(
            f"no matching manifest for {wanted} in the manifest list entries of {what}; "
            f"it has {', '.join(offered) or 'none with a platform'}"
        )
    return best[1]
