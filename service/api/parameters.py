"""What `/generate` can be asked for: in a query string, or in a JSON body."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.encoding.images import MEDIA_TYPES, Format
from service.errors import wrong_value, wrong_values
from service.generation import Generation, GenerationRequest, Interpolation
from service.settings import MAX_IMAGES, MAX_TIMEOUT_MS

MAX_SEED = 2**64 - 1
MAX_INDEX = 2**53 - 1  # as far as every JSON reader counts without loss
MAX_WEIGHT = 1e6
_REMEMBERED_BYTES = 256  # of a query at most

_Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
_Steps = Annotated[int, Field(ge=2, le=MAX_IMAGES)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)]


class _Common(BaseModel):
    """What both ways to ask have in common."""

    n: int = Field(
        1, ge=1, le=MAX_IMAGES, description=f"images of each label; at most {MAX_IMAGES} in all"
    )
    seed: _Seed | None = Field(
        None, description="the same seed gives the same images; drawn where none is given"
    )
    index: int = Field(
        0, ge=0, le=MAX_INDEX, description="number of the first image among those of the seed"
    )
    truncation: float = Field(
        1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="less is nearer to what is typical, with less variety",
    )
    model: str | None = Field(
        None,
        description="name of a model, or name@sha256:digest for that file alone; the default one "
        "if not given",
    )
    format: Format | None = Field(None, description="goes before the Accept header")
    scale: int = Field(1, ge=1, le=16, description="enlarge by whole pixels")
    timeout_ms: int | None = Field(
        None,
        ge=1,
        le=MAX_TIMEOUT_MS,
        description="milliseconds until the images are of no use; what cannot be made by then is "
        "refused, and the service may allow less",
    )


class GenerateQuery(_Common):
    """The parameters of `/generate` in its query string."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: Annotated[list[str], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, examples=[["7"]], description="class index or class name; may repeat"
    )
    mix: Annotated[list[str], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="in place of label, CLASS:WEIGHT for each class of a mixture"
    )
    to_seed: _Seed | None = Field(
        None, description="walk from the images of seed to those of this one"
    )
    steps: _Steps | None = Field(None, description="images of a walk, both ends included")
    at: _Share | None = Field(
        None, description="of a walk only the image so far on the way, 0 the start and 1 the end"
    )

    def order(self, generation: Generation) -> GenerationRequest:
        """Check it against the models.

        Raises:
            Problem: 404 or 422, naming the field.
        """
        if self.to_seed is None and (self.steps is not None or self.at is not None):
            raise wrong_value("to_seed", None, "is required with steps and with at")
        return _order(self, generation, self.label, self._weights(), self.seed, self)

    def _weights(self) -> list[tuple[str, float]] | None:
        if self.mix is None:
            return None
        weights = []
        for each in self.mix:
            name, _, text = each.rpartition(":")
            try:
                weights.append((name, _WEIGHT.validate_python(text)))
            except ValidationError:
                raise wrong_value("mix", each, _ALLOWED["mix"]) from None
        return weights


class InterpolationBody(BaseModel):
    """A walk from the images of one seed to those of another."""

    model_config = ConfigDict(extra="forbid", strict=True)

    from_seed: _Seed | None = Field(None, description="drawn where none is given")
    to_seed: _Seed
    steps: _Steps | None = Field(None, description="images of the walk, both ends included")
    at: _Share | None = Field(None, description="only the image so far on the way")


