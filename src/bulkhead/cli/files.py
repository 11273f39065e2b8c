"""Files that flags name."""

from collections.abc import Mapping

from bulkhead.errors import Invalid, NotFound


def read_text(path: str, what: str) -> str:
    """The file's text; NotFound or Invalid with one line that names it."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        raise NotFound(f"open {path}: no such file or directory ({what})") from None
    except OSError as error:
        raise Invalid(f"open {path}: {error.strerror} ({what})") from None


def key_value_lines(path: str, environ: Mapping[str, str]) -> list[str]:
    """KEY=VALUE lines of an env or label file; comments dropped; a bare KEY is looked up."""
    found = []
    for number, line in enumerate(read_text(path, "environment or label file").splitlines(), 1):
        line = line.lstrip("\ufeff").lstrip()
        if not line or line.startswith("#"):
            continue
        key, equals, _ = line.partition("=")
        if not key or any(space in key for space in " \t"):
            raise Invalid(f"{path}:{number}: variable '{key}' is empty or contains whitespaces")
        if equals:
            found.append(line)
        elif key in environ:
            found.append(f"{key}={environ[key]}")
    return found
