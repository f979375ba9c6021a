"""Pages for people, from files that are installed: the playground, and the API's documentation."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

# Scripts and styles come from here and from nowhere else, and none stands in a page. An image that
# is tried out is shown from memory.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

# Addresses are relative, so that it also works behind a prefix.
_DOCS = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>cgan-service</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = """\
SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});
"""


def create_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(include_in_schema=False)
    playground = Path(__file__).parent.parent / "playground"
    static = Path(str(files("fastapi_offline") / "static"))

    @router.get("/")
    async def root() -> FileResponse:
        return FileResponse(playground / "index.html", headers=PAGE_HEADERS)

    @router.get("/playground/playground.js")
    async def playground_script() -> FileResponse:
        return FileResponse(playground / "playground.js", headers=PAGE_HEADERS)

    @router.get("/playground/playground.css")
    async def playground_style() -> FileResponse:
        return FileResponse(playground / "playground.css", headers=PAGE_HEADERS)

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(_DOCS, headers=PAGE_HEADERS)

    @router.get("/docs/start.js")
    async def start() -> Response:
        return Response(_START, media_type="text/javascript", headers=PAGE_HEADERS)

    @router.get("/docs/swagger-ui-bundle.js")
    async def script() -> FileResponse:
        return FileResponse(static / "swagger-ui-bundle.js", headers=PAGE_HEADERS)

    @router.get("/docs/swagger-ui.css")
    async def style() -> FileResponse:
        return FileResponse(static / "swagger-ui.css", headers=PAGE_HEADERS)

    return router
