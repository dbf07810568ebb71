"""The engine's options, each checked when it is given."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from hf_paged_kernels.checks import PAGE_SIZES

from ..paging.pool import KV_DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an :class:`Engine`.

    Attributes:
        page_size: tokens of a page: 8, 16, 32, 64, 128 or 256.
        num_pages: pages of the whole model (of every layer); None: as many as ``memory_fraction`` allows, and no more
            than ``max_num_seqs`` sequences of ``max_model_len`` tokens can use (and one, for a shared prompt). Pages
            get memory as they are first used; where the device has too little by then, the pool is as large as it
            allows.
        memory_fraction: the part of the device's free memory that pages may take where ``num_pages`` is None; on a
            nearly full GPU less, since steps need a part of it, which is measured at start.
        max_batch_tokens: tokens that one step computes at most; longer prompts are computed in chunks.
        mixed_prompt_tokens: prompt tokens that a step computes while other sequences decode, which wait for them. Fewer
            make the longest steps shorter, but more steps longer than others: the time between tokens is more even and
            its mean larger, and the first token comes later. More are computed where many are queued, up to
            ``max_batch_tokens``, or as fill a captured step. "auto": 192, for models of less than 1.5 billion
            parameters more (500 at 0.6 billion, 1,024 at most); :meth:`Engine.generate` may choose its own. None:
            always ``max_batch_tokens``. Models that keep recurrent states compute a prompt in one step whatever this
            says.
        max_num_seqs: sequences that run at a time (a request with 4 beams counts as 4).
        max_waiting: requests that wait for a slot at most; :meth:`Engine.submit` of one more raises QueueFullError.
            None: any number. :meth:`Engine.generate` hands its prompts over whatever this says.
        max_model_len: prompt and new tokens of a request; None: what the model's config says.
        prefix_caching: keep full pages after use, and find them again for prompts that begin alike, also in the step
            that computes them.
        kv_dtype: "auto": the model's; "fp8" or "int8": quantised pages.
        swap_space_gib: host memory for the pages of preempted requests; 0: they are computed again.
        seed: makes requests without a seed of their own repeatable, in the order in which they are submitted; None:
            their seeds come from torch's global generator.
        ageing_s: a request of priority p is served like one of priority 0 that came ``p * ageing_s`` seconds earlier,
            so no request waits forever behind later ones.
        self_check: compare a few short prompts with the model's own forward before serving.
        trace_steps: steps that :meth:`Engine.trace` remembers.
        cuda_graphs: decode steps and chunks of prompts are captured as CUDA graphs, one for each bucket of batch sizes
            and of token counts, but for chunks that keep the device busy by themselves; small chunks together with the
            rows that decode beside them. Each graph keeps its logits: 2.6 GB for all batch sizes up to 256, all chunks
            and a vocabulary of 152k. None: where it is possible; True: an engine that cannot is refused; False: never.
        compile: torch.compile compiles norms, MLPs and the like (whatever sees neither the cache nor attention), which
            makes the first steps slow and serves every length. What the model's owner has compiled
            (``model.compile()``) runs uncompiled in the engine without it.
        fuse: modules of usual kinds (norms, gated MLPs, attention, decoder layers) run fused while the engine computes:
            fewer kernels and larger matmuls. Each is compared with its own forward first. Weights of matmuls that
            become one are moved next to one another: code that keeps addresses of weights, as a CUDA graph does, must
            take them later, and handles of CUDA memory for other processes cannot be had of them.
            :meth:`Engine.close` moves them apart again. None: on a GPU; True: on a CPU as well, and an engine in which
            nothing can be is refused; False: never.
        compile_ahead: at start, other processes compile the kernels that the model's steps will need, many at a time;
            otherwise each is compiled by the step that meets it first. Done once for a shape of model in a cache
            folder of Triton. None: for models of 100 million parameters or more on a machine with four cores or more.
            Nothing is compiled for a CPU, an AMD GPU, or a model whose steps cannot be captured, whatever this says.
        batch_invariant: not available yet; must be False.

    Raises:
        ValueError, TypeError: an option is not one of those accepted.
    """

    page_size: int = 16
    num_pages: int | None = None
    memory_fraction: float = 0.9
    max_batch_tokens: int = 8192
    mixed_prompt_tokens: int | str | None = "auto"
    max_num_seqs: int = 256
    max_waiting: int | None = None
    max_model_len: int | None = None
    prefix_caching: bool = True
    kv_dtype: str = "auto"
    swap_space_gib: float = 0.0
    seed: int | None = None
    ageing_s: float = 60.0
    self_check: bool = True
    trace_steps: int = 100_000
    cuda_graphs: bool | None = None
    compile: bool = False
    fuse: bool | None = None
    compile_ahead: bool | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        _check_int("page_size", self.page_size, 1)
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {self.page_size!r}.")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {tuple(KV_DTYPES)}, got {self.kv_dtype!r}.")
        for name in ("num_pages", "max_model_len", "max_waiting"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1, "None or ")
        if self.mixed_prompt_tokens not in ("auto", None):
            _check_int("mixed_prompt_tokens", self.mixed_prompt_tokens, 1, '"auto", None or ')
        for name in ("max_batch_tokens", "max_num_seqs", "trace_steps"):
            _check_int(name, getattr(self, name), 1)
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens must be at least max_num_seqs, one token of each running sequence, got "
                f"{self.max_batch_tokens} and {self.max_num_seqs}."
            )
        if self.seed is not None:
            _check_int("seed", self.seed, 0, "None or ")
        _check_number("memory_fraction", self.memory_fraction)
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction must be above 0 and at most 1, got {self.memory_fraction!r}.")
        for name in ("swap_space_gib", "ageing_s"):
            value = getattr(self, name)
            _check_number(name, value)
            if value < 0 or (name == "ageing_s" and value == 0):
                raise ValueError(f"{name} must be {'above' if name == 'ageing_s' else 'at least'} 0, got {value!r}.")
        for name in ("prefix_caching", "self_check", "compile", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        for name in ("cuda_graphs", "fuse", "compile_ahead"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be None, True or False, got {getattr(self, name)!r}.")
        if self.batch_invariant:
            raise ValueError("batch_invariant=True is not available yet: leave it False.")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, field.name, int(value))  # NumPy's integers are none of Python's.


def _check_int(name: str, value: Any, least: int, also: str = "") -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be {also}an int of at least {least}, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be {also}an int of at least {least}, got {value!r}.")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")
