"""The command `python -m service fetch-dataset`."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential
from tqdm import tqdm

from service.settings import FetchSettings, parse
from service.startup import ServiceError

T = TypeVar("T")

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_MAX_WAIT_S = 60.0
_backing_off = wait_random_exponential(multiplier=0.5, max=_MAX_WAIT_S)
# A resumed zip is made again from its beginning before its next byte comes.
_TIMEOUT = httpx.Timeout(30.0, read=900.0)


class _Interrupted(Exception):  # noqa: N818  (it goes on)
    """Another attempt may bring more; after so many seconds, if the service says so."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s


@dataclass(frozen=True)
class _Announced:
    """What the service says of a file before it is there."""

    name: str
    length: int
    images: int
    tag: str


def main(arguments: list[str]) -> int:
    """Fetch a data set; returns the exit status.

    Raises:
        ValueError: an option is wrong.
        ServiceError: the service does not give it.
    """
    settings = parse(FetchSettings, arguments)
    url = _check(settings.url)
    headers = {"Accept-Encoding": "identity"}
    try:
        if settings.api_key_file is not None:
            secret = settings.api_key_file.read_text(encoding="utf-8").strip()
            headers["Authorization"] = f"Bearer {secret}"
        settings.out.mkdir(parents=True, exist_ok=True)
        with httpx.Client(headers=headers, timeout=_TIMEOUT) as client:
            path = _Fetch(client, url, settings.out, settings.retries).run()
    except OSError as error:
        raise ServiceError(f"{error.filename}: {error.strerror}") from error
    print(path)
    return 0


def _check(text: str) -> httpx.URL:
    """An address that can be gone on with.

    Raises:
        ValueError: it cannot.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"URL: {error}, not {text!r}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"URL: must begin with http:// or https:// and a host, not {text!r}")
    if "seed" not in url.params:
        raise ValueError(f"URL: needs a seed, as in ...&seed=0, to go on with later; not {text!r}")
    return url


class _Fetch:
    """One file, in as many requests as it takes."""

    def __init__(self, client: httpx.Client, url: httpx.URL, out: Path, retries: int) -> None:
        self._client, self._url, self._out, self._retries = client, url, out, retries
        self._in_vain = 0  # attempts in a row that brought nothing

    def run(self) -> Path:
        """The file when it is complete.

        Raises:
            ServiceError: the service does not give it.
        """
        announced = self._retried(self._announce)
        path = self._out / announced.name
        if path.exists():
            if path.stat().st_size == announced.length:
                return path
            raise ServiceError(f"{path} is there and has another length; move it out of the way")
        # The tag tells the beginnings of files of the same name apart.
        part = path.with_name(f"{path.name}.{announced.tag[1:13]}.part")
        with part.open("ab") as file:
            with tqdm(
                total=announced.length,
                initial=file.tell(),
                unit="B",
                unit_scale=True,
                desc=f"{announced.images:,} images",
            ) as bar:
                while file.tell() < announced.length:
                    self._retried(lambda: self._read(file, announced, bar))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        return path

    def _retried(self, attempt: Callable[[], T]) -> T:
        """What an attempt gives, in the end.

        Raises:
            ServiceError: too many in a row brought nothing, or one was refused for good.
        """
        retrying = Retrying(
            retry=retry_if_exception_type((_Interrupted, httpx.TransportError)),
            stop=lambda _state: self._in_vain > self._retries,
            wait=_wait_s,
            reraise=True,
        )

        def counted() -> T:
            self._in_vain += 1
            return attempt()

        try:
            return retrying(counted)
        except (_Interrupted, httpx.TransportError) as error:
            raise ServiceError(f"{self._url.host}: {error}") from error

    def _announce(self) -> _Announced:
        answer = self._client.head(self._url)
        if answer.status_code != 200:
            # A HEAD has no body, which would say why.
            with self._client.stream("GET", self._url) as reason:
                if not reason.is_success:
                    raise _refusal(reason)
        try:
            disposition = EmailMessage()
            disposition["Content-Disposition"] = answer.headers["Content-Disposition"]
            name = disposition.get_filename() or ""
            found = _Announced(
                name=name,
                length=int(answer.headers["Content-Length"]),
                images=int(answer.headers["X-Images"]),
                tag=answer.headers["ETag"],
            )
        except (KeyError, ValueError) as error:
            raise ServiceError(f"{self._url} is no data set of this service") from error
        if name in ("", ".", "..") or Path(name).name != name:
            raise ServiceError(f"{self._url} wants to be saved as {name!r}, which is no file name")
        self._in_vain = 0
        return found

    def _read(self, file: BinaryIO, announced: _Announced, bar: "tqdm[Any]") -> None:
        """Append as much as one answer brings."""
        begin = file.tell()
        headers = {"Range": f"bytes={begin}-", "If-Range": announced.tag}
        with self._client.stream("GET", self._url, headers=headers) as answer:
            if answer.status_code not in (200, 206):
                raise _refusal(answer)
            if answer.headers.get("ETag") != announced.tag or (begin and answer.status_code == 200):
                raise ServiceError(
                    f"{self._url} is another file now than when this began; the service may have "
                    "another model. Pin it as model=NAME@sha256:DIGEST, or ask again from the start"
                )
            try:
                for block in answer.iter_raw():
                    file.write(block)
                    bar.update(len(block))
                    self._in_vain = 0
            except httpx.TransportError:
                if file.tell() == begin:
                    raise


def _refusal(answer: httpx.Response) -> Exception:
    """What an answer that is not the file means."""
    text = answer.read().decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["detail"]
    cause = f"{answer.status_code}: {text[:500] or answer.reason_phrase}"
    if answer.status_code not in _RETRIED:
        return ServiceError(f"{answer.url.host}: {cause}")
    after = answer.headers.get("Retry-After", "")
    return _Interrupted(cause, float(after) if after.isdecimal() else None)


def _wait_s(state: RetryCallState) -> float:
    """As long as the service says, or longer from attempt to attempt."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _Interrupted) and error.after_s is not None:
        return min(error.after_s, _MAX_WAIT_S)
    return _backing_off(state)
