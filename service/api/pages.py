"""The playground and the API documentation, from installed files only."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

# Scripts and styles come from this origin and are never inline. The documentation shows images from
# blobs.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

# URLs are relative, so that the page also works behind a prefix.
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
    """Create the routes of this module."""
    router = APIRouter(include_in_schema=False)
    playground = Path(__file__).parent.parent / "playground"
    swagger = Path(str(files("fastapi_offline") / "static"))

    def add_file(path: str, file: Path) -> None:
        @router.get(path)
        async def static_file() -> FileResponse:
            return FileResponse(file, headers=PAGE_HEADERS)

    add_file("/", playground / "index.html")
    for name in ("playground.js", "playground.css"):
        add_file(f"/playground/{name}", playground / name)
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        add_file(f"/docs/{name}", swagger / name)

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(_DOCS, headers=PAGE_HEADERS)

    @router.get("/docs/start.js")
    async def start() -> Response:
        return Response(_START, media_type="text/javascript", headers=PAGE_HEADERS)

    return router
