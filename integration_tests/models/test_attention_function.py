"""The traps between transformers and an attention function: masks, packing, refusals, caches of either kind.

The answer is eager attention, on the real tokens alone where there is padding or packing.
"""

import logging
from typing import Any

import pytest
import torch
from explicit_models import BASE, prompts, tiny_config, tiny_model, with_drawn_weights
from host import with_cache
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    DynamicCache,
    Gemma3TextConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_paged
from hf_paged.attention import dense, interface

FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss"]
LENGTHS = (13, 1, 22, 9)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(eager, paged_flash) with the same weights."""
    return tiny_model(request.param, "eager"), tiny_model(request.param, "paged_flash")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama", "paged_flash")


@pytest.fixture(scope="module")
def eager_llama() -> PreTrainedModel:
    return tiny_model("llama", "eager")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of float32 in another order, on the scale of the result."""
    assert actual.shape == expected.shape
    bound = 2e-4 * float(expected.abs().max())
    assert float((actual - expected).abs().max()) < bound


def alone(model: PreTrainedModel, ids: list[int], **kwargs: Any) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False, **kwargs).logits[0]


def padded(sequences: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(input_ids, attention_mask)``; padding is a token of its own, so that attention to it is seen."""
    width = max(map(len, sequences))
    fill = [[5] * (width - len(s)) for s in sequences]
    rows = [f + s if side == "left" else s + f for s, f in zip(sequences, fill)]
    held = torch.arange(width) < torch.tensor([[len(s)] for s in sequences])
    return torch.tensor(rows), (held.flip(1) if side == "left" else held).long()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part(models, side):
    eager, paged = models
    sequences = prompts(*LENGTHS)
    ids, mask = padded(sequences, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = paged(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, sequence in enumerate(sequences):
        close(logits[row][mask[row].bool()], alone(eager, sequence))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}, {"prefill_chunk_size": 5}],
    ids=str,
)
def test_generate_of_a_batch_padded_on_the_right_is_eagers(llama, eager_llama, options, poison):
    """generate() takes the next token from the last column, which is padding: it sees the tokens before it."""
    sequences = prompts(*LENGTHS)
    ids, mask = padded(sequences, "right")
    mask[0, 2] = 0  # a hole
    how = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
    expected = eager_llama.generate(ids, **how)
    assert torch.equal(llama.generate(ids, **how), expected)
    # A patched model gives each prompt its own continuation.
    patched = tiny_model("llama", "paged_flash")
    hf_paged.patch_generate(patched)
    ids, mask = padded(sequences, "right")
    tokens = patched.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
    for row, sequence in zip(tokens, sequences):
        own = eager_llama.generate(torch.tensor([sequence]), max_new_tokens=4, do_sample=False)
        assert torch.equal(row, own[0, len(sequence) :])


def test_a_conversation_padded_on_the_right_goes_on_as_eagers(llama, eager_llama):
    """The second turn brings padding behind cached tokens."""
    ids, mask = padded(prompts(*LENGTHS), "right")
    more, more_mask = padded(prompts(*LENGTHS[::-1]), "right")
    outputs = []
    for model, cache in ((eager_llama, DynamicCache(config=llama.config)), (llama, hf_paged.PagedCache(llama.config))):
        how = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
        first = model.generate(ids, attention_mask=mask, **how, **with_cache(cache))
        longer = torch.cat([first, more], dim=1)
        seen = torch.cat([mask, torch.ones(len(ids), 3, dtype=mask.dtype), more_mask], dim=1)
        outputs.append(model.generate(longer, attention_mask=seen, **how, **with_cache(cache)))
    assert torch.equal(*outputs)


def test_right_padding_and_a_window_that_passes_it_are_refused():
    """Eager's window counts the columns of padding, ours counts tokens."""
    eager, paged = (tiny_model("mistral", name) for name in ("eager", "paged_flash"))
    window = paged.config.sliding_window
    ids, mask = padded(prompts(2, window - 3), "right")
    how = dict(attention_mask=mask, do_sample=False, eos_token_id=None)
    assert torch.equal(paged.generate(ids, max_new_tokens=3, **how), eager.generate(ids, max_new_tokens=3, **how))
    with pytest.raises(ValueError, match=rf"the last column of 1 of 2 rows, .*see {window} columns: pad on the left"):
        paged.generate(ids, max_new_tokens=4, **how)


@pytest.mark.parametrize("cache", [hf_paged.PagedCache, DynamicCache])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_windows_count_the_columns_of_padding_between_tokens(family, cache):
    """Each turn of a conversation is padded on the left, so padding lies behind the tokens of the turn before."""
    eager, paged = (tiny_model(family, name) for name in ("eager", "paged_flash"))
    ids, mask = padded(prompts(*LENGTHS), "left")
    mask[0, 15] = 0
    held = mask.bool()
    close(
        paged(ids, attention_mask=mask, use_cache=False).logits[held],
        eager(ids, attention_mask=mask, use_cache=False).logits[held],
    )
    outputs = []
    for model, kept in ((eager, DynamicCache(config=eager.config)), (paged, cache(config=paged.config))):
        text, seen = ids, mask
        for turn in range(1, 3):
            how = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, **with_cache(kept))
            text = model.generate(text, attention_mask=seen, **how)
            more, more_mask = padded(prompts(*LENGTHS[turn:], *LENGTHS[:turn]), "left")
            text = torch.cat([text, more], dim=1)
            seen = torch.cat([seen, torch.ones(len(ids), 5, dtype=seen.dtype), more_mask], dim=1)
        outputs.append(model.generate(text, attention_mask=seen, **how))
    assert torch.equal(*outputs)


