"""What transformers' own tests ask of a cache in generation, asked of PagedCache through the public API.

Each test does the same with eager attention and transformers' DynamicCache, and with "paged_flash" and a PagedCache, in
float32: tokens are equal, scores and states close, the books right, and no page is left behind.
``eval/results/cache_behaviour.md`` says which test of transformers is asked where, and which do not apply.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from host import cache_of, with_cache
from tiny_models import build, copy_weights, randomise, tiny_config
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

import hf_paged
from hf_paged.cache.paged_layer import PagedLayer

FAMILIES = ("llama", "mistral", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3", "falcon_h1")
"""Full attention, windows, both mixed, sinks, learned positions, latent attention, recurrent states."""
STATELESS = FAMILIES[:-1]
"""Those that can be rolled back: transformers drafts for no others."""
PAGE, PROMPT, NEW_TOKENS = 8, 19, 8
ALL = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


class Pair:
    """Eager with DynamicCaches and the same weights on paged_flash with PagedCaches, which are checked at the end."""

    def __init__(self, family: str, seed: int = 6) -> None:
        config = tiny_config(family)
        self.eager, self.paged = build(config, "eager"), build(config, "paged_flash")
        randomise(self.eager, seed)
        copy_weights(self.eager, self.paged)
        self.caches: list[hf_paged.PagedCache] = []
        for model in self.models:
            model.generation_config.update(
                max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None, max_length=None
            )

    @property
    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return self.eager, self.paged

    def cache(self, model: PreTrainedModel, **options: Any) -> Cache:
        if model is self.eager:
            return DynamicCache(config=model.config)
        self.caches.append(hf_paged.PagedCache(model.config, page_size=PAGE, **options))
        return self.caches[-1]

    def generate(self, *inputs: Any, **options: Any) -> list[Any]:
        """What both give; a cache of its own for each, where none is given."""
        out = []
        for model in self.models:
            torch.manual_seed(3)
            out.append(model.generate(*inputs, **with_cache(self.cache(model)) | options))
            self.check()
        return out

    def check(self) -> None:
        for cache in self.caches:
            cache.check()

    def finish(self) -> None:
        for cache in self.caches:
            cache.reset()
            cache.check()
            assert cache.pages_in_use == 0


@pytest.fixture
def pair(request: pytest.FixtureRequest, poison: None) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    assert made.caches, "no PagedCache was used"
    made.finish()


def families(*names: str) -> Any:
    return pytest.mark.parametrize("pair", names or FAMILIES, indirect=True)


def prompt(rows: int = 2, length: int = PROMPT, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(inputs: dict[str, torch.Tensor], padding: int) -> dict[str, torch.Tensor]:
    return {name: torch.nn.functional.pad(x, (padding, 0)) for name, x in inputs.items()}


def assert_same(expected: Any, got: Any) -> None:
    """Equal tokens and beams; scores, logits and hidden states close, where both have them."""
    assert torch.equal(expected.sequences, got.sequences)
    assert set(expected.keys()) == set(got.keys())
    for name in ("scores", "logits"):
        for a, b in zip(expected.get(name) or (), got.get(name) or (), strict=True):
            assert torch.allclose(a, b, atol=2e-3)
    for a, b in zip(expected.get("hidden_states") or (), got.get("hidden_states") or (), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, atol=2e-3)
    if "sequences_scores" in expected:
        assert torch.allclose(expected.sequences_scores, got.sequences_scores, atol=1e-4)
        assert torch.equal(expected.beam_indices, got.beam_indices)


def assert_same_states(expected: Cache, got: hf_paged.PagedCache, atol: float = 1e-3) -> None:
    """The same lengths, shapes and states in every layer that keeps keys and values."""
    assert len(expected) == len(got)
    assert expected.get_seq_length() == got.get_seq_length()
    assert expected.is_sliding == got.is_sliding
    for a, b in zip(expected.layers, got.layers):
        if getattr(a, "keys", None) is None:
            assert getattr(b, "keys", None) is None
            continue
        assert a.get_seq_length() == b.get_seq_length()
        assert a.get_mask_sizes(3) == b.get_mask_sizes(3)
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert x.shape == y.shape
            assert torch.allclose(x, y, atol=atol)


# Ways of decoding, with everything that they return


@families()
def test_greedy_outputs(pair):
    expected, got = pair.generate(**prompt(), **ALL)
    assert_same(expected, got)
    assert cache_of(got) is pair.caches[0]
    assert cache_of(got).get_seq_length() == PROMPT + NEW_TOKENS - 1
    assert len(got.sequences[:, PROMPT:].unique()) > 4, "tokens that do not vary prove nothing"


@families()
def test_sample_outputs(pair):
    expected, got = pair.generate(**prompt(), **ALL, do_sample=True, num_return_sequences=2, top_p=0.9, temperature=1.5)
    assert_same(expected, got)
    assert cache_of(got).num_seqs == 4


@families()
@pytest.mark.parametrize("sample", [False, True], ids=["search", "sample"])
def test_beam_outputs(pair, sample):
    options = dict(num_beams=3, num_return_sequences=2, do_sample=sample, length_penalty=1.2)
    expected, got = pair.generate(**prompt(), **ALL, **options)
    assert_same(expected, got)
    followed = [set(row[row >= 0].tolist()) for row in got.beam_indices]
    assert any(len(beams) > 1 for beams in followed), "no beam changed its row: reorder_cache was not needed"


@families("llama", "gemma3_text", "gpt2")
def test_beams_that_end_early(pair):
    """Beams whose hypotheses are done go on being reordered until the last one is."""
    (probe, _) = pair.generate(**prompt(), num_beams=3)
    eos = int(probe[0, PROMPT + 3])
    expected, got = pair.generate(
        **prompt(), num_beams=3, num_return_sequences=3, eos_token_id=eos, early_stopping=True
    )
    assert torch.equal(expected, got)
    assert bool((got[:, PROMPT:] == eos).any())


@families("llama", "mistral", "gpt2")
def test_no_input_but_the_first_token(pair):
    expected, got = pair.generate(bos_token_id=5)
    assert torch.equal(expected, got)


@families("llama", "gpt_oss", "falcon_h1")
def test_generation_without_a_cache_is_the_same(pair):
    expected, got = pair.generate(**prompt())
    without = pair.paged.generate(**prompt(), use_cache=False)
    assert torch.equal(expected, got)
    assert torch.equal(got, without)


# Drafts


@families(*STATELESS)
@pytest.mark.parametrize("draft", ["same", "another"])
def test_assisted_decoding_is_greedy(pair, draft):
    """All drafted tokens are right, or most of them wrong and rolled back. Eager's own drafts fail in 5.17."""
    helper = pair.paged if draft == "same" else Pair("llama", seed=9).paged
    helper.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="constant")
    greedy = pair.eager.generate(**prompt(1), **ALL)
    got = pair.paged.generate(**prompt(1), **ALL, **with_cache(pair.cache(pair.paged)), assistant_model=helper)
    pair.check()
    assert torch.equal(greedy.sequences, got.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(greedy[name], got[name], strict=True):
            assert torch.allclose(a, b, atol=2e-3)


@families("llama", "mistral", "gpt2")
def test_assisted_sampling(pair):
    """A draft is accepted by comparing probabilities that differ by rounding, so tokens may differ; logits may not."""
    model = pair.paged
    model.generation_config.update(num_assistant_tokens=2, num_assistant_tokens_schedule="constant")
    for seed in range(4):
        torch.manual_seed(seed)
        out = model.generate(
            **prompt(1), **with_cache(pair.cache(model)), assistant_model=model, do_sample=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        pair.check()
        expected = pair.eager(out.sequences, use_cache=False).logits[0, PROMPT - 1 : -1]
        assert torch.allclose(torch.cat(out.logits), expected, atol=1e-3)


@families(*STATELESS)
@pytest.mark.parametrize("logits_to_keep", [None, 0])
def test_prompt_lookup_is_greedy(pair, logits_to_keep):
    """A prompt that repeats itself, so that drafts are found, right and wrong ones."""
    inputs = {name: x[:, :7].repeat(1, 3) for name, x in prompt(1).items()}
    options = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
    (greedy, _) = pair.generate(**inputs, **ALL)
    expected, got = pair.generate(**inputs, **ALL, prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **options)
    assert torch.equal(greedy.sequences, got.sequences)
    assert torch.equal(expected.sequences, got.sequences)


@families("llama", "gemma3_text")
def test_prompt_lookup_stops_at_eos(pair):
    (greedy, _) = pair.generate(**prompt(1))
    eos = int(greedy[0, PROMPT + 4])
    inputs = {"input_ids": greedy[:, : PROMPT + 8], "attention_mask": torch.ones(1, PROMPT + 8, dtype=torch.long)}
    expected, got = pair.generate(
        **inputs, prompt_lookup_num_tokens=4, max_matching_ngram_size=1, eos_token_id=eos, max_new_tokens=30
    )
    assert torch.equal(expected, got)


# Inputs: padding, positions, masks, embeddings, logits to keep


@families()
def test_left_padding_changes_nothing(pair):
    """The next token's logits, the tokens that follow, and the pages held, with 32 columns of padding or without."""
    inputs = prompt()
    padded = left_padded(inputs, 32)
    positions = padded["attention_mask"].cumsum(1) - 1
    positions = positions.masked_fill(padded["attention_mask"] == 0, 1)
    caches = [pair.cache(pair.paged) for _ in range(2)]
    plain = pair.paged(**inputs, **with_cache(caches[0])).logits[:, -1]
    if pair.paged.config.model_type != "gpt2":  # which takes positions of padding as they come
        shifted = pair.paged(**padded, position_ids=positions, **with_cache(caches[1])).logits[:, -1]
        assert torch.allclose(plain, shifted, atol=1e-4)
        if pair.paged.config.model_type != "deepseek_v3":  # which computes on dense keys: no mask reaches its pages
            assert caches[0].pages_in_use == caches[1].pages_in_use
    without, with_padding = (pair.generate(**x)[1] for x in (inputs, padded))
    assert torch.equal(without[:, PROMPT:], with_padding[:, PROMPT + 32 :])


@families()
def test_a_padded_batch_gives_the_tokens_of_each_row_alone(pair):
    rows = [prompt(1, length, seed) for seed, length in enumerate((5, 19, 11))]
    padded = [left_padded(row, 19 - row["input_ids"].shape[1]) for row in rows]
    batch = {name: torch.cat([row[name] for row in padded]) for name in padded[0]}
    expected, got = pair.generate(**batch)
    assert torch.equal(expected, got)
    for row, tokens in zip(rows, got):
        alone = pair.generate(**row)[1]
        assert torch.equal(alone[0, -NEW_TOKENS:], tokens[-NEW_TOKENS:])


@families("llama", "gemma3_text", "gpt_oss", "gpt2")
def test_with_and_without_position_ids(pair):
    inputs = prompt()
    expected, got = pair.generate(**inputs)
    positions = torch.arange(PROMPT).expand(2, -1)
    assert torch.equal(got, pair.generate(**inputs, position_ids=positions)[1])
    assert torch.equal(got, expected)


@families("llama", "mistral", "gemma3_text", "gpt2")
@pytest.mark.parametrize("num_beams", [1, 2])
def test_from_inputs_embeds(pair, num_beams):
    """The same tokens as from ids, with and without ids beside them; other embeddings give other scores."""
    inputs = prompt()
    embeds = pair.eager.get_input_embeddings()(inputs["input_ids"])
    options = dict(num_beams=num_beams, return_dict_in_generate=True, output_scores=True)
    from_ids = pair.generate(**inputs, **options)
    assert_same(*from_ids)
    both = pair.generate(inputs["input_ids"], inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(both[1].sequences, from_ids[1].sequences)
    alone = pair.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(alone[1].sequences, from_ids[1].sequences[:, PROMPT:])
    assert_same(*alone)
    other = pair.generate(inputs_embeds=embeds.flip(1), attention_mask=inputs["attention_mask"], **options)
    assert_same(*other)
    assert not torch.allclose(other[1].scores[0], alone[1].scores[0])


@families("llama", "gemma3_text", "deepseek_v3")
def test_logits_to_keep(pair):
    """All logits of the prompt, or its last one only: the same tokens."""
    expected, every = pair.generate(**prompt(), logits_to_keep=0)
    assert torch.equal(expected, every)
    assert torch.equal(every, pair.generate(**prompt())[1])
    caches = [pair.cache(pair.paged) for _ in range(2)]
    every = pair.paged(**prompt(), **with_cache(caches[0])).logits
    last = pair.paged(**prompt(), **with_cache(caches[1]), logits_to_keep=2).logits
    assert torch.allclose(every[:, -2:], last, atol=1e-5)


@families("llama", "qwen3", "deepseek_v3")
def test_a_custom_4d_mask_on_a_cache(pair):
    """Three continuations of one prefix side by side in one row of a cache, each blind to the others."""
    prefix, tails = prompt(1, 9)["input_ids"], prompt(3, 4, seed=2)["input_ids"]
    side_by_side = tails.reshape(1, 12)
    positions = (9 + torch.arange(4)).repeat(3)[None]
    inside = torch.block_diag(*[torch.ones(4, 4).tril()] * 3).bool()
    seen = torch.cat([torch.ones(12, 9, dtype=torch.bool), inside], 1)
    mask = torch.zeros(1, 1, 12, 21).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = []
    for model in pair.models:
        cache = pair.cache(model)
        model(prefix, **with_cache(cache))
        logits.append(model(side_by_side, attention_mask=mask, position_ids=positions, **with_cache(cache)).logits)
        pair.check()
    assert torch.allclose(*logits, atol=1e-3)
    alone = pair.eager(torch.cat([prefix.expand(3, -1), tails], 1)).logits[:, 9:]
    assert torch.allclose(logits[1].view(3, 4, -1), alone, atol=1e-3)


@families()
@pytest.mark.parametrize("chunk", [1, 8, 13, 50])
def test_chunked_prefill(pair, chunk):
    inputs = left_padded(prompt(), 3)
    inputs["input_ids"][1, :9] = inputs["attention_mask"][1, :9] = 0
    expected, chunked = pair.generate(**inputs, prefill_chunk_size=chunk)
    assert torch.equal(expected, chunked)
    if pair.paged.config.model_type != "falcon_h1":  # whose states depend on the chunks where there is padding
        assert torch.equal(chunked, pair.generate(**inputs)[1])


# Going on from a cache


@families()
@pytest.mark.parametrize("padding", [0, 6])
def test_going_on_from_past_key_values(pair, padding):
    """4 tokens at once, and 3 and then 1 on the cache of the first call: the same tokens, and the same states."""
    inputs = left_padded(prompt(), padding)
    inputs["input_ids"][1, :padding] = 0
    at_once = pair.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert_same(*at_once)
    in_two = []
    for model in pair.models:
        first = model.generate(
            **inputs, **with_cache(pair.cache(model)), max_new_tokens=3, return_dict_in_generate=True
        )
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        in_two.append(
            model.generate(
                first.sequences, attention_mask=mask, **with_cache(cache_of(first)), max_new_tokens=1,
                return_dict_in_generate=True,
            )
        )  # fmt: skip
        pair.check()
    for out in in_two:
        assert torch.equal(out.sequences, at_once[0].sequences)
    if not padding:  # where there is padding DynamicCache holds states, PagedCache zeros
        assert_same_states(cache_of(in_two[0]), cache_of(in_two[1]))
        assert_same_states(cache_of(at_once[0]), cache_of(in_two[1]))


@families("llama", "mistral", "gemma3_text", "gpt2")
def test_going_on_from_inputs_embeds(pair):
    inputs = prompt()
    embed, mask = pair.eager.get_input_embeddings(), inputs["attention_mask"]
    embeds = embed(inputs["input_ids"])
    at_once, _ = pair.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4)
    for model in pair.models:
        first = model.generate(
            inputs_embeds=embeds, attention_mask=mask, **with_cache(pair.cache(model)), max_new_tokens=3,
            return_dict_in_generate=True,
        )  # fmt: skip
        second = model.generate(
            inputs_embeds=torch.cat([embeds, embed(first.sequences)], 1),
            attention_mask=torch.nn.functional.pad(mask, (0, 3), value=1), **with_cache(cache_of(first)),
            max_new_tokens=1,
        )  # fmt: skip
        pair.check()
        assert torch.equal(torch.cat([first.sequences, second], 1), at_once)


@families()
def test_a_conversation(pair):
    """Five turns on one cache; each answer equals the one to the whole text with a new cache."""
    caches = [pair.cache(model) for model in pair.models]
    text = prompt(1)["input_ids"]
    for turn in range(5):
        answers = [
            model.generate(text, attention_mask=torch.ones_like(text), **with_cache(cache), max_new_tokens=5)
            for model, cache in zip(pair.models, caches)
        ]
        pair.check()
        assert torch.equal(*answers)
        assert torch.equal(answers[1], pair.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=5)[0])
        text = torch.cat([answers[1], prompt(1, 7, seed=turn + 2)["input_ids"]], 1)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == PROMPT + 5 * 5 + 4 * 7 - 1


@families("llama", "gemma3_text", "falcon_h1")
def test_a_cache_is_used_again_after_reset(pair):
    cache = pair.cache(pair.paged)
    results = []
    for rows in (2, 2, 1, 3):
        got = pair.paged.generate(**prompt(rows), **with_cache(cache))
        assert torch.equal(got, pair.generate(**prompt(rows))[0])
        results.append(got)
        cache.reset()
        cache.check()
        assert (cache.pages_in_use, cache.get_seq_length()) == (0, 0)
    assert torch.equal(*results[:2])


@families("llama", "gpt_oss")
def test_a_generated_pad_token_is_a_token(pair):
    """It is one to a cache: a mask that transformers makes up later, which hides it, is refused and explained."""
    model, cache = pair.paged, pair.cache(pair.paged)
    ids = prompt(1)["input_ids"]
    first = model.generate(ids, attention_mask=torch.ones_like(ids), **with_cache(cache))
    pad = int(first[0, PROMPT + 2])
    longer = torch.cat([first, prompt(1, 3, seed=5)["input_ids"]], 1)
    with pytest.raises(ValueError, match=r"hides every pad_token_id in input_ids, generated ones too"):
        model.generate(longer, **with_cache(cache), pad_token_id=pad)
    pair.check()
    got = model.generate(longer, attention_mask=torch.ones_like(longer), **with_cache(cache), pad_token_id=pad)
    expected = pair.eager.generate(longer, attention_mask=torch.ones_like(longer), pad_token_id=pad)
    assert torch.equal(got, expected)


# The cache by itself


@families()
def test_states_after_a_forward(pair):
    """Layers, lengths, shapes and mask sizes are those of a DynamicCache, before and after one more token."""
    caches = [pair.cache(model) for model in pair.models]
    assert not any(cache.is_initialized for cache in caches)
    for ids in (prompt()["input_ids"], prompt(2, 1, seed=2)["input_ids"], prompt(2, 5, seed=3)["input_ids"]):
        for model, cache in zip(pair.models, caches):
            assert cache_of(model(ids, **with_cache(cache))) is cache
        assert_same_states(*caches)
        pair.check()
    assert caches[0].is_initialized == caches[1].is_initialized
    assert all(layer.is_initialized for layer in caches[1].layers if isinstance(layer, PagedLayer))


@families("llama", "mistral", "gemma3_text")
def test_updates_by_hand(pair):
    """What update() returns and what is kept, one number a token, layer by layer as far as each has come."""
    pair.paged.set_attn_implementation("sdpa")  # dense states
    caches = [pair.cache(model) for model in pair.models]
    config = pair.eager.config
    heads, dim, count = config.num_key_value_heads, config.head_dim, 0
    for length in (5, 1, 1, 4, 9, 1):
        states = torch.arange(count, count + length, dtype=torch.float32)[None, None, :, None].expand(1, heads, -1, dim)
        count += length
        for layer in range(len(caches[0])):
            expected, got = (cache.update(states + 100 * layer, -states, layer) for cache in caches)
            for a, b in zip(expected, got):
                assert torch.equal(a, b)
        assert_same_states(*caches, atol=0)
        pair.check()


@families(*STATELESS)
@pytest.mark.parametrize("remove", [0, 1, 5, 24, 100])
def test_crop(pair, remove):
    """Nothing, some, all and more than all columns; then the next tokens are as in a run without a cache."""
    cache, dense = pair.cache(pair.paged), DynamicCache(config=pair.eager.config)
    is_windowed = any(cache.is_sliding)
    if is_windowed:
        remove = min(remove, 8)  # recording keeps what it takes to take back one step
    cache.activate_past_recording()
    ids = prompt(2, 24)["input_ids"]
    for part in ids.split(8, 1):
        pair.paged(part, **with_cache(cache))
        pair.eager(part, **with_cache(dense))
    cache.crop(-remove)
    pair.check()
    keep = max(0, 24 - remove)
    assert cache.get_seq_length() == keep
    if not is_windowed and keep:  # of no columns PagedCache has no states, DynamicCache empty ones
        dense.crop(-remove)
        assert_same_states(dense, cache)
    new = prompt(2, 4, seed=2)["input_ids"]
    got = pair.paged(new, **with_cache(cache)).logits
    expected = pair.eager(torch.cat([ids[:, :keep], new], 1)).logits[:, -4:]
    assert torch.allclose(got, expected, atol=1e-3)


@families("llama", "mistral", "gemma3_text", "gpt2")
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_other_attention_on_a_paged_cache(pair, attn):
    """The cache gathers for them: greedy and beams as with a DynamicCache."""
    pair.paged.set_attn_implementation(attn)
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 5}):
        inputs = left_padded(prompt(), 4)
        expected, got = pair.generate(**inputs, **options)
        assert torch.equal(expected, got), options


