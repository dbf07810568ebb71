"""Host time of one eager call of the attention functions and of a cached decode step, in microseconds.

    python -m eval.bench_host_time [--profile NAME]

On a GPU it times real calls, and PyTorch's own attention beside them. Without one kernels are compiled for a Hopper GPU
and launched on a stub (``kernel_bench.stub_gpu``): all that Python does is there, CUDA and its allocator
are not, so compare with the same command at another commit on the same machine.
"""

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import hf_paged_kernels as kernels
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, DynamicCache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import hf_paged
from eval import command_line

LAYERS = 28


def calls(device: str, with_sdpa: bool) -> dict[str, Callable[[], object]]:
    """The calls by name, each on tensors of its own."""
    made = kernel_calls(device, with_sdpa)
    made[f"PagedCache, decode step of {LAYERS} layers"] = cached_step("paged_flash", device)
    if with_sdpa:
        made[f"DynamicCache and PyTorch's, decode step of {LAYERS} layers"] = cached_step("sdpa", device)
    return made


def kernel_calls(
    device: str, with_sdpa: bool, dims: tuple[int, ...] = (64, 128, 256)
) -> dict[str, Callable[[], object]]:
    """Those of ``hf_paged_kernels``, by head dims where these matter."""
    made: dict[str, Callable[[], object]] = {}
    new = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)  # noqa: E731

    def dense(dim: int) -> None:
        q, k, v, grad = new(1, 128, 16, dim), new(1, 128, 8, dim), new(1, 128, 8, dim), new(1, 128, 16, dim)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        flash = kernels.flash_attention
        made[f"flash_attention {dim}"] = lambda: flash(q, k, v, causal=True)
        both = lambda: torch.autograd.grad(flash(*leaves, causal=True), leaves, grad)  # noqa: E731
        made[f"flash_attention {dim}, backward too"] = both
        made[f"flash_attention {dim}, backward too, on one thread"] = on_one_thread(both)
        if with_sdpa:
            heads = [x.transpose(1, 2) for x in (q, k, v, grad)]
            more = [x.detach().clone().requires_grad_() for x in heads[:3]]
            sdpa = lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)  # noqa: E731
            made[f"PyTorch's {dim}"] = lambda: sdpa(*heads[:3])
            sdpa_both = lambda: torch.autograd.grad(sdpa(*more), more, heads[3])  # noqa: E731
            made[f"PyTorch's {dim}, backward too"] = sdpa_both
            made[f"PyTorch's {dim}, backward too, on one thread"] = on_one_thread(sdpa_both)

    for dim in dims:
        dense(dim)
    seqs, page_size, pages = 8, 16, 64
    pools = [new(seqs * pages + 1, page_size, 8, 128).transpose(1, 2) for _ in "kv"]
    table = torch.arange(seqs * pages, device=device, dtype=torch.int32).view(seqs, pages)
    lens = torch.full((seqs,), 1000, device=device, dtype=torch.int32)
    cu = torch.arange(seqs + 1, device=device, dtype=torch.int32)
    q, k, v = new(seqs, 16, 128), new(seqs, 8, 128), new(seqs, 8, 128)
    plan = kernels.make_split_plan(lens, cu, table, page_size)
    slots = torch.arange(seqs, device=device) * page_size
    step = (q, *pools, table, lens, cu)
    made["paged_attention, decode"] = lambda: kernels.paged_attention(*step, max_query_len=1)
    made["paged_attention, decode, plan given"] = lambda: kernels.paged_attention(*step, max_query_len=1, plan=plan)
    made["make_split_plan"] = lambda: kernels.make_split_plan(lens, cu, table, page_size)
    made["write_pages"] = lambda: kernels.write_pages(k, v, *pools, slots)
    return made


def cached_step(attention: str, device: str) -> Callable[[], object]:
    """All that a decode step of 8 sequences does in a model's cache and attention: new keys and values, attention."""
    config = Qwen3Config(
        hidden_size=2048, num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        attn_implementation=attention,
    )  # fmt: skip
    cache = (hf_paged.PagedCache if attention == "paged_flash" else DynamicCache)(config=config)
    attend = AttentionInterface()[attention]
    layers = [Qwen3Attention(config, i).eval().to("meta") for i in range(LAYERS)]

    def step(length: int = 1) -> None:
        new = torch.randn(8, length, 32, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)
        q, k, v = new.split((16, 8, 8), dim=1)
        for i, layer in enumerate(layers):
            attend(layer, q, *cache.update(k, v, i), None, dropout=0.0, scaling=layer.scaling, sliding_window=None)

    with torch.no_grad():
        step(128)
    return step


def on_one_thread(call: Callable[[], object]) -> Callable[[], object]:
    """Without autograd's thread of the GPU: what the way there and back costs is the difference."""

    def inner() -> object:
        with torch.autograd.set_multithreading_enabled(False):
            return call()

    return inner


ROUNDS = 10
"""In which the calls take turns."""


def microseconds(calls: dict[str, Callable[[], object]], wait: Callable[[], object], times: int) -> dict[str, float]:
    """Median time until each call returns, of ``times`` or a few more. Calls are made in turns: hosts change their
    speed within a minute. The device is waited for now and then: a full queue makes launches wait."""
    taken: dict[str, list[float]] = {title: [] for title in calls}
    for _ in tqdm(range(ROUNDS), "rounds", leave=False):
        for title, call in calls.items():
            with torch.set_grad_enabled("backward" in title):
                for _ in range(10):
                    call()
                wait()
                for i in range(-(-times // ROUNDS)):
                    start = time.perf_counter()
                    call()
                    taken[title].append(time.perf_counter() - start)
                    if i % 20 == 19:
                        wait()
    return {title: statistics.median(values) * 1e6 for title, values in taken.items()}


def main() -> None:
    """Print the table, or one call's profile."""
    parser = command_line.make_parser("bench_host_time", __doc__)
    parser.add_argument("--times", type=command_line.positive_int, default=300, help="calls of each")
    parser.add_argument("--profile", metavar="NAME", help="profile this call instead")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device, name, wait = "cuda", torch.cuda.get_device_name(), torch.cuda.synchronize
    else:
        from eval.kernel_bench.stub_gpu import pretend_hopper

        pretend_hopper()
        device, name, wait = "cpu", "stub of a Hopper GPU", lambda: None
    made = calls(device, on_gpu)
    if arguments.profile is not None:
        if arguments.profile not in made:
            parser.error(f"--profile must be one of {', '.join(map(repr, made))}, got {arguments.profile!r}.")
        call, profile = made[arguments.profile], cProfile.Profile()
        for _ in range(10):
            call()
        profile.enable()
        for _ in range(arguments.times):
            call()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return
    print(f"host time of a call on {name}, torch {torch.__version__}\n\n| call | us |\n|---|---|")
    for title, us in microseconds(made, wait, arguments.times).items():
        print(f"| {title} | {us:.0f} |")


if __name__ == "__main__":
    command_line.run(main)
