"""Debian's docker-registry as a real peer: plain or TLS, open, with basic or with token auth.

It listens on a port the kernel picks, read from its own log: nothing to race for. What is missing
on a machine (docker-registry, openssl) makes the tests skip with the reason.
"""

import base64
import contextlib
import http.server
import json
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bulkhead.registry.config import Registries
from tests.helpers.waiting import until

USER, PASSWORD = "tester", "secret"
_HTPASSWD = "tester:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"
SERVICE = "test-registry"
ISSUER = "test-issuer"


def need(*programs: str) -> None:
    """Skip the test unless all `programs` can be run."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed here (apt-get install {_package(program)})")


def _package(program: str) -> str:
    return {"docker-registry": "docker-registry", "openssl": "openssl"}.get(program, program)


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for 127.0.0.1 and localhost, and its key."""

    certificate: Path
    key: Path

    @property
    def der(self) -> bytes:
        """The certificate, binary."""
        text = self.certificate.read_text().split("-----")[2]
        return base64.b64decode(text)


def make_certificate(directory: Path) -> Certificate:
    """A fresh RSA certificate in `directory`."""
    need("openssl")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return Certificate(certificate, key)


class TokenServer:
    """A token service after distribution's docs/spec/auth/token.md, signing RS256."""

    def __init__(self, certificate: Certificate, *, tls: bool) -> None:
        self.certificate = certificate
        self.requests: list[dict[str, list[str]]] = []
        self.identity_token = secrets.token_hex(8)
        self.anonymous_pull = False
        self.gives_identity = False
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                return

            def do_GET(self) -> None:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                given = self.headers.get("Authorization", "")
                wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                known = given == wanted
                self.answer(query, known, refused=bool(given) and not known)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                query = urllib.parse.parse_qs(body)
                good = query.get("refresh_token") == [owner.identity_token]
                self.answer(query, good, refused=not good)

            def answer(self, query: dict[str, list[str]], known: bool, *, refused: bool) -> None:
                owner.requests.append(query)
                if refused:
                    self.send_error(401)
                    return
                said = {"token": owner.token(query, known=known), "expires_in": 300}
                if known and owner.gives_identity and query.get("offline_token") == ["true"]:
                    said["refresh_token"] = owner.identity_token
                body = json.dumps(said)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.certificate, certificate.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.realm = f"{scheme}://127.0.0.1:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def token(self, query: dict[str, list[str]], *, known: bool) -> str:
        """A signed token for what `query` asks, if that is allowed."""
        access = []
        for scope in " ".join(query.get("scope", [])).split():
            kind, name, actions = scope.split(":")
            allowed = actions.split(",") if known else []
            if self.anonymous_pull and not known:
                allowed = [action for action in actions.split(",") if action == "pull"]
            access.append({"type": kind, "name": name, "actions": allowed})
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": USER if known else "",
            "aud": SERVICE,
            "exp": now + 3600,
            "nbf": now - 3600,
            "iat": now - 3600,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        chain = [base64.b64encode(self.certificate.der).decode()]
        header = {"typ": "JWT", "alg": "RS256", "x5c": chain}
        signed = b".".join(_part(json.dumps(part).encode()) for part in (header, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", str(self.certificate.key)]
        signature = subprocess.run(command, input=signed, check=True, capture_output=True).stdout
        return (signed + b"." + _part(signature)).decode()

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _part(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@dataclass
class Registry:
    """A running registry; `host` is "127.0.0.1:PORT"."""

    host: str
    directory: Path
    certificate: Certificate | None = None
    tokens: TokenServer | None = None
    auth: dict[str, str] | None = None
    log: list[str] = field(default_factory=list)

    def config(self, **more: Any) -> Registries:
        """The registries configuration a client of it needs: where its certificate is."""
        return Registries(certificates=(str(self.directory / "certs.d"),), **more)

    def requests(self, method: str, part: str = "") -> int:
        """How many `method` requests with `part` in the path it has logged."""
        return sum(f'"{method} ' in line and part in line for line in list(self.log))


def _settings(
    directory: Path, certificate: Certificate | None, auth: str, tokens: TokenServer | None
) -> str:
    http_part: dict[str, Any] = {"addr": "127.0.0.1:0", "secret": "test"}
    if certificate is not None:
        http_part["tls"] = {
            "certificate": str(certificate.certificate),
            "key": str(certificate.key),
        }
    document: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "info", "accesslog": {"disabled": False}},
        "storage": {
            "filesystem": {"rootdirectory": str(directory / "data")},
            "delete": {"enabled": True},
        },
        "http": http_part,
    }
    if auth == "basic":
        (directory / "htpasswd").write_text(_HTPASSWD + "\n")
        document["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    if tokens is not None:
        document["auth"] = {
            "token": {
                "realm": tokens.realm,
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": str(tokens.certificate.certificate),
            }
        }
    return json.dumps(document)  # YAML, as every JSON is


@contextlib.contextmanager
def registry(directory: Path, *, tls: bool = False, auth: str = "") -> Iterator[Registry]:
    """Run one below `directory`; `auth` is "", "basic" or "token" (`USER`, `PASSWORD`)."""
    need("docker-registry")
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        certificate = make_certificate(directory) if tls or auth == "token" else None
        tokens = None
        if auth == "token":
            assert certificate is not None
            tokens = TokenServer(certificate, tls=tls)
            undo.callback(tokens.close)
        settings = directory / "config.yml"
        settings.write_text(_settings(directory, certificate if tls else None, auth, tokens))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("REGISTRY_")}
        process = subprocess.Popen(
            ["docker-registry", "serve", str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "OTEL_TRACES_EXPORTER": "none"},
            text=True,
        )
        found = Registry("", directory, certificate if tls else None, tokens)
        reader = threading.Thread(target=_collect, args=(process, found.log))
        reader.start()
        undo.callback(_stop, process, reader)
        port = until(lambda: _port(process, found.log), "docker-registry listens")
        found.host = f"127.0.0.1:{port}"
        if auth:
            found.auth = {"username": USER, "password": PASSWORD}
        if found.certificate is not None:
            place = directory / "certs.d" / found.host
            place.mkdir(parents=True)
            shutil.copy(found.certificate.certificate, place / "ca.crt")
        yield found


def _collect(process: "subprocess.Popen[str]", log: list[str]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            log.append(line)


def _port(process: "subprocess.Popen[str]", log: list[str]) -> int:
    for line in list(log):
        if "listening on 127.0.0.1:" in line:
            text = line.partition("listening on 127.0.0.1:")[2]
            digits = "".join(char for char in text[:6] if char.isdigit())
            return int(digits)
    if process.poll() is not None:
        raise AssertionError("docker-registry ended:\n" + "".join(log[-20:]))
    return 0


def _stop(process: "subprocess.Popen[str]", reader: threading.Thread) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    reader.join()
