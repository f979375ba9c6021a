"""Code, tables and links of the pages agree with the program."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.__main__ import COMMANDS as SERVICE
from service.encoding.images import MEDIA_TYPES
from service.settings import RENAMED, Settings, parse
from tests import faults
from tests.support.processes import REPOSITORY
from tests.support.serving import ServiceProcess
from training.__main__ import main as training
from training.config import PRESETS

PATHS = [
    *("README.md", "service/README.md", "service/deploy/README.md", "training/README.md"),
    *("tests/README.md", "tests/benchmarks/README.md", "weights/README.md"),
]
PAGES = {path: (REPOSITORY / path).read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
LINES = [line[4:] for page in PAGES.values() for line in re.findall(r"^    \S.*$", page, re.M)]


def section(path: str, heading: str) -> str:
    """The text below a heading of a page, up to the next heading of its level or above."""
    page = PAGES[path]
    begin = re.search(rf"^(#+) {re.escape(heading)}$", page, re.M)
    assert begin is not None, f"{path} has no heading {heading!r}"
    rest = page[begin.end() :]
    end = re.search(rf"^#{{1,{len(begin[1])}}} ", rest, re.M)
    return rest if end is None else rest[: end.start()]


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first row begins with a cell."""
    (table,) = re.findall(rf"^\| {re.escape(header)} \|.*\n\|[-:| ]+\n((?:\|.*\n)+)", text, re.M)
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    return [[cell.strip() for cell in line] for line in lines]


def plain(cell: str) -> str:
    """A cell of one piece of code, without what stands behind it."""
    found = re.match(r"`([^`]+)`", cell)
    return cell if found is None else found[1]


# Commands -----------------------------------------------------------------------------------------


def test_the_front_page_has_at_most_150_lines() -> None:
    assert README.count("\n") <= 150


@pytest.mark.parametrize(
    ("heading", "command"),
    [
        (
            "Serve",
            "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m service",
        ),
        (
            "Test",
            "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest -n 2",
        ),
    ],
)
def test_the_two_commands_of_the_front_page_are_complete(heading: str, command: str) -> None:
    indented = re.findall(r"^    (.*)$", section("README.md", heading), re.M)
    assert indented[0] == command
    if heading == "Test":  # all that `.ci/run` runs
        assert len(indented) == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("line", [each for each in LINES if each.startswith("curl ")])
