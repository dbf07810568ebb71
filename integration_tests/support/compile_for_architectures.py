"""Compiles the kernels that GPUs of several architectures would launch, without any, and reads what they take.

    python integration_tests/support/compile_for_architectures.py              # eval/results/architectures.md
    python integration_tests/support/compile_for_architectures.py sm_80 few    # of one, as JSON, a line a variant

Ops run as on that GPU, on tensors in host memory, with the driver of ``compile_for_hopper.py``, which launches nothing:
they choose kernels and tiles by what the device has.
"""

import datetime
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import compile_for_hopper as hopper
import torch
import triton
from compile_for_hopper import new
from triton.backends.compiler import GPUTarget

BF16, FP32, INT8, FP8 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
WORDS = {BF16: "bfloat16", FP32: "float32", INT8: "int8", FP8: "fp8"}


class Architecture(NamedTuple):
    """A GPU architecture.

    Attributes:
        target: Triton's name of it.
        devices: GPUs that have it.
        shared: bytes of shared memory that a program may use.
        registers: 32-bit registers that the threads of a program may have together.
        has_fp8: whether FP8 pages are accepted.
    """

    target: GPUTarget
    devices: str
    shared: int
    registers: int = 65536
    has_fp8: bool = True


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), "NVIDIA A100 (Ampere)", 163 * 1024, has_fp8=False),
    "sm_89": Architecture(GPUTarget("cuda", 89, 32), "NVIDIA L4, L40S, RTX 4090 (Ada)", 99 * 1024),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), "NVIDIA H100, H200 (Hopper)", 227 * 1024),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), "NVIDIA B200 (Blackwell)", 227 * 1024),
    # A lane has 512 registers, on each of the four SIMD units of a compute unit.
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), "AMD MI300 (CDNA 3)", 64 * 1024, 4 * 64 * 512),
}


@dataclass(frozen=True)
class Figures:
    """What one variant of a kernel takes.

    Attributes:
        case: the call that launches it.
        kernel: its name.
        shared: bytes of shared memory of a program.
        threads: of a program.
        registers: of a thread.
        stack: bytes of a thread in memory: registers that it spills.
    """

    case: str
    kernel: str
    shared: int
    threads: int
    registers: int
    stack: int

    def objection(self, device: Architecture) -> str | None:
        """Why the device cannot launch it, or None."""
        name = f"{self.kernel} of {self.case}"
        if self.shared > device.shared:
            return f"{name}: {self.shared} bytes of shared memory, of {device.shared}"
        if self.threads > 1024:
            return f"{name}: {self.threads} threads, of 1024"
        if self.threads * self.registers > device.registers:
            return f"{name}: {self.threads} threads of {self.registers} registers, of {device.registers} in all"
        return None


def figures_of(case: str, name: str, kernel: Any, device: Architecture) -> Figures:
    """Of a compiled kernel, from its binary."""
    shared = kernel.metadata.shared
    if device.target.backend == "hip":

        def number(word: str) -> int:
            return int(re.findall(rf"\.{word}:\s+(\d+)", kernel.asm["amdgcn"])[-1])

        # Accumulation registers are counted among the vector registers.
        registers, stack = number("vgpr_count"), number("private_segment_fixed_size")
        return Figures(case, name, shared, number("max_flat_workgroup_size"), registers, stack)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.findall(rf"\b{word}:(\d+)", done.stdout)[-1]) for word in ("REG", "STACK"))
    threads = re.findall(r"\.(?:reqntid|maxntid)\s+(\d+)", kernel.asm["ptx"])
    return Figures(case, name, shared, int(threads[0]), registers, stack)


def pretend(device: Architecture) -> None:
    """Make the package see that GPU."""
    from hf_paged_kernels import backend, dependent_launch_triton, settings
    from hf_paged_kernels.attention import ops as attention_ops
    from hf_paged_kernels.layers import ops as layer_ops
    from hf_paged_kernels.linear import lora
    from hf_paged_kernels.sampling import ops as sampling_ops

    hopper.pretend(device.target)
    is_nvidia = device.target.backend == "cuda"
    is_new = is_nvidia and device.target.arch >= 90
    backend.has_gluon = lambda _: device.target.arch == 90
    backend.on_nvidia = lambda _: is_nvidia
    dependent_launch_triton.has_dependent_launch = lambda _: is_new
    settings.shared_memory_limit = lambda _: device.shared
    settings.multiprocessors = lambda _: 100
    settings.flash_backward_settings = lambda _, dim, v_dim, size: settings.choose_flash_backward_settings(
        max(dim, v_dim), size, device.shared, is_new, is_nvidia and device.target.arch >= 100
    )
    for module in (attention_ops, layer_ops, lora, sampling_ops):
        module.uses_triton = lambda _: True


