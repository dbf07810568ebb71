"""How many tokens a step computes, as tables of numbers: no model, no engine."""

import numpy as np
import pytest

from hf_paged.engine.scheduling.pacing import (
    bucket_sizes,
    min_graph_fill,
    mixed_prompt_tokens,
    offline_step_tokens,
    plan_offline_step,
    wanted_prompt_tokens,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("option", "num_parameters", "expected"),
    [
        ("auto", 600_000_000, 500),
        ("auto", 8_000_000_000, 192),
        ("auto", 1, 1024),
        ("auto", 0, 1024),
        (None, 8_000_000_000, None),
        (77, 8_000_000_000, 77),
    ],
)
def test_prompt_tokens_of_mixed_steps(option, num_parameters, expected):
    assert mixed_prompt_tokens(option, num_parameters) == expected


@pytest.mark.parametrize(
    ("option", "num_parameters", "max_batch_tokens", "expected"),
    [
        ("auto", 8_000_000_000, 4096, 256),
        ("auto", 8_000_000_000, 100, 100),
        ("auto", 600_000_000, 4096, 4096),
        (77, 8_000_000_000, 4096, None),
        (None, 8_000_000_000, 4096, None),
    ],
)
def test_tokens_of_a_jobs_steps(option, num_parameters, max_batch_tokens, expected):
    assert offline_step_tokens(option, num_parameters, max_batch_tokens) == expected


@pytest.mark.parametrize(
    ("queued", "expected"),
    [(0, 192), (1024, 192), (2048, 512), (4096, 2048), (5793, 4096), (8192, 8192)],
)
def test_more_are_computed_with_the_square_of_what_is_queued(queued, expected):
    assert wanted_prompt_tokens(192, queued, 4096) == expected


def test_a_captured_step_that_is_somewhat_smaller_will_do():
    assert [min_graph_fill(count) for count in (0, 1, 4, 192, 193)] == [0, 0, 3, 144, 144]


@pytest.mark.parametrize(
    ("left", "prompts", "expected"),
    [
        # A prompt whose rows have most tokens to go has no step to spare: all of it is due at once.
        ([], [(16, 1, 9)], (0, 16)),
        ([9], [(16, 1, 9)], (1, 16)),
        # It has twice as many: the prompt has nine steps, in each of which the row decodes too.
        ([18], [(18, 1, 9)], (1, 3)),
        # A row that could spare fourteen steps does not have to decode yet.
        ([18, 4], [(18, 1, 9)], (1, 3)),
        # Four samples of the prompt decode together from then on.
        ([18], [(18, 4, 9)], (1, 4)),
        # Two prompts, the second one with time: the first sets the pace.
        ([10], [(30, 1, 8), (30, 1, 1)], (1, 16)),
    ],
)
def test_a_job_ends_with_its_longest_request(left, prompts, expected):
    tokens, rows, steps = np.array(prompts).T
    assert plan_offline_step(np.array(left, dtype=np.int64), tokens, rows, steps) == expected


def test_no_prompt_is_late_at_the_pace():
    """Step by step, in the order of service: each prompt is computed by the time that its rows have to decode."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        num, running = draw.integers(1, 6, 2)
        left = np.sort(draw.integers(1, 60, running))[::-1]
        tokens, rows, steps = draw.integers(1, 80, num), draw.integers(1, 4, num), draw.integers(0, 50, num)
        steps = np.sort(steps)[::-1]
        horizon = max(left.max(), steps.max())
        _, rate = plan_offline_step(left, tokens, rows, steps)
        done = 0
        for step in range(horizon):
            to_go = np.concatenate([left, np.repeat(steps, rows)])
            done += rate - int((to_go >= horizon - step).sum())
            late = tokens.cumsum()[horizon - steps == step + 1]
            assert not late.size or done >= late.max() - 1e-9, (left, tokens, rows, steps)


def test_bucket_sizes():
    sizes = bucket_sizes(1000)
    assert sizes[:6] == [1, 2, 4, 8, 16, 24]
    assert {248, 256, 272, 496, 512, 544, 576} <= set(sizes)
    assert not {264, 280, 528, 560} & set(sizes)
    assert sizes[-1] == 1000
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(5) == [1, 2, 4, 5]
    assert bucket_sizes(256)[-1] == 256
