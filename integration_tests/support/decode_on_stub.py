"""Decode steps of a cache on a stub of a GPU, for ``test_decode_step.py``: launches and torch ops of a layer."""

import sys
from collections import Counter

import torch
from hf_paged_kernels import backend
from hf_paged_kernels.attention import ops
from hf_paged_kernels.attention.decode_step import DecodeStep
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import hf_paged
from eval.kernel_bench.stub_gpu import pretend_hopper
from hf_paged.attention.interface import paged_flash_attention

SEQS = 3


def named(call, names):
    """A launch's arguments, tensors by their names; "new" for memory that a call took for itself."""
    flat: list = []

    def add(x):
        if isinstance(x, tuple | list):
            for one in x:
                add(one)
        elif isinstance(x, int) and x > 2**32:
            flat.append(names.get(x, "new"))
        elif type(x) in (int, float, str, bool, torch.dtype):
            flat.append(x)

    add(call)
    return flat


def launches(wide: bool, window: int | None, with_sinks: bool) -> None:
    """The launches of a layer are those of the ops."""
    new = lambda *shape: torch.randn(shape, dtype=torch.bfloat16)  # noqa: E731
    pages = 200 if wide else 5
    pools = [new(pages * SEQS, 16, 2, 128).transpose(1, 2) for _ in "kv"]
    table = torch.arange(SEQS * pages, dtype=torch.int32).view(SEQS, pages)
    lens = torch.full((SEQS,), 16 * pages, dtype=torch.int32)
    cu, slots = torch.arange(SEQS + 1, dtype=torch.int32), torch.arange(SEQS) * 16
    q, k, v = new(SEQS, 1, 8, 128).transpose(1, 2), *new(SEQS, 1, 4, 128).transpose(1, 2).split(2, dim=1)
    sinks = torch.randn(8) if with_sinks else None
    options = (None if window is None else window - 1, 0, None, sinks, 0.1)
    inputs = dict(q=q, k=k, v=v, k_pages=pools[0], v_pages=pools[1], table=table, lens=lens, cu=cu, slots=slots)
    names = {x.data_ptr(): name for name, x in (inputs | (dict(sinks=sinks) if with_sinks else {})).items()}

    def by_ops():
        ops.write_pages_op(k.squeeze(2), v.squeeze(2), *pools, slots, None, None)
        return ops.paged_attention_op(q.squeeze(2), *pools, table, lens, cu, 1, *options, None, None, None)[0]

    by_ops()
    stub.calls.clear()
    expected_out = by_ops()
    expected = [named(call, names) for call in stub.calls]
    step = DecodeStep(table, lens, cu, slots)
    stub.calls.clear()
    for number in range(3):
        version = pools[0]._version
        out = step.attend(q, k, v, *pools, *options)
        assert out.shape == (SEQS, 1, 8, 128)
        assert out.dtype == expected_out.dtype
        assert out.is_contiguous()
        assert pools[0]._version == version + 1
        names[out.data_ptr()] = "new"
        calls = [named(call, names) for call in stub.calls]
        stub.calls.clear()
        # The plan of the splits comes between: the ops write first, a step makes it for its first layer.
        write, plan, *attend = expected
        assert calls == ([plan, write, *attend] if number == 0 else [write, *attend]), (calls, expected)
    assert len(expected) == 3 + wide
    # What is not served leaves everything to the ops.
    with torch.enable_grad():
        assert step.attend(q.detach().requires_grad_(), k, v, *pools, *options) is None
    assert step.attend(q[:, :, :0], k, v, *pools, *options) is None
    assert step.attend(torch.cat([q, q]), k, v, *pools, *options) is None
    assert step.attend(*(x.float() for x in (q, k, v)), *(x.float() for x in pools), *options) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert step.attend(q, k, v, *pools, *options) is None
    # A refusal is remembered for layers alike.
    asked = []
    own = backend.uses_gluon
    backend.uses_gluon = lambda *args: asked.append(args) or own(*args)
    narrow = [x[..., :80].contiguous() for x in (q, k, v)], [x[..., :80].contiguous() for x in pools]
    for _ in range(3):
        assert step.attend(*narrow[0], *narrow[1], *options) is None
    backend.uses_gluon = own
    assert len(asked) == 1


def counted(layers: int) -> tuple[int, Counter]:
    """Launches and torch ops of a decode step of a cache of ``layers`` layers."""
    config = Qwen3Config(
        hidden_size=512, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        attn_implementation="paged_flash",
    )  # fmt: skip
    cache = hf_paged.PagedCache(config)
    attention = [Qwen3Attention(config, i).eval().to("meta") for i in range(layers)]

    def step(length: int) -> None:
        new = torch.randn(SEQS, length, 16, 64, dtype=torch.bfloat16).transpose(1, 2)
        q, k, v = new.split((8, 4, 4), dim=1)
        for i, layer in enumerate(attention):
            keys, values = cache.update(k, v, i)
            paged_flash_attention(layer, q, keys, values, None, scaling=layer.scaling, position_ids=None)

    for length in (40, 1, 1):
        step(length)
    num_calls = stub.num_calls
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        step(1)
    return stub.num_calls - num_calls, Counter({x.key: x.count for x in profile.key_averages()})


if __name__ == "__main__":
    stub = pretend_hopper()
    torch.manual_seed(0)
    with torch.no_grad():
        if sys.argv[1] == "launches":
            for wide in (False, True):
                for window in (None, 33):
                    for with_sinks in (False, True):
                        launches(wide, window, with_sinks)
            print("8 cases")
        else:
            (few_launches, few_ops), (many_launches, many_ops) = counted(3), counted(8)
            print("launches", (many_launches - few_launches) / 5)
            print("ops", sorted((name, count / 5) for name, count in (many_ops - few_ops).items()))
