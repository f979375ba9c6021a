"""The batcher: admission, batches, deadlines, failures and the end."""

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from service.inference import batcher as batcher_module
from service.inference.batcher import DEADLINE_UTILISATION, Batcher
from service.inference.errors import (
    CorruptRows,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    ForwardFailed,
    OutOfMemory,
    Overloaded,
)
from service.inference.latents import RowOptions, SamplingOptions
from service.inference.scheduling import (
    MIN_SPLIT_ROWS,
    ROWS_PER_WAITING_REQUEST,
    SMALL_REQUEST_ROWS,
    TARGET_FORWARD_S,
    GenerationResult,
    PendingRequest,
)
from tests.support.engines import EngineStub, Row, paint_rows

T = TypeVar("T")

TIMEOUT_S = 30.0  # a hung test fails by it; no test passes by it
POISON = 666  # the label that makes a forward fail
CORRUPT = 667  # the label of rows that are not finite


class Gate:
    """Holds every forward that reaches it until it is opened for one more."""

    def __init__(self) -> None:
        self.begun: list[list[Row]] = []
        self._entered = threading.Semaphore(0)
        self._opened = threading.Semaphore(0)

    def hold(self, batch: list[Row]) -> None:
        self.begun.append(batch)
        self._entered.release()
        assert self._opened.acquire(timeout=TIMEOUT_S)

    async def entered(self) -> None:
        """Wait until one more forward is held."""
        assert await asyncio.to_thread(self._entered.acquire, timeout=TIMEOUT_S)

    def open(self, forwards: int = 1) -> None:
        self._opened.release(forwards)


class FakeEngine(EngineStub):
    """Checks its thread and its arguments, stops at a gate, and fails on poisoned rows."""

    def __init__(self, max_batch: int = 64, gate: Gate | None = None) -> None:
        super().__init__(max_batch)
        self.gate = gate
        self.thread = "engine"

    def __call__(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> NDArray[np.uint8]:
        assert threading.current_thread().name == self.thread
        assert seeds.dtype == np.uint64
        assert indices.dtype == labels.dtype == np.int64
        pixels = super().__call__(seeds, indices, labels, row_options)
        if self.gate is not None:
            self.gate.hold(self.batches[-1])
        if POISON in labels:
            raise ArithmeticError("poisoned")
        return pixels


@dataclass
class Recorder:
    """An observer that keeps its calls."""

    batches: list[tuple[int, float]] = field(default_factory=list)

    wasted_rows: int = 0

    def batch(self, rows: int, forward_s: float) -> None:
        self.batches.append((rows, forward_s))

    def wasted(self, rows: int) -> None:
        self.wasted_rows += rows


class FakeClock:
    """Stands in for perf_counter: time passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TimedEngine(FakeEngine):
    """Takes `fixed_s + rows * row_s` of a fake clock per forward."""

    def __init__(
        self, clock: FakeClock, max_batch: int = 64, *, row_s: float = 0.0, fixed_s: float = 0.0
    ) -> None:
        super().__init__(max_batch)
        self.clock, self.row_s, self.fixed_s = clock, row_s, fixed_s

    def __call__(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> NDArray[np.uint8]:
        pixels = super().__call__(seeds, indices, labels)
        self.clock.now_s += self.fixed_s + len(seeds) * self.row_s
        return pixels


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(batcher_module, "perf_counter", clock)
    return clock


def run(
    scenario: Callable[[Batcher], Awaitable[T]],
    *,
    max_queue: int = 1024,
    timeout_s: float = TIMEOUT_S,
    observer: Recorder | None = None,
) -> T:
    """Run a scenario on an event loop, with a batcher that is drained after it."""

    async def main() -> T:
        mishaps: list[dict[str, Any]] = []  # what asyncio would only have logged
        asyncio.get_running_loop().set_exception_handler(lambda _, what: mishaps.append(what))
        batcher = Batcher(max_queue, timeout_s, observer or Recorder())
        batcher.start()
        result = await scenario(batcher)
        assert batcher.queued_rows == 0
        await asyncio.wait_for(batcher.close(), TIMEOUT_S)
        assert not engine_threads()
        assert not mishaps
        return result

    return asyncio.run(main())


def engine_threads() -> list[threading.Thread]:
    """Return the engine threads of this module's batchers."""
    running = [thread for thread in threading.enumerate() if thread.name == "engine"]
    return [thread for thread in running if thread not in OTHERS]


OTHERS: set[threading.Thread] = set()  # of services that other modules of this process share


@pytest.fixture(autouse=True, scope="module")
def _others() -> None:
    OTHERS.update(engine_threads())


def rows_of(seed: int, n: int, label: int = 7) -> list[Row]:
    return [(seed, index, label) for index in range(n)]


async def submit(
    batcher: Batcher, engine: FakeEngine, seed: int, n: int = 1, label: int = 7
) -> GenerationResult:
    rows = np.full(n, seed, np.uint64), np.arange(n), np.full(n, label)
    return await batcher.wait(batcher.admit(engine, *rows))


async def admitted(
    request: Coroutine[None, None, GenerationResult],
) -> "asyncio.Task[GenerationResult]":
    """Start a request and return when it is admitted or rejected, which takes no waiting."""
    task = asyncio.create_task(request)
    await asyncio.sleep(0)
    return task


async def let_pass(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the clock of the event loop forward, and let it do what has become due."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + seconds)
    for _ in range(3):
        await asyncio.sleep(0)


def columns(rows: list[Row]) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    seeds, indices, labels = zip(*rows, strict=True)
    return np.array(seeds, np.uint64), np.array(indices), np.array(labels)


def assert_is_own(answer: GenerationResult, rows: list[Row]) -> None:
    np.testing.assert_array_equal(answer.pixels, paint_rows(*columns(rows)))
    assert answer.pixels.dtype == np.uint8


# Batches


def test_an_idle_engine_starts_at_once_with_the_requests_that_wait() -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        lone = await admitted(submit(batcher, engine, 1))
        await gate.entered()  # nothing else was submitted, and no clock was involved
        assert engine.batches == [rows_of(1, 1)]
        assert batcher.queued_rows == 0
        gate.open()
        assert_is_own(await lone, rows_of(1, 1))

    run(scenario)


def test_requests_that_arrive_during_a_forward_share_a_batch() -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0))]
        await gate.entered()
        tasks += [await admitted(submit(batcher, engine, seed, n=seed)) for seed in (1, 2, 3)]
        assert batcher.queued_rows == 6
        gate.open(2)
        answers = await asyncio.gather(*tasks)
        assert engine.batches == [rows_of(0, 1), rows_of(1, 1) + rows_of(2, 2) + rows_of(3, 3)]
        for seed, answer in enumerate(answers):
            assert_is_own(answer, rows_of(seed, max(seed, 1)))

    run(scenario)


