"""Pages that rows share, and pages and memory that come back: exact counts after every step."""

import copy
import gc

import pytest
import torch
from host import cache_of, with_cache
from tiny_models import build, copy_weights, randomise, tiny_config

import hf_paged

PAGE = 8
KINDS = ["llama", "mistral", "gemma3_text"]


def model(kind="llama", attn="paged_flash"):
    config = tiny_config(kind)
    source, made = build(config, "eager"), build(config, attn)
    randomise(source, seed=6)
    copy_weights(source, made)
    made.generation_config.update(pad_token_id=0, eos_token_id=None, max_length=None)
    return made


def prompts(rows, length, seed=1):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(m, ids, **options):
    with torch.no_grad():
        return m(ids, **options).logits[:, -1]


# Rows that are the same


@pytest.mark.parametrize("chunk", [1, 5, 8, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_of_repeated_prompts_is_shared(poison, kind, chunk):
    """After each chunk, 2 prompts in 4 rows each have the pages of 2 rows; then each row writes in its own page."""
    m, ids = model(kind), prompts(2, 29)
    once = hf_paged.PagedCache(m.config, page_size=PAGE)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE)
    cache.expect_repeats(4)
    for part in ids.split(chunk, dim=1):
        expected = logits_of(m, part, **with_cache(once)).repeat_interleave(4, 0)
        got = logits_of(m, part.repeat_interleave(4, 0), **with_cache(cache))
        assert torch.allclose(got, expected, atol=1e-4)
        assert cache.pages_in_use == once.pages_in_use
        cache.check()
    before = {window: group.table.held() for window, group in once.groups.items()}
    new = torch.arange(3, 11)[:, None]
    got = logits_of(m, new, **with_cache(cache))
    expected = logits_of(m, torch.cat([ids.repeat_interleave(4, 0), new], 1), use_cache=False)
    assert torch.allclose(got, expected, atol=1e-4)
    cache.check()
    # The page that was not full, in each row; the full ones before it are still shared.
    assert cache.pages_in_use == sum(len(held) - 2 + 8 for held in before.values())


@pytest.mark.parametrize("mode", [{"num_beams": 4}, {"num_return_sequences": 4, "do_sample": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_shares_all_chunks_of_a_prompt(poison, kind, mode):
    ids, tokens = prompts(2, 29), []
    for attn in ("eager", "paged_flash"):
        m = model(kind, attn)
        torch.manual_seed(5)
        out = m.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, prefill_chunk_size=6,
            return_dict_in_generate=True, **with_cache(hf_paged.PagedCache(m.config, page_size=PAGE)), **mode,
        )  # fmt: skip
        tokens.append(out.sequences)
        cache_of(out).check()
    assert torch.equal(*tokens)
    if kind == "llama":
        # 3 full pages of 29 tokens in each prompt; the fourth is each row's own, but for rows that a beam left.
        own = {tuple(pages) for pages in cache_of(out).groups[None].table.pages}
        assert cache_of(out).pages_in_use == 2 * 3 + len(own)
        assert len(own) == 8 or "num_beams" in mode


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rows_that_go_on_from_one_matched_prefix_share_the_rest_of_the_prompt(poison, kind):
    m, ids = model(kind), prompts(1, 45)
    pool = hf_paged.PagePool(PAGE)
    first = hf_paged.PagedCache(m.config, pool=pool)
    logits_of(m, ids[:, :21], **with_cache(first))
    first.store_prefix(ids[:, :21])
    first.reset()
    stored = pool.pages_in_use
    cache = hf_paged.PagedCache(m.config, pool=pool)
    rows = ids.expand(4, -1)
    assert cache.match_prefix(rows) == 4 * 16
    assert pool.pages_in_use == stored
    torch.manual_seed(5)
    out = m.generate(
        ids, attention_mask=torch.ones_like(ids), **with_cache(cache), num_return_sequences=4, do_sample=True,
        max_new_tokens=2,
    )  # fmt: skip
    eager = model(kind, "eager")
    torch.manual_seed(5)
    expected = eager.generate(
        ids, attention_mask=torch.ones_like(ids), num_return_sequences=4, do_sample=True, max_new_tokens=2
    )
    assert torch.equal(out, expected)
    pool.check()
    if kind == "llama":
        # Pages 0 and 1 are those of the prefix, pages 2 to 4 are shared, the sixth is each row's own.
        assert pool.pages_in_use == 2 + 3 + 4
    # What was stored is as it was.
    again = hf_paged.PagedCache(m.config, pool=pool)
    assert again.match_prefix(ids[:, :30]) == 16
    got = logits_of(m, ids[:, 16:30], **with_cache(again))
    assert torch.allclose(got, logits_of(m, ids[:, :30], use_cache=False), atol=1e-4)
    del cache, again, first
    gc.collect()
    pool.prefixes.clear()
    assert pool.pages_in_use == 0
    pool.check()


def test_a_page_that_others_hold_is_copied_once_for_all_rows(poison):
    """4 rows the same write together into a page that a fifth has too: it keeps what it had."""
    m, ids = model(), prompts(1, 21)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE)
    logits_of(m, ids, **with_cache(cache))
    pool_pages = cache.pool.pages_in_use
    twin = copy.copy(cache.groups[None].table)
    cache.groups[None].table.allocator.share(twin.held())  # another owner of all pages
    kept = cache.layers[0].keys.clone()
    cache.batch_repeat_interleave(4)
    cache.expect_repeats(4)
    new = prompts(1, 2, seed=2).expand(4, -1)
    got = logits_of(m, new, **with_cache(cache))
    assert torch.allclose(got, logits_of(m, torch.cat([ids.expand(4, -1), new], 1), use_cache=False), atol=1e-4)
    assert cache.pool.pages_in_use == pool_pages + 1
    pages = cache.groups[None].pages.layers[0]
    held = pages.k[torch.tensor(twin.pages[0])].transpose(1, 2).flatten(0, 1)[:21]
    assert torch.equal(held, kept[0].transpose(0, 1))


def test_tokens_in_other_columns_are_not_the_same(poison):
    """Rows with equal keys and equal counts, whose padding is elsewhere."""
    m = model()
    cache = hf_paged.PagedCache(m.config, page_size=PAGE)
    cache.expect_repeats(2)
    ids = torch.full((2, 6), 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        m(ids, attention_mask=mask, position_ids=torch.arange(6).expand(2, -1), **with_cache(cache))
    assert cache.pages_in_use == 2
    cache.check()


def test_rows_are_compared_no_longer_than_they_are_the_same(monkeypatch):
    """The ordinary path compares nothing; repeated rows are compared up to the first step in which they differ."""
    compared = []
    original = hf_paged.cache.step_planner._is_repeated
    monkeypatch.setattr(hf_paged.cache.step_planner, "_is_repeated", lambda x, n: compared.append(x) or original(x, n))
    m, ids = model(), prompts(2, 9)
    m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert not compared
    torch.manual_seed(0)
    m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=True, num_return_sequences=3)
    # Keys and values of the prompt, and the keys of the first new tokens.
    assert [x.shape[2] for x in compared] == [9, 9, 1]


# Pages and memory that come back


def test_out_of_pages_in_one_group_of_layers_changes_no_other(poison):
    """gemma3 draws two page tables from one budget: a step that one cannot take, the other does not take either."""
    m, ids = model("gemma3_text"), prompts(1, 80)
    assert [group.num_layers for group in hf_paged.PagedCache(m.config).pool.groups.values()] == [2, 1]
    for count in range(60, 0, -1):
        cache = hf_paged.PagedCache(m.config, page_size=PAGE, num_pages=6)
        logits_of(m, ids[:, :20], **with_cache(cache))
        try:
            logits_of(m, ids[:, 20 : 20 + count], **with_cache(cache))
        except hf_paged.OutOfPagesError:
            cache.check()
            assert {layer.columns for layer in cache.layers} == {cache.columns} == {20}
            continue
        break
    assert 10 < count < 60, "neither nothing nor everything fits"
    # What one group took and gave back is there for the other: the full layer can have all but the windows' pages.
    for start in range(20, 60):
        got = logits_of(m, ids[:, start : start + 1], **with_cache(cache)) if start >= cache.columns else None
    if got is not None:
        assert torch.allclose(got, logits_of(m, ids[:, :60], use_cache=False), atol=1e-4)
    cache.check()


def test_a_group_gets_what_another_has_free():
    """A budget of 6 pages in 3 layers: what the windows took for one long step comes back to the layer without."""
    pool = hf_paged.PagePool(PAGE, 6)
    pool.set_layers({7: 2, None: 1})
    windows, full = pool.groups.values()
    pool.ensure_free({windows: 8, full: 2})
    taken = windows.allocator.allocate(8)
    windows.allocator.free(taken[1:])
    pool.ensure_free({windows: 1, full: 14})
    assert (windows.allocator.num_pages, full.allocator.num_pages) == (2, 14)
    with pytest.raises(hf_paged.OutOfPagesError):
        pool.ensure_free({windows: 2, full: 15})
    windows.allocator.free(taken[:1])
    pool.check()


def test_the_first_step_may_come_again_with_another_batch_size():
    m, ids = model(), prompts(4, 30)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE, num_pages=4)
    with pytest.raises(hf_paged.OutOfPagesError):
        logits_of(m, ids, **with_cache(cache))
    got = logits_of(m, ids[:1], **with_cache(cache))
    assert torch.allclose(got, logits_of(m, ids[:1], use_cache=False), atol=1e-4)
    cache.check()


def test_a_step_that_attention_refuses_leaves_nothing_behind():
    m, ids = model(), prompts(1, 12)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE)
    logits_of(m, ids[:, :4], **with_cache(cache))
    with pytest.raises(ValueError, match="output_attentions"):
        logits_of(m, ids[:, 4:], **with_cache(cache), output_attentions=True)
    got = logits_of(m, ids[:, 4:], **with_cache(cache))
    assert cache.columns == 12
    assert torch.allclose(got, logits_of(m, ids, use_cache=False), atol=1e-4)
    cache.check()


