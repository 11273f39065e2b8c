"""The API's pure parts: HTTP as bytes, bodies, queries, versions, routes, frames."""

import itertools
import json
import re

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.api import answers, lenient, query, service, shapes, websocket
from bulkhead.api.message import BadRequest, Body, head, parse_head
from bulkhead.api.routes import ROUTES, Routes
from bulkhead.api.streams import framed
from bulkhead.engine import body, hosts
from bulkhead.errors import CommandNotFound, Conflict, Corrupt, Denied, Invalid, NotFound
from tests.helpers.api_fuzz import SWAGGER


def test_a_head_is_taken_apart() -> None:
    found = parse_head(
        b"POST /v1.41/images/a%2Fb/tag?repo=x%20y&tag= HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-a:2\r\n"
        b"Content-Length: 5\r\nExpect: 100-continue\r\nConnection: Upgrade\r\nUpgrade: tcp"
    )
    assert (found.method, found.path) == ("POST", "/v1.41/images/a/b/tag")
    assert found.query == {"repo": ["x y"], "tag": [""]}
    assert found.headers["x-a"] == "1, 2"
    assert (found.length, found.expects, found.upgrade, found.keep_alive) == (5, True, True, True)
    old = parse_head(b"GET http://host/x HTTP/1.0")
    assert (old.path, old.keep_alive, old.length) == ("/x", False, 0)


