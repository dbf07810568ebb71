"""Every mode of ``generate()`` that takes a Cache, over families of models: a PagedCache gives eager's tokens.

Eager attention with a DynamicCache is the reference, in float32. A mode that transformers refuses for a family must be
refused with the same words.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from host import cache_of, with_cache
from tiny_models import WINDOW, build, copy_weights, randomise, tiny_config
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

import hf_paged

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": dict(
        vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None, dropout_rate=0.0, tie_word_embeddings=False,
    ),
    "bart": dict(
        vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128, decoder_start_token_id=2,
        forced_eos_token_id=None, pad_token_id=0, bos_token_id=1, eos_token_id=None, dropout=0.0,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
CAUSAL = (
    "llama", "qwen3", "mistral", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3", "bamba", "falcon_h1", "zaya_sliding",
)  # fmt: skip
"""bamba: layers of states beside layers of attention; falcon_h1: both in every layer; zaya_sliding: with windows."""
HYBRIDS = ("bamba", "falcon_h1", "zaya_sliding")
FAMILIES = (*CAUSAL, *ENCODER_DECODERS)
GATHERED = ("t5",)
"""paged_flash is refused because of a position bias: eager attention, on keys gathered from the pages."""

PROMPT, NEW_TOKENS, MORE = 21, 12, 20
SEED = 6
"""Of the weights: one under which the tokens of every family and mode vary."""
PADDING = (4, 0, 17)
"""Padded columns of each row of the batch; the last one has fewer tokens than a window or a page."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def models(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Eager, and the same weights on paged_flash."""
    name = "eager" if family in GATHERED else "paged_flash"
    if family in ENCODER_DECODERS:
        config = AutoConfig.for_model(family, **ENCODER_DECODERS[family])
        eager, paged = (
            AutoModelForSeq2SeqLM.from_config(copy.deepcopy(config), attn_implementation=attn).eval()
            for attn in ("eager", name)
        )
    else:
        options = {}
        if family == "zaya_sliding":
            family, options = "zaya", dict(layer_types=["hybrid", "hybrid_sliding"] * 2, num_hidden_layers=4)
        config = tiny_config(family, **options)
        eager, paged = build(config, "eager"), build(config, name)
    randomise(eager, SEED)
    if family in ENCODER_DECODERS:
        uneven_decoder(eager)
    copy_weights(eager, paged)
    for model in (eager, paged):
        model.generation_config.update(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
        # Text longer than the output must not end it early.
        model.generation_config.max_length = None
    return eager, paged


def uneven_decoder(model: PreTrainedModel) -> None:
    """Attention must outweigh biases and feed-forward layers, or every step gives the same token."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            layer = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if weight.ndim == 1 and name.endswith("bias"):
                weight.zero_()
            elif layer in ("q", "k", "q_proj", "k_proj"):
                weight.mul_(2)
            elif layer in ("wi", "fc1", "fc2"):
                weight.mul_(0.3)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (len(PADDING), PROMPT), generator=generator)
    mask = (torch.arange(PROMPT)[None, :] >= torch.tensor(PADDING)[:, None]).long()
    return ids * mask, mask


def dynamic_cache(model: PreTrainedModel) -> Cache:
    cache = DynamicCache(config=model.config)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config))
    return cache


def paged_cache(model: PreTrainedModel, page_size: int) -> Cache:
    cache = hf_paged.PagedCache(model.config, page_size=page_size)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config))
    return cache


def pages_of(cache: Cache) -> hf_paged.PagedCache:
    """The PagedCache in what a model returned."""
    paged = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    assert isinstance(paged, hf_paged.PagedCache)
    return paged


# A mode: (model, empty cache) -> tokens, and every cache that is then in use.

ALL, ONE = slice(None), slice(1, 2)
Result = tuple[list[torch.Tensor], list[Cache]]
Mode = Callable[[PreTrainedModel, Cache], Result]


def plain(rows: slice, **options: Any) -> Mode:
    """One call of ``generate()``."""

    def run(model: PreTrainedModel, cache: Cache) -> Result:
        ids, mask = (x[rows] for x in batch())
        torch.manual_seed(3)
        out = model.generate(ids, attention_mask=mask, **with_cache(cache), return_dict_in_generate=True, **options)
        return [out.sequences], [cache_of(out)]

    return run


def assisted(model: PreTrainedModel, cache: Cache) -> Result:
    """A draft model, which rolls back as well: a llama, or for encoder-decoders one of their own kind."""
    family = model.config.model_type if model.config.is_encoder_decoder else "llama"
    eager, paged = models(family)
    helper = eager if model.config._attn_implementation == "eager" else paged
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in helper.parameters():
            # A family's own draft is right now and then.
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return plain(ONE, assistant_model=helper)(model, cache)


def chunked(model: PreTrainedModel, cache: Cache) -> Result:
    """A prompt in pieces; transformers cuts an encoder's mask as well, which is right only where it hides nothing."""
    return plain(ONE if model.config.is_encoder_decoder else ALL, prefill_chunk_size=6)(model, cache)


def continued(model: PreTrainedModel, cache: Cache) -> Result:
    """A second turn on the cache of the first."""
    ids, mask = batch()
    first = model.generate(ids, attention_mask=mask, **with_cache(cache), return_dict_in_generate=True)
    more = torch.randint(3, 90, (len(PADDING), MORE), generator=torch.Generator().manual_seed(2))
    longer = torch.cat([first.sequences, more], dim=1)
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": longer}
    else:
        inputs = {"input_ids": longer, "attention_mask": torch.cat([mask, mask.new_ones(3, NEW_TOKENS + MORE)], dim=1)}
    second = model.generate(**inputs, **with_cache(cache_of(first)), return_dict_in_generate=True)
    return [first.sequences, second.sequences], [cache_of(second)]


def reused(model: PreTrainedModel, cache: Cache) -> Result:
    """One prefill, two different continuations from copies of its cache."""
    ids, mask = batch()
    more = torch.randint(3, 90, (2, len(PADDING), MORE), generator=torch.Generator().manual_seed(2))
    encoder = {"input_ids": ids, "attention_mask": mask} if model.config.is_encoder_decoder else None
    with torch.no_grad():
        if encoder:
            prefill = {**encoder, "decoder_input_ids": ids[:, 4:]}
        else:
            # Positions as generate() counts them.
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            prefill = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        cache = cache_of(model(**prefill, **with_cache(cache), use_cache=True))
    tokens, caches = [], [cache]
    for tail in more:
        twin = copy.deepcopy(cache)
        longer = torch.cat([ids[:, 4:] if encoder else ids, tail], dim=1)
        longer_mask = torch.cat([mask, mask.new_ones(tail.shape)], dim=1)
        inputs = {"input_ids": longer, "attention_mask": longer_mask}
        inputs = {**encoder, "decoder_input_ids": longer} if encoder else inputs
        out = model.generate(**inputs, **with_cache(twin), return_dict_in_generate=True)
        tokens.append(out.sequences)
        caches.append(cache_of(out))
    assert not torch.equal(*tokens)
    return tokens, caches


MODES: dict[str, Mode] = {
    "greedy": plain(ALL),
    "sampling": plain(ALL, do_sample=True, top_k=20),
    "return_sequences": plain(ALL, do_sample=True, num_return_sequences=3),
    "beams": plain(ALL, num_beams=3),
    "beam_sampling": plain(ALL, num_beams=4, num_return_sequences=2, do_sample=True),
    "prompt_lookup": plain(ONE, prompt_lookup_num_tokens=3, max_matching_ngram_size=1),
    "assistant": assisted,
    "chunked_prefill": chunked,
    "continued": continued,
    "reused": reused,
}
PAGE_SIZES = (8, 16, 64)
PAIRS = [
    pytest.param(
        family, mode, PAGE_SIZES[(i + j) % 3], id=f"{family}-{mode}-{PAGE_SIZES[(i + j) % 3]}",
        marks=[pytest.mark.quick] if mode == "greedy" else [],
    )
    for i, family in enumerate(FAMILIES)
    for j, mode in enumerate(MODES)
]  # fmt: skip


def is_refused(family: str, mode: str) -> bool:
    """A recurrent state cannot be rolled back: transformers refuses to try."""
    return family in HYBRIDS and mode in ("prompt_lookup", "assistant")


@pytest.mark.parametrize(("family", "mode", "page_size"), PAIRS)
def test_tokens_equal_eagers(poison, family, mode, page_size):
    eager, paged = models(family)
    run, cache = MODES[mode], paged_cache(paged, page_size)
    if is_refused(family, mode):
        refusals = []
        for model, given in ((eager, dynamic_cache(eager)), (paged, cache)):
            with pytest.raises(ValueError, match="not supported with stateful models") as caught:
                run(model, given)
            refusals.append(str(caught.value))
        assert refusals[0] == refusals[1]
        assert pages_of(cache).pages_in_use == 0
        return
    expected, _ = run(eager, dynamic_cache(eager))
    got, caches = run(paged, cache)
    for wanted, tokens in zip(expected, got):
        assert torch.equal(wanted, tokens)
        assert len(wanted[:, -NEW_TOKENS:].unique()) > 5, "tokens that do not vary prove nothing"
    for used in caches:
        pages = pages_of(used)
        assert pages.page_size == page_size
        assert pages.pages_in_use > 0
        pages.check()
        used.reset()
        pages.check()
        assert pages.pages_in_use == 0


@pytest.mark.parametrize("family", ["falcon_h1", "zaya_sliding", "bamba"])
def test_a_reset_cache_takes_another_batch_size(family):
    """The states of a layer are as new too, also outside of the inference mode that they were made in."""
    _, model = models(family)
    ids, mask = batch()
    cache = hf_paged.PagedCache(model.config, page_size=8)
    first = model.generate(ids[1:2], **with_cache(cache))
    cache.reset()
    with torch.inference_mode():
        model(ids, attention_mask=mask, **with_cache(cache))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(ids[1:2], **with_cache(cache)), first)


