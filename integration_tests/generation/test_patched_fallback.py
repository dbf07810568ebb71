"""Calls of a patched generate() that go to transformers' own loop, and why."""

import dataclasses

import pytest
import torch
from explicit_models import tiny_model
from host import CACHE, with_cache
from patched import CONFIG, Recorder, assert_same, batch, both
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache

import hf_paged
from hf_paged.generation import loop

ORIGINAL = {
    "contrastive_less": (dict(penalty_alpha=0.5, top_k=4, trust_remote_code=False), "contrastive search"),
    "output_scores": (dict(return_dict_in_generate=True, output_scores=True), "output_scores"),
    "output_logits": (dict(return_dict_in_generate=True, output_logits=True), "output_logits"),
    "output_hidden_states": (dict(return_dict_in_generate=True, output_hidden_states=True), "output_hidden_states"),
    "guidance": (dict(guidance_scale=1.5), "guidance_scale"),
    "static": (dict(cache_implementation="static"), "cache_implementation"),
    "synced": (dict(synced_gpus=False, negative_prompt_ids=torch.tensor([[5]]), guidance_scale=2.0), "negative_prompt"),
    "too long": (dict(max_new_tokens=30), "max_model_len"),
    "beams and streamer": (dict(num_beams=2, streamer=Recorder()), "a streamer takes one sequence"),
    "position_ids": (dict(position_ids=torch.tensor([[0, 1, 2, 4, 5]])), "position_ids"),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_rest_goes_to_transformers(model, reasons, name):
    options, reason = ORIGINAL[name]
    options = dict(input_ids=batch(5)["input_ids"], max_new_tokens=4, do_sample=False) | options
    hf_paged.patch_generate(model, dataclasses.replace(CONFIG, max_model_len=32))
    try:
        got = model.generate(**options)
    except ValueError as error:
        hf_paged.unpatch_generate(model)
        with pytest.raises(ValueError, match=f"^{str(error)[:20]}"):
            model.generate(**options)
    else:
        hf_paged.unpatch_generate(model)
        assert_same(got, model.generate(**options))
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_inputs_of_other_kinds_go_to_transformers(model, reasons):
    ids = batch(5)["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach()
    got, expected = both(model, inputs_embeds=embeddings, max_new_tokens=4)
    assert_same(got, expected)
    assert "inputs_embeds is given" in reasons[0]
    hf_paged.patch_generate(model, CONFIG)
    cache = DynamicCache(config=model.config)
    model.generate(ids, **with_cache(cache), max_new_tokens=4)
    assert cache.get_seq_length() == 8
    assert f"{CACHE} is given" in reasons[1]
    model.generate(ids, custom_generate=lambda model, input_ids, **kwargs: input_ids)
    assert "custom_generate is given" in reasons[2]
    with pytest.raises(ValueError, match="seed=3 is for calls that the engine runs"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=4, seed=3)


def test_training_with_dropout_goes_to_transformers(model, reasons):
    dropped = tiny_model("llama", "sdpa", num_hidden_layers=1, attention_dropout=0.1)
    hf_paged.patch_generate(dropped, CONFIG)
    ids = batch(5)["input_ids"]
    dropped.train().generate(ids, max_new_tokens=2)
    assert "attention_dropout=0.1" in reasons.pop()
    dropped.eval().generate(ids, max_new_tokens=2)
    assert reasons == []
    checkpointed = tiny_model("llama", "sdpa", num_hidden_layers=1).train()
    hf_paged.patch_generate(checkpointed, CONFIG)
    checkpointed.generate(ids, max_new_tokens=2)
    assert reasons == []
    checkpointed.model.gradient_checkpointing = True
    checkpointed.generate(ids, max_new_tokens=2)
    assert "gradient checkpointing" in reasons.pop()


def test_models_that_the_engine_cannot_serve(reasons):
    config = BartConfig(
        vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=2,
    )  # fmt: skip
    bart = BartForConditionalGeneration(config).eval()
    got, expected = both(bart, batch(5)["input_ids"], max_new_tokens=4)
    assert_same(got, expected)
    assert len(reasons) == 1
    assert "encoder-decoder" in reasons[0]


def test_the_reason_is_logged_once(model, caplog, monkeypatch):
    monkeypatch.setattr(loop.logger, "propagate", True)
    lines = []
    monkeypatch.setattr(loop.logger, "warning", lambda message, *args: lines.append(message))
    loop.logger.warning_once.cache_clear()
    hf_paged.patch_generate(model, CONFIG)
    for _ in range(3):
        model.generate(batch(5)["input_ids"], max_new_tokens=2, cache_implementation="static")
    assert len([line for line in lines if "cache_implementation='static' is asked for" in line]) == 1
