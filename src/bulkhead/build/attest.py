"""Attestations: how an image was built (SLSA provenance) and what packages it has (SPDX).

They are in-toto statements in a manifest of their own beside the image's, in an index, as BuildKit
writes them, so that other tools find them.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bulkhead.build import git
from bulkhead.build.trees import Tree
from bulkhead.images.assemble import Stored
from bulkhead.images.timestamps import now
from bulkhead.oci.image import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    RootFS,
    encode,
)

if TYPE_CHECKING:
    from bulkhead.build.builder import Builder
    from bulkhead.build.steps import State

_STATEMENT = "application/vnd.in-toto+json"
_TYPE = "https://in-toto.io/Statement/v0.1"
PROVENANCE = "https://slsa.dev/provenance/v0.2"
SPDX = "https://spdx.dev/Document"
_PREDICATE = "in-toto.io/predicate-type"
_REFERENCE = "vnd.docker.reference"
_METADATA = re.compile(r"usr/(?:local/)?lib/python3(?:\.\d+)?/(?:site|dist)-packages/[^/]+"
                       r"\.(?:dist-info/METADATA|egg-info/PKG-INFO)\Z")  # fmt: skip


def attach(builder: "Builder", state: "State", config: ImageConfig, stored: Stored) -> Stored:
    """The image with an index that holds its attestations."""
    names = [f"pkg:docker/{tag}" for tag in builder.options.tags] or ["_"]
    hexadecimal = stored.manifest.digest.removeprefix("sha256:")
    subject = [{"name": name, "digest": {"sha256": hexadecimal}} for name in names]
    statements = []
    if builder.options.provenance:
        statements.append((PROVENANCE, provenance(builder, state)))
    if builder.options.sbom:
        with builder.layers_tree(state.layers) as tree:
            statements.append((SPDX, sbom(builder, tree, hexadecimal)))
    store = builder.host.store
    layers = []
    for kind, predicate in statements:
        document = {
            "_type": _TYPE, "predicateType": kind, "subject": subject, "predicate": predicate,
        }  # fmt: skip
        data = json.dumps(document, sort_keys=True).encode()
        layers.append(
            Descriptor(_STATEMENT, store.put(data), len(data), annotations={_PREDICATE: kind})
        )
    nothing = ImageConfig(
        architecture="unknown", os="unknown",
        rootfs=RootFS(diff_ids=[layer.digest for layer in layers]),
    )  # fmt: skip
    data = encode(nothing)
    described = Descriptor(OCI_CONFIG, store.put(data), len(data))
    manifest = encode(Manifest(described, layers, media_type=OCI_MANIFEST))
    stored.manifest.platform = config.platform
    index = Index(
        [
            stored.manifest,
            Descriptor(
                OCI_MANIFEST, store.put(manifest), len(manifest),
                annotations={f"{_REFERENCE}.type": "attestation-manifest",
                             f"{_REFERENCE}.digest": stored.manifest.digest},
                platform=Platform("unknown", "unknown"),
            ),
        ],
        media_type=OCI_INDEX,
    )  # fmt: skip
    return Stored(stored.image, stored.manifest, store.put(encode(index)))


def provenance(builder: "Builder", state: "State") -> dict[str, Any]:
    """SLSA 0.2: the file, the arguments by name and value, the images it began with."""
    options, document = builder.options, builder.plan.document
    text = "\n".join(document.source.lines).encode("utf-8", "surrogateescape")
    materials = [
        {
            "uri": f"pkg:docker/{name}" + (f"?platform={platform}" if platform else ""),
            "digest": {"sha256": image.manifest_digest.removeprefix("sha256:")},
        }
        for (name, platform), image in sorted(builder.bases.items())
    ]
    return {
        "builder": {"id": "https://bulkhead.dev/build"},
        "buildType": "https://bulkhead.dev/dockerfile/v1",
        "materials": materials,
        "invocation": {
            "configSource": {
                "entryPoint": document.source.name,
                "uri": git.redacted(options.source),
                "digest": {"sha256": hashlib.sha256(text).hexdigest()},
            },
            "parameters": {
                "args": {
                    **{f"build-arg:{name}": value for name, value in sorted(options.args.items())},
                    **{f"label:{name}": value for name, value in sorted(options.labels.items())},
                    "target": options.target,
                },
                "secrets": [{"id": name} for name in sorted(options.secrets)],
                "ssh": [{"id": name} for name in sorted(options.ssh)],
            },
            "environment": {"platform": state.platform},
        },
        "metadata": {
            "buildFinishedOn": state.created if builder.epoch is not None else now(),
            "completeness": {"parameters": True, "environment": True, "materials": True},
            "reproducible": builder.epoch is not None,
        },
    }


def sbom(builder: "Builder", tree: Tree, subject: str) -> dict[str, Any]:
    """SPDX 2.3: the packages of dpkg, apk and Python."""
    found = sorted({(kind, name, version) for kind, name, version in packages(tree)})
    listed = []
    for kind, name, version in found:
        identity = re.sub(r"[^A-Za-z0-9.-]", "-", f"{kind}-{name}-{version}")
        listed.append(
            {
                "SPDXID": f"SPDXRef-Package-{identity}",
                "name": name,
                "versionInfo": version,
                "downloadLocation": "NOASSERTION",
                "externalRefs": [
                    {
                        "referenceCategory": "PACKAGE-MANAGER",
                        "referenceType": "purl",
                        "referenceLocator": f"pkg:{kind}/{name}@{version}",
                    }
                ],
            }
        )
    created = "1970-01-01T00:00:00Z" if builder.epoch is not None else now()
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": builder.options.tags[0] if builder.options.tags else "image",
        "documentNamespace": f"https://bulkhead.dev/sbom/{subject}",
        "creationInfo": {"created": created, "creators": ["Tool: bulkhead"]},
        "packages": listed,
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relationshipType": "DESCRIBES",
                "relatedSpdxElement": one["SPDXID"],
            }
            for one in listed
        ],
    }


def packages(tree: Tree) -> Iterator[tuple[str, str, str]]:
    """(purl type, name, version) of every package the image's own tools know of."""
    for fields in _paragraphs(tree.text("var/lib/dpkg/status", 64 << 20)):
        if fields.get("Package") and "installed" in fields.get("Status", "").split():
            yield "deb", fields["Package"], fields.get("Version", "")
    _, folder = tree.resolve("var/lib/dpkg/status.d")
    for node in tree.children(folder) if folder is not None and folder.is_dir else ():
        for fields in _paragraphs(b"".join(tree.read(node)) if node.is_file else None):
            if fields.get("Package"):
                yield "deb", fields["Package"], fields.get("Version", "")
    for fields in _paragraphs(tree.text("lib/apk/db/installed", 64 << 20)):
        if fields.get("P"):
            yield "apk", fields["P"], fields.get("V", "")
    yield from _python(tree)