def packed(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    return ids, torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_sequences_by_position_ids(family):
    # Not gpt_oss, which does not show position_ids to its mask: refused, see below.
    eager, paged = (tiny_model(family, name) for name in ("eager", "paged_flash"))
    sequences = prompts(*LENGTHS)
    ids, positions = packed(sequences)
    logits = paged(ids, position_ids=positions, use_cache=False).logits[0]
    for part, sequence in zip(logits.split([len(s) for s in sequences]), sequences):
        close(part, alone(eager, sequence))


def test_packed_sequences_take_the_kernels(llama, monkeypatch):
    """Not the path with a full attention matrix, which would be right as well."""
    monkeypatch.setattr(interface, "with_dense_mask", None)
    ids, positions = packed(prompts(*LENGTHS))
    llama(ids, position_ids=positions, use_cache=False)


def test_packed_rows_of_a_batch(llama, eager_llama):
    first, second = prompts(7, 5), prompts(4, 8)[::-1]
    rows = [packed(first), packed(second)]
    ids, positions = (torch.cat(x) for x in zip(*rows))
    logits = llama(ids, position_ids=positions, use_cache=False).logits
    for row, sequences in zip(logits, (first, second)):
        for part, sequence in zip(row.split([len(s) for s in sequences]), sequences):
            close(part, alone(eager_llama, sequence))


def varlen(sequences: list[list[int]]) -> dict[str, Any]:
    bounds = torch.tensor([0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()], dtype=torch.int32)
    longest = max(map(len, sequences))
    return dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest)


def test_packed_sequences_by_prefix_sums(models):
    eager, paged = models
    sequences = prompts(*LENGTHS)
    ids, positions = packed(sequences)
    logits = paged(ids, position_ids=positions, use_cache=False, **varlen(sequences)).logits[0]
    for part, sequence in zip(logits.split([len(s) for s in sequences]), sequences):
        close(part, alone(eager, sequence))


def test_prefix_sums_must_be_complete(llama):
    ids, positions = packed(prompts(3, 4))
    kwargs = varlen(prompts(3, 4)) | {"max_length_k": None, "cu_seq_lens_k": None}
    with pytest.raises(ValueError, match="cu_seq_lens_k, max_length_k is missing"):
        llama(ids, position_ids=positions, use_cache=False, **kwargs)


def test_packed_sequences_cannot_go_into_a_paged_cache(llama):
    ids, positions = packed(prompts(3, 4))
    cache = hf_paged.PagedCache(llama.config)
    with pytest.raises(ValueError, match="cannot be added to a cache"):
        llama(ids, position_ids=positions, **with_cache(cache), **varlen(prompts(3, 4)))


