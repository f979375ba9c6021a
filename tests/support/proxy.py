"""A reverse proxy that serves a service below a path, and strips the path."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

PREFIX = "/images"
_OF_THE_CONNECTION = {"connection", "content-length", "transfer-encoding", "date"}


@contextmanager
def prefixed(url: str, *, strip: bool = True) -> Iterator[str]:
    """Serve the service at a URL below a path; return the new URL, with a slash at its end.

    Everything else is 404, as of a proxy with several services.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{PREFIX}/"):
                self.send_error(404)
                return
            path = self.path.removeprefix(PREFIX) if strip else self.path
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            sent = {k: v for k, v in self.headers.items() if k.lower() not in _OF_THE_CONNECTION}
            answer = httpx.request(
                self.command, f"{url}{path}", content=body, headers=sent, timeout=60
            )
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name.lower() not in {*_OF_THE_CONNECTION, "content-encoding"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{PREFIX}/"
        finally:
            server.shutdown()
            thread.join()
