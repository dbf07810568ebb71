"""Launch functions give the same whatever the strides of their small tensors are: columns of a table, for example."""

import pytest
import torch

pytest.importorskip("triton")

from helpers import DEVICE, make_pages, prefix_sums
from hf_paged_kernels.attention.flash_backward_triton import flash_attention_backward_launch
from hf_paged_kernels.attention.flash_forward_triton import flash_attention_launch
from hf_paged_kernels.attention.merge_states_triton import merge_attention_states_launch
from hf_paged_kernels.attention.paged_quantized_triton import quantized_paged_attention_launch
from hf_paged_kernels.attention.paged_triton import paged_attention_launch
from hf_paged_kernels.attention.pages_triton import copy_pages_launch, write_pages_launch
from hf_paged_kernels.attention.reference import quantize
from hf_paged_kernels.attention.split_plan_triton import make_split_plan_launch
from hf_paged_kernels.layers.decode_inputs_triton import decode_inputs_launch, decode_rows_launch
from hf_paged_kernels.layers.gated_activation_triton import gated_activation_launch
from hf_paged_kernels.layers.rms_norm_triton import rms_norm_launch, rms_norm_parts_launch
from hf_paged_kernels.layers.rotary_write_triton import rotary_write_launch
from hf_paged_kernels.sampling.choose_triton import sample_tokens_launch
from hf_paged_kernels.sampling.reference import MARKS, TOKENS_OF_WORD, slot_rules

D = 16


