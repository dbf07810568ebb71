"""Keyword arguments of attention: those that a layer writes are honoured or refused, those of the caller ignored."""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from explicit_models import prompts, tiny_model
from torch import nn
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

import hf_paged  # noqa: F401  registers paged_flash
from hf_paged.attention import interface, options

pytestmark = pytest.mark.quick

MODELS = Path(transformers.__file__).parent / "models"
PARAMETERS = frozenset(
    {
        "query", "key", "value", "attention_mask", "dropout", "scaling", "sliding_window", "softcap", "is_causal",
        "s_aux", "output_attentions",
    }
)  # fmt: skip
"""Those that the function takes by name, ``output_attentions`` to refuse it."""


def last_name(function: ast.expr) -> str:
    """``interface`` of ``self.a.interface``; to write out every expression as text would take many seconds."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ast.unparse(function).rsplit(".", 1)[-1]


def written_keywords():
    """``{keyword: models}`` of every call of an attention function in the sources of transformers."""
    found = {}
    for path in MODELS.glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and "attention_interface" in last_name(node.func):
                for keyword in node.keywords:
                    if keyword.arg is not None:
                        found.setdefault(keyword.arg, set()).add(path.parent.name)
    return found


def test_every_keyword_that_a_layer_of_transformers_writes_is_known():
    known = PARAMETERS | options.NO_EFFECT | options.UNSUPPORTED | options.BATCHING | set(options.VARLEN)
    found = written_keywords()
    assert len(found) > 10
    assert found.keys() >= {"dropout", "scaling", "position_bias", "indices", "s_aux"}
    unknown = {name: sorted(models)[:5] for name, models in found.items() if name not in known}
    assert not unknown, "decide what they do to attention, and put them into a list of hf_paged/attention/options.py"


@pytest.mark.parametrize("name", sorted(options.UNSUPPORTED))
def test_what_changes_attention_is_refused(name):
    module = tiny_model("llama", "paged_flash").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    interface.paged_flash_attention(module, q, k, k, None, **{name: None})
    with pytest.raises(ValueError, match=f"LlamaAttention passes {name} to attention, which paged_flash does not"):
        interface.paged_flash_attention(module, q, k, k, None, **{name: torch.zeros(1)})


class LayerOfMine(nn.Module):
    """A layer that is not of transformers: what it writes is told from its source."""

    is_causal = True

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.ones(4))

    def forward(self, query, key, value, **kwargs):
        attend = AttentionInterface()["paged_flash"]
        return attend(self, query, key, value, None, slopes=self.slopes, **kwargs)[0]


class LayerThatPutsItIn(LayerOfMine):
    def forward(self, query, key, value, **kwargs):
        kwargs["decay"] = self.slopes
        return AttentionInterface()["paged_flash"](self, query, key, value, None, **kwargs)[0]


def test_what_a_layer_of_another_library_writes_is_refused():
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="LayerOfMine passes slopes to attention"):
        LayerOfMine()(q, k, k)
    with pytest.raises(ValueError, match="LayerThatPutsItIn passes decay to attention"):
        LayerThatPutsItIn()(q, k, k)


def test_a_layer_without_a_source_is_taken_at_its_word():
    layer = type("Sourceless", (nn.Module,), {"__module__": "nowhere", "is_causal": True})()
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    interface.paged_flash_attention(layer, q, k, k, None, position_ids=torch.zeros(1))
    with pytest.raises(ValueError, match="Sourceless passes anything to attention"):
        interface.paged_flash_attention(layer, q, k, k, None, anything=3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_keywords_of_the_caller_are_ignored(family):
    """As by eager: options of a loss, labels that are shifted already, what a tokenizer or a processor adds."""
    ids = torch.tensor(prompts(9))
    eager, paged = (tiny_model(family, name) for name in ("eager", "paged_flash"))
    for keywords in (
        {"labels": ids, "shift_labels": ids.roll(-1)},
        {"labels": ids, "ignore_index": 7, "num_items_in_batch": 3},
        {"labels": ids, "my_own_loss_weight": 2.0, "tags": ["a"], "sample_weight": torch.ones(1)},
    ):
        want, got = (model(input_ids=ids, use_cache=False, **keywords) for model in (eager, paged))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-4)


def test_generate_hands_on_what_it_does_not_know():
    ids = torch.tensor(prompts(9))
    model = tiny_model("llama", "paged_flash")
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, tokenizer=object()), expected)


@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize("make", ["gpt2", "llama"])
def test_attention_matrices_are_refused_by_layers_that_keep_the_argument_to_themselves(make, where):
    if make == "llama":
        model = tiny_model("llama", "paged_flash")
    else:
        config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="paged_flash").eval()
    ids = torch.tensor(prompts(5))
    model(ids, output_hidden_states=True)
    keywords = {"output_attentions": True}
    if where == "config":
        model.config._output_attentions, keywords = True, {}
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        model(ids, **keywords)
