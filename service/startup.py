"""What a service says when it serves, and when it cannot."""

from collections.abc import Sequence


class ServiceError(Exception):
    """The service cannot start or cannot go on; says why to whoever started it."""


def serving(names: Sequence[str], address: tuple[str, int], devices: str) -> str:
    """The line that says what is served, and where."""
    host, port = address
    host = f"[{host}]" if ":" in host else host
    return f"Serving {', '.join(names)} at http://{host}:{port} on {devices}"
