"""Who waits for the loop has it after the running step, in the order of asking: by a count of steps, not by a clock."""

import threading
from typing import Any

import pytest
import torch
from random_requests import tiny_model
from transformers import GenerationConfig

import hf_paged
from hf_paged.engine.turn_lock import TurnLock

pytestmark = pytest.mark.quick

CONFIG = GenerationConfig(max_new_tokens=100, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


class Gate:
    """A processor that stops the loop inside a step, and counts its steps."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.steps = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps == 5:
            self.reached.set()
            assert self.opened.wait(60)
        return scores


@pytest.fixture
def loaded(model):
    """An engine with 64 requests, in the middle of a step that does not end by itself; and that gate."""
    options = hf_paged.EngineConfig(num_pages=600, page_size=8, max_num_seqs=64, self_check=False)
    engine, gate = hf_paged.Engine(model, options), Gate()
    handles = [engine.submit([5, 6, n], generation_config=CONFIG) for n in range(3, 66)]
    handles.append(engine.submit([5, 6, 7], generation_config=CONFIG, logits_processor=[gate]))
    assert gate.reached.wait(60)
    yield engine, gate, handles
    gate.opened.set()
    engine.close()
    for handle in handles:
        handle.result(timeout_s=60)


def in_thread(function: Any) -> tuple[threading.Thread, list[Any]]:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(function()))
    thread.start()
    return thread, got


def asked(engine: hf_paged.Engine, count: int) -> None:
    """Wait until so many threads wait for the loop."""
    while len(engine.drive._waiting) < count:
        threading.Event().wait(0.001)


@pytest.mark.parametrize(
    "name", ["stats", "snapshot", "health", "submit", "cancel", "engine.cancel", "is_done", "repr"]
)
def test_what_waits_for_nothing_returns_inside_a_step(loaded, name):
    engine, _, handles = loaded
    calls = {
        "stats": engine.stats,
        "snapshot": engine.snapshot,
        "health": engine.health,
        "submit": lambda: handles.append(engine.submit([9, 8], generation_config=CONFIG)),
        "cancel": handles[3].cancel,
        "engine.cancel": lambda: engine.cancel(handles[4].request_id),
        "is_done": lambda: handles[5].is_done,
        "repr": lambda: repr(engine),
    }
    thread, got = in_thread(calls[name])
    thread.join(30)
    assert not thread.is_alive(), f"{name} waits for the step"
    if name == "stats":
        assert (got[0].running, got[0].waiting, got[0].rows) == (64, 0, 64)
        assert got[0].new_tokens >= 4 * 64
        engine.submit([9], generation_config=CONFIG)
        assert engine.stats().waiting == 1
    if name == "health":
        assert got[0].step_s > 0
    if name == "snapshot":
        assert {request.state for request in got[0].requests} == {"running"}
        assert len(got[0].requests) == 64


@pytest.mark.parametrize("name", ["close", "pause", "check", "drop_prefixes", "refresh_weights", "with"])
def test_what_needs_the_loop_has_it_within_two_steps(loaded, name):
    engine, gate, _ = loaded

    def leave() -> None:
        with pytest.raises(KeyError), engine:
            raise KeyError("mine")

    thread, _ = in_thread(leave if name == "with" else getattr(engine, name))
    asked(engine, 1)
    threading.Thread(target=gate.opened.set).start()
    thread.join(60)
    steps = gate.steps  # At once: nobody says that it must be read before the next step.
    assert not thread.is_alive()
    assert steps <= 5 + 2, f"{name} waited for {steps - 5} steps"


def test_in_the_order_of_asking(loaded):
    engine, gate, _ = loaded
    seen: list[tuple[int, int]] = []
    check = engine._core.check
    threads = []
    for number in range(6):

        def ask(number: int = number) -> None:
            with engine.drive:
                seen.append((number, gate.steps))
                check()

        thread = threading.Thread(target=ask)
        thread.start()
        threads.append(thread)
        asked(engine, number + 1)
    gate.opened.set()
    [thread.join(60) for thread in threads]
    assert seen == [(number, 5) for number in range(6)], "all of them before the next step"


def test_statistics_of_the_end_come_with_the_result(model):
    options = hf_paged.EngineConfig(num_pages=64, page_size=8, max_num_seqs=4, self_check=False)
    with hf_paged.Engine(model, options) as engine:
        for number in range(20):
            engine.submit([5, number + 3], generation_config=GenerationConfig(max_new_tokens=2)).result(timeout_s=60)
            stats = engine.stats()
            assert (stats.finished, stats.running, stats.rows) == ({"length": number + 1}, 0, 0)
            assert stats.pages_used == stats.pages_cached


def test_requests_right_behind_one_another_find_prefixes(model):
    """That the weights are the same is known before a result is: nobody can be too early with the next request."""
    options = hf_paged.EngineConfig(num_pages=64, page_size=8, max_num_seqs=4, self_check=False)
    with hf_paged.Engine(model, options) as engine:
        ids, settings = [*range(5, 30)], GenerationConfig(max_new_tokens=2, pad_token_id=0)
        found = [engine.submit(ids, generation_config=settings).result(timeout_s=60).cached_tokens for _ in range(30)]
    assert found == [0] + [24] * 29


# The lock itself


def test_a_lock_that_is_given_back_goes_to_who_asked_first():
    lock, order = TurnLock(), []
    lock.acquire()
    lock.acquire()
    threads = []
    for number in range(5):

        def ask(number: int = number) -> None:
            with lock, lock:
                order.append(number)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        while len(lock._waiting) <= number:
            threading.Event().wait(0.001)
    lock.release()
    assert order == []
    lock.release()
    [thread.join(30) for thread in threads]
    assert order == [0, 1, 2, 3, 4]


def test_who_waits_no_longer_is_passed_over(monkeypatch):
    lock = TurnLock()
    waits: list[str] = []

    class Interrupted:
        def __init__(self) -> None:
            self.taken = 0

        def acquire(self) -> None:
            self.taken += 1
            if self.taken == 2:
                if waits.pop() == "handed over":
                    lock._owner = None
                    lock._hand_over()
                raise KeyboardInterrupt

        def release(self) -> None:
            pass

    for how in ("waiting", "handed over"):
        waits.append(how)
        lock._owner = -1
        with monkeypatch.context() as patch:
            real = threading.Lock
            patch.setattr(threading, "Lock", Interrupted)
            with pytest.raises(KeyboardInterrupt):
                lock.acquire()
            patch.setattr(threading, "Lock", real)
        assert not lock._waiting
        assert lock._owner == (-1 if how == "waiting" else None)
