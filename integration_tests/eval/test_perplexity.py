"""Perplexity: windows, the figure against a plain float64 computation, the three paths, texts, the command, errors."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from host import CACHE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_paged
from eval import perplexity as perplexity_module
from eval.perplexity import PathOptions, Window, load_text, main, perplexity, plan_windows
from eval.quality import scoring

VOCAB_SIZE = 97
NUM_TOKENS = 111
MAX_POSITIONS = 128


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A random Llama, 4 query and 2 key/value heads, whose weights are large enough for context to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            "initializer_range": 0.25,
            "attn_implementation": "eager",
            **overrides,
        }
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    return torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a tokenizer that maps the words w0 to w95 to the ids 1 to 96, and any other word to 0."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    words = {"<unk>": 0, **{f"w{i}": i + 1 for i in range(VOCAB_SIZE - 1)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def rows() -> list[str]:
    # An empty row, a line end inside a row, and U+2028, which splitlines() would take for a line end.
    return ["w1 w2 w3", "", "w4\nw5\u2028w6 ünï", "w7 w8 " * 30]


@pytest.fixture
def text_file(tmp_path: Path, rows: list[str]) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes("\n\n".join(rows).encode())
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size gain nothing from threads, and lose much where other programs want the same cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def plain_nll(exact: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """[num_tokens - 1] nll of tokens 1 to the last, from one forward of a float64 model and one log-softmax."""
    with torch.no_grad():
        logits = exact(torch.tensor([token_ids])).logits[0]  # [num_tokens, vocab_size]
    labels = torch.tensor(token_ids[1:])
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels]


# ---- windows


@pytest.mark.parametrize("num_tokens", [2, 3, 63, 64, 65, 111])
@pytest.mark.parametrize(("window", "stride"), [(64, 63), (64, 32), (64, 17), (64, 1), (2, 1), (200, 100)])
def test_hf_windows_score_each_token_but_the_first_once(num_tokens: int, window: int, stride: int) -> None:
    windows = plan_windows(num_tokens, window, stride)
    scored = [token for item in windows for token in range(item.end - item.num_scored, item.end)]
    assert scored == list(range(1, num_tokens))
    for index, item in enumerate(windows):
        assert item.begin == index * stride
        assert item.end == min(item.begin + window, num_tokens)
        assert 1 <= item.num_scored < item.end - item.begin
    assert windows[-1].end == num_tokens


def test_hf_windows_of_the_drawing() -> None:
    assert plan_windows(9, 6, 2) == (Window(0, 6, 5), Window(2, 8, 2), Window(4, 9, 1))


@pytest.mark.parametrize(("num_tokens", "num_windows"), [(16, 1), (31, 1), (32, 2), (111, 6)])
def test_gptq_windows_are_disjoint_and_the_tail_is_dropped(num_tokens: int, num_windows: int) -> None:
    windows = plan_windows(num_tokens, 16, 16, "gptq")
    assert windows == tuple(Window(16 * i, 16 * i + 16, 15) for i in range(num_windows))


# ---- the figure


def test_one_window_equals_a_plain_float64_computation(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    expected = plain_nll(tiny_llama().double(), token_ids)
    result = perplexity(model, token_ids, window=MAX_POSITIONS, stride=64)
    assert result.num_scored == NUM_TOKENS - 1
    assert result.positions.tolist() == list(range(1, NUM_TOKENS))
    assert result.nll.dtype == torch.float64
    torch.testing.assert_close(result.nll, expected, rtol=0, atol=1e-4)
    assert result.mean_nll == pytest.approx(expected.mean().item(), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected.mean().item()), rel=1e-5)
    assert (result.attn, result.path, result.convention) == ("eager", "prefill", "hf")
    assert result.seconds > 0


def test_a_float64_model_is_scored_in_float64(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    result = perplexity(model.double(), token_ids, window=MAX_POSITIONS, stride=64)
    torch.testing.assert_close(result.nll, plain_nll(model, token_ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "stride"), [(48, 1), (48, 16), (48, 47), (63, 20)])
def test_sliding_windows_equal_each_token_scored_with_its_own_context(
    model: LlamaForCausalLM, token_ids: list[int], window: int, stride: int
) -> None:
    exact = tiny_llama().double()
    expected = []
    for token in range(1, NUM_TOKENS):
        # The first window of the grid that reaches the token.
        begin = max(0, math.ceil((token + 1 - window) / stride) * stride)
        expected.append(plain_nll(exact, token_ids[begin : token + 1])[-1])
    result = perplexity(model, token_ids, window=window, stride=stride)
    torch.testing.assert_close(result.nll, torch.stack(expected), rtol=0, atol=1e-4)


def test_gptq_equals_windows_scored_alone(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    exact = tiny_llama().double()
    expected = torch.cat([plain_nll(exact, token_ids[begin : begin + 32]) for begin in (0, 32, 64)])
    result = perplexity(model, token_ids, window=32, stride=32, convention="gptq")
    assert result.num_scored == 3 * 31
    assert result.positions.tolist() == [*range(1, 32), *range(33, 64), *range(65, 96)]
    torch.testing.assert_close(result.nll, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_batches_change_nothing(model: LlamaForCausalLM, token_ids: list[int], path: str) -> None:
    alone = perplexity(model, token_ids, window=32, stride=9, path=path)
    together = perplexity(model, token_ids, window=32, stride=9, path=path, options=PathOptions(batch_size=4))
    assert torch.equal(alone.positions, together.positions)
    assert together.paired_difference(alone).max_abs < 1e-4


def test_logits_are_asked_for_the_scored_tokens_and_turned_to_float32_in_parts(
    model: LlamaForCausalLM, token_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, token_ids, window=64, stride=16)
    monkeypatch.setattr(scoring, "MAX_FLOAT32_LOGITS", 5 * VOCAB_SIZE)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(list(output.shape)))
    in_parts = perplexity(model, token_ids, window=64, stride=16)
    # 63 scored tokens in the first window, 16 in the next two, 15 in the last.
    assert shapes == [[1, 63, VOCAB_SIZE], [1, 16, VOCAB_SIZE], [1, 16, VOCAB_SIZE], [1, 15, VOCAB_SIZE]]
    assert torch.equal(in_parts.nll, whole.nll)


def test_token_ids_may_be_a_tensor(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    as_list = perplexity(model, token_ids, window=64, stride=32)
    as_tensor = perplexity(model, torch.tensor(token_ids, dtype=torch.int32), window=64, stride=32)
    assert torch.equal(as_list.nll, as_tensor.nll)


def test_the_mode_of_the_model_is_left_as_it_was(token_ids: list[int]) -> None:
    model = tiny_llama(attention_dropout=0.5)
    expected = perplexity(model, token_ids, window=64, stride=32)
    model.train()
    result = perplexity(model, token_ids, window=64, stride=32)
    assert model.training
    assert torch.equal(result.nll, expected.nll)
    assert not result.nll.requires_grad


# ---- decode


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("window", "stride", "convention"), [(111, 50, "hf"), (32, 31, "hf"), (32, 7, "hf"), (2, 1, "hf"), (37, 37, "gptq")]
)
def test_decode_equals_prefill(
    model: LlamaForCausalLM, token_ids: list[int], attn: str, window: int, stride: int, convention: str
) -> None:
    model.set_attn_implementation(attn)
    runs = [
        perplexity(model, token_ids, window=window, stride=stride, path=path, convention=convention)
        for path in ("prefill", "decode")
    ]
    assert [run.attn for run in runs] == [attn, attn]
    difference = runs[1].paired_difference(runs[0])
    assert abs(difference.mean) < 1e-5
    assert difference.max_abs < 1e-4


def test_decode_feeds_one_token_at_a_time(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    perplexity(model, token_ids[:12], window=8, stride=4, path="decode")
    # Window 0 to 7 scores 1 to 7, after one token of context; window 4 to 11 scores 8 to 11, after four.
    assert lengths == [1] * 7 + [4] + [1] * 3


class LosesATokenCache(DynamicCache):
    """A cache with a fault: the values of the third token are zero."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        values = values.clone()
        values[:, :, 2:3] = 0
        return keys, values


