"""Prompts with images: tokens that see one another (an image's, a prefix's) come in a 4D mask, padded or not.

The answer is eager attention. The prefill takes the reference path, decode steps read the pages.
"""


import pytest
import torch
from explicit_models import prompts, tiny_model, with_drawn_weights
from host import cache_of, with_cache
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

import hf_paged

IMAGE, IMAGE_TOKENS, LENGTH, WINDOW = 98, 4, 13, 6
VISION = dict(
    model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    image_size=32, patch_size=16, projection_dim=64, vision_use_head=False,
)  # fmt: skip
TEXT = dict(
    vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]


def build(family, attn_implementation):
    if family == "gemma3":
        text = TEXT | dict(sliding_window=WINDOW, layer_types=ALTERNATING)
        special = dict(image_token_index=IMAGE, boi_token_index=96, eoi_token_index=97)
        config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=IMAGE_TOKENS, **special)
        model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    else:
        text = TEXT | (
            dict(model_type="gemma2", sliding_window=WINDOW, layer_types=ALTERNATING)
            if family == "paligemma2"
            else dict(model_type="gemma")
        )
        config = PaliGemmaConfig(
            text_config=text, vision_config=VISION, image_token_index=IMAGE, projection_dim=64, hidden_size=64
        )
        model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    model = with_drawn_weights(model)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def batch(family, paddings):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(LENGTH) >= torch.tensor(paddings)[:, None]
    ids = torch.randint(3, 90, mask.shape, generator=generator)
    for row, padding in enumerate(paddings):
        ids[row, padding : padding + IMAGE_TOKENS] = IMAGE
    ids = ids.masked_fill(~mask, 0)
    images = torch.randn(len(paddings), 3, 32, 32, generator=generator)
    types = (ids == IMAGE).long() if family == "gemma3" else torch.zeros_like(ids)
    return dict(input_ids=ids, attention_mask=mask.long(), pixel_values=images, token_type_ids=types)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("paddings", [(0,), (0, 4, 2)], ids=["one", "left-padded"])
@pytest.mark.parametrize("family", ["paligemma", "paligemma2", "gemma3"])
def test_images(family, paddings, options):
    inputs = batch(family, paddings)
    eager, paged = (build(family, name) for name in ("eager", "paged_flash"))
    expected, got = (
        model.generate(
            **inputs, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
        for model in (eager, paged)
    )
    assert torch.equal(got.sequences, expected.sequences)
    for logits, want in zip(got.logits, expected.logits):
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-4 * float(want.abs().max()))
    cache = cache_of(got)
    assert isinstance(cache, hf_paged.PagedCache)
    cache.check()
    if not options:
        # Padding owns no slot, although the mask that told of it is 4D.
        assert cache.groups[None].table.lengths == [LENGTH - padding + 6 for padding in paddings]
    with torch.no_grad():
        held = inputs["attention_mask"].bool()
        want, logits = (model(**inputs, use_cache=False).logits[held] for model in (eager, paged))
    torch.testing.assert_close(logits, want, rtol=0, atol=2e-4 * float(want.abs().max()))


def test_an_images_tokens_see_one_another():
    """The tests above can tell: without the image's span, logits are others."""
    inputs = batch("gemma3", (0, 4))
    eager = build("gemma3", "eager")
    with torch.no_grad():
        expected = eager(**inputs).logits[:, -1]
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
        difference = (eager(**inputs).logits[:, -1] - expected).abs().amax(dim=1)
    assert bool((difference > 0.01 * expected.abs().max()).all())


def dense_mask(held, num_queries):
    """bool ``[B, 1, num_queries, columns]``: causal, without padding."""
    columns = held.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()[-num_queries:]
    return causal[None, None] & held[:, None, None].bool()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_4d_masks_in_every_step_over_a_cache(kind):
    """Padding in the first one, a chunk, single tokens, and 2D masks between them."""
    eager, paged = (tiny_model("llama", name) for name in ("eager", "paged_flash"))
    ids = torch.tensor(prompts(12, 12))
    held = torch.ones_like(ids)
    held[1, :3] = 0
    positions = (held.cumsum(1) - 1).clamp(min=0)
    cache, logits = hf_paged.PagedCache(paged.config), []
    with torch.no_grad():
        expected = eager(ids, attention_mask=held, position_ids=positions, use_cache=False).logits[held.bool()]
        for first, last, is_2d in ((0, 6, False), (6, 9, False), (9, 10, True), (10, 11, False), (11, 12, True)):
            mask = held[:, :last] if is_2d else dense_mask(held[:, :last], last - first)
            if kind == "float" and not is_2d:
                mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            out = paged(
                ids[:, first:last], attention_mask=mask, position_ids=positions[:, first:last], **with_cache(cache)
            )
            logits.append(out.logits)
    got = torch.cat(logits, dim=1)[held.bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert cache.groups[None].table.lengths == [12, 9]
    cache.check()


def test_a_4d_mask_that_shows_padding_is_refused():
    model = tiny_model("llama", "paged_flash")
    ids, held = torch.tensor(prompts(6, 6)), torch.ones(2, 6, dtype=torch.long)
    held[1, :2] = 0
    cache = hf_paged.PagedCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=dense_mask(held, 6), **with_cache(cache))
        everything = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        with pytest.raises(ValueError, match="shows column 0 of row 1, which the cache holds as padding"):
            model(ids[:, :1], attention_mask=everything, **with_cache(cache))
    assert cache.get_seq_length() == 6
    cache.check()