def flash(dims: tuple[int, int], dtype: torch.dtype = BF16, full: bool = False) -> None:
    """Forward and backward of dense tensors, causal; ``full``: packed, with a window, softcap and sinks."""
    from hf_paged_kernels.attention import ops

    (q, k), (dim, v_dim), length = (8, 2), dims, 300
    first = () if full else (1,)
    tensors = [new(*first, length, n, d, dtype=dtype) for n, d in ((q, dim), (k, dim), (k, v_dim))]
    cu = torch.tensor([0, 100, length], dtype=torch.int32) if full else None
    options = (100, 0, 20.0, new(q), 0.1) if full else (None, 0, None, None, 0.1)
    ops.flash_attention_op.function(*tensors, cu, cu, length, *options)
    out, lse = new(*first, length, q, v_dim, dtype=dtype), new(*first, q, length, dtype=FP32)
    ops.flash_attention_backward_op.function(*tensors, out, lse, out, lse if full else None, cu, cu, *options)


def paged(
    dims: tuple[int, int], longest: int, dtype: torch.dtype = BF16, pages: torch.dtype | None = None, group: int = 4,
    full: bool = False,
) -> None:  # fmt: skip
    """A step over pages whose longest query has ``longest`` tokens."""
    from hf_paged_kernels.attention import ops

    pages = pages or dtype
    table, cu = new(2, 40, dtype=torch.int32), torch.tensor([0, longest, longest + 1], dtype=torch.int32)
    lens = torch.tensor([600, 5], dtype=torch.int32)
    k, v = (new(50, 2, 16, dim, dtype=pages) for dim in dims)
    scale = new(50, 2, 16, dtype=FP32) if pages in (INT8, FP8) else None
    options = (100, 0, 20.0, new(2 * group), 0.1) if full else (None, 0, None, None, 0.1)
    q = new(longest + 1, 2 * group, dims[0], dtype=dtype)
    ops.paged_attention_op.function(q, k, v, table, lens, cu, longest, *options, scale, scale)


def small(has_fp8: bool) -> None:
    """What runs around attention: pages, norms, rotary embeddings, adapters."""
    from hf_paged_kernels.attention import ops as attention_ops

    hopper.small(has_fp8)
    hopper._lora()
    q, lse = new(300, 8, 512), new(8, 300, dtype=FP32)
    attention_ops.merge_attention_states_op.function(q, lse, q, lse)


AMOUNTS = "few", "table", "all"
"""How many cases: of every run of the tests, of the table, and of ``HF_PAGED_TESTS=all``."""
Case = tuple[str, str, Callable[[], None]]


def cases(device: Architecture) -> Iterator[Case]:
    """Amount from which on it is among them, name, call."""
    quantised = (INT8, FP8) if device.has_fp8 else (INT8,)
    for amount, dim, longest, group, pages in (
        ("few", 128, 1, 4, BF16), ("few", 256, 300, 8, BF16), ("few", 128, 1, 4, INT8),
        ("all", 256, 1, 8, BF16), ("all", 512, 1, 8, BF16), ("all", 512, 16, 8, INT8),
    ):  # fmt: skip
        yield amount, *paged_case(dim, longest, group, BF16, pages)
    yield "table", f"flash 128 {WORDS[BF16]}, packed, all options", partial(flash, (128, 128), full=True)
    yield "all", "layers, pages, adapters", partial(small, device.has_fp8)
    yield "all", "sampling", hopper.sampling
    for dims, dtype, full in itertools.product(
        ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512)), (BF16, FP32), (False, True)
    ):
        name = f"flash {dims[0]}/{dims[1]} {WORDS[dtype]}" + ", packed, all options" * full
        yield "all", name, partial(flash, dims, dtype, full=full)
    for dim, (longest, group), (dtype, pages) in itertools.product(
        (64, 128, 256, 512), ((1, 1), (1, 4), (1, 32), (1, 128), (16, 4), (16, 8), (300, 4), (300, 128)),
        ((BF16, BF16), (FP32, FP32), *((BF16, x) for x in quantised), (FP32, INT8)),
    ):  # fmt: skip
        yield "all", *paged_case(dim, longest, group, dtype, pages)