@pytest.mark.parametrize("cache", [None, hf_paged.PagedCache, DynamicCache], ids=str)
def test_packed_positions_that_no_mask_tells_of_are_refused(llama, cache):
    """gpt_oss never shows them to its mask, and no model does beside a cache: eager then runs over the borders."""
    model = tiny_model("gpt_oss", "paged_flash") if cache is None else llama
    options = {"use_cache": False} if cache is None else with_cache(cache(config=model.config))
    ids, positions = packed(prompts(3, 4))
    with pytest.raises(ValueError, match=r"position_ids restart, .*cu_seq_lens_q"):
        model(ids, position_ids=positions, **options)
    # One sequence, wherever it starts; and padding, whose positions may repeat.
    model(ids, position_ids=torch.arange(7)[None] + 3, **options)
    if cache is None:
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **options)


def test_a_padding_mask_beside_prefix_sums_is_refused(llama):
    ids, positions = packed(prompts(3, 4))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"a padding mask \[1, 7\] was given together with cu_seq_lens_q"):
        llama(ids, attention_mask=mask, position_ids=positions, use_cache=False, **varlen(prompts(3, 4)))
    llama(ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False, **varlen(prompts(3, 4)))


# A mask of the caller's own


def banded(length: int) -> torch.Tensor:
    """bool [1, 1, L, L]: itself and every earlier token at an even distance."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return ((distance >= 0) & (distance % 2 == 0))[None, None]


@pytest.mark.parametrize("cache", [None, hf_paged.PagedCache, DynamicCache], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_4d_mask(family, kind, cache):
    eager, paged = (tiny_model(family, name) for name in ("eager", "paged_flash"))
    ids = torch.tensor(prompts(12, 12))
    mask = banded(12).expand(2, 1, -1, -1)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min) - 0.5 * mask.float().cumsum(-1)
    masks = {"bool": mask, "float": additive}
    # Eager adds a mask to the scores: the boolean one is spelled out for it.
    spelled_out = additive if kind == "float" else torch.where(mask, 0.0, -1e30)
    expected = eager(ids, attention_mask=spelled_out, use_cache=False)
    past = None if cache is None else cache(config=paged.config)
    out = paged(ids, attention_mask=masks[kind], **with_cache(past), use_cache=cache is not None)
    close(out.logits, expected.logits)


def test_a_4d_mask_is_reported_once(llama, caplog, monkeypatch):
    dense.logger.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for _ in range(2):
        llama(torch.tensor(prompts(6)), attention_mask=banded(6), use_cache=False)
    # pytest listens at loggers that do not propagate, too.
    records = {id(record): record.message for record in caplog.records}
    reports = [message for message in records.values() if "4D attention mask" in message]
    assert len(reports) == 1
    assert "full attention matrix" in reports[0]


def test_a_4d_mask_of_the_wrong_size(llama):
    with pytest.raises(ValueError, match=r"must be \[batch, heads, 6, 6\], got \[1, 1, 5, 5\]"):
        llama(torch.tensor(prompts(6)), attention_mask=banded(5), use_cache=False)


# Refusals


def test_attention_dropout_is_refused_in_training():
    model = tiny_model("llama", "paged_flash", attention_dropout=0.1)
    ids = torch.tensor(prompts(5))
    model(ids)
    with pytest.raises(ValueError, match=r"dropout must be 0 in paged_flash, got 0\.1"):
        model.train()(ids)


def test_an_attention_matrix_is_refused(llama):
    with pytest.raises(ValueError, match=r"output_attentions"):
        llama(torch.tensor(prompts(5)), output_attentions=True)


def test_deterministic_is_accepted(llama):
    """Gradients are deterministic with or without it."""
    ids = torch.tensor(prompts(5))
    assert torch.equal(llama(ids, deterministic=True).logits, llama(ids).logits)


def test_masks_of_other_ranks_are_refused(llama):
    module = llama.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"attention_mask must be 2D or 4D, got the shape \[1, 3, 3\]"):
        interface.paged_flash_attention(module, q, k, k, torch.ones(1, 3, 3), sliding_window=None)


# Bidirectional attention


def both(make: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    eager, paged = (with_drawn_weights(make(name)) for name in ("eager", "paged_flash"))
    return eager, paged


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("which", ["bert", "modernbert", "gemma3", "llama"])
def test_bidirectional_models(which, side):
    shape = {k: v for k, v in BASE.items() if k not in ("head_dim", "num_key_value_heads")}
    config = {
        "bert": lambda: BertConfig(**shape, attention_probs_dropout_prob=0.0),
        "modernbert": lambda: ModernBertConfig(
            **shape, local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=1
        ),
        "gemma3": lambda: Gemma3TextConfig(**BASE, use_bidirectional_attention=True, sliding_window=6),
        "llama": lambda: tiny_config("llama", is_causal=False),
    }[which]
    eager, paged = both(lambda name: AutoModel.from_config(config(), attn_implementation=name))
    ids, mask = padded(prompts(*LENGTHS), side)
    mask[2, 9:11] = 0  # between tokens: windows count these columns
    for batch in (dict(input_ids=ids[2:3]), dict(input_ids=ids, attention_mask=mask)):
        held = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        close(paged(**batch).last_hidden_state[held], eager(**batch).last_hidden_state[held])


@pytest.mark.parametrize("which", ["bert", "roberta", "modernbert"])
def test_packed_sequences_of_encoders(which):
    """By prefix sums; their masks do not separate what position_ids alone call packed, so that is refused."""
    shape = {k: v for k, v in BASE.items() if k not in ("head_dim", "num_key_value_heads")}
    config = {
        "bert": lambda: BertConfig(**shape, attention_probs_dropout_prob=0.0),
        "roberta": lambda: RobertaConfig(**shape, attention_probs_dropout_prob=0.0),
        "modernbert": lambda: ModernBertConfig(**shape, local_attention=6, global_attn_every_n_layers=2),
    }[which]
    eager, paged = both(lambda name: AutoModel.from_config(config(), attn_implementation=name))
    sequences = prompts(*LENGTHS)
    ids, positions = packed(sequences)
    out = paged(ids, position_ids=positions, **varlen(sequences)).last_hidden_state[0]
    for part, sequence in zip(out.split([len(s) for s in sequences]), sequences):
        own = torch.arange(len(sequence))[None]
        close(part, eager(torch.tensor([sequence]), position_ids=own).last_hidden_state[0])
    if which == "modernbert":
        return  # It does not show position_ids to attention, whatever the implementation.
    with pytest.raises(ValueError, match=r"position_ids restart, .*cu_seq_lens_q.*sdpa"):
        paged(ids, position_ids=positions)
    # One sequence, wherever it starts, and rows with padding.
    paged(ids, position_ids=torch.arange(ids.shape[1])[None] + 2)
    ids, mask = padded(sequences, "right")
    paged(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def test_causal_attention_is_not_bidirectional(eager_llama):
    """The test above can tell: the last token changes the first one's result only without causality."""
    other = tiny_model("llama", "eager", is_causal=False)
    ids = prompts(9)[0]
    assert float((alone(other, ids)[0] - alone(eager_llama, ids)[0]).abs().max()) > 0.1


