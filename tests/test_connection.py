import asyncio
from collections.abc import Callable
from typing import Any, cast

from service.connection import JoiningTransport
from tests.serving import ServiceProcess


class Transport:
    """Remembers what it is told to do."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def write_eof(self) -> None:
        self.calls.append("end")

    def resume_reading(self) -> None:
        self.calls.append("read on")

    def close(self) -> None:
        self.calls.append("close")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


def calls_after(act: Callable[[JoiningTransport], None]) -> list[object]:
    """What a transport was told to do one turn of the event loop after `act`."""

    async def scene() -> list[object]:
        transport = Transport()
        act(JoiningTransport(cast(Any, transport), asyncio.get_running_loop()))
        await asyncio.sleep(0)
        return transport.calls

    return asyncio.run(scene())


def test_what_is_written_in_one_turn_is_sent_together() -> None:
    def act(joining: JoiningTransport) -> None:
        for part in (b"head", b"body", b""):
            joining.write(part)

    assert calls_after(act) == [b"headbody"]


def test_closing_sends_first_what_is_left() -> None:
    def act(joining: JoiningTransport) -> None:
        joining.write(b"last words")
        joining.close()

    assert calls_after(act) == [b"last words", "read on", "end"]


def test_nothing_is_sent_after_the_end() -> None:
    def act(joining: JoiningTransport) -> None:
        joining.close()
        joining.close()
        joining.write(b"too late")
        assert joining.is_closing()

    assert calls_after(act) == ["read on", "end"]


def test_nothing_is_sent_to_a_client_that_has_gone() -> None:
    def act(joining: JoiningTransport) -> None:
        joining.write(b"too late")
        joining._transport.close()

    assert calls_after(act) == ["close"]


def test_all_else_is_the_transports_own() -> None:
    async def scene() -> object:
        joining = JoiningTransport(cast(Any, Transport()), asyncio.get_running_loop())
        return joining.get_extra_info("peername")

    assert asyncio.run(scene()) == "the peername"


def test_answers_of_one_connection_come_whole_and_in_order(service: ServiceProcess) -> None:
    for label in range(10):
        answer = service.client.post(f"/generate?label={label}&n=1000&seed=1&format=zip")
        assert len(answer.content) == int(answer.headers["Content-Length"])
        assert answer.content.startswith(b"PK")
