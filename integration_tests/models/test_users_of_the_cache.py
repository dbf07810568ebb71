"""What users do with a PagedCache beside generate(), and settings around a patched model."""

import copy
import pickle

import numpy as np
import pytest
import torch
from explicit_models import prompts, tiny_model
from host import with_cache
from transformers import DynamicCache

import hf_paged

SMALL = {"num_hidden_layers": 2}
IDS = torch.tensor(prompts(9, 9))


def filled(cache):
    model = tiny_model("llama", "paged_flash", **SMALL)
    with torch.no_grad():
        model(IDS, **with_cache(cache(config=model.config)))
        own = cache(config=model.config)
        model(IDS, **with_cache(own))
    return own


def test_iteration_gives_what_a_dynamic_cache_gives():
    for got, want in zip(filled(hf_paged.PagedCache), filled(DynamicCache), strict=True):
        assert len(got) == len(want) == 3
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


def test_pickling_is_refused_and_copies_are_not():
    cache = filled(hf_paged.PagedCache)
    with pytest.raises(TypeError, match=r"pages cannot be pickled or saved.*cache.layers\[i\].keys.*deepcopy"):
        pickle.dumps(cache)
    twin = copy.deepcopy(cache)
    assert torch.equal(twin.layers[0].keys, cache.layers[0].keys)
    empty = pickle.loads(pickle.dumps(hf_paged.PagedCache(cache.config, page_size=8)))
    assert all(group.pages.pool is empty.pool for group in empty.groups.values())


def test_numpy_integers_are_integers():
    config = tiny_model("llama", "paged_flash", **SMALL).config
    cache = hf_paged.PagedCache(config, page_size=np.int64(8), num_pages=np.int32(5))
    assert (cache.page_size, cache.pool.num_pages) == (8, 5)
    assert type(cache.page_size) is type(cache.pool.num_pages) is int
    for wrong in (True, 2.0, 0):
        with pytest.raises(ValueError, match="num_pages must be None or a positive int"):
            hf_paged.PagedCache(config, num_pages=wrong)


def test_a_cache_filled_in_inference_mode_goes_on_outside():
    model = tiny_model("llama", "paged_flash", **SMALL)
    ids = torch.tensor(prompts(12, 12))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for first_mode, second_mode in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        with first_mode():
            cache = hf_paged.PagedCache(model.config)
            model(ids[:, :7], **with_cache(cache))
        with second_mode():
            cache.reorder_cache(torch.tensor([0, 1]))
            got = torch.cat([model(ids[:, i : i + 1], **with_cache(cache)).logits for i in range(7, 12)], dim=1)
            torch.testing.assert_close(got, expected[:, 7:], rtol=0, atol=2e-4 * float(expected.abs().max()))
            cache.crop(-3)
            cache.check()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_assistant_after_pad_tokens(family):
    """The large model accepts a pad token; the assistant's mask hid it, and its cache holds it as a token."""
    large, small = (tiny_model(family, "paged_flash", **SMALL) for _ in range(2))
    eager = tiny_model(family, "eager", **SMALL)
    ids = IDS[:1]
    call = dict(attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
    plain = eager.generate(ids, **call)[0, ids.shape[1] :].tolist()
    # Its second token is the pad token from now on.
    for model in (large, small, eager):
        model.generation_config.pad_token_id = plain[1]
    small.generation_config.num_assistant_tokens = 3
    small.generation_config.num_assistant_tokens_schedule = "constant"
    assert torch.equal(large.generate(ids, assistant_model=small, **call), eager.generate(ids, **call))


def test_beams_of_a_patched_model_under_a_default_dtype_of_float16():
    model = tiny_model("llama", "paged_flash", **SMALL).half()
    call = dict(num_beams=3, max_new_tokens=4, do_sample=False)
    hf_paged.patch_generate(model)
    expected = model.generate(IDS, **call)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(model.generate(IDS, **call), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("patched", [False, True])
def test_offloaded_weights(patched):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama", "paged_flash", **SMALL)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if patched:
        hf_paged.patch_generate(model)
    assert model.device.type == "meta"
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