def test_a_step_that_ended_half_way_is_not_gone_on_from(monkeypatch):
    """An error between two layers: the next step is refused, crop() takes the half step back."""
    m, ids = model(), prompts(1, 12)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE)
    logits_of(m, ids[:, :4], **with_cache(cache))

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = m.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        logits_of(m, ids[:, 4:], **with_cache(cache))
    handle.remove()
    with pytest.raises(ValueError, match=r"take it back with crop\(\), or call reset\(\)"):
        logits_of(m, ids[:, 4:], **with_cache(cache))
    cache.crop(4 - cache.columns)
    got = logits_of(m, ids[:, 4:], **with_cache(cache))
    assert torch.allclose(got, logits_of(m, ids, use_cache=False), atol=1e-4)
    cache.check()


def test_recurrent_states_that_took_half_a_step_are_not_gone_on_from():
    """bamba's first layer has taken the tokens when the second is out of pages: once more would take them twice."""
    m, ids = model("bamba"), prompts(1, 40)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE, num_pages=3)
    logits_of(m, ids[:, :9], **with_cache(cache))
    with pytest.raises(hf_paged.OutOfPagesError):
        logits_of(m, ids[:, 9:], **with_cache(cache))
    cache.check()
    with pytest.raises(ValueError, match=r"recurrent states of bamba cannot be taken back: call reset\(\)"):
        logits_of(m, ids[:, 9:12], **with_cache(cache))
    cache.reset()
    got = logits_of(m, ids[:, :9], **with_cache(cache))
    assert torch.allclose(got, logits_of(m, ids[:, :9], use_cache=False), atol=1e-4)
    cache.check()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_goes_back_to_the_device(device):
    """crop() and reset() on a pool of their own, trim() on one that is shared; then the cache goes on."""
    m, ids = model().to(device), prompts(1, 120).to(device)
    for pool in (None, hf_paged.PagePool(PAGE)):
        options = {"page_size": PAGE} if pool is None else {"pool": pool}
        cache = hf_paged.PagedCache(m.config, **options)
        logits_of(m, ids, **with_cache(cache))
        full = cache.pool.committed_bytes
        assert full >= 15 * cache.pool.page_bytes
        cache.crop(9 - 120)
        if pool is not None:
            assert pool.groups[None].allocator.num_pages >= 15
            pool.trim()
        assert cache.pool.groups[None].allocator.num_pages == 2
        for pages in cache.groups[None].pages.layers.values():
            assert pages.arena.committed < 2 * pages.page_bytes + pages.arena.granularity
        cache.check()
        got = logits_of(m, ids[:, 9:], **with_cache(cache))
        assert torch.allclose(got, logits_of(m, ids, use_cache=False), atol=1e-4)
        cache.check()
        cache.reset()
        cache.pool.trim()
        assert cache.pool.committed_bytes == 0
        # As little as a new cache takes, not as much as there was before.
        logits_of(m, ids[:, :9], **with_cache(cache))
        assert cache.pool.groups[None].allocator.num_pages == 16


