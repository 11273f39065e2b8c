"""`python -m bulkhead.depot`: the registry in the foreground."""

import argparse
import ipaddress
import logging
import os
import signal
import ssl
import sys
import threading

from bulkhead import home
from bulkhead.depot.http import Server
from bulkhead.depot.proxy import Proxy
from bulkhead.depot.registry import Registry
from bulkhead.errors import BulkheadError, Invalid
from bulkhead.registry.credentials import lookup
from bulkhead.store.content import ContentStore


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bulkhead registry serve")
    parser.add_argument("--root", required=True)
    parser.add_argument("--listen", default="127.0.0.1:5000")
    parser.add_argument("--storage", default="")
    parser.add_argument("--proxy", default="")
    parser.add_argument("--users", default="")
    parser.add_argument("--tlscert", default="")
    parser.add_argument("--tlskey", default="")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--log-level", default="warning")
    return parser.parse_args()


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise Invalid(f"--listen {text}: write ADDRESS:PORT")
    return host or "0.0.0.0", int(port)


def _users(path: str) -> dict[str, str]:
    """NAME:PASSWORD lines of a file that nobody else may read."""
    if not path:
        return {}
    with open(path, encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise Invalid(f"{path} is readable by others: chmod 600 {path}")
        lines = [line.rstrip("\n") for line in file if line.strip() and not line.startswith("#")]
    found = {}
    for line in lines:
        name, colon, password = line.partition(":")
        if not (name and colon and password):
            raise Invalid(f"{path}: a line is not NAME:PASSWORD")
        found[name] = password
    return found


def _check(arguments: argparse.Namespace, host: str) -> None:
    """Not in plain text where others can listen, unless that is said."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not arguments.tlscert and not arguments.insecure:
        raise Invalid(
            f"--listen {arguments.listen} is not a loopback address: give --tlscert and --tlskey, "
            "or --insecure if the network is trusted"
        )
    if bool(arguments.tlscert) != bool(arguments.tlskey):
        raise Invalid("--tlscert and --tlskey belong together")


def _serve(arguments: argparse.Namespace) -> None:
    address = _address(arguments.listen)
    _check(arguments, address[0])
    users = _users(arguments.users)
    place = home.default(arguments.root)
    store = ContentStore(
        f"{arguments.storage}/store" if arguments.storage else place.in_root("store")
    )
    proxy = None
    if arguments.proxy:
        domain = arguments.proxy.removeprefix("https://").removeprefix("http://").strip("/")
        proxy = Proxy(store, domain, credentials=lookup(domain))
    registry = Registry(
        f"{arguments.storage}/registry" if arguments.storage else place.in_root("registry"),
        store, proxy=proxy, readonly=arguments.read_only,
    )  # fmt: skip
    with Server(address, registry, users) as server:
        if arguments.tlscert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(arguments.tlscert, arguments.tlskey)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        host, port = server.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        sys.stdout.write(f"serving on {shown}:{port}\n")
        sys.stdout.flush()
        server.serve_forever()
        registry.close()


def main() -> int:
    """Run until SIGTERM or SIGINT."""
    arguments = _arguments()
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        _serve(arguments)
    except (BulkheadError, OSError) as error:
        sys.stderr.write(f"bulkhead: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
