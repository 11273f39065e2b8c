"""Requests made from Docker's own description of the API: mostly right, often odd, some broken.

`requests(swagger, random)` walks every operation again and again; parameters and bodies are drawn
from their schemas, then now and then replaced by something that does not belong there.
"""

import json
import random
import re
import socket
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWAGGER = Path(__file__).resolve().parents[3] / "shared" / "spec" / "docker-api" / "swagger.yaml"
ODD = (
    "", "0", "-1", "1", "true", "null", "a" * 300, "nope", "../../etc", "ü€", "%00", "a b", "{}",
    "[]", "9223372036854775808", "busybox", "sha256:" + "0" * 64, "\x7f", '{"label":["a"]}', "💥",
)  # fmt: skip
JSON_ODD: tuple[Any, ...] = (
    None, True, -1, 2**70, 1.5, "x", [], {}, [None], {"a": None}, "\0", [[]], {"": {}},
)  # fmt: skip
SLOW = frozenset({"/events", "/session", "/containers/{id}/attach/ws"})
"""Answered for as long as the client stays."""
_DEPTH = 5


@dataclass(frozen=True)
class Request:
    """One request as bytes, and what it is in words."""

    label: str
    data: bytes
    head_only: bool
    """Its body may not end."""


class Maker:
    """Draws requests."""

    def __init__(self, document: dict[str, Any], source: random.Random, names: list[str]) -> None:
        self._document = document
        self._random = source
        self._names = names
        """What exists: containers, images, networks, volumes."""
        self.operations = [
            (path, method, operation, item.get("parameters", []))
            for path, item in document["paths"].items()
            for method, operation in item.items()
            if method in {"get", "post", "put", "delete", "head"} and path not in SLOW
        ]

    def each(self) -> Iterator[Request]:
        """One request for every operation, in random order."""
        for path, method, operation, shared in self._random.sample(
            self.operations, len(self.operations)
        ):
            yield self._request(path, method, operation, shared)

    def _request(
        self, path: str, method: str, operation: dict[str, Any], shared: list[dict[str, Any]]
    ) -> Request:
        query: list[tuple[str, str]] = []
        headers: dict[str, str] = {}
        body = b""
        target = path
        for parameter in [*shared, *operation.get("parameters", [])]:
            where, name = parameter["in"], parameter["name"]
            if where == "body":
                body = self._body(parameter.get("schema", {}))
                continue
            if not parameter.get("required") and self._random.random() < 0.6:
                continue
            value = self._text(parameter)
            if where == "path":
                target = target.replace(f"{{{name}}}", urllib.parse.quote(self._name(), safe=""))
            elif where == "query":
                query.append((name, value))
            elif where == "header":
                headers[name] = re.sub(r"[^\x20-\x7e]", "", value)
        target = re.sub(r"\{\w+\}", "x", target)
        if path in {"/images/create"}:
            query = [("fromSrc", "-")]  # never to a real registry
        if path == "/containers/{id}/wait":
            query.append(("condition", "nope"))
        if path in {"/auth", "/distribution/{name}/json", "/images/search", "/images/{name}/push"}:
            target = target.replace("/images/search", "/images/searches")
            # Refused before any registry is asked.
            headers["X-Registry-Auth"] = self._random.choice(("!", "bm8="))
            body = b"[]" if path == "/auth" else b""
        prefix = self._random.choice(("", "/v1.40", "/v1.44", "/v1.50"))
        if query:
            target += "?" + urllib.parse.urlencode(query)
        if body:
            headers["Content-Type"] = "application/json"
        lines = [f"{method.upper()} {prefix}{target} HTTP/1.1", "Host: fuzz", "Connection: close"]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        lines.append(f"Content-Length: {len(body)}")
        data = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        endless = re.search("logs|stats|attach|start|events", path) is not None
        return Request(f"{method.upper()} {prefix}{target} {body[:300]!r}", data, endless)

    def _name(self) -> str:
        chosen = self._random.choice((*self._names, *ODD[:16]))
        return chosen or "x"

    def _text(self, parameter: dict[str, Any]) -> str:
        if self._random.random() < 0.3:
            return self._random.choice(ODD)
        kind = parameter.get("type")
        if "enum" in parameter:
            return str(self._random.choice(parameter["enum"]))
        if kind == "boolean":
            return self._random.choice(("0", "1", "true", "false"))
        if kind == "integer":
            return str(self._random.choice((0, 1, 2, 10, 65536)))
        if parameter["name"] == "filters":
            key = self._random.choice(("label", "name", "id", "status", "dangling", "until"))
            return json.dumps({key: [self._random.choice(ODD)]})
        return self._random.choice((*self._names, *ODD))

    def _body(self, schema: dict[str, Any]) -> bytes:
        chance = self._random.random()
        if chance < 0.05:
            return self._random.choice((b"{", b"[]", b'"x"', b"nul", b"\xff\xfe", b"{}{}"))
        return json.dumps(self._value(schema, 0)).encode()

    def _value(self, schema: dict[str, Any], depth: int) -> Any:
        if self._random.random() < 0.05:
            return self._random.choice(JSON_ODD)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return self._value(self._document["definitions"][name], depth)
        if "allOf" in schema:
            merged: dict[str, Any] = {}
            for part in schema["allOf"]:
                value = self._value(part, depth)
                merged |= value if isinstance(value, dict) else {}
            return merged
        if "enum" in schema:
            return self._random.choice(schema["enum"])
        if "properties" in schema:
            share = 0.15 if depth else 0.35
            return {
                name: self._value(inner, depth + 1)
                for name, inner in schema["properties"].items()
                if depth < _DEPTH and self._random.random() < share
            }
        kind = schema.get("type")
        if kind == "array":
            count = self._random.choice((0, 1, 2)) if depth < _DEPTH else 0
            return [self._value(schema.get("items", {}), depth + 1) for _ in range(count)]
        if kind == "object":
            inner = schema.get("additionalProperties")
            if isinstance(inner, dict) and depth < _DEPTH:
                return {self._random.choice(ODD): self._value(inner, depth + 1)}
            return {}
        if kind in {"integer", "number"}:
            return self._random.choice((0, 1, -1, 100, 1 << 31, 1 << 40))
        if kind == "boolean":
            return self._random.choice((True, False))
        return self._random.choice((*self._names, *ODD))


def status_of(path: Path, request: Request, patience_s: float) -> int:
    """The status of the answer, read to its end unless it has none; -1 if the peer hung up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patience_s)
        sock.connect(str(path))
        sock.sendall(request.data)
        data = b""
        while b"\r\n\r\n" not in data:
            piece = sock.recv(1 << 16)
            if not piece:
                break
            data += piece
        if not data:
            return -1
        if not request.head_only:
            while sock.recv(1 << 16):
                pass
    return int(data.split(None, 2)[1])