def test_an_engine_gets_the_options_of_the_rows_that_have_any() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=8, gate=gate)
    options = SamplingOptions(truncation=0.5)
    numbers = np.arange(12)

    async def scenario(batcher: Batcher) -> None:
        first = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        seeds = np.full(12, 2, np.uint64)
        plain = await admitted(submit(batcher, engine, 1, n=3))
        request = batcher.admit(engine, seeds, numbers, numbers, options=options)
        gate.open(3)
        await asyncio.gather(first, plain, batcher.wait(request))

    run(scenario)
    assert engine.sizes == [1, 8, 7]
    assert engine.row_options == [
        [],
        [(slice(3, 8), slice(0, 5), options)],
        [(slice(0, 7), slice(5, 12), options)],
    ]


def test_a_batch_never_exceeds_the_engines_maximum() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=8, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0))]
        await gate.entered()
        tasks += [await admitted(submit(batcher, engine, seed, n=3)) for seed in range(1, 7)]
        gate.open(4)
        await asyncio.gather(*tasks)
        assert engine.sizes == [1, 8, 8, 2]

    run(scenario)


def test_a_lone_large_request_is_split_into_batches_of_the_target_duration(
    clock: FakeClock,
) -> None:
    engine = TimedEngine(clock, row_s=TARGET_FORWARD_S / 32.5)

    async def scenario(batcher: Batcher) -> None:
        assert_is_own(await submit(batcher, engine, 1, n=150), rows_of(1, 150))

    run(scenario)
    # Before any measurement it is 16 rows, and no small remainder is left.
    assert engine.sizes == [SMALL_REQUEST_ROWS, 48, 48, 38]


def test_a_lone_request_that_is_not_large_is_not_split_however_slow_the_engine_is(
    clock: FakeClock,
) -> None:
    engine = TimedEngine(clock, row_s=TARGET_FORWARD_S)

    async def scenario(batcher: Batcher) -> None:
        for _ in range(2):
            await submit(batcher, engine, 1, n=MIN_SPLIT_ROWS)
        await submit(batcher, engine, 1, n=MIN_SPLIT_ROWS + 1)

    run(scenario)
    assert engine.sizes == [
        MIN_SPLIT_ROWS,
        MIN_SPLIT_ROWS,
        SMALL_REQUEST_ROWS,
        MIN_SPLIT_ROWS + 1 - SMALL_REQUEST_ROWS,
    ]


def test_batches_of_a_lone_request_grow_where_even_the_smallest_takes_long(
    clock: FakeClock,
) -> None:
    """A request that arrives during a batch waits for at most twice the least."""
    fixed_s = 2 * TARGET_FORWARD_S
    engine = TimedEngine(clock, max_batch=256, fixed_s=fixed_s, row_s=fixed_s / 64)

    async def scenario(batcher: Batcher) -> None:
        await submit(batcher, engine, 1)
        await submit(batcher, engine, 1, n=1024)

    run(scenario)
    longest = max(engine.sizes)
    assert longest > 2 * SMALL_REQUEST_ROWS
    assert fixed_s + longest * engine.row_s < 2.5 * (fixed_s + SMALL_REQUEST_ROWS * engine.row_s)


@pytest.mark.parametrize(
    ("waiting", "size"),
    [(1, SMALL_REQUEST_ROWS), (2, SMALL_REQUEST_ROWS), (9, 9 * ROWS_PER_WAITING_REQUEST)],
)
def test_batches_grow_with_the_requests_that_wait_and_not_with_their_rows(
    clock: FakeClock, waiting: int, size: int
) -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=256, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0))]
        await gate.entered()
        tasks += [
            await admitted(submit(batcher, engine, seed, n=90)) for seed in range(1, waiting + 1)
        ]
        gate.open(1 + 90 * waiting)
        await asyncio.gather(*tasks)

    run(scenario)
    assert engine.sizes[1] == size


