"""Time candidate settings of the attention kernels on this GPU, and print the rows that belong in
``kernels/hf_paged_kernels/settings.py``.

Nothing is tuned at run time: the tables in ``settings.py`` are what users get. This is how they were made, and how to
make them for another card::

    python -m eval.tune_kernels --output eval/results
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from hf_paged_kernels.backend import uses_gluon
from hf_paged_kernels.settings import AttentionSettings, HopperSettings
from tqdm import tqdm

from eval import command_line

HOPPER_PREFILL = {
    64: [HopperSettings(c, 128, s, q) for c in (2, 3) for s, q in ((2, 2), (3, 1), (3, 2))]
    + [HopperSettings(2, 128, 3, 2, pingpong=turns, full_weights=True) for turns in (False, True)]
    + [HopperSettings(3, 128, 3, 1, pingpong=True)],
    128: [HopperSettings(2, 128, 2, q) for q in (1, 2)] + [HopperSettings(2, 64, s, 1) for s in (3, 4)],
    256: [HopperSettings(2, 64, 2, 1), HopperSettings(2, 32, 3, 1), HopperSettings(1, 64, 2, 1)],
}
HOPPER_DECODE = {
    64: [HopperSettings(1, n, s, 1, 2, 128) for n, s in ((64, 3), (128, 2), (128, 3))],
    128: [HopperSettings(1, 64, s, 1, 2, 128) for s in (2, 3)] + [HopperSettings(1, 128, 3, 1)],
    256: [HopperSettings(1, 64, 2, 1, 1, 256), HopperSettings(1, 32, 3, 1, 1, 256)],
}
TRITON_PREFILL = {
    dim: [AttentionSettings(m, n, w, s) for m, n, w in tiles for s in (2, 3)]
    for dim, tiles in {
        64: [(128, 64, 4), (128, 64, 8), (128, 128, 8)],
        128: [(64, 64, 4), (128, 64, 8), (128, 128, 8)],
        256: [(64, 32, 4), (128, 32, 8), (128, 64, 8)],
    }.items()
}
TRITON_DECODE = {
    dim: [AttentionSettings(16, n, w, s) for n, w in ((32, 4), (64, 2), (64, 4), (128, 4)) for s in (2, 3, 4)]
    for dim in (64, 128, 256)
}


def cases(head_dim: int) -> Iterator[tuple[str, str, list[Any], Callable[[Any], Callable[[], Any]]]]:
    """``(kernel, workload, candidates, settings -> call)``: causal prefill of 4k and 16k tokens, decode of 8 x 8k."""
    from hf_paged_kernels.attention.flash_forward_triton import flash_attention_launch
    from hf_paged_kernels.attention.paged_triton import paged_attention_launch

    new = lambda *size: torch.randn(*size, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    scale, probe = head_dim**-0.5, new(1, 8, 1, head_dim)
    gluon = uses_gluon(probe, probe, probe, scale)
    for length in (4096, 16384):
        q, k, v = (new(16384 // length, length, 2048 // head_dim, head_dim) for _ in range(3))
        arguments = (q, k, v, None, None, length, None, 0, None, None, scale)
        workload = f"causal prefill, {length} tokens"
        yield "Triton", workload, TRITON_PREFILL[head_dim], lambda s, a=arguments: lambda: flash_attention_launch(*a, s)
        if gluon:
            from hf_paged_kernels.attention.hopper_gluon import hopper_flash_launch

            yield "Gluon", workload, HOPPER_PREFILL[head_dim], lambda s, a=arguments: lambda: hopper_flash_launch(*a, s)
    count, tokens = 8, 8192
    pages = [new(count * tokens // 16, 8, 16, head_dim) for _ in range(2)]
    table = torch.randperm(count * tokens // 16, device="cuda").view(count, -1).int()
    lens = torch.full((count,), tokens, dtype=torch.int32, device="cuda")
    cu = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    steps = (new(count, 32, head_dim), *pages, table, lens, cu, 1, None, 0, None, None, scale)
    workload = "decode, 8 sequences of 8,192 tokens, page 16, heads 32/8"
    yield (
        "Triton", workload, TRITON_DECODE[head_dim],
        lambda s: lambda: paged_attention_launch(*steps, None, None, s),
    )  # fmt: skip
    if gluon:
        from hf_paged_kernels.attention.hopper_gluon import hopper_paged_launch

        yield "Gluon", workload, HOPPER_DECODE[head_dim], lambda s: lambda: hopper_paged_launch(*steps, None, s)


def main(arguments: list[str] | None = None) -> int:
    """Time every candidate; the exit status is 2 without a GPU."""
    parser = command_line.make_parser("tune_kernels", __doc__)
    dims = [64, 128, 256]
    parser.add_argument("--head-dims", type=int, nargs="+", default=dims, choices=dims, help="to tune")
    parser.add_argument("--output", type=command_line.output_folder, help="folder for tuned_<device>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("eval.tune_kernels times kernels: it needs a GPU, and torch sees none.", file=sys.stderr)
        return 2
    import triton
    from triton.testing import do_bench

    rows: list[dict[str, Any]] = []
    for head_dim in options.head_dims:
        for kernel, workload, candidates, call in cases(head_dim):
            times: list[dict[str, Any]] = []
            for settings in tqdm(candidates, desc=f"{kernel}, head dim {head_dim}, {workload}"):
                try:
                    microseconds = 1000 * do_bench(call(settings), warmup=10, rep=40, return_mode="median")
                    times.append({"settings": asdict(settings), "us": round(microseconds, 1)})
                except Exception as error:  # a candidate may need more registers or shared memory than there is
                    times.append({"settings": asdict(settings), "failed": str(error).splitlines()[-1][:120]})
            ranked = sorted((t for t in times if "us" in t), key=lambda t: t["us"])
            rows.append({"kernel": kernel, "head_dim": head_dim, "workload": workload, "candidates": times})
            for place, one in enumerate(ranked[:3]):
                print(f"{'best' if place == 0 else '    '} {one['us']:9.1f} us  {tuple(one['settings'].values())}")
    device = torch.cuda.get_device_name()
    result = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "rows": rows}
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"tuned_{device.lower().replace(' ', '_')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}; the best settings belong in kernels/hf_paged_kernels/settings.py")
    return 0


if __name__ == "__main__":
    command_line.run(main)