class GenerateBody(_Common):
    """The parameters of `POST /generate` as JSON, in place of its query string."""

    model_config = ConfigDict(extra="forbid", strict=True)

    labels: Annotated[list[str | int], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="class names, or indices as numbers", examples=[["3", 8]]
    )
    label: str | int | None = Field(None, description="the only one of labels")
    mix: Annotated[dict[str, _Weight], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="in place of labels, the weight of each class of a mixture"
    )
    interpolate: InterpolationBody | None = None

    def order(self, generation: Generation) -> GenerationRequest:
        """Check it against the models.

        Raises:
            Problem: 404 or 422, naming the field.
        """
        labels, seed, walk = self.labels, self.seed, self.interpolate
        if self.label is not None:
            if labels is not None:
                raise wrong_value("label", self.label, "is given in labels, or alone; not both")
            labels = [self.label]
        if walk is not None and walk.from_seed is not None:
            if seed is not None:
                raise wrong_value("seed", seed, "is given as from_seed, or alone; not both")
            seed = walk.from_seed
        weights = None if self.mix is None else list(self.mix.items())
        return _order(self, generation, labels, weights, seed, walk)


_WEIGHT: TypeAdapter[float] = TypeAdapter(_Weight)

# Whichever way a value is wrong, the error says what is allowed.
_ALLOWED = {
    "label": f"must be given once to {MAX_IMAGES} times, each a class index or a class name",
    "labels": f"must be a list of 1 to {MAX_IMAGES} class names or indices",
    "mix": f"must give classes weights from 0 to {MAX_WEIGHT:.0f}: mix=CLASS:WEIGHT for each, or "
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
    "scale": "must be an integer from 1 to 16",
    "timeout_ms": f"must be an integer from 1 to {MAX_TIMEOUT_MS}",
}


def _order(
    asked: GenerateQuery | GenerateBody,
    generation: Generation,
    labels: Sequence[str | int] | None,
    weights: list[tuple[str, float]] | None,
    seed: int | None,
    walk: GenerateQuery | InterpolationBody | None,
) -> GenerationRequest:
    if labels is None and weights is None:
        raise wrong_value("label", None, "is required, or a mix in its place")
    if labels is not None and weights is not None:
        raise wrong_value("mix", weights, "takes the place of label; not both")
    return generation.order(
        labels=labels or (),
        mix=weights or (),
        n=asked.n,
        seed=seed,
        index=asked.index,
        walk=None if walk is None or walk.to_seed is None else _walk(walk.to_seed, walk),
        truncation=asked.truncation,
        model=asked.model,
    )


def _walk(to_seed: int, asked: GenerateQuery | InterpolationBody) -> Interpolation:
    if asked.at is not None and asked.steps is not None:
        raise wrong_value("at", asked.at, "is one image and steps are several; not both")
    if asked.at is not None:
        return Interpolation(to_seed, [asked.at])
    if asked.steps is None:
        raise wrong_value("steps", None, "is required for a walk, or at in its place")
    return Interpolation(to_seed, [step / (asked.steps - 1) for step in range(asked.steps)])


def parse_query(query: bytes) -> GenerateQuery:
    """The parameters in a query string.

    Raises:
        Problem: 422, naming every wrong value and what is allowed.
    """
    return _parse_again(query) if len(query) <= _REMEMBERED_BYTES else _parse_query(query)


def _parse_query(query: bytes) -> GenerateQuery:
    values: dict[str, str | list[str]] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name in ("label", "mix"):
            several = values.setdefault(name, [])
            assert isinstance(several, list)
            several.append(value)
        else:
            values[name] = value
    try:
        return GenerateQuery.model_validate(values)
    except ValidationError as error:
        raise wrong_values(error.errors(), _ALLOWED) from error


# Most clients ask for the same few things again and again; what was wrong is not remembered.
_parse_again = lru_cache(maxsize=4096)(_parse_query)


def parse_body(body: bytes | bytearray) -> GenerateBody:
    """The parameters in a JSON body.

    Raises:
        Problem: 422, naming every wrong value and what is allowed.
    """
    try:
        return GenerateBody.model_validate_json(body)
    except ValidationError as error:
        wrong = {_place(each["loc"]): each for each in error.errors()}
        found = [{**each, "loc": place} for place, each in wrong.items()]
        raise wrong_values(found, _ALLOWED) from error


def _place(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The parameter of an error that is somewhere in a JSON body."""
    if not loc:
        return ("body",)
    return loc[:2] if loc[0] == "interpolate" else loc[:1]
