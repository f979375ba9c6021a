import socket
import sys
from pathlib import Path

import pytest

from service.settings import (
    RENAMED,
    FetchSettings,
    Settings,
    VerifySettings,
    parse,
    parse_settings,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CGAN_{name.upper()}", raising=False)


def test_a_newcomer_is_served_the_bundled_models_on_port_8000() -> None:
    settings = parse_settings([])
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.models / "mnist.safetensors").exists()


@pytest.mark.parametrize("other", ["workers", "unix_socket"])  # not both at once
def test_every_option_is_a_flag_and_a_variable(
    other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"bob:{'b' * 16}\n")
    values = {
        "host": "0.0.0.0",
        "port": "81",
        "models": "elsewhere",
        "root_path": "/images",
        "default_model": "mine",
        "openai_unknown_model": "default",
        "workers": "3",
        "unix_socket": "/run/cgan.sock",
        "device": "cpu",
        "dtype": "float32",
        "max_batch": "16",
        "max_queue_images": "2048",
        "timeout_s": "0.5",
        "self_test_interval_s": "2.5",
        "client_timeout_s": "2.5",
        "max_connections": "100",
        "drain_delay_s": "3",
        "metrics_port": "9100",
        "api_keys": f"alice:{'a' * 16}",
        "api_keys_file": str(keys),
        "images_per_second": "2.5",
        "burst_images": "100",
        "otlp_endpoint": "http://collector:4318",
        "log_level": "error",
    }
    assert values.keys() == Settings.model_fields.keys()
    del values[other]
    flags = [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", v)]
    from_flags = parse_settings(flags)
    for name, value in values.items():
        monkeypatch.setenv(f"CGAN_{name.upper()}", value)
    assert parse_settings([]) == from_flags
    assert from_flags.models == Path("elsewhere")
    assert from_flags.max_batch == 16


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGAN_PORT", "9000")
    assert parse_settings(["--port", "9001"]).port == 9001


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--port", "70000", "65535"),
        ("--port", "http", "integer"),
        ("--workers", "0", "auto or a number from 1 to 256"),
        ("--workers", "257", "auto or a number from 1 to 256"),
        ("--workers", "many", "auto or a number from 1 to 256"),
        ("--max-batch", "0", "1"),
        ("--max-queue-images", "10", "1024"),
        ("--timeout-s", "-1", "0.001"),
        ("--client-timeout-s", "0.5", "1"),
        ("--max-connections", "0", "1"),
        ("--drain-delay-s", "-1", "0"),
        ("--metrics-port", "-1", "0"),
        ("--images-per-second", "0", "greater than 0"),
        ("--burst-images", "0", "1"),
        ("--dtype", "int4", "'auto', 'float32', 'bfloat16' or 'int8'"),
        ("--log-level", "loud", "'debug'"),
        ("--root-path", "images/", "such as /images"),
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


@pytest.mark.parametrize(
    "host", ["[::]", "unix:/x", "host.invalid", "127.0.0.1:80", "http://localhost", "", "a" * 64]
)
def test_a_host_that_does_not_resolve_is_named_with_what_is_allowed(host: str) -> None:
    with pytest.raises(ValueError, match=r"^--host \(or CGAN_HOST\): ") as caught:
        parse_settings(["--host", host])
    assert f"{host!r} does not resolve to an address; expected an address" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "localhost"])
def test_a_host_may_be_an_address_or_a_name(host: str) -> None:
    assert parse_settings(["--host", host]).host == host


def test_the_port_of_the_metrics_is_another_one() -> None:
    with pytest.raises(ValueError, match=r"--metrics-port .*must differ from --port, .* 9000 too$"):
        parse_settings(["--port", "9000", "--metrics-port", "9000"])
    assert parse_settings(["--port", "0", "--metrics-port", "0"]).metrics_port == 0
    options = ["--unix-socket", "/run/cgan.sock", "--port", "9000", "--metrics-port", "9000"]
    assert parse_settings(options).metrics_port == 9000


def test_several_processes_are_refused_on_systems_that_cannot_share_a_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for system in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        assert parse_settings(["--workers", "1"]).workers == 1
        assert parse_settings([]).workers == "auto"
        with pytest.raises(ValueError, match=r"--workers .*on Linux only; .* auto or 1 .*not 2$"):
            parse_settings(["--workers", "2"])


def test_a_unix_socket_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/" + 106 * "x"
    assert parse_settings(["--unix-socket", path]).unix_socket == Path(path)
    with pytest.raises(ValueError, match=r"--unix-socket .*: must be at most 107 bytes long, not"):
        parse_settings(["--unix-socket", path + "x"])
    with pytest.raises(
        ValueError, match=r"--unix-socket .*: one process .*expected --workers auto or 1"
    ):
        parse_settings(["--unix-socket", path, "--workers", "2"])
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(ValueError, match=r"--unix-socket .* on this system; use --host and --port"):
        parse_settings(["--unix-socket", path])


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
    assert "CGAN_METRICS_PORT" in text
    for old in RENAMED:
        assert f"--{old.replace('_', '-')} " not in text


RENAMED_VALUES = {
    "weights": ("elsewhere", Path("elsewhere")),
    "max_queue": ("2048", 2048),
    "timeout_ms": ("500", 0.5),
    "self_check_s": ("2.5", 2.5),
    "drain_delay_ms": ("3000", 3.0),
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_accepted_with_one_warning(
    old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, value = RENAMED_VALUES[old]
    new, _ = RENAMED[old]
    flag, new_flag = (f"--{name.replace('_', '-')}" for name in (old, new))
    warnings: list[str] = []
    for settings in (
        parse(Settings, [flag, given], warn=warnings.append),
        parse(Settings, [f"{flag}={given}"], warn=warnings.append),
    ):
        assert getattr(settings, new) == value
    assert warnings == 2 * [
        f"{flag} is deprecated and will be removed in the next release; use {new_flag}"
    ]
    monkeypatch.setenv(f"CGAN_{old.upper()}", given)
    warnings.clear()
    assert getattr(parse(Settings, [], warn=warnings.append), new) == value
    assert warnings == [
        f"CGAN_{old.upper()} is deprecated and will be removed in the next release; "
        f"use CGAN_{new.upper()}"
    ]


def test_a_new_name_wins_over_an_old_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGAN_TIMEOUT_MS", "500")
    assert parse_settings(["--timeout-s", "2"]).timeout_s == 2.0
    monkeypatch.setenv("CGAN_TIMEOUT_S", "3")
    assert parse_settings([]).timeout_s == 3.0


def test_a_wrong_value_under_an_old_name_is_reported_under_the_new_one() -> None:
    with pytest.raises(ValueError, match=r"--timeout-s .*not 'soon'"):
        parse_settings(["--timeout-ms", "soon"])
    with pytest.raises(ValueError, match=r"--timeout-s .*not '700.0'"):
        parse_settings(["--timeout-ms", "700000"])


def test_the_options_of_verify_have_no_port(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(VerifySettings, ["x.png", "--port", "1"])
    assert "--port" in capsys.readouterr().err
    assert parse(VerifySettings, ["x.png", "--weights", "w"]).models == Path("w")


def test_a_required_option_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--out \(or CGAN_OUT\): is required$"):
        parse(FetchSettings, ["http://localhost/dataset?seed=0"])