def _python(tree: Tree) -> Iterator[tuple[str, str, str]]:
    for parent in ("usr/lib", "usr/local/lib"):
        base, folder = tree.resolve(parent)
        for node in tree.children(folder) if folder is not None and folder.is_dir else ():
            if not node.path.rpartition("/")[2].startswith("python3"):
                continue
            for packages_ in ("site-packages", "dist-packages"):
                _, where = tree.resolve(f"{base}/{node.path.rpartition('/')[2]}/{packages_}")
                for one in tree.children(where) if where is not None and where.is_dir else ():
                    for name in ("METADATA", "PKG-INFO"):
                        path = f"{one.path}/{name}"
                        data = tree.text(path) if _METADATA.match(path) else None
                        fields = next(_paragraphs(data), {})
                        if fields.get("Name"):
                            yield "pypi", fields["Name"].lower(), fields.get("Version", "")


def _paragraphs(data: bytes | None) -> Iterator[dict[str, str]]:
    """The key: value paragraphs of a text; continued lines are left out."""
    for paragraph in re.split(r"\n\s*\n", (data or b"").decode("utf-8", "replace")):
        fields: dict[str, str] = {}
        for line in paragraph.splitlines():
            key, colon, value = line.partition(":")
            if colon and not key[:1].isspace():
                fields.setdefault(key, value.strip())
        if fields:
            yield fields