def test_decode_sees_a_fault_in_the_cache(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    caches: list[Cache] = []

    def make_cache() -> Cache:
        caches.append(LosesATokenCache(config=model.config))
        return caches[-1]

    options = PathOptions(cache_factory=make_cache)
    sound = perplexity(model, token_ids, window=32, stride=16, path="decode")
    faulty = perplexity(model, token_ids, window=32, stride=16, path="decode", options=options)
    difference = faulty.paired_difference(sound)
    assert len(caches) == len(sound.windows)
    assert difference.max_abs > 1e-2
    # The first two tokens are scored before the fault can be read.
    assert torch.equal(faulty.nll[:2], sound.nll[:2])


def test_a_model_that_ignores_the_cache_is_refused(
    model: LlamaForCausalLM, token_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: forward(**{**kwargs, CACHE: None}))
    with pytest.raises(ValueError, match="held 0 tokens, was given 1 and reports 0: LlamaForCausalLM does not use"):
        perplexity(model, token_ids, window=32, stride=16, path="decode")


# ---- paged_flash


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("path", ["prefill", "decode", "paged_prefill"])
@pytest.mark.parametrize(("window", "stride", "page_size"), [(63, 20, 16), (111, 100, 16), (40, 39, 32), (2, 1, 16)])
def test_paged_flash_equals_eager(
    model: LlamaForCausalLM, token_ids: list[int], path: str, window: int, stride: int, page_size: int
) -> None:
    eager = perplexity(model, token_ids, window=window, stride=stride)
    model.set_attn_implementation("paged_flash")
    options = PathOptions(page_size=page_size)
    paged = perplexity(model, token_ids, window=window, stride=stride, path=path, options=options)
    difference = paged.paired_difference(eager)
    assert (paged.attn, paged.path) == ("paged_flash", path)
    assert abs(difference.mean) < 1e-5
    assert difference.max_abs < 1e-4


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("path", ["prefill", "decode", "paged_prefill"])
def test_paged_flash_in_batches_equals_eager(model: LlamaForCausalLM, token_ids: list[int], path: str) -> None:
    eager = perplexity(model, token_ids, window=32, stride=9)
    model.set_attn_implementation("paged_flash")
    paged = perplexity(model, token_ids, window=32, stride=9, path=path, options=PathOptions(batch_size=3))
    difference = paged.paired_difference(eager)
    assert abs(difference.mean) < 1e-5
    assert difference.max_abs < 1e-4


@pytest.mark.parametrize(
    ("attn", "path", "expected"),
    [
        ("eager", "prefill", None),
        ("eager", "decode", DynamicCache),
        ("eager", "paged_prefill", hf_paged.PagedCache),
        ("paged_flash", "prefill", None),
        ("paged_flash", "decode", hf_paged.PagedCache),
        ("paged_flash", "paged_prefill", hf_paged.PagedCache),
    ],
)
def test_each_path_goes_through_its_cache(
    model: LlamaForCausalLM, token_ids: list[int], attn: str, path: str, expected: type[Cache] | None
) -> None:
    model.set_attn_implementation(attn)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[CACHE]), with_kwargs=True
    )
    perplexity(model, token_ids[:40], window=33, stride=7, path=path, options=PathOptions(page_size=8))
    assert {type(cache) for cache in seen} == {expected or type(None)}
    if expected is hf_paged.PagedCache:
        assert {cache.page_size for cache in seen} == {8}
        assert len({id(cache) for cache in seen}) == 2, "each of the two windows starts with an empty cache"
        # The last token of a window is never fed: 32 of the 33 tokens are in 4 pages of 8.
        assert [cache.pages_in_use for cache in (seen[0], seen[-1])] == [4, 4]