# Encoder-decoders


BART = dict(
    vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1,
    forced_eos_token_id=None, dropout=0.0,
)  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_bart(side):
    config = BartConfig(**BART)
    eager, paged = both(lambda name: BartForConditionalGeneration._from_config(config, attn_implementation=name))
    ids, mask = padded(prompts(*LENGTHS), side)
    batch = dict(input_ids=ids, attention_mask=mask)
    decoder_ids = torch.tensor(prompts(7, 7, 7, 7))
    close(paged(**batch, decoder_input_ids=decoder_ids).logits, eager(**batch, decoder_input_ids=decoder_ids).logits)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        tokens = [m.generate(**batch, max_new_tokens=8, do_sample=False, **options) for m in (eager, paged)]
        assert torch.equal(*tokens)


def test_t5_position_bias_is_refused():
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    ids = torch.tensor(prompts(6))
    refusal = r"T5.*(position_bias|flash)"
    with pytest.raises(ValueError, match=refusal):
        T5ForConditionalGeneration._from_config(config, attn_implementation="paged_flash").eval()(
            input_ids=ids, decoder_input_ids=ids
        )


# Caches of either kind under implementations of either kind


def greedy(model: PreTrainedModel, **kwargs: Any) -> torch.Tensor:
    ids, mask = padded(prompts(*LENGTHS), "left")
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **kwargs)