@pytest.mark.parametrize("data", [
    b"", b"GET /", b"GET / HTTP/2.0", b"get / HTTP/1.1", b"GET  / HTTP/1.1", b"GET x HTTP/1.1",
    b"GET /%00 HTTP/1.1", b"GET /%0a HTTP/1.1", b"GET / HTTP/1.1\r\nA : b",
    b"GET / HTTP/1.1\r\n folded", b"GET / HTTP/1.1\r\nA: \x00", b"GET / HTTP/1.1\r\nA: b\nC: d",
    b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1",
    b"GET / HTTP/1.1\r\nContent-Length: +1", b"GET / HTTP/1.1\r\nContent-Length: 1_0",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1",
    b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked",
    b"GET /?" + b"a&" * 400 + b" HTTP/1.1", b"GET / HTTP/1.1" + b"\r\nA: b" * 300,
])  # fmt: skip
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_head(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_head_or_refused(data: bytes) -> None:
    try:
        parse_head(data)
    except BadRequest as error:
        assert 400 <= error.status <= 501


def _taken(parts: list[bytes], length: int) -> tuple[bytes, bytes, bool]:
    """(body, rest, whole) of a body that comes in `parts`."""
    taking, buffer, found = Body(length), bytearray(), b""
    for part in parts:
        buffer += part
        if not taking.done:
            found += taking.take(buffer)
    return found, bytes(buffer), taking.done


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.data())
def test_chunks_may_be_cut_anywhere(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(b"%x;ext\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    whole += b"0\r\nTrailer: x\r\n\r\nNEXT"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    edges = [0, *cuts, len(whole)]
    parts = [whole[a:b] for a, b in itertools.pairwise(edges)]
    assert _taken(parts, -1) == (b"".join(pieces), b"NEXT", True)


def test_a_body_of_known_length_leaves_the_next_request() -> None:
    assert _taken([b"ab", b"cdGET"], 4) == (b"abcd", b"GET", True)
    assert _taken([b"ab"], 4) == (b"ab", b"", False)
    assert _taken([b"x"], 0) == (b"", b"x", True)


@pytest.mark.parametrize("data", [
    b"zz\r\n", b"1\r\nxx\r\n", b"-1\r\n", b"1 \x00\r\n", b"\r\n", b"f" * 5000,
    b"ffffffffffffffff1\r\n",
])  # fmt: skip
def test_broken_chunks_are_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        _taken([data], -1)


def test_a_response_head_cannot_be_split() -> None:
    made = head(409, {"X": "a"})
    assert made == b"HTTP/1.1 409 Conflict\r\nX: a\r\n\r\n"


def test_bodies_are_read_as_go_reads_them() -> None:
    made = lenient.decode(
        b'{"image": "i", "CMD": null, "New": {"x": 1}, "HostConfig": {"memory": 1e3, "Binds": null,'
        b'"PortBindings": {"80/tcp": [{"hostport": "1"}], "81/tcp": null}, "Init": true}}',
        body.CreateBody,
    )
    assert made.image == "i"
    assert made.host_config is not None
    assert made.host_config.memory == 1000
    assert made.host_config.init is True
    assert made.host_config.port_bindings == {
        "80/tcp": [body.PortBinding(host_port="1")], "81/tcp": None,
    }  # fmt: skip
    assert lenient.decode(b"null", body.UpdateBody) == body.UpdateBody()
    assert lenient.decode(b" ", body.UpdateBody) == body.UpdateBody()


@pytest.mark.parametrize("data", [
    b"{", b"[]", b'"x"', b"{}{}", b'{"Image": 1}', b'{"Image": "a\\u0000"}', b"\xff",
    b'{"HostConfig": {"Memory": 99999999999999999999}}', b'{"HostConfig": []}',
    b'{"Labels": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}", b'{"Cmd": [1]}',
])  # fmt: skip
def test_bodies_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        lenient.decode(data, body.CreateBody)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["Image", "HostConfig", "Memory", "Binds", "Cmd", "Labels", "Mounts"]),
        inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(_JSON)
def test_any_json_is_a_body_or_refused(value: object) -> None:
    try:
        found = lenient.decode(json.dumps(value).encode(), body.CreateBody)
    except Invalid:
        return
    assert msgspec.to_builtins(found)["Image"] == found.image


def test_queries() -> None:
    given = {"a": ["1"], "b": ["no"], "c": [""], "d": ["x"], "n": ["-5"], "f": ['{"k": ["v"]}']}
    assert [query.flag(given, name) for name in "abcdz"] == [True, False, False, True, False]
    assert query.number(given, "n") == -5
    assert query.number(given, "c") is None
    assert query.filters(given, "f") == {"k": ["v"]}
    with pytest.raises(Invalid):
        query.number(given, "d")
    for bad in ("[]", "{", '{"k": "v"}', '{"k": [1]}', '{"k": {"v": 1}}', '{"k": ["\\u0000"]}'):
        with pytest.raises(Invalid):
            query.filters({"filters": [bad]})


def test_versions() -> None:
    assert service.version_of("/v1.41/info") == ((1, 41), "/info")
    assert service.version_of("/info") == (service.MAXIMUM, "/info")
    assert service.version_of("/v1.22/info") == (service.MINIMUM, "/info")
    for path, word in (("/v1.99/x", "too new"), ("/v1.10/x", "too old"), ("/v0.1/x", "too old")):
        with pytest.raises(Invalid, match=word):
            service.version_of(path)


def test_routes() -> None:
    routes = Routes()

    async def handler(x: object) -> object:
        return x

    routes.add("GET", "/a/{name*}/json")(handler)
    routes.add("GET", "/a/{name}")(handler)
    assert routes.find("GET", "/a/b/c/json") == (handler, {"name": "b/c"})
    assert routes.find("GET", "/a/b") == (handler, {"name": "b"})
    assert routes.find("GET", "/a/b/c") is None
    assert routes.find("POST", "/a/b") is None
    known = [(route.method, route.path) for route in ROUTES.all]
    assert len(known) == len(set(known))


def test_errors_have_docker_s_statuses() -> None:
    kinds = ((NotFound, 404), (Conflict, 409), (Invalid, 400), (Denied, 403), (Corrupt, 500),
             (CommandNotFound, 400))  # fmt: skip
    for kind, status in kinds:
        reply = answers.refusal(kind("why"))
        assert (reply.status, json.loads(reply.body)) == (status, {"message": "why"})
    assert answers.failure_line(Invalid("why", code=3)) == {
        "errorDetail": {"message": "why", "code": 3}, "error": "why",
    }  # fmt: skip


def test_shapes_by_version() -> None:
    assert shapes.image({"Size": 1}, (1, 43)) == {"Size": 1, "VirtualSize": 1}
    assert shapes.image({"Size": 1, "VirtualSize": 1}, (1, 44)) == {"Size": 1}


def test_frames() -> None:
    assert framed(2, b"ab") == b"\x02\0\0\0\0\0\0\x02ab"
    for size in (0, 1, 125, 126, 70_000):
        data = b"x" * size
        made = bytearray(websocket.frame(2, data))
        assert made.endswith(data)
        width = len(made) - size
        made[1] |= 0x80
        made[width:width] = b"\0\0\0\0"
        assert websocket.take(made[:-1]) is None or not size
        assert websocket.take(made) == (2, data)
        assert not made
    with pytest.raises(BadRequest):
        websocket.take(bytearray(b"\x82\x01x"))
    with pytest.raises(BadRequest):
        websocket.take(bytearray(b"\x82\xff" + b"\xff" * 8 + b"\0\0\0\0"))


def test_hosts() -> None:
    assert hosts.parse("unix:///a/b").path == "/a/b"
    assert hosts.parse("tcp://1.2.3.4:5") == hosts.Where(host="1.2.3.4", port=5)
    assert hosts.parse("tcp://[::1]:5").host == "::1"
    assert hosts.parse("tcp://1.2.3.4").port == hosts.DEFAULT_PORT
    for bad in ("", "unix://a", "fd://", "tcp://1.2.3.4:x", "tcp://h:99999", "http://x:1"):
        with pytest.raises(Invalid):
            hosts.parse(bad)
    with pytest.raises(Denied, match="without mutual TLS"):
        hosts.check(hosts.Places(("tcp://127.0.0.1:1",), verify=True))


NEWER = {"/images/{name}/attestations"}
"""Paths of versions of the API after 1.50."""


def test_every_path_of_the_specification_has_a_handler() -> None:
    if not SWAGGER.exists():
        pytest.skip(f"{SWAGGER} is not here")
    document = yaml.load(SWAGGER.read_text(), Loader=yaml.CSafeLoader)
    missing = [
        f"{method} {path}"
        for path, item in document["paths"].items()
        for method in item
        if method in {"get", "post", "put", "delete", "head"}
        and path not in NEWER
        and ROUTES.find(method.upper(), re.sub(r"\{\w+\}", "x", path)) is None
    ]
    assert not missing