def test_a_small_request_goes_before_what_is_left_of_a_large_one() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=SMALL_REQUEST_ROWS, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        large = await admitted(submit(batcher, engine, 1, n=5 * SMALL_REQUEST_ROWS))
        await gate.entered()
        small = await admitted(submit(batcher, engine, 2))
        gate.open(2)
        assert_is_own(await small, rows_of(2, 1))
        assert not large.done()
        gate.open(4)
        assert_is_own(await large, rows_of(1, 5 * SMALL_REQUEST_ROWS))

    run(scenario)
    assert (
        engine.batches[1]
        == rows_of(2, 1)
        + rows_of(1, 5 * SMALL_REQUEST_ROWS)[SMALL_REQUEST_ROWS : 2 * SMALL_REQUEST_ROWS - 1]
    )


def test_small_requests_leave_half_of_every_batch_to_a_large_one() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=SMALL_REQUEST_ROWS, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0))]
        await gate.entered()
        tasks.append(await admitted(submit(batcher, engine, 1, n=3 * SMALL_REQUEST_ROWS)))
        tasks += [
            await admitted(submit(batcher, engine, 2, n=SMALL_REQUEST_ROWS)) for _ in range(9)
        ]
        gate.open(40)
        await asyncio.gather(*tasks)

    run(scenario)
    shares = [sum(row[0] == 1 for row in batch) for batch in engine.batches]
    assert shares[:8] == [0] + 6 * [SMALL_REQUEST_ROWS // 2] + [0]


def test_large_requests_are_served_in_the_order_of_arrival() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=SMALL_REQUEST_ROWS, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0))]
        await gate.entered()
        tasks += [
            await admitted(submit(batcher, engine, seed, n=2 * SMALL_REQUEST_ROWS))
            for seed in (1, 2)
        ]
        gate.open(5)
        await asyncio.gather(*tasks)

    run(scenario)
    assert [batch[0][0] for batch in engine.batches] == [0, 1, 1, 2, 2]


def test_two_engines_never_mix_in_a_batch_and_take_turns() -> None:
    gate = Gate()
    first, second = FakeEngine(max_batch=4, gate=gate), FakeEngine(max_batch=4, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, first, 1, n=14))]
        await gate.entered()
        tasks.append(await admitted(submit(batcher, second, 2, n=7)))
        gate.open(6)
        await asyncio.gather(*tasks)

    run(scenario)
    assert first.sizes == [4, 4, 4, 2]
    assert second.sizes == [4, 3]
    assert [batch[0][0] for batch in gate.begun] == [1, 1, 2, 1, 2, 1]
    assert all(len({row[0] for row in batch}) == 1 for batch in gate.begun)


def test_whole_answers_are_views_of_the_batch_and_split_ones_are_their_own() -> None:
    engine = FakeEngine(max_batch=4)

    async def scenario(batcher: Batcher) -> None:
        whole = await submit(batcher, engine, 1, n=4)
        split = await submit(batcher, engine, 2, n=5)
        assert whole.pixels.base is not None
        assert split.pixels.base is None

    run(scenario)


def test_the_times_of_an_answer_begin_at_admission_and_end_with_its_last_row(
    clock: FakeClock,
) -> None:
    gate = Gate()
    engine = TimedEngine(clock, max_batch=4, row_s=0.5)
    engine.gate = gate
    recorder = Recorder()

    async def scenario(batcher: Batcher) -> GenerationResult:
        blocker = await admitted(submit(batcher, engine, 0, n=4))
        await gate.entered()
        task = await admitted(submit(batcher, engine, 1, n=6))
        clock.now_s += 10.0
        gate.open(3)
        await blocker
        return await task

    answer = run(scenario, observer=recorder)
    assert (answer.queue_s, answer.forward_s) == (10.0 + 2.0, 2.0 + 1.0)
    assert recorder.batches == [(4, 10.0 + 2.0), (4, 2.0), (2, 1.0)]


# Admission


def test_rows_beyond_the_limit_are_rejected_and_not_queued() -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0, n=10))]  # an idle one takes max_queue
        await gate.entered()
        tasks.append(await admitted(submit(batcher, engine, 1, n=8)))
        with pytest.raises(Overloaded) as rejection:
            await submit(batcher, engine, 2, n=4)  # 12 rows; an eighth more is for small ones
        assert batcher.queued_rows == 8
        # Nothing was measured yet: all that is certain is that none waits beyond its deadline.
        assert rejection.value.retry_after_s == TIMEOUT_S
        tasks.append(await admitted(submit(batcher, engine, 3, n=2)))
        gate.open(2)
        await asyncio.gather(*tasks)

    run(scenario, max_queue=10)
    assert engine.sizes == [10, 10]


