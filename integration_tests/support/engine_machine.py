"""Any order of submit, step, cancel, deadline, preemption, failure and changes, for engines of whole and of sharded
models: no page lost, each request ends exactly once, with the tokens that a whole model gives it alone."""

import collections
from typing import Any

import hypothesis.strategies as st
import torch
from dense_engine import reference_tokens
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transformers import GenerationConfig

import hf_paged

PROMPTS = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 16, 30, 45)]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "sample": {"do_sample": True, "top_k": 9},
}
SEED = 3
OPTIONS: dict[str, Any] = dict(
    num_pages=16, page_size=8, max_num_seqs=5, max_batch_tokens=24, mixed_prompt_tokens=5, self_check=False,
    swap_space_gib=0.0001,
)  # fmt: skip
"""A pool of 14 pages for requests of up to 9 (beams: 15 with what they do not share)."""


def config(new: int, mode: str) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | MODES[mode]))


def seed_of(mode: str) -> int | None:
    return SEED if mode == "sample" else None


def flip(model: Any) -> None:
    """Change weights, so that other tokens are the best; twice: not at all."""
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        (head.to_local() if hasattr(head, "to_local") else head).mul_(-1.0)


class Reference:
    """What a whole model gives for a prompt alone."""

    def __init__(self, model: Any) -> None:
        self.model, self.is_flipped = model, False
        self._known: dict[Any, list[list[int]]] = {}

    def flip(self) -> None:
        flip(self.model)
        self.is_flipped = not self.is_flipped

    def tokens(self, prompt: int, new: int, mode: str) -> list[list[int]]:
        case = prompt, new, mode, self.is_flipped
        if case not in self._known:
            self._known[case] = self._make(PROMPTS[prompt], new, mode)
        return self._known[case]

    def _make(self, prompt: list[int], new: int, mode: str) -> list[list[int]]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")
        try:
            if mode == "sample":
                return [reference_tokens(self.model, prompt, config(new, mode).to_diff_dict(), SEED)]
            out = self.model.generate(torch.tensor([prompt]), generation_config=config(new, mode))
            return out[:, len(prompt) :].tolist()
        finally:
            self.model.set_attn_implementation(before)


class Part:
    """One process's engine, and what the machine does to it beside calls of the engine's own.

    Args:
        model: whole, or a rank's part.
        start: of the clock, which is its own in each process; time passes where the machine is.
    """

    engine: hf_paged.Engine

    def __init__(self, model: Any, start: float = 0.0) -> None:
        self.model, self.now = model, start

    def open(self) -> None:
        self.engine = hf_paged.Engine(self.model, hf_paged.EngineConfig(**OPTIONS), background=False)
        self.fails_next = False
        self.ends: collections.Counter = collections.Counter()
        core = self.engine.core
        core.clock = core.scheduler.clock = lambda: self.now
        finalize, run = core.endings.finalize, core.run

        def count_end(request: Any, *args: Any) -> Any:
            self.ends[request.number] += 1
            return finalize(request, *args)

        def maybe_fail(work: Any) -> Any:
            if self.fails_next:
                self.fails_next = False
                raise RuntimeError("a forward that fails")
            return run(work)

        def preempt(number: int, swap: bool) -> None:
            scheduler = core.scheduler
            scheduler.preempt(next(r for r in scheduler.running if r.number == number), swap)

        core.endings.finalize, core.run = count_end, maybe_fail
        self.engine.loop.preempt_one = preempt  # As a command it reaches all ranks at the same step.

    def fail(self, next_one: bool) -> None:
        self.fails_next = next_one

    def flip(self) -> None:
        flip(self.model)

    def check(self) -> None:
        self.engine.check()
        assert all(count == 1 for count in self.ends.values())

    def end(self) -> None:
        """Nothing is left behind by requests that have all ended."""
        self.check()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.rows) == (0, 0, 0)
        assert stats.pages_used == 0
        assert self.engine.core.swapping.space_left == int(OPTIONS["swap_space_gib"] * 2**30)

    def close(self) -> None:
        self.engine.close()


class EngineMachine(RuleBasedStateMachine):
    """Acts on an engine.

    Args:
        part: of this process.
        reference: a whole model; of an engine whose model is whole, that one.
    """

    def __init__(self, part: Part, reference: Reference) -> None:
        super().__init__()
        self.part, self.reference = part, reference
        self.handles: list[tuple[Any, list[list[int]]]] = []
        self.act("open")
        self.engine = part.engine

    def act(self, name: str, *arguments: Any) -> None:
        """Call a method of the part, in every process that has one."""
        getattr(self.part, name)(*arguments)

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        new=st.sampled_from([1, 6, 20]),
        mode=st.sampled_from(["greedy", "greedy", *MODES]),
        priority=st.integers(0, 2),
        deadline=st.sampled_from([None, None, 5.0]),
    )
    def submit(self, prompt, new, mode, priority, deadline):
        wanted = self.reference.tokens(prompt, new, mode)
        handle = self.engine.submit(
            PROMPTS[prompt], generation_config=config(new, mode), priority=priority, deadline_s=deadline,
            seed=seed_of(mode),
        )  # fmt: skip
        self.handles.append((handle, wanted))

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def cancel(self, data):
        data.draw(st.sampled_from(self.handles))[0].cancel()

    @rule()
    def time_passes(self):
        self.part.now += 3.0

    @precondition(lambda self: self.engine.core.scheduler.running)
    @rule(data=st.data(), swap=st.booleans())
    def preempt(self, data, swap):
        numbers = sorted(request.number for request in self.engine.core.scheduler.running)
        self.engine.loop.command("preempt_one", data.draw(st.sampled_from(numbers)), swap)

    @rule()
    def fail(self):
        self.act("fail", True)

    @rule()
    def refresh(self):
        self.engine.refresh_weights()

    @rule()
    def sleep_and_wake(self):
        self.engine.sleep()
        assert not self.engine.step()
        self.engine.wake()

    @rule(changes=st.booleans())
    def pause_and_resume(self, changes):
        """Weights change under no request: its tokens would be of both."""
        if changes:
            self.take_all()
        self.engine.pause()
        if changes:
            self.change()
        self.engine.resume()

    @rule()
    def change_weights(self):
        self.take_all()
        self.change()

    @invariant()
    def books_are_right(self):
        self.act("check")
        for handle, wanted in self.handles:
            if handle.is_done:
                self.check_output(handle.result(), wanted)

    def change(self) -> None:
        self.act("flip")
        if self.part.model is self.reference.model:
            self.reference.is_flipped = not self.reference.is_flipped
        else:
            self.reference.flip()

    def take_all(self) -> None:
        for handle, wanted in self.handles:
            self.check_output(handle.result(timeout_s=60), wanted)
        self.handles.clear()

    def check_output(self, output, wanted):
        if output.finish_reason in ("stop", "length"):
            assert [sequence.token_ids for sequence in output.sequences] == wanted
        elif output.finish_reason == "error":
            assert "a forward that fails" in str(output.error)
        if len(wanted) == 1:
            assert output.token_ids == wanted[0][: len(output.token_ids)]

    def teardown(self):
        self.act("fail", False)
        self.take_all()
        self.engine.refresh_weights()
        if self.reference.is_flipped:
            self.change()
        self.act("end")
        self.act("close")
