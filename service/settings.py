"""Every option of the service: as a flag, as an environment variable, and in the help."""

import argparse
import inspect
import os
import re
import socket
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard, TypeVar

from pydantic import AfterValidator, Field, PlainValidator, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.keys import APIKey, parse_keys, read_keys, require_distinct

S = TypeVar("S", bound=BaseSettings)
MAX_IMAGES = 1024  # of one request
MAX_PIXELS = 1 << 24  # of one picture, enlargement included
MAX_TIMEOUT_MS = 600_000
MAX_WORKERS = 256

POSITIONAL = "positional"  # marks an option that is given without a flag
# Old names that are accepted for one release: the new name, and what old values are divided by.
RENAMED: dict[str, tuple[str, int | None]] = {
    "weights": ("models", None),
    "max_queue": ("max_queue_images", None),
    "timeout_ms": ("timeout_s", 1000),
    "self_check_s": ("self_test_interval_s", None),
    "drain_delay_ms": ("drain_delay_s", 1000),
}
ALLOWED_HOSTS = (
    "expected an address of this machine without brackets or a port (127.0.0.1, ::1; 0.0.0.0 or :: "
    "for every interface), or a name of it"
)
# Kubernetes sets NAME_PORT=tcp://ADDRESS:PORT in every pod for each Service of its namespace.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")


def _bundled_models() -> Path:
    """Return the folder of the bundled models: in the installed package, else in the checkout."""
    installed = Path(__file__).parent / "weights"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "weights"


def _check_endpoint(address: str | None) -> str | None:
    if address is not None and not re.match(r"https?://[^/]", address):
        raise ValueError(f"must begin with http:// or https:// and a host, not {address!r}")
    return address


def _check_host(host: str) -> str:
    try:
        socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: a label is too long, or holds a zero byte
        raise ValueError(f"{host!r} does not resolve to an address; {ALLOWED_HOSTS}") from error
    return host


def _check_unix_socket(path: Path | None) -> Path | None:
    if path is not None and not hasattr(socket, "AF_UNIX"):
        raise ValueError("Python has no Unix sockets on this system; use --host and --port")
    longest = 107 if sys.platform == "linux" else 103
    if path is not None and len(os.fsencode(path)) > longest:
        raise ValueError(f"must be at most {longest} bytes long, not {str(path)!r}")
    return path


class _Environment(EnvSettingsSource):
    """Environment variables, without those that Kubernetes sets for its Services."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        return None if _is_service_link(value) else value, key, is_complex


def _check_root_path(path: str | None) -> str | None:
    if path is not None and not re.fullmatch(r"(/[^/?#\s]+)+", path):
        raise ValueError(
            f"must be a path without a slash at its end, such as /images, not {path!r}"
        )
    return path


def _parse_workers(given: object) -> int | Literal["auto"]:
    if given == "auto":
        return "auto"
    text = str(given)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_WORKERS):
        raise ValueError(f"expected auto or a number from 1 to {MAX_WORKERS}, not {given!r}")
    return int(text)


class CommandSettings(BaseSettings):
    """Options of one command. The docstring of an option is its help."""

    model_config = SettingsConfigDict(
        env_prefix="CGAN_",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # an input may hold a key
        use_attribute_docstrings=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (this name is pydantic's)
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read options from arguments, then from the environment."""
        return init_settings, _Environment(settings_cls)


