"""One ASGI middleware a module."""
