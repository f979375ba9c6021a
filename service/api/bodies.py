"""The media types of the bodies of requests."""

from starlette.datastructures import Headers

from service.errors import Problem, unsupported_media_type

JSON = "application/json"


def require_json(headers: Headers, remedy: str) -> None:
    """Check that a body is JSON.

    Raises:
        Problem: 415, with a remedy.
    """
    if _media_type(headers) != JSON:
        raise _wrong(headers, f"must be {JSON}; {remedy}", JSON)


def refuse_forms(headers: Headers, remedy: str, accept: str = JSON) -> None:
    """Check that a body is not a form of several parts, as `curl -F` sends it.

    Any other type is accepted: the content decides.

    Raises:
        Problem: 415, with a remedy.
    """
    if _media_type(headers) == "multipart/form-data":
        raise _wrong(headers, f"forms are not accepted; {remedy}", accept)


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _wrong(headers: Headers, message: str, accept: str) -> Problem:
    return unsupported_media_type("Content-Type", headers.get("content-type"), message, accept)