@pytest.mark.usefixtures("clock")
def test_requests_are_not_split_from_a_rejection_until_the_queue_is_empty() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=256, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0))]
        await gate.entered()
        tasks.append(await admitted(submit(batcher, engine, 1, n=100)))
        with pytest.raises(Overloaded):
            await submit(batcher, engine, 2, n=20)
        gate.open(2)
        await asyncio.gather(*tasks)
        engine.gate = None
        await submit(batcher, engine, 3, n=100)

    run(scenario, max_queue=110)
    assert engine.sizes[:3] == [1, 100, SMALL_REQUEST_ROWS]


def test_a_full_queue_says_when_there_will_be_room(clock: FakeClock) -> None:
    engine = TimedEngine(clock, max_batch=10, row_s=0.1)

    async def scenario(batcher: Batcher) -> float:
        await submit(batcher, engine, 0, n=10)  # measures 0.1 s per row
        engine.gate = gate = Gate()
        tasks = [await admitted(submit(batcher, engine, 1, n=10))]
        await gate.entered()
        tasks.append(await admitted(submit(batcher, engine, 2, n=18)))
        with pytest.raises(Overloaded) as rejection:
            await submit(batcher, engine, 3, n=7)
        gate.open(3)
        await asyncio.gather(*tasks)
        return rejection.value.retry_after_s

    # The batch of 10 that runs takes 1 s, and then 3 of the 18 must have made room: 22 may wait.
    assert run(scenario, max_queue=20) == pytest.approx(1.0 + 3 * 0.1)


def test_a_request_that_cannot_meet_its_deadline_is_rejected_with_a_time_to_retry(
    clock: FakeClock,
) -> None:
    engine = TimedEngine(clock, max_batch=10, row_s=1.0)

    async def scenario(batcher: Batcher) -> float:
        await submit(batcher, engine, 0, n=10)  # measures 1 s per row
        engine.gate = gate = Gate()
        tasks = [await admitted(submit(batcher, engine, 1, n=10))]
        await gate.entered()
        tasks.append(await admitted(submit(batcher, engine, 2, n=8)))
        clock.now_s += 4.0  # of the 10 s that the running batch takes
        with pytest.raises(Overloaded) as rejection:
            await submit(batcher, engine, 3, n=20)
        tasks.append(await admitted(submit(batcher, engine, 4, n=9)))  # 6 + 8 + 9 s: just fits
        gate.open(4)
        await asyncio.gather(*tasks)
        return rejection.value.retry_after_s

    # 6 s of the running batch, and 20 s of its own, of which small ones may take half the engine.
    assert run(scenario, timeout_s=30.0) == pytest.approx(6 + 2 * 20 - DEADLINE_UTILISATION * 30)


def test_each_engine_is_estimated_at_its_own_rate(clock: FakeClock) -> None:
    slow = TimedEngine(clock, max_batch=10, row_s=1.0)
    fast = TimedEngine(clock, max_batch=10, row_s=0.001)

    async def scenario(batcher: Batcher) -> None:
        await submit(batcher, slow, 0, n=10)
        await submit(batcher, fast, 0, n=10)
        fast.gate = gate = Gate()
        tasks = [await admitted(submit(batcher, fast, 1))]
        await gate.entered()
        tasks.append(await admitted(submit(batcher, fast, 2, n=500)))
        tasks.append(await admitted(submit(batcher, slow, 3, n=20)))
        with pytest.raises(Overloaded):
            await submit(batcher, slow, 4, n=25)
        gate.open(51)
        await asyncio.gather(*tasks)

    run(scenario, timeout_s=200.0)
    assert slow.sizes == [10, 10, 10]


@pytest.mark.parametrize("measured", [False, True])
def test_light_traffic_does_not_make_the_engine_look_slow(clock: FakeClock, measured: bool) -> None:
    engine = TimedEngine(clock, max_batch=10, fixed_s=1.0)  # as long for one row as for ten

    async def scenario(batcher: Batcher) -> None:
        if measured:
            await submit(batcher, engine, 0, n=10)
        for seed in range(20):
            await submit(batcher, engine, seed)  # 1 s per row, if that were what a row costs
        engine.gate = gate = Gate()
        tasks = [await admitted(submit(batcher, engine, 20))]
        await gate.entered()
        tasks += [await admitted(submit(batcher, engine, seed, n=50)) for seed in (21, 22)]
        gate.open(11)
        await asyncio.gather(*tasks)

    run(scenario, timeout_s=30.0)
    assert engine.sizes[-11:] == [1] + [10] * 10


def test_light_traffic_corrects_an_estimate_that_is_too_slow(clock: FakeClock) -> None:
    engine = TimedEngine(clock, max_batch=10, row_s=100.0)

    async def scenario(batcher: Batcher) -> None:
        await submit(batcher, engine, 0, n=10)  # a hiccup: 1000 s
        engine.row_s = 0.1
        for seed in range(1, 50):
            await submit(batcher, engine, seed)
        engine.gate = gate = Gate()
        tasks = [await admitted(submit(batcher, engine, 50))]
        await gate.entered()
        tasks += [await admitted(submit(batcher, engine, seed, n=10)) for seed in (51, 52)]
        gate.open(3)
        await asyncio.gather(*tasks)

    run(scenario, timeout_s=30.0)
    assert engine.sizes[-3:] == [1, 10, 10]


