"""The command `python -m service cluster`: the service on a Ray cluster.

Ray Serve runs replicas of the app on the machines of a cluster, with one GPU each if there are any.
It distributes the requests, replaces failed replicas and scales with the load. A response depends
only on the model and the request, so every replica returns the same bytes. HTTP connections and
metrics are Ray's: `/metrics` of the app would describe the one replica that happens to answer.
"""

import os
import signal
import threading
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.failure import ServiceError
from service.inference.devices import has_pytorch
from service.server.sockets import find_free_port, format_url
from service.settings import ClusterSettings, Settings

NAME = "cgan-service"
_MAX_ONGOING_REQUESTS = 1024  # so high that the admission of the replica decides, not Ray
_LOGGING = {"enable_access_log": False}  # the app logs requests itself
_DRAIN_S = 30.0  # for a replica to answer the requests that it has admitted


class ReplicaHeaderMiddleware:
    """ASGI middleware that names the replica in `X-Replica`."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app = app
        self._header = (b"x-replica", name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app and add the header to its response."""

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self.app(scope, receive, named_send)


def create_application(settings: Settings, **options: Any) -> Any:
    """Return a Ray Serve application of replicas of the service.

    The options are those of the deployment, as Ray names them.
    """
    from ray import serve  # noqa: PLC0415  (an optional dependency)

    def build() -> ReplicaHeaderMiddleware:
        # Imported in the process of the replica, because this one has no device.
        from service.app import create_app  # noqa: PLC0415
        from service.server.process import load  # noqa: PLC0415

        return ReplicaHeaderMiddleware(
            create_app(settings, load(settings)),
            serve.get_replica_context().replica_id.unique_id,
        )

    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """Raise an error if Ray is to replace this replica."""
            state = self.app.app.state  # type: ignore[attr-defined]  # the app that `build` made
            if state.readiness.lost:
                raise RuntimeError("the device failed or computes other images than before")

    return serve.deployment(
        name=NAME,
        logging_config=_LOGGING,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=_DRAIN_S,
        health_check_period_s=5,
        **options,
    )(Replica).bind()


def run(settings: ClusterSettings) -> int:
    """Deploy the replicas, serve until SIGTERM or SIGINT, and return the exit status.

    Raises:
        ServiceError: the cluster cannot be reached, or a replica cannot start.
        ValueError: the port is to be chosen at a host that is not this machine.
    """
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's default, 15, starves replicas on a machine whose cores are busy.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray's default, 5 s, is too short for a proxy to start on a machine whose cores are busy.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415

    port = settings.port or find_free_port(settings.host)
    _connect(settings.ray_address)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own handlers
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": settings.host, "port": port},
            logging_config=_LOGGING,
        )
        serve.run(
            create_application(
                settings.replica_settings(),
                ray_actor_options={"num_cpus": 1, "num_gpus": _gpus(settings.device)},
                autoscaling_config={
                    "min_replicas": settings.min_replicas,
                    "max_replicas": settings.max_replicas,
                    "target_ongoing_requests": settings.target_requests,
                },
            ),
            name=NAME,
        )
        print(f"Serving on Ray at {format_url(settings.host, port)}", flush=True)
        stopped.wait()
        serve.delete(NAME)
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise ServiceError(f"Ray cannot serve the models: {error}") from error
    finally:
        ray.shutdown()
    return 0


def _connect(address: str | None) -> None:
    """Join a cluster, or start one on this machine.

    Raises:
        ServiceError: no cluster answers at the address.
    """
    import ray  # noqa: PLC0415

    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, configure_logging=False)
        else:
            ray.init(address=address, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServiceError(f"--ray-address {address}: {error}") from error


def _gpus(device: str) -> int:
    """Return the number of GPUs of a replica."""
    import ray  # noqa: PLC0415

    if device == "auto" and has_pytorch():
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return 1 if resources.get("GPU") else 0
    return 0 if device in ("auto", "cpu") else 1
