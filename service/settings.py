"""Every option of the service, once: as a flag, as an environment variable, and in the help."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, PlainValidator, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
)

from service.keys import Key, parse_keys, read_keys, require_distinct

S = TypeVar("S", bound=BaseSettings)
MAX_IMAGES = 1024  # of one request
MAX_PIXELS = 1 << 24  # of one picture, enlargement included
MAX_TIMEOUT_MS = 600_000

_BUNDLED = Path(__file__).parent.parent / "weights"


def _check_endpoint(address: str | None) -> str | None:
    if address is not None and not re.match(r"https?://[^/]", address):
        raise ValueError(f"has to begin with http:// or https:// and a host, not {address!r}")
    return address


def _options(command: str) -> SettingsConfigDict:
    """How the options of a command are read."""
    return SettingsConfigDict(
        env_prefix="CGAN_",
        cli_prog_name=f"python -m service{command}",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,  # it may hold a key
    )


class Models(BaseSettings):
    """Which models there are, and what computes them."""

    weights: Path = Field(
        _BUNDLED,
        description="an artifact, or a folder of them (*.safetensors); a model is named after its "
        "file",
    )
    device: str = Field("auto", description="auto (CUDA, else the CPU), cpu, cuda, or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="what to compute in; auto is bfloat16 where the device is built for it"
    )


class VerifySettings(Models):
    """Make the images of a PNG's recipe again, and say whether they are the same.

    Ends with status 0 where every pixel is the same, 1 where one is not, and 2 where that cannot be
    told. The options are also read from the environment, as those of the service.
    """

    model_config = _options(" verify")

    file: CliPositionalArg[Path] = Field(description="a PNG file that the service made")


class FetchSettings(BaseSettings):
    """Download a data set from a service, and go on with it where it broke off.

    The same command again goes on where the last one ended. Ends with status 0 when the file is
    there, 1 when the service cannot give it, and 2 when the address or an option is wrong.
    """

    model_config = _options(" fetch-dataset")

    url: CliPositionalArg[str] = Field(
        description="http://HOST:PORT/dataset?per_class=1000&seed=0&format=webdataset and so on; "
        "without a seed it could not go on"
    )
    out: Path = Field(description="folder for the file, which is made if it is not there")
    api_key_file: Path | None = Field(
        None, description="file that holds the secret of an API key alone, if the service needs one"
    )
    retries: int = Field(
        10,
        ge=0,
        le=1000,
        description="most attempts in a row that bring nothing before it gives up",
    )


class AppSettings(Models):
    """What holds wherever the app runs."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every interface")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on; 0 takes a free one")
    default_model: str | None = Field(
        None,
        description="name of the model that answers requests which name none; if not given, mnist, "
        "or the first by name where there is no mnist",
    )
    max_batch: int = Field(
        256,
        ge=1,
        le=4096,
        description="most images of one forward; it takes fewer where few requests wait",
    )
    max_queue: int = Field(
        4096,
        ge=MAX_IMAGES,
        le=1_000_000,
        description="most images that may wait; a request beyond that is refused with 429",
    )
    timeout_ms: int = Field(
        10_000,
        ge=1,
        le=MAX_TIMEOUT_MS,
        description="milliseconds that a request may take; what cannot make it is refused",
    )
    self_check_s: float = Field(
        10.0,
        ge=0.1,
        le=3600.0,
        description="seconds between two proofs that known images still come out as they did",
    )
    api_keys: Annotated[tuple[Key, ...], NoDecode, PlainValidator(parse_keys)] = Field(
        (),
        validate_default=False,
        description="name:secret,name:secret and so on: who may use the service. Whoever lists the "
        "machine's processes can read a flag, so give the variable, or better a file",
    )
    api_keys_file: Annotated[tuple[Key, ...], NoDecode, PlainValidator(read_keys)] = Field(
        (),
        validate_default=False,
        description="file with a key a line, name:secret or name:secret:images-per-second; # "
        "begins a comment",
    )
    images_per_second: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="most images a second of each API key, over all workers; no limit if not given",
    )
    burst_images: int = Field(
        MAX_IMAGES,
        ge=1,
        le=1_000_000,
        description="most images that an API key with a limit may have at once, after a pause",
    )
    otlp_endpoint: Annotated[str | None, AfterValidator(_check_endpoint)] = Field(
        None,
        description="collector that OpenTelemetry traces are sent to, by OTLP over HTTP: "
        "http://HOST:4318; none are made if not given",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe messages to log; info has a line per request"
    )

    @property
    def keys(self) -> tuple[Key, ...]:
        """All API keys; where there are none, everybody is let in."""
        return self.api_keys + self.api_keys_file

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        require_distinct(self.keys)
        if self.images_per_second is not None and not self.keys:
            raise ValueError(
                "--images-per-second (or CGAN_IMAGES_PER_SECOND): is a limit of each API key, so "
                "--api-keys or --api-keys-file must be given too"
            )
        return self


