"""The service on a Ray cluster: `python -m service.commands.cluster`.

Ray Serve starts replicas of the app on the machines of a cluster, with a GPU each where there are
any, spreads the requests over them, replaces what dies, and adds some while there is more to do.
Everything that an answer depends on is in the artifact and the request, so any replica gives the
same bytes. HTTP connections are Ray's own here, and so are the metrics: one replica's would be
those of whichever answers.
"""

import os
import signal
import socket
import sys
import threading
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import ClusterSettings, Settings, parse
from service.startup import ServiceError, status_of

NAME = "cgan-service"
_MOST_REQUESTS = 1024  # under way in a replica, whose own admission is to decide what it takes
_LOGGING = {"enable_access_log": False}  # the app has its own
_DRAIN_S = 30.0  # for a replica to answer what it has taken


class ReplicaHeaderMiddleware:
    """ASGI middleware that says in `X-Replica` who answered."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app = app
        self._header = (b"x-replica", name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back with the header."""

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self.app(scope, receive, named_send)


def create_application(settings: Settings, **options: Any) -> Any:
    """A Ray Serve application of replicas of the service.

    Args:
        settings: of the service in each of them.
        options: of the deployment, as Ray names them.
    """
    from ray import serve  # noqa: PLC0415  (of an extra)

    def build() -> ReplicaHeaderMiddleware:
        # In the replica's own process, which alone has a device.
        from service.app import create_app  # noqa: PLC0415
        from service.server.process import load  # noqa: PLC0415

        return ReplicaHeaderMiddleware(
            create_app(settings, load(settings)),
            serve.get_replica_context().replica_id.unique_id,
        )

    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """Called by Ray, which replaces a replica for which it raises."""
            state = self.app.app.state  # type: ignore[attr-defined]  # of what `build` made
            if state.readiness.lost:
                raise RuntimeError("its device failed, or computes other images than before")

    return serve.deployment(
        name=NAME,
        logging_config=_LOGGING,
        max_ongoing_requests=_MOST_REQUESTS,
        graceful_shutdown_timeout_s=_DRAIN_S,
        health_check_period_s=5,
        **options,
    )(Replica).bind()


def main() -> int:
    """Deploy, serve until told to stop, and undo it; returns the exit status."""
    return status_of(lambda: _deploy(parse(ClusterSettings, sys.argv[1:])))


def _deploy(settings: ClusterSettings) -> int:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    # 15 otherwise: replicas hardly run beside anything that keeps the cores busy, nor do they end.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Five seconds otherwise, which a proxy needs to start where all cores are busy.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    try:
        import ray  # noqa: PLC0415
        from ray import serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ServiceError(f"pip install 'cgan-service[cluster]': {error}") from error
    _connect(settings.ray_address)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # not before: Ray has handlers of its own
        signal.signal(number, lambda *_: stopped.set())
    port = settings.port or _free_port(settings.host)
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": settings.host, "port": port},
            logging_config=_LOGGING,
        )
        serve.run(
            create_application(
                settings.of_replica(),
                ray_actor_options={"num_cpus": 1, "num_gpus": _gpus(settings.device)},
                autoscaling_config={
                    "min_replicas": settings.min_replicas,
                    "max_replicas": settings.max_replicas,
                    "target_ongoing_requests": settings.target_requests,
                },
            ),
            name=NAME,
        )
        print(f"Serving on Ray at http://{settings.host}:{port}", flush=True)
        stopped.wait()
        serve.delete(NAME)
    except (RuntimeError, ray.exceptions.RayError) as error:  # a replica cannot start, for one
        raise ServiceError(f"Ray does not serve it: {error}") from error
    finally:
        ray.shutdown()
    return 0


def _connect(address: str | None) -> None:
    """Join a cluster, or start one of this machine alone.

    Raises:
        ServiceError: there is none.
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
    """GPUs of a replica."""
    import ray  # noqa: PLC0415

    if device == "auto":
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return 1 if resources.get("GPU") else 0
    return 0 if device == "cpu" else 1


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
