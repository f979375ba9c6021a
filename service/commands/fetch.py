"""The command `python -m service fetch-dataset`."""

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
from tqdm import tqdm

from service.errors import ServiceError
from service.settings import FetchSettings

T = TypeVar("T")

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_MAX_DELAY_S = 60.0
# To resume a zip, the service encodes it from its beginning before it sends the next byte.
_TIMEOUT = httpx.Timeout(30.0, read=900.0)


class _RetryableError(Exception):
    """Failure of one attempt; `after_s` is the delay in seconds that the service asks for."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s


@dataclass(frozen=True)
class _RemoteFile:
    """A file as the headers of the service describe it."""

    name: str
    length: int
    images: int
    tag: str


def run(settings: FetchSettings) -> int:
    """Download a data set and return the exit status.

    Raises:
        ValueError: the URL is invalid.
        ServiceError: the service does not deliver the file, or it cannot be written.
    """
    url = _check(settings.url)
    headers = {"Accept-Encoding": "identity"}
    try:
        if settings.api_key_file is not None:
            secret = settings.api_key_file.read_text(encoding="utf-8").strip()
            headers["Authorization"] = f"Bearer {secret}"
        settings.out.mkdir(parents=True, exist_ok=True)
        with httpx.Client(headers=headers, timeout=_TIMEOUT) as client:
            path = _Download(client, url, settings.out, settings.retries).run()
    except OSError as error:
        raise ServiceError(f"{error.filename}: {error.strerror}") from error
    print(path)
    return 0


def _check(text: str) -> httpx.URL:
    """Return the URL of a download that can resume.

    Raises:
        ValueError: the URL is invalid or has no seed.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"URL: {error}, not {text!r}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"URL: must begin with http:// or https:// and a host, not {text!r}")
    if "seed" not in url.params:
        raise ValueError(f"URL: needs a seed such as &seed=0 to resume later, not {text!r}")
    return url


class _Download:
    """Download of one file, in as many requests as it takes."""

    def __init__(self, client: httpx.Client, url: httpx.URL, out: Path, retries: int) -> None:
        self._client, self._url, self._out, self._retries = client, url, out, retries
        self._failures = 0  # consecutive attempts without new data

    def run(self) -> Path:
        """Return the path of the complete file.

        Raises:
            ServiceError: the service does not deliver it.
        """
        remote = self._retry(self._read_headers)
        path = self._out / remote.name
        if path.exists():
            if path.stat().st_size == remote.length:
                return path
            raise ServiceError(f"{path} exists with another length; move it and try again")
        # The tag separates partial downloads of different files with the same name.
        part = path.with_name(f"{path.name}.{remote.tag[1:13]}.part")
        with part.open("ab") as file:
            with tqdm(
                total=remote.length,
                initial=file.tell(),
                unit="B",
                unit_scale=True,
                desc=f"{remote.images:,} images",
            ) as bar:
                while file.tell() < remote.length:
                    self._retry(lambda: self._append(file, remote, bar))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        return path

    def _retry(self, attempt: Callable[[], T]) -> T:
        """Return the result of the first attempt that succeeds.

        Raises:
            ServiceError: too many consecutive attempts failed, or the service refused one for good.
        """
        while True:
            try:
                return attempt()
            except (_RetryableError, httpx.TransportError) as error:
                self._failures += 1
                if self._failures > self._retries:
                    raise ServiceError(f"{self._url.host}: {error}") from error
                delay_s = random.uniform(0.0, 0.5 * 2.0 ** min(self._failures, 10))
                if isinstance(error, _RetryableError) and error.after_s is not None:
                    delay_s = error.after_s
                time.sleep(min(delay_s, _MAX_DELAY_S))

    def _read_headers(self) -> _RemoteFile:
        response = self._client.head(self._url)
        if response.status_code != 200:
            # A response to HEAD has no body to name the cause.
            with self._client.stream("GET", self._url) as failed:
                if not failed.is_success:
                    raise _to_error(failed)
        try:
            disposition = EmailMessage()
            disposition["Content-Disposition"] = response.headers["Content-Disposition"]
            name = disposition.get_filename() or ""
            remote = _RemoteFile(
                name=name,
                length=int(response.headers["Content-Length"]),
                images=int(response.headers["X-Images"]),
                tag=response.headers["ETag"],
            )
        except (KeyError, ValueError) as error:
            raise ServiceError(
                f"{self._url} is not a data set; expected http://HOST:PORT/dataset?..."
            ) from error
        if name in ("", ".", "..") or Path(name).name != name:
            raise ServiceError(f"{self._url} has an invalid file name: {name!r}")
        self._failures = 0
        return remote

    def _append(self, file: BinaryIO, remote: _RemoteFile, bar: "tqdm[Any]") -> None:
        """Append the data of one response."""
        begin = file.tell()
        headers = {"Range": f"bytes={begin}-", "If-Range": remote.tag}
        with self._client.stream("GET", self._url, headers=headers) as response:
            if response.status_code not in (200, 206):
                raise _to_error(response)
            if response.headers.get("ETag") != remote.tag or (
                begin and response.status_code == 200
            ):
                raise ServiceError(
                    f"{self._url} changed since the download began; the service may have replaced "
                    "the model. Pin it as model=NAME@sha256:DIGEST, or start again"
                )
            try:
                for block in response.iter_raw():
                    file.write(block)
                    bar.update(len(block))
                    self._failures = 0
            except httpx.TransportError:
                if file.tell() == begin:
                    raise


def _to_error(response: httpx.Response) -> Exception:
    """Return the error for a response that is not the file."""
    text = response.read().decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["detail"]
    cause = f"{response.status_code}: {text[:500] or response.reason_phrase}"
    if response.status_code not in _RETRIED:
        return ServiceError(f"{response.url.host}: {cause}")
    after = response.headers.get("Retry-After", "")
    return _RetryableError(cause, float(after) if after.isdecimal() else None)