class Settings(AppSettings):
    """Serve class-conditional image generators over HTTP.

    `python -m service verify FILE` tells whether a PNG is what its recipe makes, and
    `python -m service fetch-dataset URL --out DIR` downloads a data set.

    Every option is also read from the environment: --max-batch from CGAN_MAX_BATCH, and so on. A
    flag wins over the environment.
    """

    model_config = _options("")

    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="processes that share the port; each one has its own models, batches and "
        "queue, and, where there are several GPUs, its own GPU",
    )
    client_timeout_s: float = Field(
        20.0,
        ge=1.0,
        le=3600.0,
        description="seconds that a client may take to send a whole request, to read more of an "
        "answer, or to ask again on an open connection",
    )
    max_connections: int = Field(
        4096,
        ge=1,
        le=1_000_000,
        description="most connections at a time; one beyond that is answered 503 and closed",
    )
    drain_delay_ms: int = Field(
        0,
        ge=0,
        le=600_000,
        description="milliseconds to serve on after SIGTERM, with readiness off, for a load "
        "balancer to notice",
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="port for /metrics alone, at the same address, which the other port then has "
        "not; 0 takes a free one",
    )


class ClusterSettings(AppSettings):
    """Serve class-conditional image generators from the machines of a Ray cluster.

    Options are also read from the environment, as those of the service. The weights have to lie at
    the same place on every machine, and limits of API keys hold in each replica.
    """

    model_config = _options(".cluster")

    ray_address: str | None = Field(
        None,
        description="address of a Ray cluster, or auto for the one this machine belongs to; if not "
        "given, one of this machine alone is started, and ends with this process",
    )
    min_replicas: int = Field(1, ge=1, le=10_000, description="replicas that always run")
    max_replicas: int = Field(
        1, ge=1, le=10_000, description="replicas that run when there is enough to do for them"
    )
    target_requests: float = Field(
        64.0,
        gt=0,
        allow_inf_nan=False,
        description="requests under way in each replica, above which there have to be more of them",
    )

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"--max-replicas (or CGAN_MAX_REPLICAS): has to be at least --min-replicas, which "
                f"is {self.min_replicas}, not {self.max_replicas}"
            )
        if self.device.startswith("cuda:"):
            raise ValueError(
                "--device (or CGAN_DEVICE): Ray chooses the GPU of each replica; allowed are auto, "
                f"cpu, cuda, not {self.device!r}"
            )
        return self

    def of_replica(self) -> Settings:
        """The settings of a service in each replica, whose port and connections are Ray's."""
        own = {name: getattr(self, name) for name in AppSettings.model_fields}
        return Settings.model_construct(**own, metrics_port=0)


def parse_settings(arguments: list[str]) -> Settings:
    """Settings of the service; see `parse`."""
    return parse(Settings, arguments)


def parse(kind: type[S], arguments: list[str]) -> S:
    """Settings of a command from flags and the environment.

    Raises:
        ValueError: an option is wrong; a line for each, with its value and what is allowed.
        SystemExit: `--help` was asked for, or a flag is unknown.
    """
    try:
        return kind(_cli_parse_args=arguments)
    except ValidationError as error:
        raise ValueError("\n".join(map(_describe, error.errors()))) from error
    except SettingsError as error:
        raise ValueError(str(error)) from error


def _describe(error: object) -> str:
    assert isinstance(error, dict)
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error" and not name:
        return str(error["ctx"]["error"])
    flag, variable = f"--{name.replace('_', '-')}", f"CGAN_{name.upper()}"
    if error["type"] == "value_error":  # our own words, which never hold a secret
        return f"{flag} (or {variable}): {error['ctx']['error']}"
    return f"{flag} (or {variable}): {error['msg']}, not {error['input']!r}"