def test_paged_prefill_serves_other_implementations(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    plain = perplexity(model, token_ids, window=63, stride=20)
    through_pages = perplexity(model, token_ids, window=63, stride=20, path="paged_prefill")
    assert through_pages.attn == "eager"
    assert through_pages.paired_difference(plain).max_abs < 1e-4


# ---- paired difference


def result_of(nll: list[float], windows: tuple[Window, ...]) -> perplexity_module.PerplexityResult:
    positions = torch.cat([torch.arange(item.end - item.num_scored, item.end) for item in windows])
    return perplexity_module.PerplexityResult(
        torch.tensor(nll, dtype=torch.float64), positions, windows, "eager", "prefill", "hf", 1.0
    )


def test_paired_difference_by_hand() -> None:
    windows = (Window(0, 3, 2), Window(1, 5, 2), Window(3, 7, 2))
    reference = result_of([1, 1, 1, 1, 1, 1], windows)
    difference = result_of([1, 1.5, 1, 1, 1, 0.25], windows).paired_difference(reference)
    assert difference.mean == pytest.approx(-0.25 / 6)
    assert (difference.max_abs, difference.max_abs_token) == (0.75, 6)
    # Windows of equal size: the standard error of their means 0.25, 0, -0.375.
    means = torch.tensor([0.25, 0, -0.375])
    assert difference.standard_error == pytest.approx(means.std().item() / math.sqrt(3))


def test_paired_difference_with_itself_and_with_one_window() -> None:
    one = result_of([1.0, 2.0], (Window(0, 3, 2),))
    difference = one.paired_difference(one)
    assert (difference.mean, difference.standard_error, difference.max_abs) == (0.0, None, 0.0)


def test_paired_difference_refuses_other_windows() -> None:
    one = result_of([1.0, 2.0], (Window(0, 3, 2),))
    other = result_of([1.0, 2.0, 3.0], (Window(0, 4, 3),))
    with pytest.raises(ValueError, match="3 tokens in 1 windows, this run 2 in 1; pair runs of equal text"):
        one.paired_difference(other)


def test_perplexity_of_a_huge_nll_is_infinite() -> None:
    assert result_of([1e4, 1e4], (Window(0, 3, 2),)).perplexity == math.inf


# ---- errors of the core function


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "decod"}, "path='decod' is unknown, did you mean 'decode'"),
        ({"path": 0}, "path=0 is unknown; pass one of"),
        ({"convention": "c4"}, "convention='c4' is unknown; pass one of"),
        ({"window": 129}, "window=129 is larger than the model's max_position_embeddings=128; pass a window"),
        ({"window": 1}, "window=1 must be at least 2"),
        ({"stride": 0}, "stride=0 must be from 1 to window - 1 = 63"),
        ({"stride": 64}, "stride=64 must be from 1 to window - 1 = 63.*convention='gptq'"),
        ({"stride": 32, "convention": "gptq"}, "stride=32 with window=64: gptq windows are disjoint; pass stride=64"),
        ({"options": PathOptions(page_size=0)}, "page_size=0 must be at least 1"),
        ({"options": PathOptions(batch_size=0)}, "batch_size=0 must be at least 1"),
        ({"token_ids": []}, "token_ids has 0 tokens, and at least 2"),
        ({"token_ids": [5]}, "token_ids has 1 tokens, and at least 2"),
        ({"token_ids": [5] * 63, "stride": 64, "convention": "gptq"}, "token_ids has 63 tokens, and convention 'gptq'"),
        ({"token_ids": [[5, 6]]}, r"token_ids has the shape \[1, 2\]"),
        ({"token_ids": [5, VOCAB_SIZE]}, "token_ids holds 97, and the model's vocabulary is 0 to 96"),
        ({"token_ids": [5, -1]}, "token_ids holds -1, and the model's vocabulary is 0 to 96"),
        (
            {"options": PathOptions(cache_factory=DynamicCache)},
            "cache_factory is given, and path='prefill' uses no cache",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_bad_arguments(
    model: LlamaForCausalLM, token_ids: list[int], arguments: dict[str, object], message: str
) -> None:
    call = {"token_ids": token_ids, "window": 64, "stride": 32, **arguments}
    with pytest.raises(ValueError, match=message):
        perplexity(model, call.pop("token_ids"), **call)


def test_token_ids_that_are_no_integers(model: LlamaForCausalLM) -> None:
    with pytest.raises(TypeError, match=r"token_ids has the dtype torch\.float32; pass integers"):
        perplexity(model, [1.0, 2.0], window=64, stride=32)


def test_a_nan_is_an_error_that_names_the_token(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    def spoil(module: torch.nn.Module, args: object, logits: torch.Tensor) -> None:
        logits[0, 20] = math.nan  # The logits of token 20 predict token 21.

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(
        FloatingPointError, match=r"the nll of token 21 is nan .* 1 of 63 are not finite; try dtype float32"
    ):
        perplexity(model, token_ids[:64], window=64, stride=32)


# ---- texts


def test_text_and_jsonl_give_the_same_text(tmp_path: Path, rows: list[str], text_file: Path) -> None:
    jsonl = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": i, "text": row}, ensure_ascii=False) for i, row in enumerate(rows)]
    jsonl.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert load_text(str(text_file)) == "\n\n".join(rows)
    assert load_text(str(jsonl), "text") == "\n\n".join(rows)


def test_parquet_gives_the_same_text(tmp_path: Path, rows: list[str], text_file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"other": list(range(len(rows))), "body": rows}), path)
    assert load_text(str(path), "body") == load_text(str(text_file))
    with pytest.raises(
        ValueError, match=r"text_column \(--text-column\) 'text' is not in .* which has \['body', 'other'\]"
    ):
        load_text(str(path))
    with pytest.raises(ValueError, match=r"'other' of .*: row 0 is int, not a string"):
        load_text(str(path), "other")
    path.write_bytes(b"PAR")
    with pytest.raises(ValueError, match="is not a parquet file"):
        load_text(str(path))


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert load_text(str(path)) == "one\r\ntwo\n"