@pytest.mark.parametrize("family", ["falcon_h1", "bamba"])
def test_rows_of_a_hybrid_are_selected_and_repeated(family):
    """Pages and states move together; DynamicCache can only reorder its states, which comes to the same."""
    _, model = models(family)
    ids, _ = batch()
    cache, dense = hf_paged.PagedCache(model.config, page_size=8), DynamicCache(config=model.config)
    with torch.no_grad():
        for used in (cache, dense):
            model(ids[1:2, :9], **with_cache(used))
        cache.batch_repeat_interleave(3)
        dense.reorder_cache(torch.tensor([0, 0, 0]))
        logits = [model(ids[:, 8:10], **with_cache(used)).logits for used in (cache, dense)]
        assert torch.allclose(*logits, atol=1e-4)
        cache.batch_select_indices(torch.tensor([2, 0]))
        dense.reorder_cache(torch.tensor([2, 0]))
        cache.check()
        logits = [model(ids[:2, 10:11], **with_cache(used)).logits for used in (cache, dense)]
        assert torch.allclose(*logits, atol=1e-4)
        assert not torch.allclose(logits[0][0], logits[0][1], atol=1e-1)


@pytest.mark.parametrize("family", ["falcon_h1", "bamba"])
def test_recurrent_states_are_not_rolled_back(family):
    """As on a DynamicCache: not croppable, and crop() raises before it has changed anything."""
    _, model = models(family)
    ids, _ = batch()
    cache, dense = hf_paged.PagedCache(model.config, page_size=8), DynamicCache(config=model.config)
    with torch.no_grad():
        for used in (cache, dense):
            model(ids[1:2], **with_cache(used))
            assert not used.is_croppable
            with pytest.raises(RuntimeError, match="does not track past states"):
                used.crop(-3)
    assert cache.get_seq_length() == PROMPT
    assert cache.groups[None].table.lengths == [PROMPT]
    cache.check()


