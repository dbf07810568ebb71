"""Any order of submit, step, cancel, deadline, preemption and failure: no page lost, each request ends exactly once."""

import collections
import functools

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from random_requests import tiny_model
from transformers import GenerationConfig

import hf_paged

PROMPTS = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 16, 30, 45)]
MODES = {
    "greedy": {},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@functools.cache
def model():
    return tiny_model("llama")


def config(new: int, mode: str) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, **MODES[mode])


@functools.cache
def expected(prompt: int, new: int, mode: str) -> list[list[int]]:
    before = model().config._attn_implementation
    model().set_attn_implementation("sdpa")
    out = model().generate(torch.tensor([PROMPTS[prompt]]), generation_config=config(new, mode))
    model().set_attn_implementation(before)
    return out[:, len(PROMPTS[prompt]) :].tolist()


class EngineMachine(RuleBasedStateMachine):
    """A pool of 14 pages for requests of up to 9 (beams: 15 with what they do not share)."""

    def __init__(self) -> None:
        super().__init__()
        options = hf_paged.EngineConfig(
            num_pages=16,
            page_size=8,
            max_num_seqs=5,
            max_batch_tokens=24,
            mixed_prompt_tokens=5,
            self_check=False,
            swap_space_gib=0.0001,
        )
        self.engine = hf_paged.Engine(model(), options, background=False)
        self.now, self.fail_next = 0.0, False
        core = self.engine._core
        core.clock = core.scheduler.clock = lambda: self.now
        self.handles, self.ends = [], collections.Counter()
        finalize, run = core.endings.finalize, core.run

        def count_end(request, *args):
            self.ends[request.request_id] += 1
            return finalize(request, *args)

        def maybe_fail(work):
            if self.fail_next:
                self.fail_next = False
                raise RuntimeError("a forward that fails")
            return run(work)

        core.endings.finalize, core.run = count_end, maybe_fail

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        new=st.sampled_from([1, 6, 20]),
        mode=st.sampled_from(["greedy", "greedy", *MODES]),
        priority=st.integers(0, 2),
        deadline=st.sampled_from([None, None, 5.0]),
    )
    def submit(self, prompt, new, mode, priority, deadline):
        wanted = expected(prompt, new, mode)
        handle = self.engine.submit(
            PROMPTS[prompt], generation_config=config(new, mode), priority=priority, deadline_s=deadline
        )
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
        self.now += 3.0

    @precondition(lambda self: self.engine._core.scheduler.running)
    @rule(data=st.data(), swap=st.booleans())
    def preempt(self, data, swap):
        scheduler = self.engine._core.scheduler
        scheduler.preempt(data.draw(st.sampled_from(sorted(scheduler.running, key=lambda r: r.number))), swap)

    @rule()
    def fail(self):
        self.fail_next = True

    @rule()
    def refresh(self):
        self.engine.refresh_weights()

    @invariant()
    def books_are_right(self):
        self.engine.check()
        assert all(count == 1 for count in self.ends.values())
        for handle, wanted in self.handles:
            if handle.is_done:
                self.check_output(handle.result(), wanted)

    def check_output(self, output, wanted):
        assert self.ends[output.request_id] == 1
        if output.finish_reason in ("stop", "length"):
            assert [sequence.token_ids for sequence in output.sequences] == wanted
        elif output.finish_reason == "error":
            assert "a forward that fails" in str(output.error)
        if len(wanted) == 1:
            assert output.token_ids == wanted[0][: len(output.token_ids)]

    def teardown(self):
        self.fail_next = False
        for handle, wanted in self.handles:
            self.check_output(handle.result(timeout_s=60), wanted)
        self.engine.check()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.rows) == (0, 0, 0)
        assert stats.pages_used == stats.pages_cached
        assert self.engine._core.swapping.space_left == int(0.0001 * 2**30)
        self.engine.refresh_weights()
        assert self.engine.stats().pages_used == 0
        self.engine.close()


EngineMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEngineMachine = EngineMachine.TestCase