def test_the_time_between_two_forwards_counts_as_well(clock: FakeClock) -> None:
    class SlowRecorder(Recorder):
        def batch(self, rows: int, forward_s: float) -> None:
            clock.now_s += 3.0  # as if the event loop needed the core between two forwards

    gate = Gate()
    engine = TimedEngine(clock, max_batch=10, row_s=0.1)

    async def scenario(batcher: Batcher) -> None:
        await submit(batcher, engine, 0, n=100)
        engine.gate = gate
        tasks = [await admitted(submit(batcher, engine, 1))]
        await gate.entered()
        tasks.append(await admitted(submit(batcher, engine, 2)))
        with pytest.raises(Overloaded):  # 14 s by the forwards alone
            await submit(batcher, engine, 3, n=70)
        gate.open(2)
        await asyncio.gather(*tasks)

    run(scenario, timeout_s=50.0, observer=SlowRecorder())


def test_an_idle_batcher_tries_even_when_its_estimate_says_no(clock: FakeClock) -> None:
    engine = TimedEngine(clock, max_batch=10, row_s=100.0)

    async def scenario(batcher: Batcher) -> None:
        await submit(batcher, engine, 0, n=10)  # a hiccup: 1000 s
        engine.row_s = 0.001
        for seed in range(1, 100):
            await submit(batcher, engine, seed, n=10)
        await asyncio.gather(*(submit(batcher, engine, seed, n=10) for seed in range(100)))

    run(scenario, timeout_s=30.0)
    assert sum(engine.sizes) == 2000


@pytest.mark.parametrize(
    ("seeds", "indices"),
    [
        (np.zeros(2, np.int64), np.zeros(2, np.int64)),  # would widen its neighbours to float
        (np.zeros(2, np.uint64), np.zeros(3, np.int64)),
        (np.zeros(0, np.uint64), np.zeros(0, np.int64)),
        (np.zeros((1, 2), np.uint64), np.zeros((1, 2), np.int64)),
    ],
)
def test_rows_of_the_wrong_shape_or_type_are_an_error(
    seeds: NDArray[np.uint64], indices: NDArray[np.int64]
) -> None:
    engine = FakeEngine()

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(ValueError, match="expected uint64, int64, int64"):
            batcher.admit(engine, seeds, indices, np.zeros(seeds.shape, np.int64))

    run(scenario)
    assert engine.batches == []


# Requests that end early


def test_a_request_that_is_queued_at_its_deadline_is_never_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        running = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        queued = await admitted(submit(batcher, engine, 1, n=5))
        await let_pass(TIMEOUT_S / 2, monkeypatch)
        assert not queued.done()
        await let_pass(TIMEOUT_S / 2, monkeypatch)
        assert batcher.queued_rows == 0
        assert isinstance(queued.exception(), DeadlineExceeded)
        assert isinstance(running.exception(), DeadlineExceeded)  # in flight is late as well
        gate.open()

    run(scenario)
    assert engine.batches == [rows_of(0, 1)]


def test_the_rest_of_a_split_request_is_not_computed_after_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=4, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        split = await admitted(submit(batcher, engine, 1, n=9))
        await gate.entered()
        await let_pass(TIMEOUT_S, monkeypatch)
        assert batcher.queued_rows == 0
        assert isinstance(split.exception(), DeadlineExceeded)
        gate.open()

    run(scenario)
    assert engine.batches == [rows_of(1, 9)[:4]]


def test_a_deadline_needs_no_other_event_to_be_kept() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
            await submit(batcher, FakeEngine(gate=gate), 1)
        gate.open()

    run(scenario, timeout_s=0.05)


def test_cancelling_a_queued_request_frees_its_rows_for_another() -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        blocker = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        cancelled = await admitted(submit(batcher, engine, 1, n=10))
        with pytest.raises(Overloaded):
            await submit(batcher, engine, 2, n=2)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert batcher.queued_rows == 0
        other = await admitted(submit(batcher, engine, 3, n=10))
        gate.open(2)
        await blocker
        assert_is_own(await other, rows_of(3, 10))

    run(scenario, max_queue=10)
    assert engine.batches == [rows_of(0, 1), rows_of(3, 10)]


def test_cancelling_a_request_withdraws_its_queued_rows() -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        running = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        numbers = np.arange(5)
        request = batcher.admit(engine, np.zeros(5, np.uint64), numbers, numbers)
        waiting = await admitted(batcher.wait(request))
        assert batcher.queued_rows == 5
        request.future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert batcher.queued_rows == 0
        gate.open()
        await running

    run(scenario)
    assert engine.sizes == [1]


def test_cancelling_in_flight_leaves_the_neighbours_right() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=8, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        blocker = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        left = await admitted(submit(batcher, engine, 1, n=3))
        right = await admitted(submit(batcher, engine, 3, n=3))
        cancelled = await admitted(submit(batcher, engine, 2, n=9))  # two rows ride, seven wait
        gate.open()
        await blocker
        await gate.entered()
        assert batcher.queued_rows == 7
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert batcher.queued_rows == 0
        gate.open()
        assert_is_own(await left, rows_of(1, 3))
        assert_is_own(await right, rows_of(3, 3))

    run(scenario)
    assert engine.sizes == [1, 8]


# Failures


