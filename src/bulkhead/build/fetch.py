"""ADD of a URL, and contexts that are one."""

import email.utils
import hashlib
import re
import tempfile
import urllib.parse
import urllib.request
from typing import IO

import urllib3
from urllib3.exceptions import HTTPError

from bulkhead.build.git import is_git
from bulkhead.build.text import Spanned
from bulkhead.errors import BulkheadError, Unavailable

_PIECE = 1 << 20
LARGEST = 16 << 30
"""Bytes."""


def is_url(text: str) -> bool:
    """Whether a source is fetched by HTTP."""
    return text.startswith(("http://", "https://")) and not is_git(text)


def file_name(url: str, at: Spanned) -> str:
    """What a fetched file is called in a directory."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    if not name or name in (".", "..") or "/" in name:
        raise at.error(f"cannot determine filename from url: {url}: name the target file")
    return name


def download(url: str, directory: str, checksum: str, at: Spanned) -> tuple[IO[bytes], int, str]:
    """The content in a nameless file, its time (ns; 0 if not told), and its SHA-256.

    `checksum` ("sha256:…" or "") is verified.
    """
    if checksum and not re.fullmatch(r"sha256:[0-9a-f]{64}", checksum):
        raise at.error(f"invalid checksum {checksum!r}: sha256:HEX")
    proxies = urllib.request.getproxies()
    host = urllib.parse.urlsplit(url).hostname or ""
    scheme = url.partition(":")[0]
    proxy = "" if urllib.request.proxy_bypass(host) else proxies.get(scheme, "")
    timeout = urllib3.Timeout(connect=20.0, read=60.0)
    pool = (
        urllib3.ProxyManager(proxy, timeout=timeout)
        if proxy
        else urllib3.PoolManager(timeout=timeout)
    )
    summer = hashlib.sha256()
    file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - the caller's
    try:
        with pool:
            answer = pool.request("GET", url, preload_content=False, redirect=True,
                                  headers={"Accept-Encoding": "identity"})  # fmt: skip
            try:
                if answer.status != 200:
                    raise at.error(f"cannot fetch {url}: the server says {answer.status}")
                size = 0
                while piece := answer.read(_PIECE):
                    size += len(piece)
                    if size > LARGEST:
                        raise at.error(f"{url} has more than {LARGEST} bytes")
                    summer.update(piece)
                    file.write(piece)
                modified = answer.headers.get("Last-Modified", "")
            finally:
                answer.release_conn()
        if checksum and summer.hexdigest() != checksum.removeprefix("sha256:"):
            raise at.error(
                f"digest mismatch for {url}: sha256:{summer.hexdigest()}, expected: {checksum}"
            )
        file.flush()
        return file, _time(modified), summer.hexdigest()
    except HTTPError as error:
        file.close()
        raise Unavailable(
            f"{at.source.name}:{at.at(0).line}: cannot fetch {url}: {error}"
        ) from error
    except (BulkheadError, OSError):
        file.close()
        raise


def _time(text: str) -> int:
    try:
        return int(email.utils.parsedate_to_datetime(text).timestamp()) * 10**9
    except (TypeError, ValueError):
        return 0
