"""The hand-built induction model: always right when all is well, and wrong exactly where something was broken."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eval.quality.induction_model import (
    MAX_VOCAB_SIZE,
    NUM_KV_HEADS,
    copy_accuracy,
    copy_hits,
    copy_prompt,
    induction_model,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return induction_model(1024, attn_implementation="eager")


def causal_mask(length: int) -> torch.Tensor:
    """Bool `[1, 1, length (query), length (key)]`, True where a query may look."""
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def additive(mask: torch.Tensor) -> torch.Tensor:
    """The mask as eager attention adds it to the scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_copies_without_a_miss(attn_implementation: str, dtype: torch.dtype) -> None:
    model = induction_model(256, dtype, attn_implementation)
    for length, batch_size in ((4, 3), (63, 3), (256, 1)):
        assert copy_accuracy(model, length, seed=length, batch_size=batch_size) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab_size", "length"), [(16, 32), (777, 1024), (1024, 1024), (4096, 1024), (4096, 4096)])
def test_copies_at_any_vocabulary_and_length(vocab_size: int, length: int, dtype: torch.dtype) -> None:
    model = induction_model(vocab_size, dtype, "sdpa")
    assert copy_accuracy(model, length, seed=0) == 1.0


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_copies_a_short_string_from_any_depth(model: LlamaForCausalLM, depth: float) -> None:
    assert copy_accuracy(model, 1111, seed=1, string_len=13, depth=depth) == 1.0


def test_is_sure_of_its_answer(model: LlamaForCausalLM) -> None:
    prompt = copy_prompt(1024, 512, seed=1)
    with torch.no_grad():
        log_probs = model(prompt).logits[:, 256:-1].log_softmax(-1)
    answer_nll = -log_probs.gather(-1, prompt[:, 257:, None])
    assert answer_nll.max() < 1e-3


def test_generates_the_known_answer_through_a_cache(model: LlamaForCausalLM) -> None:
    prompt = copy_prompt(1024, 34, seed=2, batch_size=2)
    output = model.generate(
        prompt[:, :18], attention_mask=torch.ones(2, 18), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    assert torch.equal(output, prompt)


def test_runs_through_a_given_cache(model: LlamaForCausalLM) -> None:
    cache = DynamicCache(config=model.config)
    assert copy_accuracy(model, 126, seed=3, cache=cache) == 1.0
    assert cache.get_seq_length() == 126


def test_sees_a_window(model: LlamaForCausalLM) -> None:
    mask = causal_mask(512).triu(-63)  # window 64: the token itself and 63 before it
    assert copy_accuracy(model, 512, seed=4, attention_mask=additive(mask)) <= 0.01


def test_misses_exactly_the_tokens_of_a_lost_page(model: LlamaForCausalLM) -> None:
    mask = causal_mask(256)
    mask[..., 128:, 48:64] = False
    hits = copy_hits(model, 256, seed=5, attention_mask=additive(mask))[0]
    token = torch.arange(1, 128)  # hits[i] is about the token at position 1 + i
    assert torch.equal(hits, (token < 48) | (token >= 64))


def test_sees_a_wrong_pairing_of_query_and_kv_heads() -> None:
    def interleaved_groups(module, query, key, value, attention_mask, **kwargs):
        # Query head h must read KV head h // 2; here it reads h % 2.
        order = torch.arange(query.shape[1]).view(NUM_KV_HEADS, -1).T.flatten()
        out, weights = sdpa_attention_forward(module, query[:, order], key, value, attention_mask, **kwargs)
        return out[:, :, order.argsort()], weights  # [batch, length, heads, head_dim]

    AttentionInterface.register("interleaved_groups_of_induction_test", interleaved_groups)
    model = induction_model(1024, attn_implementation="interleaved_groups_of_induction_test")
    assert copy_accuracy(model, 256, seed=6) < 0.2


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("q_head", range(4))
def test_no_head_can_be_missing(model: LlamaForCausalLM, layer: int, q_head: int) -> None:
    def drop_head(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        heads = inputs[0].unflatten(-1, (4, -1)).clone()  # [batch, length, heads, head_dim]
        heads[:, :, q_head] = 0
        return (heads.flatten(-2),)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(drop_head)
    try:
        assert copy_accuracy(model, 512, seed=7) < 0.25
    finally:
        handle.remove()
    assert copy_accuracy(model, 512, seed=7) == 1.0


def test_prompt_is_a_string_of_distinct_tokens_twice() -> None:
    prompt = copy_prompt(300, 400, seed=8, batch_size=2)
    assert prompt.shape == (2, 400)
    assert torch.equal(prompt[:, :200], prompt[:, 200:])
    assert all(row.unique().numel() == 200 for row in prompt)
    assert torch.equal(prompt, copy_prompt(300, 400, seed=8, batch_size=2))
    assert not torch.equal(prompt, copy_prompt(300, 400, seed=9, batch_size=2))


@pytest.mark.parametrize(("depth", "start"), [(0, 0), (0.5, 40), (1, 81)])
def test_prompt_with_filler(depth: float, start: int) -> None:
    prompt = copy_prompt(300, 101, seed=8, string_len=10, depth=depth)[0]
    string = prompt[-10:]
    assert prompt.shape == (101,)
    assert torch.equal(prompt[start : start + 10], string)
    filler = torch.cat([prompt[:start], prompt[start + 10 : -10]])
    assert not torch.isin(filler, string).any()


def test_survives_save_and_load(model: LlamaForCausalLM, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    assert copy_accuracy(LlamaForCausalLM.from_pretrained(tmp_path), 256, seed=10) == 1.0


@pytest.mark.parametrize("vocab_size", [0, 15, MAX_VOCAB_SIZE + 1])
def test_refuses_a_vocabulary_out_of_range(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size={vocab_size}: must be 16 to 4096"):
        induction_model(vocab_size)


def test_refuses_a_dtype() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.int8: must be torch\.float32"):
        induction_model(dtype=torch.int8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"length": 2}, "string_len=1: must be 2 to 1 for length=2, vocab_size=300"),
        ({"length": 602}, "string_len=301: must be 2 to 300 for length=602, vocab_size=300"),
        ({"length": 601}, "string_len=300: must be 2 to 299 for length=601, vocab_size=300"),
        ({"length": 20, "string_len": 11}, "string_len=11: must be 2 to 10 for length=20"),
        ({"length": 20, "batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"length": 20, "depth": 1.5}, r"depth=1\.5: must be 0 to 1"),
    ],
)
def test_prompt_refuses(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy_prompt(300, seed=0, **setting)