def test_a_failed_forward_rejects_its_own_requests_and_the_next_one_works() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=4, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        blocker = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        neighbour = await admitted(submit(batcher, engine, 1))
        poisoned = await admitted(submit(batcher, engine, 2, n=7, label=POISON))
        unharmed = await admitted(submit(batcher, engine, 3, n=4))
        gate.open(3)
        failures = await asyncio.gather(neighbour, poisoned, return_exceptions=True)
        assert_is_own(await blocker, rows_of(0, 1))
        assert_is_own(await unharmed, rows_of(3, 4))

        assert [type(failure) for failure in failures] == [ForwardFailed, ForwardFailed]
        assert failures[0] is not failures[1]
        for failure in failures:
            assert isinstance(failure, ForwardFailed)
            assert isinstance(failure.__cause__, ArithmeticError)
            assert "poisoned" not in str(failure)  # it may reach a client

    run(scenario)
    # Of the seven poisoned rows, the four that did not ride were dropped.
    assert engine.batches[1] == rows_of(1, 1) + rows_of(2, 3, POISON)
    assert engine.batches[2:] == [rows_of(3, 4)]


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((2, 2, 2, 3), np.float32),
        np.zeros((2, 12), np.uint8),
    ],
)
def test_an_engine_that_returns_the_wrong_array_fails_its_batch(wrong: NDArray[np.uint8]) -> None:
    class Wrong(FakeEngine):
        def __call__(
            self,
            seeds: NDArray[np.uint64],
            indices: NDArray[np.int64],
            labels: NDArray[np.int64],
            row_options: Sequence[RowOptions] = (),
        ) -> NDArray[np.uint8]:
            return wrong

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(ForwardFailed) as failure:
            await submit(batcher, Wrong(), 1, n=2)
        assert "expected uint8 (2, H, W, C)" in str(failure.value.__cause__)
        assert_is_own(await submit(batcher, FakeEngine(), 2), rows_of(2, 1))

    run(scenario)


def test_neither_a_success_nor_a_failure_keeps_a_replaced_engine_in_memory() -> None:
    async def scenario(batcher: Batcher) -> None:
        engine = FakeEngine()
        alive = weakref.ref(engine)
        await submit(batcher, engine, 1)
        try:
            await submit(batcher, engine, 2, label=POISON)
        except ForwardFailed as failure:
            assert isinstance(failure.__cause__, ArithmeticError)  # noqa: PT017
        del engine
        # A request to another engine follows the turn that may still have held this one.
        await submit(batcher, FakeEngine(), 3)
        assert alive() is None

    gc.collect()
    gc.disable()  # freed by reference counts alone, not whenever the collector comes by
    try:
        run(scenario)
    finally:
        gc.enable()


# The end


def test_draining_finishes_admitted_requests_and_rejects_others() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=4, gate=gate)

    async def scenario(batcher: Batcher) -> None:
        running = await admitted(submit(batcher, engine, 1, n=3))
        await gate.entered()
        waiting = await admitted(submit(batcher, engine, 2, n=6))
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await submit(batcher, engine, 3)
        assert not closing.done()
        assert engine_threads()
        gate.open(3)
        assert_is_own(await running, rows_of(1, 3))
        assert_is_own(await waiting, rows_of(2, 6))
        await closing
        assert not engine_threads()

    run(scenario)  # which closes it a second time
    assert engine.sizes == [3, 4, 2]


def test_closing_does_not_block_the_event_loop() -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        task = await admitted(submit(batcher, engine, 1))
        await gate.entered()
        closing = asyncio.create_task(batcher.close())
        for _ in range(3):
            await asyncio.sleep(0)  # the loop turns while the forward is held
        assert not closing.done()
        gate.open()
        await asyncio.gather(closing, task)

    run(scenario)


def test_a_batcher_that_was_never_started_takes_no_work_and_closes() -> None:
    async def main() -> None:
        batcher = Batcher(10, TIMEOUT_S, Recorder())
        with pytest.raises(Draining):
            await submit(batcher, FakeEngine(), 1)
        await batcher.close()

    asyncio.run(main())


def test_the_thread_ends_quietly_when_the_event_loop_closes_under_it() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=1, gate=gate)

    async def main() -> None:
        batcher = Batcher(10, TIMEOUT_S, Recorder())
        batcher.start()
        await admitted(submit(batcher, engine, 1, n=3))
        await gate.entered()

    asyncio.run(main())  # cancels the request and closes the loop, without draining
    (thread,) = engine_threads()
    gate.open()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()  # an exception in the thread would fail the test as a warning
    assert engine.sizes == [1]


# Faults


