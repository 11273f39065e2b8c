"""Pull and push against a double: resumption, retries, authentication, mirrors, uploads."""

import base64
import hashlib
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.errors import Denied, Invalid, NotFound, Unavailable
from bulkhead.images.service import ImageService
from bulkhead.oci.distribution import challenges, error_text
from bulkhead.oci.reference import parse
from bulkhead.registry import upload
from bulkhead.registry.client import Repository
from bulkhead.registry.config import Registries
from bulkhead.registry.urls import follow, origin
from bulkhead.registry.waiting import Cancel, Cancelled, delay
from tests.helpers.fake_registry import (
    FakeClock,
    FakeRegistry,
    Handler,
    fake_registry,
    service,
)
from tests.helpers.images import BuiltImage, build, digest_of, tar_of


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def images(tmp_path: Path, clock: FakeClock) -> ImageService:
    return service(tmp_path / "client", clock=clock)


def image_in(registry: FakeRegistry, size: int = 300_000, **options: Any) -> BuiltImage:
    content = bytes(range(256)) * (size // 256)
    image = build(registry.blobs, [tar_of({"file": content})], compression="", **options)
    registry.publish("1", image)
    return image


def breaking(registry: FakeRegistry, image: BuiltImage, most: int, times: int) -> str:
    """Have the connection break after `most` bytes of the layer, `times` times; its path."""
    data = image.layers[0]
    path = f"/v2/r/blobs/{digest_of(data)}"
    left = [times]

    def route(handler: Handler) -> None:
        left[0] -= 1
        registry.serve_blob(handler, data, most=most if left[0] >= 0 else None)

    registry.routes[path] = route
    return path


# --- resumption and retries


def test_a_broken_download_goes_on_where_it_broke(
    images: ImageService, registry: FakeRegistry, clock: FakeClock
) -> None:
    image = image_in(registry)
    breaking(registry, image, most=100_000, times=2)
    assert images.pull(f"{registry.host}/r:1").id == image.id
    ranges = [r.headers.get("range", "") for r in registry.seen("GET", digest_of(image.layers[0]))]
    assert ranges == ["", "bytes=100000-", "bytes=200000-"]
    assert len(clock.slept) == 2


def test_progress_made_renews_the_patience(
    images: ImageService, registry: FakeRegistry, clock: FakeClock
) -> None:
    image = image_in(registry)
    breaking(registry, image, most=20_000, times=14)
    assert images.pull(f"{registry.host}/r:1").id == image.id
    assert set(clock.slept) == {clock.slept[0]}


def test_a_download_that_makes_no_progress_is_given_up(
    images: ImageService, registry: FakeRegistry, clock: FakeClock
) -> None:
    image = image_in(registry)
    breaking(registry, image, most=0, times=1000)
    with pytest.raises(Unavailable, match=r"broke|ended after"):
        images.pull(f"{registry.host}/r:1")
    assert len(clock.slept) == 4
    assert clock.slept == sorted(clock.slept)
    assert images.list() == []


def test_a_later_pull_resumes_an_earlier_one(
    images: ImageService, registry: FakeRegistry, clock: FakeClock
) -> None:
    noise = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(8000))
    image = build(registry.blobs, [tar_of({"file": noise})], compression="gzip")
    registry.publish("1", image)
    data = image.layers[0]
    path = f"/v2/r/blobs/{digest_of(data)}"
    once = [True]

    def first(handler: Handler) -> None:
        if once.pop() if once else False:
            registry.serve_blob(handler, data, most=120_000)
        else:
            handler.reply(404)

    registry.routes[path] = first
    with pytest.raises(NotFound):
        images.pull(f"{registry.host}/r:1")
    del registry.routes[path]
    registry.requests.clear()
    assert images.pull(f"{registry.host}/r:1").id == image.id
    (again,) = registry.seen("GET", digest_of(data))
    assert int(again.headers["range"].removeprefix("bytes=").removesuffix("-")) >= 100_000


