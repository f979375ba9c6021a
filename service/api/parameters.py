"""The parameters of `/generate`, in a query string or in a JSON body."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Annotated
from urllib.parse import parse_qs

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from service.encoding.images import MEDIA_TYPES, Format
from service.errors import invalid_value, invalid_values
from service.generation import GenerationRequest, Interpolation
from service.settings import MAX_IMAGES, MAX_TIMEOUT_MS

MAX_SEED = 2**64 - 1
MAX_INDEX = 2**53 - 1  # every JSON reader keeps integers up to this one without loss
MAX_WEIGHT = 1e6
MAX_SCALE = 16
_MAX_CACHED_QUERY_BYTES = 256

_LABEL = "a class name or, if no class has that name, a class index"
_TRUNCATION = "lower values give more typical, less varied images"
_MODEL = "NAME of a model, or NAME@sha256:DIGEST to pin its file; the default model if not given"
_SEED = "the same seed gives the same images; drawn if not given"
_INDEX = "number of the first image among those of the seed"
_N = f"images of each label; at most {MAX_IMAGES} in all"
_STEPS = "images of an interpolation, both ends included"
_AT = "in place of steps: the one image at this position, from 0 to 1"
_TIMEOUT = "deadline in milliseconds, if shorter than the service's; rejects what cannot make it"

SeedValue = Annotated[int, Field(ge=0, le=MAX_SEED)]
Seed = Annotated[SeedValue | None, Field(description=_SEED)]
Truncation = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description=_TRUNCATION)]
_Steps = Annotated[Annotated[int, Field(ge=2, le=MAX_IMAGES)] | None, Field(description=_STEPS)]
_AtValue = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_At = Annotated[_AtValue | None, Field(description=_AT)]
_Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)]
_SEVERAL = Field(min_length=1, max_length=MAX_IMAGES)


class SamplingFields(BaseModel):
    """The parameters that `/generate` and `/dataset` share."""

    truncation: Truncation = 1.0
    model: str | None = Field(None, description=_MODEL)
    seed: Seed = None


class _GenerateFields(SamplingFields):
    """The parameters that a query string and a body share."""

    n: int = Field(1, ge=1, le=MAX_IMAGES, description=_N)
    index: int = Field(0, ge=0, le=MAX_INDEX, description=_INDEX)
    format: Format | None = Field(None, description="takes precedence over the Accept header")
    scale: int = Field(1, ge=1, le=MAX_SCALE, description="enlarge each pixel to scale x scale")
    timeout_ms: int | None = Field(None, ge=1, le=MAX_TIMEOUT_MS, description=_TIMEOUT)

    def _request(
        self,
        labels: Sequence[str] | None,
        mix: Sequence[tuple[str, float]] | None,
        seed: int | None,
        interpolation: Interpolation | None,
    ) -> GenerationRequest:
        if labels is None and mix is None:
            raise invalid_value("label", None, "is required, unless mix is given")
        if labels is not None and mix is not None:
            raise invalid_value("mix", mix, "cannot be combined with label; give one of them")
        return GenerationRequest(
            labels=labels or (),
            mix=mix or (),
            n=self.n,
            seed=seed,
            index=self.index,
            interpolation=interpolation,
            truncation=self.truncation,
            model=self.model,
        )


class GenerateQuery(_GenerateFields, extra="forbid", frozen=True):
    """The parameters of `/generate` in its query string."""

    label: Annotated[list[str], _SEVERAL] | None = Field(
        None, examples=[["7"]], description=f"{_LABEL}; may repeat"
    )
    mix: Annotated[list[str], _SEVERAL] | None = Field(
        None, description="in place of label: LABEL:WEIGHT for each class of a mixture"
    )
    to_seed: SeedValue | None = Field(
        None, description="interpolate from the images of seed to those of this seed"
    )
    steps: _Steps = None
    at: _At = None

    @cached_property
    def request(self) -> GenerationRequest:
        """Return the request for images.

        Raises:
            Problem: 422, naming the parameter.
        """
        interpolation = None
        if self.to_seed is not None:
            interpolation = _interpolation(self.to_seed, self.steps, self.at)
        elif self.steps is not None or self.at is not None:
            raise invalid_value("to_seed", None, "is required with steps and with at")
        return self._request(self.label, self._weights(), self.seed, interpolation)

    def _weights(self) -> list[tuple[str, float]] | None:
        if self.mix is None:
            return None
        weights = []
        for each in self.mix:
            name, _, text = each.rpartition(":")
            try:
                weights.append((name, _WEIGHT.validate_python(text)))
            except ValidationError:
                raise invalid_value("mix", each, _ALLOWED["mix"]) from None
        return weights


class InterpolationBody(BaseModel, extra="forbid", strict=True):
    """An interpolation from the images of one seed to those of another."""

    from_seed: SeedValue | None = Field(None, description="drawn if not given")
    to_seed: SeedValue
    steps: _Steps = None
    at: _At = None


class GenerateBody(_GenerateFields, extra="forbid", strict=True):
    """The parameters of `POST /generate` as JSON, in place of its query string."""

    labels: Annotated[list[str | int], _SEVERAL] | None = Field(
        None, description=f'each {_LABEL}; 8 is the same as "8"', examples=[["3", 8]]
    )
    label: str | int | None = Field(None, description="in place of labels, if there is only one")
    mix: Annotated[dict[str, _Weight], _SEVERAL] | None = Field(
        None, description="in place of labels: the weight of each label of a mixture"
    )
    interpolate: InterpolationBody | None = None

    @cached_property
    def request(self) -> GenerationRequest:
        """Return the request for images.

        Raises:
            Problem: 422, naming the parameter.
        """
        given, seed, interpolation = self.labels, self.seed, None
        if self.label is not None:
            if given is not None:
                raise invalid_value("label", self.label, "cannot be combined with labels")
            given = [self.label]
        labels = None if given is None else [str(each) for each in given]
        if self.interpolate is not None:
            path = self.interpolate
            if path.from_seed is not None:
                if seed is not None:
                    raise invalid_value("seed", seed, "cannot be combined with from_seed")
                seed = path.from_seed
            interpolation = _interpolation(path.to_seed, path.steps, path.at)
        mix = None if self.mix is None else list(self.mix.items())
        return self._request(labels, mix, seed, interpolation)


def _interpolation(to_seed: int, steps: int | None, at: float | None) -> Interpolation:
    if at is not None and steps is not None:
        raise invalid_value("at", at, "cannot be combined with steps; give one of them")
    if at is not None:
        return Interpolation(to_seed, [at])
    if steps is None:
        raise invalid_value("steps", None, "is required to interpolate, unless at is given")
    return Interpolation(to_seed, [step / (steps - 1) for step in range(steps)])


_WEIGHT: TypeAdapter[float] = TypeAdapter(_Weight)

# They replace pydantic's messages, which differ from one way of being invalid to the other.
_ALLOWED = {
    "label": f"must be given once to {MAX_IMAGES} times, each a class name or a class index",
    "labels": f"must be a list of 1 to {MAX_IMAGES} class names or indices",
    "mix": f"must give labels weights from 0 to {MAX_WEIGHT:.0f}: mix=LABEL:WEIGHT for each, or "
    "an object in JSON",
    "n": f"must be an integer from 1 to {MAX_IMAGES}",
    "seed": f"must be an integer from 0 to {MAX_SEED}",
    "from_seed": f"must be an integer from 0 to {MAX_SEED}",
    "to_seed": f"must be an integer from 0 to {MAX_SEED}",
    "steps": f"must be an integer from 2 to {MAX_IMAGES}",
    "at": "must be a number from 0 to 1",
    "index": f"must be an integer from 0 to {MAX_INDEX}",
    "truncation": "must be a number above 0 and up to 1",
    "format": f"must be one of {', '.join(MEDIA_TYPES)}",
    "scale": f"must be an integer from 1 to {MAX_SCALE}",
    "timeout_ms": f"must be an integer from 1 to {MAX_TIMEOUT_MS}",
}


def parse_query(query: bytes) -> GenerateQuery:
    """Parse a query string.

    Raises:
        Problem: 422, naming every invalid value and what is allowed.
    """
    return _parse_cached(query) if len(query) <= _MAX_CACHED_QUERY_BYTES else _parse_query(query)


def _parse_query(query: bytes) -> GenerateQuery:
    sent = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    values = {name: each if name in ("label", "mix") else each[-1] for name, each in sent.items()}
    try:
        return GenerateQuery.model_validate(values)
    except ValidationError as error:
        raise invalid_values(error.errors(), _ALLOWED) from error


# Most clients repeat a few queries. Errors are not cached.
_parse_cached = lru_cache(maxsize=4096)(_parse_query)


def parse_body(body: bytes) -> GenerateBody:
    """Parse a JSON body.

    Raises:
        Problem: 422, naming every invalid value and what is allowed.
    """
    try:
        return GenerateBody.model_validate_json(body)
    except ValidationError as error:
        by_parameter = {_parameter(each["loc"]): each for each in error.errors()}
        found = [{**each, "loc": parameter} for parameter, each in by_parameter.items()]
        raise invalid_values(found, _ALLOWED) from error


def _parameter(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the parameter to which a location in a JSON body belongs."""
    if not loc:
        return ("body",)
    return loc[:2] if loc[0] == "interpolate" else loc[:1]
