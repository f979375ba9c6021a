"""The playground and the API documentation, from installed files only."""

from importlib.resources import files
from pathlib import Path

from fastapi.responses import FileResponse

from service.api.routing import Router

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


def create_router() -> Router:
    """Create the routes of this module."""
    router = Router(include_in_schema=False)
    playground = Path(__file__).parent.parent / "playground"
    swagger = Path(str(files("fastapi_offline") / "static"))

    def add_file(path: str, file: Path) -> None:
        @router.get(path)
        async def static_file() -> FileResponse:
            return FileResponse(file, headers=PAGE_HEADERS)

    # URLs in the pages are relative, so that they also work behind a prefix.
    add_file("/", playground / "index.html")
    add_file("/playground/playground.js", playground / "playground.js")
    add_file("/playground/playground.css", playground / "playground.css")
    add_file("/docs", playground / "docs.html")
    add_file("/docs/start.js", playground / "docs.js")
    add_file("/docs/swagger-ui-bundle.js", swagger / "swagger-ui-bundle.js")
    add_file("/docs/swagger-ui.css", swagger / "swagger-ui.css")
    return router