def test_recording_keeps_no_more_than_a_rollback_needs():
    """Each crop gives back what the window has passed, while the cache goes on recording."""
    _, model = models("mistral")
    cache = hf_paged.PagedCache(model.config, page_size=8)
    cache.activate_past_recording()
    ids = torch.randint(3, 90, (1, 6))
    with torch.no_grad():
        for _ in range(12):
            model(ids, **with_cache(cache))
            cache.crop(-2)
            assert cache.pages_in_use <= 1 + -(-(WINDOW + 8) // 8)
            cache.check()
    assert cache.get_seq_length() == 12 * 4


def test_an_encoder_decoder_is_paged_by_default():
    """Self-attention in pages, cross-attention in transformers' own cache; rolling back works on the pair."""
    eager, paged = models("bart")
    for rows, options in ((ALL, {}), (ALL, {"num_beams": 3}), (ONE, {"prompt_lookup_num_tokens": 3})):
        ids, mask = (x[rows] for x in batch())
        out = paged.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        cache = cache_of(out)
        assert type(cache.self_attention_cache) is hf_paged.PagedCache
        assert type(cache.cross_attention_cache) is DynamicCache
        assert torch.equal(out.sequences, eager.generate(ids, attention_mask=mask, **options))
        cache.self_attention_cache.check()


def test_a_mask_cut_by_chunked_prefill_is_refused():
    """transformers cuts the encoder's mask to the decoder's chunk: eager then attends to padding."""
    _, paged = models("bart")
    ids, mask = batch()
    with pytest.raises(ValueError, match="prefill_chunk_size cuts the encoder's mask"):
        paged.generate(ids, attention_mask=mask, prefill_chunk_size=6)