class ModelSettings(CommandSettings):
    """Options of every command that loads models."""

    models: Path = Field(default_factory=_bundled_models)
    """Model file, or a folder of them (*.safetensors). A model is named after its file
    (default: the bundled models)."""
    device: str = "auto"
    """auto (CUDA, else the CPU), cpu, cuda or cuda:N"""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Precision: float32, bfloat16 (GPU), int8 (CPU) or auto. On a GPU auto is bfloat16 where it is
    native; on a CPU it is int8 for models whose certificate shows no loss by it, else float32."""


class VerifySettings(ModelSettings):
    """Generate the images of a PNG again from its recipe, and compare them.

    The exit status is 0 if every pixel is the same, 1 if one differs, and 2 if the file cannot be
    verified.
    """

    file: Annotated[Path, POSITIONAL]
    """PNG file that the service made"""


class FetchSettings(CommandSettings):
    """Download a data set from a service. Run the same command again to resume.

    The name of the file contains the beginning of its ETag, so another truncation or a replaced
    model gives another file. If the file changes during the download, it starts anew.

    The exit status is 0 if the file is complete, 1 if the service does not deliver it, and 2 if
    the URL or an option is invalid.
    """

    url: Annotated[str, POSITIONAL]
    """For example 'http://HOST:PORT/dataset?per_class=1000&seed=0'. The seed is required: without
    one, the download cannot resume."""
    out: Path
    """Folder for the file, created if missing (required)"""
    api_key_file: Path | None = None
    """File that holds the secret of an API key and nothing else"""
    retries: int = Field(10, ge=0, le=1000)
    """Consecutive attempts without new data before giving up"""


class AppSettings(ModelSettings):
    """Options of the app, on one machine and on a cluster."""

    host: Annotated[str, AfterValidator(_check_host)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface of IPv4, and :: every interface"""
    port: int = Field(8000, ge=0, le=65_535)
    """Port to listen on; 0 picks a free one"""
    root_path: Annotated[str | None, AfterValidator(_check_root_path)] = None
    """Path below which a proxy that does not strip it serves, such as /images (default: none)"""
    default_model: str | None = None
    """Model for requests that name none (default: mnist if it is served, else the first by name)"""
    openai_unknown_model: Literal["reject", "default"] = "reject"
    """Response of /v1 to the name of a model that is not loaded, such as dall-e-3: reject the
    request, or use the default model"""
    max_batch: int = Field(256, ge=1, le=4096)
    """Maximum number of images in one forward pass"""
    max_queue_images: int = Field(8192, ge=MAX_IMAGES, le=1_000_000)
    """Maximum number of queued images; requests beyond it get 429. Requests for up to 16 images may
    exceed it by an eighth."""
    timeout_s: float = Field(10.0, ge=0.001, le=MAX_TIMEOUT_MS / 1e3)
    """Maximum duration of a request in seconds; requests that cannot finish in time are rejected"""
    self_test_interval_s: float = Field(10.0, ge=0.1, le=3600.0)
    """Seconds between self-tests, which generate known images again and compare them"""
    api_keys: Annotated[tuple[APIKey, ...], NoDecode, PlainValidator(parse_keys)] = Field(
        (), validate_default=False
    )
    """API keys with commas between them, each name:secret or name:secret:images-per-second. A list
    of processes shows flags: prefer the environment variable or a file."""
    api_keys_file: Annotated[tuple[APIKey, ...], NoDecode, PlainValidator(read_keys)] = Field(
        (), validate_default=False
    )
    """File with one API key a line, in the same form; # starts a comment"""
    images_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Rate limit of each API key, over all workers (default: no limit)"""
    burst_images: int = Field(MAX_IMAGES, ge=1, le=1_000_000)
    """Images that an API key with a rate limit may request at once after a pause"""
    otlp_endpoint: Annotated[str | None, AfterValidator(_check_endpoint)] = None
    """OpenTelemetry collector that receives traces by OTLP over HTTP, such as http://HOST:4318
    (default: no traces)"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity to log: debug, info (one line per request), warning or error"""

    @property
    def keys(self) -> tuple[APIKey, ...]:
        """All API keys. Authentication is disabled if there are none."""
        return self.api_keys + self.api_keys_file

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        require_distinct(self.keys)
        if self.images_per_second is not None and not self.keys:
            raise ValueError(
                "--images-per-second (or CGAN_IMAGES_PER_SECOND): limits each API key, so give "
                "--api-keys or --api-keys-file too"
            )
        return self


class Settings(AppSettings):
    """Serve class-conditional image generators over HTTP."""

    unix_socket: Annotated[Path | None, AfterValidator(_check_unix_socket)] = None
    """Path of a Unix socket to listen on instead of --host and --port, for a proxy on this machine
    (default: none)"""
    workers: Annotated[int | Literal["auto"], PlainValidator(_parse_workers)] = "auto"
    """Processes that share the port, each with its own models and queue; auto is one for each core
    on a CPU, and 1 on a GPU. GPUs are assigned to them round-robin. More than one requires Linux.
    """
    client_timeout_s: float = Field(20.0, ge=1.0, le=3600.0)
    """Seconds that a client may take to send a whole request, to read more of a response, or to
    send the next request on an open connection"""
    max_connections: int = Field(4096, ge=1, le=1_000_000)
    """Maximum number of open connections; further ones get 503 and are closed"""
    drain_delay_s: float = Field(0.0, ge=0.0, le=600.0)
    """Seconds to keep serving after SIGTERM with readiness off, for a load balancer to react"""
    metrics_port: int | None = Field(None, ge=0, le=65_535)
    """Serve /metrics on this port instead of the main one; 0 picks a free one (default: the main
    port)"""

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        if self.metrics_port and self.metrics_port == self.port and self.unix_socket is None:
            raise ValueError(
                "--metrics-port (or CGAN_METRICS_PORT): must differ from --port, which is "
                f"{self.port} too"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.workers in ("auto", 1):
            return self
        if sys.platform != "linux":
            raise ValueError(
                "--workers (or CGAN_WORKERS): several processes share a port on Linux only; "
                f"expected auto or 1 on this system, not {self.workers}"
            )
        if self.unix_socket is not None:
            raise ValueError(
                "--unix-socket (or CGAN_UNIX_SOCKET): one process listens there; expected "
                f"--workers auto or 1 (or CGAN_WORKERS), not {self.workers}"
            )
        return self


class ClusterSettings(AppSettings):
    """Serve class-conditional image generators from the machines of a Ray cluster.

    The models must lie at the same path on every machine. Rate limits apply to each replica.
    """

    ray_address: str | None = None
    """Address of a Ray cluster, or auto for the one this machine belongs to (default: start one on
    this machine, and stop it with this process)"""
    min_replicas: int = Field(1, ge=1, le=10_000)
    """Minimum number of replicas"""
    max_replicas: int = Field(1, ge=1, le=10_000)
    """Maximum number of replicas"""
    target_requests: float = Field(64.0, gt=0, allow_inf_nan=False)
    """Concurrent requests per replica above which replicas are added"""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                "--max-replicas (or CGAN_MAX_REPLICAS): must be at least --min-replicas, which is "
                f"{self.min_replicas}, not {self.max_replicas}"
            )
        if self.device.startswith("cuda:"):
            raise ValueError(
                "--device (or CGAN_DEVICE): Ray assigns the GPUs; expected auto, cpu or cuda, not "
                f"{self.device!r}"
            )
        return self

    def replica_settings(self) -> Settings:
        """Return the settings of the service in each replica. Ray owns its ports."""
        own = {name: getattr(self, name) for name in AppSettings.model_fields}
        return Settings.model_construct(**own, workers=1, metrics_port=0)


