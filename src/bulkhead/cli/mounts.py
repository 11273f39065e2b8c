"""The values of --volume and --mount."""

import os
from typing import Any

from bulkhead.cli.options import UsageError, parse_bytes

_MODES = frozenset((
    "ro", "rw", "z", "Z", "nocopy", "copy", "cached", "delegated", "consistent", "shared",
    "rshared", "slave", "rslave", "private", "rprivate", "noexec", "exec", "nodev", "dev",
    "nosuid", "suid", "U", "idmap", "bind", "rbind", "ro-non-recursive", "rro",
))  # fmt: skip


def volume_flag(spec: str) -> tuple[str | None, str]:
    """(entry of Binds, target) of one -v value; (None, target) for an anonymous volume.

    A relative source (`./data`, `../x`, `~`-less) becomes absolute, since the engine has another
    working directory.
    """
    parts = spec.split(":")
    if len(parts) == 1:
        return None, _target(parts[0], spec)
    if len(parts) > 3 or not parts[0] or not parts[1]:
        raise UsageError(f'invalid argument "{spec}" for "-v, --volume" flag: '
                         f"invalid volume specification: {spec}")  # fmt: skip
    source, target = parts[0], _target(parts[1], spec)
    if len(parts) == 3:
        for mode in parts[2].split(","):
            if mode not in _MODES:
                raise UsageError(f'invalid argument "{spec}" for "-v, --volume" flag: '
                                 f"invalid mode: {mode}")  # fmt: skip
    if source in (".", "..") or source.startswith(("./", "../")):
        source = os.path.abspath(source)
    return ":".join([source, *parts[1:]]), target


def _target(path: str, spec: str) -> str:
    if not path.startswith("/"):
        raise UsageError(f'invalid argument "{spec}" for "-v, --volume" flag: invalid volume '
                         f"specification: mount path must be absolute: {path}")  # fmt: skip
    return path


def _flag(text: str) -> bool:
    if text.lower() in ("", "1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise ValueError(f"'{text}' is not a boolean")


def _options(mount: dict[str, Any], kind: str) -> dict[str, Any]:
    options: dict[str, Any] = mount.setdefault(kind, {})
    return options


def _read_only(mount: dict[str, Any], value: str) -> None:
    mount["ReadOnly"] = _flag(value)


def _set(member: str, name: str, convert: Any = str) -> Any:
    def put(mount: dict[str, Any], value: str) -> None:
        _options(mount, member)[name] = convert(value)

    return put


def _driver(name: str) -> Any:
    def put(mount: dict[str, Any], value: str) -> None:
        config = _options(mount, "VolumeOptions").setdefault("DriverConfig", {})
        if name == "Name":
            config["Name"] = value
        else:
            key, _, setting = value.partition("=")
            config.setdefault("Options", {})[key] = setting

    return put


def _volume_label(mount: dict[str, Any], value: str) -> None:
    key, _, setting = value.partition("=")
    _options(mount, "VolumeOptions").setdefault("Labels", {})[key] = setting


def _recursive(mount: dict[str, Any], value: str) -> None:
    choices = {"enabled": None, "disabled": "NonRecursive", "writable": "ReadOnlyNonRecursive",
               "readonly": "ReadOnlyForceRecursive"}  # fmt: skip
    if value not in choices:
        raise ValueError(f"invalid value for bind-recursive: {value}")
    member = choices[value]
    if member:
        _options(mount, "BindOptions")[member] = True


def _subpath(mount: dict[str, Any], value: str) -> None:
    member = "ImageOptions" if mount["Type"] == "image" else "VolumeOptions"
    _options(mount, member)["Subpath"] = value


def _put(name: str) -> Any:
    def put(mount: dict[str, Any], value: str) -> None:
        mount[name] = value

    return put


_KEYS: dict[str, Any] = {
    "type": _put("Type"), "source": _put("Source"), "src": _put("Source"), "target": _put("Target"),
    "destination": _put("Target"), "dst": _put("Target"), "consistency": _put("Consistency"),
    "readonly": _read_only, "ro": _read_only,
    "bind-propagation": _set("BindOptions", "Propagation"), "bind-recursive": _recursive,
    "bind-nonrecursive": _set("BindOptions", "NonRecursive", _flag),
    "bind-create-src": _set("BindOptions", "CreateMountpoint", _flag),
    "volume-nocopy": _set("VolumeOptions", "NoCopy", _flag),
    "volume-subpath": _subpath, "image-subpath": _subpath,
    "volume-label": _volume_label, "volume-driver": _driver("Name"),
    "volume-opt": _driver("Options"),
    "tmpfs-size": _set("TmpfsOptions", "SizeBytes", parse_bytes),
    "tmpfs-mode": _set("TmpfsOptions", "Mode", lambda text: int(text, 8)),
}  # fmt: skip


def mount_flag(spec: str) -> dict[str, Any]:
    """docker's Mount of one --mount value (CSV); UsageError in its words."""
    import csv

    mount: dict[str, Any] = {"Type": "volume"}
    fields = next(csv.reader([spec]), [])
    kinds = [f.partition("=")[2] for f in fields if f.lower().startswith("type=")]
    if kinds:
        mount["Type"] = kinds[-1].lower()
    try:
        for field in fields:
            key, equals, value = field.partition("=")
            put = _KEYS.get(key.strip().lower())
            if put is None:
                reason = "unknown option" if equals else "not a key=value pair"
                raise ValueError(f"{reason}: '{field}'")
            put(mount, value)
        mount["Type"] = mount["Type"].lower()
        if mount["Type"] not in ("bind", "volume", "tmpfs", "image"):
            raise ValueError(f"mount type unknown: '{mount['Type']}'")
        if not mount.get("Target"):
            raise ValueError("target is required")
        if mount["Type"] == "bind":
            if not mount.get("Source"):
                raise ValueError("source is required for type=bind")
            mount["Source"] = os.path.abspath(mount["Source"])
    except ValueError as error:
        raise UsageError(f'invalid argument "{spec}" for "--mount" flag: {error}') from None
    return mount
