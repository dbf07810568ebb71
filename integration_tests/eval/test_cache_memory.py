"""Bytes held by the caches, tokens computed in a chat, and the picture of the pool, on tiny sizes."""

import builtins
import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import hf_paged
from eval import cache_memory, page_picture
from eval.cache_memory import DYNAMIC, ONCE, PAGED, STORED, Sizes
from eval.page_picture import CACHED, FREE, SHARED

TINY = Sizes(
    head_dim=16, page_size=8, ragged=7, ragged_shortest=1, ragged_longest=63, beams=6, beam_prompt=111, samples=6,
    sample_prompt=135, new_tokens=5, turns=3, first_message=41, message=17, answer=5, window=12, windowed_prompt=111,
    windowed_chunk=24, reorder_prompts=(63,), repeats=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The operations are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama():
    return cache_memory.llama(TINY)


@pytest.mark.parametrize("kind", [PAGED, "PagedCache fp8", "PagedCache int8"])
def test_a_ragged_batch_holds_its_tokens_and_at_most_a_page_per_sequence_more(llama, kind):
    row = cache_memory.ragged(llama, TINY, kind)
    assert row.ideal_bytes <= row.held_bytes <= row.ideal_bytes + row.page_slack_bytes


def test_a_dense_cache_holds_the_padding(llama):
    row = cache_memory.ragged(llama, TINY, DYNAMIC)
    lengths = cache_memory.ragged_lengths(TINY)
    assert row.held_bytes == row.ideal_bytes // sum(lengths) * max(lengths) * len(lengths)


def test_a_missing_backend_is_said(llama, monkeypatch):
    def missing(backend, config):
        raise ImportError(backend)

    monkeypatch.setattr(cache_memory, "QuantizedCache", missing)
    row = cache_memory.ragged(llama, TINY, "QuantizedCache quanto 4 bits")
    assert (row.held_bytes, row.note) == (None, "not installed")


def test_a_peer_that_fails_is_said_and_pages_that_fail_raise(llama):
    def fails(cache):
        raise RuntimeError("probability tensor contains nan")

    row = cache_memory._measure("c", "QuantizedCache fp8", llama, 8, 16, 8, 1, fails)
    assert (row.held_bytes, row.note) == (None, "failed: probability tensor contains nan")
    with pytest.raises(RuntimeError, match="contains nan"):
        cache_memory._measure("c", PAGED, llama, 8, 16, 8, 1, fails)


@pytest.mark.parametrize("kind", [PAGED, ONCE, STORED])
@pytest.mark.parametrize("case", ["b", "c"])
def test_beams_and_samples_share_their_prompt(llama, case, kind):
    paged = cache_memory.forked(llama, TINY, kind, case)
    dense = cache_memory.forked(llama, TINY, DYNAMIC, case)
    assert dense.held_bytes >= 3 * paged.held_bytes
    assert paged.held_bytes <= paged.ideal_bytes + 2 * paged.page_slack_bytes
    assert paged.most_bytes < dense.most_bytes / 2
    if kind != PAGED:
        assert paged.computed_tokens < dense.computed_tokens / 2


def test_a_chat_computes_new_tokens_and_a_partial_page(llama):
    turns = cache_memory.chat(llama, TINY)
    assert len(turns) == TINY.turns
    for turn in turns:
        assert turn.paged == turn.new + turn.partial
        assert turn.partial < TINY.page_size
        assert (turn.fresh, turn.kept) == (turn.prompt, turn.new)


def test_windowed_layers_hold_their_window():
    row = cache_memory.windowed(cache_memory.gemma3(TINY), TINY, PAGED)
    assert row.ideal_bytes <= row.held_bytes <= row.ideal_bytes + 2 * row.page_slack_bytes


def test_held_bytes_counts_a_storage_once_and_whole():
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=32)
    cache = DynamicCache(config=config)
    states = torch.zeros(1, 2, 7, 16)
    cache.update(states, states, 0)
    assert cache_memory.held_bytes(cache) == 2 * states.nbytes
    cache.layers[0].keys = cache.layers[0].values[:, :, -1:]  # a view keeps all of its storage
    assert cache_memory.held_bytes(cache) == states.nbytes


def test_the_command_writes_both_files(monkeypatch, tmp_path):
    monkeypatch.setattr(cache_memory, "Sizes", lambda: TINY)
    report = cache_memory.main(["--output", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text())["rows"] == report["rows"]
    assert {row["case"] for row in report["rows"]} == set("abce")
    assert all(entry["reorder_ms"] > 0 for entry in report["reorders"])
    text = (tmp_path / "memory.md").read_text()
    assert all(f"## ({case})" in text for case in "abcde")


def test_record_names_the_owner_of_every_page():
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=16,
        attn_implementation="paged_flash",
    )  # fmt: skip
    pool = hf_paged.PagePool(page_size=8, num_pages=8)
    cache = hf_paged.PagedCache(config, pool=pool)

    def write(num_seqs: int, tokens: int) -> None:
        states = torch.zeros(num_seqs, 1, tokens, 16)
        cache.update(states, states, 0)
        cache.planner.flush()

    write(1, 17)
    cache.store_prefix(list(range(17)))  # two full pages
    assert sorted(owner for owner in page_picture.record(cache) if owner != FREE) == [0, 0, 0]
    cache.batch_repeat_interleave(2)
    assert sorted(owner for owner in page_picture.record(cache) if owner != FREE) == [SHARED] * 3
    write(2, 1)
    assert sorted(owner for owner in page_picture.record(cache) if owner != FREE) == [SHARED, SHARED, 0, 1]
    cache.reset()
    assert sorted(owner for owner in page_picture.record(cache) if owner != FREE) == [CACHED, CACHED]


def test_the_picture_is_written_and_shows_every_kind_of_owner(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = page_picture.Sizes(prompt=33, answer=9, beams=3, beam_tokens=9, sample_prompt=9, sample_tokens=9)
    recording = page_picture.run(sizes)
    assert {owner for owners in recording.steps for owner in owners} == {FREE, CACHED, SHARED, 0, 1, 2}
    page_picture.draw(recording, sizes, tmp_path / "pages.png")
    data = (tmp_path / "pages.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1200


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"hf-paged\[eval\]"):
        page_picture.draw(page_picture.Recording([[FREE]]), page_picture.Sizes(), tmp_path / "pages.png")
