"""The router of every HTTP API, and what it answers elsewhere."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from starlette.routing import Match
from starlette.types import Receive, Scope, Send


class Router(APIRouter):
    """Router that answers `HEAD` wherever it answers `GET` (RFC 9110, section 9.1).

    The schema has the `GET` only. The server leaves out the body.
    """

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """Add a route, and its twin for `HEAD`."""
        super().add_api_route(path, endpoint, **options)
        if options.get("methods") == ["GET"]:
            head = {**options, "methods": ["HEAD"], "include_in_schema": False}
            super().add_api_route(path, endpoint, **head)


class NotFound:
    """ASGI app for paths without a route: 404, or a redirect from `/docs/` to `/docs`.

    The redirect is relative, as the links of the pages are: the service does not know the address
    that the client of a proxy sees.
    """

    def __init__(self, router: APIRouter) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            HTTPException: 404, no route.
        """
        bare = {**scope, "path": scope["path"].removesuffix("/")}
        routes = self._router.routes if bare["path"] != scope["path"] else []
        if all(each.matches(bare)[0] is Match.NONE for each in routes):
            raise HTTPException(404)
        name = scope["raw_path"].removesuffix(b"/").rpartition(b"/")[2]
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        location = (b"../" + name + query).decode("latin-1")
        await RedirectResponse(location)(scope, receive, send)
