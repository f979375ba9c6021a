"""The command `python -m service fetch-dataset`."""

import glob
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
from tqdm import tqdm

from service.failure import ServiceError
from service.settings import FetchSettings

try:
    import fcntl
except ModuleNotFoundError:  # Windows: downloads of one file are not kept apart
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_MAX_DELAY_S = 60.0
_MAX_STARTS = 5  # of a file that changes during the download
# A file name contains the beginning of the ETag, so that no other file is taken for this one.
_TAG = re.compile(r'"([\w-]{12})[\w-]*"')
# To resume a zip, the service encodes it from its beginning before it sends the next byte.
_TIMEOUT = httpx.Timeout(30.0, read=900.0)


class _RetryableError(Exception):
    """Failure of one attempt; `after_s` is the delay in seconds that the service asks for."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s


class _ChangedError(Exception):
    """The service has another file under the URL than when the download began."""


@dataclass(frozen=True)
class _RemoteFile:
    """A file as the headers of the service describe it."""

    name: str
    length: int
    images: int
    tag: str

    @property
    def digest(self) -> str:
        """Return the beginning of the ETag, which is part of the name."""
        found = _TAG.fullmatch(self.tag)
        return "" if found is None else found[1]


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
        name = error.filename or settings.out  # such as a full disk
        raise ServiceError(f"{name}: {error.strerror}") from error
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
        for _ in range(_MAX_STARTS):
            remote = self._retry(self._read_headers)
            try:
                return self._fetch(remote)
            except _ChangedError:
                continue
        raise ServiceError(
            f"{self._url} changes again and again; pin the model as model=NAME@sha256:DIGEST"
        )

    def _fetch(self, remote: _RemoteFile) -> Path:
        """Download the file that the headers described, unless it is there.

        Raises:
            _ChangedError: the service has another file by now.
            ServiceError: the service does not deliver it.
        """
        path = self._out / remote.name
        if path.exists():
            if path.stat().st_size == remote.length:
                return path
            raise ServiceError(f"{path} exists with another length; move it and try again")
        part = path.with_name(f"{path.name}.part")
        if not part.exists():
            self._report_others(part, remote)
        with part.open("ab") as file:
            _lock(file)
            with tqdm(
                total=remote.length,
                initial=file.tell(),
                unit="B",
                unit_scale=True,
                desc=f"{remote.images:,} images",
            ) as bar:
                while file.tell() < remote.length:
                    self._retry(lambda: self._append(file, remote, bar))
            if file.tell() > remote.length:
                raise ServiceError(f"{part} is too long; remove it and try again")
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        return path

    def _report_others(self, part: Path, remote: _RemoteFile) -> None:
        """Report the beginnings of files that the URL, or one like it, named before."""
        before, _, after = part.name.partition(remote.digest)
        others = f"{glob.escape(before)}{'?' * len(remote.digest)}{glob.escape(after)}"
        for other in sorted(self._out.glob(others)):
            sys.stderr.write(
                f"starting anew: {other} is the beginning of another file, as the service has "
                "replaced the model or the URL has another truncation\n"
            )

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
        if not remote.digest or remote.digest not in name:
            raise ServiceError(
                f"{self._url}: the file name {name!r} does not contain the beginning of the ETag "
                f"{remote.tag}; the service is of another version, or a proxy changes its headers"
            )
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
                raise _ChangedError
            try:
                for block in response.iter_raw():
                    file.write(block)
                    bar.update(len(block))
                    self._failures = 0
            except httpx.TransportError:
                if file.tell() == begin:
                    raise


def _lock(file: BinaryIO) -> None:
    """Lock a file until it is closed, where the system has such locks.

    Raises:
        ServiceError: another process has locked it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ServiceError(f"{file.name}: another process is downloading this file") from error


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
