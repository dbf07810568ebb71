"""Compiles kernels for a Hopper GPU on a machine without one; run by ``test_compilation.py`` and
``ptx_hashes.py``, one family at a time.

    python integration_tests/support/compile_for_hopper.py attention few

With "few" every kernel is compiled, in the variants that need most registers and shared memory.
Launch functions run as they do on a GPU, on tensors in host memory, with a driver that compiles and launches nothing.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

EVERYTHING = True
"""Whether all variants are compiled."""
KERNELS: list[tuple[str, Any]] = []
"""Name and compiled kernel of each launch, in their order."""


class Driver:
    """Stands for a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(own_run: Callable) -> Callable:
    """``JITFunction.run`` that launches nothing."""

    def run(self, *args, grid, warmup=False, **kwargs):
        kernel = own_run(self, *args, grid=grid, warmup=True, **kwargs)
        KERNELS.append((self.fn.__name__, kernel))
        return kernel

    return run


def pretend(target: GPUTarget) -> None:
    """Make Triton compile for a GPU, and launch nothing."""
    triton.runtime.driver.set_active(Driver(target))
    JITFunction.run = compile_only(JITFunction.run)


def pretend_hopper() -> None:
    """Make Triton and the package see a GPU of capability 9.0."""
    pretend(GPUTarget("cuda", 90, 32))
    from hf_paged_kernels import backend, dependent_launch_triton, settings

    settings.multiprocessors = lambda device: 132
    settings.shared_memory_limit = lambda device: 227 * 1024
    settings.flash_backward_settings = lambda device, dim, v_dim, size: settings.choose_flash_backward_settings(
        max(dim, v_dim), size, 227 * 1024, True
    )
    dependent_launch_triton.has_dependent_launch = lambda device: True
    backend.on_nvidia = lambda tensor: True


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def decode_step(dim: int, page_dtype: torch.dtype = torch.bfloat16, width: int = 40) -> tuple:
    """``(q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q)`` of two sequences, 8 query heads on 2."""
    table, lens = new(2, width, dtype=torch.int32), torch.tensor([600, 5], dtype=torch.int32)
    cu = torch.tensor([0, 1, 2], dtype=torch.int32)
    return new(2, 8, dim), *(new(50, 2, 16, dim, dtype=page_dtype) for _ in "kv"), table, lens, cu


def attention() -> None:
    """The Gluon kernel of each head dim, decode and prefill; the portable one."""
    from hf_paged_kernels.attention.flash_backward_triton import flash_attention_backward_launch
    from hf_paged_kernels.attention.flash_forward_triton import flash_attention_launch
    from hf_paged_kernels.attention.hopper_backward_gluon import hopper_backward_launch
    from hf_paged_kernels.attention.hopper_gluon import hopper_flash_launch, hopper_paged_launch
    from hf_paged_kernels.attention.merge_states_triton import merge_attention_states_launch
    from hf_paged_kernels.attention.paged_triton import paged_attention_launch

    options = (None, 0, None, None, 0.1)
    for dim in (64, 128, 256) if EVERYTHING else (256,):
        step = decode_step(dim)
        if EVERYTHING:
            hopper_paged_launch(*step, 1, *options)
        hopper_paged_launch(*step, 1, 100, 0, 20.0, new(8), 0.1)
        hopper_paged_launch(*step, 300, *options)
        k = new(1, 300, 2, dim)
        hopper_flash_launch(new(1, 300, 8, dim), k, k, None, None, 300, *options)
    # Wide tables: other tiles, and another merge.
    for longest in (1, 300) if EVERYTHING else ():
        hopper_paged_launch(*decode_step(128, width=200), longest, *options)
    paged_attention_launch(*decode_step(128), 1, *options)
    q, k, lse = new(1, 300, 8, 128), new(1, 300, 2, 128), new(1, 8, 300, dtype=torch.float32)
    flash_attention_launch(q, k, k, None, None, 300, *options)
    flash_attention_backward_launch(q, k, k, q, lse, q, None, None, None, None, 0, None, new(8), 0.1)
    for dim in (64, 128):
        x, y = new(1, 300, 8, dim), new(1, 300, 2, dim)
        hopper_backward_launch(x, y, y, x, lse, x, None, None, None, None, 0, 0.1)
        cu = torch.tensor([0, 100, 300], dtype=torch.int32)
        hopper_backward_launch(x[0], y[0], y[0], x[0], lse[0], x[0], lse[0], cu, cu, 50, 0, 0.1)
        # A gradient that TMA cannot read is copied.
        shifted = new(x.numel() + 1)[1:].view(x.shape)
        hopper_backward_launch(x, y, y, x, lse, shifted, None, None, None, None, 0, 0.1)
    merge_attention_states_launch(q[0], lse[0], q[0], lse[0])


def quantised() -> None:
    """Attention over FP8 and INT8 pages: decode in Gluon, prefill."""
    from hf_paged_kernels.attention.paged_quantized_gluon import quantized_splits_launch
    from hf_paged_kernels.attention.paged_quantized_triton import quantized_paged_attention_launch

    scale = new(50, 2, 16, dtype=torch.float32)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        step = decode_step(128, dtype)
        quantized_splits_launch(*step, 1, None, 0, None, None, 0.1, scale, scale)
        quantized_paged_attention_launch(*step, 300, None, 0, None, None, 0.1, scale, scale)


