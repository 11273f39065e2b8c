"""`bulkhead registry serve`: the distribution specification, hostile clients, real clients."""

import base64
import hashlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.depot import links
from bulkhead.oci.image import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from tests.helpers.depot import Depot, depot
from tests.helpers.images import busybox_archive, has_busybox
from tests.helpers.installation import installation


def of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(data: bytes, kind: str) -> dict[str, Any]:
    return {"mediaType": kind, "digest": of(data), "size": len(data)}


CONFIG, LAYER = b'{"architecture":"amd64"}', b"layer" * 1000


def manifest(**more: Any) -> bytes:
    return json.dumps(
        {
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": descriptor(CONFIG, OCI_CONFIG), "layers": [descriptor(LAYER, OCI_LAYER)],
            **more,
        }
    ).encode()  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Depot]:
    with depot(tmp_path) as found:
        yield found


@pytest.fixture
def filled(served: Depot) -> Depot:
    """With repository a/b, which has one image tagged x."""
    for data in (CONFIG, LAYER):
        assert served.push("a/b", data, of(data)).status == 201
    put = served("PUT", "/v2/a/b/manifests/x", manifest(), Content_Type=OCI_MANIFEST)
    assert put.status == 201 and put.headers["docker-content-digest"] == of(manifest())
    return served


def test_push_and_pull(filled: Depot) -> None:
    assert filled("GET", "/v2/").status == 200
    for reference in ("x", of(manifest())):
        found = filled("GET", f"/v2/a/b/manifests/{reference}")
        assert found.body == manifest() and found.headers["content-type"] == OCI_MANIFEST
        head = filled("HEAD", f"/v2/a/b/manifests/{reference}")
        assert head.status == 200 and head.body == b""
        assert head.headers["content-length"] == str(len(manifest()))
    blob = filled("GET", f"/v2/a/b/blobs/{of(LAYER)}")
    assert blob.body == LAYER
    part = filled("GET", f"/v2/a/b/blobs/{of(LAYER)}", Range="bytes=5-9")
    assert (part.status, part.body) == (206, b"layer")
    assert part.headers["content-range"] == f"bytes 5-9/{len(LAYER)}"
    assert filled("GET", f"/v2/a/b/blobs/{of(LAYER)}", Range="bytes=99999-").status == 416
    assert filled("GET", "/v2/a/b/tags/list").json == {"name": "a/b", "tags": ["x"]}
    assert filled("GET", "/v2/_catalog").json == {"repositories": ["a/b"]}


def test_uploads_in_pieces(served: Depot) -> None:
    begun = served("POST", "/v2/r/blobs/uploads/")
    assert begun.status == 202
    place = begun.headers["location"]
    first = served("PATCH", place, LAYER[:100], Content_Range="0-99")
    assert (first.status, first.headers["range"]) == (202, "0-99")
    wrong = served("PATCH", place, LAYER[:100], Content_Range="50-149")
    assert (wrong.status, wrong.code) == (416, "BLOB_UPLOAD_INVALID")
    assert served("GET", place).headers["range"] == "0-99"
    assert served("PATCH", place, LAYER[100:], Content_Range=f"100-{len(LAYER) - 1}").status == 202
    done = served("PUT", f"{place}?digest={of(LAYER)}")
    assert done.status == 201 and done.headers["location"] == f"/v2/r/blobs/{of(LAYER)}"
    assert served("GET", place).status == 404
    once = served("POST", f"/v2/r/blobs/uploads/?digest={of(CONFIG)}", CONFIG)
    assert once.status == 201
    dropped = served("POST", "/v2/r/blobs/uploads/").headers["location"]
    assert served("DELETE", dropped).status == 204
    assert served("PATCH", dropped, b"x").status == 404
    mounted = served("POST", f"/v2/other/blobs/uploads/?mount={of(LAYER)}&from=r")
    assert mounted.status == 201
    assert served("GET", f"/v2/other/blobs/{of(LAYER)}").body == LAYER
    unknown = served("POST", f"/v2/other/blobs/uploads/?mount={of(LAYER)}&from=nobody")
    assert unknown.status == 202


def test_referrers(filled: Depot) -> None:
    subject = descriptor(manifest(), OCI_MANIFEST)
    kinds = ("application/x-sbom", "application/x-signature")
    for kind in kinds:
        data = manifest(subject=subject, artifactType=kind, annotations={"kind": kind})
        put = filled("PUT", f"/v2/a/b/manifests/{of(data)}", data, Content_Type=OCI_MANIFEST)
        assert put.status == 201 and put.headers["oci-subject"] == of(manifest())
    found = filled("GET", f"/v2/a/b/referrers/{of(manifest())}")
    assert found.headers["content-type"] == OCI_INDEX
    assert sorted(one["artifactType"] for one in found.json["manifests"]) == sorted(kinds)
    one = filled("GET", f"/v2/a/b/referrers/{of(manifest())}?artifactType={kinds[0]}")
    assert one.headers["oci-filters-applied"] == "artifactType"
    assert [m["annotations"]["kind"] for m in one.json["manifests"]] == [kinds[0]]
    assert filled("GET", f"/v2/a/b/referrers/{of(b'none')}").json["manifests"] == []
    data = manifest(subject=subject, artifactType=kinds[0], annotations={"kind": kinds[0]})
    assert filled("DELETE", f"/v2/a/b/manifests/{of(data)}").status == 202
    assert len(filled("GET", f"/v2/a/b/referrers/{of(manifest())}").json["manifests"]) == 1