def test_requests_are_answered(service: ServiceProcess, tmp_path: Path, line: str) -> None:
    assert "localhost:8000" in line
    command = line.replace("localhost:8000", f"localhost:{service.client.base_url.port}")
    subprocess.run(
        ["bash", "-c", f"{command} --silent --show-error --fail"],
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    (path,) = tmp_path.iterdir()
    assert path.name in line
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as opened:
            assert opened.testzip() is None
    else:
        with Image.open(path) as image:
            image.verify()


@pytest.mark.parametrize(
    "code",
    re.findall(r"^```python\n(.*?)^```", "\n".join(PAGES.values()), re.M | re.S),
)
def test_examples_run(service: ServiceProcess, tmp_path: Path, code: str) -> None:
    address = f"localhost:{service.client.base_url.port}"
    assert "localhost:8000" in code
    for name in imports(code):
        if find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install -e '.[clients]'")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace("localhost:8000", address)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout or any(tmp_path.iterdir())


def imports(code: str) -> set[str]:
    """Return the top-level modules that an example imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize(
    "path", re.findall(r'<img src="http://localhost:8000(\S+)"', "\n".join(PAGES.values()))
)
def test_pictures_for_a_page_can_be_cached(service: ServiceProcess, path: str) -> None:
    answer = service.client.get(path)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/png"
    assert "ETag" in answer.headers


@pytest.mark.parametrize("line", [each for each in LINES if "-m training " in each])
def test_commands_of_training_are_understood(line: str) -> None:
    name, *arguments = shlex.split(line.partition("-m training ")[2])
    training.commands[name].make_context(name, [*arguments])
    renamed = rows(section("service/README.md", "Release notes"), "kind")
    assert not {plain(old) for kind, old, _ in renamed if kind == "training"} & {*arguments}


@pytest.mark.parametrize(
    "line",
    [each for each in LINES if re.search(r"-m service(?!\.)", each) and "venv .venv" not in each],
)
def test_commands_of_the_service_are_understood(line: str) -> None:
    arguments = shlex.split(line.partition("-m service")[2], comments=True)
    named = bool(arguments) and not arguments[0].startswith("-")
    deprecated: list[str] = []
    command = SERVICE[arguments.pop(0) if named else "serve"]
    parse(command.settings, arguments, warn=deprecated.append)
    assert deprecated == []


# Tables -------------------------------------------------------------------------------------------


def test_every_option_is_listed_with_its_default() -> None:
    table = rows(section("service/README.md", "Configuration"), "option")
    listed = {plain(option): plain(default) for option, default, _ in table}
    fields = {f"--{name.replace('_', '-')}": each for name, each in Settings.model_fields.items()}
    assert listed.keys() == fields.keys()
    for option, field in fields.items():
        if field.default is None or field.default == ():
            assert listed[option] in ("none", "mnist"), option
        elif option != "--models":  # a folder that depends on the installation
            assert listed[option] == str(field.default), option


@pytest.fixture(scope="module")
def schema(service: ServiceProcess) -> Any:
    return service.client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("heading", "path"), [("Parameters", "/generate"), ("Data sets", "/dataset")]
)
def test_every_parameter_is_listed_with_what_is_allowed(
    schema: Any, heading: str, path: str
) -> None:
    table = rows(section("service/README.md", heading), "parameter")
    listed = {plain(name): (allowed, plain(default)) for name, allowed, default, _ in table}
    parameters = {each["name"]: each["schema"] for each in schema[path]["get"]["parameters"]}
    assert listed.keys() == parameters.keys()
    for name, described in parameters.items():
        allowed, default = listed[name]
        for kind in (described, *described.get("anyOf", [])):
            bounds = {kind[each] for each in ("minimum", "maximum") if each in kind}
            assert bounds <= numbers(allowed) or name == "start", name
        if described.get("default") is not None:
            assert default == str(described["default"]).removesuffix(".0"), name


def numbers(cell: str) -> set[int]:
    """Return the numbers in a cell; 2^64 - 1 is one of them."""
    cell = cell.replace(",", "")
    powers = {2 ** int(power) - 1 for power in re.findall(r"2\^(\d+) - 1", cell)}
    return powers | {int(each) for each in re.findall(r"\b\d+\b", cell)}


def test_every_format_is_listed(schema: Any) -> None:
    table = rows(section("service/README.md", "Formats"), "`format`")
    assert {plain(name): plain(media_type) for name, media_type, _ in table} == MEDIA_TYPES
    sets = rows(section("service/README.md", "Data sets"), "`format`")
    (described,) = [
        each["schema"]
        for each in schema["/dataset"]["get"]["parameters"]
        if each["name"] == "format"
    ]
    assert [plain(name) for name, *_ in sets] == described["enum"]


def test_every_status_of_an_error_is_listed(schema: Any) -> None:
    listed = {status for status, *_ in rows(section("service/README.md", "Errors"), "status")}
    for path, methods in schema.items():
        for method in methods.values():
            errors = {status for status in method["responses"] if status >= "400"}
            assert errors <= listed, path


def test_every_kind_of_error_is_one_that_the_service_knows() -> None:
    source = "".join(path.read_text() for path in (REPOSITORY / "service").rglob("*.py"))
    for _, kinds, _ in rows(section("service/README.md", "Errors"), "status"):
        for kind in re.findall(r"`([a-z-]+)`", kinds):
            assert f'"{kind}"' in source or kind in ("not-found", "method-not-allowed"), kind


@pytest.mark.parametrize(
    ("path", "heading"), [("README.md", "Train your own"), ("training/README.md", "Presets")]
)
def test_every_preset_is_listed(path: str, heading: str) -> None:
    table = rows(section(path, heading), "preset")
    assert {plain(name) for name, *_ in table} == PRESETS.keys()


def test_every_command_of_training_is_listed() -> None:
    table = rows(section("training/README.md", "Training"), "command")
    hidden = {name for name, command in training.commands.items() if command.hidden}
    assert {plain(name).split()[0] for name, _ in table} == training.commands.keys() - hidden


def test_every_renamed_option_is_in_the_release_notes() -> None:
    notes = section("service/README.md", "Release notes")
    for old, (new, _) in RENAMED.items():
        assert f"| `--{old.replace('_', '-')}` | `--{new.replace('_', '-')}` |" in notes


def test_every_fault_is_listed() -> None:
    table = rows(section("tests/README.md", "Fault injection"), "fault")
    assert {plain(name) for name, *_ in table} == {row.name for row in faults.FAULTS}


def test_the_quality_of_the_models_is_that_of_their_certificates() -> None:
    shown = rows(section("README.md", "Bundled models"), "model")
    measured = rows(PAGES["weights/README.md"].partition("\n## ")[0], "model")
    certified = {re.sub(r"\[(.*?)\].*", r"\1", row[0]): [row[1], *row[3:]] for row in measured}
    assert {plain(name): cells for name, *cells in shown} == certified


# Links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_links_lead_somewhere(path: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[path]):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (REPOSITORY / path).parent / file if file else REPOSITORY / path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(page: str) -> set[str]:
    """Return what the headings of a page are called in links, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def test_the_tree_names_what_is_there() -> None:
    (tree,) = re.findall(r"^```\n(.*?)^```", section("README.md", "Repository layout"), re.M | re.S)
    folder = Path()
    listed = set()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            name = str(folder / name)
        elif name.endswith("/"):
            folder = Path(name)
        assert (REPOSITORY / name).exists(), name
        listed.add(Path(name))
    for package in ("service", "training"):
        modules = {each.parent for each in (REPOSITORY / package).glob("*/*.*")}
        found = {each.relative_to(REPOSITORY) for each in modules if each.name != "__pycache__"}
        assert found - listed <= {Path("service/weights")}


@pytest.mark.parametrize("path", PATHS)
def test_files_that_a_page_names_exist(path: str) -> None:
    for name in re.findall(r"`((?:service|training|tests|weights)/[\w/.-]+)`", PAGES[path]):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"\b(?:python -m |`)(tests\.[\w.]+)", PAGES[path]):
        stem = REPOSITORY / name.replace(".", "/")
        assert stem.with_suffix(".py").exists() or stem.is_dir(), name


def test_the_modules_that_a_request_passes_exist() -> None:
    flow = section("service/README.md", "How a request flows")
    names = re.findall(r"\s(\w+/(?:\w+\.py)?|\w+\.py)\s", flow)
    assert len(names) > 5
    for name in names:
        assert (REPOSITORY / "service" / name).exists(), name
