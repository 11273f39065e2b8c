"""A Debian image with nginx, PostgreSQL and Redis, made once for every test that wants one."""

from pathlib import Path

from tests.helpers.nginx import archive

IMAGE = "debian-postgresql:bookworm"
PACKAGES = ("nginx-light", "postgresql", "redis-server")


def databases_archive() -> Path:
    """An OCI archive of the image IMAGE; made if it is not there (about a minute)."""
    return archive("postgresql", PACKAGES, IMAGE)