@pytest.mark.parametrize(
    ("family", "name"),
    # Not sdpa where it knows no softcap or sinks.
    [("llama", "sdpa"), ("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gpt_oss", "eager")],
)
def test_a_paged_cache_under_another_implementation(family, name):
    model = tiny_model(family, name)
    cache = hf_paged.PagedCache(model.config)
    expected = greedy(model, **with_cache(DynamicCache(config=model.config)))
    assert torch.equal(greedy(model, **with_cache(cache)), expected)
    cache.check()


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_dense_cache_under_paged_flash(models, kind):
    eager, paged = models
    make = {"static": lambda **kw: StaticCache(max_cache_len=60, **kw), "dynamic": DynamicCache}[kind]
    cache = make(config=paged.config)
    assert torch.equal(greedy(paged, **with_cache(cache)), greedy(eager))


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
def test_steps_without_generate(models, kind, with_mask):
    """A forward per chunk: prefill, a chunk of more than one token, single tokens; the mask may be left out."""
    eager, paged = models
    ids = torch.tensor(prompts(21, 21))
    cache = {
        "static": lambda: StaticCache(config=paged.config, max_cache_len=40),
        "dynamic": lambda: DynamicCache(config=paged.config),
        "paged": lambda: hf_paged.PagedCache(paged.config),
    }[kind]()
    logits, start = [], 0
    for length in (5, 6, 1, 1, 7, 1):
        kwargs = {"attention_mask": torch.ones(2, start + length, dtype=torch.long)} if with_mask else {}
        logits.append(paged(ids[:, start : start + length], **with_cache(cache), **kwargs).logits)
        start += length
    close(torch.cat(logits, dim=1), eager(ids, use_cache=False).logits)


@pytest.mark.parametrize("order", [("paged_flash", "dense"), ("dense", "paged_flash")], ids=str)
@pytest.mark.parametrize(
    ("family", "dense"), [("llama", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_switching_the_implementation_in_mid_generation(family, dense, order):
    order = [dense if name == "dense" else name for name in order]
    model, eager = (tiny_model(family, name) for name in (order[0], "eager"))
    ids = torch.tensor(prompts(23, 23))
    expected = eager(ids, use_cache=False).logits
    cache = hf_paged.PagedCache(model.config)
    parts = [model(ids[:, :15], **with_cache(cache)).logits]
    model.set_attn_implementation(order[1])
    parts += [model(ids[:, 15:19], **with_cache(cache)).logits]
    model.set_attn_implementation(order[0])
    parts += [model(ids[:, i : i + 1], **with_cache(cache)).logits for i in range(19, 23)]
    close(torch.cat(parts, dim=1), expected)
    cache.check()


def test_switching_with_padding():
    model, eager = tiny_model("llama", "paged_flash"), tiny_model("llama", "eager")
    ids, mask = padded(prompts(*LENGTHS), "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = eager(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]

    def two_steps(first: str, second: str) -> torch.Tensor:
        cache = hf_paged.PagedCache(model.config)
        for name, columns in ((first, slice(0, -1)), (second, slice(-1, None))):
            model.set_attn_implementation(name)
            seen = mask if name == second else mask[:, :-1]
            out = model(ids[:, columns], attention_mask=seen, position_ids=positions[:, columns], **with_cache(cache))
        return out.logits[:, -1]

    close(two_steps("paged_flash", "sdpa"), expected)
    # sdpa keeps padding as tokens: what it wrote cannot be told apart any more.
    with pytest.raises(ValueError, match="attention_mask hides column 0 of row"):
        two_steps("sdpa", "paged_flash")


def test_auto_model_and_direct_call_agree(llama, eager_llama):
    auto = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="paged_flash")
    auto.load_state_dict(eager_llama.state_dict())
    close(alone(auto.eval(), prompts(9)[0]), alone(eager_llama, prompts(9)[0]))


def test_dynamic_rotary_embeddings_beyond_the_original_length():
    """Their frequencies are a state of transformers' module, of the longest sequence so far: eager's tokens of a prompt
    depend on the calls before it. In the same order of calls the tokens are the same."""
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    eager, paged = (
        tiny_model("llama", name, max_position_embeddings=16, rope_parameters=rope) for name in ("eager", "paged_flash")
    )
    for length in (30, 24, 8):
        ids = torch.tensor(prompts(length))
        tokens = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (eager, paged)]
        assert torch.equal(*tokens)
