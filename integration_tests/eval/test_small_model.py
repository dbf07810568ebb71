"""The small trained model: the committed folder is what its record says, and the way it was made still works."""

import hashlib
import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import small_model
from eval.small_model import (
    CONTEXT,
    END_OF_TEXT,
    PAD,
    VOCAB_SIZE,
    Corpus,
    Recipe,
    baselines,
    bigram_counts,
    bigram_warm_start,
    bytes_per_token,
    corpus,
    encode,
    evaluate,
    figures,
    heldout_windows,
    label_nll,
    learning_rate_factor,
    main,
    model_card,
    new_model,
    small_config,
    train,
    train_tokenizer,
    training_batches,
)

ASSETS = Path(__file__).parents[1] / "assets"
FOLDER = ASSETS / "small_model"


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def heldout() -> str:
    return (ASSETS / "heldout.txt").read_bytes().decode()


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast, heldout: str) -> torch.Tensor:
    """Every sixteenth window of the held-out text: `[num_windows, CONTEXT]`."""
    return heldout_windows(tokenizer, heldout)[::16]


@pytest.fixture(scope="module")
def nll(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    return label_nll(model, windows)


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of fixed file names, so that the split does not depend on the Python version."""
    folder = tmp_path_factory.mktemp("sources")
    text = "".join(path.read_text() for path in sorted((Path(sysconfig.get_path("stdlib")) / "asyncio").glob("*.py")))
    size = len(text) // 50
    for index in range(50):
        (folder / f"module_{index}.py").write_text(text[index * size : (index + 1) * size])
    for excluded in ("tests/test_a.py", "encodings/b.py", "_sysconfigdata_c.py", "config-3/d.py"):
        (folder / excluded).parent.mkdir(exist_ok=True)
        (folder / excluded).write_text("raise AssertionError('not a part of the corpus')")
    return folder


@pytest.fixture(scope="module")
def sources(source_folder: Path) -> Corpus:
    return corpus(source_folder)


@pytest.fixture(scope="module")
def small_tokenizer(sources: Corpus) -> PreTrainedTokenizerFast:
    return train_tokenizer(sources.train, vocab_size=300)


@pytest.fixture(scope="module")
def tokens(small_tokenizer: PreTrainedTokenizerFast, sources: Corpus) -> torch.Tensor:
    return encode(small_tokenizer, sources.train)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model a tenth as wide: many CPUs compute bfloat16, which training uses, slowly."""

    def config(vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
        made = small_config(vocab_size)
        made.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16})
        return made

    monkeypatch.setattr(small_model, "small_config", config)


