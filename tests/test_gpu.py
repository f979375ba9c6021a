"""The frame of `python -m tests.gpu`; what it runs takes a GPU and minutes."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests import gpu
from tests.gpu import PARTS, SERVICES, Options
from tests.support.processes import REPOSITORY


def options(out: Path, *, rehearse: bool) -> Options:
    return Options(out, Path("data"), Path("pictures"), 8.0, rehearse)


@pytest.mark.parametrize("part", PARTS)
def test_every_command_is_a_module_that_there_is(part: str, tmp_path: Path) -> None:
    for rehearse in (False, True):
        commands = PARTS[part](options(tmp_path, rehearse=rehearse))
        for module, *_ in commands.values():
            assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("name", SERVICES)
def test_every_file_of_tests_exists(name: str) -> None:
    assert (REPOSITORY / name).is_file()


@pytest.mark.parametrize("part", [part for part in PARTS if part != "tests"])
def test_a_gpu_that_is_not_there_is_an_error_but_for_a_rehearsal(part: str, tmp_path: Path) -> None:
    for rehearse, device in ((False, "cuda"), (True, "auto")):
        for command in PARTS[part](options(tmp_path, rehearse=rehearse)).values():
            assert command[command.index("--device") + 1] == device


def test_a_command_that_fails_is_named_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {"bad": ["json.tool", "absent.json"], "good": ["platform"]}
    monkeypatch.setitem(PARTS, "some", lambda _: commands)
    assert gpu.main(["some", "--rehearse", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "some-bad.log").read_text()
    assert (tmp_path / "some-good.log").read_text()
    out = capsys.readouterr().out
    assert "good: status 0" in out
    assert out.splitlines()[-1] == "failed: bad"


def test_what_does_not_end_in_time_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "LIMIT_S", 0.0)
    monkeypatch.setitem(PARTS, "some", lambda _: {"server": ["http.server", "0"]})
    assert gpu.main(["some", "--rehearse", "--out", str(tmp_path)]) == 1
    assert "server: no end in time" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_run_unless_as_a_rehearsal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["tests", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "--rehearse does without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["frogs"], "invalid choice: 'frogs'"), (["folder"], "the part folder needs --folder")],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