def paged_case(dim: int, longest: int, group: int, dtype: torch.dtype, pages: torch.dtype) -> tuple:
    """Name and call of a step over pages with window, softcap and sinks."""
    name = f"paged {dim} {WORDS[pages]} pages, {WORDS[dtype]}, {longest} queries, {group} heads"
    return name, partial(paged, (dim, dim), longest, dtype, pages, group, full=True)


def report(name: str, amount: str) -> Iterator[dict[str, Any]]:
    """Of each case of ``AMOUNTS`` up to ``amount``: figures of its kernels, or why it cannot be compiled."""
    device = ARCHITECTURES[name]
    pretend(device)
    hopper.EVERYTHING = amount == "all"
    for least, case, call in cases(device):
        if AMOUNTS.index(least) > AMOUNTS.index(amount):
            continue
        hopper.KERNELS.clear()
        try:
            call()
        except Exception as error:
            yield dict(case=case, objection=f"{case}: {type(error).__name__}: {error}"[:600])
            continue
        for kernel_name, kernel in hopper.KERNELS:
            figures = figures_of(case, kernel_name, kernel, device)
            yield asdict(figures) | dict(objection=figures.objection(device))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The lines of :func:`report` by architecture, as Markdown; of several variants of a kernel the largest figures."""
    rows: dict[tuple[str, str], dict[str, list[int]]] = {}
    objections = []
    for name, lines in found.items():
        for line in lines:
            if line["objection"]:
                objections.append(f"- {name}: {line['objection']}")
            if "kernel" in line:
                cell = rows.setdefault((line["case"], line["kernel"]), {}).setdefault(name, [0, 0, 0, 0])
                values = (line["shared"], line["threads"], line["registers"], line["stack"])
                cell[:] = map(max, cell, values)
    text = [
        "# What kernels take on other architectures",
        "",
        f"`make architectures`, {datetime.date.today()}, triton {triton.__version__}, torch {torch.__version__}, on a "
        "machine without a GPU. **Compiled only: nothing ran on any of these devices for this table**, and it says "
        "nothing about results or speed. Kernels are those that ops launch there, with tiles chosen by the device's "
        "shared memory.",
        "",
        "| architecture | devices | shared memory of a program, bytes | registers of a program |",
        "|---|---|---|---|",
        *(f"| {name} | {x.devices} | {x.shared:,} | {x.registers:,} |" for name, x in ARCHITECTURES.items()),
        "",
        "Cells: bytes of shared memory; registers of a thread x threads; bytes of a thread on its stack: registers "
        "that were spilled. -: not launched there.",
        "",
        "| call | kernel | " + " | ".join(found) + " |",
        "|---" * (2 + len(found)) + "|",
    ]
    for (case, kernel), cells in rows.items():
        shown = []
        for name in found:
            shared, threads, registers, stack = cells.get(name, (0, 0, 0, 0))
            shown.append(f"{shared:,}; {registers} x {threads}; {stack:,}" if threads else "-")
        text.append(f"| {case} | `{kernel}` | " + " | ".join(shown) + " |")
    text += ["", "Does not compile, or does not fit:" if objections else "All of it fits.", *objections, ""]
    return "\n".join(text)


def main() -> None:
    """Write the table, each architecture by a process of its own."""
    found = {}
    for name in ARCHITECTURES:
        done = subprocess.run([sys.executable, __file__, name, "table"], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = [json.loads(line) for line in done.stdout.splitlines()]
    (Path(__file__).parents[2] / "eval/results/architectures.md").write_text(table(found), "utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        for line in report(*sys.argv[1:]):
            print(json.dumps(line), flush=True)
    else:
        main()