class TestCommittedFolder:
    def test_is_small(self) -> None:
        assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000

    def test_loads_in_bfloat16_as_saved(self, record: dict) -> None:
        model = AutoModelForCausalLM.from_pretrained(FOLDER)
        assert type(model) is LlamaForCausalLM
        assert model.dtype == torch.bfloat16
        assert model.num_parameters() == record["num_parameters"]

    def test_heldout_text_is_the_recorded_one(self, record: dict, heldout: str) -> None:
        assert hashlib.sha256(heldout.encode()).hexdigest() == record["corpus"]["heldout_sha256"]
        assert 200_000 <= len(heldout.encode()) <= 500_000

    def test_card_is_the_one_of_the_record(self, record: dict) -> None:
        assert (FOLDER / "README.md").read_text(encoding="utf-8") == model_card(record)

    def test_perplexity(self, record: dict, nll: torch.Tensor) -> None:
        perplexity = math.exp(nll.mean())
        # One window in sixteen: within a tenth of the whole text, and far below any table of counts.
        assert perplexity == pytest.approx(record["heldout"]["perplexity"], rel=0.1)
        assert perplexity < record["baselines"]["bigram_perplexity"] / 2
        assert perplexity < record["baselines"]["unigram_perplexity"] / 10
        assert record["heldout"]["bits_per_byte"] < record["baselines"]["gzip_bits_per_byte"]

    def test_paired_difference_sees_small_faults_and_no_others(
        self, model: LlamaForCausalLM, windows: torch.Tensor, nll: torch.Tensor
    ) -> None:
        def masked_nll(mask: torch.Tensor) -> torch.Tensor:
            additive = torch.zeros(CONTEXT, CONTEXT).masked_fill(~mask, torch.finfo(torch.float32).min)
            with torch.no_grad():
                logits = model(windows, attention_mask=additive.expand(len(windows), 1, -1, -1)).logits[:, :-1]
            return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")

        causal = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
        assert (masked_nll(causal) - nll).abs().max() < 1e-3
        lost_page = causal.clone()
        lost_page[112:, 96:112] = False
        for name, mask in (("window", causal.triu(-63)), ("lost page", lost_page)):
            difference = masked_nll(mask) - nll  # [num_windows, CONTEXT - 1]
            per_window = difference.mean(1)
            standard_error = per_window.std() / math.sqrt(len(windows))
            assert per_window.mean() > 2 * standard_error, name
            assert difference.abs().max() > 1, name

    def test_generation_is_deterministic_text(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        prompt = tokenizer("def read(self, size=-1):\n    return self.", return_tensors="pt")
        first, second = (model.generate(**prompt, max_new_tokens=12) for _ in range(2))
        assert torch.equal(first, second)
        text = tokenizer.decode(first[0, prompt["input_ids"].shape[1] :])
        assert text[0].isidentifier()

    def test_special_tokens(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        assert (tokenizer.eos_token, tokenizer.pad_token) == (END_OF_TEXT, PAD)
        for config in (model.config, model.generation_config):
            assert config.eos_token_id == tokenizer.eos_token_id
            assert config.pad_token_id == tokenizer.pad_token_id
        assert model.generation_config.do_sample is False
        assert model.config.max_position_embeddings == tokenizer.model_max_length == 2048

    @pytest.mark.parametrize("text", ["", " ", "x", "  if a:\n\t\tb  \r\n\n\n", "Größe 漢字 🙂\0", "don 't . , ! n't"])
    def test_tokenizer_round_trip(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_tokenizer_round_trip_of_the_heldout_text(self, tokenizer: PreTrainedTokenizerFast, heldout: str) -> None:
        assert tokenizer.decode(tokenizer(heldout, verbose=False)["input_ids"]) == heldout
        assert bytes_per_token(tokenizer, heldout) > 2.5


class TestCorpus:
    def test_splits_by_file_and_leaves_out_what_it_should(self, source_folder: Path, sources: Corpus) -> None:
        assert len(sources.train) + len(sources.heldout_files) == 50
        assert sources.heldout == "\n\n".join((source_folder / name).read_text() for name in sources.heldout_files)
        assert not any("not a part of the corpus" in text for text in (*sources.train, sources.heldout))

    def test_hash_follows_the_bytes(self, source_folder: Path, sources: Corpus) -> None:
        assert corpus(source_folder) == sources
        file = source_folder / "module_0.py"
        content = file.read_text()
        file.write_text(content + "#")
        try:
            assert corpus(source_folder).sha256 != sources.sha256
        finally:
            file.write_text(content)

    def test_refuses_what_is_no_corpus(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"root='.*missing': not a folder"):
            corpus(tmp_path / "missing")
        with pytest.raises(ValueError, match="0 training and 0 held-out files"):
            corpus(tmp_path)


@pytest.mark.usefixtures("tiny_shape")
class TestTraining:
    def test_tokenizer_has_the_size_asked_for(self, small_tokenizer: PreTrainedTokenizerFast) -> None:
        assert len(small_tokenizer) == 300

    def test_tokenizer_refuses_sizes_it_cannot_reach(self) -> None:
        with pytest.raises(ValueError, match="vocab_size=257: at least 258 are needed"):
            train_tokenizer(["text"], vocab_size=257)
        with pytest.raises(ValueError, match="vocab_size=1000: the texts give only"):
            train_tokenizer(["text"], vocab_size=1000)

    def test_encode_ends_each_text(self, small_tokenizer: PreTrainedTokenizerFast) -> None:
        stream = encode(small_tokenizer, ["import os", "x"])
        assert (stream == small_tokenizer.eos_token_id).nonzero().flatten().tolist()[-1] == len(stream) - 1
        assert small_tokenizer.decode(stream) == f"import os{END_OF_TEXT}x{END_OF_TEXT}"

    def test_bigram_counts(self) -> None:
        counts = bigram_counts(torch.tensor([2, 0, 1, 0, 1]), vocab_size=3)
        assert counts.tolist() == [[0, 2, 0], [1, 0, 0], [1, 0, 0]]

    def test_warm_start_makes_the_whole_model_a_bigram_table(self, tokens: torch.Tensor) -> None:
        model = new_model(300, seed=0)
        losses = bigram_warm_start(model, bigram_counts(tokens, 300), steps=30, progress=False)
        table_nll = bigram_warm_start(model, bigram_counts(tokens, 300), steps=1, progress=False)[0]
        assert table_nll < losses[0] - 1
        window = tokens[: 16 * CONTEXT].view(16, CONTEXT)
        with torch.no_grad():
            logits = model(window).logits
        # The same token gets the same prediction wherever it stands.
        first = (window == window[0, 0]).nonzero()
        assert len(first) > 1
        torch.testing.assert_close(logits[first[:, 0], first[:, 1]], logits[:1, 0].expand(len(first), -1))

    def test_a_few_steps_lower_the_loss_and_repeat_exactly(self, tokens: torch.Tensor) -> None:
        recipe = Recipe(steps=12, batch_size=2, seed=3, adamw_lr=2e-2)
        models = [new_model(300, recipe.seed) for _ in range(2)]
        first, second = (train(model, tokens, recipe, progress=False) for model in models)
        assert sum(first[-3:]) / 3 < first[0] - 0.5
        assert first == second
        assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))

    def test_batches_are_windows_of_the_stream_once_an_epoch(self) -> None:
        stream = torch.arange(10 * (CONTEXT + 1))
        batches = training_batches(stream, batch_size=3, generator=torch.Generator().manual_seed(0))
        epoch = torch.cat([next(batches) for _ in range(3)])  # 9 whole windows at any offset but 0
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(CONTEXT + 1))
        assert epoch[:, 0].unique().numel() == 9

    def test_batches_need_enough_tokens(self) -> None:
        with pytest.raises(ValueError, match="tokens: 100 of them; a batch of 2 needs 771"):
            next(training_batches(torch.arange(100), batch_size=2, generator=torch.Generator()))

    def test_learning_rate_rises_and_falls(self) -> None:
        factors = [learning_rate_factor(step, 800) for step in range(801)]
        assert factors.index(max(factors)) == 19
        assert 0.9 < max(factors) <= 1
        assert factors[-1] == 0
        assert all(factor > 0 for factor in factors[:-1])

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"steps": 0}, "steps=0: must be at least 1"),
            ({"batch_size": 0}, "batch_size=0: must be at least 1"),
            ({"warm_start_steps": -1}, "warm_start_steps=-1: must be at least 0"),
            ({"muon_lr": 0.0}, "muon_lr=0.0: must be above 0"),
            ({"adamw_lr": -1.0}, "adamw_lr=-1.0: must be above 0"),
        ],
    )
    def test_recipe_refuses(self, setting: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Recipe(**setting)


class TestFigures:
    def test_figures_of_known_likelihoods(self) -> None:
        result = figures(torch.full((3, 5), math.log(8)), bytes_per_token=2.0)
        assert result.perplexity == pytest.approx(8)
        assert result.bits_per_byte == pytest.approx(1.5)
        assert result.num_labels == 15

    def test_baselines_are_in_order(
        self, tokens: torch.Tensor, small_tokenizer: PreTrainedTokenizerFast, sources: Corpus
    ) -> None:
        marks = baselines(bigram_counts(tokens, 300), small_tokenizer, sources.heldout)
        assert marks["bigram_perplexity"] < marks["unigram_perplexity"] < marks["uniform_perplexity"] == 300
        assert 0 < marks["gzip_bits_per_byte"] < 8

    def test_evaluate_is_the_sum_of_its_parts(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: str
    ) -> None:
        text = heldout[:6000]
        nll = label_nll(model, heldout_windows(tokenizer, text), batch_size=1)
        result = evaluate(model, tokenizer, text, progress=False)
        assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
        assert result.num_labels == nll.numel()

    def test_windows_refuse(self, small_tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="context=1: a window needs at least 2 tokens"):
            heldout_windows(small_tokenizer, "text", context=1)
        with pytest.raises(ValueError, match="text: 0 tokens; at least context=256 are needed"):
            heldout_windows(small_tokenizer, "")


@pytest.mark.usefixtures("tiny_shape")
def test_command_line_writes_an_ordinary_folder(
    source_folder: Path, sources: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    arguments = ["--output", str(output), "--corpus", str(source_folder), "--seed", "5"]
    main([*arguments, "--steps", "2", "--batch-size", "2", "--warm-start-steps", "3"])
    assert "held-out perplexity" in capsys.readouterr().out
    assert (tmp_path / "heldout.txt").read_text() == sources.heldout
    record = json.loads((output / "training.json").read_text())
    assert record["recipe"]["steps"] == 2
    assert record["recipe"]["seed"] == 5
    assert record["corpus"]["sha256"] == sources.sha256
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, attn_implementation="eager")
    result = evaluate(model, AutoTokenizer.from_pretrained(output), sources.heldout, progress=False)
    assert result.perplexity == pytest.approx(record["heldout"]["perplexity"], rel=1e-5)


def test_command_line_refuses_a_bad_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "model"), "--steps", "0"])
    assert "steps=0: must be at least 1" in capsys.readouterr().err