def linear() -> None:
    """Linear layers of few and of more tokens, plain, gated and in parts; adapters."""
    from hf_paged_kernels.linear.decode_gluon import decode_linear_launch, linear_parts_launch
    from hf_paged_kernels.linear.decode_settings import choose_decode_linear
    from hf_paged_kernels.linear.skinny_gluon import skinny_linear_launch
    from hf_paged_kernels.linear.skinny_settings import choose_skinny_linear

    for rows, columns in ((4096, 1024), (6144, 4096)) if EVERYTHING else ((6144, 4096),):
        weight = new(rows, columns)
        for tokens, gated in itertools.product((1, 2, 4, 16) if EVERYTHING else (1, 16), (False, True)):
            settings = choose_skinny_linear(tokens, rows, columns, gated, 2)
            if settings is None:
                continue
            x, bias, norm = new(tokens, columns), new(rows), new(columns)
            residual = None if gated else new(tokens, rows)
            if EVERYTHING or gated:
                skinny_linear_launch(x, weight, None, None, norm if gated else None, 1e-5, settings, gated)
            skinny_linear_launch(x, weight, bias, residual, norm, 1e-5, replace(settings, norm_first=False), gated)
        for tokens in (24, 64, 256) if EVERYTHING else (64,):
            x = new(tokens, columns)
            for gated, in_parts in ((False, False), (True, False), (False, True)):
                chosen = choose_decode_linear(tokens, rows, columns, gated, in_parts)
                for bias in (None, new(rows)) if chosen is not None else ():
                    if in_parts:
                        linear_parts_launch(x, weight, bias, chosen)
                    else:
                        decode_linear_launch(x, weight, bias, chosen, gated)


    _lora()


def _lora() -> None:
    """Adapters of different requests, in steps of few and of many tokens."""
    from hf_paged_kernels.linear.lora import lora_table
    from hf_paged_kernels.linear.lora_triton import lora_linear_launch

    for dtype in (torch.bfloat16, torch.float32) if EVERYTHING else (torch.float32,):
        for rank, tokens in ((16, 24), (12, 24), (64, 300), (256, 300)) if EVERYTHING else ((256, 300),):
            a, b = [new(rank, 4096, dtype=dtype)] * 2, [new(6144, rank, dtype=dtype)] * 2
            index = torch.zeros(tokens, dtype=torch.int32)
            lora_linear_launch(
                new(tokens, 4096), new(tokens, 6144), index, index, new(3, dtype=torch.float64),
                lora_table(a, b, index.device), a, b,
            )  # fmt: skip


def small(has_fp8: bool = True) -> None:
    """What runs between matmuls, and around a step."""
    from hf_paged_kernels.attention.pages_triton import copy_pages_launch, write_pages_launch
    from hf_paged_kernels.layers.decode_inputs_triton import decode_inputs_launch, decode_rows_launch
    from hf_paged_kernels.layers.gated_activation_triton import gated_activation_launch
    from hf_paged_kernels.layers.rms_norm_triton import rms_norm_launch, rms_norm_parts_launch
    from hf_paged_kernels.layers.rotary_write_triton import rotary_write_launch

    x, weight, index = new(5, 4096), new(4096), torch.arange(5)
    rms_norm_launch(x, weight, 1e-5, 0.0, True, None)
    rms_norm_launch(x, weight, 1e-5, 0.0, True, x)
    rms_norm_parts_launch(new(3, 5, 4096, dtype=torch.float32), weight, 1e-5, 0.0, True, x)
    gated_activation_launch(new(5, 8192), "silu", "gate_up")
    q, k, cos, norm = new(5, 8, 128), new(5, 2, 128), new(5, 128), new(128)
    pages = new(50, 2, 16, 128)
    for weights in ((None, None), (norm, norm)):
        rotary_write_launch(
            q, k, k, cos, cos, False, *weights, 1e-5, 0.0, True, pages, pages.clone(), None, None, index
        )
    scale = new(50, 2, 16, dtype=torch.float32)
    for dtype in (torch.float8_e4m3fn, torch.int8)[not has_fp8 :]:
        codes = (pages.to(dtype) for _ in "kv")
        rotary_write_launch(q, k, k, cos, cos, False, norm, norm, 1e-5, 0.0, True, *codes, scale, scale.clone(), index)
    write_pages_launch(k, k, pages, pages.clone(), index)
    for dtype in (torch.int8, torch.float8_e4m3fn)[: 1 + has_fp8]:
        codes = pages.to(dtype), pages.to(dtype)
        write_pages_launch(k, k, *codes, index, scale, scale.clone())
    copy_pages_launch(pages, pages.clone(), index, index + 5)
    _, _, lens = decode_inputs_launch(index, index.clone(), index.clone())
    decode_rows_launch(index, lens, new(6, 40, dtype=torch.int32), 16)


def sampling() -> None:
    """The choice of tokens."""
    from hf_paged_kernels.sampling import choose_triton

    index, numbers = torch.zeros(3, dtype=torch.int64), new(3, dtype=torch.float64)
    rules = new(3, 5000, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32) if EVERYTHING else (torch.float32,):
        logits = new(3, 50_257, dtype=dtype)
        choose_triton.sample_tokens_launch(
            logits, index, index, numbers, index, numbers, numbers, index, index, rules
        )


FAMILIES = {function.__name__: function for function in (attention, quantised, linear, small, sampling)}

if __name__ == "__main__":
    EVERYTHING = sys.argv[2:] != ["few"]
    pretend_hopper()
    FAMILIES[sys.argv[1]]()
    print(*sorted({name for name, _ in KERNELS}))
