from pathlib import Path

import pytest

from service.keys import parse_keys, read_keys
from service.settings import parse_settings
from tests.support.serving import refused

SECRET = "s3cret-s3cret-s3cret"
OTHER = "0ther.0ther.0ther.0ther"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEYS", "API_KEYS_FILE", "IMAGES_PER_SECOND"):
        monkeypatch.delenv(f"CGAN_{name}", raising=False)


def test_keys_of_an_option_and_of_a_file_are_kept_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the lab\n\n  carol:{'c' * 16}:0.5  \r\n")
    monkeypatch.setenv("CGAN_API_KEYS", f"alice:{SECRET},bob:{OTHER}:200")
    keys = parse_settings(["--api-keys-file", str(file)]).keys
    assert [(key.name, key.images_per_second) for key in keys] == [
        ("alice", None),
        ("bob", 200.0),
        ("carol", 0.5),
    ]


def test_settings_hold_no_secret() -> None:
    settings = parse_settings(["--api-keys", f"alice:{SECRET}"])
    for shown in (repr(settings), str(settings), str(vars(settings))):
        assert SECRET not in shown
    assert "alice" in repr(settings)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (SECRET, "name:secret"),
        (f"alice:{SECRET}:1:2", "name:secret"),
        (f"al ice:{SECRET}", "the name must be"),
        (f"alice\n:{SECRET}", "the name must be"),
        (f":{SECRET}", "the name must be"),
        (f"{'a' * 65}:{SECRET}", "the name must be"),
        (f"alice:{SECRET[:15]}", "at least 16"),
        (f"alice:{SECRET} x", "at least 16"),
        (f"alice:{SECRET}é", "at least 16"),
        (f"alice:{SECRET}:", "number above 0"),
        (f"alice:{SECRET}:0", "number above 0"),
        (f"alice:{SECRET}:nan", "number above 0"),
        (f"alice:{SECRET}:inf", "number above 0"),
    ],
)
def test_a_malformed_key_is_named_by_number_without_its_secret(
    text: str, cause: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^key 2: .*{cause}") as caught:
        parse_keys(f"bob:{OTHER},{text}")
    assert SECRET[:10] not in str(caught.value)
    if "\n" in text:
        return
    file = tmp_path / "keys"
    file.write_text(f"# comment\nbob:{OTHER}\n{text}\n")
    with pytest.raises(ValueError, match=rf"keys': line 3: .*{cause}") as caught:
        read_keys(file)
    assert SECRET[:10] not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n"])
def test_a_file_without_a_key_is_rejected(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ValueError, match="found no API key"):
        read_keys(file)


def test_a_service_does_not_start_with_a_malformed_file_and_names_the_line(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"alice:{SECRET}\nbob:{OTHER}".encode() + b"\xff\n")
    message = refused("--api-keys-file", str(file))
    assert message.startswith("--api-keys-file (or CGAN_API_KEYS_FILE): ")
    assert "line 2: " in message
    assert message.count("\n") == 1
    assert SECRET not in message
    assert OTHER not in message
    assert "cannot be read" in refused("--api-keys-file", str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        (f"alice:{SECRET},alice:{OTHER}", "two API keys have the name 'alice'"),
        (f"alice:{SECRET},bob:{SECRET}", "the API keys 'alice' and 'bob' have the same secret"),
    ],
)
def test_keys_with_the_same_name_or_secret_are_rejected(keys: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as caught:
        parse_settings(["--api-keys", keys])
    assert SECRET not in str(caught.value)


def test_a_limit_without_keys_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^--images-per-second .*--api-keys"):
        parse_settings(["--images-per-second", "5"])


def test_help_shows_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CGAN_API_KEYS", f"alice:{SECRET}")
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    assert SECRET not in capsys.readouterr().out
