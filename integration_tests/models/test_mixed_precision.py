"""bfloat16 autocast over float32 weights, weights of several dtypes, float64: every path of attention and of the cache.

The answer is eager attention in float32; an error may be twice that of eager attention under the same autocast.
``test_parity.py`` trains and runs every family under autocast.
"""


from collections.abc import Iterator

import pytest
import torch
from explicit_models import BASE, prompts, tiny_model, with_drawn_weights
from host import CACHE, cache_of, with_cache
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, Qwen3Config

import hf_paged
from hf_paged.engine import Engine
from hf_paged.mixed_precision import in_one_dtype, without_autocast

LENGTHS = (13, 4, 22, 9)
FLOOR = 0.005


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_oss"])
def models(request):
    """(eager, paged_flash) with the same weights."""
    return tiny_model(request.param, "eager"), tiny_model(request.param, "paged_flash")


def error(actual, exact):
    assert actual.isfinite().all()
    return float((actual.float() - exact).norm() / exact.norm())


def padded():
    sequences = prompts(*LENGTHS)
    ids = torch.tensor([[5] * (max(LENGTHS) - len(s)) + s for s in sequences])
    mask = torch.arange(max(LENGTHS)) >= torch.tensor([[max(LENGTHS) - len(s)] for s in sequences])
    return ids, mask.long()


def packed():
    sequences = prompts(*LENGTHS)
    ids = torch.tensor([[token for s in sequences for token in s]])
    positions = torch.tensor([[i for s in sequences for i in range(len(s))]])
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS))
    same = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    causal = torch.ones(len(same), len(same), dtype=torch.bool).tril()
    hidden = ~(causal & (same[:, None] == same))[None, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    return ids, positions, lengths, mask


def dense_path(model):
    return model(input_ids=padded()[0], use_cache=False)


def padded_path(model):
    ids, mask = padded()
    out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    return out.__class__(logits=out.logits[mask.bool()])


def packed_path(model):
    # Eager gets the packing as a 4D mask: no window and no chunk of it crosses a border.
    ids, positions, lengths, mask = packed()
    given = lengths if model.config._attn_implementation == "paged_flash" else {"attention_mask": mask.to(model.dtype)}
    return model(input_ids=ids, position_ids=positions, use_cache=False, **given)


def path_4d(model):
    ids, positions, _, mask = packed()
    return model(input_ids=ids, position_ids=positions, attention_mask=mask.to(model.dtype), use_cache=False)


PATHS = {"dense": dense_path, "padded": padded_path, "packed": packed_path, "4d": path_4d}


def gradients(model, path, enabled):
    """Those of attention, and the logits."""
    model.zero_grad()
    with autocast(enabled):
        logits = path(model).logits
        loss = (logits.float() * torch.arange(logits.shape[-1]).remainder(5)).pow(2).mean()
    loss.backward()
    return [logits.detach(), *(w.grad.clone() for name, w in model.named_parameters() if "self_attn" in name)]


@pytest.mark.parametrize(
    ("family", "path"),
    # The windows of gpt_oss are in no mask of this file.
    [("llama", path) for path in PATHS.values()] + [("gpt_oss", dense_path), ("gpt_oss", padded_path)],
)
def test_training_is_as_near_to_float32_as_eager(family, path):
    eager, paged = (tiny_model(family, name) for name in ("eager", "paged_flash"))
    exact = gradients(eager, path, False)
    rounded, got = gradients(eager, path, True), gradients(paged, path, True)
    assert len(got) == len(exact) > 1
    for want, other, ours in zip(exact, rounded, got):
        assert error(ours, want) <= 2 * error(other, want) + FLOOR


def steps(model, cache, enabled):
    """A padded prefill, a chunk of three tokens and single ones, over a cache."""
    ids, mask = padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    if cache is None:
        is_paged = model.config._attn_implementation == "paged_flash"
        cache = (hf_paged.PagedCache if is_paged else DynamicCache)(config=model.config)
    with torch.no_grad(), autocast(enabled):
        for first, last in ((0, 17), (17, 20), (20, 21), (21, 22)):
            out = model(
                input_ids=ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                **with_cache(cache),
            )  # fmt: skip
            logits.append(out.logits[mask[:, first:last].bool()])
    return torch.cat(logits)


@pytest.mark.parametrize("reader", ["paged_flash", "eager"])
def test_steps_over_pages_are_as_near_to_float32_as_eager(models, reader):
    eager, paged = models
    exact, rounded = steps(eager, None, False), steps(eager, None, True)
    cache = hf_paged.PagedCache(paged.config)
    got = steps(paged if reader == "paged_flash" else eager, hf_paged.PagedCache(eager.config), True)
    assert error(got, exact) <= 2 * error(rounded, exact) + FLOOR
    steps(paged, cache, True)
    pages = [pages for group in cache.pool.groups.values() for pages in group.layers.values()]
    assert {(x.k.dtype, x.v.dtype) for x in pages} == {(torch.bfloat16, torch.bfloat16)}
    # The pages have autocast's dtype: a step without it is refused, with what to do.
    with pytest.raises(ValueError, match=r"torch.bfloat16.* brings .*torch.float32.* reset\(\)"), torch.no_grad():
        paged(input_ids=padded()[0][:, :1], **with_cache(cache))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_modes_run_under_autocast(options):
    model = tiny_model("llama", "paged_flash")
    ids = torch.tensor([prompts(9)[0] * 2])
    with autocast():
        got, want = (
            m.generate(ids, max_new_tokens=6, do_sample=False, **options) for m in (model, tiny_model("llama", "eager"))
        )
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["paged_flash", "paged_flash_2"])
def test_generate_batch_of_a_forward_under_autocast(name):
    """As accelerate prepares it; both the gathered keys and those read in place through block tables."""
    if CACHE == "cache":
        pytest.skip("from 5.24 on transformers writes to its cache before attention, and refuses two dtypes there")
    greedy = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    eager, model = tiny_model("llama", "eager"), tiny_model("llama", name)
    model.forward = autocast()(model.forward)
    sequences = prompts(5, 12)
    outputs = model.generate_batch(inputs=sequences, generation_config=greedy, progress_bar=False)
    for output, sequence in zip(outputs.values(), sequences):
        assert output.error is None
        with autocast():
            expected = eager.generate(torch.tensor([sequence]), generation_config=greedy)[0, len(sequence) :]
        assert output.generated_tokens == expected.tolist()