def test_a_small_crop_gives_no_memory_back():
    """Rolling back a few tokens, as drafting does, must not take and give memory at every step."""
    m, ids = model(), prompts(1, 120)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE)
    logits_of(m, ids, **with_cache(cache))
    before = cache.pool.committed_bytes
    cache.crop(-60)
    assert cache.pool.committed_bytes == before
    assert cache.pool.trim() >= 0
    assert cache.pool.groups[None].allocator.num_pages == 8


def test_stored_prefixes_keep_their_memory():
    m, ids = model(), prompts(1, 120)
    cache = hf_paged.PagedCache(m.config, page_size=PAGE)
    logits_of(m, ids, **with_cache(cache))
    cache.store_prefix(ids[:, :24])
    cache.reset()
    assert cache.pool.groups[None].allocator.num_pages == 3
    cache.check()
    assert cache.match_prefix(ids) == 24
    got = logits_of(m, ids[:, 24:], **with_cache(cache))
    assert torch.allclose(got, logits_of(m, ids, use_cache=False), atol=1e-4)
    cache.check()


@pytest.mark.gpu
@pytest.mark.whole_card
def test_trimmed_memory_is_free_on_the_gpu():
    pool = hf_paged.PagePool(256)
    pool.set_layers({None: 1})
    group = pool.groups[None]
    states = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    layer = group.layer(0, states, states)
    layer.k[:] = 0  # nothing yet, but kernels and allocator are warm
    torch.cuda.synchronize()
    start, _ = torch.cuda.mem_get_info()
    group.ensure_free(256)  # 256 MiB
    pages = group.allocator.allocate(256)
    layer.k[7] = 3.0
    full, _ = torch.cuda.mem_get_info()
    assert start - full >= 250 << 20
    group.allocator.free(pages[8:])
    assert pool.trim() >= 200 << 20
    trimmed, _ = torch.cuda.mem_get_info()
    assert start - trimmed <= 32 << 20
    assert bool((layer.k[7] == 3.0).all())
    group.allocator.free(pages[:8])
