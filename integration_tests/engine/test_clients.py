"""Programs that call generate() on a patched model, unchanged: what they give is what they give without the patch.

Each is skipped, visibly, where its library is not installed; ``eval/results/clients.md`` records which ran.
"""

import json

import numpy as np
import pytest
import torch
from explicit_models import prompts, tiny_model
from tokenizers_of_tests import characters
from transformers import GenerationConfig, pipeline

import hf_paged

CONFIG = hf_paged.EngineConfig(page_size=8, max_num_seqs=8, max_batch_tokens=64)
TEXTS = ["hello there", "abc", "what is the time now?", "q"]


@pytest.fixture
def model():
    model = tiny_model("llama", "sdpa", num_hidden_layers=2, max_position_embeddings=512)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def tokenizer():
    tokenizer = characters(97)
    tokenizer.padding_side = "left"
    tokenizer.eos_token = "!"
    return tokenizer


@pytest.fixture
def reasons(monkeypatch):
    """Reasons for which calls went to transformers' own loop."""
    found = []
    for module in ("loop", "patch"):
        monkeypatch.setattr(f"hf_paged.generation.{module}.log_original", found.append)
    return found


def new_tokens(model):
    """How many tokens the engine of a patched model has made."""
    return model.generate.engine.stats().new_tokens


# transformers


@pytest.mark.parametrize(
    "options",
    [dict(batch_size=4), dict(num_beams=3, num_return_sequences=2, batch_size=2), dict(return_full_text=False)],
    ids=str,
)
def test_pipeline(model, tokenizer, reasons, options):
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id) | options
    results = []
    for patched in (False, True):
        if patched:
            hf_paged.patch_generate(model, CONFIG)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        results.append(generator(TEXTS, **options))
    assert results[1] == results[0]
    assert reasons == []
    assert new_tokens(model) > 0


def test_pipeline_with_a_stop_string(model, tokenizer, reasons):
    text = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    plain = text("hello", max_new_tokens=20, do_sample=False, return_full_text=False)[0]["generated_text"]
    options = dict(max_new_tokens=20, do_sample=False, stop_sequence=plain[9])
    expected = text("hello", **options)
    hf_paged.patch_generate(model, CONFIG)
    assert text("hello", **options) == expected
    assert reasons == []


@pytest.mark.parametrize("options", [dict(max_new_tokens=9), dict(max_new_tokens=9, num_beams=2)], ids=str)
def test_trainer_predicts_with_generate(model, tokenizer, reasons, tmp_path, options):
    pytest.importorskip("accelerate")
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    rows = [dict(input_ids=row, labels=row, attention_mask=[1] * 7) for row in prompts(7, 7, 7, 7, 7)]
    predictions = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = tiny_model("llama", "sdpa", num_hidden_layers=2)
        model.generation_config = GenerationConfig(max_length=16, pad_token_id=0)
        if patched:
            hf_paged.patch_generate(model, CONFIG)
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), predict_with_generate=True, per_device_eval_batch_size=3, report_to=[],
            use_cpu=True, max_steps=2, per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
            learning_rate=0.05,
        )  # fmt: skip
        trainer = Seq2SeqTrainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
        before = trainer.predict(rows, do_sample=False, **options).predictions
        trainer.train()
        after = trainer.predict(rows, do_sample=False, **options).predictions
        assert not np.array_equal(before, after), "training has changed the tokens"
        predictions.append((before, after))
    for mine, theirs in zip(predictions[1], predictions[0]):
        np.testing.assert_array_equal(mine, theirs)
    assert reasons == []
    assert new_tokens(model) > 0


# PEFT


def test_peft_adapters_come_and_go(model, reasons):
    peft = pytest.importorskip("peft")
    ids = torch.tensor(prompts(6, 6))
    options = dict(input_ids=ids, max_new_tokens=10, do_sample=False)

    def generations(patch):
        base = tiny_model("llama", "sdpa", num_hidden_layers=2)
        base.generation_config.pad_token_id = 0
        if patch == "before":
            hf_paged.patch_generate(base, CONFIG)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=64)
        wrapped = peft.get_peft_model(base, config).eval()
        if patch == "after":
            hf_paged.patch_generate(wrapped, CONFIG)
        found = [wrapped.generate(**options)]
        with wrapped.disable_adapter():
            found.append(wrapped.generate(**options))
        wrapped.merge_adapter()
        found.append(wrapped.generate(**options))
        wrapped.unmerge_adapter()
        found.append(wrapped.generate(**options))
        merged = wrapped.merge_and_unload()
        found.append(merged.generate(**options))
        if patch:
            assert new_tokens(merged) == 5 * 20
        hf_paged.unpatch_generate(wrapped)
        assert "generate" not in merged.__dict__
        return [tokens.tolist() for tokens in found]

    expected = generations(None)
    assert expected[0] != expected[1]
    assert generations("before") == expected
    assert generations("after") == expected
    assert reasons == []


# Evaluation


