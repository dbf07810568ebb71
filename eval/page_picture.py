"""A picture of the page pool over time: who owns which page at every step.

    python -m eval.page_picture --output eval/results/page_picture.png

Three requests on one pool: a prompt whose pages are stored as a prefix, beams that go on from it, and samples of a
longer prompt with the same beginning. The model is small and random; the pages are what a PagedCache says.
"""

import platform
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
from eval import command_line
from eval.loading import with_cache

FREE, CACHED, SHARED = -1, -2, -3
"""Owners that are not one sequence: nobody; the prefix cache alone; several sequences."""

NAMES = {FREE: "free", CACHED: "kept as a prefix, no sequence", SHARED: "shared by sequences"}
GREY, SHARED_COLOR = "#b8b8b8", "#f2c14e"
SEQUENCE_COLORS = ("#2a6f97", "#c8553d", "#588157", "#7b5ea7", "#3aa6a6", "#b5838d", "#8d6e63", "#5c677d")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The requests of the picture; lengths in tokens.

    Attributes:
        page_size: tokens of a page.
        num_pages: pages of the pool.
        prompt: the first prompt, which is stored.
        answer: its answer.
        beams: beams of the second request.
        beam_tokens: their new tokens.
        samples: samples of the third request.
        sample_prompt: tokens of their prompt behind the first one.
        sample_tokens: their new tokens.
    """

    page_size: int = 8
    num_pages: int = 56
    prompt: int = 100
    answer: int = 20
    beams: int = 4
    beam_tokens: int = 48
    samples: int = 3
    sample_prompt: int = 60
    sample_tokens: int = 40


@dataclass(slots=True)
class Recording:
    """Owners of every page at every step.

    Attributes:
        steps: per step, the owner of each page, as :func:`record` gives them.
        phases: where a request begins, as its first step and what it is.
    """

    steps: list[list[int]] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)


def record(cache: hf_paged.PagedCache, window: int | None = None) -> list[int]:
    """The owner of each page of the layers with a sliding ``window`` (None: full attention), by page id.

    Returns:
        The row of the sequence that holds the page, or FREE, CACHED or SHARED.
    """
    pages = cache.groups[window].pages
    owners = [FREE] * pages.allocator.num_pages
    if cache.pool.prefixes is not None:
        for page in cache.pool.prefixes.held(list(cache.pool.groups).index(window)):
            owners[page] = CACHED
    for row, held in enumerate(cache.groups[window].table.pages):
        for page in held:
            if page >= 0:  # negative: given back, its window has moved on
                owners[page] = row if owners[page] in (FREE, CACHED) else SHARED
    return owners


def build() -> LlamaForCausalLM:
    """A random Llama whose weights are large enough for beams to part."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, initializer_range=0.25, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="paged_flash", dtype=torch.float32).eval()


@torch.inference_mode()
def run(sizes: Sizes) -> Recording:
    """Serve the three requests and record the pool after every forward, and after every reset."""
    model, recording = build(), Recording()
    pool = hf_paged.PagePool(page_size=sizes.page_size, num_pages=sizes.num_pages)
    cache = hf_paged.PagedCache(model.config, pool=pool)
    prompt = torch.randint(1, 97, (1, sizes.prompt), generator=torch.Generator().manual_seed(1))
    longer = torch.randint(1, 97, (1, sizes.sample_prompt), generator=torch.Generator().manual_seed(2))
    progress = tqdm(desc="steps", total=sizes.answer + sizes.beam_tokens + sizes.sample_tokens)

    def after(*_: Any) -> None:
        recording.steps.append(record(cache))
        progress.update()

    def request(name: str, ids: torch.Tensor, num_seqs: int, new: int, **options: Any) -> torch.Tensor:
        recording.phases.append((len(recording.steps), name))
        cache.match_prefix(ids.expand(num_seqs, -1))
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            **with_cache(model, cache), **options,
        )  # fmt: skip

    def idle(name: str, steps: int = 4) -> None:
        recording.phases.append((len(recording.steps), name))
        cache.reset()
        recording.steps += [record(cache)] * steps

    handle = model.register_forward_hook(after)
    try:
        answer = request("one sequence", prompt, 1, sizes.answer, do_sample=False)
        cache.store_prefix(answer)
        idle("")
        beams = {"num_beams": sizes.beams, "do_sample": False}
        request(f"{sizes.beams} beams, same prompt", prompt, sizes.beams, sizes.beam_tokens, **beams)
        idle("")
        samples = {"num_return_sequences": sizes.samples, "do_sample": True}
        name = f"{sizes.samples} samples, longer prompt"
        request(name, torch.cat([prompt, longer], dim=1), sizes.samples, sizes.sample_tokens, **samples)
        idle("")
    finally:
        handle.remove()
        progress.close()
    pool.check()
    # A pool takes its pages as it needs them: those not taken yet are free.
    for owners in recording.steps:
        owners += [FREE] * (sizes.num_pages - len(owners))
    return recording


