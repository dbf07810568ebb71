"""Attention over FP8 and INT8 pages, against float64 over the numbers that the pages stand for."""

from dataclasses import dataclass

import pytest
import torch
from amount import pairwise
from helpers import DEVICE, TOLERANCE, error, held_keys, make_pages, prefix_sums, rotation, softmax_attention
from hf_paged_kernels import settings
from hf_paged_kernels.attention import reference
from hf_paged_kernels.attention.ops import paged_attention_op, split_plan_op, write_pages_op
from hf_paged_kernels.attention.paged_quantized_triton import quantized_paged_attention_launch
from hf_paged_kernels.backend import uses_quantized_gluon
from hf_paged_kernels.settings import QuantizedSettings, choose_quantized_hopper_settings, choose_quantized_settings

PAGE_DTYPES = [torch.int8, torch.float8_e4m3fn]
KERNELS = ["triton", pytest.param("gluon", marks=pytest.mark.gpu)]
CAUSAL = {"window": (None, 0)}


@dataclass
class Step:
    """Pages of one step; whatever no query may read is NaN or, in INT8 pages, a large number with NaN for a scale."""

    q: torch.Tensor
    pages: list[torch.Tensor]
    scales: list[torch.Tensor]
    table: torch.Tensor
    q_lens: list[int]
    totals: list[int]

    def arguments(self, window=(None, 0), softcap=None, sinks=None, scale=None):
        lens = torch.tensor(self.totals, dtype=torch.int32, device=DEVICE)
        return (
            self.q, *self.pages, self.table, lens, prefix_sums(self.q_lens, DEVICE), max(self.q_lens), *window,
            softcap, sinks, self.q.shape[-1] ** -0.5 if scale is None else scale, *self.scales,
        )  # fmt: skip

    def run(self, kernel, settings=None, **options):
        arguments = self.arguments(**options)
        if kernel == "triton":
            return quantized_paged_attention_launch(*arguments, settings=settings)
        from hf_paged_kernels.attention.paged_quantized_gluon import quantized_splits_launch

        if not uses_quantized_gluon(self.q, *self.pages, *self.scales, max(self.q_lens)):
            pytest.skip("no work for the Gluon kernel, which needs a Hopper GPU and short queries")
        return quantized_splits_launch(*arguments, settings=settings)

    def rounded_queries(self):
        """Float64 queries as the kernels round them: rotated as the keys are, their largest number brought to
        2^14..2^15, in float16; and back."""
        turn = rotation(self.pages[0].dtype, self.q.shape[-1]).to(DEVICE)
        turned = self.q.double() @ turn
        factor = 2.0 ** (14 - turned.abs().amax(-1, keepdim=True).clamp(min=1e-300).log2().floor())
        return (turned * factor).half().double() / factor @ turn.T

    def expected(self, window=(None, 0), softcap=None, sinks=None, scale=None, queries=None):
        """Float64 ``(out, lse)``, element by element from the definition."""
        results, at = [], 0
        queries = self.q if queries is None else queries
        for row, (n, total) in enumerate(zip(self.q_lens, self.totals)):
            size = self.pages[0].shape[2]
            index = self.table[row, : -(-total // size)].long()
            keys = held_keys(self.pages[0][index], self.scales[0][index])
            values = self.pages[1][index].double() * self.scales[1][index].double()[..., None]
            keys, values = (x.transpose(1, 2).flatten(0, 1)[:total] for x in (keys, values))
            scaled = self.q.shape[-1] ** -0.5 if scale is None else scale
            result = softmax_attention(
                queries[at : at + n], keys, values, left=window[0], right=window[1], softcap=softcap, sinks=sinks,
                scale=scaled,
            )  # fmt: skip
            results.append(result)
            at += n
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], 1)