def test_a_registry_without_ranges_is_read_from_the_start(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    data = image.layers[0]
    left = [1]

    def route(handler: Handler) -> None:
        del handler.headers["Range"]
        left[0] -= 1
        registry.serve_blob(handler, data, most=50_000 if left[0] >= 0 else None)

    registry.routes[f"/v2/r/blobs/{digest_of(data)}"] = route
    assert images.pull(f"{registry.host}/r:1").id == image.id


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_an_overloaded_registry_is_asked_again(
    images: ImageService, registry: FakeRegistry, clock: FakeClock, status: int
) -> None:
    image = image_in(registry)
    left = [2]

    def route(handler: Handler) -> None:
        left[0] -= 1
        if left[0] >= 0:
            handler.reply(status, Retry_After="7")
        else:
            registry.serve(handler)

    registry.routes["/v2/r/manifests/1"] = route
    assert images.pull(f"{registry.host}/r:1").id == image.id
    assert clock.slept == [7.0, 7.0]


def test_a_registry_that_stays_overloaded_is_named(
    images: ImageService, registry: FakeRegistry, clock: FakeClock
) -> None:
    body = json.dumps({"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]})
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(429, body.encode())
    with pytest.raises(Unavailable, match=r"answers 429 \(toomanyrequests: slow down\)"):
        images.pull(f"{registry.host}/r:1")
    assert len(clock.slept) == 4


def test_a_refusal_is_not_repeated(images: ImageService, registry: FakeRegistry) -> None:
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(403)
    with pytest.raises(Denied):
        images.pull(f"{registry.host}/r:1")
    assert len(registry.seen("GET", "manifests/1")) == 1


def test_nobody_listening_is_one_clear_line(images: ImageService) -> None:
    with fake_registry() as gone:
        host = gone.host
    with pytest.raises(Unavailable, match=f"cannot connect to {host}"):
        images.pull(f"{host}/r:1")


def test_the_delays_grow_and_are_bounded() -> None:
    clock = FakeClock()
    delays = [delay(attempt, clock) for attempt in range(12)]
    assert delays == sorted(delays)
    assert delays[0] < 1
    assert delays[-1] <= 15
    assert delay(0, clock, 1e9) == 60.0


def test_a_cancelled_pull_ends_between_attempts(
    images: ImageService, registry: FakeRegistry, clock: FakeClock
) -> None:
    cancel = Cancel()
    registry.routes["/v2/r/manifests/1"] = lambda handler: handler.reply(503)
    clock.on_sleep = cancel.cancel
    with pytest.raises(Cancelled):
        images.pull(f"{registry.host}/r:1", cancel=cancel)
    assert len(registry.seen("GET", "manifests/1")) == 1


def test_layers_download_side_by_side_and_equal_ones_once(
    images: ImageService, registry: FakeRegistry
) -> None:
    tars = [tar_of({f"f{n}": b"x" * 5000}) for n in range(6)]
    image = build(registry.blobs, [*tars, tars[0]])
    registry.publish("1", image)
    seen: list[dict[str, Any]] = []
    pulled = images.pull(f"{registry.host}/r:1", progress=seen.append)
    assert len(pulled.diff_ids) == 7
    assert len(registry.seen("GET", digest_of(image.layers[0]))) == 1
    assert seen[0] == {"status": "Pulling from r", "id": "1"}
    assert {"Pulling fs layer", "Downloading", "Pull complete"} <= {m["status"] for m in seen}
    assert seen[-1]["status"] == f"Status: Downloaded newer image for {registry.host}/r:1"
    seen.clear()
    images.pull(f"{registry.host}/r:1", progress=seen.append)
    assert seen[-1]["status"] == f"Status: Image is up to date for {registry.host}/r:1"
    assert sum(message["status"] == "Already exists" for message in seen) == 7


def test_a_progress_callback_that_raises_ends_the_pull(
    images: ImageService, registry: FakeRegistry
) -> None:
    image_in(registry)

    def hang_up(message: dict[str, Any]) -> None:
        if message["status"] == "Downloading":
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        images.pull(f"{registry.host}/r:1", progress=hang_up)
    assert images.list() == []


# --- authentication


def test_basic_credentials_are_sent_when_asked_for(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    wanted = "Basic " + base64.b64encode(b"u:p:with:colons").decode()
    serve = registry.serve

    def guarded(handler: Handler) -> None:
        if handler.headers.get("Authorization") == wanted:
            serve(handler)
        else:
            handler.reply(401, WWW_Authenticate='Basic realm="x"')

    registry.serve = guarded  # type: ignore[method-assign]
    auth = {"username": "u", "password": "p:with:colons"}
    assert images.pull(f"{registry.host}/r:1", auth=auth).id == image.id
    with pytest.raises(Denied, match="wants a login"):
        images.pull(f"{registry.host}/r:1", auth={})


def tokens(registry: FakeRegistry, answers: list[dict[str, Any]]) -> None:
    """Let the registry want the newest token that /token gave."""
    serve = registry.serve
    given: list[str] = []

    def token(handler: Handler) -> None:
        answer = answers[min(len(given), len(answers) - 1)]
        given.append(answer.get("token") or answer["access_token"])
        handler.reply(200, json.dumps(answer).encode())

    def guarded(handler: Handler) -> None:
        if given and handler.headers.get("Authorization") == f"Bearer {given[-1]}":
            serve(handler)
        else:
            challenge = f'Bearer realm="http://{registry.host}/token",service="s",scope="x:y:z"'
            handler.reply(401, WWW_Authenticate=challenge)

    registry.routes["/token"] = token
    registry.serve = guarded  # type: ignore[method-assign]


def test_a_bearer_token_is_fetched_once_and_kept(
    images: ImageService, registry: FakeRegistry
) -> None:
    image = image_in(registry)
    tokens(registry, [{"token": "one", "expires_in": 300}])
    assert images.pull(f"{registry.host}/r:1", auth={"username": "u", "password": "p"}).id
    (asked,) = registry.seen("GET", "/token")
    assert "scope=repository%3Ar%3Apull" in asked.path
    assert "scope=x%3Ay%3Az" in asked.path
    assert "service=s" in asked.path
    assert asked.headers["authorization"].startswith("Basic ")
    assert image.id


def test_an_identity_token_is_posted(images: ImageService, registry: FakeRegistry) -> None:
    image_in(registry)
    tokens(registry, [{"access_token": "one"}])
    images.pull(f"{registry.host}/r:1", auth={"identitytoken": "id&token"})
    (asked,) = registry.seen("POST", "/token")
    assert b"grant_type=refresh_token" in asked.body
    assert b"refresh_token=id%26token" in asked.body


def test_a_registry_token_is_sent_as_it_is(images: ImageService, registry: FakeRegistry) -> None:
    image_in(registry)
    images.pull(f"{registry.host}/r:1", auth={"registrytoken": "ready"})
    assert {r.headers["authorization"] for r in registry.seen("GET", "/v2/r/")} == {"Bearer ready"}


def test_an_expired_token_is_fetched_again(
    registry: FakeRegistry, clock: FakeClock, tmp_path: Path
) -> None:
    image_in(registry)
    tokens(registry, [{"token": "one", "expires_in": 100}, {"token": "two", "expires_in": 100}])
    config = Registries(certificates=())
    with Repository(parse(f"{registry.host}/r:1"), config=config, clock=clock) as repository:
        repository.manifest("1")
        clock.now += 50
        repository.manifest("1")
        assert len(registry.seen("GET", "/token")) == 1
        clock.now += 50
        repository.manifest("1")
        assert len(registry.seen("GET", "/token")) == 2


def test_challenges_are_read_as_the_grammar_says() -> None:
    found = challenges('Basic realm="a, b", Bearer realm="https://x/t?a=b,c",service="s\\"q"')
    assert [c.scheme for c in found] == ["basic", "bearer"]
    assert found[0].parameters == {"realm": "a, b"}
    assert found[1].parameters == {"realm": "https://x/t?a=b,c", "service": 's"q'}
    assert challenges("") == []
    assert challenges('"""') == []
    assert challenges("Negotiate")[0].scheme == "negotiate"


def test_error_bodies_are_read_whatever_they_are() -> None:
    assert error_text(b'{"errors":[{"code":"A","message":"b"}]}') == ("A", "b")
    assert error_text(b'{"details":"gone"}') == ("", "gone")
    for body in (b"", b"x", b"[]", b'{"errors":[]}', b'{"errors":["x"]}', b'{"errors":5}'):
        assert error_text(body) == ("", "")


# --- where to


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/",
        "http://",
        "http://a b/",
        "http://u@h/",
        "http://a\\@b/",
        "http://h:x/",
        "x",
        "http://[::1/",
        "http://ä/",
    ],
)
def test_an_ambiguous_url_has_no_origin(url: str) -> None:
    with pytest.raises(Invalid):
        origin(url)


def test_https_never_leads_to_http() -> None:
    assert follow("https://a/x", "/y", "w") == "https://a/y"
    assert follow("http://a/x", "https://b/y", "w") == "https://b/y"
    with pytest.raises(Denied, match="from https to http"):
        follow("https://a/x", "http://a/y", "w")


def test_a_mirror_is_asked_first(tmp_path: Path, clock: FakeClock, registry: FakeRegistry) -> None:
    with fake_registry() as mirror:
        mirror.blobs = registry.blobs
        image = image_in(registry)
        mirror.publish("1", image)
        config = Registries(certificates=(), mirrors={registry.host: (f"http://{mirror.host}",)})
        images = service(tmp_path / "m", clock=clock, registries=config)
        assert images.pull(f"{registry.host}/r:1").id == image.id
        assert registry.requests == []
        assert images.resolve(f"{registry.host}/r:1").id == image.id


def test_a_mirror_that_fails_is_passed_over(
    tmp_path: Path, clock: FakeClock, registry: FakeRegistry
) -> None:
    with fake_registry() as mirror:
        image = image_in(registry)
        mirror.publish("1", image)
        path = f"/v2/r/blobs/{digest_of(image.layers[0])}"
        mirror.routes[path] = lambda handler: handler.reply(404)
        config = Registries(certificates=(), mirrors={registry.host: (f"http://{mirror.host}",)})
        images = service(tmp_path / "m", clock=clock, registries=config)
        assert images.pull(f"{registry.host}/r:1").id == image.id
        assert mirror.seen("GET", path)
        assert registry.seen("GET", path)


def test_plain_http_is_for_loopback_and_registries_named_insecure(tmp_path: Path) -> None:
    from bulkhead.registry.config import endpoint

    config = Registries(insecure=("reg.lan:5000", "10.0.0.0/8", "all-ports.lan"))
    assert endpoint("127.0.0.1:5000", config).schemes == ("https", "http")
    assert endpoint("localhost", config).schemes == ("https", "http")
    assert endpoint("[::1]:5000", config).schemes == ("https", "http")
    assert endpoint("reg.lan:5000", config).schemes == ("https", "http")
    assert endpoint("all-ports.lan:1", config).schemes == ("https", "http")
    assert endpoint("10.1.2.3:80", config).schemes == ("https", "http")
    assert endpoint("reg.lan", config).schemes == ("https",)
    assert endpoint("localhost.evil.example", config).schemes == ("https",)
    assert endpoint("docker.io", config).host == "registry-1.docker.io"
    assert endpoint("docker.io", config).schemes == ("https",)


# --- pushing


class Uploads:
    """The upload half of a registry, which may break."""

    def __init__(self, registry: FakeRegistry, *, break_patches: int = 0) -> None:
        self.registry = registry
        self.stored: dict[str, bytes] = {}
        self.session = b""
        self.breaks = break_patches
        self.tags: dict[str, bytes] = {}
        serve = registry.serve

        def route(handler: Handler) -> None:
            path, _, query = handler.path.partition("?")
            if handler.command in ("POST", "PATCH", "PUT") or "/session" in path:
                self.write(handler, path, query)
            elif "/blobs/" in path and path.rpartition("/")[2] in self.stored:
                handler.reply(200, self.stored[path.rpartition("/")[2]])
            else:
                serve(handler)

        registry.serve = route  # type: ignore[method-assign]

    def write(self, handler: Handler, path: str, query: str) -> None:
        body = handler.request_body
        if handler.command == "POST":
            self.session = b""
            handler.reply(202, Location="/v2/r/session?state=a%2Fb")
        elif handler.command == "PATCH":
            start = int(handler.headers["Content-Range"].partition("-")[0])
            assert start == len(self.session)
            if self.breaks:
                self.breaks -= 1
                self.session += body[: len(body) // 2]
                handler.hang_up()
                return
            self.session += body
            handler.reply(202, Location="/v2/r/session?state=c", Range=f"0-{len(self.session) - 1}")
        elif handler.command == "GET":
            handler.reply(204, Location="/v2/r/session?state=d", Range=f"0-{len(self.session) - 1}")
        elif "/manifests/" in path:
            self.tags[path.rpartition("/")[2]] = body
            handler.reply(201, Docker_Content_Digest=digest_of(body))
        else:
            assert "digest=sha256%3A" in query
            data = self.session + body
            self.stored[digest_of(data)] = data
            handler.reply(201, Docker_Content_Digest=digest_of(data))


def pulled(images: ImageService, registry: FakeRegistry, size: int = 300_000) -> BuiltImage:
    image = image_in(registry, size)
    images.pull(f"{registry.host}/r:1")
    registry.blobs.by_digest.clear()
    registry.requests.clear()
    return image


def test_a_push_gives_exactly_what_was_pulled(images: ImageService, registry: FakeRegistry) -> None:
    image = pulled(images, registry)
    uploads = Uploads(registry)
    seen: list[dict[str, Any]] = []
    assert images.push(f"{registry.host}/r:1", progress=seen.append) == image.digest
    assert uploads.tags == {"1": image.manifest}
    assert set(uploads.stored) == {image.id, digest_of(image.layers[0])}
    assert seen[0] == {"status": f"The push refers to repository [{registry.host}/r]"}
    assert seen[-1]["aux"] == {"Tag": "1", "Digest": image.digest, "Size": len(image.manifest)}
    registry.requests.clear()
    images.push(f"{registry.host}/r:1")
    assert not registry.seen("POST", "")


def test_a_big_blob_goes_in_chunks_that_are_resumed(
    images: ImageService,
    registry: FakeRegistry,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upload, "CHUNK", 50_000)
    pulled(images, registry)
    uploads = Uploads(registry, break_patches=3)
    # one upload at a time: the double has one session
    images._registries = Registries(certificates=(), uploads=1)
    images.push(f"{registry.host}/r:1")
    assert len(uploads.stored) == 2
    assert len(registry.seen("PATCH", "")) >= 7
    assert len(clock.slept) == 3


def test_a_tag_that_is_not_there_cannot_be_pushed(images: ImageService) -> None:
    with pytest.raises(NotFound, match="An image does not exist locally with the tag: x/y"):
        images.push("x/y")


def test_certificate_directories_are_read(tmp_path: Path) -> None:
    from bulkhead.registry.certificates import context_for
    from bulkhead.registry.config import Endpoint

    place = tmp_path / "h:1"
    place.mkdir()
    (place / "ca.crt").write_text("no certificate")
    with pytest.raises(Invalid, match=r"ca.crt cannot be used"):
        context_for(Endpoint("h:1", certificates=(str(tmp_path),)))
    insecure = context_for(Endpoint("h:2", verify=False, certificates=(str(tmp_path),)))
    assert insecure.verify_mode == ssl.CERT_NONE