def draw(recording: Recording, sizes: Sizes, path: Path) -> None:
    """Write the picture as PNG, 1200 pixels wide.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError('eval.page_picture draws with matplotlib: pip install "hf-paged[eval]".') from error
    figure = Figure(figsize=(12, 7.2), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.06, 0.17, 0.925, 0.7))
    num_steps = len(recording.steps)
    used = [page for owners in recording.steps for page, owner in enumerate(owners) if owner != FREE]
    num_pages = min(sizes.num_pages, max(used) + 4)  # those above were never taken
    seen: set[int] = {FREE}
    for page in range(num_pages):
        start = 0
        for owner, run_of_steps in groupby(owners[page] for owners in recording.steps):
            length = len(list(run_of_steps))
            if owner != FREE:
                seen.add(owner)
                axes.broken_barh([(start, length)], (page, 1), **_style(owner))
            start += length
    for step, name in recording.phases:
        axes.axvline(step, color="black", linewidth=0.8, linestyle=":")
        if name:
            axes.text(step + 0.4, num_pages + 0.6, name, fontsize=11, va="bottom", ha="left")
    axes.set_xlim(0, num_steps)
    axes.set_ylim(0, num_pages)
    axes.set_xlabel("step (one forward)", fontsize=11)
    axes.set_ylabel(f"page id ({sizes.page_size} tokens a page)", fontsize=11)
    figure.suptitle("Who owns which page: three requests on one pool", fontsize=15, x=0.06, ha="left", y=0.975)
    order = [*sorted(owner for owner in seen if owner >= 0), *(owner for owner in NAMES if owner in seen)]
    handles = [
        Patch(**{"edgecolor": "#888888", **_patch(owner)}, label=NAMES.get(owner, f"sequence {owner} alone"))
        for owner in order
    ]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.055, 0.035), ncol=4, frameon=False, fontsize=10)
    figure.text(
        0.985, 0.012,
        f"python -m eval.page_picture, {date.today().isoformat()}: hf_paged {hf_paged.__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}",
        fontsize=8, color="#666666", ha="right",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _style(owner: int) -> dict[str, Any]:
    """How a bar of an owner looks."""
    if owner == CACHED:
        return {"facecolor": GREY, "edgecolor": "white", "linewidth": 0.4}
    if owner == SHARED:
        return {"facecolor": SHARED_COLOR, "edgecolor": "#8a6d1d", "linewidth": 0.3, "hatch": "////"}
    return {"facecolor": SEQUENCE_COLORS[owner % len(SEQUENCE_COLORS)], "edgecolor": "white", "linewidth": 0.4}


def _patch(owner: int) -> dict[str, Any]:
    """The legend's sample of an owner."""
    return {"facecolor": "white", "edgecolor": "#888888"} if owner == FREE else _style(owner)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = command_line.make_parser("page_picture", __doc__)
    parser.add_argument("--output", type=command_line.output_file, required=True, help="PNG file")
    parsed = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    sizes = Sizes()
    draw(run(sizes), sizes, parsed.output)


if __name__ == "__main__":
    command_line.run(main)