def apart(x):
    """The same numbers, every other one of a tensor twice as large along each dimension; ones between them."""
    if not isinstance(x, torch.Tensor):
        return x
    wide = torch.ones([2 * n for n in x.shape], dtype=x.dtype, device=x.device)
    view = wide[(slice(None, None, 2),) * x.ndim]
    view.copy_(x)
    return view


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def new(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def flash_varlen():
    cu = prefix_sums([5, 7], DEVICE)
    q, k = new(12, 4, D), new(12, 2, D)
    return flash_attention_launch, (q, k, k, cu, cu, 7, None, 0, None, new(4), 0.25), (3, 4, 9)


def flash_backward():
    cu = prefix_sums([5, 7], DEVICE)
    q, k, out = new(12, 4, D), new(12, 2, D), new(12, 4, D)
    lse = new(4, 12)
    arguments = (q, k, k, out, lse, new(12, 4, D), new(4, 12), cu, cu, None, 0, None, new(4), 0.25)
    return flash_attention_backward_launch, arguments, (3, 4, 5, 6, 7, 8, 12)


def paged(max_query_len, lengths=(1, 1, 1)):
    seq_lens = [5, 600, 17]
    keys = [new(n, 2, D) for n in seq_lens]
    pages = make_pages(keys, keys, 16)
    # Entries that are not read may be anything; here they must stay inside the pool where a test fails.
    table = pages[2].clamp(max=pages[0].shape[0] - 1)
    arguments = (
        new(sum(lengths), 4, D), pages[0], pages[1], table, ints(*seq_lens), prefix_sums(lengths, DEVICE),
        max_query_len, None, 0, None, new(4), 0.25,
    )  # fmt: skip
    return paged_attention_launch, arguments, (3, 4, 5, 10)


def paged_decode():
    return paged(1)


def paged_prefill():
    return paged(40, (3, 40, 17))


def quantised():
    _, arguments, _ = paged(1)
    pages = [x.nan_to_num() for x in arguments[1:3]]
    (k_pages, k_scale), (v_pages, v_scale) = (quantize(x, torch.int8) for x in pages)
    plan = make_split_plan_launch(arguments[4], arguments[5], arguments[3].shape[1] * 16, None)
    arguments = (arguments[0].half(), k_pages, v_pages, *arguments[3:], k_scale, v_scale, plan)
    return quantized_paged_attention_launch, arguments, (3, 4, 5, 10, 12, 13, 14)


def split_plan():
    return make_split_plan_launch, (ints(5, 600, 17), ints(0, 1, 2, 3), 640, None), (0, 1)


def write_pages():
    pages = [torch.zeros(6, 2, 8, D, device=DEVICE, dtype=torch.int8) for _ in "kv"]
    scales = [torch.zeros(6, 2, 8, device=DEVICE) for _ in "kv"]
    slots = ints(3, 17, -1, 40, dtype=torch.int64)
    return write_pages_launch, (new(4, 2, D), new(4, 2, D), *pages, slots, *scales), (4, 5, 6)


def copy_pages():
    pages = new(6, 2, 8, D)
    return copy_pages_launch, (pages, pages.clone(), ints(0, 1), ints(3, 4)), (2, 3)


def merge_states():
    return merge_attention_states_launch, (new(5, 4, D), new(4, 5), new(5, 4, D), new(4, 5)), (1, 3)


def rotary_write():
    pages = torch.zeros(6, 2, 8, D, device=DEVICE)
    arguments = (
        new(4, 4, D), new(4, 2, D), new(4, 2, D), new(4, D // 2), new(4, D // 2), False, new(D), new(D), 1e-6, 0.0,
        True, pages, pages.clone(), None, None, ints(3, 17, -1, 40, dtype=torch.int64),
    )  # fmt: skip
    return rotary_write_launch, arguments, (3, 4, 6, 7, 15)


def rms_norm():
    return rms_norm_launch, (new(2, 3, 40), new(40), 1e-6, 0.0, True, new(2, 3, 40)), (0, 1, 5)


def rms_norm_parts():
    return rms_norm_parts_launch, (new(2, 3, 40), new(40), 1e-6, 0.0, True, new(3, 40)), (0, 1, 5)


def gated_activation():
    return gated_activation_launch, (new(2, 3, 40), "silu", "gate_up"), (0,)


def decode_inputs():
    slots, computed = ints(2, 0, 3, dtype=torch.int64), ints(4, -1, 9, 2, dtype=torch.int64)
    return decode_inputs_launch, (slots, computed, ints(7, 8, 9, 5, dtype=torch.int64)), (0, 1, 2)


def decode_rows():
    table = torch.arange(12, dtype=torch.int32, device=DEVICE).view(4, 3)
    return decode_rows_launch, (ints(2, 0, dtype=torch.int64), ints(24, 9), table, 8), (0, 1, 2)


def sample_tokens(vocab=300):
    slots = ints(2, 0, 1, dtype=torch.int64)
    rows = [slot_rules(vocab), slot_rules(vocab, penalty=2.0, seen=[1, 5]), slot_rules(vocab)]
    rules = torch.zeros(3, MARKS + -(-vocab // TOKENS_OF_WORD), dtype=torch.int64)
    for row, words in zip(rules, rows):
        row[: len(words)] = torch.from_numpy(words)
    doubles = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in ([0.7, 0, 1], [0.9, 1, 1], [0, 0, 0.05])]
    top_k, seeds, wants = (ints(*x, dtype=torch.int64) for x in ((20, 0, 0), (4, 5, 6), (1, 0, 1)))
    positions, last = ints(3, 8, 5, dtype=torch.int64), ints(9, 9, 9, dtype=torch.int64)
    temperature, top_p, min_p = doubles
    arguments = (
        new(3, vocab), slots, positions, temperature, top_k, top_p, min_p, seeds, wants, rules.to(DEVICE), last,
    )  # fmt: skip
    return sample_tokens_launch, arguments, tuple(range(11))


CASES = (
    flash_varlen, flash_backward, paged_decode, paged_prefill, quantised, split_plan, write_pages, copy_pages,
    merge_states, rotary_write, rms_norm, rms_norm_parts, gated_activation, decode_inputs, decode_rows, sample_tokens,
)  # fmt: skip


def called(launch, arguments):
    """Results, and what the tensors that were passed hold then."""
    results = launch(*arguments)
    results = results if isinstance(results, tuple) else () if results is None else (results,)
    return [*results, *(x for x in arguments if isinstance(x, torch.Tensor))]


def defined(x):
    """What a tensor holds, without the numbers behind the last item of a split plan, which nobody wrote."""
    return x[: 4 + 8 * int(x[0])] if x.dtype == torch.int32 and x.ndim == 1 and len(x) > 30 else x


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_elements_that_lie_apart(case):
    launch, arguments, small = case()
    strided = [
        apart(x) if i in small else x.clone() if isinstance(x, torch.Tensor) else x for i, x in enumerate(arguments)
    ]
    for got, expected in zip(called(launch, strided), called(launch, arguments), strict=True):
        if case is decode_rows and got.shape == (2, 3):
            got, expected = got[:1], expected[:1]  # The second row ends before its last page.
        torch.testing.assert_close(defined(got), defined(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [quantised, write_pages], ids=lambda case: case.__name__)
def test_scales_of_other_strides_are_refused(case):
    launch, arguments, _ = case()
    at = 13 if case is quantised else 6
    arguments = [apart(x) if i == at else x for i, x in enumerate(arguments)]
    with pytest.raises(ValueError, match="k_scale and v_scale must have the same strides"):
        launch(*arguments)
