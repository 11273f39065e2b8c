"""`--platform`: whether an image is for the platform that was asked for, or for this machine."""

from functools import lru_cache

from bulkhead.errors import NotFound
from bulkhead.images.catalog import Image, host_platform
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import Platform


@lru_cache(64)
def _suits(architecture: str, system: str, variant: str, wanted: str) -> bool:
    offered = Platform(architecture, system, variant)
    if wanted:
        return platforms.suits(offered, platforms.parse(wanted), exact=True)
    return platforms.suits(offered, host_platform())


def check(image: Image, reference: str, wanted: str) -> list[str]:
    """Warnings about the image's platform, in Docker's words.

    NotFound if it is not for `wanted` ("os/arch[/variant]", "" for none); Invalid if that is no
    platform. An image that does not say what it is for is for everything.
    """
    config = image.config
    if not config.architecture or _suits(config.architecture, config.os, config.variant, wanted):
        return []
    if wanted:
        raise NotFound(
            f"image with reference {reference} was found but does not match the specified "
            f"platform: wanted {platforms.parse(wanted)}, actual: {config.platform}"
        )
    return [
        f"The requested image's platform ({config.platform}) does not match the detected host "
        f"platform ({host_platform()}) and no specific platform was requested"
    ]
