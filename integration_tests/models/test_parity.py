"""Every causal-LM family of transformers: the tokens of eager, or a clear refusal; and the committed matrix says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from host import CACHE
from parity import (
    CALLS,
    SUPPORT_FILE,
    Mismatch,
    Row,
    check_calls,
    committed,
    compare,
    examine,
    generate_all,
    is_clear,
    is_telling,
    render,
    telling_weights,
    watch,
)
from tiny_models import build, copy_weights, families, randomise, tiny_config

import hf_paged
from hf_paged.attention.interface import paged_flash_attention

MUST_WORK = {
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "gpt_oss", "phi",
    "phi3", "olmo2", "cohere", "cohere2", "starcoder2", "stablelm", "gpt2", "opt", "gpt_neox", "granite", "exaone4",
    "smollm3", "glm4", "deepseek_v2", "deepseek_v3", "granite_swa", "mimo_v2_flash", "flint",
}  # fmt: skip
LEAST_WORKING = 120
OUTSIDE = () if CACHE == "cache" else ("codegen", "gptj")
"""Families that the committed file says work, but whose attention is on the interface only since transformers 5.24."""
IS_COMMITTED_VERSION = f"transformers {transformers.__version__}," in SUPPORT_FILE.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices: threads cost more than they give, and the order of sums stays the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", families())
def test_generates_the_tokens_of_eager_or_refuses_clearly(family: str) -> None:
    row = examine(family)
    listed = committed().get(family)
    if IS_COMMITTED_VERSION:
        assert row.status == listed, f"{SUPPORT_FILE.name} says {listed!r}: write it again (see parity.py). {row}"
    elif listed == "works":
        assert row.status == ("refused" if family in OUTSIDE else "works"), row


def test_the_committed_matrix_lists_enough_and_nothing_unknown() -> None:
    listed = committed()
    working = {family for family, status in listed.items() if status == "works"}
    assert len(working) >= LEAST_WORKING
    assert working >= MUST_WORK
    if IS_COMMITTED_VERSION:
        assert sorted(listed) == families()


def other_than(**changes: Any):
    """paged_flash with some of its arguments replaced, wherever the model passes them."""

    def change(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs |= {name: value for name, value in changes.items() if name in kwargs}
        return paged_flash_attention(module, *args, **kwargs)

    return change


def without_padding(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    # Without positions too: those of padding repeat, which is refused where no mask tells of it.
    return paged_flash_attention(module, query, key, value, None, **kwargs | {"position_ids": None})


@pytest.mark.parametrize(
    ("family", "change"),
    [
        pytest.param("mistral", other_than(sliding_window=6), id="window-one-narrower"),
        pytest.param("gemma3_text", other_than(sliding_window=6), id="window-of-some-layers"),
        pytest.param("gemma2", other_than(softcap=None), id="softcap"),
        pytest.param("gpt_oss", other_than(s_aux=None), id="sinks"),
        pytest.param("granite", other_than(scaling=None), id="scale"),
        pytest.param("llama", without_padding, id="padding"),
    ],
)
def test_a_feature_left_out_is_a_mismatch(family: str, change: Any) -> None:
    config = tiny_config(family)
    eager, paged = build(config, "eager"), build(config, "paged_flash")
    expected = telling_weights(eager)
    copy_weights(eager, paged)
    with watch(change):
        got = generate_all(paged)
    with pytest.raises(Mismatch):
        compare(expected, got)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("window", [None, 8])
def test_a_window_wider_than_the_configs_is_refused(family: str, window: int | None) -> None:
    """The cache keeps pages by the config's window: attention must not look for more."""
    paged = build(tiny_config(family), "paged_flash")
    with watch(other_than(sliding_window=window)), pytest.raises(hf_paged.UnsupportedModelError, match="config says 7"):
        generate_all(paged)


def test_a_model_that_runs_its_own_attention_is_a_mismatch() -> None:
    model = build(tiny_config("llama"), "eager")
    with watch() as spy:
        generate_all(model)
    with pytest.raises(Mismatch, match="calls of paged_flash"):
        check_calls(spy, 3, 3)


def test_equal_logits_are_not_telling() -> None:
    model = build(tiny_config("llama"), "eager")
    randomise(model, 0)
    assert all(is_telling(output) for output in generate_all(model).values())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not any(is_telling(output) for output in generate_all(model).values())


@pytest.mark.parametrize("family", ["phimoe", "moshi"])
def test_a_window_that_the_model_keeps_to_itself_is_refused(family: str) -> None:
    if family not in families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model = build(tiny_config(family, sliding_window=7), "paged_flash")
    with pytest.raises(hf_paged.UnsupportedModelError, match=r"sliding_window \(7\)") as caught:
        generate_all(model)
    assert is_clear(caught.value)
    short_prompt = torch.arange(3, 7)[None]
    assert model.generate(short_prompt, max_new_tokens=3).sequences.shape == (1, 7)


def test_layers_that_disagree_on_padding_are_refused() -> None:
    cache = hf_paged.PagedCache(build(tiny_config("llama"), "paged_flash").config)
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    module = torch.nn.Module()
    keys, values = cache.update(key, key, 0)
    paged_flash_attention(module, query, keys + 0, values + 0, mask)
    keys, values = cache.update(key, key, 1)
    with pytest.raises(hf_paged.UnsupportedModelError, match="masks padding") as caught:
        paged_flash_attention(module, query, keys, values, mask)
    assert is_clear(caught.value)


def test_a_model_without_flash_attention_is_refused() -> None:
    with pytest.raises(hf_paged.UnsupportedModelError, match="does not support flash attention") as caught:
        build(tiny_config("doge"), "paged_flash")
    assert is_clear(caught.value)


def test_a_tower_without_flash_attention_keeps_its_own() -> None:
    model = build(tiny_config("gemma4"), "paged_flash")
    assert model.config.text_config._attn_implementation == "paged_flash"
    tower = model.model.audio_tower
    assert (tower.config._attn_implementation == "paged_flash") == tower._supports_flash_attn


def test_the_matrix_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row("a", "A", "works", "same", "same", "same", "yes"),
        Row("b", "B", "refused", notes=["ValueError: x | y"]),
        Row("c", status="not built", notes=["why"]),
    ]
    path = tmp_path / "model_support.md"
    path.write_text(render(rows), encoding="utf-8")
    monkeypatch.setattr("parity.SUPPORT_FILE", path)
    assert committed() == {"a": "works", "b": "refused", "c": "not built"}
    assert f"## Works ({len(rows) // len(CALLS)})" in path.read_text(encoding="utf-8")
