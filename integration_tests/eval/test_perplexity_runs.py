"""Perplexity: every path and cache dtype on the small model, conventions, named data, several processes, resuming."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.perplexity import DocumentBounds, PathOptions, RunControl, encode, main, perplexity, plan_runs
from eval.quality import named_data, perplexity_result, text_data
from eval.quality.named_data import NAMED_DATA, detokenize_wikitext
from eval.quality.partial_results import PartialResults
from eval.quality.processes import Processes
from eval.quality.text_data import load_documents
from eval.quality.windows import Window, plan_windows

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "integration_tests" / "assets"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        ASSETS / "small_model", attn_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "small_model")


@pytest.fixture(scope="module")
def ids(tokenizer):
    text = (ASSETS / "heldout.txt").read_text(encoding="utf-8")[:4000]
    return tokenizer(text, verbose=False)["input_ids"][:400]


@pytest.fixture(scope="module")
def eager(model, ids):
    model.set_attn_implementation("eager")
    return perplexity(model, ids, window=111, stride=63)


# ---- paths


@pytest.mark.parametrize("path", ["prefill", "paged_prefill", "padded_prefill", "chunked_prefill", "decode", "engine"])
def test_every_path_agrees_with_eager(model, ids, eager, path):
    model.set_attn_implementation("paged_flash")
    options = PathOptions(chunk=17, batch_size=3)
    result = perplexity(model, ids, window=111, stride=63, path=path, options=options)
    assert abs(result.perplexity / eager.perplexity - 1) < 1e-4
    assert result.paired_difference(eager).max_abs < 1e-3
    assert result.top1_agreement(eager) > 0.99


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("path", ["chunked_prefill", "engine"])
def test_quantised_pages_are_read_and_lose_little(model, ids, eager, path, kv_dtype):
    model.set_attn_implementation("paged_flash")
    options = PathOptions(chunk=17, batch_size=3, kv_dtype=kv_dtype)
    result = perplexity(model, ids, window=111, stride=63, path=path, options=options)
    assert 1e-4 < result.paired_difference(eager).max_abs < 1
    assert abs(result.perplexity / eager.perplexity - 1) < 0.02


def test_the_engine_leaves_the_attention_implementation_as_it_was(model, ids):
    model.set_attn_implementation("paged_flash")
    perplexity(model, ids[:100], window=64, stride=32, path="engine")
    assert model.config._attn_implementation == "paged_flash"


@pytest.mark.parametrize("path", ["paged_prefill", "engine"])
def test_windows_of_lm_eval_may_be_as_long_as_the_model_has_positions(ids, path):
    """They feed `window` tokens and score one more, which is never fed."""
    model = AutoModelForCausalLM.from_pretrained(
        ASSETS / "small_model", attn_implementation="eager", dtype=torch.float32, max_position_embeddings=64
    )
    settings = {"window": 64, "stride": 64, "convention": "lm-eval", "bounds": DocumentBounds([0, 150, 152])}
    expected = perplexity(model, ids[:300], **settings)
    model.set_attn_implementation("paged_flash")
    result = perplexity(model, ids[:300], path=path, **settings)
    assert max(window.end - window.begin for window in result.windows) == 65
    assert result.paired_difference(expected).max_abs < 1e-3
    assert torch.equal(result.top1, expected.top1)


@pytest.mark.parametrize("path", ["padded_prefill", "chunked_prefill"])
def test_paths_with_pages_serve_other_implementations(model, ids, eager, path):
    model.set_attn_implementation("eager")
    result = perplexity(model, ids, window=111, stride=63, path=path)
    assert result.paired_difference(eager).max_abs < 1e-3


def test_runs_that_make_no_sense_are_left_out_and_said():
    runs, left_out = plan_runs(["eager", "paged_flash"], ["prefill", "engine"], ["auto", "fp8"])
    assert runs == [
        ("eager", "prefill", "auto"),
        ("paged_flash", "prefill", "auto"),
        ("paged_flash", "engine", "auto"),
        ("paged_flash", "engine", "fp8"),
    ]
    assert any("eager engine auto: the engine runs paged_flash" in reason for reason in left_out)
    with pytest.raises(ValueError, match=r"nothing to measure .* the engine runs paged_flash"):
        plan_runs(["eager"], ["engine"], ["auto"])


def test_observed_logits_are_those_of_the_scored_tokens(model, ids, eager):
    seen = torch.full((eager.num_scored,), torch.nan, dtype=torch.float64)
    labels = torch.tensor(ids)[eager.positions]

    def observe(first, logits):
        rows = torch.arange(len(logits))
        seen[first : first + len(logits)] = -logits.log_softmax(-1)[rows, labels[first : first + len(logits)]].double()

    model.set_attn_implementation("eager")
    result = perplexity(
        model, ids, window=111, stride=63, path="chunked_prefill", options=PathOptions(batch_size=4),
        control=RunControl(observe=observe),
    )  # fmt: skip
    torch.testing.assert_close(seen, result.nll, rtol=0, atol=1e-5)


# ---- conventions


def test_llama_cpp_scores_the_second_half():
    assert plan_windows(25, 8, 8, "llama.cpp") == tuple(Window(8 * i, 8 * i + 8, 3) for i in range(3))


@pytest.mark.parametrize("lengths", [[1], [7, 8, 9], [30, 1, 16, 17]])
def test_lm_eval_windows_are_those_of_lm_eval(lengths):
    utils = pytest.importorskip("lm_eval.utils")
    prefix, window = 99, 8
    documents = [list(range(100 * (i + 1), 100 * (i + 1) + length)) for i, length in enumerate(lengths)]
    expected = []
    stream, starts = [], []
    for tokens in documents:
        starts.append(len(stream))
        stream += [prefix, *tokens]
        rolling = utils.get_rolling_token_windows(tokens, prefix, window, 1)
        expected += [utils.make_disjoint_window(pair) for pair in rolling]
    got = []
    for item in plan_windows(len(stream), window, window, "lm-eval", starts):
        tokens = stream[item.begin : item.end]
        got.append((tokens[: -item.num_scored], tokens[-item.num_scored :]))
    assert got == [(list(context), list(labels)) for context, labels in expected]


def test_document_starts_are_checked():
    with pytest.raises(ValueError, match="must ascend from 0 to less than the 5 tokens"):
        plan_windows(5, 4, 4, "lm-eval", [0, 5])
    with pytest.raises(ValueError, match="document_starts has 2 documents, and convention 'gptq' scores one text"):
        plan_windows(5, 4, 4, "gptq", [0, 2])


def test_word_and_byte_figures_of_the_command(tmp_path, tokenizer):
    rows = ["def read(path):\n    return open(path).read()\n", "import os\nimport sys\n"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    report = main(
        ["--model", str(ASSETS / "small_model"), "--data", str(data), "--attn", "eager", "--convention", "lm-eval",
         "--window", "16", "--dtype", "float32", "--device", "cpu"]
    )  # fmt: skip
    row = report["results"][0]
    total = row["mean_nll"] * row["num_scored"]
    # White space at the end makes one more, empty word, in lm-eval's count.
    words = len(["def", "read(path):", "return", "open(path).read()"]) + 1 + len(["import", "os", "import", "sys"]) + 1
    assert torch.tensor(total / words).exp().item() == pytest.approx(row["word_perplexity"], rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(total / sum(map(len, rows)) / torch.tensor(2.0).log().item(), rel=1e-5)
    assert row["num_scored"] == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rows)


# ---- data


def test_arrow_files_and_streams(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["one", "two"]})
    for name, make in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with make(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        assert load_documents(str(tmp_path / name)).rows == ("one", "two")
    (tmp_path / "bad.arrow").write_bytes(b"no arrow")
    with pytest.raises(ValueError, match="is not an arrow file"):
        load_documents(str(tmp_path / "bad.arrow"))


def test_a_local_copy_gets_the_preprocessing_of_its_name(tmp_path):
    page = tmp_path / "pages.jsonl"
    page.write_text(json.dumps({"page": " = Title = \n It cost 1 @,@ 000 dollars . \n"}) + "\n", encoding="utf-8")
    documents = load_documents(f"wikitext-2-documents@{page}")
    assert documents.rows == (" = Title =\nIt cost 1,000 dollars.\n",)
    assert documents.num_bytes == len(" = Title = \n It cost 1 @,@ 000 dollars . \n")
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"r{i}"}) for i in range(1200)), encoding="utf-8")
    c4 = load_documents(f"c4@{text}")
    assert len(c4.rows) == 1100
    assert c4.text.startswith("r0 r1 r2 ")
    assert c4.max_windows == 256


def test_detokenising_is_that_of_lm_eval():
    preprocess = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    page = (
        " \n = Robert <unk> = \n \n He said \" yes \" , then ( at 3 @.@ 5 ° ) left ; the boys ' dogs ' s bark @-@ like"
        " [ N ] 's = = = x = = = ! ? \n "
    )
    assert detokenize_wikitext(page) == preprocess.wikitext_detokenizer({"page": page})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories laid out as those of the hub, found by `datasets` under their names because they lie right here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    wrong = [{"text": "not this one"}]

    def write(path: str, rows: list[dict]) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(file)
        elif path.endswith(".gz"):
            file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        else:
            file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def configs(repository: str, *names: str) -> None:
        entries = "".join(
            f"- config_name: {name}\n  data_files:\n"
            + "".join(f"  - {{split: {split}, path: {name}/{split}-*}}\n" for split in ("test", "train"))
            for name in names
        )
        (tmp_path / repository / "README.md").write_text(f"---\nconfigs:\n{entries}---\n", encoding="utf-8")

    rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": " It cost 1 @,@ 000 . \n"}]
    for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        write(f"Salesforce/wikitext/{name}/test-00000-of-00001.parquet", [*rows, {"text": name}])
        write(f"Salesforce/wikitext/{name}/train-00000-of-00001.parquet", wrong)
    configs("Salesforce/wikitext", "wikitext-2-raw-v1", "wikitext-103-raw-v1")
    pages = "EleutherAI/wikitext_document_level"
    write(f"{pages}/wikitext-2-raw-v1/test-00000-of-00001.parquet", [{"page": " = A = \n b 1 @.@ 5"}, {"page": "c"}])
    write(f"{pages}/wikitext-2-raw-v1/train-00000-of-00001.parquet", [{"page": "not this one"}])
    configs(pages, "wikitext-2-raw-v1")
    web = [{"text": f"r{i}", "timestamp": "2019", "url": "http://"} for i in range(1200)]
    write("allenai/c4/en/c4-validation.00000-of-00008.json.gz", web)
    write("allenai/c4/en/c4-validation.00001-of-00008.json.gz", wrong)
    write("allenai/c4/en/c4-train.00000-of-01024.json.gz", wrong)
    books = [{"short_book_title": t, "publication_date": 1900, "url": "", "text": f"Book {t}"} for t in "ab"]
    write("emozilla/pg19-test/data/test-00000-of-00001-29a571947c0b5ccc.parquet", books)
    write("EleutherAI/lambada_openai/data/lambada_test.jsonl", [{"text": "He came in ."}, {"text": "She went"}])
    (tmp_path / "EleutherAI/lambada_openai/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test, path: data/lambada_test.jsonl}\n---\n",
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wikitext-2", "\n\n = Title = \n\n\n\n\n It cost 1 @,@ 000 . \n\n\nwikitext-2-raw-v1"),
        ("wikitext-103", "\n\n = Title = \n\n\n\n\n It cost 1 @,@ 000 . \n\n\nwikitext-103-raw-v1"),
        ("wikitext-2-documents", " = A =\nb 1.5\n\nc"),
        ("c4", " ".join(f"r{i}" for i in range(1100))),
        ("pg19", "Book a\n\nBook b"),
        ("lambada", "He came in .\n\nShe went"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_named_data_in_the_layout_of_the_hub(name, text):
    documents = load_documents(name)
    assert documents.text == text
    assert documents.max_windows == (256 if name == "c4" else None)


@pytest.mark.usefixtures("hub")
def test_a_name_close_to_one_that_is_known():
    with pytest.raises(FileNotFoundError, match="'lambda': no such file or folder, did you mean 'lambada'"):
        load_documents("lambda")


def test_named_data_that_cannot_be_reached(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name, data in NAMED_DATA.items():
        with pytest.raises(ValueError, match=rf"'{name}': the dataset '{data.repository}' .* local file .*@path"):
            load_documents(name)


def test_named_data_without_the_column(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["a"]})
    monkeypatch.setattr(text_data, "_load_split", lambda *args, **kwargs: rows)
    with pytest.raises(ValueError, match=r"'text' is not in 'pg19' \(emozilla/pg19-test\), which has \['body'\]"):
        load_documents("pg19")


def test_a_text_that_is_too_short_names_the_data(tmp_path):
    data = tmp_path / "short.txt"
    data.write_text("import os\n", encoding="utf-8")
    arguments = ["--model", str(ASSETS / "small_model"), "--data", str(data), "--convention", "gptq", "--window", "64"]
    with pytest.raises(ValueError, match=r"short\.txt': token_ids has \d+ tokens, and convention 'gptq' drops"):
        main(arguments)


# ---- statistics


def test_the_bootstrap_interval_holds_the_figure_and_narrows_with_windows():
    def result(num_windows):
        nll = torch.randn(num_windows * 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
        windows = tuple(Window(10 * i, 10 * i + 11, 10) for i in range(num_windows))
        return perplexity_result.PerplexityResult(nll, torch.arange(len(nll)), windows, "eager", "prefill", "gptq", 1.0)

    widths = []
    for num_windows in (16, 256):
        one = result(num_windows)
        low, high = one.confidence_interval()
        assert low < one.perplexity < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert result(16).confidence_interval() == result(16).confidence_interval()


# ---- resuming


def command(output: Path, *more: str) -> list[str]:
    return [
        "--model", str(ASSETS / "small_model"), "--data", str(ASSETS / "heldout.txt"), "--max-tokens", "700",
        "--window", "64", "--stride", "32", "--attn", "eager", "paged_flash", "--path", "prefill", "chunked_prefill",
        "--dtype", "float32", "--device", "cpu", "--batch-size", "2", "--output", str(output), *more,
    ]  # fmt: skip


def figures(report: dict) -> list[tuple]:
    return [(row["attn"], row["path"], row["num_scored"], row["mean_nll"], row["ppl"]) for row in report["results"]]


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = main(command(tmp_path / "whole.json"))
    put, count = PartialResults.put, 0

    def stop_after_a_while(self, *args):
        nonlocal count
        put(self, *args)
        count += 1
        if count == 13:
            raise KeyboardInterrupt

    output = tmp_path / "ppl.json"
    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "put", stop_after_a_while)
        with pytest.raises(KeyboardInterrupt):
            main(command(output))
    assert not output.exists()
    left = list(tmp_path.glob("ppl.json.partial-*"))
    assert len(left) == 1
    # The end of a line is lost: its batch is computed again.
    left[0].write_text(left[0].read_text(encoding="utf-8")[:-9], encoding="utf-8")

    with pytest.raises(ValueError, match=r"resume \(--resume\): .* was written with .*stride.* pass the same"):
        main(command(output, "--stride", "16", "--resume"))
    forwards = []
    monkeypatch.setattr(PartialResults, "put", lambda self, *args: (forwards.append(1), put(self, *args)))
    resumed = main(command(output, "--resume"))
    assert figures(resumed) == figures(whole)
    num_batches = len(plan_windows(700, 64, 32))  # at least half as many batches of 2, for 4 runs
    assert 0 < len(forwards) <= 4 * (num_batches + 1) // 2 - 12 + 4
    assert list(tmp_path.glob("*.partial-*")) == []


def test_resume_needs_an_output():
    with pytest.raises(ValueError, match=r"resume \(--resume\) goes on from the files beside --output"):
        main(["--model", "x", "--data", "y", "--resume"])


# ---- a model spread over devices


@pytest.mark.parametrize("device_map", ["auto", '{"": "cpu"}', "spread.json"])
def test_a_device_map_gives_the_same_figures(tmp_path, device_map):
    pytest.importorskip("accelerate")
    if device_map == "spread.json":
        # Two of the layers lie on the disk and are fetched for each forward.
        spread = {
            "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
            "model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
        }  # fmt: skip
        device_map = str(tmp_path / device_map)
        Path(device_map).write_text(json.dumps(spread), encoding="utf-8")
    options = ["--path", "prefill", "chunked_prefill", "decode", "--max-tokens", "200"]
    expected = main(command(tmp_path / "one.json", *options))
    assert figures(main(command(tmp_path / "map.json", *options, "--device-map", device_map))) == figures(expected)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("autoo", r"device_map \(--device-map\) 'autoo' is unknown, did you mean 'auto'\?; pass one of auto, .* JSON"),
        ('{"": 1', "is unknown; pass one of auto"),
        ("absent.json", "'absent.json' is unknown"),
        ('{"": "cuda:99"}', r"from_pretrained with .*cuda:99.* failed"),
    ],
)
def test_a_bad_device_map_is_refused(tmp_path, device_map, message):
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=message):
        main(command(tmp_path / "map.json", "--device-map", device_map))


# ---- several processes


def test_parts_of_all_ranks_make_the_whole(model, ids, eager, monkeypatch):
    model.set_attn_implementation("eager")
    parts = []

    def rank(index):
        def gather(self, items):
            parts.append(list(items))
            return [item for part in parts for item in part]

        monkeypatch.setattr(Processes, "gather", gather)
        return perplexity(model, ids, window=111, stride=63, control=RunControl(processes=Processes(index, 2)))

    with pytest.raises(KeyError):
        rank(0)
    both = rank(1)
    assert torch.equal(both.nll, eager.nll)
    assert {i % 2 for i, _ in parts[0]} == {0}


def test_two_processes_of_accelerate_give_the_figures_of_one(tmp_path):
    pytest.importorskip("accelerate")
    one = main(command(tmp_path / "one.json"))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
         "-m", "eval.perplexity", *command(tmp_path / "two.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    assert two["processes"] == 2
    assert figures(two) == figures(one)
    assert done.stdout.count("differences in nats") == 1


def test_every_name_is_documented():
    assert named_data.__doc__ is not None
    assert all(f"`{name}`" in named_data.__doc__ for name in NAMED_DATA)


def test_lm_eval_encoding_puts_each_document_behind_its_token(tokenizer, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "import os"}\n{"text": "x = 1"}\n', encoding="utf-8")
    token_ids, starts = encode(tokenizer, load_documents(str(data)), "lm-eval")
    assert [token_ids[start] for start in starts] == [tokenizer.bos_token_id or tokenizer.eos_token_id] * 2


def test_last_words_are_scored_alone():
    windows = plan_windows(20, 6, 6, "last-word", [0, 9], [2, 3])
    assert windows == (Window(2, 9, 2), Window(13, 20, 3))
    with pytest.raises(ValueError, match="word_tokens has 1 counts for 2 documents"):
        plan_windows(20, 6, 6, "last-word", [0, 9], [2])
    with pytest.raises(ValueError, match="document 1 has 11 tokens and a last word of 7, and window=6"):
        plan_windows(20, 6, 6, "last-word", [0, 9], [2, 7])


def test_a_document_of_one_word_is_refused(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "import os"}\n{"text": "import"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 1 of the data \(--data\) is 'import', and convention 'last-word'"):
        main(["--model", str(ASSETS / "small_model"), "--data", str(data), "--convention", "last-word"])
