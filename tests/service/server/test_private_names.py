"""The undocumented names of dependencies that `service/server/` relies on.

Upper bounds in pyproject.toml keep a new version out until this test has passed with it.
"""

import asyncio
import inspect
from typing import Any

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

CALLED = (
    *("connection_made", "connection_lost", "on_message_begin", "on_headers_complete"),
    *("on_message_complete", "timeout_keep_alive_handler", "shutdown"),
)
OF_A_CONNECTION = (
    *("app", "connections", "cycle", "expect_100_continue", "flow", "headers", "loop", "parser"),
    *("pipeline", "scope", "transport"),
)
OF_A_CYCLE = (
    *("disconnected", "keep_alive", "message_event", "response_complete", "response_started"),
    "scope",
)
OF_A_SERVER = ("capture_signals", "run", "server_state", "should_exit", "shutdown", "started")


def missing(names: tuple[str, ...], owner: object) -> list[str]:
    return [name for name in names if not hasattr(owner, name)]


def test_uvicorn_has_the_names_that_the_protocol_relies_on() -> None:
    where = "uvicorn changed {}: see service/server/protocol.py"
    protocol: Any = httptools_impl.HttpToolsProtocol
    assert missing(CALLED, protocol) == [], where.format("HttpToolsProtocol")
    parameters = list(inspect.signature(protocol).parameters)
    assert parameters == ["config", "server_state", "app_state", "_loop"], where.format(
        "HttpToolsProtocol()"
    )

    async def scenario() -> None:
        config = uvicorn.Config(lambda *_: None, log_config=None, ws="none", lifespan="off")
        connection = protocol(config, ServerState(), {})
        assert missing(OF_A_CONNECTION, connection) == [], where.format("HttpToolsProtocol")
        connection.on_message_begin()
        assert connection.url == b"", where.format("HttpToolsProtocol.url")
        assert connection.scope["headers"] is connection.headers, where.format("its scope")

    asyncio.run(scenario())
    parameters = list(inspect.signature(httptools_impl.RequestResponseCycle).parameters)
    cycle: Any = httptools_impl.RequestResponseCycle(*parameters)  # type: ignore[arg-type]
    assert missing(OF_A_CYCLE, cycle) == [], where.format("RequestResponseCycle")
    assert hasattr(FlowControl(cycle), "read_paused"), where.format("FlowControl")


def test_uvicorn_has_the_names_that_the_server_relies_on() -> None:
    where = "uvicorn changed {}: see service/server/process.py"
    server = uvicorn.Server(uvicorn.Config(lambda *_: None, log_config=None, ws="none"))
    assert missing(OF_A_SERVER, server) == [], where.format("Server")
    assert server.server_state.connections == set(), where.format("ServerState.connections")
    assert inspect.iscoroutinefunction(server.startup), where.format("Server.startup")
    assert inspect.iscoroutinefunction(server.shutdown), where.format("Server.shutdown")


def test_httptools_has_the_errors_that_the_protocol_handles() -> None:
    message = "httptools changed its errors: see service/server/protocol.py"
    assert issubclass(httptools.HttpParserCallbackError, httptools.HttpParserError), message
    assert issubclass(httptools.HttpParserUpgrade, Exception), message
    assert issubclass(httptools.HttpParserInvalidURLError, httptools.HttpParserError), message


def test_httptools_says_where_a_request_with_an_upgrade_continues() -> None:
    message = "httptools changed HttpParserUpgrade: see service/server/protocol.py"
    parser = httptools.HttpRequestParser(object())
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    head = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\n"
    with pytest.raises(httptools.HttpParserUpgrade) as found:
        parser.feed_data(memoryview(head + b"a"))
    assert found.value.args == (len(head),), message


@pytest.mark.parametrize(
    ("head", "text"),
    [(b"GET / / HTTP/1.1\r\n", "Expected HTTP/"), (b"PRI * HTTP/2.0\r\n", "Pause on PRI/Upgrade")],
)
def test_httptools_has_the_messages_that_the_protocol_replaces(head: bytes, text: str) -> None:
    with pytest.raises(httptools.HttpParserError, match=f"^{text}"):
        httptools.HttpRequestParser(object()).feed_data(head + b"\r\nSM\r\n\r\n")
