"""The failure of the service itself, as opposed to that of a request."""


class ServiceError(Exception):
    """The service cannot start or continue; the message goes to the operator."""
