"""Token selection on the device: the same noise as on the host, and rows that do not depend on their batch."""


import numpy as np
import pytest
import torch
from explicit_models import prompts, tiny_model
from hf_paged_kernels.sampling.reference import gumbel_noise
from transformers import GenerationConfig

import hf_paged
from hf_paged.engine.sampling.token_selector import RequestParams, TokenSelector

pytestmark = pytest.mark.gpu


def test_noise_is_that_of_the_host():
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (40,)), torch.randint(0, 100_000, (40,))
    ids = torch.arange(50_000, dtype=torch.int32)
    device = gumbel_noise(seeds.cuda(), positions.cuda(), ids.cuda())
    assert torch.equal(device.cpu(), gumbel_noise(seeds, positions, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch(dtype):
    model = tiny_model("llama", "eager", num_hidden_layers=1).cuda()
    options = [
        dict(),
        dict(do_sample=True),
        dict(do_sample=True, top_p=0.8, top_k=0),
        dict(do_sample=True, min_p=0.1, temperature=0.6),
        dict(do_sample=True, typical_p=0.8),
        dict(repetition_penalty=1.3),
    ]
    num, vocab_size = 60, 32_000
    selector, rules = TokenSelector(num, vocab_size, "cuda"), []
    for slot in range(num):
        config = GenerationConfig(max_new_tokens=40, **options[slot % 6])
        rules.append(RequestParams.make(model, config, prompt_ids=[5], seed=slot))
    history, lengths = np.random.default_rng(0).integers(2, 97, (num, 30)), np.arange(num) % 20 + 1
    logits = (torch.randn(num, vocab_size, device="cuda") * 3).to(dtype)
    for slot in range(num):
        selector.admit(slot, rules[slot], 0, history[slot, : lengths[slot]])
    whole = selector.select(logits, np.arange(num), history, lengths)
    assert whole.errors == {}
    assert whole.token_ids.device.type == "cuda"
    for slot in range(num):
        # As at first: tokens that were chosen count as seen.
        selector.admit(slot, rules[slot], 0, history[slot, : lengths[slot]])
        alone = selector.select(logits[slot : slot + 1], np.array([slot]), history, lengths)
        assert alone.token_ids.item() == whole.token_ids[slot].item(), options[slot % 6]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(num_beams=3, num_return_sequences=2), dict(repetition_penalty=1.4, eos_token_id=[3, 7, 19])],
)
def test_a_patched_model_gives_the_same(options):
    model = tiny_model("llama", "sdpa", num_hidden_layers=2).cuda()
    model.generation_config.pad_token_id = 0
    rows = prompts(4, 9, 2)
    ids = torch.tensor([[0] * (9 - len(row)) + row for row in rows], device="cuda")
    options = dict(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=16, do_sample=False) | options
    expected = model.generate(**options)
    hf_paged.patch_generate(model, hf_paged.EngineConfig(num_pages=256))
    got = model.generate(**options)
    assert got.device == expected.device
    assert torch.equal(got, expected)
    assert torch.equal(model.generate(**options), expected)
    pool = model.generate.engine._core.pool
    assert pool.committed_bytes == 0, "the pages are given back after the call"
    sampled = model.generate(**(options | dict(do_sample=True, num_beams=1, num_return_sequences=1)), seed=3)
    assert torch.equal(
        model.generate(**(options | dict(do_sample=True, num_beams=1, num_return_sequences=1)), seed=3), sampled
    )
