"""TLS towards a registry: the system's authorities, and Docker's certificate directories."""

import os
import ssl

from bulkhead.errors import Invalid
from bulkhead.registry.config import Endpoint


def context_for(endpoint: Endpoint) -> ssl.SSLContext:
    """What to check `endpoint`'s certificate with, and which one to show; Invalid if unreadable."""
    context = ssl.create_default_context()
    if not endpoint.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for directory in endpoint.certificates:
        place = f"{directory}/{endpoint.host}"
        try:
            names = sorted(os.listdir(place))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            file = f"{place}/{name}"
            try:
                if name.endswith(".crt"):
                    context.load_verify_locations(cafile=file)
                elif name.endswith(".cert"):
                    context.load_cert_chain(file, f"{file.removesuffix('.cert')}.key")
            except (ssl.SSLError, OSError) as error:
                raise Invalid(f"certificate {file} cannot be used: {error}") from error
    return context
