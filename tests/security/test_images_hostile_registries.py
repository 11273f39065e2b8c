"""Registries that lie: refused in words, credentials kept, nothing left in the store."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.errors import BulkheadError, Corrupt, Denied, Invalid, NotFound, Unsupported
from bulkhead.images.service import ImageService
from bulkhead.oci.image import DOCKER_SCHEMA1, LARGEST_MANIFEST
from tests.helpers.fake_registry import (
    FakeClock,
    FakeRegistry,
    Handler,
    fake_registry,
    nothing_left,
    service,
)
from tests.helpers.images import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    BuiltImage,
    build,
    digest_of,
    tar_of,
)

AUTH = {"username": "user", "password": "pass"}


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


@pytest.fixture
def images(tmp_path: Path) -> ImageService:
    return service(tmp_path / "client", clock=FakeClock())


def image_in(registry: FakeRegistry, **options: Any) -> BuiltImage:
    image = build(registry.blobs, [tar_of({"file": b"content" * 1000})], **options)
    registry.publish("1", image)
    return image


def refused(
    images: ImageService, registry: FakeRegistry, kind: type[BulkheadError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        images.pull(f"{registry.host}/r:1", auth=AUTH)
    nothing_left(images)


def changed(registry: FakeRegistry, image: BuiltImage, **changes: Any) -> None:
    """Publish `image` with members of its manifest replaced."""
    document = {**json.loads(image.manifest), **changes}
    registry.put("1", OCI_MANIFEST, json.dumps(document).encode())


def test_the_double_itself_is_pulled_from(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)
    assert images.pull(f"{registry.host}/r:1").id == image.id


def test_other_bytes_of_the_announced_size(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry, compression="")
    digest = digest_of(image.layers[0])
    wrong = bytearray(image.layers[0])
    wrong[700] ^= 1
    registry.blobs.by_digest[digest] = bytes(wrong)
    refused(images, registry, Corrupt, "digest")


def test_other_bytes_of_a_configuration(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)
    registry.blobs.by_digest[image.id] = image.config.replace(b"layer", b"lawyr")
    refused(images, registry, Corrupt, "other bytes")


def test_a_blob_longer_than_announced(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)
    digest = digest_of(image.layers[0])
    registry.blobs.by_digest[digest] += b"more"
    refused(images, registry, Corrupt, "announced")


def test_a_blob_without_an_end(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:  # until the client hangs up
            handler.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")

    registry.routes[f"/v2/r/blobs/{digest_of(image.layers[0])}"] = endless
    refused(images, registry, BulkheadError, "announced|damaged|gzip|digest")


def test_a_blob_that_always_ends_early(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)

    def short(handler: Handler) -> None:
        handler.reply(200)  # no byte, as if all was well

    registry.routes[f"/v2/r/blobs/{digest_of(image.layers[0])}"] = short
    refused(images, registry, Corrupt, "0 bytes at the registry")


def test_another_range_than_asked_for(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)
    data = image.layers[0]
    path = f"/v2/r/blobs/{digest_of(data)}"

    def first(handler: Handler) -> None:
        if handler.headers.get("Range"):
            span = f"bytes 0-{len(data) - 1}/{len(data)}"
            handler.reply(206, data, Content_Range=span)
        else:
            registry.serve_blob(handler, data, most=10)

    registry.routes[path] = first
    with pytest.raises(Corrupt, match="another range"):
        images.pull(f"{registry.host}/r:1")
    assert images.list() == []


@pytest.mark.parametrize(
    ("media_type", "document", "kind", "words"),
    [
        ("text/html", b"<html>", Corrupt, "JSON"),
        (OCI_MANIFEST, b"{}", Corrupt, "cannot be read"),
        (DOCKER_SCHEMA1[1], b'{"schemaVersion": 1, "fsLayers": []}', Unsupported, "schema 1"),
        (OCI_MANIFEST, b'{"schemaVersion": 2, "manifests": [], "layers": []}', Corrupt, "both"),
        (OCI_INDEX, b'{"schemaVersion": 2, "manifests": []}', NotFound, "no matching manifest"),
        (OCI_MANIFEST, b" " * (LARGEST_MANIFEST + 1), Invalid, "larger than"),
        (OCI_MANIFEST, b"[" * 1_000_000, Corrupt, "JSON"),
    ],
)
def test_what_is_no_manifest(
    images: ImageService,
    registry: FakeRegistry,
    media_type: str,
    document: bytes,
    kind: type[BulkheadError],
    words: str,
) -> None:
    registry.put("1", media_type, document)
    refused(images, registry, kind, words)


def test_a_manifest_without_an_end(images: ImageService, registry: FakeRegistry) -> None:
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", OCI_MANIFEST)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")

    registry.routes["/v2/r/manifests/1"] = endless
    refused(images, registry, Invalid, "larger than")


@pytest.mark.parametrize("size", [-1, 1 << 50, 10**30])
def test_a_layer_of_hostile_size(images: ImageService, registry: FakeRegistry, size: int) -> None:
    image = image_in(registry)
    layer = {"mediaType": OCI_LAYER, "digest": digest_of(image.layers[0]), "size": size}
    changed(registry, image, layers=[layer])
    refused(images, registry, BulkheadError, "claims|cannot be read")


def test_too_many_layers(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)
    layer = json.loads(image.manifest)["layers"][0]
    changed(registry, image, layers=[layer] * 10_000)
    refused(images, registry, Invalid, "10000 layers")


def test_another_number_of_layers_than_configured(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    layer = json.loads(image.manifest)["layers"][0]
    changed(registry, image, layers=[layer, layer])
    refused(images, registry, Corrupt, "configuration names 1")


def test_a_layer_with_another_content_than_configured(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    other = build(registry.blobs, [tar_of({"evil": b"x"})])
    changed(registry, image, layers=json.loads(other.manifest)["layers"])
    refused(images, registry, Corrupt, "diff|digest")


def test_a_media_type_that_states_another_compression(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    layer = {**json.loads(image.manifest)["layers"][0], "mediaType": OCI_LAYER + "+zstd"}
    changed(registry, image, layers=[layer])
    refused(images, registry, BulkheadError, "zstd")


def test_a_manifest_with_another_digest_than_asked_for(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    digest = "sha256:" + "0" * 64
    registry.put(digest, OCI_MANIFEST, image.manifest)
    with pytest.raises(Corrupt, match="has digest"):
        images.pull(f"{registry.host}/r@{digest}")
    nothing_left(images)


def test_a_tag_whose_stated_digest_is_wrong(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)

    def lie(handler: Handler) -> None:
        handler.reply(
            200,
            image.manifest,
            Content_Type=OCI_MANIFEST,
            Docker_Content_Digest="sha256:" + "1" * 64,
        )

    registry.routes["/v2/r/manifests/1"] = lie
    refused(images, registry, Corrupt, "has digest")


def test_an_index_member_of_another_kind(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)
    member = {**image.descriptor, "mediaType": OCI_INDEX}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [member]}
    registry.put("1", OCI_INDEX, json.dumps(index).encode())
    refused(images, registry, Corrupt, "declared as|calls itself")


def test_an_index_that_holds_itself_is_not_followed(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    inner = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [image.descriptor]}
    ).encode()
    registry.put(digest_of(inner), OCI_INDEX, inner)
    member = {
        "mediaType": OCI_INDEX,
        "digest": digest_of(inner),
        "size": len(inner),
        "platform": image.descriptor["platform"],
    }
    outer = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [member]}
    registry.put("1", OCI_INDEX, json.dumps(outer).encode())
    refused(images, registry, Corrupt, "an index where an image manifest was expected")


# --- where credentials and connections go


def demand_basic(registry: FakeRegistry) -> None:
    """Let every route of the registry want basic credentials."""
    serve = registry.serve

    def guarded(handler: Handler) -> None:
        if handler.headers.get("Authorization"):
            serve(handler)
        else:
            handler.reply(401, WWW_Authenticate='Basic realm="r"')

    registry.serve = guarded  # type: ignore[method-assign]


def test_a_redirect_carries_no_credentials_to_another_origin(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    demand_basic(registry)
    digest = digest_of(image.layers[0])
    with fake_registry() as storage:
        storage.blobs = registry.blobs

        def away(handler: Handler) -> None:
            handler.reply(307, Location=f"http://{storage.host}/v2/r/blobs/{digest}?signed=1")

        registry.routes[f"/v2/r/blobs/{digest}"] = away
        assert images.pull(f"{registry.host}/r:1", auth=AUTH).id == image.id
        (asked,) = storage.seen("GET", digest)
        assert "authorization" not in asked.headers
    assert any("authorization" in request.headers for request in registry.requests)


def test_a_redirect_to_another_host_that_challenges_gets_no_credentials(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    demand_basic(registry)
    digest = digest_of(image.layers[0])
    with fake_registry() as thief:
        thief.routes["/steal"] = lambda handler: handler.reply(
            401, WWW_Authenticate='Basic realm="give"'
        )
        registry.routes[f"/v2/r/blobs/{digest}"] = lambda handler: handler.reply(
            302, Location=f"http://{thief.host}/steal"
        )
        refused(images, registry, Denied, "authentication required")
        assert all("authorization" not in request.headers for request in thief.requests)


@pytest.mark.parametrize("target", ["/v2/r/manifests/1", "http://HOST/v2/r/manifests/1"])
def test_a_redirect_loop_ends(images: ImageService, registry: FakeRegistry, target: str) -> None:
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(
        302, Location=target.replace("HOST", registry.host)
    )
    refused(images, registry, Denied, "redirects")
    assert len(registry.seen("GET", "manifests/1")) < 10


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://x/", "", "http://[::1/"])
def test_a_redirect_to_no_web_address(
    images: ImageService, registry: FakeRegistry, location: str
) -> None:
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(302, Location=location)
    refused(images, registry, BulkheadError, "not an http|redirects|not a URL|ambiguous")


@pytest.mark.parametrize(
    "realm",
    [
        "http://evil.example/token",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "//127.0.0.1/x",
        "",
        "http://user@evil.example\\@127.0.0.1/",
    ],
)
def test_a_token_service_that_is_not_https(
    images: ImageService, registry: FakeRegistry, realm: str
) -> None:
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(
        401, WWW_Authenticate=f'Bearer realm="{realm}",service="s"'
    )
    refused(images, registry, Denied, "not https")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"no json", Denied),
        (b"{}", Denied),
        (b'{"token": 5}', Denied),
        (b'{"token": "a\\r\\nX-Injected: 1"}', Denied),
        (b'{"token": "' + b"a" * (2 << 20) + b'"}', Invalid),
    ],
)
def test_a_token_service_that_answers_nonsense(
    images: ImageService, registry: FakeRegistry, answer: bytes, kind: type[BulkheadError]
) -> None:
    registry.routes["/token"] = lambda handler: handler.reply(200, answer)
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(
        401, WWW_Authenticate=f'Bearer realm="http://{registry.host}/token",service="s"'
    )
    refused(images, registry, kind, "token")


def test_a_registry_that_refuses_every_token_is_asked_twice_at_most(
    images: ImageService, registry: FakeRegistry
) -> None:
    registry.routes["/token"] = lambda handler: handler.reply(200, b'{"token": "t"}')
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(
        401, WWW_Authenticate=f'Bearer realm="http://{registry.host}/token",service="s"'
    )
    refused(images, registry, Denied, "authentication required")
    assert len(registry.seen("GET", "manifests/1")) == 2


def test_terminal_escapes_of_an_error_message_are_not_passed_on(
    images: ImageService, registry: FakeRegistry
) -> None:
    text = json.dumps({"errors": [{"code": "DENIED", "message": "\x1b[2Jgone\nline"}]})
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(403, text.encode())
    with pytest.raises(Denied) as caught:
        images.pull(f"{registry.host}/r:1")
    assert caught.value.message.isprintable()


def test_an_upload_is_not_sent_to_a_place_that_is_no_web_address(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    images.pull(f"{registry.host}/r:1")
    registry.blobs.by_digest.clear()
    registry.routes["/v2/r/blobs/uploads/"] = lambda handler: handler.reply(
        202, Location="file:///tmp/x"
    )
    with pytest.raises(Invalid, match="not an http"):
        images.push(f"{registry.host}/r:1")
    assert image.id in {row["Id"] for row in images.list()}


def test_a_pull_is_cancelled_while_the_registry_says_nothing(
    images: ImageService, registry: FakeRegistry
) -> None:
    from bulkhead.registry.waiting import Cancel, Cancelled

    image_in(registry)
    cancel = Cancel()
    silent, freed = threading.Event(), threading.Event()

    def mute(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"x")
        handler.wfile.flush()
        silent.set()
        handler.connection.settimeout(60)
        try:
            handler.connection.recv(1)  # ends when the client hangs up
        except TimeoutError:
            return
        freed.set()
        handler.hang_up()

    registry.routes["/v2/r/manifests/1"] = mute

    def give_up() -> None:
        silent.wait(60)
        cancel.cancel()

    thread = threading.Thread(target=give_up)
    thread.start()
    with pytest.raises(Cancelled):
        images.pull(f"{registry.host}/r:1", cancel=cancel)
    thread.join()
    assert freed.wait(60)
    nothing_left(images)


def test_a_configuration_that_names_another_operating_system_is_no_trap(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry, architecture="riscv64")
    with pytest.raises(NotFound, match="does not match the specified platform"):
        images.pull(f"{registry.host}/r:1", platform="linux/s390x")
    nothing_left(images)
    assert images.pull(f"{registry.host}/r:1").id == image.id


def test_config_media_type_is_checked(images: ImageService, registry: FakeRegistry) -> None:
    image = image_in(registry)
    config = {"mediaType": "application/vnd.wasm.config", "digest": image.id, "size": 3}
    changed(registry, image, config=config)
    refused(images, registry, Unsupported, "artifact")
    config = {"mediaType": OCI_CONFIG, "digest": image.id, "size": len(image.config) + 1}
    changed(registry, image, config=config)
    refused(images, registry, Corrupt, "bytes")
