"""Compressed bodies of requests."""

import zlib

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Problem, invalid_value, problem_response, unsupported_media_type

MAX_BODY_BYTES = 1 << 20  # after decompression; the server bounds it before
_NAME = b"content-encoding"


class DecompressMiddleware:
    """ASGI middleware that decompresses bodies in gzip and deflate, and refuses other encodings."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on without its Content-Encoding, or answer 413, 415 or 422."""
        if scope["type"] != "http" or all(name != _NAME for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            encoding = _encoding(", ".join(request.headers.getlist("content-encoding")))
            body = decompress(await request.body(), encoding)
        except Problem as problem:
            await problem_response(problem, scope)(scope, receive, send)
            return
        dropped = (_NAME, b"content-length", b"transfer-encoding")
        kept = [each for each in scope["headers"] if each[0] not in dropped]
        # In place: the outer middlewares read what is added to this scope.
        scope["headers"] = [*kept, (b"content-length", b"%d" % len(body))]
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_decompressed() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, receive_decompressed, send)


def _encoding(sent: str) -> str:
    """Return an encoding in lower case.

    Raises:
        Problem: 415, an unknown encoding.
    """
    encoding = sent.strip().lower()
    if encoding not in ("", "identity", "deflate", "gzip", "x-gzip"):
        message = "must be gzip, deflate or identity"
        raise unsupported_media_type("Content-Encoding", sent, message, "gzip, deflate")
    return encoding


def decompress(body: bytes, encoding: str) -> bytes:
    """Return a body without its encoding: gzip, deflate, or none.

    Raises:
        Problem: 413 for a body that becomes too large, 422 for invalid data.
    """
    if not body or encoding in ("", "identity"):
        return body
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either format, by its first bytes
    try:
        decompressed = decompressor.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise invalid_value("body", None, f"is not valid {encoding} data") from None
    if len(decompressed) > MAX_BODY_BYTES:
        detail = f"The decompressed body exceeds {MAX_BODY_BYTES} bytes."
        raise Problem(413, "content-too-large", detail)
    if not decompressor.eof:
        raise invalid_value("body", None, f"is truncated {encoding} data")
    return decompressed
