import asyncio
import threading
from collections.abc import Iterator

import pytest

from service.encoding.timeslice import IncrementalEncoder, TimeSlicedEncoder

SMALL, LARGE = 64 * 28 * 28, 1024 * 28 * 28  # pixels


@pytest.fixture
def encoder() -> Iterator[TimeSlicedEncoder]:
    found = TimeSlicedEncoder(1)
    yield found
    found.close()


def test_small_images_are_encoded_at_once_and_large_ones_on_another_thread(
    encoder: TimeSlicedEncoder,
) -> None:
    def current_thread() -> bytes:
        return threading.current_thread().name.encode()

    async def main() -> None:
        assert await encoder.run(current_thread, SMALL) == current_thread()
        assert await encoder.run(current_thread, LARGE) != current_thread()

    asyncio.run(main())


def test_large_encoders_yield_to_the_event_loop_and_run_one_after_the_other(
    encoder: TimeSlicedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def steps(name: str) -> IncrementalEncoder:
        for _ in range(3):
            seen.append(name)
            yield
        return name.encode()

    async def main(pixels: int) -> None:
        tasks = [asyncio.ensure_future(encoder.run(steps(name), pixels)) for name in ("a", "b")]
        for _ in range(20):
            await asyncio.sleep(0)
            seen.append("-")
        assert [await task for task in tasks] == [b"a", b"b"]

    monkeypatch.setattr("service.encoding.timeslice.TIME_SLICE_S", 1e-9)
    asyncio.run(main(LARGE))
    order = "".join(seen)
    assert order.replace("-", "") == "aaabbb"
    assert "aa" not in order

    seen.clear()
    asyncio.run(main(SMALL))
    assert "".join(seen).startswith("aaabbb")
