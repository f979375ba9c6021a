"""Refusals at the door: what too much waits for already is told so before it becomes a request.

Under overload most of what comes is refused. As a request that costs about as much as a small image
does, so that refusing would take the time in which the others are to be answered; here it costs
little more than to read it. The answer is the one that `routes.native` would give.
"""

import time
from functools import lru_cache
from typing import NamedTuple

from starlette.types import Scope

from service.formats import negotiate
from service.generation import Generation
from service.observation import Observe, request_id_of
from service.problems import Problem, describe
from service.routes.native import FrontDoor, RawHeaders, read_headers
from service.routes.parameters import parse_query
from service.settings import MAX_IMAGES


class Plain(NamedTuple):
    """What is asked for, where it is nothing but images of some classes."""

    labels: list[str]
    n: int
    model: str | None
    timeout_s: float | None
    negotiable: bool


class Shedder:
    """Refuses requests to the front door, as long as the batcher refuses them."""

    def __init__(self, generation: Generation, observe: Observe) -> None:
        self._generation, self._observe = generation, observe

    def __call__(
        self, target: bytes, headers: RawHeaders, client: tuple[str, int] | None
    ) -> tuple[int, RawHeaders, bytes] | None:
        """Refuse a POST without a body.

        Returns:
            status, headers and body, counted and logged as of any request; None where the request
            is not to be refused, or not for want of room, or has to be looked at more closely.
        """
        if not self._generation.crowded:
            return None
        began = time.perf_counter()
        plain = read_plain(target)
        problem = None if plain is None else self._find_problem(plain, headers)
        if problem is None:
            return None
        request_id = request_id_of(headers)
        scope: Scope = {
            "route": FrontDoor,
            "method": "POST",
            "path": FrontDoor.path,
            "query_string": target.partition(b"?")[2],
            "client": client,
            "state": {"request_id": request_id},
        }
        status, media_type, body = describe(problem, scope)
        answer = [(b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body))]
        answer += [(k.lower().encode(), v.encode()) for k, v in problem.headers.items()]
        answer.append((b"x-request-id", request_id.encode()))
        seconds = time.perf_counter() - began
        self._observe.report(scope, request_id, status, len(body), seconds)
        return status, answer, body

    def _find_problem(self, plain: Plain, headers: RawHeaders) -> Problem | None:
        head = read_headers(headers)
        if head.body is not None:
            return None
        try:
            model = self._generation.find(plain.model)
            if plain.negotiable:
                negotiate(head.accept)
        except Problem:  # another one
            return None
        if not all(label in model.labels for label in plain.labels):
            return None
        return self._generation.refusal(model, plain.n * len(plain.labels), plain.timeout_s)


@lru_cache(maxsize=4096)
def read_plain(target: bytes) -> Plain | None:
    """What a target asks for; None where it is not plain, or not right."""
    path, _, query = target.partition(b"?")
    if path != FrontDoor.path.encode() or b"#" in query:
        return None
    try:
        asked = parse_query(query)
    except Problem:
        return None
    varied = (asked.mix, asked.to_seed, asked.steps, asked.at)
    if asked.label is None or any(each is not None for each in varied):
        return None
    if asked.scale != 1 or asked.index or asked.n * len(asked.label) > MAX_IMAGES:
        return None
    timeout_s = None if asked.timeout_ms is None else asked.timeout_ms / 1e3
    return Plain(asked.label, asked.n, asked.model, timeout_s, asked.format is None)
