"""The build cache from and to other places: a registry, or a folder.

It travels as an image that nobody runs: its layers are the results, its history names their keys.
So everything that moves images moves it. SOURCE and TARGET are what docker's users write:
`type=registry,ref=NAME`, `type=local,src=FOLDER` or `dest=FOLDER`, or just an image's name.
"""

import os
import re
from typing import TYPE_CHECKING

from bulkhead.build.cache import Step
from bulkhead.errors import BulkheadError, Invalid
from bulkhead.images import assemble
from bulkhead.oci.image import MOST_LAYERS, ContainerConfig, History, ImageConfig, RootFS
from bulkhead.oci.reference import parse

if TYPE_CHECKING:
    from bulkhead.build.builder import Builder

_MARK = "dev.bulkhead.build-cache"
_NAME = "bulkhead.local/build-cache"
_FILE = "bulkhead-cache.tar"
_KEY = re.compile(r"[0-9a-f]{64}")


def fields(text: str, folder: str) -> tuple[str, str]:
    """(kind, where) of one --cache-from or --cache-to; `folder` names the folder's key."""
    if "=" not in text:
        return "registry", text
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        found[name.strip()] = value
    kind = found.get("type", "registry")
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
    kind, where = fields(text, "src")
    step = builder.reporter.step(f"importing cache from {where}", stage=-1, text="", line=0)
    images = builder.host.images
    try:
        if kind == "local":
            with open(f"{where}/{_FILE}", "rb") as file:
                name = images.load(file)[0]
            image = images.resolve(name)
        else:
            auth = builder.options.auths.get(parse(where).domain)
            image = images.pull(where, None, auth)
    except (BulkheadError, OSError) as error:
        builder.reporter.warn(f"no cache from {where}: {error}")
        step.done()
        return
    if image.config.container.labels and _MARK in image.config.container.labels:
        known = set(image.diff_ids)
        for entry in image.config.history or ():
            key, _, kind_ = entry.comment.partition(" ")
            diff_id, _, what = entry.created_by.partition(" ")
            if not _KEY.fullmatch(key):  # it names a file of the cache
                builder.reporter.warn(f"{where} has a result with the key {key[:64]!r}: left out")
            elif diff_id in known and builder.cache.get(key) is None:
                layer = builder.host.store.layer(diff_id)
                size = layer.size if layer is not None else 0
                builder.cache.put(Step(key, diff_id, size, entry.created or "", what, kind_))
    if kind == "local":
        images.remove(image.id, force=True)
    step.done()


def save(builder: "Builder", text: str) -> None:
    """Put the results of this build where `text` says."""
    kind, where = fields(text, "dest")
    if kind == "inline":
        return
    step = builder.reporter.step(f"exporting cache to {where}", stage=-1, text="", line=0)
    images = builder.host.images
    found = [s for s in builder.cache.steps() if s.key in builder.made and s.diff_id]
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
    reference = parse(where if kind == "registry" else _NAME).tagged()
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
