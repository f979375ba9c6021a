"""The flag by which a connection tells the request it carries that its client has disconnected."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

CLIENT = "client_of_connection"  # key of the ASGI scope, for a `Client`
CLIENT_CLOSED_REQUEST = 499  # nginx's status; nobody reads the response, the log and metrics do


class Disconnected(Exception):  # noqa: N818  (an event, not a fault)
    """The client disconnected before its response was complete."""


@dataclass(slots=True, eq=False)
class Client:
    """The client at the other end of a connection; in the scope under `CLIENT`."""

    disconnected: bool = False  # true once the connection is lost
    # Called at that moment; set by the request that is being answered.
    on_disconnect: Callable[[], object] | None = None

    def disconnect(self) -> None:
        """Raise the flag; called by the connection."""
        self.disconnected = True
        if self.on_disconnect is not None:
            self.on_disconnect()


def client_of(scope: MutableMapping[str, Any]) -> Client:
    """Return the client of a request; under a foreign server, one that never disconnects."""
    client: Client | None = scope.get(CLIENT)
    return Client() if client is None else client