def parse_settings(arguments: list[str]) -> Settings:
    """Return the settings of the service; see `parse`."""
    return parse(Settings, arguments)


def parse(
    kind: type[S],
    arguments: list[str],
    *,
    prog: str = "python -m service",
    epilog: str = "",
    warn: Callable[[str], object] = lambda _line: None,
) -> S:
    """Return the settings of a command, read from flags and the environment.

    Args:
        kind: class of the settings.
        arguments: flags and values, without the name of the command.
        prog: program and command, for the help.
        epilog: last paragraph of the help.
        warn: called with a line for each option that is given under its old name, and for each
            variable that is ignored because Kubernetes set it for a Service.

    Raises:
        ValueError: an option is invalid; one line for each, with its value and the allowed ones.
        SystemExit: `--help` was given, or an unknown flag.
    """
    parser = _create_parser(kind, prog, epilog)
    renamed = {}
    for old, (new, divisor) in RENAMED.items():
        if new in kind.model_fields:
            convert = partial(_convert, warn, divisor)
            flag, variable = _flag(old), _variable(old)
            parser.add_argument(
                flag, dest=new, help=argparse.SUPPRESS, type=partial(convert, flag, _flag(new))
            )
            if (given := os.environ.get(variable)) and not os.environ.get(_variable(new)):
                renamed[new] = convert(variable, _variable(new), given)
    values: dict[str, Any] = renamed | vars(parser.parse_args(arguments))
    for variable in (_variable(name) for name in kind.model_fields if name not in values):
        if _is_service_link(given := os.environ.get(variable)):
            warn(_describe_link(variable, given))
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError("\n".join(map(_describe, error.errors()))) from error


def _create_parser(kind: type[BaseSettings], prog: str, epilog: str) -> argparse.ArgumentParser:
    positional = [name for name, each in kind.model_fields.items() if POSITIONAL in each.metadata]
    example = [name for name in kind.model_fields if name not in positional][-1]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=" ".join(["%(prog)s", *map(str.upper, positional), "[OPTION]..."]),
        description=inspect.cleandoc(kind.__doc__ or ""),
        epilog=f"{epilog}Every option is also an environment variable: {_variable(example)} for "
        f"{_flag(example)}.\nFlags take precedence.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    version = f"cgan-service {metadata.version('cgan-service')}"
    parser.add_argument(
        "--version", action="version", version=version, help="show the version and exit"
    )
    for name, field in kind.model_fields.items():
        text = str(field.description).removesuffix(".")
        if not field.is_required() and "(default: " not in text:
            default = field.default if field.default not in (None, ()) else "none"
            text += f" (default: {default})"
        argument, metavar = (name, name.upper()) if name in positional else (_flag(name), "VALUE")
        parser.add_argument(argument, metavar=metavar, help=text.replace("%", "%%"))
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"CGAN_{name.upper()}"


def _convert(
    warn: Callable[[str], object], divisor: int | None, old: str, new: str, given: str
) -> str:
    """Return the value of a renamed option in the unit of its new name."""
    warn(f"{old} is deprecated and will be removed in the next release; use {new}")
    try:
        return given if divisor is None else str(float(given) / divisor)
    except ValueError:  # reported when the new option is validated
        return given


def _is_service_link(value: str | None) -> TypeGuard[str]:
    return value is not None and _SERVICE_LINK.match(value) is not None


def _describe_link(variable: str, value: str) -> str:
    service = variable.removesuffix("_PORT").replace("_", "-").lower()
    return (
        f"ignored {variable}={value}, which Kubernetes sets in pods beside a Service named "
        f"{service!r}; set `enableServiceLinks: false` in the pod to avoid it"
    )


def _describe(error: Any) -> str:
    """Return the line that reports an invalid option. It never repeats a key."""
    name = ".".join(map(str, error["loc"]))
    option = f"{_flag(name)} (or {_variable(name)})"
    if error["type"] == "value_error":
        return f"{option}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{option}: is required"
    return f"{option}: {error['msg']}, not {error['input']!r}"
