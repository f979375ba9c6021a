import fcntl
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.conftest import make_artifact
from tests.support.other_systems import WINDOWS, as_on
from tests.support.processes import Running, start
from tests.support.serving import Service, ServiceProcess, serve_here
from tests.support.wire import wait_until


def fetch(url: str, out: Path, *options: str) -> Running:
    return start("-m", "service", "fetch-dataset", url, "--out", str(out), *options)


def end(process: Running, status: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    return output, errors


def address(service: Service, query: str) -> str:
    return f"{service.client.base_url}/dataset?{query}"


def name_of(answer: httpx.Response) -> str:
    (name,) = re.findall('filename="(.+)"', answer.headers["Content-Disposition"])
    return str(name)


class Flaky(BaseHTTPRequestHandler):
    """A service that announces a file, is overloaded once, and sends it in three goes."""

    protocol_version = "HTTP/1.1"
    content = bytes(range(256)) * 40
    tag = '"0123456789abcdef"'
    asked: list[str | None]  # the Range of every GET

    def _begin(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.tag)
        self.send_header("X-Images", "7")
        self.send_header("Content-Disposition", f'attachment; filename="set-{self.tag[1:13]}.zip"')

    def do_HEAD(self) -> None:
        self._begin(200, len(self.content))
        self.end_headers()

    def do_GET(self) -> None:
        self.asked.append(self.headers["Range"])
        if len(self.asked) == 1:
            self._begin(429, 0)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        begin = int(self.headers["Range"][6:-1])
        rest = self.content[begin:]
        self._begin(206, len(rest))
        self.end_headers()
        self.wfile.write(rest if len(self.asked) == 4 else rest[:3000])
        self.close_connection = True

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def flaky() -> Iterator[tuple[str, type[Flaky]]]:
    class Handler(Flaky):
        asked: list[str | None] = []  # noqa: RUF012  (of this server alone)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/dataset?seed=0", Handler
        server.shutdown()
        thread.join()


def test_it_is_the_file_that_the_service_makes(service: ServiceProcess, tmp_path: Path) -> None:
    query = "per_class=50&seed=4&format=idx"
    output, errors = end(fetch(address(service, query), tmp_path / "new"))
    path = Path(output.strip())
    answer = service.client.get(f"/dataset?{query}")
    assert path.read_bytes() == answer.content
    digest = answer.headers["ETag"][1:13]
    assert path == tmp_path / "new" / f"mnist-50-of-each-seed-4-{digest}.idx.tar"
    assert "500 images: 100%" in errors
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_the_output_cannot_spell_is_escaped(
    service: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    output, _ = end(fetch(address(service, "per_class=1&seed=0"), tmp_path / "é"))
    assert output.startswith(str(tmp_path / r"\xe9"))
    assert len(list((tmp_path / "é").iterdir())) == 1


def test_the_same_command_goes_on_after_a_kill(service: ServiceProcess, tmp_path: Path) -> None:
    query = "per_class=3000&seed=4&format=webdataset"
    first = fetch(address(service, query), tmp_path)

    def begun() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("*.part"))

    wait_until(lambda: begun() > 0, "the first bytes")
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    left = begun()
    assert left > 0
    output, _ = end(fetch(address(service, query), tmp_path))
    content = Path(output.strip()).read_bytes()
    assert content == service.client.get(f"/dataset?{query}").content
    assert not list(tmp_path.glob("*.part"))
    assert end(fetch(address(service, query), tmp_path))[0] == output  # it is there


def test_refusals_and_broken_connections_are_borne(
    flaky: tuple[str, type[Flaky]], tmp_path: Path
) -> None:
    url, handler = flaky
    output, _ = end(fetch(url, tmp_path))
    assert Path(output.strip()).read_bytes() == Flaky.content
    assert handler.asked == ["bytes=0-", "bytes=0-", "bytes=3000-", "bytes=6000-"]


def test_attempts_that_bring_nothing_come_to_an_end(
    flaky: tuple[str, type[Flaky]], tmp_path: Path
) -> None:
    _, errors = end(fetch(flaky[0], tmp_path, "--retries", "0"), 1)
    assert "127.0.0.1: 429" in errors
    _, errors = end(fetch("http://127.0.0.1:1/dataset?seed=0", tmp_path, "--retries", "1"), 1)
    assert "refused" in errors


def test_another_truncation_is_another_file(service: ServiceProcess, tmp_path: Path) -> None:
    for truncation in (0.5, 1):
        query = f"per_class=2&seed=4&format=npz&truncation={truncation}"
        output, _ = end(fetch(address(service, query), tmp_path))
        expected = service.client.get(f"/dataset?{query}")
        assert Path(output.strip()).read_bytes() == expected.content
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shard_is_fetched_like_a_whole_set(service: ServiceProcess, tmp_path: Path) -> None:
    names = []
    for number in (1, 2):
        query = f"per_class=5&seed=4&format=webdataset&shard={number}of2"
        path = Path(end(fetch(address(service, query), tmp_path))[0].strip())
        assert path.read_bytes() == service.client.get(f"/dataset?{query}").content
        names.append(path.name)
    # Loaders expand `...-shard-{1..2}of2.tar`.
    assert names[0].replace("-1of2", "-2of2") == names[1]


def test_a_replaced_model_of_the_same_name_gives_another_file_and_a_fresh_start(
    tmp_path: Path,
) -> None:
    query, out = "per_class=2&seed=4&format=npz", tmp_path / "out"
    paths, contents = [], []
    for seed in (0, 1):
        models = tmp_path / str(seed)
        models.mkdir()
        make_artifact(models / "own.safetensors", seed=seed)
        with serve_here("--models", str(models)) as service:
            answer = service.client.get(f"/dataset?{query}")
            if seed == 0:  # a download that was interrupted
                out.mkdir()
                begun = out / f"{name_of(answer)}.part"
                begun.write_bytes(answer.content[:1000])
                begun_content = answer.content[:1000]
                continue
            output, errors = end(fetch(address(service, query), out))
            assert f"starting anew: {begun} is the beginning of another file" in errors
            assert "starting anew" not in end(fetch(address(service, query), out))[1]
            paths.append(Path(output.strip()))
            contents.append(answer.content)
    assert [path.read_bytes() for path in paths] == contents
    assert begun.read_bytes() == begun_content


def test_a_file_that_changes_in_the_middle_is_begun_anew(
    flaky: tuple[str, type[Flaky]], tmp_path: Path
) -> None:
    url, handler = flaky
    send = Flaky.do_GET

    def answer(self: Flaky) -> None:
        if len(self.asked) == 2:
            handler.tag, handler.content = '"ba9876543210"', b"other" * 1000
        send(self)

    handler.do_GET = answer  # type: ignore[method-assign]
    output, errors = end(fetch(url, tmp_path))
    assert "starting anew" in errors
    assert Path(output.strip()) == tmp_path / "set-ba9876543210.zip"
    assert Path(output.strip()).read_bytes() == b"other" * 1000
    begun = tmp_path / "set-0123456789ab.zip.part"
    assert begun.read_bytes() == Flaky.content[:3000]


def test_a_file_that_changes_without_end_is_given_up(
    flaky: tuple[str, type[Flaky]], tmp_path: Path
) -> None:
    url, handler = flaky
    send = Flaky.do_GET

    def answer(self: Flaky) -> None:
        handler.tag = f'"{len(self.asked):012}"'
        send(self)

    handler.do_GET = answer  # type: ignore[method-assign]
    _, errors = end(fetch(url, tmp_path, "--retries", "2"), 1)
    assert "pin the model as model=NAME@sha256:DIGEST" in errors


@pytest.mark.parametrize("tag", ['W/"0123456789abcdef"', '"short"', '"../../../../evil"'])
def test_a_tag_that_cannot_tell_files_apart_is_refused(
    flaky: tuple[str, type[Flaky]], tmp_path: Path, tag: str
) -> None:
    url, handler = flaky
    handler.tag = tag
    _, errors = end(fetch(url, tmp_path), 1)
    assert "ETag" in errors or "invalid file name" in errors
    assert not list(tmp_path.iterdir())


def test_a_file_of_that_name_and_another_length_is_left_alone(
    flaky: tuple[str, type[Flaky]], tmp_path: Path
) -> None:
    mine = tmp_path / "set-0123456789ab.zip"
    mine.write_bytes(b"mine")
    _, errors = end(fetch(flaky[0], tmp_path), 1)
    assert "exists with another length; move it" in errors
    assert mine.read_bytes() == b"mine"


def test_two_downloads_of_one_file_do_not_mix(
    flaky: tuple[str, type[Flaky]], tmp_path: Path
) -> None:
    part = tmp_path / "set-0123456789ab.zip.part"
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, errors = end(fetch(flaky[0], tmp_path), 1)
    assert "another process is downloading this file" in errors
    part.write_bytes(bytes(20_000))
    _, errors = end(fetch(flaky[0], tmp_path), 1)
    assert f"{part} is too long; remove it" in errors


def test_a_file_is_downloaded_on_windows(flaky: tuple[str, type[Flaky]], tmp_path: Path) -> None:
    program = as_on(WINDOWS, "service")
    output, _ = end(start(*program, "fetch-dataset", flaky[0], "--out", str(tmp_path)))
    assert Path(output.strip()).read_bytes() == Flaky.content


def test_a_folder_that_takes_no_more_bytes_is_named(
    flaky: tuple[str, type[Flaky]], tmp_path: Path
) -> None:
    """As on a full disk."""
    code = (
        "import resource, sys\n"
        "from service.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "sys.exit(main())"
    )
    _, errors = end(start("-c", code, "fetch-dataset", flaky[0], "--out", str(tmp_path)), 1)
    assert f"{tmp_path}: File too large" in errors
    assert "Traceback" not in errors


def test_a_key_is_read_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("a-secret-of-16-characters\n")
    with ServiceProcess("--api-keys", "me:a-secret-of-16-characters") as service:
        url = address(service, "per_class=1&seed=0&format=npz")
        end(fetch(url, tmp_path, "--api-key-file", str(secret)))
        _, errors = end(fetch(url, tmp_path / "other"), 1)
        assert "401: This path requires an API key" in errors


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000/dataset?seed=0", "must begin with http:// or https://"),
        ("http://localhost:8000/dataset?per_class=1", "needs a seed"),
    ],
)
def test_an_address_that_will_not_do_is_refused_in_words(
    tmp_path: Path, url: str, words: str
) -> None:
    _, errors = end(fetch(url, tmp_path), 2)
    assert errors.startswith("URL: ")
    assert words in errors


def test_a_wrong_value_and_another_address_are_refused_in_words(
    service: ServiceProcess, tmp_path: Path
) -> None:
    _, errors = end(fetch(address(service, "seed=0&per_class=0"), tmp_path), 1)
    assert "422: per_class: Input should be greater than or equal to 1" in errors
    _, errors = end(fetch(f"{service.client.base_url}/models?seed=0", tmp_path), 1)
    assert "is not a data set" in errors
    (tmp_path / "file").touch()
    _, errors = end(fetch(address(service, "seed=0&per_class=1"), tmp_path / "file"), 1)
    assert "file: File exists" in errors
