"""The attention kernels (interpreter on CPU, compiled on a GPU) and the references, against float64."""


import pytest
import torch
from amount import pairwise
from helpers import DEVICE, TOLERANCE, error, make_pages, prefix_sums, rotation, softmax_attention
from hf_paged_kernels import settings as kernel_settings
from hf_paged_kernels.attention import reference
from hf_paged_kernels.attention.flash_forward_triton import flash_attention_launch
from hf_paged_kernels.attention.paged_triton import paged_attention_launch
from hf_paged_kernels.settings import AttentionSettings
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

PROFILE = settings(
    max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate],  # shrinking costs minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SMALL = AttentionSettings(block_m=16, block_n=16, num_warps=4, num_stages=1)

heads = st.sampled_from([(1, 1), (4, 2), (4, 1), (7, 1), (6, 3)])
head_dims = st.sampled_from([(16, 16), (24, 16), (32, 48), (64, 64), (80, 80), (96, 64)])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
windows = st.sampled_from([(None, None), (None, 0), (0, 0), (5, 0), (40, 0), (3, 3), (None, 4)])
softcaps = st.sampled_from([None, 5.0])
lengths = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 70])


def launch_flash(triton: bool):
    return flash_attention_launch if triton else reference.flash_attention_reference


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
@PROFILE
@given(
    data=st.data(), heads=heads, dims=head_dims, dtype=dtypes, window=windows, softcap=softcaps, has_sinks=st.booleans()
)
def test_flash_attention_packed(triton, poison, data, heads, dims, dtype, window, softcap, has_sinks):
    num_seqs = data.draw(st.integers(1, 3))
    q_lens = [data.draw(st.sampled_from([0, 1, 3, 17, 33])) for _ in range(num_seqs)]
    k_lens = [data.draw(lengths) for _ in range(num_seqs)]
    hq, hk = heads
    q = torch.randn(sum(q_lens), hq, dims[0], dtype=dtype, device=DEVICE)
    k = torch.randn(sum(k_lens), hk, dims[0], dtype=dtype, device=DEVICE)
    v = torch.randn(sum(k_lens), hk, dims[1], dtype=dtype, device=DEVICE)
    sinks = torch.randn(hq, dtype=dtype, device=DEVICE) if has_sinks else None
    scale = dims[0] ** -0.5 * 1.3
    out, lse = launch_flash(triton)(
        q, k, v, prefix_sums(q_lens, DEVICE), prefix_sums(k_lens, DEVICE), max(max(q_lens), 1), *window, softcap, sinks,
        scale,
    )  # fmt: skip
    q_at = k_at = 0
    for lq, lk in zip(q_lens, k_lens):
        expected, expected_lse = softmax_attention(
            q[q_at : q_at + lq], k[k_at : k_at + lk], v[k_at : k_at + lk],
            left=window[0], right=window[1], softcap=softcap, sinks=sinks, scale=scale,
        )  # fmt: skip
        if lq:
            assert error(out[q_at : q_at + lq], expected) <= TOLERANCE[dtype]
            got = lse[:, q_at : q_at + lq].double().cpu()
            assert torch.equal(got.isinf(), expected_lse.isinf())
            assert torch.allclose(got, expected_lse, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0)
        q_at, k_at = q_at + lq, k_at + lk


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
@PROFILE
@given(heads=heads, dims=head_dims, dtype=dtypes, window=windows, lq=lengths, lk=lengths, has_sinks=st.booleans())
def test_flash_attention_dense_strided(triton, poison, heads, dims, dtype, window, lq, lk, has_sinks):
    """Dense inputs as transformers hands them over: views of ``[B, H, L, D]``."""
    hq, hk = heads
    q = torch.randn(2, hq, lq, dims[0], dtype=dtype, device=DEVICE).transpose(1, 2)
    k = torch.randn(2, hk, lk, dims[0], dtype=dtype, device=DEVICE).transpose(1, 2)
    v = torch.randn(2, hk, lk, dims[1], dtype=dtype, device=DEVICE).transpose(1, 2)
    sinks = torch.randn(hq, device=DEVICE) if has_sinks else None
    out, lse = launch_flash(triton)(q, k, v, None, None, lq, *window, None, sinks, 0.2)
    assert lse.shape == (2, hq, lq)
    for b in range(2):
        expected, _ = softmax_attention(
            q[b], k[b], v[b], left=window[0], right=window[1], softcap=None, sinks=sinks, scale=0.2
        )
        if expected.norm() == 0:
            assert out[b].norm() == 0
        else:
            assert error(out[b], expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
@PROFILE
@given(
    data=st.data(), heads=heads, dims=head_dims, dtype=dtypes, page_size=st.sampled_from([8, 16, 64]),
    layout=st.sampled_from(["page-head", "slot-head"]), softcap=softcaps, has_sinks=st.booleans(),
    window=st.sampled_from([(None, 0), (0, 0), (5, 0), (40, 0), (None, None)]),
    phase=st.sampled_from(["prefill", "decode", "mixed", "verify"]),
)  # fmt: skip
def test_paged_attention(
    triton, poison, data, heads, dims, dtype, page_size, layout, softcap, has_sinks, window, phase
):  # fmt: skip
    choices = {"prefill": [1, 17, 33], "decode": [1], "mixed": [0, 1, 5, 40], "verify": [1, 2, 4, 7]}[phase]
    num_seqs = data.draw(st.integers(1, 4))
    q_lens = [data.draw(st.sampled_from(choices)) for _ in range(num_seqs)]
    context = [data.draw(st.sampled_from([0, 1, 7, 64, 111, 150])) for _ in range(num_seqs)]
    totals = [c + n for c, n in zip(context, q_lens)]
    hq, hk = heads
    keys = [torch.randn(n, hk, dims[0], dtype=dtype, device=DEVICE) for n in totals]
    values = [torch.randn(n, hk, dims[1], dtype=dtype, device=DEVICE) for n in totals]
    q = torch.randn(sum(q_lens), hq, dims[0], dtype=dtype, device=DEVICE)
    sinks = torch.randn(hq, device=DEVICE) if has_sinks else None
    k_pages, v_pages, table = make_pages(keys, values, page_size, layout)
    # A small split length, so that the short contexts of a test are split too.
    extra = {"split_length": 64} if triton else {}
    scale = dims[0] ** -0.5
    out, lse = (paged_attention_launch if triton else reference.paged_attention_reference)(
        q, k_pages, v_pages, table, torch.tensor(totals, dtype=torch.int32, device=DEVICE),
        prefix_sums(q_lens, DEVICE), max(max(q_lens), 1), *window, softcap, sinks, scale, **extra,
    )  # fmt: skip
    at = 0
    for i, n in enumerate(q_lens):
        expected, expected_lse = softmax_attention(
            q[at : at + n], keys[i], values[i], left=window[0], right=window[1], softcap=softcap, sinks=sinks,
            scale=scale,
        )  # fmt: skip
        if n:
            assert error(out[at : at + n], expected) <= TOLERANCE[dtype]
            assert torch.allclose(
                lse[:, at : at + n].double().cpu(), expected_lse, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0
            )
        at += n


@pytest.mark.parametrize(
    "dim", [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512), (8, 8), (20, 20)]
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_head_dim_with_the_settings_of_production(poison, dim, phase):
    """The sizes that the settings tables choose, at the head dims that models have."""
    q_len = 5 if phase == "prefill" else 1
    q_lens = [q_len * 9, 1] if phase == "prefill" else [1, 1]
    totals = [70, 33]
    keys = [torch.randn(n, 2, dim[0], device=DEVICE) for n in totals]
    values = [torch.randn(n, 2, dim[1], device=DEVICE) for n in totals]
    q = torch.randn(sum(q_lens), 4, dim[0], device=DEVICE)
    k_pages, v_pages, table = make_pages(keys, values, 16)
    out, _ = paged_attention_launch(
        q, k_pages, v_pages, table, torch.tensor(totals, dtype=torch.int32, device=DEVICE),
        prefix_sums(q_lens, DEVICE), max(q_lens), None, 0, None, None, dim[0] ** -0.5,
    )  # fmt: skip
    dense, _ = flash_attention_launch(
        q, torch.cat(keys), torch.cat(values), prefix_sums(q_lens, DEVICE), prefix_sums(totals, DEVICE), max(q_lens),
        None, 0, None, None, dim[0] ** -0.5,
    )  # fmt: skip
    at = 0
    for i, n in enumerate(q_lens):
        expected, _ = softmax_attention(
            q[at : at + n], keys[i], values[i], left=None, right=0, softcap=None, sinks=None, scale=dim[0] ** -0.5
        )
        assert error(out[at : at + n], expected) <= TOLERANCE[torch.float32]
        assert error(dense[at : at + n], expected) <= TOLERANCE[torch.float32]
        at += n


@pytest.mark.quick
def test_pages_left_of_the_window_are_not_read(poison):
    """A windowed layer gives pages back: their table entries may hold anything."""
    keys = [torch.randn(100, 1, 16, device=DEVICE)]
    k_pages, v_pages, table = make_pages(keys, keys, 8)
    pages = table[0, :13].clone()
    table[0, :10] = 2**30  # position 99 with 12 keys to the left reads tokens 87.. only: page 10 on
    k_pages[pages[10].long(), :, :7] = float("nan")
    args = (
        table, torch.tensor([100], dtype=torch.int32, device=DEVICE), prefix_sums([1], DEVICE), 1, 12, 0, None, None,
        0.3,
    )  # fmt: skip
    q = torch.randn(1, 2, 16, device=DEVICE)
    expected, _ = softmax_attention(q, keys[0], keys[0], left=12, right=0, softcap=None, sinks=None, scale=0.3)
    v_pages[pages[10].long(), :, :7] = float("nan")
    for split_length in (64, 1024):
        out, _ = paged_attention_launch(q, k_pages, v_pages, *args, split_length=split_length)
        assert error(out, expected) <= TOLERANCE[torch.float32]
    out, _ = reference.paged_attention_reference(q, k_pages, v_pages, *args)
    assert error(out, expected) <= TOLERANCE[torch.float32]


def test_a_row_does_not_depend_on_its_batch(poison):
    """Batch invariance: a sequence alone and among others gives the same bits."""
    totals = [5, 150, 33, 64]
    keys = [torch.randn(n, 2, 16, device=DEVICE) for n in totals]
    values = [torch.randn(n, 2, 16, device=DEVICE) for n in totals]
    for q_lens in ([1, 1, 1, 1], [5, 20, 1, 33]):
        q = torch.randn(sum(q_lens), 4, 16, device=DEVICE)
        k_pages, v_pages, table = make_pages(keys, values, 8)
        seq_lens = torch.tensor(totals, dtype=torch.int32, device=DEVICE)
        run = lambda rows, table, lens, q_lens, k_pages=k_pages, v_pages=v_pages: paged_attention_launch(  # noqa: E731
            rows, k_pages, v_pages, table, lens, prefix_sums(q_lens, DEVICE), max(q_lens), None, 0, None, None, 0.25,
            split_length=64,
        )  # fmt: skip
        together, together_lse = run(q, table, seq_lens, q_lens)
        at = 0
        for i, n in enumerate(q_lens):
            if max(q_lens) == 1 or n > 16:  # the same path is taken alone
                alone, alone_lse = run(q[at : at + n], table[i : i + 1], seq_lens[i : i + 1], [n])
                assert torch.equal(alone, together[at : at + n])
                assert torch.equal(alone_lse, together_lse[:, at : at + n])
            at += n


@pytest.mark.parametrize("q_lens", [[1, 1], [20, 3]], ids=str)
def test_more_rows_than_shared_memory_holds(poison, q_lens, monkeypatch):
    """A block is for part of the query heads of a key/value head then; the parts need not be equal."""
    monkeypatch.setattr(kernel_settings, "shared_memory_limit", lambda device: 48 * 1024)
    assert kernel_settings.choose_paged_settings(64, 4, 48 * 1024, 71, q_lens == [1, 1])[0].block_m < 71
    totals = [40, 9]
    q = torch.randn(sum(q_lens), 2 * 71, 64, device=DEVICE)
    keys, values = ([torch.randn(n, 2, 64, device=DEVICE) for n in totals] for _ in "kv")
    k_pages, v_pages, table = make_pages(keys, values, 16)
    sinks, lens = torch.randn(2 * 71, device=DEVICE), torch.tensor(totals, dtype=torch.int32, device=DEVICE)
    out, lse = paged_attention_launch(
        q, k_pages, v_pages, table, lens, prefix_sums(q_lens, DEVICE), max(q_lens), 30, 0, None, sinks, 0.1
    )
    at = 0
    for row, n in enumerate(q_lens):
        rows = slice(at, at + n)
        expected, expected_lse = softmax_attention(
            q[rows], keys[row], values[row], left=30, right=0, softcap=None, sinks=sinks, scale=0.1
        )
        assert error(out[rows], expected) <= TOLERANCE[torch.float32]
        assert torch.allclose(lse[:, rows].double().cpu(), expected_lse, atol=1e-4, rtol=0)
        at = rows.stop


def test_settings_given_by_hand(poison):
    """Tiles smaller than everything: every loop of the kernel runs more than once."""
    q = torch.randn(1, 50, 2, 32, device=DEVICE)
    k = torch.randn(1, 70, 1, 32, device=DEVICE)
    for window in ((None, 0), (20, 0), (20, 9), (None, None)):
        out, _ = flash_attention_launch(q, k, k, None, None, 50, *window, None, None, 0.2, SMALL)
        expected, _ = softmax_attention(
            q[0], k[0], k[0], left=window[0], right=window[1], softcap=None, sinks=None, scale=0.2
        )
        assert error(out[0], expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
@pairwise(
    page_dtype=[torch.int8, torch.float8_e4m3fn], dtype=[torch.float32, torch.float16, torch.bfloat16],
    window=[(None, 0), (20, 0)], q_lens=[[1, 1, 1], [40, 1, 3]],
)  # fmt: skip
def test_quantised_pages(triton, poison, page_dtype, dtype, window, q_lens):
    """Written by write_pages, read by paged_attention: exact attention over the dequantised numbers."""
    from hf_paged_kernels.attention.pages_triton import write_pages_launch

    totals, page_size = [150, 9, 64], 8
    keys = [torch.randn(n, 2, 32, dtype=dtype, device=DEVICE) * 3 for n in totals]
    values = [torch.randn(n, 2, 48, dtype=dtype, device=DEVICE) for n in totals]
    keys[1][0] = 0  # a row of zeros has no largest magnitude
    # Where each token goes: the slots of an unquantised layout, with poison around.
    k_plain, _, table = make_pages(keys, values, page_size)
    slots = []
    for row, n in enumerate(totals):
        slots += [int(table[row, t // page_size]) * page_size + t % page_size for t in range(n)]
    shape = k_plain.shape[:3]
    poisoned = 127 if page_dtype == torch.int8 else float("nan")
    k_pages = torch.full((*shape, 32), poisoned, dtype=torch.float32, device=DEVICE).to(page_dtype)
    v_pages = torch.full((*shape, 48), poisoned, dtype=torch.float32, device=DEVICE).to(page_dtype)
    k_scale, v_scale = (torch.full(shape, float("nan"), device=DEVICE) for _ in range(2))
    write = write_pages_launch if triton else reference.write_pages_reference
    write(
        torch.cat(keys), torch.cat(values), k_pages, v_pages, torch.tensor(slots, device=DEVICE), k_scale, v_scale
    )  # fmt: skip
    q = torch.randn(sum(q_lens), 4, 32, dtype=dtype, device=DEVICE)
    extra = {"split_length": 64} if triton else {}
    out, _ = (paged_attention_launch if triton else reference.paged_attention_reference)(
        q, k_pages, v_pages, table, torch.tensor(totals, dtype=torch.int32, device=DEVICE),
        prefix_sums(q_lens, DEVICE), max(q_lens), *window, None, None, 0.2, k_scale, v_scale, **extra,
    )  # fmt: skip
    at = slot_at = 0
    for i, n in enumerate(q_lens):
        index = torch.tensor(slots[slot_at : slot_at + totals[i]], device=DEVICE)
        page, offset = index // page_size, index % page_size
        back_k, back_v = (
            pages.double()[page, :, offset] * scale[page, :, offset, None]
            for pages, scale in ((k_pages, k_scale), (v_pages, v_scale))
        )
        turn = rotation(page_dtype, 32).to(DEVICE)
        for back, original in ((back_k, keys[i].double() @ turn), (back_v, values[i])):
            # Half a step: 1 of 127, or 32 of 448, the spacing of e4m3 near its largest number.
            step = original.double().abs().amax(-1, keepdim=True) * (1 / 127 if page_dtype == torch.int8 else 32 / 448)
            assert ((back - original).abs() <= step * 0.501).all()
        expected, _ = softmax_attention(
            q[at : at + n], back_k @ turn.T, back_v, left=window[0], right=window[1], softcap=None, sinks=None,
            scale=0.2,
        )  # fmt: skip
        assert error(out[at : at + n], expected) <= TOLERANCE[dtype]
        at, slot_at = at + n, slot_at + totals[i]
