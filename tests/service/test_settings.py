from pathlib import Path

import pytest

from service.settings import Settings, parse_settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CGAN_{name.upper()}", raising=False)


def test_a_newcomer_is_served_the_bundled_models_on_port_8000() -> None:
    settings = parse_settings([])
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.weights / "mnist.safetensors").exists()


def test_every_option_is_a_flag_and_a_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"bob:{'b' * 16}\n")
    values = {
        "host": "0.0.0.0",
        "port": "81",
        "weights": "elsewhere",
        "default_model": "mine",
        "workers": "3",
        "device": "cpu",
        "dtype": "float32",
        "max_batch": "16",
        "max_queue": "2048",
        "timeout_ms": "500",
        "self_check_s": "2.5",
        "client_timeout_s": "2.5",
        "max_connections": "100",
        "drain_delay_ms": "3000",
        "metrics_port": "9100",
        "api_keys": f"alice:{'a' * 16}",
        "api_keys_file": str(keys),
        "images_per_second": "2.5",
        "burst_images": "100",
        "otlp_endpoint": "http://collector:4318",
        "log_level": "error",
    }
    assert values.keys() == Settings.model_fields.keys()
    flags = [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", v)]
    from_flags = parse_settings(flags)
    for name, value in values.items():
        monkeypatch.setenv(f"CGAN_{name.upper()}", value)
    assert parse_settings([]) == from_flags
    assert from_flags.weights == Path("elsewhere")
    assert from_flags.max_batch == 16


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGAN_PORT", "9000")
    assert parse_settings(["--port", "9001"]).port == 9001


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--port", "70000", "65535"),
        ("--port", "http", "integer"),
        ("--workers", "0", "1"),
        ("--max-batch", "0", "1"),
        ("--max-queue", "10", "1024"),
        ("--timeout-ms", "-1", "1"),
        ("--client-timeout-s", "0.5", "1"),
        ("--max-connections", "0", "1"),
        ("--drain-delay-ms", "-1", "0"),
        ("--metrics-port", "-1", "0"),
        ("--images-per-second", "0", "greater than 0"),
        ("--burst-images", "0", "1"),
        ("--dtype", "int8", "'auto', 'float32' or 'bfloat16'"),
        ("--log-level", "loud", "'debug'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(flag: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=flag) as caught:
        parse_settings([flag, value])
    message = str(caught.value)
    assert repr(value) in message
    assert allowed in message
    assert f"CGAN_{flag[2:].replace('-', '_').upper()}" in message
    assert "\n" not in message


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"--port.*\n--max-batch"):
        parse_settings(["--port", "-1", "--max-batch", "-1"])


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(["--prot", "1"])
    assert caught.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "default: 8000" in text
    assert "CGAN_MAX_BATCH" in text
