"""``torch.compile``, ``torch.export`` and fake tensors of models on "paged_flash", with and without pages."""


import pytest
import torch
from explicit_models import prompts, tiny_model
from host import with_cache
from torch._subclasses import FakeTensorMode

import hf_paged
from hf_paged.attention import dense, interface

BACKEND = "aot_eager"  # All that may go wrong before code is generated.


def model_of(family="llama"):
    changes = {"num_hidden_layers": 2 if family == "gemma2" else 1}
    if family == "gemma2":
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    return tiny_model(family, "paged_flash", **changes)


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs():
    """A left-padded batch, and three packed sequences."""
    ids = torch.tensor(prompts(14, 14))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.tensor([[*range(5), *range(2), *range(7)]])
    return {
        "dense": dict(input_ids=ids), "padded": dict(input_ids=ids, attention_mask=mask),
        "packed": dict(input_ids=ids[:1], position_ids=positions),
    }  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), [("llama", "dense"), ("gemma2", "padded"), ("llama", "packed")])
def test_one_graph_trains_like_the_model_itself(family, kind):
    model, given = model_of(family), inputs()[kind]
    results = []
    for forward in (model, torch.compile(model, backend=BACKEND, fullgraph=True)):
        model.zero_grad()
        out = forward(**given, labels=given["input_ids"], use_cache=False)
        out.loss.backward()
        held = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        results.append([out.logits.detach()[held], *(weight.grad.clone() for weight in model.parameters())])
    for got, want in zip(results[1], results[0]):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_graph_of_a_padded_batch_without_gradients(side):
    model, given = model_of(), inputs()["padded"]
    if side == "right":
        given["attention_mask"] = given["attention_mask"].flip(1)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        want, got = (f(**given, use_cache=False).logits for f in (model, compiled))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_one_graph_of_a_padded_batch_in_windows(monkeypatch, family):
    """The mask stays 2D: torch 2.11 traces ``torch.compiler.is_exporting()`` as True, and exports get 4D masks."""
    model, given = model_of(family), inputs()["padded"]
    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(interface, "with_dense_mask", None)
            got = torch.compile(model, backend=BACKEND, fullgraph=True)(**given, use_cache=False).logits
        model.set_attn_implementation("eager")
        want = model(**given, use_cache=False).logits
    held = given["attention_mask"].bool()
    torch.testing.assert_close(got[held], want[held], rtol=0, atol=1e-5 * float(want.abs().max()))


def test_one_graph_of_a_4d_mask(monkeypatch):
    model, ids = model_of(), inputs()["dense"]["input_ids"]
    mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask[:, :, 5:, 1:4] = False
    lines = []
    monkeypatch.setattr(dense.logger, "warning_once", lines.append)
    with torch.no_grad():
        got = torch.compile(model, backend=BACKEND, fullgraph=True)(ids, attention_mask=mask, use_cache=False).logits
        model.set_attn_implementation("eager")
        want = model(ids, attention_mask=torch.where(mask, 0.0, torch.finfo().min), use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert ["4D attention mask" in line for line in lines] == [True]


def test_steps_over_pages():
    model = model_of("mistral")
    given = inputs()["padded"]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        caches = [hf_paged.PagedCache(model.config) for _ in range(2)]
        for first, last in ((0, 13), (13, 14)):
            step = dict(input_ids=given["input_ids"][:, first:last], attention_mask=given["attention_mask"][:, :last])
            want, got = (f(**step, **with_cache(c)).logits for f, c in zip((model, compiled), caches))
            held = step["attention_mask"][:, first:].bool()
            torch.testing.assert_close(got[held], want[held], rtol=0, atol=1e-5 * float(want.abs().max()))
            assert caches[1].columns == last
            caches[1].check()


@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_between_tokens_of_a_window_is_refused_in_compiled_code(use_cache):
    """A compiled model cannot choose another kind of mask by its values, which eager code does."""
    model, given = model_of("mistral"), inputs()["padded"]
    given["attention_mask"][1, 9] = 0
    compiled = torch.compile(model, backend="eager", fullgraph=not use_cache)
    with torch.no_grad():
        model(**given, use_cache=False)
        cache = with_cache(hf_paged.PagedCache(model.config)) if use_cache else {}
        with pytest.raises(ValueError, match="hides columns between tokens, within a sliding window of 7 columns"):
            compiled(**given, **cache, use_cache=use_cache)
        given["attention_mask"][1, 9] = 1
        cache = with_cache(hf_paged.PagedCache(model.config)) if use_cache else {}
        want, got = model(**given, use_cache=False).logits, compiled(**given, **cache, use_cache=use_cache).logits
    held = given["attention_mask"].bool()
    torch.testing.assert_close(got[held], want[held], rtol=0, atol=1e-5 * float(want.abs().max()))


def test_generate_of_a_compiled_forward():
    model = model_of()
    call = dict(**inputs()["padded"], max_new_tokens=5, do_sample=False)
    expected = model.generate(**call)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(**call), expected)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("kind", ["dense", "padded"])
def test_export(kind):
    wrapped, given = Logits(model_of("gemma2")), inputs()[kind]
    with torch.no_grad():
        program = torch.export.export(wrapped, (), given)
        want, got = wrapped(**given), program.module()(**given)
    held = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    torch.testing.assert_close(got[held], want[held], rtol=0, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["dense", "padded"])
def test_fake_tensors(kind):
    model = Logits(model_of("gemma2"))
    given = inputs()[kind]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(**{name: mode.from_tensor(tensor) for name, tensor in given.items()})
    assert out.shape == (*given["input_ids"].shape, 97)