def test_lm_eval_on_a_local_task(model, tokenizer, reasons, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    rows = [dict(question=text, answer=answer) for text, answer in zip(TEXTS, ["a", "b", "c", "d"])]
    data.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    task = dict(
        task="letters", dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(data))), test_split="test",
        output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{answer}}",
        generation_kwargs=dict(until=["z", "Q"], max_gen_toks=20, do_sample=False),
        metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
    )  # fmt: skip
    answers = []
    for patched in (False, True):
        if patched:
            hf_paged.patch_generate(model, CONFIG)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=256)
        # Reading the files of its own tasks takes lm_eval 20 seconds.
        results = lm_eval.simple_evaluate(
            model=lm, tasks=[dict(task)], log_samples=True, bootstrap_iters=0, verbosity="ERROR",
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
        samples = results["samples"]["letters"]
        answers.append([sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])])
    assert answers[1] == answers[0]
    assert len(answers[0]) == 4
    assert reasons == []
    assert new_tokens(model) > 0


# Grammars


def words_of(tokenizer):
    return {word: [index] for word, index in tokenizer.get_vocab().items()}


def test_outlines_core_as_prefix_allowed_tokens_fn(model, tokenizer, reasons):
    outlines_core = pytest.importorskip("outlines_core")
    special = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}
    words = {word: ids for word, ids in words_of(tokenizer).items() if word not in special}
    vocabulary = outlines_core.Vocabulary(tokenizer.eos_token_id, words)
    index = outlines_core.Index(r"(ab|cd){2,5}[0-9]{3}\.", vocabulary)

    def allowed(batch_id, ids):
        state = index.get_initial_state()
        for token in ids[starts[batch_id] :].tolist():
            if token == tokenizer.eos_token_id:
                return [tokenizer.eos_token_id]
            state = index.get_next_state(state, token)
        return index.get_allowed_tokens(state)

    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    starts = [inputs["input_ids"].shape[1]] * len(TEXTS)
    options = dict(
        **inputs, max_new_tokens=30, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    got = model.generate(**options)
    assert torch.equal(got, expected)
    sampled = model.generate(**(options | dict(do_sample=True)), seed=3)
    for row in [*got, *sampled]:
        text = tokenizer.decode(row[starts[0] :], skip_special_tokens=True).removesuffix(tokenizer.eos_token)
        assert text.endswith(".")
        assert text[-4:-1].isdigit()
        assert set(text[:-4]) <= set("abcd")
    assert reasons == []


def test_lm_format_enforcer_as_prefix_allowed_tokens_fn(model, tokenizer, reasons):
    enforcer = pytest.importorskip("lmformatenforcer")
    # Its integration module imports names that transformers 5 does not have; the parts it is made of serve as well.
    words = [(index, word, True) for word, index in tokenizer.get_vocab().items() if len(word) < 3]
    data = enforcer.TokenEnforcerTokenizerData(words, tokenizer.decode, tokenizer.eos_token_id, False, 97)
    prompt = tokenizer("hello", return_tensors="pt", return_token_type_ids=False)

    def run():
        token_enforcer = enforcer.TokenEnforcer(data, enforcer.RegexParser(r"(ab|cd){2,5}[0-9]{3}\."))

        def allowed(batch_id, ids):
            return token_enforcer.get_allowed_tokens(ids.tolist()).allowed_tokens

        return model.generate(
            **prompt, max_new_tokens=30, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
            prefix_allowed_tokens_fn=allowed,
        )  # fmt: skip

    expected = run()
    hf_paged.patch_generate(model, CONFIG)
    assert torch.equal(run(), expected)
    assert reasons == []


# TRL


@pytest.mark.parametrize("bf16", [True, False], ids=["autocast", "float32"])
def test_trl_grpo(tokenizer, reasons, tmp_path, bf16):
    """TRL's default is bf16=True, for which accelerate wraps the forward in autocast."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = tiny_model("llama", "sdpa", num_hidden_layers=2, max_position_embeddings=512)
    model.generation_config.pad_token_id = 0
    before = model.lm_head.weight.detach().clone()
    hf_paged.patch_generate(model, CONFIG)
    seen = []

    def reward(completions, **kwargs):
        seen.append(completions)
        return [float(len(set(text))) for text in completions]

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2, bf16=bf16,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(seen) == 2
    assert all(len(set(group)) > 1 for group in seen)
    assert not torch.equal(before, model.lm_head.weight)
    assert reasons == []
    assert new_tokens(model) > 0


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    "options",
    [dict(max_length=32), dict(max_length=32, packing=True), dict(max_length=None, padding_free=True)],
    ids=["padded", "packed", "padding-free"],
)
def test_trl_sft(tokenizer, tmp_path, options, bf16):
    """Losses on "paged_flash" are those on sdpa."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    losses = {}
    for attention in ("sdpa", "paged_flash"):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=1, bf16=bf16, seed=1, **options,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=tiny_model("llama", attention, num_hidden_layers=2),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"text": TEXTS * 4}),
            processing_class=tokenizer,
        )
        trainer.train()
        losses[attention] = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    assert len(losses["sdpa"]) == 3
    assert losses["paged_flash"] == pytest.approx(losses["sdpa"], rel=5e-3 if bf16 else 1e-3)
