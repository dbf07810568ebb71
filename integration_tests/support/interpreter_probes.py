"""What the interpreter makes of small kernels without the repairs of ``interpreter.py``; prints name -> right.

Run by ``test_interpreter.py`` in a process of its own.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl


@triton.jit
def _dot(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _copy(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def _count(length, out):
    total = 0
    for i in range(tl.load(length)):
        total += i
    tl.store(out, total)


@triton.jit
def _masked(flag, source, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    mask = tl.full([SIZE], 1, tl.int32) * (tl.load(flag) > 0) & (at < SIZE - 1)
    tl.store(out + at, tl.load(source + at, mask=mask, other=0.0))


def dot_of_bfloat16() -> bool:
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, 16)
    return torch.allclose(out, a.float() @ b.float(), atol=1e-2)


def copied(source: torch.Tensor, dtype: torch.dtype) -> bool:
    target = torch.empty(len(source), dtype=dtype)
    _copy[(1,)](source, target, len(source))
    return torch.equal(target.float(), source.to(dtype).float())


def carry_into_bfloat16() -> bool:
    return copied(torch.tensor([1.9999, 3.9999, 0.99999, 1.0]), torch.bfloat16)


def carry_into_fp8() -> bool:
    return copied(torch.tensor([1.99, 3.99, 0.999, 1.0]), torch.float8_e4m3fn)


def integers_into_bfloat16() -> bool:
    return copied(torch.tensor([1, 2, 3, 200]), torch.bfloat16)


def length_from_memory() -> bool:
    out = torch.zeros(1, dtype=torch.int64)
    _count[(1,)](torch.tensor([5]), out)
    return int(out) == 10


def mask_of_a_comparison() -> bool:
    source, out = torch.randn(16), torch.full((16,), float("nan"))
    _masked[(1,)](torch.tensor([1]), source, out, 16)
    return torch.equal(out[:15], source[:15]) and float(out[15]) == 0


if __name__ == "__main__":
    torch.manual_seed(0)
    right = {}
    for probe in (
        dot_of_bfloat16, carry_into_bfloat16, carry_into_fp8, integers_into_bfloat16, length_from_memory,
        mask_of_a_comparison,
    ):  # fmt: skip
        try:
            right[probe.__name__] = probe()
        except Exception as error:
            right[probe.__name__] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(right))