def check_choices(model, ids, num_prompt):
    """Most new tokens have the best float32 logit, the others one so near to it that roundings may have chosen.

    Two logits may be off by twice the largest error that the model itself makes at that place under autocast.
    """
    with torch.no_grad():
        rounded = model(torch.tensor([ids], device=model.device)).logits[0, num_prompt - 1 : -1].cpu()
        exact = tiny_model(model.config.model_type, "eager")(torch.tensor([ids])).logits[0, num_prompt - 1 : -1]
    behind = exact.amax(-1) - exact.gather(1, torch.tensor(ids[num_prompt:])[:, None])[:, 0]
    errors = (rounded - exact).abs().amax(-1)
    assert bool((errors > 0).all())
    assert bool((behind <= 4 * errors).all())
    assert int((behind == 0).sum()) > len(behind) / 2


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one state in a process, which other tests have made for another precision."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("how", ["accelerate", "decorator"])
@pytest.mark.parametrize("name", ["sdpa", "paged_flash"])
def test_a_patched_model_whose_forward_enables_autocast(name, how, monkeypatch):
    model = tiny_model("llama", name)
    if how == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        assert model(torch.tensor(prompts(3))).logits.dtype == torch.float32
    else:
        model.forward = autocast()(model.forward)
    ids, mask = padded()
    call = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
    reasons = []
    monkeypatch.setattr("hf_paged.generation.patch.log_original", reasons.append)
    hf_paged.patch_generate(model)
    for row, held in zip(model.generate(ids, **call), mask.sum(1)):
        check_choices(model, row[ids.shape[1] - held :].tolist(), int(held))
    assert reasons == []
    pool = model.generate.engine._core.pool
    assert {kind.dtype for group in pool.groups.values() for pair in group.kinds.values() for kind in pair} == {
        torch.bfloat16
    }


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_patched_model_that_accelerate_prepares_and_unwraps():
    """Each time another engine, whose pages have the dtype of then."""
    accelerate = pytest.importorskip("accelerate")
    model, (ids, mask) = tiny_model("llama", "sdpa"), padded()
    call = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    single = model.generate(ids, **call)
    hf_paged.patch_generate(model)
    assert torch.equal(model.generate(ids, **call), single)
    engine = model.generate.engine
    accelerator.prepare(model)
    for row, held in zip(model.generate(ids, **call), mask.sum(1)):
        check_choices(model, row[ids.shape[1] - held :].tolist(), int(held))
    assert model.generate.engine is not engine
    engine = model.generate.engine
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(model.generate(ids, **call), single)
    assert model.generate.engine is not engine