def make_step(
    page_dtype, q_lens, totals, heads=(4, 2), dims=(32, 48), page_size=16, dtype=torch.float16, layout="page-head",
    of_keys=1.0, of_values=1.0,
):  # fmt: skip
    """``of_keys`` and ``of_values`` multiply the scales: a number, or a function of the number of tokens."""
    keys, values = ([torch.randn(n, heads[1], dim) for n in totals] for dim in dims)
    k_pages, v_pages, table = make_pages(keys, values, page_size, layout)
    pages, scales = [], []
    for plain, factor in ((k_pages, of_keys), (v_pages, of_values)):
        numbers, scale = reference.quantize(plain.nan_to_num(), page_dtype)
        factor = factor(scale.shape) if callable(factor) else factor
        scale = scale * factor * (0.5 + torch.rand_like(scale))
        unused = plain.isnan().any(-1)
        poisoned = 127.0 if page_dtype == torch.int8 else float("nan")
        numbers = torch.where(unused[..., None], poisoned, numbers.float()).to(page_dtype)
        if layout == "slot-head":
            numbers = numbers.transpose(1, 2).contiguous().transpose(1, 2)
        pages.append(numbers.to(DEVICE))
        scales.append(scale.masked_fill(unused, float("nan")).to(DEVICE))
    q = torch.randn(sum(q_lens), heads[0], dims[0], device=DEVICE).to(dtype)
    return Step(q, pages, scales, table.to(DEVICE), q_lens, totals)


def check(step, result, **options):
    out, lse = result
    expected, _ = step.expected(**options)
    assert error(out, expected) <= TOLERANCE[step.q.dtype]
    _, expected_lse = step.expected(**options, queries=step.rounded_queries())
    assert torch.equal(lse.isinf().cpu(), expected_lse.isinf())
    seen = expected_lse.isfinite()
    assert torch.allclose(lse.double().cpu()[seen], expected_lse[seen], atol=1e-4, rtol=1e-5)


