"""What handlers answer: values as JSON, errors as Docker's statuses and bodies."""

from typing import Any

import msgspec

from bulkhead.errors import (
    BulkheadError,
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    Denied,
    Invalid,
    NotFound,
    Unavailable,
    Unsupported,
)

STATUSES: dict[type[BulkheadError], int] = {
    NotFound: 404,
    Conflict: 409,
    Invalid: 400,
    Denied: 403,
    Unsupported: 400,
    Unavailable: 503,
    CommandNotFound: 400,
    CommandNotExecutable: 400,
}
"""Every other category is 500."""

_encoder = msgspec.json.Encoder(enc_hook=str)


class Reply:
    """An answer with a status of its own, or with headers."""

    __slots__ = ("body", "headers", "kind", "status")

    def __init__(
        self,
        status: int = 200,
        value: object = None,
        *,
        headers: dict[str, str] | None = None,
        text: bytes | None = None,
        kind: str = "application/json",
    ) -> None:
        self.status = status
        self.headers = headers or {}
        self.kind = kind
        if text is not None:
            self.body = text
        else:
            self.body = b"" if value is None else json_line(value)


NO_CONTENT = Reply(204)
NOT_MODIFIED = Reply(304)
CREATED = Reply(201)
OK = Reply(200)


class Failed(BulkheadError):
    """An error whose status is none of its category's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def json_line(value: object) -> bytes:
    """`value` as JSON with a line feed, as Go's encoder ends it."""
    return _encoder.encode(value) + b"\n"


def error_body(text: str) -> bytes:
    """Docker's ErrorResponse."""
    return json_line({"message": text})


def status_of(error: BulkheadError) -> int:
    """The HTTP status for an error."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    for kind in type(error).__mro__:
        found = STATUSES.get(kind)
        if found is not None:
            return found
    return 500


def refusal(error: BulkheadError) -> Reply:
    """The answer that tells an error."""
    return Reply(status_of(error), text=error_body(error.message))


def failure_line(error: BulkheadError) -> dict[str, Any]:
    """An error within a stream of progress messages."""
    detail: dict[str, Any] = {"message": error.message}
    code = error.details.get("code")
    if isinstance(code, int):
        detail["code"] = code
    return {"errorDetail": detail, "error": error.message}