def test_requests_of_a_forward_under_autocast():
    """Chunks of prompts beside decode steps, in the engine's thread, which knows of no autocast itself."""
    model = tiny_model("mistral", "sdpa")
    model.forward = autocast()(model.forward)
    sequences = prompts(5, 30, 17, 9, 40)
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = hf_paged.EngineConfig(num_pages=64, page_size=8, max_num_seqs=4, max_batch_tokens=16)
    with Engine(model, options) as engine:
        outputs = engine.generate(sequences, generation_config=greedy)
        for output, ids in zip(outputs, sequences):
            assert len(output.token_ids) == 8
            check_choices(model, ids + output.token_ids, len(ids))
        engine.check()
    with pytest.raises(ValueError, match="fuse=True cannot be: the model's forward enables autocast"):
        Engine(model, hf_paged.EngineConfig(num_pages=64, fuse=True))


@pytest.mark.gpu
def test_requests_of_a_forward_under_autocast_on_a_gpu():
    """Unfused and without graphs, which would keep copies of the weights."""
    model = tiny_model("llama", "sdpa").cuda()
    model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    sequences = prompts(5, 30, 17, 9, 40)
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    with Engine(model, hf_paged.EngineConfig(num_pages=256)) as engine:
        for output, ids in zip(engine.generate(sequences, generation_config=greedy), sequences):
            check_choices(model, ids + output.token_ids, len(ids))
        assert engine.fused is None
        assert engine.warm_up() == 0
        engine.check()
    with pytest.raises(ValueError, match="cuda_graphs=True cannot be: its forward enables autocast"):
        Engine(model, hf_paged.EngineConfig(num_pages=256, cuda_graphs=True))


def test_an_engine_ends_requests_of_a_model_that_enables_autocast_later():
    model = tiny_model("llama", "sdpa")
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with Engine(model, hf_paged.EngineConfig(num_pages=64, fuse=True), background=False) as engine:
        model.forward = autocast()(model.forward)
        output = engine.submit(prompts(5)[0], generation_config=greedy).result()
        assert output.finish_reason == "error"
        assert "autocast" in str(output.error)


def test_an_engine_refuses_autocast_that_it_cannot_see():
    model = tiny_model("llama", "sdpa")
    forward = model.model.forward

    def hidden(*args, **kwargs):
        with autocast():
            return forward(*args, **kwargs)

    model.model.forward = hidden
    with pytest.raises(hf_paged.UnsupportedModelError, match=r"keys in torch\.float32 and values in torch\.bfloat16"):
        Engine(model, background=False)


def test_float32_norms_in_a_model_of_half_precision():
    """They leave queries and keys in float32 and values in bfloat16; eager attention refuses, flash attention casts."""
    config = Qwen3Config(**BASE)
    eager, half, paged = (
        with_drawn_weights(AutoModelForCausalLM.from_config(config, attn_implementation=name))
        for name in ("eager", "eager", "paged_flash")
    )
    half.bfloat16()
    paged.bfloat16()
    for layer in paged.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    for run in (lambda model: padded_path(model).logits, lambda model: steps(model, None, False)):
        with torch.no_grad():
            exact, rounded, got = (run(model) for model in (eager, half, paged))
        assert error(got, exact) <= 2 * error(rounded, exact) + FLOOR


def test_dtypes_that_no_rule_brings_together_are_refused():
    module = tiny_model("llama", "paged_flash").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    attend = hf_paged.attention.interface.paged_flash_attention
    with pytest.raises(TypeError, match=r"the same dtype, got torch.float16, torch.bfloat16 and torch.bfloat16"):
        attend(module, q.half(), k.bfloat16(), k.bfloat16(), None)
    with pytest.raises(TypeError, match=r"the same dtype, got torch.float32, torch.float64 and torch.float64"):
        attend(module, q, k.double(), k.double(), None)


def test_what_autocast_leaves_alone():
    double, single = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    with autocast():
        assert [x.dtype for x in in_one_dtype(single, double)] == [torch.bfloat16, torch.float64]
        with without_autocast(single.device):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# float64


def double(name):
    return tiny_model("llama", name).double()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_float64_forward_and_gradients(path):
    # Not eager attention, whose softmax is in float32.
    expected, got = (gradients(double(name), path, False) for name in ("sdpa", "paged_flash"))
    for want, ours in zip(expected, got):
        assert ours.dtype == torch.float64
        assert float((ours - want).abs().max()) <= 1e-9 * float(want.abs().max())


def test_float64_over_a_cache():
    model = double("paged_flash")
    ids, mask = padded()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(
        out.sequences, double("sdpa").generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    )
    assert cache_of(out).layers[0].keys.dtype == torch.float64