def test_management(filled: Depot) -> None:
    for tag in ("y", "z"):
        filled("PUT", f"/v2/a/b/manifests/{tag}", manifest(), Content_Type=OCI_MANIFEST)
    page = filled("GET", "/v2/a/b/tags/list?n=2")
    assert page.json["tags"] == ["x", "y"]
    assert page.headers["link"] == '</v2/a/b/tags/list?n=2&last=y>; rel="next"'
    assert filled("GET", "/v2/a/b/tags/list?n=2&last=y").json["tags"] == ["z"]
    assert filled("DELETE", "/v2/a/b/manifests/y").status == 202
    assert filled("GET", "/v2/a/b/manifests/y").code == "MANIFEST_UNKNOWN"
    assert filled("DELETE", f"/v2/a/b/manifests/{of(manifest())}").status == 202
    assert filled("GET", "/v2/a/b/tags/list").json["tags"] == []
    assert filled("DELETE", f"/v2/a/b/blobs/{of(LAYER)}").status == 202
    assert filled("HEAD", f"/v2/a/b/blobs/{of(LAYER)}").status == 404
    assert filled("DELETE", f"/v2/a/b/blobs/{of(LAYER)}").code == "BLOB_UNKNOWN"


REFUSED = [
    ("GET", "/v2/A/manifests/x", None, 400, "NAME_INVALID"),
    ("GET", "/v2/../../etc/manifests/passwd", None, 400, "NAME_INVALID"),
    ("GET", "/v2/a/_tags/manifests/x", None, 400, "NAME_INVALID"),
    ("GET", "/v2/a/%2e%2e/%2e%2e/manifests/x", None, 400, "NAME_INVALID"),
    ("GET", "/v2/a/b/manifests/..", None, 404, "MANIFEST_UNKNOWN"),
    ("GET", "/v2/a/b/manifests/..%2f..%2fx", None, 404, None),
    ("GET", "/v2/nobody/manifests/x", None, 404, "NAME_UNKNOWN"),
    ("GET", "/v2/a/b/blobs/sha256:zz", None, 400, "DIGEST_INVALID"),
    ("GET", "/v2/a/b/blobs/sha512:" + "0" * 128, None, 400, "DIGEST_INVALID"),
    ("GET", "/v2/a/b/referrers/x", None, 400, "DIGEST_INVALID"),
    ("GET", "/v2/a/b/tags/list?n=x", None, 400, "PAGINATION_NUMBER_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", b"{", 400, "MANIFEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", b"[" * 100_000, 400, "MANIFEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", b'{"schemaVersion": 1}', 400, "MANIFEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", b'{"schemaVersion": 2, "layers": [1]}', 400,
     "MANIFEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", b'{"schemaVersion": 2, "layers": 1}', 400,
     "MANIFEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", manifest(manifests=[]), 400, "MANIFEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", manifest(subject="x"), 400, "MANIFEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", manifest(layers=[descriptor(b"gone", OCI_LAYER)]), 404,
     "MANIFEST_BLOB_UNKNOWN"),
    ("PUT", "/v2/a/b/manifests/.bad", manifest(), 400, "TAG_INVALID"),
    ("PUT", f"/v2/a/b/manifests/{of(b'other')}", manifest(), 400, "DIGEST_INVALID"),
    ("PUT", "/v2/a/b/manifests/bad", b" " * (5 << 20), 413, "MANIFEST_INVALID"),
    ("PATCH", "/v2/a/b/blobs/uploads/unknown", b"x", 404, "BLOB_UPLOAD_UNKNOWN"),
    ("PUT", "/v2/a/b/blobs/uploads/unknown?digest=x", b"x", 404, "BLOB_UPLOAD_UNKNOWN"),
    ("POST", "/v2/a/b/tags/list", b"", 405, "UNSUPPORTED"),
    ("GET", "/v3/", None, 404, "NAME_UNKNOWN"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), REFUSED)
def test_what_is_refused(
    filled: Depot, method: str, path: str, body: bytes | None, status: int, code: str | None
) -> None:
    answer = filled(method, path, body)
    assert answer.status == status
    assert code is None or answer.code == code
    assert filled("GET", "/v2/a/b/manifests/x").body == manifest()


def test_hostile_uploads_leave_nothing(filled: Depot) -> None:
    before = sorted(filled.store.blobs())
    wrong = filled.push("a/b", b"these bytes", of(b"others"))
    assert (wrong.status, wrong.code) == (400, "DIGEST_INVALID")
    assert filled.push("a/b", b"x", "sha256:short").code == "DIGEST_INVALID"
    place = filled("POST", "/v2/a/b/blobs/uploads/").headers["location"]
    assert filled("PATCH", place.replace("a/b", "c/d"), b"x").status == 404
    for head in (
        "Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n",
        "Content-Length: -1\r\n\r\n",
        "Content-Length: 99999999999999999999\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n",
        "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        "Content-Length: 1000\r\n\r\ntoo short",
    ):
        with socket.create_connection(("127.0.0.1", filled.port), timeout=60) as raw:
            raw.sendall(f"PATCH {place} HTTP/1.1\r\nHost: x\r\n{head}".encode())
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    assert filled("DELETE", place).status == 204
    assert sorted(filled.store.blobs()) == before
    assert filled("GET", "/v2/a/b/manifests/x").status == 200