REGIMES = {
    "decode": ([1, 1, 0, 1], [600, 9, 40, 64]),
    "verify": ([3, 1, 2, 0], [530, 9, 64, 5]),
    "prefill": ([40, 33], [150, 33]),
    "mixed": ([40, 1, 0, 3], [150, 9, 40, 64]),
}
FEATURES = {
    "causal": CAUSAL,
    "all": {"window": (None, None)},
    "window": {"window": (20, 0)},
    "one-key": {"window": (0, 0)},
    "softcap-sinks": {"window": (300, 0), "softcap": 5.0, "sinks": True},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pairwise(page_dtype=PAGE_DTYPES, regime=REGIMES, features=FEATURES)
def test_against_float64(kernel, poison, page_dtype, regime, features):
    options = dict(FEATURES[features])
    # Two of the many combinations: they are tried one by one below.
    dtype, heads, page_size = (
        (torch.float16, (4, 2), 16) if page_dtype == torch.int8 else (torch.bfloat16, (7, 1), 64)
    )  # fmt: skip
    step = make_step(
        page_dtype, *REGIMES[regime], heads, (64, 64) if kernel == "gluon" else (32, 48), page_size, dtype
    )  # fmt: skip
    if "sinks" in options:
        options["sinks"] = torch.randn(heads[0], device=DEVICE)
    check(step, step.run(kernel, **options), **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pairwise(
    page_dtype=PAGE_DTYPES, dims=[(16, 16), (20, 21), (24, 80), (80, 24), (64, 64), (128, 128), (256, 256)],
    regime=["decode", "mixed"],
)  # fmt: skip
def test_head_dims(kernel, poison, page_dtype, dims, regime):
    step = make_step(page_dtype, *REGIMES[regime], dims=dims)
    check(step, step.run(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pairwise(
    page_dtype=PAGE_DTYPES, heads=[(1, 1), (16, 1), (20, 1), (6, 3)],
    pages=[(8, "page-head"), (16, "slot-head"), (256, "page-head")],
)  # fmt: skip
def test_heads_and_pages(kernel, poison, page_dtype, heads, pages):
    page_size, layout = pages
    step = make_step(page_dtype, [1, 2, 1], [300, 33, 7], heads, (64, 64), page_size, layout=layout)
    check(step, step.run(kernel))


@pytest.mark.parametrize("settings", [QuantizedSettings(16, 16, 1, 2), QuantizedSettings(16, 32, 1, 2, pairs=False)])
def test_settings_given_by_hand(poison, settings):
    """Tiles smaller than a page and than everything else, values read in either way."""
    for page_dtype in PAGE_DTYPES:
        for q_lens in ([1, 1, 1], [40, 1, 3]):
            step = make_step(page_dtype, q_lens, [150, 9, 64], page_size=64)
            check(step, step.run("triton", settings, window=(50, 0)), window=(50, 0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_every_number_is_exact(kernel, poison, page_dtype):
    """A sequence of one token gives its value back, bit for bit: all 256 bytes but NaN, in every column."""
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(page_dtype)
    if page_dtype == torch.float8_e4m3fn:
        numbers = torch.where(numbers.isnan(), 0.0, numbers.float()).to(page_dtype)
    dim = 64
    # [16, dim]: every byte in columns of both parities.
    first = torch.tensor([32 * t for t in range(8)] + [32 * t + 1 for t in range(8)])
    values = numbers.view(torch.uint8)[(first[:, None] + torch.arange(dim)) % 256]
    pages = torch.full((16, 1, 16, dim), 0x7F, dtype=torch.uint8)
    pages[:, 0, 0] = values
    pages = pages.view(page_dtype).to(DEVICE)
    scales = torch.full((16, 1, 16), float("nan"), device=DEVICE)
    scales[:, :, 0] = 1.0
    table = torch.arange(16, dtype=torch.int32, device=DEVICE)[:, None]
    q = torch.zeros(16, 1, dim, dtype=torch.float16, device=DEVICE)
    step = Step(q, [pages, pages], [scales, scales], table, [1] * 16, [1] * 16)
    out, _ = step.run(kernel)
    assert torch.equal(out[:, 0].float().cpu(), values.view(page_dtype).float())
    # As keys: the score against the query that is the unit vector of one column in the pages is the number itself.
    for column in (0, 1, 2, 3, 37, 62):
        step.q = rotation(page_dtype, dim)[column].to(q).expand_as(q).contiguous()
        _, lse = step.run(kernel, scale=1.0)
        assert torch.allclose(lse[0].cpu(), values[:, column].view(page_dtype).float(), rtol=1e-6, atol=0)


def scattered(low, high):
    """Scales spread over the powers of ten ``low..high``."""
    return lambda shape: 10.0 ** (low + (high - low) * torch.rand(shape))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("of_queries", "of_keys", "of_values"),
    [
        (1e4, 1.0, 1.0),
        (1e-30, 1.0, 1.0),
        (1e30, 1e-25, 1.0),
        (1.0, 1e5, 1e5),
        (1.0, 1e-30, 1e-30),
        (1.0, 1.0, 1e30),
        (1.0, scattered(-6, 0), scattered(-6, 6)),
    ],
    ids=["large-q", "tiny-q", "huge-q", "large-scales", "tiny-scales", "huge-values", "scattered"],
)
@pytest.mark.parametrize("q_lens", [[1, 1, 2], [40, 1, 2]], ids=["decode", "mixed"])
def test_numbers_far_outside_of_float16(kernel, poison, page_dtype, of_queries, of_keys, of_values, q_lens):
    """Nothing overflows or vanishes, whatever the magnitudes; the logits are brought back to ordinary size by scale."""
    step = make_step(
        page_dtype, q_lens, [300, 9, 64], dims=(64, 64), dtype=torch.bfloat16, of_keys=of_keys, of_values=of_values
    )
    step.q = (step.q.float() * of_queries).to(torch.bfloat16)
    step.q[0, 0] = 0
    scale = 0.125 / of_queries / (1.0 if callable(of_keys) else of_keys)
    check(step, step.run(kernel, scale=scale), scale=scale)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_rows_of_zeros_among_tiny_values(kernel, poison, page_dtype):
    """quantize() gives a row of zeros the scale 1: it must not drown values of 1e-8 beside it."""
    step = make_step(page_dtype, [1, 1], [300, 20], dims=(64, 64), dtype=torch.bfloat16, of_values=1e-8)
    pages, scales = step.pages[1], step.scales[1]
    first = step.table[0, :18].long()
    pages.view(torch.uint8)[first, :, 3] = 0
    scales[first, :, 3] = 1.0
    check(step, step.run(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("q_lens", [[1, 1], [40, 1]], ids=["decode", "mixed"])
def test_an_outlier_channel_of_keys_does_not_cost_the_others(kernel, poison, q_lens):
    """Keys of which one channel is 100 times larger, from writing them to attention; against the plain rule."""
    totals, dim = [300, 40], 64
    keys, values = ([torch.randn(n, 2, dim, device=DEVICE).half() for n in totals] for _ in "kv")
    for key in keys:
        key[..., 7] *= 100
    k_pages, v_pages, table = make_pages(keys, values, 16)
    at = [torch.arange(n, device=DEVICE) for n in totals]
    slots = torch.cat([table[row, t // 16].long() * 16 + t % 16 for row, t in enumerate(at)])
    pages = [torch.full(x.shape, 127, dtype=torch.int8, device=DEVICE) for x in (k_pages, v_pages)]
    scales = [torch.full(x.shape[:3], float("nan"), device=DEVICE) for x in pages]
    write_pages_op(torch.cat(keys), torch.cat(values), *pages, slots, *scales)
    q = torch.randn(sum(q_lens), 4, dim, device=DEVICE).half()
    q[..., 7] /= 100
    step = Step(q, pages, scales, table, q_lens, totals)
    out, _ = step.run(kernel)
    exact, plain, at = [], [], 0
    for n, key, value in zip(q_lens, keys, values):
        codes, scale = reference.quantize(key, torch.int8)
        for results, held in ((exact, key), (plain, codes.double() * scale.double()[..., None])):
            results.append(softmax_attention(
                q[at : at + n], held, value, left=None, right=0, softcap=None, sinks=None, scale=dim**-0.5
            )[0])  # fmt: skip
        at += n
    assert error(out, torch.cat(exact)) < 0.05
    assert error(torch.cat(plain), torch.cat(exact)) > 0.15


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_does_not_depend_on_its_batch(kernel, poison):
    """Bit for bit: alone, and among others, with a plan and without."""
    step = make_step(torch.int8, [1, 1, 1, 1], [600, 5, 300, 64], dims=(64, 64))
    together, together_lse = step.run(kernel)
    for i in range(4):
        alone = Step(step.q[i : i + 1], step.pages, step.scales, step.table[i : i + 1], [1], step.totals[i : i + 1])
        out, lse = alone.run(kernel)
        assert torch.equal(out, together[i : i + 1])
        assert torch.equal(lse, together_lse[:, i : i + 1])
    arguments = step.arguments()
    plan = split_plan_op(arguments[4], arguments[5], step.table.shape[1] * 16, None)
    out, lse = paged_attention_op(*arguments, plan)
    assert error(out, together) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("kernel", KERNELS)
def test_pages_left_of_the_window_are_not_read(kernel, poison):
    """A windowed layer gives pages back: their table entries may hold anything."""
    step = make_step(torch.float8_e4m3fn, [1], [700], dims=(64, 64), page_size=8)
    kept = step.table[0, 85].long()  # position 699 with 12 keys to the left reads tokens 687.. only: page 85 on
    expected = step.expected(window=(12, 0))
    step.table[0, :85] = 2**30
    for x in (*step.pages, *step.scales):
        if x.dtype == torch.float8_e4m3fn:
            x.view(torch.uint8)[kept, :, :7] = 0x7F
        else:
            x[kept, :, :7] = float("nan")
    out, _ = step.run(kernel, window=(12, 0))
    assert error(out, expected[0]) <= TOLERANCE[torch.float16]


def test_no_keys_at_all(poison):
    """A sequence without tokens gives zeros, a row without keys too."""
    step = make_step(torch.int8, [1, 1], [0, 5])
    out, lse = step.run("triton")
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((lse[:, 0] == float("-inf")).all())
    assert bool(out[1].isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("q_lens", [[1] * 4, [4, 1, 3, 4], [300, 1, 64, 5]], ids=["decode", "verify", "mixed"])
def test_error_is_within_twice_that_of_bfloat16(poison, page_dtype, dim, q_lens):
    """The bound is what PyTorch makes of the dequantised keys and values in bfloat16."""
    step = make_step(page_dtype, q_lens, [3000, 17, 1025, 640], (14, 2), (dim, dim), dtype=torch.bfloat16)
    expected, _ = step.expected()
    out, _ = paged_attention_op(*step.arguments())
    at, peer = 0, []
    for row, (n, total) in enumerate(zip(q_lens, step.totals)):
        index = step.table[row, : -(-total // 16)].long()
        k = held_keys(step.pages[0][index], step.scales[0][index]).to(torch.bfloat16)
        v = reference.dequantize(step.pages[1][index], step.scales[1][index], torch.bfloat16)
        k, v = (x.transpose(1, 2).flatten(0, 1)[:total] for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (step.q[at : at + n], k, v))
        mask = torch.ones(n, total, dtype=torch.bool, device=DEVICE).tril(total - n)
        out_peer = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        peer.append(out_peer[0].transpose(0, 1))
        at += n
    assert error(out, expected) <= 2 * error(torch.cat(peer), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_same_bits_every_time(page_dtype, dim):
    """Of many sequences with short splits at their ends: what is overwritten before it was read shows in some rows of
    some calls only."""
    totals = torch.randint(1, 1300, (180,)).tolist()
    step = make_step(page_dtype, [1] * 180, totals, (16, 8), (dim, dim), dtype=torch.bfloat16)
    calls = [paged_attention_op(*step.arguments())[0] for _ in range(60)]
    assert [i for i, out in enumerate(calls) if not torch.equal(out, calls[0])] == []


@pytest.mark.parametrize("q_lens", [[1, 1], [2, 0], [20, 1]], ids=str)
def test_more_rows_than_shared_memory_holds(q_lens, monkeypatch):
    """A block is for part of the query heads of a key/value head then, also where parts are not equal."""
    monkeypatch.setattr(settings, "shared_memory_limit", lambda device: 16 * 1024)
    step = make_step(torch.int8, q_lens, [70, 9], (2 * 71, 2), (128, 128))
    sinks = torch.randn(2 * 71, device=DEVICE)
    assert choose_quantized_settings(128, 16 * 1024, 71, None).block_m < 71
    check(step, step.run("triton", sinks=sinks), sinks=sinks)


def test_settings():
    """Every choice is a power of two that divides the shortest split, and has room for its rows."""
    for head_dim in (16, 64, 128, 256, 512):
        for group in (1, 4, 7, 16, 71):
            for rows in (None, 1, 16, 17, 64, 128):
                for shared_memory in (64 * 1024, 227 * 1024):
                    s = choose_quantized_settings(head_dim, shared_memory, group, rows)
                    assert 256 % s.block_n == 0
                    assert 2 * s.block_n >= 32 * s.num_warps
                    assert s.block_m & (s.block_m - 1) == 0
                    # Or twice the rows would not fit.
                    needed = group if rows is None else rows
                    assert s.block_m >= needed or 2 * 2 * s.block_m * head_dim > shared_memory
                    assert 2 * s.block_m * head_dim <= shared_memory
    for head_dim in (64, 128, 256):
        hopper = choose_quantized_hopper_settings(head_dim)
        assert 256 % hopper.block_n == 0
        assert hopper.stages * hopper.block_n * 2 * head_dim < 220 * 1024