@pytest.fixture
def dataset_folder(tmp_path: Path, rows: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a train and a test file, as a dataset repository has them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, texts in (("train", ["w9"]), ("test", rows)):
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_folder_of_data_files(dataset_folder: Path, rows: list[str]) -> None:
    assert load_text(f"{dataset_folder}::test") == "\n\n".join(rows)
    assert load_text(f"{dataset_folder}:default:train") == "w9"
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], and None was asked for; pass .*::test"):
        load_text(str(dataset_folder))
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], and 'dev' was asked for"):
        load_text(f"{dataset_folder}::dev")
    with pytest.raises(ValueError, match=r"text_column .*'body' is not in .* which has \['text'\]"):
        load_text(f"{dataset_folder}::test", "body")
    with pytest.raises(ValueError, match="config 'other' could not be loaded: ValueError"):
        load_text(f"{dataset_folder}:other:test")


def test_a_folder_with_one_split(dataset_folder: Path, rows: list[str]) -> None:
    (dataset_folder / "train.jsonl").unlink()
    assert load_text(str(dataset_folder)) == "\n\n".join(rows)


def test_saved_datasets(dataset_folder: Path, tmp_path: Path, rows: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.load_dataset("json", data_files={"test": str(dataset_folder / "test.jsonl")}, split="test")
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": one, "dev": one.select([0])}).save_to_disk(tmp_path / "two")
    assert load_text(str(tmp_path / "one")) == "\n\n".join(rows)
    assert load_text(f"{tmp_path / 'one'}::test") == "\n\n".join(rows)
    assert load_text(f"{tmp_path / 'two'}::dev") == rows[0]
    with pytest.raises(ValueError, match="holds the split test only, not 'dev'"):
        load_text(f"{tmp_path / 'one'}::dev")
    with pytest.raises(ValueError, match="is a saved dataset, without any config 'en'"):
        load_text(f"{tmp_path / 'two'}:en:dev")
    with pytest.raises(ValueError, match=r"has the splits \['dev', 'test'\]"):
        load_text(str(tmp_path / "two"))


def test_an_unreachable_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"'wikitext' with config 'raw' .* ConnectionError: Couldn't .* pass a local file"
    ):
        load_text("wikitext:raw:test")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("absent.txt", None, FileNotFoundError, "absent.txt': no such file or folder; pass a .txt file"),
        ("absent.txt:test", None, ValueError, "is no existing path and has 2 parts; pass"),
        ("::test", None, ValueError, "lacks the name; pass"),
        ("name:config:", None, ValueError, "lacks the split; pass"),
        ("empty.txt", b"", ValueError, "gives an empty text: 0 characters"),
        ("blank.txt", b" \n\n", ValueError, "gives an empty text: 3 characters"),
        ("empty.jsonl", b"\n", ValueError, "gives an empty text"),
        ("latin.txt", b"caf\xe9", ValueError, "is not UTF-8 text"),
        ("rows.json", b"[]", ValueError, "a .json file is neither rows nor text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', ValueError, "line 2 is not JSON"),
        ("list.jsonl", b'["a"]', ValueError, "line 1 is a JSON list; each line must be an object"),
        ("column.jsonl", b'{"body": "a"}', ValueError, r"'text' is not in .*, line 1, which has \['body'\]"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}', ValueError, "row 1 is NoneType, not a string"),
    ],
)
def test_bad_texts(
    tmp_path: Path,
    name: str,
    content: bytes | None,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_text(name)


@pytest.mark.parametrize(("module", "spec"), [("datasets", "name:config:split"), ("pyarrow", "rows.parquet")])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)  # What makes `import module` raise ImportError.
    with pytest.raises(ImportError, match=rf'needs {module}: pip install "hf-paged\[eval\]"'):
        load_text(spec)