class FaultyEngine(FakeEngine):
    """Runs out of memory, marks corrupt rows, or loses its device."""

    def __init__(self, max_batch: int = 64, gate: Gate | None = None, *, memory_rows: int = 64):
        super().__init__(max_batch, gate)
        self.memory_rows = memory_rows
        self.lost = False

    def __call__(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> NDArray[np.uint8]:
        pixels = super().__call__(seeds, indices, labels)
        if self.lost:
            raise DeviceLost("the device fell off the bus")
        if len(seeds) > self.memory_rows:
            raise OutOfMemory(f"{len(seeds)} rows")
        corrupt = labels == CORRUPT
        if corrupt.any():
            raise CorruptRows(pixels, corrupt)
        return pixels


def test_a_batch_that_does_not_fit_the_memory_is_tried_again_as_two_halves() -> None:
    gate = Gate()
    engine = FaultyEngine(gate=gate, memory_rows=5)

    async def scenario(batcher: Batcher) -> None:
        tasks = [await admitted(submit(batcher, engine, 0))]
        await gate.entered()
        tasks += [await admitted(submit(batcher, engine, seed, n=3)) for seed in (1, 2, 3)]
        gate.open(4)
        for seed, answer in enumerate(await asyncio.gather(*tasks)):
            assert_is_own(answer, rows_of(seed, 3 if seed else 1))

    run(scenario)
    assert engine.sizes == [1, 9, 4, 5]


def test_a_half_that_does_not_fit_either_fails_alone() -> None:
    gate = Gate()
    engine = FaultyEngine(gate=gate, memory_rows=4)

    async def scenario(batcher: Batcher) -> None:
        blocker = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        lucky = await admitted(submit(batcher, engine, 1, n=2))
        unlucky = await admitted(submit(batcher, engine, 2, n=7))
        gate.open(4)
        await blocker
        assert_is_own(await lucky, rows_of(1, 2))
        with pytest.raises(ForwardFailed) as failure:
            await unlucky
        assert isinstance(failure.value.__cause__, OutOfMemory)

    recorder = Recorder()
    run(scenario, observer=recorder)
    assert engine.sizes == [1, 9, 4, 5]
    assert recorder.wasted_rows == 2  # of the unlucky one, in the first half


def test_a_corrupt_row_fails_its_own_request_only() -> None:
    gate = Gate()
    engine = FaultyEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        blocker = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        left = await admitted(submit(batcher, engine, 1, n=2))
        corrupt = await admitted(submit(batcher, engine, 2, n=2, label=CORRUPT))
        right = await admitted(submit(batcher, engine, 3, n=2))
        gate.open(2)
        await blocker
        assert_is_own(await left, rows_of(1, 2))
        assert_is_own(await right, rows_of(3, 2))
        with pytest.raises(ForwardFailed) as failure:
            await corrupt
        assert "2 of 6 rows are not finite" in str(failure.value.__cause__)

    recorder = Recorder()
    run(scenario, observer=recorder)
    assert recorder.wasted_rows == 2


def test_a_lost_device_rejects_everything_at_once_and_for_good() -> None:
    gate = Gate()
    engine, other = FaultyEngine(max_batch=4, gate=gate), FakeEngine()
    lost: list[DeviceLost] = []

    async def main() -> None:
        batcher = Batcher(1024, TIMEOUT_S, Recorder())
        batcher.start(lost.append)
        tasks = [await admitted(submit(batcher, engine, 1, n=9))]
        await gate.entered()
        tasks += [await admitted(submit(batcher, each, 2, n=5)) for each in (engine, other)]
        engine.lost = True
        gate.open()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, DeviceLost)
        assert batcher.queued_rows == 0
        with pytest.raises(DeviceLost, match="fell off the bus"):
            await submit(batcher, other, 3)
        await asyncio.wait_for(batcher.close(), TIMEOUT_S)

    asyncio.run(main())
    assert [str(each) for each in lost] == ["the device fell off the bus"]
    assert engine.sizes == [4]
    assert other.sizes == []


def test_rows_of_cancelled_requests_are_counted_as_wasted() -> None:
    gate = Gate()
    engine = FakeEngine(max_batch=4, gate=gate)
    recorder = Recorder()

    async def scenario(batcher: Batcher) -> None:
        cancelled = await admitted(submit(batcher, engine, 1, n=11))
        await gate.entered()
        gate.open()
        await gate.entered()  # four are done, four are under way, three wait
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert recorder.wasted_rows == 4
        gate.open()
        gate.open()
        await submit(batcher, engine, 2)

    run(scenario, observer=recorder)
    assert recorder.wasted_rows == 8
    assert engine.sizes == [4, 4, 1]