def test_chunked_bodies(served: Depot) -> None:
    place = served("POST", "/v2/r/blobs/uploads/").headers["location"]
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as raw:
        raw.sendall(
            f"PUT {place}?digest={of(b'hello world')} HTTP/1.1\r\nHost: x\r\n"
            "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            "6\r\nhello \r\n5;x=y\r\nworld\r\n0\r\n\r\n".encode()
        )
        said = b""
        while piece := raw.recv(4096):
            said += piece
    assert said.startswith(b"HTTP/1.1 201 ")
    assert served("GET", f"/v2/r/blobs/{of(b'hello world')}").body == b"hello world"


def test_passwords_and_read_only(tmp_path: Path) -> None:
    with depot(tmp_path, users={"ada": "secret"}, readonly=True) as served:
        refused = served("GET", "/v2/")
        assert refused.status == 401 and "Basic" in refused.headers["www-authenticate"]
        for text in ("ada:wrong", "bob:secret", "ada", ""):
            given = base64.b64encode(text.encode()).decode()
            assert served("GET", "/v2/", Authorization=f"Basic {given}").status == 401
        assert served("GET", "/v2/", Authorization="Basic !").status == 401
        given = "Basic " + base64.b64encode(b"ada:secret").decode()
        assert served("GET", "/v2/", Authorization=given).status == 200
        pushed = served("POST", "/v2/a/blobs/uploads/", Authorization=given)
        assert (pushed.status, pushed.code) == (405, "UNSUPPORTED")


def test_pull_through(filled: Depot, tmp_path: Path) -> None:
    with depot(tmp_path / "cache", upstream=filled.host) as cache:
        assert cache("GET", "/v2/a/b/manifests/x").body == manifest()
        assert cache("GET", f"/v2/a/b/blobs/{of(LAYER)}").body == LAYER
        assert cache("GET", f"/v2/a/b/blobs/{of(b'none')}").status == 404
        assert cache("GET", "/v2/a/b/manifests/nothing").status == 404
        assert cache("POST", "/v2/a/b/blobs/uploads/").status == 405
        moved = manifest(annotations={"new": "1"})
        filled("PUT", "/v2/a/b/manifests/x", moved, Content_Type=OCI_MANIFEST)
        assert cache("GET", "/v2/a/b/manifests/x").body == moved
        assert filled("DELETE", f"/v2/a/b/blobs/{of(LAYER)}").status == 202
        assert cache("GET", f"/v2/a/b/blobs/{of(LAYER)}").body == LAYER


def test_collection_keeps_what_is_served(filled: Depot) -> None:
    root = filled.registry.root
    filled.push("gone", b"unwanted", of(b"unwanted"))
    filled("DELETE", f"/v2/gone/blobs/{of(b'unwanted')}")
    filled.registry.close()
    filled.store.gc(lambda: links.held(root, filled.store.provenance))
    assert not filled.store.has(of(b"unwanted"))
    assert filled("GET", f"/v2/a/b/blobs/{of(LAYER)}").body == LAYER


@pytest.mark.skipif(not has_busybox(), reason="busybox is not installed here")
def test_real_clients(tmp_path: Path) -> None:
    archive = busybox_archive(tmp_path / "busybox.tar", "busybox:latest")
    with depot(tmp_path / "depot") as served, installation(tmp_path / "here") as here:
        name = f"{served.host}/team/busybox:1"
        here.cli("load", "-i", str(archive)).ok()
        here.cli("tag", "busybox:latest", name).ok()
        here.cli("push", name).ok()
        if shutil.which("skopeo"):
            copy = f"{served.host}/copied/busybox:2"
            subprocess.run(
                ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false",
                 f"docker://{name}", f"docker://{copy}"], check=True, capture_output=True,
                timeout=300,
            )  # fmt: skip
            name = copy
        here.cli("rmi", "-f", "busybox:latest", f"{served.host}/team/busybox:1").ok()
        here.cli("image", "prune", "-af").ok()
        here.cli("pull", name).ok()
        assert here.cli("run", "--rm", name, "echo", "served").ok().line == "served"


def test_served_by_the_command(tmp_path: Path) -> None:
    with installation(tmp_path) as here:
        refused = here.cli("registry", "serve", "--listen", "0.0.0.0:0")
        assert refused.code == 1 and "--tlscert" in refused.err
        process = here.popen("registry", "serve", "--listen", "127.0.0.1:0")
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            port = int(line.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
                raw.sendall(b"GET /v2/ HTTP/1.0\r\n\r\n")
                assert b" 200 " in raw.recv(4096)
        finally:
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == b""
