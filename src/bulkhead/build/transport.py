"""The build cache from and to other places: a registry, or a folder.

It travels as an image that nobody runs: its layers are the results, its history names their keys.
So everything that moves images moves it. SOURCE and TARGET are what docker's users write:
`type=registry,ref=NAME`, `type=local,src=FOLDER` or `dest=FOLDER`, or just an image's name.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkhead.build.cache import Step
from bulkhead.errors import BulkheadError, Invalid
from bulkhead.images import assemble
from bulkhead.images.catalog import Image
from bulkhead.oci.image import MOST_LAYERS, ContainerConfig, History, ImageConfig, RootFS
from bulkhead.oci.reference import parse

if TYPE_CHECKING:
    from bulkhead.build.builder import Builder

_MARK = "dev.bulkhead.build-cache"
_NAME = "bulkhead.local/build-cache"
_FILE = "bulkhead-cache.tar"
_BUILT = "bulkhead build"
_KEY = re.compile(r"[0-9a-f]{64}")


def is_inline(text: str) -> bool:
    """Whether a --cache-to means the image itself."""
    return fields(text, "dest")[0] == "inline"


def fields(text: str, folder: str) -> tuple[str, str]:
    """(kind, where) of one --cache-from or --cache-to; `folder` names the folder's key."""
    if "=" not in text:
        return "registry", text
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        found[name.strip()] = value
    kind = found.get("type", "registry")
    if found.get("mode", "max") not in ("min", "max"):
        raise Invalid(f"{text}: the mode must be min or max")
    if kind == "registry" and found.get("ref"):
        return kind, found["ref"]
    if kind == "local" and found.get(folder):
        where = found[folder]
        if not os.path.isabs(where):
            raise Invalid(f"{text}: the folder must be an absolute path")
        return kind, where
    if kind == "inline":
        return kind, ""
    raise Invalid(
        f"{text!r} is not supported: type=registry,ref=NAME or type=local,{folder}=FOLDER"
    )


def load(builder: "Builder", text: str) -> None:
    """Take in the results that `text` names; what cannot be had is a warning."""
    with contextlib.ExitStack() as undo:
        _load(builder, text, undo)


def _load(builder: "Builder", text: str, undo: contextlib.ExitStack) -> None:
    kind, where = fields(text, "src")
    step = builder.reporter.step(f"importing cache from {where}", stage=-1, text="", line=0)
    images = builder.host.images
    try:
        if kind == "local":
            with open(f"{where}/{_FILE}", "rb") as file:
                alone = parse(f"{_NAME}:{secrets.token_hex(8)}")
                images.load(file, under=alone)
            undo.callback(images.remove, str(alone), force=True)
            image = images.resolve(str(alone))
        else:
            auth = builder.options.auths.get(parse(where).domain)
            classic = builder.options.format == "classic"  # which takes what is here
            image = images.resolve(where) if classic else images.pull(where, None, auth)
    except (BulkheadError, OSError) as error:
        builder.reporter.warn(f"no cache from {where}: {error}")
        step.done()
        return
    if image.config.container.labels and _MARK in image.config.container.labels:
        _take(builder, image, where)
    else:
        _take_inline(builder, image)
    step.done()


def _take(builder: "Builder", image: Image, where: str) -> None:
    """The results that an image of ours brings."""
    known = set(image.diff_ids)
    for entry in image.config.history or ():
        key, _, kind = entry.comment.partition(" ")
        diff_id, _, what = entry.created_by.partition(" ")
        if not _KEY.fullmatch(key):  # it names a file of the cache
            builder.reporter.warn(f"{where} has a result with the key {key[:64]!r}: left out")
        elif diff_id in known:
            _put(builder, Step(key, diff_id, 0, entry.created or "", what, kind))


def _take_inline(builder: "Builder", image: Image) -> None:
    """The results that an image built with type=inline is made of."""
    layers = iter(image.diff_ids)
    for entry in image.config.history or ():
        diff_id = "" if entry.empty_layer else next(layers, "")
        made, _, key = entry.comment.rpartition(" ")
        if made == _BUILT and _KEY.fullmatch(key) and (diff_id or entry.empty_layer):
            kind = "run" if entry.created_by.startswith("RUN ") else "copy"
            _put(builder, Step(key, diff_id, 0, entry.created or "", entry.created_by, kind))


def _put(builder: "Builder", step: Step) -> None:
    if builder.cache.get(step.key) is None:
        layer = builder.host.store.layer(step.diff_id) if step.diff_id else None
        step.size = layer.size if layer is not None else 0
        builder.cache.put(step)


def save(builder: "Builder", text: str, final: Sequence[str]) -> None:
    """Put the results of this build where `text` says; mode=min: those of the layers `final`."""
    kind, where = fields(text, "dest")
    if kind == "inline":  # the image is its own cache
        return
    step = builder.reporter.step(f"exporting cache to {where}", stage=-1, text="", line=0)
    images = builder.host.images
    found = [s for s in builder.cache.steps() if s.key in builder.made and s.diff_id]
    if "mode=min" in text.split(","):
        found = [one for one in found if one.diff_id in final]
    chosen: dict[str, Step] = {}
    for one in found[-MOST_LAYERS:]:
        chosen[one.key] = one
    layers = {one.diff_id: one.size for one in chosen.values()}
    config = ImageConfig(
        architecture="unknown",
        os="linux",
        config=ContainerConfig(labels={_MARK: "1"}),
        rootfs=RootFS(diff_ids=list(layers)),
        history=[
            History(one.created, f"{one.diff_id} {one.what}", comment=f"{one.key} {one.kind}")
            for one in chosen.values()
        ],
    )
    alone = f"{_NAME}:{secrets.token_hex(8)}"
    reference = parse(where if kind == "registry" else alone).tagged()
    descriptors = [assemble.tar_layer(diff_id, size) for diff_id, size in layers.items()]
    stored = assemble.put_config(images.catalog, config, descriptors)
    assemble.name(images.catalog, stored, [reference])
    try:
        if kind == "registry":
            images.push(str(reference), builder.options.auths.get(reference.domain))
        else:
            os.makedirs(where, exist_ok=True)
            with open(f"{where}/.{_FILE}", "wb") as file:
                images.save([str(reference)], file, "oci")
            os.rename(f"{where}/.{_FILE}", f"{where}/{_FILE}")
    finally:
        images.remove(str(reference), force=True)
    step.done()
