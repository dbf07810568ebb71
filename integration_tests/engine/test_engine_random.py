"""Random requests in one run, against generate() one prompt at a time: same tokens, however often preempted."""

import itertools
from typing import Any

import pytest
from amount import EVERYTHING
from random_requests import FAMILIES, RandomRequest, draw_requests, tiny_model
from transformers.utils import logging

import hf_paged

NUM_REQUESTS = 200 if EVERYTHING else 36
NUM_PAGES = {"mistral": (13, 12), "qwen3_next": (24, 12)}
"""By page size 8 and 16; windows everywhere need fewer pages, states that nobody shares more."""
LEAST_PREEMPTIONS = NUM_REQUESTS // 10


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest) -> tuple[Any, list[RandomRequest]]:
    logging.set_verbosity_error()
    model = tiny_model(request.param)
    return model, draw_requests(model, NUM_REQUESTS, seed=5, is_recurrent=request.param == "qwen3_next")


@pytest.mark.parametrize(
    ("page_size", "prefix_caching", "swap_space_gib"),
    [(8, True, 0.0), (16, False, 0.0), (8, False, 0.01), (16, True, 0.0)],
    ids=["page8-prefixes", "page16", "page8-swap", "page16-prefixes"],
)
def test_random_requests_give_the_tokens_of_generate(served, page_size, prefix_caching, swap_space_gib):
    model, requests = served
    num_pages = NUM_PAGES.get(model.config.model_type, (19, 12))[page_size == 16]
    config = hf_paged.EngineConfig(
        page_size=page_size, num_pages=num_pages, prefix_caching=prefix_caching, swap_space_gib=swap_space_gib,
        max_num_seqs=12, max_batch_tokens=48,
    )  # fmt: skip
    with hf_paged.Engine(model, config, background=False) as engine:
        arriving, handles = iter(enumerate(requests)), []
        is_running = True
        while is_running:
            # Later ones are more urgent: they take the pages of those that run.
            for i, r in itertools.islice(arriving, NUM_REQUESTS // 2 if not handles else 1):
                options = dict(generation_config=r.config, seed=r.seed, **r.extras)
                handles.append(engine.submit(r.prompt, priority=i % 3 if i > NUM_REQUESTS // 2 else 0, **options))
            is_running = engine.step()
            if len(handles) % 16 == 0:
                engine.check()
        engine.check()
        stats = engine.stats()
        outputs = [handle.result(timeout_s=0) for handle in handles]
    for number, (request, output) in enumerate(zip(requests, outputs)):
        assert output.error is None, f"request {number} {request.options}: {output.error!r}"
        got = [sequence.token_ids for sequence in output.sequences]
        padding = {0, *request.options.get("eos_token_id", ())}
        assert len(got) == len(request.expected), f"request {number}"
        for tokens, expected in zip(got, request.expected):
            assert tokens == expected[: len(tokens)], f"request {number} {request.options}"
            assert set(expected[len(tokens) :]) <= padding, f"request {number} {request.options}"
    assert stats.preemptions > LEAST_PREEMPTIONS
    is_recurrent = "next" in model.config.model_type
    assert (stats.swapped > 0) == (swap_space_gib > 0 and not is_recurrent)
    assert (stats.prefix_hit_rate > 0) == (prefix_caching and not is_recurrent)
