"""Training with paged_flash: the gradients of eager, with padding, packing and gradient checkpointing."""


import pytest
import torch
from explicit_models import prompts, tiny_model

import hf_paged  # noqa: F401  registers paged_flash


def padded(*lengths):
    """``(input_ids, attention_mask, labels)`` padded on the right; a padded token has no label."""
    sequences = prompts(*lengths)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.tensor([s + [5] * (max(lengths) - len(s)) for s in sequences])
    return dict(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100))


def gradients(model, **inputs):
    model.zero_grad(set_to_none=True)
    model.train()(**inputs, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
    attention = [gradient for name, gradient in expected.items() if "self_attn" in name]
    assert attention
    assert all(gradient.any() for gradient in attention)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_eager(family):
    """Windows, a softcap, sinks and their gradients; then with the layers computed twice (checkpointing)."""
    eager, paged = (tiny_model(family, implementation) for implementation in ("eager", "paged_flash"))
    ids = torch.tensor(prompts(21))
    for inputs in (dict(input_ids=ids, labels=ids), padded(21, 13, 3)):
        expected = gradients(eager, **inputs)
        assert_same(gradients(paged, **inputs), expected)
    paged.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(paged, **inputs), expected)


def test_packed_sequences_have_the_gradients_of_sequences_alone():
    model = tiny_model("llama", "paged_flash")
    sequences = prompts(9, 4, 17)
    expected = {}
    for s in sequences:
        ids = torch.tensor([s])
        for name, gradient in gradients(model, input_ids=ids, labels=ids, num_items_in_batch=1).items():
            expected[name] = expected.get(name, 0) + gradient
    ids = torch.tensor([[token for s in sequences for token in s]])
    labels = torch.tensor([[token for s in sequences for token in (-100, *s[1:])]])
    positions = torch.tensor([[i for s in sequences for i in range(len(s))]])
    got = gradients(model, input_ids=ids, labels=labels, position_ids=positions, num_items_in_batch=1)
    assert_same(got, expected)


def test_a_few_steps_lower_the_loss_like_eager():
    losses = {}
    for implementation in ("eager", "paged_flash"):
        model = tiny_model("llama", implementation).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[implementation] = []
        for _ in range(4):
            loss = model(**padded(15, 8), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
    assert losses["paged_flash"][-1] < losses["paged_flash"][0]
    assert losses["paged_flash"] == pytest.approx(losses["eager"], rel=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_4d_mask_in_which_padding_sees_nothing(kind):
    """A query without keys is no token: zeros, and no gradient, where a softmax of nothing would give NaN."""
    eager, paged = (tiny_model("llama", name) for name in ("eager", "paged_flash"))
    ids = torch.tensor(prompts(9, 9))
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    seen[0, :, :, :3] = False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    positions = torch.stack([torch.arange(9).sub(3).clamp(min=0), torch.arange(9)])
    labels = ids.clone()
    labels[0, :4] = -100
    inputs = dict(input_ids=ids, position_ids=positions, labels=labels)
    # Eager attention gives such a query the mean of all values, which no other token sees.
    finite = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert_same(gradients(paged, attention_mask=mask, **inputs), gradients(eager, attention_mask=finite, **inputs))
