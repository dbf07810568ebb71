"""Evaluations that cannot mislead: what would give a wrong figure is refused, or said beside it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import command_line
from eval.loading import weights_fingerprint
from eval.perplexity import PathOptions, main, perplexity
from eval.quality.partial_results import PartialResults
from eval.quality.perplexity_table import document_figures
from eval.quality.processes import Processes
from eval.quality.retrieval import STRING_LEN, chunk_of
from eval.quality.scoring import default_chunk, reads_pages, token_nll
from eval.quality.text_data import Documents, load_documents
from hf_paged.engine.sampling.logprobs import token_logprobs

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "integration_tests" / "assets"
MODEL, TEXT = str(ASSETS / "small_model"), str(ASSETS / "heldout.txt")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="paged_flash", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenizer(Path(TEXT).read_text(encoding="utf-8")[:2000], verbose=False)["input_ids"][:70]


def args(output, *more, model=MODEL, data=TEXT):
    return [
        "--model", model, "--data", data, "--window", "32", "--stride", "16", "--max-tokens", "70", "--attn", "eager",
        "--dtype", "float32", "--device", "cpu", "--output", str(output), *more,
    ]  # fmt: skip


# ---- quantised pages are read


@pytest.mark.parametrize(("num_tokens", "num_scored", "chunk"), [(9, 8, 3), (9, 2, 3), (9, 8, 1), (9, 5, 8), (2, 1, 1)])
@pytest.mark.parametrize("path", ["prefill", "paged_prefill", "decode", "chunked_prefill"])
def test_tokens_that_read_pages_are_counted_one_by_one(num_tokens, num_scored, chunk, path):
    firsts = {"chunked_prefill": chunk, "decode": num_tokens - num_scored}
    in_first_forward = set(range(firsts.get(path, num_tokens)))
    scored = range(num_tokens - num_scored, num_tokens)
    expected = sum(token - 1 not in in_first_forward for token in scored)
    assert reads_pages(num_tokens, num_scored, path, chunk) == expected


@pytest.mark.parametrize(("path", "chunk"), [("chunked_prefill", 5), ("decode", 64), ("engine", 64)])
def test_exactly_the_tokens_said_to_read_quantised_pages_change(model, ids, path, chunk):
    runs = [
        perplexity(model, ids, window=31, stride=13, path=path, options=PathOptions(kv_dtype=kv_dtype, chunk=chunk))
        for kv_dtype in ("auto", "fp8")
    ]
    changed = int(((runs[0].nll - runs[1].nll).abs() > 1e-7).sum())
    assert runs[1].num_from_pages == changed
    assert 0 < changed <= runs[1].num_scored


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_a_run_that_would_read_no_quantised_page_is_refused(model, ids, kv_dtype):
    with pytest.raises(ValueError, match=r"no scored token would read a quantised page; pass a smaller chunk"):
        perplexity(
            model, ids, window=32, stride=16, path="chunked_prefill", options=PathOptions(kv_dtype=kv_dtype, chunk=31)
        )


def test_the_chunk_is_chosen_from_the_window_and_the_count_is_reported(tmp_path, capsys):
    more = ("--attn", "paged_flash", "--path", "chunked_prefill", "--kv-dtype", "auto", "int8")
    report = main(args(tmp_path / "r.json", *more))
    assert report["chunk"] == default_chunk(32) == 8
    rows = report["results"]
    # The first window scores 31 tokens, of which the first 8 queries read nothing; the others score 16, all from pages.
    assert [row["num_from_pages"] for row in rows] == [row["num_scored"] - 8 for row in rows]
    assert rows[1]["difference"]["max_abs"] > 0
    assert "paged_flash chunked_prefill int8: 61 of 69 scored tokens read quantised pages" in capsys.readouterr().out


@pytest.mark.parametrize("length", [256, 512, 4096, 131_072])
def test_the_string_of_a_short_induction_prompt_is_read_from_pages(length):
    assert reads_pages(length, STRING_LEN - 1, "chunked_prefill", chunk_of(length)) == STRING_LEN - 1


# ---- resuming


def stopped_run(tmp_path, monkeypatch, model=MODEL):
    """A run that is stopped behind its second batch."""
    put, calls = PartialResults.put, []

    def put_and_stop(self, run, batch, figures):
        put(self, run, batch, figures)
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "put", put_and_stop)
        with pytest.raises(KeyboardInterrupt):
            main(args(tmp_path / "r.json", model=model))


def test_a_run_of_other_weights_is_not_resumed(tmp_path, monkeypatch):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    stopped_run(tmp_path, monkeypatch, str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7, 3] += 0.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"was written with weights_sha256=.*\(different: weights_sha256\)"):
        main(args(tmp_path / "r.json", "--resume", model=str(folder)))


def test_a_run_of_another_tokenizer_is_not_resumed(tmp_path, monkeypatch):
    stopped_run(tmp_path, monkeypatch)
    original = AutoTokenizer.from_pretrained(MODEL)

    class Shifted:
        bos_token_id, eos_token_id = original.bos_token_id, original.eos_token_id

        def __call__(self, text, **options):
            found = original(text, **options)
            found["input_ids"] = [*found["input_ids"][1:], found["input_ids"][0]]
            return found

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: Shifted())
    with pytest.raises(ValueError, match=r"\(different: token_ids_sha256\)"):
        main(args(tmp_path / "r.json", "--resume"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fingerprint_sees_one_bit_a_swap_and_a_name(dtype):
    module = torch.nn.Linear(5, 3).to(dtype)
    before = weights_fingerprint(module)
    assert weights_fingerprint(module) == before
    with torch.no_grad():
        module.weight[1, 2] *= -1
        changed = weights_fingerprint(module)
        module.weight[1, 2] *= -1
        assert weights_fingerprint(module) == before
        module.weight[[0, 1]] = module.weight[[1, 0]]
    assert len({before, changed, weights_fingerprint(module)}) == 3


# ---- output


def test_partial_results_outlive_a_report_that_cannot_be_written(tmp_path, monkeypatch):
    def fails(path, text):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(command_line, "write_whole", fails)
        with pytest.raises(OSError, match="no space left"):
            main(args(tmp_path / "r.json"))
    assert (tmp_path / "r.json.partial-0.jsonl").is_file()
    calls = []
    monkeypatch.setattr(PartialResults, "put", lambda *a: calls.append(a))
    report = main(args(tmp_path / "r.json", "--resume"))
    assert not calls
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_an_output_that_is_a_device_is_refused_at_the_start(tmp_path):
    (tmp_path / "r.json").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"output \(--output\) .* is a device or a pipe"):
        main(args(tmp_path / "r.json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_refused_at_the_start(tmp_path):
    (tmp_path / "r.json").touch(mode=0o400)
    with pytest.raises(ValueError, match=r"output \(--output\) .* is read-only here"):
        main(args(tmp_path / "r.json"))


def test_a_failing_write_leaves_the_file_that_was_there(tmp_path):
    (tmp_path / "r.json").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        command_line.write_whole(tmp_path / "r.json", "new \ud800")
    assert (tmp_path / "r.json").read_text() == "old"


def test_a_second_run_of_an_output_is_refused_while_the_first_is_under_way(tmp_path):
    first = PartialResults(tmp_path / "r.json", {"a": 1}, resume=False, processes=Processes())
    first.put("run", 0, [1.5])
    with pytest.raises(ValueError, match=r"output \(--output\) .*r.json': another run writes it at the moment"):
        PartialResults(tmp_path / "r.json", {"a": 1}, resume=False, processes=Processes())
    first.close(finished=False)
    again = PartialResults(tmp_path / "r.json", {"a": 1}, resume=True, processes=Processes())
    assert again.get("run", 0) == [1.5]
    again.close(finished=True)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_line_and_status_130(tmp_path):
    stop = "command_line.run(lambda: os.kill(os.getpid(), signal.SIGINT))"
    command = [sys.executable, "-c", f"import os, signal; from eval import command_line\n{stop}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (done.returncode, done.stderr.strip()) == (128 + signal.SIGINT, "interrupted")


# ---- texts


def test_a_text_without_white_space_has_byte_figures_and_no_words(tmp_path, capsys):
    (tmp_path / "zh.txt").write_text("这是一个没有空格的中文句子。" * 12, encoding="utf-8")
    options = ["--convention", "lm-eval", "--window", "64", "--dtype", "float32", "--attn", "eager", "--device", "cpu"]
    data, output = str(tmp_path / "zh.txt"), str(tmp_path / "r.json")
    report = main(["--model", MODEL, "--data", data, "--output", output, *options])
    row = report["results"][0]
    assert row["word_perplexity"] is None
    assert row["bits_per_byte"] > 0
    assert "word perplexity left out (hardly any white space in the text), byte perplexity" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["word_perplexity"] is None


def test_words_are_counted_where_there_are_some():
    figures = document_figures(30.0, Documents(("a b c",), num_words=3, num_bytes=5))
    assert figures["word_perplexity"] == pytest.approx(torch.tensor(10.0, dtype=torch.float64).exp().item())


def test_a_lone_surrogate_names_file_and_row(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": "fine"}\n{"text": "a \\ud83d b"}\n')
    message = r"'text' of '.*s.jsonl' \(--data\): row 1 holds the lone surrogate '\\ud83d' at"
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / "s.jsonl"))


@pytest.mark.parametrize("row", ["", "word", "  "])
def test_an_empty_row_has_no_last_word(tmp_path, row):
    lines = [json.dumps({"text": text}) + "\n" for text in ("import os now", row)]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"row 1 of the data \(--data\) is .* scores the last word"):
        main(["--model", MODEL, "--data", str(tmp_path / "d.jsonl"), "--convention", "last-word", "--window", "64"])


# ---- ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_best_of_equal_logits_are_those_of_greedy_decoding_by_id(dtype, count):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 4, (40, 37), generator=generator).to(dtype)
    found = token_logprobs(logits, torch.zeros(40, dtype=torch.int64), count)
    for row, item in zip(logits.tolist(), found):
        assert item.top_ids[0] == row.index(max(row))
        expected = sorted(range(37), key=lambda i: (-row[i], i))[:count]
        assert [row[i] for i in item.top_ids] == [row[i] for i in expected]
        assert all(a < b for a, b in zip(item.top_ids, item.top_ids[1:]) if row[a] == row[b])
        assert len(set(item.top_ids)) == count


def test_an_empty_continuation_is_refused():
    pytest.importorskip("lm_eval")
    from hf_paged.lm_eval_model import PagedLM

    lm = PagedLM(MODEL, dtype="float32", device="cpu", max_length=64)
    with pytest.raises(ValueError, match=r"\('import', ''\) has an empty continuation"):
        lm._loglikelihood_tokens([(("import", ""), [5, 6], [])], disable_tqdm=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_likelihoods_over_a_large_vocabulary_have_no_bias(dtype):
    logits = (torch.randn(64, 50_000) * 3).to(dtype)
    labels = torch.randint(50_000, (64,))
    errors = token_nll(logits, labels).double() + logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert errors.abs().max() < 4e-6  # two roundings of a float32 of this size
    assert errors.mean().abs() < 1e-6