# Encoder-decoder models


BART = dict(
    vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
    encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128, decoder_start_token_id=2,
    forced_eos_token_id=None, pad_token_id=0, bos_token_id=1, eos_token_id=None, dropout=0.0, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}], ids=str)
def test_encoder_decoder_outputs(poison, options):
    """Self-attention in pages, cross-attention in transformers' own cache; states of both are as eager's."""
    eager, paged = (
        AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **BART), attn_implementation=attn).eval()
        for attn in ("eager", "paged_flash")
    )
    randomise(eager, 6)
    copy_weights(eager, paged)
    outputs = []
    for model in (eager, paged):
        own = DynamicCache(config=model.config) if model is eager else hf_paged.PagedCache(model.config, page_size=PAGE)
        cache = EncoderDecoderCache(own, DynamicCache(config=model.config))
        torch.manual_seed(3)
        outputs.append(
            model.generate(
                **left_padded(prompt(), 2), **options, **with_cache(cache), max_new_tokens=NEW_TOKENS,
                max_length=None, return_dict_in_generate=True, output_scores=True,
            )
        )  # fmt: skip
    assert_same(*outputs)
    expected, got = (cache_of(out) for out in outputs)
    assert_same_states(expected.self_attention_cache, got.self_attention_cache)
    assert expected.get_seq_length() == got.get_seq_length() == NEW_TOKENS
    for a, b in zip(expected.cross_attention_cache.layers, got.cross_attention_cache.layers):
        assert torch.allclose(a.keys, b.keys, atol=1e-3)
    own = got.self_attention_cache
    own.check()
    got.reset()
    own.check()
    assert own.pages_in_use == 0