def test_a_request_may_allow_less_time_than_the_batcher(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    engine = FakeEngine(gate=gate)

    async def scenario(batcher: Batcher) -> None:
        running = await admitted(submit(batcher, engine, 0))
        await gate.entered()
        numbers = np.arange(2)
        requests = [
            batcher.admit(engine, np.zeros(2, np.uint64), numbers, numbers, timeout_s)
            for timeout_s in (1.0, 2.0, 10 * TIMEOUT_S)
        ]
        hurried, patient, stubborn = [await admitted(batcher.wait(each)) for each in requests]
        await let_pass(1.5, monkeypatch)
        assert isinstance(hurried.exception(), DeadlineExceeded)
        assert not patient.done()
        assert requests[2].timeout_s == TIMEOUT_S
        gate.open(2)
        await asyncio.gather(running, patient, stubborn)

    run(scenario)
    assert engine.sizes == [1, 4]


# Random sequences


class FakeThread:
    """A thread that a test runs when it chooses."""

    started: ClassVar[list["FakeThread"]] = []

    def __init__(self, target: Callable[[], None], name: str, daemon: bool) -> None:
        self.run = target

    def start(self) -> None:
        self.started.append(self)

    def join(self) -> None:
        pass


class BatcherStateMachine(RuleBasedStateMachine):
    """Random arrivals, cancellations, failures and deadlines, one step of either thread at a time.

    A rule runs each batch in place of the engine thread, so that the rules are all that happens.
    """

    MAX_QUEUE, MAX_BATCH, MEMORY_ROWS = 48, 12, 9

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.late_s = 0.0
        self.patch = pytest.MonkeyPatch()
        ticks = itertools.count()  # the same whenever an example is run
        self.patch.setattr(batcher_module, "perf_counter", lambda: 1e-6 * next(ticks))
        self.patch.setattr("service.inference.batcher.Thread", FakeThread)
        clock = self.loop.time
        self.loop.time = lambda: clock() + self.late_s  # type: ignore[method-assign]
        self.mishaps: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, what: self.mishaps.append(what))
        self.recorder = Recorder()
        self.engines = [
            FaultyEngine(self.MAX_BATCH, memory_rows=self.MEMORY_ROWS) for _ in range(2)
        ]
        for engine in self.engines:
            engine.thread = "MainThread"
        self.tasks: list[asyncio.Task[GenerationResult]] = []
        self.rows: list[list[Row]] = []
        self.deadlines: list[float] = []
        self.cancelled: set[int] = set()
        self.loop.run_until_complete(self.begin())

    async def begin(self) -> None:
        self.batcher = Batcher(self.MAX_QUEUE, 10.0, self.recorder)
        self.batcher.start()

    @rule(
        engine=st.integers(0, 1),
        n=st.one_of(st.integers(1, 4), st.integers(1, 40)),
        label=st.sampled_from([*range(8), POISON, CORRUPT]),
        timeout_s=st.sampled_from([1.0, 5.0, 10.0]),
    )
    def submit(self, engine: int, n: int, label: int, timeout_s: float) -> None:
        seed = len(self.tasks)
        bound = self.MAX_QUEUE + (self.MAX_QUEUE // 8 if n <= SMALL_REQUEST_ROWS else 0)
        seeds, labels = np.full(n, seed, np.uint64), np.full(n, label)

        async def admit() -> PendingRequest | None:
            try:
                request = self.batcher.admit(
                    self.engines[engine], seeds, np.arange(n), labels, timeout_s
                )
            except Overloaded:
                assert self.batcher.queued_rows + n > bound
                return None
            assert self.batcher.queued_rows <= bound
            return request

        request = self.loop.run_until_complete(admit())
        if request is None:
            return
        self.tasks.append(self.loop.create_task(self.batcher.wait(request)))
        self.rows.append(rows_of(seed, n, label))
        self.deadlines.append(self.late_s + timeout_s)
        self.round()

    @rule()
    def compute(self) -> None:
        self.batcher.run_next_batch()

    @rule()
    def round(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    @precondition(lambda self: self.tasks)
    @rule(number=st.integers(0, 99))
    def cancel(self, number: int) -> None:
        number %= len(self.tasks)
        if self.tasks[number].cancel():
            self.cancelled.add(number)
        self.round()

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def let_pass(self, seconds: float) -> None:
        self.late_s += seconds
        self.round()

    @invariant()
    def the_queue_keeps_its_bound(self) -> None:
        assert self.batcher.queued_rows <= self.MAX_QUEUE + self.MAX_QUEUE // 8

    def teardown(self) -> None:
        try:
            while self.batcher.queued_rows:  # every batch has at least one row
                self.compute()
            self.round()
            self.round()
            for seed in range(len(self.tasks)):
                self.check(seed)
            self.check_accounts()
            closing = self.loop.create_task(self.batcher.close())
            self.round()
            FakeThread.started[-1].run()
            self.loop.run_until_complete(closing)
            assert not self.mishaps
        finally:
            self.loop.close()
            self.patch.undo()

    def check(self, seed: int) -> None:
        """It was answered, with its own rows unless it had a reason not to be."""
        task, rows = self.tasks[seed], self.rows[seed]
        assert task.done()
        if task.cancelled():
            assert seed in self.cancelled
            return
        error = task.exception()
        if error is None:
            assert_is_own(task.result(), rows)
        elif isinstance(error, DeadlineExceeded):
            assert self.deadlines[seed] <= self.late_s + 1.0  # the clock itself runs on as well
        else:
            assert isinstance(error, ForwardFailed)
            batches = [each for engine in self.engines for each in engine.batches]
            own = [each for each in batches if any(row[0] == seed for row in each)]
            match error.__cause__:
                case OutOfMemory():
                    assert any(len(each) > self.MEMORY_ROWS for each in own)
                case CorruptRows():
                    assert rows[0][2] == CORRUPT
                case ArithmeticError():
                    assert any(row[2] == POISON for each in own for row in each)
                case other:
                    raise AssertionError(other)

    def check_accounts(self) -> None:
        """Every computed row was returned, or counted as wasted."""
        answered = sum(
            len(rows)
            for task, rows in zip(self.tasks, self.rows, strict=True)
            if not task.cancelled() and task.exception() is None
        )
        computed = sum(rows for rows, _ in self.recorder.batches)
        assert computed == answered + self.recorder.wasted_rows


BatcherStateMachine.TestCase.settings = settings(derandomize=True, max_examples=100, deadline=None)
TestBatcher = BatcherStateMachine.TestCase
