"""`python -m bulkhead.engine [--root DIR] [--run DIR] [--host URL…]`: serve one installation.

Stays in the foreground; a client that needs an engine starts it as a process of its own session
(client/start.py), systemd by the units in `engine/units`. Exit codes: 0 stopped as asked, 1 could
not start (one line on stderr says why).
"""

import argparse
import asyncio
import logging
import sys

from bulkhead import home
from bulkhead.engine import bootstrap, hosts
from bulkhead.errors import BulkheadError


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bulkhead serve", description="Serve one installation.")
    parser.add_argument("--root", help="directory of the state")
    parser.add_argument("--run", "--run-root", help="directory of what lives until the next boot")
    parser.add_argument(
        "--foreground", action="store_true", help="does nothing: the engine stays in front"
    )
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error")
    )
    parser.add_argument(
        "-H", "--host", action="append", default=[],
        help="where to serve the Docker Engine API: unix://PATH, or tcp://ADDRESS:PORT with TLS",
    )  # fmt: skip
    parser.add_argument("--tlsverify", action="store_true", help="demand clients' certificates")
    parser.add_argument("--tlscacert", default="", help="certificates that sign clients'")
    parser.add_argument("--tlscert", default="", help="the server's certificate")
    parser.add_argument("--tlskey", default="", help="its key")
    return parser.parse_args()


def main() -> int:
    """Run the engine; returns the exit code."""
    arguments = _arguments()
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    place = home.default(arguments.root, arguments.run)
    places = hosts.Places(
        tuple(arguments.host), verify=arguments.tlsverify, authority=arguments.tlscacert,
        certificate=arguments.tlscert, key=arguments.tlskey,
    )  # fmt: skip
    try:
        hosts.check(places)
        bootstrap.prepare(place)
        asyncio.run(bootstrap.serve(place, places))
    except BulkheadError as error:
        sys.stderr.write(f"bulkhead: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