# ---- the command


@pytest.mark.parametrize(("num_tokens", "is_said"), [("2", True), ("100", True), ("101", False)])
def test_a_figure_of_few_tokens_says_so(model_folder, text_file, tmp_path, capsys, num_tokens, is_said):
    text = tmp_path / "long.txt"
    text.write_text(text_file.read_text(encoding="utf-8") * 8, encoding="utf-8")
    arguments = ["--model", str(model_folder), "--data", str(text), "--window", "32", "--attn", "eager"]
    main([*arguments, "--max-tokens", num_tokens, "--device", "cpu"])
    said = f"only {int(num_tokens) - 1} tokens were scored"
    assert (said in capsys.readouterr().out) == is_said


def test_command_writes_table_and_json(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "ppl.json"
    arguments = ["--model", str(model_folder), "--data", str(text_file), "--window", "32", "--stride", "16"]
    report = main(
        [
            *arguments,
            "--attn",
            "eager",
            "sdpa",
            "--path",
            "prefill",
            "decode",
            "--device",
            "cpu",
            "--output",
            str(output),
        ]
    )
    assert json.loads(output.read_text(encoding="utf-8")) == report

    num_tokens = len(text_file.read_text(encoding="utf-8").split())
    assert report["num_tokens"] == num_tokens
    assert (report["convention"], report["window"], report["stride"]) == ("hf", 32, 16)
    assert (report["dtype"], report["device"].split()[0]) == ("float32", "cpu")
    assert set(report["versions"]) == {"python", "torch", "transformers", "triton", "hf_paged"}
    assert report["reference"] == {"attn": "eager", "path": "prefill"}
    runs = [(row["attn"], row["path"]) for row in report["results"]]
    assert runs == [("eager", "prefill"), ("eager", "decode"), ("sdpa", "prefill"), ("sdpa", "decode")]
    for row in report["results"]:
        assert row["num_scored"] == num_tokens - 1
        assert row["ppl"] == pytest.approx(math.exp(row["mean_nll"]))
        assert abs(row["difference"]["mean"]) < 1e-5
        assert row["difference"]["standard_error"] < 1e-5
        assert row["difference"]["max_abs"] < 1e-4
    assert report["results"][0]["difference"]["max_abs"] == 0

    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith(f"{num_tokens} tokens, convention hf, window 32, stride 16")
    assert table[3].split()[:6] == ["attn", "path", "cache", "windows", "scored", "ppl"]
    assert [tuple(line.split()[:2]) for line in table[4 : 4 + len(runs)]] == runs


def test_command_equals_the_function(model_folder: Path, text_file: Path) -> None:
    words = text_file.read_text(encoding="utf-8").split()[:40]
    ids = [int(word[1:]) + 1 if word[1:].isdigit() else 0 for word in words]
    arguments = ["--model", str(model_folder), "--data", str(text_file), "--max-tokens", "40", "--convention", "gptq"]
    report = main([*arguments, "--window", "16", "--attn", "eager", "--dtype", "float32", "--device", "cpu"])
    expected = perplexity(tiny_llama(), ids, window=16, stride=16, convention="gptq")
    assert report["results"][0]["mean_nll"] == pytest.approx(expected.mean_nll, abs=1e-6)
    assert report["results"][0]["num_scored"] == 2 * 15


def test_command_compares_paged_flash_with_eager_by_default(model_folder: Path, text_file: Path) -> None:
    report = main(["--model", str(model_folder), "--data", str(text_file), "--device", "cpu"])
    assert (report["window"], report["stride"]) == (MAX_POSITIONS, MAX_POSITIONS // 2)
    assert [row["attn"] for row in report["results"]] == ["eager", "paged_flash"]
    assert abs(report["results"][1]["difference"]["mean"]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--path", "prefil"], "path='prefil' is unknown, did you mean 'prefill'"),
        (["--attn", "paged_flush"], r"attn \(--attn\) 'paged_flush' is unknown, did you mean 'paged_flash'"),
        (["--window", "1000"], "window=1000 is larger than the model's max_position_embeddings=128"),
        (["--max-tokens", "1"], r"max_tokens=1 \(--max-tokens\) must be at least 2"),
        (["--device", "warp"], r"device \(--device\) 'warp' cannot be used here"),
        (["--output", "."], r"output \(--output\) '\.' is a folder"),
        (["--model", "./absent"], r"model \(--model\) './absent': AutoConfig.from_pretrained"),
        (["--convention", "gptq", "--max-tokens", "100"], "token_ids has .* and convention 'gptq' drops"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_command_errors(model_folder: Path, text_file: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--model", str(model_folder), "--data", str(text_file), "--attn", "eager", "--device", "cpu", *arguments])


def test_command_refuses_an_implementation_that_transformers_replaces(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", lambda self, name: None)
    with pytest.raises(ValueError, match="'sdpa': transformers gave LlamaForCausalLM 'eager' in its place"):
        main(["--model", str(model_folder), "--data", str(text_file), "--attn", "eager", "sdpa", "--device", "cpu"])
